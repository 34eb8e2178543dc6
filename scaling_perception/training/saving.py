"""One save under way: arrays copied to the host, a thread that writes them, and what the processes tell each other."""

import asyncio
import contextlib
import functools
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

RUNNING, DONE, FAILED = 0, 1, 2


class Saving:
    """One save: its temporary folder, the thread that works at it, and the first error.

    ``named``: the last part of the work, giving the folder its name, has begun.
    """

    def __init__(self, step: int, place: Path) -> None:
        self.step, self.place = step, place
        self.error: BaseException | None = None
        self.named = False
        self._thread: threading.Thread | None = None
        self._futures: list[Any] = []

    @contextlib.contextmanager
    def catching(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    def copy(self, items: Mapping[str, Any]) -> None:
        """Copy the arrays to the host and start to write them."""
        handler = ocp.StandardCheckpointHandler()
        with ThreadPoolExecutor(1) as pool:  # where no event loop is running, as one does in notebooks
            for name, tree in items.items():
                work = handler.async_save(epath.Path(self.place / name), args=ocp.args.StandardSave(tree))
                self._futures += pool.submit(asyncio.run, work).result() or []

    def written(self) -> None:
        """Return when this process's part is written; no error leaves before every write has ended."""
        errors = [self.error] if self.error is not None else []
        for future in self._futures:
            try:
                future.result()
            except Exception as error:
                errors.append(error)
        self._futures = []  # they hold the copies
        if errors:
            raise errors[0]

    def run(self, work: Callable[[], None]) -> None:
        """Do ``work`` in a thread; its error becomes this save's error."""
        if self.error is not None and not self._futures:
            return

        def quietly() -> None:
            with self.catching(), quiet():
                work()

        self._thread = threading.Thread(target=quietly, name=f"save-{self.step}")
        self._thread.start()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def status(self) -> int:
        if self._thread is not None and self._thread.is_alive():
            return RUNNING
        return DONE if self.error is None else FAILED


def gather(value: int) -> list[int]:
    """``value`` of every process, in order of the processes; a barrier as well."""
    if jax.process_count() == 1:
        return [value]
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.process_allgather(np.int32(value))).reshape(-1).tolist()


def from_first(value: int) -> int:
    """``value`` as the first process has it."""
    return gather(value)[0]


def failure(error: BaseException | None) -> BaseException | None:
    """This process's error, or one that names another process which has an error, or None."""
    failed = gather(error is not None)
    return error if error or not any(failed) else OSError(f"process {failed.index(True)} failed, and says why")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Orbax logs long tracebacks of what it also raises; one line from us says the same."""
    logger = logging.getLogger("absl")
    _let_go_in_peace()
    logger.addFilter(_unless_orbax)
    try:
        yield
    except Exception as error:
        one: BaseException | None = error
        while one is not None:
            traceback.clear_frames(one.__traceback__)  # they hold arrays, and work that is not finished
            one = one.__context__
        raise
    finally:
        logger.removeFilter(_unless_orbax)


def _unless_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


@functools.cache
def _let_go_in_peace() -> None:
    """For good: after an error Orbax's other reads and writes end behind its back, and find nobody to tell."""
    hook = sys.unraisablehook

    def unless_left_behind(told: Any) -> None:
        code = getattr(told.object, "cr_code", None)
        if "Event loop is closed" not in str(told.exc_value) and not (code and "orbax" in code.co_filename):
            hook(told)

    sys.unraisablehook = unless_left_behind
