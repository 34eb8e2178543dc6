"""What a model's compute buys, as a table in its folder (``budgets.json``), and how a budget becomes steps and members.

`evaluate --write-budgets FOLDER` writes the table (``evaluation.budget_table``): the error of every cell of an
evaluation with its MACs and seconds. Choosing needs no random numbers and no fit. What a cell costs is its compute: the
MACs of the DiT and those of the decoder, which runs for every member, or once where members are merged as latents. The
**front** are the cells with less error than every cheaper one. On it

* ``best`` is the cheapest that cannot be told from the lowest error: the 95 % interval of the per-image difference
  reaches 0;
* ``balanced`` is the cheapest whose error is at most a tenth of the way from the lowest error to the cheapest cell's;
* ``fast`` is the cheapest that has gone half of the way from the strongest trivial answer's error to the lowest (from
  the cheapest cell's, where no cell beats that answer);
* a worse one of these never costs more than a better one;
* ``macs`` (of the DiT alone) and ``seconds`` are limits: the lowest error of all cells within them.

Errors fall as results get better: AbsRel, end-point error, 1 - IoU.
"""

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from scaling_perception.diffusion.solvers import SOLVERS, evaluations
from scaling_perception.inference.settings import BY_BUDGET, flag_of
from scaling_perception.inference.task_tables import TaskTable, read_table, refuse_other_weights
from scaling_perception.support import choosing
from scaling_perception.support.errors import UserError, did_you_mean, short
from scaling_perception.tasks import get_task

if TYPE_CHECKING:
    from scaling_perception.inference.predictor import Predictor

NAMES = ("fast", "balanced", "best")
OWN = "own"  # the preset's name where a model's own grid of timesteps is none of the presets'
_LEAST = 1e-9  # seconds; what is measured as less, or as negative, is noise
_BALANCED, _FAST = 0.9, 0.5
CELL = ("steps", "ensemble", "preset", "solver", "macs", "seconds", "error", "ci95")
CACHE_CELL = ("cache", "cache_interval", "evaluations")  # of cells with a cache; the last as `Model.evaluations`

MERGE_CELL = "merge_in"  # of cells whose members are merged in another place than usual
SPACING_CELL = "spacing"  # of cells on another spacing than the preset's
VIEWS_CELL = "views"  # of cells whose members see something else than the picture
DECODER_CELL = "decoder_macs"  # of all cells whose autoencoder's are known; earlier tables have none
LEVERS = (*CACHE_CELL[:2], MERGE_CELL, SPACING_CELL, VIEWS_CELL)
"""Fields of a cell and of a `Choice` that only some cells have."""


class Choice(NamedTuple):
    """A cell of the table. ``preset`` None is the model's own grid; ``seconds`` are those of ``here`` if given."""

    steps: int
    ensemble: int
    preset: str | None
    solver: str
    macs: float
    seconds: float
    error: float
    cache: str | None = None
    cache_interval: int | None = None
    merge_in: str | None = None
    spacing: str | None = None
    views: str | None = None
    decoder_macs: float = 0.0

    @property
    def compute(self) -> float:
        """MACs of the DiT and of decoding."""
        return self.macs + self.decoder_macs

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of a prediction that it decides, by name; those that it leaves as they are usually are not in
        it."""
        return {name: value for name in BY_BUDGET if (value := getattr(self, name)) is not None}


class Timing(NamedTuple):
    """Seconds of one image: ``fixed`` (reading it into latents, decoding and merging one member), ``per_forward`` of
    one network evaluation of every pass."""

    fixed: float
    per_forward: float


def _number(least: float) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value) and value >= least

    return check


def _count(value: Any) -> bool:
    return isinstance(value, int) and _number(1)(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number(-math.inf), value))


_CHECKS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("steps", "ensemble", "cache_interval"), _count),
    **dict.fromkeys(("preset", "solver", "cache", "merge_in", "spacing", "views", "metric", "reduce"), _text),
    **dict.fromkeys(("macs", "seconds", "error", "evaluations", "decoder_macs"), _number(0)),
    **dict.fromkeys(("fixed", "per_forward"), _number(0)),
    "ci95": _interval,
}
"""Field of a table -> whether a value of it can be read."""
_TABLES = {"timing": Timing._fields, "reference": Timing._fields, "trivial": ("error",), "excess": ("ci95",)}
"""Tables in an entry or a cell, which may be missing -> the fields that are read of them."""


def _fault(entry: Any) -> str:
    """What of an entry is missing or of another kind, in words; '' for nothing."""
    cells = entry.get("cells") if isinstance(entry, dict) else None
    if not isinstance(cells, list) or not cells:
        return "it has no list of cells"
    if fault := _wrong(entry, ()):
        return fault
    for at, cell in enumerate(cells):
        needed = (*CELL, *(CACHE_CELL if isinstance(cell, dict) and set(CACHE_CELL) & set(cell) else ()))
        if fault := _wrong(cell, needed):
            return f"cells[{at}].{fault}" if isinstance(cell, dict) else f"cells[{at}] {fault}"
    return ""


def _wrong(table: Any, needed: Sequence[str]) -> str:
    """The first field of a table that is missing or of another kind than `_CHECKS` has."""
    if not isinstance(table, dict):
        return f"is {short(table)}"
    for name in needed:
        if name not in table:
            return f"{name} is missing"
    for name, value in table.items():
        if name in _CHECKS and not _CHECKS[name](value):
            return f"{name} is {short(value)}"
        if name in _TABLES and (fault := _wrong(value, _TABLES[name])):
            return f"{name}.{fault}" if isinstance(value, dict) else f"{name} {fault}"
    return ""


TABLE = TaskTable("budgets.json", 1, "is no table of budgets", "--write-budgets", _fault)


def load_budgets(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The table of a model folder, or None where it ships none; raises as `read_table`."""
    return read_table(TABLE, folder)


def budgets_of(predictor: "Predictor", task: str) -> dict[str, Any] | None:
    """The table of a model's own folder, or None where there is none.

    Raises:
        UserError: as `read_table`, or the task's entry was measured with other weights than the model has now.
    """
    table = None if predictor.folder is None else load_budgets(predictor.folder)
    if table and task in table["tasks"]:
        make = f"make it again: `evaluate --task {task} … --write-budgets MODEL`, or choose steps and members yourself"
        refuse_other_weights(TABLE, table["tasks"][task], predictor.identity, make)
    return table


def own_budgets(predictor: "Predictor") -> dict[str, Any] | None:
    """As `budgets_of`, with a warning in place of the tasks that were measured with other weights."""
    table = None if predictor.folder is None else load_budgets(predictor.folder)
    if table is None:
        return None
    kept = {}
    for task, entry in table["tasks"].items():
        try:
            budgets_of(predictor, task)
            kept[task] = entry
        except UserError as error:
            warnings.warn(str(error), stacklevel=2)
    return {**table, "tasks": kept}


def choose(
    table: Mapping[str, Any] | None,
    task: str,
    name: str | None = None,
    macs: float | None = None,
    seconds: float | None = None,
    here: tuple[float, float] | None = None,
) -> Choice:
    """Steps and members for a budget. See the module for the rules.

    Args:
        table: of `load_budgets`.
        name: fast, balanced or best; or else limits.
        macs: multiply-accumulates of the DiT for one image, at most.
        seconds: for one image, at most; with ``macs`` both hold.
        here: `measure_timing` on this machine; None takes the seconds of the machine that made the table.

    Raises:
        UserError: no table for the task, an unknown name, neither name nor limit, or nothing within the limits.
    """
    if not table or task not in table["tasks"]:
        known = f" (it has one for {', '.join(sorted(table['tasks']))})" if table and table["tasks"] else ""
        raise UserError(
            f"this model ships no table of budgets for {task}{known}: choose steps and ensemble yourself, or make one: "
            f"`evaluate --task {task} … --steps 1,2,5,10 --ensemble 1,2,5 --write-budgets MODEL_FOLDER`"
        )
    entry = table["tasks"][task]
    choices = table_choices(entry, here)
    tied = {one for one, cell in zip(choices, entry["cells"], strict=True) if _tied(cell, entry)}
    if (name is None) == (macs is None and seconds is None):
        raise UserError("give either the name of a budget (fast, balanced, best) or a limit of MACs or seconds")
    if name is None:
        return _within(choices, task, macs, seconds)
    if name not in NAMES:
        raise UserError(f"unknown budget '{name}'{did_you_mean(name, NAMES)}")
    ahead = front(choices)
    first, lowest = ahead[0].error, ahead[-1].error
    trivial = entry.get("trivial", {}).get("error", -math.inf)
    start = trivial if trivial > lowest else first
    cheapest = {
        "best": next(i for i, one in enumerate(ahead) if one in tied or one.error <= lowest),
        "balanced": _reached(ahead, lowest + (1 - _BALANCED) * (first - lowest)),
        "fast": _reached(ahead, lowest + (1 - _FAST) * (start - lowest)),
    }
    return ahead[min(cheapest[better] for better in NAMES[NAMES.index(name) :])]


def fitting(table: dict[str, Any] | None, task: str, check: Callable[[Choice], None]) -> dict[str, Any] | None:
    """The table with those cells of a task alone for which ``check`` raises no UserError.

    Raises:
        UserError: the first of ``check``, where it refuses all cells.
    """
    if not table or task not in table["tasks"]:
        return table
    entry, kept, refused = table["tasks"][task], [], []
    for cell, choice in zip(entry["cells"], table_choices(entry), strict=True):
        try:
            check(choice)
        except UserError as error:
            refused.append(error)
        else:
            kept.append(cell)
    if not kept:
        raise refused[0]
    return {**table, "tasks": {**table["tasks"], task: {**entry, "cells": kept}}}


def table_choices(entry: Mapping[str, Any], here: tuple[float, float] | None = None) -> list[Choice]:
    """The cells of a task's table in their order; ``here`` as in `choose`."""
    return [_choice(cell, entry, here) for cell in entry["cells"]]


def _reached(ahead: list[Choice], error: float) -> int:
    return next(i for i, one in enumerate(ahead) if one.error <= error or one is ahead[-1])


def front(choices: list[Choice]) -> list[Choice]:
    """Those with less error than every cheaper one, from the cheapest to the lowest error."""
    return [choices[at] for at in choosing.front([one.error for one in choices], _costs(choices))]


def _costs(choices: list[Choice]) -> dict[str, list[float]]:
    return {name: [getattr(one, name) for one in choices] for name in ("compute", "macs", "seconds")}


def _within(choices: list[Choice], task: str, macs: float | None, seconds: float | None) -> Choice:
    asked_for = {"macs": macs, "seconds": seconds}
    limits = {name: most for name, most in asked_for.items() if most is not None}
    fitting = choosing.ranked([c.error for c in choices], _costs(choices), limits)
    if len(fitting):
        return choices[fitting[0]]
    least = min(choices, key=lambda c: (c.seconds if macs is None else c.macs, c.error))
    asked = " and ".join(
        [*([f"{macs:.3g} MACs"] if macs is not None else []), *([f"{seconds:.3g} s"] if seconds is not None else [])]
    )
    raise UserError(
        f"no setting for {task} fits {asked}: the cheapest is {least.steps} step(s) × {least.ensemble} member(s) with "
        f"{least.macs:.3g} MACs and {least.seconds:.3g} s an image: allow more"
    )


def _choice(cell: Mapping[str, Any], entry: Mapping[str, Any], here: tuple[float, float] | None) -> Choice:
    seconds, timing = float(cell["seconds"]), entry.get("timing")
    if here is not None and timing is not None:
        # Evaluations go as evaluations do between the machines, the rest as the fixed cost does.
        each = cell.get("evaluations") or evaluations(cell.get("solver", "ddim"), cell["steps"])
        forwards = each * cell["ensemble"]
        spent = min(timing["per_forward"] * forwards, seconds)
        there = entry.get("reference", timing)
        fixed, forward = (
            now / then if then > _LEAST else 1.0  # a machine too busy to time it says nothing of others
            for now, then in zip(here, (there["fixed"], there["per_forward"]), strict=True)
        )
        seconds = (seconds - spent) * fixed + spent * forward
    preset = None if cell["preset"] == OWN else cell["preset"]
    numbers = float(cell["macs"]), seconds, float(cell["error"])
    return Choice(
        int(cell["steps"]),
        int(cell["ensemble"]),
        preset,
        cell["solver"],
        *numbers,
        *map(cell.get, LEVERS),
        decoder_macs=float(cell.get(DECODER_CELL, 0.0)),
    )


def _tied(cell: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether a cell cannot be told from the one with the lowest error."""
    if "excess" in cell:
        return not choosing.told_apart(cell["excess"]["ci95"])
    return cell["error"] <= min(entry["cells"], key=lambda c: c["error"])["ci95"][1]


_WORDS = (("preset", "grid"), ("spacing", "spacing"), ("solver", "solver"))


def choice_line(asked: Mapping[str, Any], chosen: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """One line on what a budget chose, and what the table expects of it.

    Args:
        asked: budget, macs or seconds, as given. chosen: `Choice.settings`.
        expected: macs, seconds, error and metric.
    """
    budget = ", ".join(
        f"{flag_of(name)} {value if isinstance(value, str) else f'{value:g}'}" for name, value in asked.items()
    )
    parts = [f"{chosen['steps']} steps, {chosen['ensemble']} members"]
    parts += [f"{word} {chosen[name]}" for name, word in _WORDS if name in chosen]
    if chosen.get("cache", "none") != "none":
        parts.append(f"blocks every {chosen['cache_interval']} steps ({chosen['cache']})")
    if chosen.get("merge_in", "pixels") != "pixels":
        parts.append(f"merged in {chosen['merge_in']}")
    if chosen.get("views", "plain") != "plain":
        parts.append(f"views {chosen['views']}")
    cost = f"{expected['macs'] / 1e9:.3g} GMACs and {expected['seconds']:.2g} s an image"
    return f"{budget}: {', '.join(parts)}; expected {expected.get('metric', 'error')} {expected['error']:.3g}, {cost}"


# Seconds


def measure_timing(predictor: "Predictor", task: str, preset: str | None = None, solver: str = "ddim") -> Timing:
    """`Timing` of this machine, from two short runs of one member (1 and 5 steps) of a grey picture.

    Each is repeated while that is quick, and the least counts, so that what else the machine does counts little.
    Compiling is not counted.
    """
    solver = "ddim" if SOLVERS[solver].at_once else solver  # an evaluation takes as long
    side = predictor.resolution
    grey = np.full((side, side, 3), 127, np.uint8)
    asks = get_task(task).prompt
    prompt = None if asks is None else asks.example(side)
    options: dict[str, Any] = {"prompt": prompt, "preset": preset, "solver": solver, "batch_size": 1}
    spent = {}
    for steps in (1, 5):
        predictor(grey, task, steps, 1, **options)
        runs: list[float] = []
        while not runs or (len(runs) < 5 and sum(runs) < 1):
            begin = time.perf_counter()
            predictor(grey, task, steps, 1, **options)
            runs.append(time.perf_counter() - begin)
        spent[steps] = min(runs)
    more = evaluations(solver, 5) - evaluations(solver, 1)
    forward = max((spent[5] - spent[1]) / more, _LEAST)
    return Timing(max(spent[1] - forward, 0.0), forward)
