"""The charts of the report: error against steps, members and compute, what compute bought, and a training loss."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from scaling_perception.evaluation.comparisons import Cell, best_steps, evaluations_of, select
from scaling_perception.evaluation.findings import (
    Bought,
    Measured,
    against_least,
    frontier,
    shown_baselines,
    verdict,
    ways,
)
from scaling_perception.evaluation.intervals import interval_text
from scaling_perception.evaluation.labels import (
    LIMITS,
    MAIN_METRIC,
    Unit,
    baseline_label,
    better_words,
    counted,
    macs_text,
    setting,
)
from scaling_perception.support.svg_chart import COLOURS, MARKERS, Chart, Point, Reference, Series
from scaling_perception.tasks.base import Metric

_MOST_ROWS = 300
"""Points of a training loss that are drawn."""


def _point(cell: Cell, x: float, metric: Metric, name: str) -> Point:
    found = cell["metrics"][metric.name]
    low, high = found["ci95"] or (None, None)
    text = f"{name}{setting(cell['mean_steps'] if 'mean_steps' in cell else cell['steps'], _members(cell))}: "
    text += f"{metric.label} {interval_text(found, 3)}"
    text += "" if cell["macs"] is None else f", {macs_text(cell['macs'])} per image"
    return Point(x, found["mean"], low, high, text)


def _members(cell: Cell) -> float:
    return round(cell.get("mean_members", cell["ensemble"]), 2)


def _names(group: Sequence[Measured]) -> list[tuple[Measured, tuple[str, str], str]]:
    """Every line's (measured, way, name): the model where there are several, the way where there are several."""
    found = []
    for one in group:
        several = ways(one.evaluation)
        for each, name in several:
            parts = [one.label] * (len(group) > 1) + [name] * (len(several) > 1)
            found.append((one, each, ", ".join(parts)))
    return found


def _references(group: Sequence[Measured]) -> tuple[Reference, ...]:
    """The strongest answer without a model and the limit, of the first evaluation."""
    one = group[0].evaluation
    metric = MAIN_METRIC[one["task"]]
    return tuple(
        Reference(
            ("" if name in LIMITS else "best answer without a model, ") + baseline_label(name, metric.less_is_better),
            one["baselines"][name]["metrics"][metric.name]["mean"],
        )
        for name in shown_baselines(one)
    )


def _alt(lines: Iterable[Series], metric: Metric, against: str) -> str:
    """What is seen: where each line begins and ends."""
    found = []
    for one in lines:
        if one.points and not one.faint:
            first, last = one.points[0], one.points[-1]
            found.append(
                f"{one.name or 'the line'} from {first.y:.3f} at {first.x:.4g} to {last.y:.3f} at {last.x:.4g}"
            )
    return f"Line chart of {metric.label} ({better_words(metric)}) against {against}: {'; '.join(found)}."


def _labels(group: Sequence[Measured]) -> tuple[Metric, str]:
    metric = MAIN_METRIC[group[0].evaluation["task"]]
    return metric, f"{metric.label} ({better_words(metric)})"


def grid_chart(group: Sequence[Measured], x: str) -> Chart:
    """Error against ``x`` ('steps' or 'ensemble'): a line each value of the other; where there are several models or
    ways, of its smallest and largest value alone."""
    metric, y_label = _labels(group)
    other, noun = ("ensemble", "member") if x == "steps" else ("steps", "step")
    lines, several = _names(group), []
    alone = len(lines) == 1
    for number, (one, each, name) in enumerate(lines):
        cells = select(one.evaluation["cells"], kind="constant", way=each)
        kept = sorted({cell[other] for cell in cells})
        kept = kept if alone else sorted({kept[0], kept[-1]})
        for i, value in enumerate(kept):
            mine = sorted(select(cells, **{other: value}), key=lambda cell: cell[x])
            words = ", ".join([name] * bool(name) + [counted(value, noun)])
            points = tuple(_point(cell, cell[x], metric, f"{name}: " if name else "") for cell in mine)
            last = alone or i == len(kept) - 1
            colour = (i if alone else number) % COLOURS
            style = {"colour": colour, "dash": "" if last else "dashed", "hollow": not last}
            style["band"] = i == len(kept) - 1
            several.append(Series(words, points, marker=MARKERS[(i if alone else number) % len(MARKERS)], **style))
    ticks = tuple(sorted({point.x for one in several for point in one.points}))
    against = "denoising steps" if x == "steps" else "members of the ensemble, N"
    return Chart(tuple(several), against, y_label, _alt(several, metric, against), _references(group), x_ticks=ticks)


def compute_chart(group: Sequence[Measured], by: str) -> Chart | None:
    """Error against MACs, as more members ('ensemble') or more steps ('steps') take them; with the cells of adaptive
    compute. None where the MACs of a cell are not known."""
    metric, y_label = _labels(group)
    every = [cell for one in group for cell in one.evaluation["cells"]]
    if any(cell["macs"] is None for cell in every):
        return None
    macs = [cell["macs"] for cell in every]
    unit, found = Unit([math.sqrt(min(macs) * max(macs))]), []

    def line(cells: list[Cell], words: str, number: int, **style: Any) -> None:
        cells = sorted(cells, key=lambda cell: cell["macs"])
        points = tuple(_point(cell, cell["macs"] / unit.size, metric, f"{words}: ") for cell in cells)
        if points:
            found.append(Series(words, points, number % COLOURS, **{"marker": MARKERS[number % len(MARKERS)], **style}))

    for number, (one, each, name) in enumerate(_names(group)):
        cells = select(one.evaluation["cells"], way=each)
        fixed, head = select(cells, kind="constant"), f"{name}, " if name else ""
        dashed = {"dash": "dashed", "hollow": True, "band": False}
        if by == "ensemble":
            steps = best_steps(cells, metric.name, metric.less_is_better)
            line(select(fixed, steps=steps), f"{head}{counted(steps, 'step')}, 1 to N members", number)
            early = select(cells, kind="adaptive", steps=steps)
            line(early, f"{head}adaptive members", number, marker="triangle", **dashed)
        else:
            size = max(cell["ensemble"] for cell in fixed)
            line(select(fixed, ensemble=size), f"{head}more steps, {counted(size, 'member')}", number)
            early = select(cells, kind="steps", ensemble=size)
            most = max((cell["steps"] for cell in early), default=0)
            line(select(early, steps=most), f"{head}early exits of {most} steps", number, marker="square", **dashed)
    against = f"{unit.name} per image, transformer alone"
    return Chart(tuple(found), against, y_label, _alt(found, metric, against), _references(group)[:1])


def bought_chart(measured: Sequence[Measured]) -> Chart:
    """What compute bought: change of the error in percent against times the least compute. A line for each evaluation,
    of its best settings for at most so much; all other settings are hollow."""
    several = len({one.evaluation["task"] for one in measured}) < len(measured)
    lines, others, ends = [], [], []
    for number, one in enumerate(measured):
        evaluation, metric = one.evaluation, MAIN_METRIC[one.evaluation["task"]]
        every = against_least(evaluation)
        found = frontier(evaluation, every)
        points = _percent(found, every[0], evaluation["task"], metric)
        most = max(step.times for step in every)
        if most > points[-1].x:
            last = points[-1]
            points.append(last._replace(x=most, text=f"{last.text}; nothing measured up to {most:.3g} × was better"))
        error = metric.label if metric.less_is_better else f"1 − {metric.label}"
        name = f"{evaluation['task']} ({error})" + (f", {one.label}" if several else "")
        style = {"colour": number % COLOURS, "marker": MARKERS[number % len(MARKERS)]}
        lines.append(Series(name, tuple(points), **style))
        rest = [step for step in every if all(step is not kept for kept in found)]
        left = tuple(_percent(rest, every[0], evaluation["task"], metric))
        others.append(Series(f"{name}: other settings", left, **style, dash="none", hollow=True, faint=True))
        ends.append(f"{name} {points[-1].y:+.1f} % at {points[-1].x:.3g} times")
    alt = f"Line chart of the change of error in percent against times the least compute: {'; '.join(ends)}."
    shown = (*lines, *(one for one in others if one.points))
    words = "change of error in % (less is better)"
    return Chart(shown, "times the least compute (steps × members)", words, alt, (Reference("no change", 0.0),))


def _percent(steps: Sequence[Bought], start: Bought, task: str, metric: Metric) -> list[Point]:
    """Points of `bought_chart`: paired differences as a share of the error of the least compute."""
    error = metric.error(start.cell["metrics"][metric.name]["mean"])
    sign = (1 if metric.less_is_better else -1) * 100 / error if error else 0.0
    points = []
    for step in steps:
        low, high = sorted(sign * end for end in step.change[1:] if end is not None) or (None, None)
        where = setting(step.cell["steps"], step.cell["ensemble"])
        text = f"{task}, {where}: {step.times:.3g} × compute, {metric.label} {step.change}"
        text += f" against the least compute ({verdict(step.change, metric)})" if step is not start else ""
        points.append(Point(step.times, sign * step.change.mean, low, high, text))
    return points


def loss_chart(steps: Sequence[float], losses: Sequence[float]) -> Chart:
    """A training loss and its running mean; of many rows every k-th."""
    width = max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    raw = list(zip(steps, losses, strict=True))
    mean = list(zip(steps[width - 1 :], smooth.tolist(), strict=True))

    def points(rows: list[tuple[float, float]]) -> tuple[Point, ...]:
        every = -(-len(rows) // _MOST_ROWS)
        kept = rows[::every] + ([rows[-1]] if (len(rows) - 1) % every else [])
        return tuple(Point(x, y, None, None, f"step {x:,g}: loss {y:.4g}") for x, y in kept)

    lines = (
        Series("as logged", points(raw), 7, marker="", faint=True),
        Series(f"mean of {counted(width, 'row')}", points(mean), 0, quiet=True),
    )
    (first, begin), (last, end) = mean[0], mean[-1]
    alt = f"Line chart of the training loss: {begin:.4g} at step {first:,g}, {end:.4g} at step {last:,g}."
    return Chart(lines, "training step", "training loss", alt, log_x=False)


def single_setting(group: Sequence[Measured]) -> bool:
    """Whether nothing varies that a curve could show."""
    cells = [cell for one in group for cell in select(one.evaluation["cells"], kind="constant")]
    return len({(evaluations_of(cell), cell["ensemble"]) for cell in cells}) < 2
