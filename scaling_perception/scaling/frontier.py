"""Training against test-time compute: where a law says that a budget is best spent, and what the points show.

With N images to serve, a model costs 3 x its training's forward MACs + N x the MACs of one prediction. The frontier is
the least error for each such total: of the points as they were measured, and of the law along its best split.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from scaling_perception.models.compute import TRAINING_FACTOR
from scaling_perception.scaling.law_figures import PALETTE, log_scale
from scaling_perception.scaling.laws import Law, predict, predict_samples
from scaling_perception.scaling.plan_laws import QUANTITIES
from scaling_perception.scaling.points import Points, find_column
from scaling_perception.support.errors import UserError

_SHARES = 241
_STYLES = ("-", "--", ":", "-.")


class Best(NamedTuple):
    """The best split of one total: training (forward MACs), MACs of a prediction, error and its interval."""

    total: float
    train: float
    serve: float
    error: float
    low: float
    high: float


def compute_columns(names: tuple[str, ...]) -> tuple[int, int] | None:
    """Which of two columns is the training's compute and which that of a prediction; None where they are others."""
    if len(names) != 2:
        return None
    train = [i for i, name in enumerate(names) if find_column(QUANTITIES["training"], name)]
    serve = [i for i, name in enumerate(names) if find_column((*QUANTITIES["serving"], "macs"), name)]
    return (train[0], serve[0]) if train and serve else None


def need_columns(names: tuple[str, ...]) -> tuple[int, int]:
    """`compute_columns`, or a refusal.

    Raises:
        UserError: the law is of other columns.
    """
    found = compute_columns(names)
    if found is None:
        raise UserError(
            f"--frontier: the law is of {', '.join(names)}; the frontier is of training and test-time compute: "
            "--x train_macs macs"
        )
    return found


def usual_images(points: Points) -> list[float]:
    """Numbers of images for which training and serving cost about as much, a hundredth and a hundred times that."""
    train, serve = need_columns(points.x_names)
    even = np.median(points.x[train]) * TRAINING_FACTOR / np.median(points.x[serve])
    middle = max(round(math.log10(even)), 0)
    return [10.0**power for power in (middle - 2, middle, middle + 2) if power >= 0]


def staircase(total: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Indices of the points that no cheaper or equally dear one is as good as, from the cheapest."""
    order = np.lexsort((error, total))
    least = np.minimum.accumulate(np.concatenate([[np.inf], error[order][:-1]]))
    return order[error[order] < least]


def undominated(train: np.ndarray, serve: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Which points (n,) no other one beats with as little training and as little test-time compute."""
    out = np.ones(len(error), bool)
    for at in range(len(error)):
        as_cheap = (train <= train[at]) & (serve <= serve[at])
        better = (error < error[at]) | ((error == error[at]) & ((train < train[at]) | (serve < serve[at])))
        out[at] = not (as_cheap & better).any()
    return out


def best_splits(law: Law, images: float, count: int = 40) -> list[Best]:
    """The law's best split of totals between the least and the greatest that its data span; inside the data alone."""
    train_at, serve_at = need_columns(law.x)
    ends = [law.range[name] for name in law.x]
    low, high = (TRAINING_FACTOR * ends[train_at][i] + images * ends[serve_at][i] for i in (0, 1))
    found = []
    for total in np.geomspace(low * (1 + 1e-9), high, count):
        serve = np.geomspace(ends[serve_at][0], ends[serve_at][1], _SHARES)
        train = (total - images * serve) / TRAINING_FACTOR
        train = np.minimum(train, ends[train_at][1])  # what is left over is not spent
        ok = train >= ends[train_at][0] * (1 - 1e-9)
        if not ok.any():
            continue
        x = np.stack([train[ok], serve[ok]] if train_at == 0 else [serve[ok], train[ok]])
        error = predict(law, x)
        at = int(error.argmin())
        drawn = np.sort(predict_samples(law, x[:, [at]])[:, 0])
        edges = np.quantile(drawn, [0.5 - law.level / 2, 0.5 + law.level / 2])
        found.append(Best(float(total), float(x[train_at, at]), float(x[serve_at, at]), float(error[at]), *edges))
    return found


def draw_frontier(law: Law, points: Points, images: list[float]) -> Any:
    """A matplotlib figure. Left: the points and the law's contours over both computes, with the best splits; ringed:
    points that none beats with as little of both. Right: error against the total, for each number of images."""
    from matplotlib.figure import Figure

    train_at, serve_at = need_columns(points.x_names)
    train, serve, y = points.x[train_at], points.x[serve_at], points.y
    figure = Figure(figsize=(9.6, 4.0), dpi=150, layout="constrained")
    plane, curve = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    grid = np.meshgrid(*(np.geomspace(row.min(), row.max(), 60) for row in (train, serve)))
    x = np.stack([row.ravel() for row in (grid if train_at == 0 else grid[::-1])])
    surface = predict(law, x).reshape(grid[0].shape)
    lines = plane.contour(*grid, surface, levels=8, colors="0.6", linewidths=0.7)
    plane.clabel(lines, fontsize=6, fmt="%.3g")
    shown = plane.scatter(train, serve, c=y, cmap="cividis_r", s=22, lw=0.3, ec="k", zorder=3)
    ringed = undominated(train, serve, y)
    plane.scatter(train[ringed], serve[ringed], s=70, fc="none", ec=PALETTE[1], lw=1.1, zorder=4, label="none better")
    figure.colorbar(shown, ax=plane, label=points.y_name, pad=0.01)
    for at, number in enumerate(images):
        splits = best_splits(law, number)
        style: dict[str, Any] = {"color": PALETTE[(0, 2, 3, 4)[at % 4]], "ls": _STYLES[at % 4]}
        total = TRAINING_FACTOR * train + number * serve
        name = f"{number:.3g} images"
        plane.plot([b.train for b in splits], [b.serve for b in splits], lw=1.6, zorder=5, **style, label=name)
        curve.plot(total, y, ls="", marker="osD^"[at % 4], ms=2.5, mfc="none", mew=0.6, alpha=0.5, color=style["color"])
        steps = staircase(total, y)
        curve.step(total[steps], y[steps], where="post", lw=1, alpha=0.9, **style, label=f"{name}: measured")
        totals = [b.total for b in splits]
        curve.fill_between(
            totals, [b.low for b in splits], [b.high for b in splits], color=style["color"], alpha=0.12, lw=0
        )
        curve.plot(totals, [b.error for b in splits], lw=1.8, **style, label=f"{name}: law, {100 * law.level:g} %")
    for axis in (plane, curve):
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xscale("log")
        axis.legend(fontsize=6, framealpha=0.85, edgecolor="none", loc="upper right")
    plane.set_yscale("log")
    plane.margins(0.06)
    plane.set_xlabel(f"{points.x_names[train_at]}, forward MACs of the training")
    plane.set_ylabel(f"{points.x_names[serve_at]}, MACs of a prediction")
    log_scale(curve.yaxis, curve.set_yscale, y)
    curve.set_xlabel("3 x training + images x prediction, MACs")
    curve.set_ylabel(points.y_name)
    return figure


def frontier_rows(law: Law, images: list[float]) -> list[list[str]]:
    """Of each number of images the law's best split of three totals: text of a table."""
    rows = []
    for number in images:
        splits = best_splits(law, number)
        for at in sorted({0, len(splits) // 2, len(splits) - 1}):
            one = splits[at]
            share = TRAINING_FACTOR * one.train / (TRAINING_FACTOR * one.train + number * one.serve)
            error = f"{one.error:.4g} [{one.low:.4g}, {one.high:.4g}]"
            rows.append([f"{number:.3g}", f"{one.total:.3g}", f"{one.train:.3g}", f"{one.serve:.3g}",
                         f"{100 * share:.0f} %", error])  # fmt: skip
    return rows


FRONTIER_HEAD = ("images", "total MACs", "training, forward", "a prediction", "share of training", "error of the law")
