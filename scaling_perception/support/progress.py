"""Progress: a bar on a terminal, plain log lines elsewhere; and for what cannot be counted, the time it takes."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], total: int | None, label: str, every_seconds: float = 15.0) -> Iterator[T]:
    """Yield ``items`` while showing how far it got.

    On a terminal a tqdm bar on stderr; elsewhere one line at most every ``every_seconds`` seconds, and one at the end.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=label, dynamic_ncols=True)
        return
    begin = last = time.monotonic()
    count = 0
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= every_seconds:
            last = now
            _line(label, count, total, now - begin)
    _line(label, count, total, time.monotonic() - begin)


@contextlib.contextmanager
def waiting(label: str, every_seconds: float = 10.0) -> Iterator[None]:
    """Say on stderr that ``label`` has begun, and while the block runs every so often for how long it has."""
    done, begin = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(every_seconds):
            print(f"{label}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)

    print(f"{label} …", file=sys.stderr, flush=True)
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _line(label: str, count: int, total: int | None, seconds: float) -> None:
    of = f"/{total}" if total else ""
    left = f", {(total - count) * seconds / max(count, 1):.0f} s left" if total and count < total else ""
    print(f"{label}: {count}{of} in {seconds:.0f} s{left}", file=sys.stderr, flush=True)
