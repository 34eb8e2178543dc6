"""Tasks: how ground truth becomes pictures for the diffusion model, and how its pictures become predictions.

Each task is one file and one object, ``tasks.base.Task``; this is the list of them. A raw sample goes in (see
``data.sources``), one training sample a pass comes out:

    image, prompt, target  float32 (R, R, 3), in [-1, 1] (flow targets may exceed it)
    valid                  bool (R, R)
    pass_id                int32, id of the pass
    label                  int32, class or -1
    key                    str

A task that has fewer pictures says so in ``fields``: generation has the target alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.tasks import amodal, depth, flow, generation, normals
from scaling_perception.tasks.base import FIELDS, Pass, Task
from scaling_perception.tasks.samples import TaskOptions

TASKS: dict[str, Task] = {one.TASK.name: one.TASK for one in (depth, flow, amodal, normals, generation)}

ALL_PASSES: tuple[Pass, ...] = tuple(sorted((p for task in TASKS.values() for p in task.passes), key=lambda p: p.id))
"""Every pass, by its stored id; a pass that is added later has a larger one."""

_GENERATED = {one.id for task in TASKS.values() if not task.conditioned for one in task.passes}
PERCEPTION: tuple[str, ...] = tuple(one.name for one in ALL_PASSES if one.id not in _GENERATED)
"""The passes that are predicted of a picture, by their ids."""

FRAME_PASSES: tuple[int, ...] = tuple(
    one.id for task in TASKS.values() if task.prompt is not None and task.prompt.frame for one in task.passes
)
"""The ids of the passes whose prompt is another frame, which may be matched with the picture (``models.matching``)."""

RELEASED: tuple[str, ...] = ("depth", "amodal", "flow_x", "flow_y")
"""The passes of the released generalist, in the order of its labels 1000..1003 (facts 2). Model folders and caches that
do not list their passes have these."""

__all__ = [
    "ALL_PASSES",
    "FIELDS",
    "FRAME_PASSES",
    "PERCEPTION",
    "RELEASED",
    "TASKS",
    "Pass",
    "Task",
    "TaskOptions",
    "fields_of",
    "get_pass",
    "get_task",
    "model_passes",
    "pass_names",
]


def get_task(name: str) -> Task:
    """The task called ``name``.

    Raises:
        UserError: no such task; names the nearest.
    """
    if name not in TASKS:
        raise UserError(f"unknown task '{name}'{did_you_mean(name, TASKS)}")
    return TASKS[name]


def get_pass(id: int) -> Pass:
    """The pass with a stored id."""
    return next(one for one in ALL_PASSES if one.id == id)


def pass_names(tasks: Iterable[str]) -> tuple[str, ...]:
    """The names of the passes of some tasks, by their ids."""
    wanted = {one.name for name in tasks for one in get_task(name).passes}
    return tuple(one.name for one in ALL_PASSES if one.name in wanted)


def model_passes(tasks: Iterable[str]) -> tuple[str, ...]:
    """The passes that a model of these tasks lists: the rows of its latent normalisation and of its table of labels.

    Always the released ones first, so that a model that learns one of them more needs no other rows.
    """
    wanted = pass_names(tasks)
    if not set(wanted) <= set(PERCEPTION):
        return wanted
    last = max((PERCEPTION.index(name) for name in wanted), default=0)
    return PERCEPTION[: max(len(RELEASED), last + 1)]


def fields_of(name: str) -> tuple[str, ...]:
    """The pictures that a sample of the task has: image, prompt and target, or a part of them."""
    return get_task(name).fields
