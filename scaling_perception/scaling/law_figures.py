"""Figures of a law: points, curve with bands, envelope and hull, residuals. SVG, PNG or PDF.

Colours are of Okabe and Ito's palette, which the colour-blind can tell apart; lines also differ in style and points in
shape, so that a figure reads in grey.
"""

from pathlib import Path

import numpy as np

from scaling_perception.scaling.laws import Law, predict, predict_interval
from scaling_perception.scaling.points import Points
from scaling_perception.support.errors import UserError

FORMATS = (".svg", ".png", ".pdf")
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_MOST_POINTS = 20_000


def check_name(path: str, flag: str = "--figure") -> None:
    """Refuse a figure's name whose suffix is no format, before the fit is made.

    Raises:
        UserError: the suffix is none of ``FORMATS``.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise UserError(f"{flag} {path}: end the name in {', '.join(FORMATS)}")


def save_figure(path: str | Path, figure, suffix: str) -> None:
    """Write a matplotlib figure in the format of ``suffix``, the same bytes each time."""
    import matplotlib

    kind = suffix.lower()[1:]
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with matplotlib.rc_context({"svg.hashsalt": "law"}):
        figure.savefig(path, format=kind, metadata=metadata)


def draw_law(law: Law, points: Points):
    """A matplotlib figure: against every x the points and the law with its bands; residuals against the prediction."""
    from matplotlib.figure import Figure

    count = len(law.x)
    figure = Figure(figsize=(3.6 * (count + 1) + 0.6, 3.5), dpi=150, layout="constrained")
    axes = [figure.add_subplot(1, count + 1, i + 1) for i in range(count + 1)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, lw=0.5)
    points = _thinned(points)
    for j, axis in enumerate(axes[:-1]):
        _draw_curve(axis, law, points, j)
    axes[0].legend(fontsize=6.5, frameon=False)
    _draw_residuals(axes[-1], law, points)
    figure.suptitle(law.equation.replace("y =", f"{law.y} ="), fontsize=8.5)
    return figure


def _thinned(points: Points) -> Points:
    if len(points) <= _MOST_POINTS:
        return points
    keep = np.zeros(len(points), bool)
    keep[np.random.default_rng(0).choice(len(points), _MOST_POINTS, replace=False)] = True
    return points.take(keep)


def _series(points: Points) -> list[tuple[str, np.ndarray]]:
    """(label, which points) of each run; one series where there are none or too many to tell apart."""
    labels = np.array(points.labels)
    names = list(dict.fromkeys(points.labels))
    if not 1 < len(names) <= len(MARKERS):
        return [("points", np.ones(len(points), bool))]
    return [(name, labels == name) for name in names]


def _draw_curve(axis, law: Law, points: Points, j: int) -> None:
    """Points against variable j; with several variables what the others explain is taken out of the points."""
    x = points.x[j]
    low, high = law.range[law.x[j]]
    line = np.geomspace(low, high * (high / low) ** 0.1, 120)
    middle = np.exp(np.log(points.x).mean(1))
    at = np.repeat(middle[:, None], len(line), 1)
    at[j] = line
    y = points.y
    if len(law.x) > 1:
        own = np.repeat(middle[:, None], len(y), 1)
        own[j] = x
        y = y * predict(law, own) / predict(law, points.x)
    for (name, which), marker, colour in zip(_series(points), MARKERS, PALETTE[1:] + PALETTE[:1], strict=False):
        axis.plot(
            x[which], y[which], ls="", marker=marker, ms=3.2, mfc="none", mew=0.8, color=colour, label=name, alpha=0.8
        )
    level = f"{100 * law.level:g} %"
    inner, outer = predict_interval(law, at, noise=False), predict_interval(law, at)
    axis.fill_between(line, *outer, color=PALETTE[0], alpha=0.12, lw=0, label=f"{level}, a new run")
    axis.fill_between(line, *inner, color=PALETTE[0], alpha=0.3, lw=0, label=f"{level}, the law")
    axis.plot(line, predict(law, at), color=PALETTE[0], lw=1.4, label="law")
    if len(law.x) == 1:
        _draw_envelopes(axis, law, points, line)
    floor = law.parameters.get("E", {}).get("value", 0.0)
    if len(law.x) == 1 and floor > 0.3 * y.min():
        axis.axhline(floor, color="0.35", ls=":", lw=1, label="floor E")
    log_scale(axis.xaxis, axis.set_xscale, line)
    log_scale(axis.yaxis, axis.set_yscale, y)
    axis.set_xlabel(law.x[j])
    axis.set_ylabel(law.y if len(law.x) == 1 else f"{law.y}, other columns at their mean")


def log_scale(axis, set_scale, values: np.ndarray) -> None:
    """A log axis; of values within a decade with a few round numbers as ticks."""
    from matplotlib.ticker import FormatStrFormatter, MaxNLocator, NullFormatter

    set_scale("log")
    axis.set_minor_formatter(NullFormatter())
    if values.max() / values.min() < 10:
        axis.set_major_locator(MaxNLocator(4))
        axis.set_major_formatter(FormatStrFormatter("%g"))


def _draw_envelopes(axis, law: Law, points: Points, line: np.ndarray) -> None:
    """The hull's vertices and, for a fit of the mean, the 5 % quantile envelope of the same form."""
    from scaling_perception.scaling.envelope import iterated_hull, lower_hull
    from scaling_perception.scaling.law_fit import Options, Problem, fit_problem

    if len(points) < 4:
        return
    log_x, log_y = np.log(points.x[0]), np.log(points.y)
    hull = lower_hull(log_x, log_y)
    if law.form != "hull":
        log_a, alpha, _, _ = iterated_hull(log_x, log_y)
        axis.plot(line, np.exp(log_a - alpha * np.log(line)), color=PALETTE[2], ls="--", lw=1, label="iterated hull")
    axis.plot(points.x[0][hull], points.y[hull], ls="", marker="o", ms=6, mfc="none", mec=PALETTE[2], mew=1)
    if law.loss["tau"] == 0.5 and len(points) >= 20:
        options = Options(loss="quantile", tau=0.05)
        problem = Problem.of(points, "power" if law.form == "hull" else law.form, options)
        best = fit_problem(problem, options)
        values = problem.form.value(problem.published(best.inner[None]), np.log(line)[None])[0]
        axis.plot(line, values, color=PALETTE[4], ls="-.", lw=1, label="5 % quantile")


def _draw_residuals(axis, law: Law, points: Points) -> None:
    value = predict(law, points.x)
    off = 100 * np.log(points.y / value)
    for (_, which), marker, colour in zip(_series(points), MARKERS, PALETTE[1:] + PALETTE[:1], strict=False):
        axis.plot(value[which], off[which], ls="", marker=marker, ms=3.2, mfc="none", mew=0.8, color=colour, alpha=0.8)
    ends = np.quantile(100 * np.asarray(law.noise["quantiles"]), [0.5 - law.level / 2, 0.5 + law.level / 2])
    axis.axhspan(*ends, color=PALETTE[0], alpha=0.12, lw=0)
    axis.axhline(0, color=PALETTE[0], lw=1)
    log_scale(axis.xaxis, axis.set_xscale, value)
    axis.set_xlabel(f"predicted {law.y}")
    axis.set_ylabel("residual, 100 log(y / law)")
