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
    step: int, values: Mapping[str, float], keys: Sequence[str], workdir: Path, good: Sequence[int]
) -> UserError:
    """The error for a loss that is not finite or a spike; all sample keys go to ``bad_batch.json``.

    Args:
        keys: of this process's samples. good: steps of the finished checkpoints.
    """
    keys = _of_all(keys)
    if is_first():
        write_json(workdir / "bad_batch.json", {"step": step, "keys": keys, "metrics": _told(values)})
    last = f"the last good checkpoint is step {good[-1]}" if good else "no checkpoint was saved before"
    spike = is_finite(values)
    what = f"{'a spike: ' if spike else ''}loss {values['loss']}, gradient norm {values['grad_norm']} at step {step}"
    which = f"samples {', '.join(keys[:3])}…, all in {workdir / 'bad_batch.json'}"
    mend = "look at these samples, or go on with train.on_spike=skip"
    if not spike:
        mend = "lower optim.lr or set optim.grad_clip=1, and look at these samples; train.on_nan=skip passes over them"
    return UserError(f"{what} ({which}; {last}): {mend}")


def note_skipped(step: int, values: Mapping[str, float], keys: Sequence[str], workdir: Path) -> None:
    """One line for a step that changed nothing, and its samples' keys in ``skipped.jsonl``."""
    keys = _of_all(keys)
    if not is_first():
        return
    why = "spike" if is_finite(values) else "not finite"
    with open(workdir / "skipped.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "why": why, "keys": keys, "metrics": _told(values)}) + "\n")
    told = f"step {step} skipped ({why}): loss {values['loss']}, gradient norm {values['grad_norm']}"
    print(f"{told}; keys in skipped.jsonl", file=sys.stderr, flush=True)


def replicas_differ(step: int, what: str, good: Sequence[int]) -> UserError:
    """The error for a state that is not the same on all devices; see ``replicas.differing``."""
    last = f"step {good[-1]} is the last good checkpoint" if good else "no checkpoint was saved before"
    return UserError(
        f"the copies of the state differ at step {step}: {what}; nothing of it is saved ({last}): leave out the device "
        "that errs (train.check_replicas=1 narrows down the step) and run the same command again"
    )


def _told(values: Mapping[str, float]) -> dict[str, str]:
    return {name: repr(value) for name, value in values.items()}


def _of_all(keys: Sequence[str]) -> list[str]:
    """The keys of all processes, whose samples made the step together."""
    if jax.process_count() == 1:
        return list(keys)
    own = json.dumps(list(keys)).encode()
    padded = np.frombuffer(own.ljust(max(gather(len(own)))), np.uint8)
    return [key for row in multihost_utils.process_allgather(padded) for key in json.loads(bytes(row))]
