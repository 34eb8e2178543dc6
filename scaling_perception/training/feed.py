"""The batches of a run, as the step takes them: global arrays on the devices."""

import time
from typing import NamedTuple

import jax

from scaling_perception.parallel import processes
from scaling_perception.training.goodput import Clock
from scaling_perception.training.setup import Run


class Fed(NamedTuple):
    """A batch: ``arrays`` (B, …) over the devices, and the ``keys`` of this process's samples by their place in it."""

    arrays: dict[str, jax.Array]
    keys: dict[int, str]


class Feed:
    """Reads the batches from step ``start`` on. ``waited``: seconds that all calls together waited for the data."""

    def __init__(self, run: Run, start: int, clock: Clock) -> None:
        self._run, self._clock, self.waited = run, clock, 0.0
        self._batches = run.objective.batches.iterate(start)

    def next(self) -> Fed:
        """The next batch."""
        before = time.monotonic()
        with self._clock.spend("data_wait"):
            batch = dict(next(self._batches))
        self.waited += time.monotonic() - before
        keys = dict(zip(self._run.rows, batch.pop("key", ()), strict=False))
        return Fed(processes.put_batch(batch, self._run.split, self._run.config.train.batch_size), keys)

    def close(self) -> None:
        """Let the readers' threads or processes end."""
        getattr(self._batches, "close", lambda: None)()
