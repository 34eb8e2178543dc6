"""What is told, and kept, of a step that went wrong. Every process must call these alike."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from scaling_perception.parallel.processes import is_first
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import write_json
from scaling_perception.training.saving import gather


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
        write_json(workdir / "bad_batch.json", {"step": step, "keys": listed, "metrics": _told(values)})
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
        file.write(json.dumps({"step": step, "why": why, "keys": listed, "metrics": _told(values)}) + "\n")
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


def _told(values: Mapping[str, float]) -> dict[str, str]:
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
