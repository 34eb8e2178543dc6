"""What differences between cells of an evaluation mean: paired by image, with intervals.

Pairing removes the spread between easy and hard images, which is far larger than the effect of compute.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from scaling_perception.inference.settings import NAMED

Cell = dict[str, Any]


class Change(NamedTuple):
    """Mean over images of a difference, and the ends of its 95 % bootstrap interval (None for too few images)."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{self.low:+.4f}, {self.high:+.4f}]"
        return f"{self.mean:+.4f}{interval}"


OLD_KINDS = {"fixed": "constant"}
"""What earlier versions called a kind of cell -> its name."""


def kind(cell: Mapping[str, Any]) -> str:
    """constant, adaptive or steps; a cell of an evaluation from before there were kinds is constant."""
    found = str(cell.get("kind", "constant"))
    return OLD_KINDS.get(found, found)


MERGING = ("merge_in", "verifier", "verify")
"""Fields of a cell that say how its members are merged; the usual merge has none of them."""


def way(cell: Cell) -> tuple[str, str]:
    """Preset, and solver with its cache."""
    return cell["preset"], solver_of(cell)


def solver_of(cell: Cell) -> str:
    """The solver and what else decides its result, as far as it is not usual: ``ddim``, ``ddim eta 1 + fora 3``."""
    names = [name for name in NAMED if name in cell and not (name in MERGING and kind(cell) == "adaptive")]
    more = (name if cell[name] is True else f"{name} {cell[name]}" for name in names)
    solver = " ".join([cell.get("solver", "ddim"), *spacing_of(cell), *more])
    return f"{solver} + {cell['cache']} {cell['cache_interval']}" if "cache" in cell else solver


def spacing_of(cell: Cell) -> list[str]:
    """The spacing where it is not the preset's; of a model's own grid, where it is learned."""
    from scaling_perception.diffusion.schedules import LEARNED, PRESETS

    spacing, preset = cell.get("spacing"), PRESETS.get(cell["preset"])
    usual = spacing is None or (spacing != LEARNED if preset is None else spacing == preset.spacing)
    return [] if usual or spacing is None else [spacing]


def evaluations_of(cell: Cell) -> float:
    """Network evaluations of one member of a cell of constant compute (with a cache by MACs, `Model.evaluations`)."""
    if "evaluations" in cell:
        return cell["evaluations"]
    from scaling_perception.diffusion.solvers import evaluations  # `report --help` need not wait for it

    return evaluations(cell.get("solver", "ddim"), cell["steps"])


def select(cells: Sequence[Cell], **wanted: Any) -> list[Cell]:
    """The cells with these values; ``kind`` and ``way`` are asked of the functions above."""
    asked = {"kind": kind, "way": way}
    return [
        cell
        for cell in cells
        if all((asked[name](cell) if name in asked else cell.get(name)) == value for name, value in wanted.items())
    ]


def values(cell: Cell, metric: str) -> dict[str, float]:
    """The metric of each image that has it, by key."""
    return {row["key"]: row[metric] for row in cell["rows"] if metric in row}


def change(start: Mapping[str, float], end: Mapping[str, float]) -> Change:
    """``end - start`` of the images that both have."""
    from scaling_perception.evaluation.intervals import bootstrap_ci

    found = np.asarray([end[key] - start[key] for key in start if key in end])
    low, high = bootstrap_ci(found, seed=0) or (None, None)
    return Change(float(found.mean()), low, high)


def same_compute(fixed: Sequence[Cell], forwards: float, metric: str) -> dict[str, float] | None:
    """Each image's metric with as many network evaluations as every other image has.

    Between two sizes that were measured it is interpolated in 1 / size, as the error of a mean of N members falls: a
    straight line would flatter what it is compared with. None outside the sizes that were measured.

    Args:
        fixed: cells of constant compute that differ in it alone.
    """
    spent = sorted((evaluations_of(cell) * cell["ensemble"], index) for index, cell in enumerate(fixed))
    if not spent or not spent[0][0] <= forwards <= spent[-1][0]:
        return None
    above = next(i for i, (count, _) in enumerate(spent) if count >= forwards)
    (most, upper), (least, lower) = spent[above], spent[max(above - 1, 0)]
    share = 1.0 if most == least else (1 / least - 1 / forwards) / (1 / least - 1 / most)
    first, second = values(fixed[lower], metric), values(fixed[upper], metric)
    return {key: (1 - share) * first[key] + share * second[key] for key in first if key in second}


class Merged(NamedTuple):
    """A cell whose members are merged in another way than usual, against the usual one.

    Attributes:
        seconds: its seconds over those of the usual merge of as many members.
        even: its metric against the usual merge of as many network evaluations; None where nothing was measured.
    """

    cell: Cell
    seconds: float | None
    even: Change | None


def against_usual(cells: Sequence[Cell], metric: str) -> list[Merged]:
    """Every cell of constant compute with a field of ``MERGING`` against the cells of the same run without one."""
    found = []
    for cell in select(cells, kind="constant"):
        plain = {name: value for name, value in cell.items() if name not in MERGING}
        if len(plain) == len(cell):
            continue
        plain.pop("evaluations", None)
        usual = select(cells, kind="constant", way=way(plain), steps=cell["steps"])
        even = same_compute(usual, evaluations_of(cell) * cell["ensemble"], metric)
        same = select(usual, ensemble=cell["ensemble"])
        seconds = cell["seconds"] / same[0]["seconds"] if same and same[0]["seconds"] > 0 else None
        found.append(Merged(cell, seconds, None if even is None else change(even, values(cell, metric))))
    return found


class Saving(NamedTuple):
    """A cell of adaptive compute against constant compute.

    Attributes:
        cell: the adaptive one.
        share: its compute over that of all members (steps).
        whole: its metric against all members (steps).
        even: against as much compute, the same for every image; None where nothing was measured.
    """

    cell: Cell
    share: float
    whole: Change
    even: Change | None


def savings(cells: Sequence[Cell], metric: str, of: str) -> list[Saving]:
    """Every cell of a kind (``adaptive`` or ``steps``) against the cells of constant compute of the same run."""
    found = []
    for cell in select(cells, kind=of):
        steps, size = cell["steps"], cell["ensemble"]
        rest = {"steps": steps} if of == "adaptive" else {"ensemble": size}
        fixed = select(cells, kind="constant", way=way(cell), **rest)
        whole = select(fixed, steps=steps, ensemble=size)
        if not whole:
            continue
        forwards, mine = float(np.mean(cell["forwards"])), values(cell, metric)
        even = same_compute(fixed, forwards, metric)
        against = None if even is None else change(even, mine)
        found.append(
            Saving(cell, forwards / (evaluations_of(cell) * size), change(values(whole[0], metric), mine), against)
        )
    return found


def best_steps(cells: Sequence[Cell], metric: str, less_is_better: bool) -> int:
    """The step count at which the largest ensemble of constant compute is best."""
    fixed = select(cells, kind="constant")
    size = max(cell["ensemble"] for cell in fixed)
    largest = select(fixed, ensemble=size)
    sign = 1 if less_is_better else -1
    return min(largest, key=lambda cell: sign * cell["metrics"][metric]["mean"])["steps"]
