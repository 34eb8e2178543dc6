"""Line charts as SVG inside a page, without a library: colours follow the page, values show under the pointer.

A chart is plain data (`Chart`); `svg` draws it, `legend` explains its lines beside it (never over them), `csv_text` is
its numbers. The same chart gives the same text.
"""

import csv
import html
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 440, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 26, 44
COLOURS = 10
"""The page's style has so many colours of lines, ``--c0`` and on."""
MARKERS = ("circle", "square", "triangle", "diamond")
_DASHES = {"": "", "dashed": "7 4", "dotted": "2 4", "none": "0 9999"}


class Point(NamedTuple):
    """A value with its interval (None: not known), and what is said of it under the pointer."""

    x: float
    y: float
    low: float | None
    high: float | None
    text: str


class Series(NamedTuple):
    """One line. ``colour`` is a number of the page's; ``dash`` is '', dashed, dotted or none, points alone; ``band``:
    draw intervals; ``quiet``: points show under the pointer alone."""

    name: str
    points: tuple[Point, ...]
    colour: int = 0
    dash: str = ""
    marker: str = "circle"
    hollow: bool = False
    faint: bool = False
    band: bool = True
    quiet: bool = False


class Reference(NamedTuple):
    """A height to compare with."""

    name: str
    y: float


class Chart(NamedTuple):
    """A chart. ``alt`` says in a sentence what is seen; ``x_ticks`` None chooses them."""

    series: tuple[Series, ...]
    x_label: str
    y_label: str
    alt: str
    references: tuple[Reference, ...] = ()
    log_x: bool = True
    x_ticks: tuple[float, ...] | None = None


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values within [low, high], some ``about`` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, … within [low, high] > 0; of more than four decades, the decades alone."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 1.5, 2, 3, 5, 7) if high < 12 * low else (1, 2, 5) if high < 2e4 * low else (1,)
    every = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    return [tick for tick in every if low * 0.999 <= tick <= high * 1.001]


class _Frame:
    """Where values lie in the picture."""

    def __init__(self, chart: Chart) -> None:
        points = [point for one in chart.series for point in one.points]
        xs, self.log = [point.x for point in points], chart.log_x
        ys = [y for point in points for y in (point.y, point.low, point.high) if y is not None]
        low, high = min(ys), max(ys)
        near = [one.y for one in chart.references if low - (high - low) <= one.y <= high + (high - low)]
        low, high = min([low, *near]), max([high, *near])
        pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        self.y_low, self.y_high = low - pad, high + pad
        a, b = self._x(min(xs)), self._x(max(xs))
        pad = 0.04 * (b - a) or 0.5
        self.x_low, self.x_high = a - pad, b + pad
        if chart.x_ticks is not None:
            self.x_ticks = list(chart.x_ticks)
        elif self.log:
            self.x_ticks = log_ticks(min(xs), max(xs)) or [min(xs)]
        else:
            self.x_ticks = nice_ticks(min(xs), max(xs))

    def _x(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def x(self, value: float) -> float:
        share = (self._x(value) - self.x_low) / (self.x_high - self.x_low)
        return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)

    def holds(self, value: float) -> bool:
        return self.y_low <= value <= self.y_high


def svg(chart: Chart) -> str:
    """The chart. Without a script each point has its text as a title; with the page's, it shows under the pointer."""
    frame, parts = _Frame(chart), []
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    for tick in nice_ticks(frame.y_low, frame.y_high):
        y = frame.y(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    taken = -100.0
    for tick in frame.x_ticks:
        x, name = frame.x(tick), f"{tick:g}"
        parts.append(f'<path class="axis" d="M{x} {bottom}v4"/>')
        if x - taken > 8 + 7 * len(name):  # leave out a label that would touch the one before
            parts.append(f'<text x="{x}" y="{bottom + 17}" text-anchor="middle">{name}</text>')
            taken = x
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(chart.x_label)}</text>')
    parts.append(f'<text x="4" y="14">{html.escape(chart.y_label)}</text>')
    for i, one in enumerate(chart.references):
        if frame.holds(one.y):
            parts.append(f'<path class="reference r{i % 3}" d="M{_LEFT} {frame.y(one.y)}H{right}"/>')
    parts += [_band(frame, one) for one in chart.series if one.band and not one.faint]
    parts += [_line(frame, one) for one in chart.series]
    label = html.escape(chart.alt, quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def _band(frame: _Frame, series: Series) -> str:
    ends = [
        (frame.x(point.x), frame.y(point.low), frame.y(point.high))
        for point in series.points
        if point.low is not None and point.high is not None
    ]
    if len(ends) == 1:
        (x, low, high) = ends[0]
        return f'<path class="line k{series.colour}" d="M{x} {low}V{high}"/>'
    upper = [f"{x} {high}" for x, _, high in ends]
    lower = [f"{x} {low}" for x, low, _ in reversed(ends)]
    return f'<path class="band k{series.colour}" d="M{" ".join(upper + lower)}Z"/>' if ends else ""


def _line(frame: _Frame, series: Series) -> str:
    places = [(frame.x(point.x), frame.y(point.y)) for point in series.points]
    way = "M" + "L".join(f"{x} {y}" for x, y in places)
    dash = f' stroke-dasharray="{_DASHES[series.dash]}"' if series.dash else ""
    faint = " faint" if series.faint else ""
    joined = len(places) > 1 and series.dash != "none"
    found = [f'<path class="line k{series.colour}{faint}" d="{way}"{dash}/>'] if joined else []
    if series.marker:
        fill = " hollow" * series.hollow + " quiet" * series.quiet + faint
        for point, (x, y) in zip(series.points, places, strict=True):
            text = html.escape(point.text, quote=True)
            shape = f'd="{marker(series.marker, x, y)}" data-x="{x}" data-y="{y}" data-text="{text}"'
            found.append(f'<path class="dot k{series.colour}{fill}" {shape}><title>{text}</title></path>')
    return "".join(found)


def marker(kind: str, x: float, y: float, size: float = 3.6) -> str:
    """A shape around a place, as the path of an SVG."""
    r = size
    if kind == "square":
        return f"M{x - r:.1f} {y - r:.1f}h{2 * r:.1f}v{2 * r:.1f}h{-2 * r:.1f}z"
    if kind == "triangle":
        return f"M{x:.1f} {y - 1.2 * r:.1f}l{1.2 * r:.1f} {2 * r:.1f}h{-2.4 * r:.1f}z"
    if kind == "diamond":
        return f"M{x:.1f} {y - 1.3 * r:.1f}l{1.3 * r:.1f} {1.3 * r:.1f}l{-1.3 * r:.1f} {1.3 * r:.1f}l{-1.3 * r:.1f} {-1.3 * r:.1f}z"  # noqa: E501
    return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r:.1f} 0a{r} {r} 0 1 0 {-2 * r:.1f} 0z"


def legend(chart: Chart) -> str:
    """What each line is, with a sample of it; a reference outside of the picture is said to be so."""
    frame, found = _Frame(chart), []
    for one in chart.series:
        if one.dash == "none":
            continue  # the caption says what points alone are
        dash = f' stroke-dasharray="{_DASHES[one.dash]}"' if one.dash else ""
        fill = " hollow" * one.hollow + " quiet" * one.quiet
        dot = f'<path class="dot k{one.colour}{fill}" d="{marker(one.marker, 19, 7)}"/>' if one.marker else ""
        line = f'<path class="line k{one.colour}{" faint" if one.faint else ""}" d="M1 7H37"{dash}/>'
        found.append(_sample(line + dot, one.name))
    for i, one in enumerate(chart.references):
        where = (
            "" if frame.holds(one.y) else (" (above the picture)" if one.y > frame.y_high else " (below the picture)")
        )
        found.append(_sample(f'<path class="reference r{i % 3}" d="M1 7H37"/>', f"{one.name}: {one.y:.4g}{where}"))
    return f'<ul class="legend">{"".join(found)}</ul>'


def _sample(drawn: str, name: str) -> str:
    return f'<li><svg viewBox="0 0 38 14" aria-hidden="true">{drawn}</svg>{html.escape(name)}</li>'


def csv_text(chart: Chart, names: Sequence[str] = ("line", "x", "y", "low", "high")) -> str:
    """One line a point of the chart: its line, x, y and interval; references have no x."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for one in chart.series:
        for p in one.points:
            writer.writerow([one.name, *("" if v is None else f"{v:.6g}" for v in (p.x, p.y, p.low, p.high))])
    writer.writerows([one.name, "", f"{one.y:.6g}", "", ""] for one in chart.references)
    return text.getvalue()
