"""The dial of compute: the settings it stops at, the error that the model's table predicts there, the seconds here.

The stops are the front of the table (``inference.budgets``): every stop has less error than all cheaper settings.
"""

import html
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from scaling_perception.inference.budgets import Choice, choose, front, measure_timing, table_choices
from scaling_perception.inference.predictor import Predictor
from scaling_perception.inference.settings import BY_BUDGET, Settings
from scaling_perception.tasks import get_task


class Stop(NamedTuple):
    """A setting on the dial."""

    choice: Choice
    interval: tuple[float, float]  # 95 %, of the error
    names: tuple[str, ...]  # of the budgets that mean this one: fast, balanced, best


class Cost(NamedTuple):
    """Seconds on this machine for a picture of the model's size: ``fixed`` once, ``member`` for each member,
    ``forward`` for each network evaluation of a member."""

    fixed: float
    member: float
    forward: float

    def seconds(self, evaluations: float, members: int) -> float:
        return self.fixed + members * (self.member + self.forward * evaluations)


def stops(table: Mapping[str, Any] | None, task: str) -> list[Stop]:
    """The dial of a task from the cheapest to the lowest error; empty where the model ships no table for it."""
    if not table or task not in table["tasks"]:
        return []
    entry = table["tasks"][task]
    choices = table_choices(entry)
    intervals = {one: tuple(cell["ci95"]) for one, cell in zip(choices, entry["cells"], strict=True)}
    named = {name: choose(table, task, name) for name in ("fast", "balanced", "best")}
    return [
        Stop(one, intervals[one], tuple(name for name, other in named.items() if other == one))
        for one in front(choices)
    ]


def stop_of(table: Mapping[str, Any] | None, task: str, settings: Settings) -> Stop | None:
    """What the table says of these settings, or None where it was not measured with them."""
    if not table or task not in table["tasks"]:
        return None
    entry, plain = table["tasks"][task], Settings()
    asked = settings.to_dict()
    for name, value in plain.to_dict().items():  # the table holds for all others as they are unless asked
        if name not in BY_BUDGET and name != "reduce" and asked[name] != value:
            return None
    if get_task(task).reduce_mode(settings.reduce) != entry.get("reduce", get_task(task).reduce_mode(None)):
        return None
    for one, cell in zip(table_choices(entry), entry["cells"], strict=True):
        same = [getattr(one, name) == asked[name] for name in ("steps", "ensemble", "preset", "spacing", "solver")]
        same += [(one.merge_in or "pixels") == asked["merge_in"], (one.views or "plain") == asked["views"]]
        cached = (one.cache or "none") == asked["cache"]
        if all(same) and cached and (asked["cache"] == "none" or one.cache_interval == asked["cache_interval"]):
            return Stop(one, tuple(cell["ci95"]), ())
    return None


def measure(predictor: Predictor, task: str) -> Cost:
    """`Cost` of this machine, by short runs on a grey picture. Compiling is not counted."""
    timing = measure_timing(predictor, task)
    side = predictor.resolution
    asks = get_task(task).prompt
    prompt = None if asks is None else asks.example(side)
    grey, spent = np.full((side, side, 3), 127, np.uint8), []
    for members in (1, 3):
        begin = time.perf_counter()
        predictor(grey, task, 1, members, prompt=prompt, batch_size=1)
        spent.append(time.perf_counter() - begin)
    one = timing.fixed + timing.per_forward
    member = max((spent[1] - spent[0]) / 2 - timing.per_forward, 0.0)
    return Cost(max(one - member - timing.per_forward, 0.0), min(member, timing.fixed), timing.per_forward)


def amount(seconds: float) -> str:
    """Seconds as a person says them: ``0.4 s``, ``12 s``, ``3 min``."""
    if seconds < 10:
        return f"{max(seconds, 0.01):.2g} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def metric_name(task: str) -> str:
    """How the table's error is written: the task's metric, or 1 - it."""
    main = get_task(task).main
    return "error" if main is None else main.error_label


def curve(dial: Sequence[Stop], current: Stop | None, task: str, trivial: float | None = None) -> str:
    """The dial as a small drawing (SVG): error with its interval against compute, the current stop marked."""
    shown = list(dial) if current is None or any(one.choice == current.choice for one in dial) else [*dial, current]
    if not shown:
        return ""
    width, height, left, right, top, bottom = 420, 132, 46, 12, 10, 26
    low = min(one.interval[0] for one in shown)
    high = max(one.interval[1] for one in shown)
    pad = max((high - low) * 0.06, 1e-9)
    low, high = low - pad, high + pad
    spent = np.log([one.choice.compute for one in shown])
    least, most = float(spent.min()), float(spent.max())

    def x(value: float) -> float:
        share = 0.5 if most == least else (float(np.log(value)) - least) / (most - least)
        return left + 14 + share * (width - left - right - 28)

    def y(value: float) -> float:
        return top + (high - value) / (high - low) * (height - top - bottom)

    parts = []
    for value in (low + pad, high - pad):
        parts.append(f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    line = " ".join(f"{x(one.choice.compute):.1f},{y(one.choice.error):.1f}" for one in dial)
    parts.append(f'<polyline points="{line}" class="line"/>')
    for one in shown:
        on = current is not None and one.choice == current.choice
        at, kind = x(one.choice.compute), ' class="on"' if on else ""
        parts.append(
            f'<g{kind}><line x1="{at:.1f}" x2="{at:.1f}" y1="{y(one.interval[0]):.1f}" y2="{y(one.interval[1]):.1f}"/>'
            f'<circle cx="{at:.1f}" cy="{y(one.choice.error):.1f}" r="{6 if on else 3.5}"/></g>'
        )
    for one, anchor in ((shown[0], "start"), (max(shown, key=lambda s: s.choice.compute), "end")):
        parts.append(
            f'<text x="{x(one.choice.compute) + (-14 if anchor == "start" else 12):.1f}" y="{height - 8}" '
            f'text-anchor="{anchor}">{one.choice.compute / 1e9:.2g} GMACs with decoding</text>'
        )
    words = f"{metric_name(task)} against compute: " + "; ".join(
        f"{one.choice.steps} steps × {one.choice.ensemble} members {one.choice.error:.3g}" for one in dial
    )
    return (
        f'<svg class="dial" viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(words, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )
