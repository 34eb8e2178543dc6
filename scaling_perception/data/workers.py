"""Work spread over processes, with results in the order of the jobs, so that what comes out depends on no schedule."""

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from scaling_perception.support.errors import UserError

_work: Callable[[Any], Any] | None = None  # in a worker process: what this process does with a job


def _follow_parent() -> None:
    # Queues keep a worker waiting for ever when its parent is killed: end with it instead.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _start(make: Callable[..., Callable[[Any], Any]], args: tuple[Any, ...]) -> None:
    global _work
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group: the parent alone answers them
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    _work = make(*args)


def _call(job: Any) -> Any:
    assert _work is not None
    return _work(job)


def ordered_map(
    make: Callable[..., Callable[[Any], Any]],
    args: tuple[Any, ...],
    jobs: Iterable[Any],
    workers: int,
    ahead: int = 4,
) -> Generator[Any, None, None]:
    """Yield ``make(*args)(job)`` for each job, in order.

    ``make`` runs once in each process and may be slow (it opens a dataset). With ``workers`` of 0 or 1 all happens in
    this process, else in that many spawned ones; then ``make``, its arguments, jobs and results must pickle, and at
    most ``ahead * workers`` jobs are under way, also when ``jobs`` has no end.

    Raises:
        UserError: a worker process died. Whatever the work itself raises is passed on.
    """
    if workers <= 1:
        work = make(*args)
        for job in jobs:
            yield work(job)
        return
    waiting: collections.deque[Future[Any]] = collections.deque()
    # spawn, not fork: a forked copy of a process that runs XLA's threads may hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(make, args))
    try:
        for job in jobs:
            waiting.append(pool.submit(_call, job))
            if len(waiting) >= ahead * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process ended early (out of memory, or a script without `if __name__ == '__main__'`): "
            "use fewer workers, or 0 to work in one process"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def default_workers() -> int:
    """Processes to use when nobody says: the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
