"""Tasks: how ground truth becomes pictures for the diffusion model, and how its pictures become predictions.

A task is a module of pure numpy functions: ``PASSES``, ``encode``, ``conditions``, ``decode_prediction``. A raw sample
goes in (see ``data.sources``), one training sample a pass comes out:

    image, prompt, target  float32 (R, R, 3), in [-1, 1] (flow targets may exceed it)
    valid                  bool (R, R)
    task                   int32, index into ``ALL_PASSES``
    label                  int32, class or -1
    key                    str

A task that has fewer pictures says so in ``FIELDS``: generation has the target alone.
"""

from __future__ import annotations

from types import ModuleType

from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.tasks import amodal, depth, flow, generation
from scaling_perception.tasks.common import ALL_PASSES, FIELDS, PASSES, TaskOptions

TASKS: dict[str, ModuleType] = {"depth": depth, "flow": flow, "amodal": amodal, "generation": generation}

__all__ = ["ALL_PASSES", "FIELDS", "PASSES", "TASKS", "TaskOptions", "fields_of", "get_task", "pass_indices"]


def get_task(name: str) -> ModuleType:
    """The task's module.

    Raises:
        UserError: no such task; names the nearest.
    """
    if name not in TASKS:
        raise UserError(f"unknown task '{name}'{did_you_mean(name, TASKS)}")
    return TASKS[name]


def pass_indices(name: str) -> tuple[int, ...]:
    """The indices into ``ALL_PASSES`` of the task's passes, in the order that ``decode_prediction`` expects."""
    return tuple(ALL_PASSES.index(one) for one in get_task(name).PASSES)


def fields_of(name: str) -> tuple[str, ...]:
    """The pictures that a sample of the task has: image, prompt and target, or a part of them."""
    return getattr(get_task(name), "FIELDS", FIELDS)
