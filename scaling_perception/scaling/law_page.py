"""The page of a fit, self-contained HTML: the curve with its bands, residuals, profiles, hold-out, warnings, how it was
made, and the points and the law as files inside."""

import csv
import html
import io
from typing import Any

import numpy as np

from scaling_perception.scaling.frontier import FRONTIER_HEAD, compute_columns, draw_frontier, frontier_rows
from scaling_perception.scaling.law_choice import held_out_points, split_largest, thinned
from scaling_perception.scaling.law_figures import MARKERS, PALETTE, draw_law
from scaling_perception.scaling.law_fit import MANY, Options, Problem, fit_problem
from scaling_perception.scaling.law_forms import make_form
from scaling_perception.scaling.law_intervals import Profile, profile_curves
from scaling_perception.scaling.law_text import law_text, number
from scaling_perception.scaling.laws import Law, dump
from scaling_perception.scaling.points import Points
from scaling_perception.support.html_page import file, items, page, table

_MOST_ROWS = 50_000


def law_page(law: Law, points: Points, options: Options, command: str, images: list[float]) -> str:
    """The page.

    Args:
        command: the words that made it.
        images: numbers of images to serve, of the frontier, where the law is of training and test-time compute.
    """
    y = html.escape(law.y)
    parts = [f"<p>{html.escape(law.equation)} &nbsp; (y = {y}), {law.points} points</p>"]
    parts.append(_parameters(law))
    if law.warnings:
        parts += ["<h2>Warnings</h2>", items(law.warnings)]
    parts += ["<h2>The law and its residuals</h2>", _svg(draw_law(law, points)), f"<p>{_curve_words(law)}</p>"]
    parts += ["<h2>Profile likelihood</h2>", _profiles(law, points, options)]
    parts += ["<h2>Hold-out</h2>", _hold_out(law, points, options)]
    if compute_columns(law.x):
        parts += ["<h2>Training against test-time compute</h2>", _svg(draw_frontier(law, points, images))]
        parts += [f"<p>{_FRONTIER_WORDS}</p>", table(FRONTIER_HEAD, frontier_rows(law, images))]
    if law.notes:
        parts += ["<h2>Notes</h2>", items(law.notes)]
    parts += ["<h2>How it was made</h2>", f"<pre>{html.escape(command)}</pre>"]
    parts.append(table(["file", "SHA-256"], [[one["file"], one["sha256"]] for one in law.source]))
    parts += [f"<pre>{html.escape(law_text(law))}</pre>", "<h2>Points</h2>", _points(law, points)]
    parts += ["<h2>Law</h2>", file("law.json", dump(law), "application/json")]
    intro = f"scaling-perception {law.software}; intervals are {100 * law.level:g} %"
    return page(f"{law.y} by {', '.join(law.x)}: {law.form}", intro, "".join(parts))


_FRONTIER_WORDS = (
    "Left: points by error, contours of the law, lines: its best split of each total for so many images to serve; "
    "ringed: no point is better with as little of both. Right: error against the total, the least that was "
    "measured (steps) and the law along its best split. Inside the data alone."
)


def _parameters(law: Law) -> str:
    every = ("corrected", "bootstrap", "bca", "profile")
    kinds = [kind for kind in every if any(one.get(kind) for one in law.parameters.values())]
    rows = []
    for name, one in law.parameters.items():
        found = [one.get(kind) for kind in ("interval", *kinds)]
        ends = ["" if pair is None else f"{number(pair[0])} to {number(pair[1])}" for pair in found]
        rows.append([name, number(one["value"]), f"{ends[0]} ({one['by']})", *ends[1:]])
    return table(["", "value", f"{100 * law.level:g} % interval", *kinds], rows)


def _curve_words(law: Law) -> str:
    level = f"{100 * law.level:g} %"
    return (
        f"Dark band: {level} interval of the law; light band: of a new run. Right: residuals against the prediction, "
        f"with {level} of the scatter, whose log standard deviation is {100 * law.noise['log_sd']:.2g} %."
    )


def _svg(figure: Any) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "law"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    found = text.getvalue()
    return f'<div class="full">{found[found.index("<svg") :]}</div>'


def _profiles(law: Law, points: Points, options: Options) -> str:
    if law.form == "hull" or law.loss["kind"] == "quantile":
        return "<p>None: an envelope is no maximum of a likelihood.</p>"
    if len(points) > MANY:
        return f"<p>None: they are not taken of over {MANY:,} points.</p>"
    problem = Problem.of(points, law.form, options)
    best = fit_problem(problem, options)
    curves = profile_curves(
        problem.form, best, problem.lx, problem.ly, problem.loss, problem.centre, problem.scale, points.groups,
        options.level,
    )  # fmt: skip
    if not curves:
        return "<p>None: the points lie on the law, or the form has no parameter that is profiled.</p>"
    words = (
        "Each parameter is held at a value and the others are fitted again. The curve is by how much the loss grows, "
        f"in the units of the test; the {100 * law.level:g} % interval is where it lies below the line. A curve that "
        "stays below it on one side is an end that the data do not set."
    )
    return _svg(_draw_profiles(curves, law)) + f"<p>{words}</p>"


def _draw_profiles(curves: dict[str, Profile], law: Law) -> Any:
    from matplotlib.figure import Figure

    across = min(len(curves), 4)
    down = -(-len(curves) // across)
    figure = Figure(figsize=(2.5 * across, 2.2 * down), dpi=150, layout="constrained")
    for at, (name, one) in enumerate(curves.items(), 1):
        axis = figure.add_subplot(down, across, at)
        axis.plot(one.values, one.statistic, color=PALETTE[0], lw=1.3)
        axis.axhline(one.threshold, color="0.4", ls="--", lw=0.9)
        axis.axvline(law.parameters[name]["value"], color=PALETTE[1], lw=0.9)
        for end in one.ends:
            if end is not None:
                axis.axvline(end, color=PALETTE[0], ls=":", lw=0.9)
        axis.set_ylim(0, 3 * one.threshold)
        if one.values.min() > 0 and one.values.max() > 30 * one.values.min():
            axis.set_xscale("log")
        axis.set_xlabel(name, fontsize=8)
        axis.tick_params(labelsize=6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _hold_out(law: Law, points: Points, options: Options) -> str:
    if law.holdout is None:
        return (
            "<p>None: too few points are left without the largest, or the law is an envelope, which predicts none.</p>"
        )
    thin = thinned(points)
    split = split_largest(thin, make_form(law.form, law.x).size)
    assert split is not None  # the law was held out
    found = held_out_points(thin, law.form, split, options)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.8), dpi=150, layout="constrained")
    axis = figure.add_subplot()
    held = thin.take(split.held)
    x = held.x[0] if len(held.x) == 1 else np.exp(np.log(held.y) - found.errors)
    axis.vlines(x, *(100 * found.ends), color="0.7", lw=1.4, label=f"{100 * law.level:g} % interval")
    for inside, marker, colour in ((True, MARKERS[0], PALETTE[0]), (False, MARKERS[1], PALETTE[1])):
        which = found.inside == inside
        name = "inside" if inside else "outside"
        axis.plot(x[which], 100 * found.errors[which], ls="", marker=marker, ms=4, color=colour, mfc="none", label=name)
    axis.axhline(0, color=PALETTE[0], lw=1)
    axis.set_xscale("log")
    axis.set_xlabel(law.x[0] if len(held.x) == 1 else f"predicted {law.y}")
    axis.set_ylabel("100 log(y / prediction)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=6, frameon=False)
    line = next(text for text in law_text(law).splitlines() if text.startswith("hold-out:"))
    forms = [[row["form"], str(row["parameters"]), f"{100 * row['error']:.2f} %"] for row in law.choice]
    compared = table(["form", "parameters", "held-out error"], forms) if forms else ""
    return f"{_svg(figure)}<p>{html.escape(line)}</p>{compared}"


def _points(law: Law, points: Points) -> str:
    """The points as a CSV that `fit` reads, with every group, in at most 50,000 rows."""
    shown = min(len(points), _MOST_ROWS)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    groups = points.group_names
    writer.writerow([*points.x_names, points.y_name, *groups])
    codes = [points.labels, *(group.tolist() for group in points.groups[1:])] if groups else []
    for i in range(shown):
        numbers = [f"{value:.10g}" for value in (*points.x[:, i], points.y[i])]
        writer.writerow([*numbers, *(column[i] for column in codes)])
    words = f"All {shown:,} points" if shown == len(points) else f"The first {shown:,} of {len(points):,} points"
    more = "; means over images, which were resampled as well" if points.images is not None else ""
    return f"<p>{words} that the law was fitted to{more}.</p>" + file("points.csv", text.getvalue(), "text/csv")
