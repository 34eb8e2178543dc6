"""Error against MACs of one evaluation as a PNG, for documents (`report --figures`)."""

import io
from typing import Any

import numpy as np

from scaling_perception.evaluation.comparisons import best_steps, select
from scaling_perception.evaluation.findings import shown_baselines, ways
from scaling_perception.evaluation.labels import MAIN_METRIC, Unit, baseline_label, better_words

_COLOURS = (
    *("#1f5fa8", "#c8502c", "#3b8a57", "#8455a3", "#a8882c", "#4aa3a8", "#b0487f", "#6b6b6b"),
    *("#7f9c2f", "#b8735a"),
)


def compute_figure(evaluation: dict[str, Any]) -> bytes:
    """PNG of error against MACs: left what members buy (each line a step count; thick the best one, and adaptive
    members on it), right what steps buy with the largest ensemble, and early exits. Empty where MACs are unknown."""
    metric, _, less_is_better = MAIN_METRIC[evaluation["task"]]
    if any(cell["macs"] is None for cell in evaluation["cells"]):
        return b""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    size = max(cell["ensemble"] for cell in evaluation["cells"])
    unit = Unit(cell["macs"] for cell in evaluation["cells"])
    figure = Figure(figsize=(9.2, 3.8), dpi=130, layout="constrained")
    left, right = (figure.add_subplot(1, 2, i) for i in (1, 2))

    def line(axes: Any, cells: list[dict], **style: Any) -> None:
        cells = sorted(cells, key=lambda cell: cell["macs"])
        _line(axes, evaluation, cells, [cell["macs"] / unit.size for cell in cells], **style)

    for i, (one, name) in enumerate(ways(evaluation)):
        colour = _COLOURS[i % len(_COLOURS)]
        cells = select(evaluation["cells"], way=one)
        fixed, best = select(cells, kind="constant"), best_steps(cells, metric, less_is_better)
        for steps in sorted({cell["steps"] for cell in fixed} - {best}):
            faint = sorted(select(fixed, steps=steps), key=lambda cell: cell["macs"])
            means = [cell["metrics"][metric]["mean"] for cell in faint]
            left.plot([cell["macs"] / unit.size for cell in faint], means, color=colour, lw=0.6, alpha=0.45)
        words = f"{name}: {best} step{'s' * (best > 1)}, constant N"
        line(left, select(fixed, steps=best), color=colour, label=words)
        line(right, select(fixed, ensemble=size), color=colour, label=f"{name}: constant steps")
        dashed: dict[str, Any] = {"color": colour, "ls": "--", "mfc": "white"}
        if found := select(cells, kind="adaptive", steps=best):
            line(left, found, **dashed, marker="^", label=f"{name}: adaptive members")
        early = select(cells, kind="steps", ensemble=size)
        if early and (most := max(cell["steps"] for cell in early)):
            line(right, select(early, steps=most), **dashed, marker="s", label=f"{name}: early exits of {most} steps")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        _references(axes, evaluation)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelsize=8)
        axes.set_xlabel(f"{unit.name} per image (DiT only)")
        axes.set_ylabel(f"{MAIN_METRIC[evaluation['task']].label} ({better_words(MAIN_METRIC[evaluation['task']])})")
        axes.legend(fontsize=6, framealpha=0.85, edgecolor="none")
    left.set_title("more members (thin: at other step counts)", fontsize=9)
    right.set_title(f"more steps, {size} member{'s' * (size > 1)}", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _line(axes: Any, evaluation: dict, cells: list[dict], xs: list, **style: Any) -> None:
    """A curve with its intervals."""
    metric = MAIN_METRIC[evaluation["task"]].name
    if not cells:
        return
    means = [cell["metrics"][metric]["mean"] for cell in cells]
    axes.plot(xs, means, **{"marker": "o", "ms": 3.5, "lw": 1.3, **style})
    ends = [cell["metrics"][metric]["ci95"] for cell in cells]
    if "mfc" not in style and None not in ends:  # adaptive curves lie on constant ones, and so do their intervals
        low, high = np.asarray(ends).T
        axes.fill_between(xs, low, high, color=style["color"], alpha=0.06, lw=0)


def _references(axes: Any, evaluation: dict) -> None:
    """The strongest trivial answer and the floor as lines."""
    metric, _, less_is_better = MAIN_METRIC[evaluation["task"]]
    for style, name in zip((":", "-.", "--"), shown_baselines(evaluation), strict=False):
        height = evaluation["baselines"][name]["metrics"][metric]["mean"]
        axes.axhline(height, ls=style, color="#777", lw=1)
        words = baseline_label(name, less_is_better)
        axes.text(0.01, height, words, fontsize=6, va="bottom", color="#555", transform=axes.get_yaxis_transform())
