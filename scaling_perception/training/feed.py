"""The batches of a run, as the step takes them: global arrays on the devices."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import jax

from scaling_perception.data.workers import Reading
from scaling_perception.parallel import processes
from scaling_perception.training.goodput import Clock
from scaling_perception.training.objective import Batch
from scaling_perception.training.setup import Run


class Fed(NamedTuple):
    """A batch: ``arrays`` (B, …) over the devices, and the ``keys`` of this process's samples by their place in it."""

    arrays: dict[str, jax.Array]
    keys: dict[int, str]


def ahead(read: Iterator[Batch], put: Callable[[Batch], Any]) -> Iterator[Any]:
    """``put`` of each batch. Of those that grain reads one waits on the devices, the next is on its way."""
    if not isinstance(read, grain.DatasetIterator):
        return map(put, read)
    return grain.experimental.ThreadPrefetchDatasetIterator(Reading(read, put), 1)


class Feed:
    """Reads the batches from step ``start`` on. ``waited``: seconds that all calls together waited for the data."""

    def __init__(self, run: Run, start: int, clock: Clock) -> None:
        self._run, self._clock, self.waited = run, clock, 0.0
        self._read = run.objective.batches.iterate(start)
        self._fed = ahead(self._read, self._put)

    def next(self) -> Fed:
        """The next batch."""
        before = time.monotonic()
        with self._clock.spend("data_wait"):
            fed = next(self._fed)
        self.waited += time.monotonic() - before
        return fed

    def close(self) -> None:
        """Let the readers' threads or processes end."""
        for stage in (self._read, self._fed):  # the reader first: what waits for it ends then
            getattr(stage, "close", lambda: None)()

    def _put(self, batch: Batch) -> Fed:
        arrays = dict(batch)
        keys = dict(zip(self._run.rows, arrays.pop("key", ()), strict=False))
        return Fed(processes.put_batch(arrays, self._run.split, self._run.config.train.batch_size), keys)
