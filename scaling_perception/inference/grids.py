"""A model's learned grids of timesteps (``grids.json`` in its folder), which ``spacing`` ``learned`` samples on.

`evaluate --write-grids MODEL` makes the file (``evaluation.grid_table``). A grid belongs to a task, a number of steps
and the weights that it was found with: others are refused.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling_perception.diffusion.schedules import TRAIN_STEPS
from scaling_perception.inference.task_tables import IDENTITY, TaskTable, read_table, refuse_other_weights
from scaling_perception.support.errors import UserError
from scaling_perception.support.shapes import Int


def _fault(entry: Any) -> str:
    if not isinstance(entry, dict):
        return "it is no table"
    for name in IDENTITY:
        if not isinstance(entry.get(name), str):
            return f"{name} is {entry.get(name)!r}"
    if not isinstance(grids := entry.get("grids"), dict) or not grids:
        return "it has no table of grids"
    return next((f"grids.{name} is no grid" for name, t in grids.items() if not _is_grid(name, t)), "")


def _is_grid(steps: str, t: Any) -> bool:
    if not isinstance(t, list) or not t or steps != str(len(t)):
        return False
    inside = all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < TRAIN_STEPS for one in t)
    return inside and all(after < before for before, after in zip(t, t[1:], strict=False))


TABLE = TaskTable("grids.json", 1, "holds no grids", "--write-grids", _fault)


def load_grids(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The grids of a model folder, or None where it has none; raises as `read_table`."""
    return read_table(TABLE, folder)


def learned_grid(
    folder: str | os.PathLike[str] | None, task: str, steps: int, identity: Mapping[str, str]
) -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]]:
    """(t, t_next) of a task's grid of ``steps`` steps, int64 (steps,) each, as `schedules.timestep_grid`.

    Args:
        folder: of the model, None where it was not loaded from one.
        identity: the model's ids under the names of ``IDENTITY``.

    Raises:
        UserError: no grid for the task or the number of steps, or one that was found with other weights.
    """
    table = None if folder is None else load_grids(folder)
    make = f"make it: `evaluate --task {task} … --write-grids MODEL`, or choose another spacing"
    if not table or task not in table["tasks"]:
        raise UserError(f"spacing 'learned': this model has no learned grids for {task}: {make}")
    entry = table["tasks"][task]
    refuse_other_weights(TABLE, entry, identity, f"spacing 'learned' needs its own: {make}")
    if str(steps) not in entry["grids"]:
        known = ", ".join(sorted(entry["grids"], key=int))
        raise UserError(f"spacing 'learned': no learned grid of {steps} steps for {task}, but of {known}: {make}")
    t = np.asarray(entry["grids"][str(steps)], np.int64)
    return t, np.append(t[1:], -1)
