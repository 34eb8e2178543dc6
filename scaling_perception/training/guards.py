"""What a run looks at after each step, and what is reported, and kept, of one that went wrong.

Every process must call these alike: some of them gather from all processes.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from scaling_perception.parallel.processes import is_first
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import write_json
from scaling_perception.training.checkpoints import Checkpoints
from scaling_perception.training.replicas import Table, differing, replica_sums
from scaling_perception.training.saving import gather
from scaling_perception.training.setup import Run
from scaling_perception.training.state import TrainState
from scaling_perception.training.validation import check_metric


class Pending(NamedTuple):
    """A step that the host has started and whose numbers it has not looked at.

    Attributes:
        number: of the step; the first is 1.
        metrics: scalars, on the devices.
        keys: of this process's samples, by their place in the global batch.
        inputs, copies: checksums of the batch and of the state on their way from the devices; None = not compared.
        eval_metrics: of the validation at this step; {} without one.
    """

    number: int
    metrics: Mapping[str, jax.Array]
    keys: Mapping[int, str]
    inputs: Table | None
    copies: Table | None
    eval_metrics: Mapping[str, float]


class Guard:
    """Stops a run whose state must not be saved: not finite, a spike, or not the same on all devices.

    Args:
        start: number of finished steps when this process began.
    """

    def __init__(self, run: Run, start: int, checkpoints: Checkpoints) -> None:
        self._run, self._start, self._checkpoints = run, start, checkpoints

    def input_sums(self, batch: Mapping[str, jax.Array]) -> Table | None:
        """Checksums of a batch, where several processes read the same samples of it."""
        wanted = self._run.readers > 1 and self._run.config.train.check_replicas
        return replica_sums(batch) if wanted else None

    def state_sums(self, number: int, state: TrainState) -> Table | None:
        """Checksums of the state's copies after step ``number``, every ``train.check_replicas`` steps."""
        every = self._run.config.train.check_replicas
        return replica_sums(state) if every and number % every == 0 else None

    def check(self, pending: Pending) -> dict[str, float]:
        """The step's metrics as numbers, when they are here; a skipped step's are only that it was skipped.

        Raises:
            UserError: the state must not be saved, by the policies of ``config.train``.
        """
        number, train = pending.number, self._run.config.train
        values = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        self._refuse(number, pending.inputs, inputs_differ)  # first: it explains what is wrong with the rest
        finite = is_finite(values)
        if not finite or values.get("spike"):
            if (train.on_spike if finite else train.on_nan) == "raise":
                self._checkpoints.wait()
                raise went_wrong(number, values, pending.keys, self._run.workdir, self._checkpoints.steps())
            note_skipped(number, values, pending.keys, self._run.workdir)
        self._refuse(number, pending.copies, replicas_differ)
        if number == self._start + 1:  # the first moment that the metrics' names are known
            check_metric(self._run.best, [*values], train)
        if values.get("skipped"):  # its loss is in skipped.jsonl, and no part of a mean
            return {name: values[name] for name in ("skipped", "spike") if name in values}
        return values

    def check_copies(self, number: int, state: TrainState) -> None:
        """Compare the state's copies now, whatever step it is, for it is about to be saved.

        Raises:
            UserError: they differ.
        """
        if self._run.config.train.check_replicas:
            self._refuse(number, replica_sums(state), replicas_differ)

    def _refuse(self, number: int, copies: Table | None, error: Callable[[int, str, Sequence[int]], UserError]) -> None:
        what = differing(copies) if copies is not None else ""
        if what:
            self._checkpoints.wait()  # so that the message names the last checkpoint
            raise error(number, what, self._checkpoints.steps())


def is_finite(values: Mapping[str, float]) -> bool:
    """Whether loss and gradient norm of a step are numbers."""
    return math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])


def went_wrong(
    step: int, values: Mapping[str, float], keys: Mapping[int, str], workdir: Path, good: Sequence[int]
) -> UserError:
    """The error for a loss that is not finite or a spike; all sample keys go to ``bad_batch.json``.

    Args:
        keys: of this process's samples, by their place in the global batch. good: steps of the finished checkpoints.
    """
    listed = _of_all(keys)
    if is_first():
        write_json(workdir / "bad_batch.json", {"step": step, "keys": listed, "metrics": _json_values(values)})
    last = f"the last good checkpoint is step {good[-1]}" if good else "no checkpoint was saved before"
    spike = is_finite(values)
    what = f"{'a spike: ' if spike else ''}loss {values['loss']}, gradient norm {values['grad_norm']} at step {step}"
    which = f"samples {', '.join(listed[:3])}…, all in {workdir / 'bad_batch.json'}"
    mend = "look at these samples, or go on with train.on_spike=skip"
    if not spike:
        mend = "lower optim.lr or set optim.grad_clip=1, and look at these samples; train.on_nan=skip passes over them"
    return UserError(f"{what} ({which}; {last}): {mend}")


def note_skipped(step: int, values: Mapping[str, float], keys: Mapping[int, str], workdir: Path) -> None:
    """One line for a step that changed nothing, and its samples' keys in ``skipped.jsonl``.

    Args:
        keys: of this process's samples, by their place in the global batch.
    """
    listed = _of_all(keys)
    if not is_first():
        return
    why = "spike" if is_finite(values) else "not finite"
    with open(workdir / "skipped.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "why": why, "keys": listed, "metrics": _json_values(values)}) + "\n")
    told = f"step {step} skipped ({why}): loss {values['loss']}, gradient norm {values['grad_norm']}"
    print(f"{told}; keys in skipped.jsonl", file=sys.stderr, flush=True)


def inputs_differ(step: int, what: str, good: Sequence[int]) -> UserError:
    """The error for processes that read other data for the same places of a batch; see ``replicas.differing``."""
    last = f"step {good[-1]} is the last good checkpoint" if good else "no checkpoint was saved before"
    return UserError(
        f"the processes read different data for the same places of step {step}'s batch: {what}; nothing of it is saved "
        f"({last}): give every host the same files, and run the same command again"
    )


def replicas_differ(step: int, what: str, good: Sequence[int]) -> UserError:
    """The error for a state that is not the same on all devices; see ``replicas.differing``."""
    last = f"step {good[-1]} is the last good checkpoint" if good else "no checkpoint was saved before"
    return UserError(
        f"the copies of the state differ at step {step}: {what}; nothing of it is saved ({last}): leave out the device "
        "that errs (train.check_replicas=1 narrows down the step) and run the same command again"
    )


def _json_values(values: Mapping[str, float]) -> dict[str, str]:
    return {name: repr(value) for name, value in values.items()}


def _of_all(keys: Mapping[int, str]) -> list[str]:
    """The keys of the global batch, in its order, each once: several processes may hold the same places."""
    found = dict(keys)
    if jax.process_count() > 1:
        own = json.dumps(list(keys.items())).encode()
        padded = np.frombuffer(own.ljust(max(gather(len(own)))), np.uint8)
        for row in multihost_utils.process_allgather(padded):
            found |= dict(json.loads(bytes(row)))
    return [found[place] for place in sorted(found)]
