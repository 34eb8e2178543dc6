"""How good a plan would have been: fit a law to a table's cheap cells, choose at a budget that it has not seen.

A cell is a setting that was trained and measured; rows that differ in nothing but the seed are one cell. It costs 3 x
its training's forward MACs and, for so many images to serve, images x the MACs of a prediction. The law is fitted to
cells of up to a share of the budget. All cells within the budget can be chosen, by the law or by a rule of thumb; the
regret of a choice is by how much its measured error lies above that of the best.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from scaling_perception.models.compute import TRAINING_FACTOR
from scaling_perception.scaling.law_fit import Options
from scaling_perception.scaling.law_text import number
from scaling_perception.scaling.laws import Law, fit_law, predict, predict_interval
from scaling_perception.scaling.plan_laws import QUANTITIES
from scaling_perception.scaling.points import Points, find_column
from scaling_perception.support import choosing
from scaling_perception.support.errors import UserError

_FLOPS = ("flops", "train_flops", "training_flops")
_SERVING = (*QUANTITIES["serving"], "macs")
EXTRA = tuple(
    name
    for names in (
        *(QUANTITIES[one] for one in ("params", "tokens", "samples", "training", "steps", "members")),
        *(_SERVING, _FLOPS),
    )
    for name in names
)
"""Columns that say what a cell is and costs."""


class Cells(NamedTuple):
    """Cells (n,): x (v, n), measured error (mean over seeds), how many rows each is of; ``what``: what each is, by
    quantity; ``train`` and ``serve`` their two costs in MACs."""

    x: np.ndarray
    error: np.ndarray
    rows: np.ndarray
    what: dict[str, np.ndarray]
    train: np.ndarray
    serve: np.ndarray
    of: np.ndarray  # the cell (rows,) of each row
    scatter: float  # of log error between rows of one cell; NaN where none has several

    @property
    def cost(self) -> np.ndarray:
        """MACs (n,) of both."""
        return self.train + self.serve


def _column(points: Points, names: Sequence[str]) -> np.ndarray | None:
    table = {**points.extra, **dict(zip(points.x_names, points.x, strict=True))}
    found = next((found for one in names if (found := find_column(list(table), one))), None)
    return None if found is None else table[found]


def make_cells(points: Points, images: float | None) -> Cells:
    """The cells of a table.

    Raises:
        UserError: it does not say what a cell costs.
    """
    what = {}
    for quantity in ("params", "tokens", "samples", "steps", "members"):
        values = _column(points, QUANTITIES[quantity])
        if values is not None and np.isfinite(values).all():
            what[quantity] = values
    train, flops = _column(points, QUANTITIES["training"]), _column(points, _FLOPS)
    if train is not None:
        train = TRAINING_FACTOR * train
    elif flops is not None:  # of both passes
        train = flops / 2
    elif {"params", "tokens"} <= what.keys():
        train = TRAINING_FACTOR * what["params"] * what["tokens"]
    serve = _column(points, _SERVING)
    if train is None and images is None:
        raise UserError(
            "--hold-out needs what a training costs: a column train_macs, FLOPs, or params and tokens; or --images and "
            "a column macs of a prediction"
        )
    if images is not None and serve is None:
        raise UserError("--images needs a column macs, of one prediction")
    train = np.zeros(len(points)) if train is None else train
    serve = np.zeros(len(points)) if images is None or serve is None else images * serve
    known = np.isfinite(train) & np.isfinite(serve)
    if not known.all():
        raise UserError(f"{int((~known).sum())} of {len(points)} points have no cost: complete the columns, or --where")
    setting = np.stack([*points.x, *what.values(), train, serve])
    unique, first, of = np.unique(setting, axis=1, return_index=True, return_inverse=True)
    of = of.reshape(-1)
    rows = np.bincount(of)
    log_y = np.log(points.y)
    off = log_y - (np.bincount(of, log_y) / rows)[of]
    free = len(points) - unique.shape[1]
    scatter = float(np.sqrt((off**2).sum() / free)) if free else float("nan")
    error = np.bincount(of, points.y) / rows
    kept = {name: values[first] for name, values in what.items()}
    return Cells(points.x[:, first], error, rows, kept, train[first], serve[first], of, scatter)


def _largest(cells: Cells, which: np.ndarray, *names: str) -> int:
    """Of the cells ``which`` the one with the most of the first quantity, then of the next, then the dearest."""
    keys = [cells.cost[which], *(cells.what[name][which] for name in reversed(names))]
    return int(which[np.lexsort(keys)[-1]])


def _even(cells: Cells, which: np.ndarray) -> int:
    apart = np.abs(np.log(cells.train[which] / cells.serve[which]))
    return int(which[np.lexsort((-cells.cost[which], apart))[0]])


def _same_as_best_seen(cells: Cells, which: np.ndarray, seen: np.ndarray) -> int:
    """The size (steps, members) of the best cell that was seen, with the most compute within the budget."""
    best = seen[cells.error[seen].argmin()]
    same = np.ones(len(which), bool)
    for name in ("params", "steps", "members"):
        if name in cells.what:
            same &= cells.what[name][which] == cells.what[name][best]
    return int(which[same][cells.cost[which[same]].argmax()])


def rules(cells: Cells, which: np.ndarray, seen: np.ndarray) -> dict[str, int]:
    """What rules of thumb choose among the cells ``which``: only rules whose quantities differ there."""

    def differ(*names: str) -> bool:
        return all(name in cells.what and len(np.unique(cells.what[name][which])) > 1 for name in names)

    length = "samples" if "samples" in cells.what else "tokens"
    table: dict[str, tuple[bool, Callable[[], int]]] = {
        "largest model": (differ("params"), lambda: _largest(cells, which, "params")),
        "longest training": (differ(length), lambda: _largest(cells, which, length)),
        "most steps and members": (differ("steps", "members"), lambda: _largest(cells, which, "steps", "members")),
        "one step, one member, largest": (
            differ("steps", "members", "params"),
            lambda: _largest(cells, _fewest(cells, which), "params"),
        ),
        "equal split of training and serving": (bool(cells.serve.any()), lambda: _even(cells, which)),
        "best seen cell, more compute": (True, lambda: _same_as_best_seen(cells, which, seen)),
        "dearest cell": (True, lambda: _largest(cells, which)),
    }
    return {name: choose() for name, (usable, choose) in table.items() if usable}


def _fewest(cells: Cells, which: np.ndarray) -> np.ndarray:
    few = cells.what["steps"][which] * cells.what["members"][which]
    return which[few == few.min()]


def hold_out_budget(
    points: Points, budget: float, images: float | None, share: float, form: str, options: Options
) -> tuple[dict[str, Any], Law]:
    """The choice at one budget by a law of the cells of up to ``share`` of it, what was measured, and the rules'.

    Raises:
        UserError: no cell costs more than the share and no more than the budget, or the others decide no law.
    """
    cells = make_cells(points, images)
    seen, within = np.flatnonzero(cells.cost <= share * budget), np.flatnonzero(cells.cost <= budget * (1 + 1e-9))
    new = within[cells.cost[within] > share * budget]
    span = f"the cells cost {cells.cost.min():.3g} to {cells.cost.max():.3g} MACs"
    if not len(new):
        raise UserError(f"--hold-out {budget:g}: no cell costs more than {share:g} of it and not more than it; {span}")
    if not len(seen):
        raise UserError(f"--hold-out {budget:g}: no cell costs up to {share:g} of it to fit a law to; {span}")
    try:
        law = fit_law(points.take(np.isin(cells.of, seen)), form, options)
    except UserError as error:
        raise UserError(f"--hold-out {budget:g}, {len(seen)} cell(s) of up to {share:g} of it: {error}") from None
    predicted = predict(law, cells.x)
    low, high = predict_interval(law, cells.x)
    best = int(within[cells.error[within].argmin()])

    def row(at: int) -> dict[str, Any]:
        known = {name: float(values[at]) for name, values in cells.what.items()}
        known |= {"training_macs": float(cells.train[at]), "serving_macs": float(cells.serve[at])}
        known |= {"cost": float(cells.cost[at]), "seen": bool(at in seen), "seeds": int(cells.rows[at])}
        known |= {"predicted": float(predicted[at]), "interval": [float(low[at]), float(high[at])]}
        return known | {
            "measured": float(cells.error[at]),
            "regret": float(cells.error[at] / cells.error[best] - 1),
        }

    order = choosing.ranked(predicted[within], {"cost": cells.cost[within]}, {"cost": budget * (1 + 1e-9)})
    off = np.log(cells.error[new] / predicted[new])
    inside = (cells.error[new] >= low[new]) & (cells.error[new] <= high[new])
    found: dict[str, Any] = {"budget": budget, "images": images, "seen": len(seen), "new": len(new)}
    found |= {"fitted_to": float(cells.cost[seen].max()), "form": law.form, "level": law.level}
    found |= {"prediction": {"error": float(np.sqrt((off**2).mean())), "bias": float(off.mean())}}
    found["prediction"] |= {"inside": int(inside.sum())}
    found |= {"choice": row(int(within[order[0]])), "best": row(best), "cells": [row(int(at)) for at in new]}
    found["rules"] = {name: row(at) for name, at in rules(cells, within, seen).items()}
    found["any_new"] = float((cells.error[new] / cells.error[best] - 1).mean())
    found["seeds_differ"] = None if np.isnan(cells.scatter) else cells.scatter
    return found, law


def hold_out_text(found: Mapping[str, Any], law: Law) -> str:
    """One held-out budget as lines."""
    images = f" + {found['images']:g} images x prediction" if found["images"] else ""
    level = f"{100 * found['level']:g} %"
    lines = [
        f"held out  {number(found['budget'])} MACs (3 x training{images}): the law is fitted to {found['seen']} cells "
        f"of up to {number(found['fitted_to'])} MACs; {found['new']} more cost up to the budget",
        f"law       {law.equation}   (y = {law.y})",
    ]
    off, inside = found["prediction"], found["prediction"]["inside"]
    lines.append(
        f"new cells predicted with an error of {100 * off['error']:.2g} %, mean {100 * off['bias']:+.2g} % (measured "
        f"above predicted); {inside} of {found['new']} lie in their {level} intervals"
    )
    rows = [["", "cell", "MACs", "predicted", f"{level} of a run", "measured", "regret"]]
    named = [("plan", found["choice"]), *found["rules"].items(), ("best measured", found["best"])]
    for name, one in named:
        interval = f"[{number(one['interval'][0])}, {number(one['interval'][1])}]"
        rows.append([name, cell_name(one), number(one["cost"]), number(one["predicted"]), interval,
                     number(one["measured"]), f"{100 * one['regret']:+.2g} %"])  # fmt: skip
    rows.append(["a new cell at random", "", "", "", "", "", f"{100 * found['any_new']:+.2g} %"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += [
        "",
        *("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows),
        "",
    ]
    if found["seeds_differ"] is None:
        lines.append("note: no cell has several seeds: regrets below the scatter between seeds decide nothing")
    else:
        lines.append(
            f"note: runs that differ in the seed alone differ by {100 * found['seeds_differ']:.2g} % (log standard "
            "deviation): a regret below it decides nothing"
        )
    lines += [f"warning: {text}" for text in law.warnings]
    return "\n".join(lines)


def cell_name(one: Mapping[str, Any]) -> str:
    """What a cell is, in words."""
    parts = [f"{name} {one[name]:.4g}" for name in ("params", "tokens", "samples", "steps", "members") if name in one]
    return ", ".join(parts)
