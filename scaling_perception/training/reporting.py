"""What a run reports: lines at its start, a row of metrics every few steps, means for each checkpoint."""

import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from scaling_perception.data.selection import samples_taken
from scaling_perception.parallel.processes import is_first
from scaling_perception.support.field_checks import notes
from scaling_perception.training.averaging import start_warning
from scaling_perception.training.feed import Feed
from scaling_perception.training.goodput import Clock, waiting_advice
from scaling_perception.training.guards import Pending
from scaling_perception.training.setup import Run
from scaling_perception.training.writer import Pace, Window, Writer, duration


def say(line: str) -> None:
    """Print one line to stderr, in the first process alone."""
    if is_first():
        print(line, file=sys.stderr, flush=True)


def run_facts(run: Run) -> dict[str, Any]:
    """What ``run.json`` holds of a run, whatever becomes of it."""
    return {
        "command": run.command,
        "config": run.identity["config"],
        "data": run.identity["data"],
        "parameters": run.parameters,
        "macs_per_sample": run.macs,
        "samples_per_step": run.objective.samples_per_step,
        "samples": samples_taken(run.objective.batches),
    }


def announce(run: Run, story: str) -> None:
    """Print what is about to be trained, from where (``story``), on which data and devices, and what looks odd."""
    config, mesh, objective = run.config, run.mesh, run.objective
    say(f"{config.model if objective.model else config.objective}: {run.parameters / 1e6:.2f} M parameters, {story}")
    for line in (*samples_taken(objective.batches), *notes(config)):
        say(line)
    if warning := start_warning(config.optim, run.total):
        say(warning)
    spread = " × ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    on = f"{mesh.size} {mesh.devices.flat[0].platform} device(s){f' ({spread})' if spread else ''}"
    say(f"{run.total} steps of {config.train.batch_size} on {on}, {jax.process_count()} process(es)")
    if run.readers > 1:
        say(f"each sample is read by {run.readers} processes: mesh.tensor spans that many")


class NullWriter:
    """Takes what ``training.writer.Writer`` takes, and writes nothing: for all processes but the first."""

    def begin(self) -> None: ...

    def tick(self) -> None: ...

    def report(self, step: int, values: Mapping[str, float]) -> None: ...

    def say(self, line: str) -> None: ...

    def close(self) -> None: ...


class Reporter:
    """Means, pace and cost of the steps since the last row, written every ``train.log_every`` steps.

    Args:
        start: number of finished steps when this process began.
        feed: whose waiting is reported as ``data_wait``.

    Raises:
        UserError: Weights & Biases is wanted and cannot be used.
    """

    def __init__(self, run: Run, start: int, feed: Feed, clock: Clock) -> None:
        wanted = {"wandb": run.config.train.wandb, "config": run.identity["config"]}
        self.writer = Writer(run.workdir, start, run.total, **wanted) if is_first() else NullWriter()
        self._run, self._start, self._feed, self._clock = run, start, feed, clock
        self._pace, self._window, self._since_saved = Pace(), Window(), Window()
        self._reported, self._waited, self._advised = start, 0.0, False

    def compiled(self, seconds: float) -> None:
        """The step is compiled and about to run for the first time: what came before is no measure of its pace."""
        self.writer.say(f"compiled the step in {duration(seconds)}")
        self.writer.begin()
        self._pace.resume()
        self._waited = self._feed.waited

    def leave_out(self, seconds: float) -> None:
        """So much of the time since the last step was validation, and no part of the pace."""
        self._pace.leave_out(seconds)

    def resume(self) -> None:
        """The time since the last step was saving, and no part of the pace."""
        self._pace.resume()

    def log(self, pending: Pending, values: Mapping[str, float]) -> None:
        """Take in the metrics of a step, as ``Guard.check`` gives them; write a row where one is due.

        Raises:
            UserError: the disk is full.
        """
        self._window.add(values)
        self._since_saved.add(values)
        self.writer.tick()
        self._pace.tick()
        number = pending.number
        if number % self._run.config.train.log_every == 0 or number == self._run.total or pending.eval_metrics:
            self._write(number, pending.eval_metrics)

    def means(self) -> dict[str, float]:
        """Means of the metrics since the last call, which are kept with a checkpoint."""
        return self._since_saved.means()

    def _write(self, number: int, eval_metrics: Mapping[str, float]) -> None:
        run, device = self._run, self._run.mesh.devices.flat[0]
        steps, self._reported = number - self._reported, number
        waited, self._waited = self._feed.waited - self._waited, self._feed.waited
        size = run.objective.samples_per_step
        samples = number * size
        row = {**self._window.means(), **eval_metrics}
        row |= {"lr": float(np.asarray(run.schedule(number - 1))), "samples": samples}
        tokens = getattr(run.objective.model, "tokens", 0)
        row |= self._pace.row(size, run.macs, run.mesh.size, device.device_kind, tokens)
        row |= {"data_wait": waited / steps / row["seconds_per_step"], "macs": samples * run.macs}
        self.writer.report(number, {**row, **self._clock.row()})
        # not of the first step, which waits for readers that are still starting
        if number > self._start + 1 and not self._advised:
            if advice := waiting_advice(row["data_wait"], run.config):
                self._advised = True
                self.writer.say(advice)
