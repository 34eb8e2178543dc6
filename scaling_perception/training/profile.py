"""A trace of a few steps of a run, for TensorBoard's profiler or Perfetto: ``train --profile FIRST:COUNT``."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scaling_perception.support.errors import UserError

# hook(number, state): a context for step ``number``; ``state`` is what the step before it gave
Hook = Callable[[int, Any], contextlib.AbstractContextManager[Any]]


def parse_steps(text: str) -> tuple[int, int]:
    """``10:5`` -> (10, 5): five steps from the tenth on; ``10`` alone means one.

    Raises:
        UserError: the text is of another form, or a number is 0.
    """
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first, count = (int(found[1]), int(found[2] or 1)) if found else (0, 0)
    if first < 1 or count < 1:
        raise UserError(f"--profile is '{text}': give FIRST:COUNT, such as 10:5 for steps 10 to 14")
    return first, count


@contextlib.contextmanager
def trace_steps(workdir: Path, first: int, count: int, say: Callable[[str], None] = print) -> Iterator[Hook]:
    """Yields a hook for the loop; steps ``first`` .. ``first + count - 1`` are traced to ``workdir/profile``.

    Step n is the one that makes the n-th state; a run that is resumed after ``first`` begins with the step it has. The
    trace begins and ends with the devices idle, so that it holds whole steps only. An error in the loop ends it.

    Args:
        count: 0 traces nothing: the hook costs nothing then.
        say: told where the trace is, or that the run ended before ``first``.
    """
    import jax

    place = workdir / "profile"
    last, running, done = first + count - 1, False, count < 1

    def stop() -> None:
        nonlocal running, done
        running, done = False, True
        jax.profiler.stop_trace()
        say(f"trace of the steps in {place}: tensorboard --logdir {workdir}")

    def hook(number: int, state: Any) -> contextlib.AbstractContextManager[Any]:
        nonlocal running, last
        if not done and not running and number >= first:
            last = number + count - 1
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(place))
            running = True
        elif running and number > last:
            jax.block_until_ready(state)
            stop()
        return jax.profiler.StepTraceAnnotation("train", step_num=number) if running else contextlib.nullcontext()

    try:
        yield hook
    finally:
        if running:
            stop()
        elif not done:
            say(f"--profile: the run ended before step {first}: nothing was traced")
