"""What the training loop does beside its steps: validate, save, stop when asked. Each hook keeps its own state."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

from scaling_perception.training.checkpoints import Checkpoints
from scaling_perception.training.goodput import Clock
from scaling_perception.training.guards import Guard
from scaling_perception.training.record import Attempt
from scaling_perception.training.reporting import Reporter, say
from scaling_perception.training.setup import Run
from scaling_perception.training.state import TrainState
from scaling_perception.training.validation import make_validation


class Validate:
    """Measures the held-out loss of the running average every ``train.validate_every`` steps and at the last one."""

    def __init__(self, run: Run, reporter: Reporter, clock: Clock) -> None:
        every = run.config.train.validate_every
        self._measure = make_validation(run.objective, run.config, run.mesh) if every else None
        self._run, self._reporter, self._clock = run, reporter, clock

    def __call__(self, step: int, state: TrainState, metrics: Any) -> dict[str, float]:
        """The metrics of ``state`` after ``step`` steps, or {} where no validation is due. ``metrics``: of the step."""
        if self._measure is None or (step % self._run.config.train.validate_every and step != self._run.total):
            return {}
        jax.block_until_ready(metrics)  # or the end of the step would count as validation
        before = time.monotonic()
        with self._clock.spend("evaluate"):
            found = self._measure(state.ema, self._run.key, self._run.constants)
        self._reporter.leave_out(time.monotonic() - before)
        return found


class Save:
    """Saves the state every ``train.checkpoint_every`` steps and at the last one. Its steps must have been checked."""

    def __init__(
        self, run: Run, checkpoints: Checkpoints, guard: Guard, reporter: Reporter, attempt: Attempt, clock: Clock
    ) -> None:
        self._run, self._checkpoints, self._guard = run, checkpoints, guard
        self._reporter, self._attempt, self._clock = reporter, attempt, clock

    def due(self, step: int) -> bool:
        """Whether the state after ``step`` steps is saved in any case."""
        return step % self._run.config.train.checkpoint_every == 0 or step == self._run.total

    def __call__(self, step: int, state: TrainState, eval_metrics: Mapping[str, float], wait: bool = False) -> None:
        """Start to write the state; on return its buffers may be given away. ``wait``: until it is written.

        Raises:
            UserError: its copies differ, or the save before it failed.
        """
        with self._clock.spend("checkpoint"):
            self._guard.check_copies(step, state)
            metrics = {**self._reporter.means(), **eval_metrics}
            self._checkpoints.save(state, self._run.identity, metrics=metrics)
            if wait:
                self._checkpoints.wait()
        self._attempt.saved()
        self._reporter.resume()


class Stop:
    """Whether SIGINT or SIGTERM has asked the run to stop; make it with `asked_to_stop`."""

    def __init__(self, several: bool) -> None:
        self.several, self.signals = several, list[int]()

    def asked(self) -> bool:
        return bool(self.signals)

    def agree(self, step: int) -> None:
        """Ask all processes alike: JAX tells each of them at the same step that one is to be stopped."""
        if self.several and reached_preemption_sync_point(step):
            self.signals.append(signal.SIGTERM)


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Stop]:
    """Within the block SIGINT and SIGTERM are noted, so that the step under way can finish and be saved.

    A second SIGINT interrupts at once. Outside the main thread, where Python allows no handlers, nothing is noted.
    In a run of several processes JAX's own handler of SIGTERM tells all of them, and SIGINT is passed on to it.
    """
    stop = Stop(jax.process_count() > 1)

    def note(number: int, _: Any) -> None:
        if stop.asked() and number == signal.SIGINT:
            raise KeyboardInterrupt
        if stop.several:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        stop.signals.append(number)
        line = "stopping after this step; saving (Ctrl-C again: stop at once, losing steps since the last checkpoint)"
        try:
            say(line)
        except RuntimeError:  # the signal came while a line was being written
            os.write(2, f"{line}\n".encode())

    before: dict[int, Callable[..., Any] | int | None] = {}
    with contextlib.suppress(ValueError):
        for number in (signal.SIGINT,) if stop.several else (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
