"""The one timer of benches: functions in turns, so that what else the machine does meets all of them alike."""

import math
import os
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from scaling_perception.support.errors import UserError

Function = Callable[[], Any]


def in_rounds(functions: Mapping[str, Function], repeats: int, warm: bool = False) -> dict[str, dict[str, Any]]:
    """Seconds by the clock and of all processors together, in turns; each round starts one function further.

    A call counts when the arrays that it returns are there.

    Args:
        warm: each timed call follows an untimed one of the same function, which pays for the memory and caches that the
            function before it left behind; else the functions are called once before the first round.

    Returns:
        name -> seconds (median), fastest, processor_seconds (median), first_call_seconds, rounds (seconds of each).
    """
    import jax

    def seconds_of(function: Function) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(function())
        return time.perf_counter() - begin

    first = {} if warm else {name: seconds_of(function) for name, function in functions.items()}
    clock: dict[str, list[float]] = {name: [] for name in functions}
    busy: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for _ in range(repeats):
        for name in order:
            if warm:
                spent = seconds_of(functions[name])
                first.setdefault(name, spent)
            work = time.process_time()
            clock[name].append(seconds_of(functions[name]))
            busy[name].append(time.process_time() - work)
        order = order[1:] + order[:1]
    return {
        name: {
            "seconds": median(clock[name]),
            "fastest": min(clock[name]),
            "processor_seconds": median(busy[name]),
            "first_call_seconds": first[name],
            "rounds": clock[name],
        }
        for name in functions
    }


def several(function: Function, span: float) -> tuple[Function, int]:
    """So many calls in one that it takes about ``span`` seconds, after one that warms the caches; and how many."""
    begin = time.perf_counter()
    function()
    count = max(1, math.floor(span / (time.perf_counter() - begin)))

    def calls() -> None:
        for _ in range(count):
            function()

    return (calls if count > 1 else function), count


def ratio(found: Mapping[str, Any], slow: str, fast: str) -> dict[str, float]:
    """How many times faster: the median over the rounds, the fastest calls, and by time of the processors."""
    a, b = found[slow], found[fast]
    return {
        "ratio": median(x / y for x, y in zip(a["rounds"], b["rounds"], strict=True)),
        "ratio_of_fastest": a["fastest"] / b["fastest"],
        "ratio_of_processor_seconds": a["processor_seconds"] / b["processor_seconds"],
    }


def keep_to(cores: int) -> None:
    """Before the first array: so many processors are seen by JAX as by torch.

    Raises:
        UserError: the system has no such limit, or fewer processors.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("--cores cannot be kept to on this system: leave it out")
    available = sorted(os.sched_getaffinity(0))
    if not 1 <= cores <= len(available):
        raise UserError(f"--cores {cores}: this machine has {len(available)}")
    os.sched_setaffinity(0, available[:cores])
