"""Reading ahead of a computation and writing behind it, in threads: bounded, in order, nothing lost on the way."""

import contextlib
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from scaling_perception.support.stopping import finished_first

T = TypeVar("T")
R = TypeVar("R")


def read_ahead(items: Iterable[T], function: Callable[[T], R], workers: int, most: int) -> Generator[R, None, None]:
    """``map(function, items)`` whose next results are made in threads while the last one is used; in order.

    Args:
        workers: threads; 0 calls the function when its result is asked for.
        most: items at a time that are in work or wait to be taken.
    """
    if workers < 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="read")
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class WriteBehind:
    """Calls functions in threads while the caller goes on. Leaving the block waits for all of them.

    What was handed over is still done when the block is left by Ctrl-C or an error: it is finished work. The first
    error of a function is raised by a later call, or on leaving.
    """

    def __init__(self, workers: int, most: int) -> None:
        """Args: threads, 0 calls in place; how many calls may wait before the caller has to."""
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="write") if workers > 0 else None
        self._waiting: deque[Future[Any]] = deque()
        self._most = most

    def __enter__(self) -> "WriteBehind":
        return self

    def __call__(self, function: Callable[..., Any], *args: Any) -> None:
        if self._pool is None:
            _whole(function, *args)
            return
        while len(self._waiting) >= self._most:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(_whole, function, *args))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._pool is None:
            return
        try:
            while self._waiting and kind is None:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown(wait=True)


def _whole(function: Callable[..., Any], *args: Any) -> None:
    with finished_first():
        function(*args)


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Within the block SIGTERM leaves it as an exception would, with exit code 143, so that it can clean up.

    A handler that is there already stays, as that of the command line.
    """

    def leave(number: int, frame: Any) -> None:
        del frame
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()  # only it may set handlers
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
