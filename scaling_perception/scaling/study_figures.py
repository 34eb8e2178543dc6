"""From a study's collected table to its figures and tables: what a config declares by ``figures(arg)``.

A `Figure` draws metrics against compute, with the published law where there is one; a `Comparison` is a table of
evaluations beside the published values; `Pictures` puts the panels of evaluations on one page. Each is written into the
study's folder whenever the table is, from the cells that are done.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scaling_perception.scaling.envelope import iterated_hull
from scaling_perception.scaling.law_figures import MARKERS, PALETTE
from scaling_perception.scaling.paper_laws import published_laws, published_values
from scaling_perception.support.files import atomic_path, read_json, write_text

Rows = Sequence[Mapping[str, Any]]


class Panel(NamedTuple):
    """One metric against one column of the table, a series for each value of ``group``.

    Attributes:
        x, y: a column of numbers (MACs), and a metric.
        cells: pattern of the names of cells whose lines are drawn.
        group: column that separates the series.
        law: figure whose published law is drawn beside the iterated hull of the points; "" for neither.
        kind: of the lines: evaluate, or train for the last loss of each run.
    """

    x: str
    y: str
    cells: str = "*"
    group: str = "model"
    law: str = ""
    kind: str = "evaluate"


class Gain(NamedTuple):
    """By how much of its error each model is better than the one it goes on from, and the mean over all.

    Attributes:
        metric: of the evaluations, less is better.
        label: column that is ``base`` for the models that the others of the same preset go on from.
        law: figure whose published mean gain is printed beside ours.
    """

    metric: str
    label: str
    base: str
    law: str

    def lines(self, rows: Rows) -> list[str]:
        """The mean gain in one line, with its least and its greatest; nothing where no pair is done."""
        mine = [row for row in rows if (row["kind"], row["metric"]) == ("evaluate", self.metric)]
        start = {_setting(row): row["value"] for row in mine if row.get(self.label) == self.base}
        pairs = [row for row in mine if row.get(self.label) != self.base and _setting(row) in start]
        if not pairs:
            return []
        found = np.array([1 - row["value"] / start[_setting(row)] for row in pairs])
        values = [one.value for one in published_values(self.law) if one.metric == f"gain of {self.metric}"]
        published = f"; published: {100 * values[0]:+.3g} %" if values else ""
        ends = f" ({100 * found.min():+.3g} to {100 * found.max():+.3g} %)" if len(found) > 1 else ""
        many = f"{len(found)} model{'s' * (len(found) > 1)} against {self.base}"
        return [f"gain of {self.metric}, {many}: mean {100 * found.mean():+.3g} %{ends}{published}"]


def _setting(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("model", "task", "dataset", "preset", "steps", "members"))


class Figure(NamedTuple):
    """Panels side by side, as ``NAME.svg``."""

    name: str
    panels: tuple[Panel, ...]
    gains: tuple[Gain, ...] = ()

    @property
    def file(self) -> str:
        """The name of what is written."""
        return f"{self.name}.svg"

    def summary(self, rows: Rows) -> list[str]:
        """Lines that are printed beside the figure: the mean gain of every group of pairs, with the published one."""
        return [line for gain in self.gains for line in gain.lines(rows)]

    def write(self, rows: Rows, out: Path) -> Path | None:
        import matplotlib
        from matplotlib.figure import Figure as Canvas

        found = [_points(rows, panel) for panel in self.panels]
        if not any(found):
            return None
        canvas = Canvas(figsize=(4.2 * len(found), 3.4), dpi=150, layout="constrained")
        for at, (panel, series) in enumerate(zip(self.panels, found, strict=True), 1):
            _draw(canvas.add_subplot(1, len(found), at), panel, series)
        canvas.suptitle(f"{self.name}, {next(row['study_cells'] for row in rows)} cells", fontsize=9)
        path = out / self.file
        with atomic_path(path) as temporary, matplotlib.rc_context({"svg.hashsalt": self.name}):
            canvas.savefig(temporary, format="svg", metadata={"Date": None})
        return path


class Comparison(NamedTuple):
    """The published values of a table beside those of the cells with the label ``published``, as ``NAME.md``."""

    name: str

    @property
    def file(self) -> str:
        """The name of what is written."""
        return f"{self.name}.md"

    def summary(self, rows: Rows) -> list[str]:
        """Nothing more is printed."""
        return []

    def write(self, rows: Rows, out: Path) -> Path | None:
        head = "| dataset | metric | settings | published | ours | 95 % interval | images | steps x members |"
        lines = [head, "|---" * 8 + "|"]
        any_found = False
        for one in published_values(self.name):
            mine = [r for r in rows if (r.get("published"), r["metric"]) == (one.dataset, one.metric)]
            mine = sorted((r for r in mine if r["kind"] == "evaluate"), key=lambda r: r["members"])
            cells = ["not run", "", "", ""]
            if mine:
                row, any_found = mine[0 if "one member" in one.settings else -1], True
                ends = "" if row["low"] is None else f"{row['low']:.4g} to {row['high']:.4g}"
                cells = [f"{row['value']:.4g}", ends, str(row["images"]), f"{row['steps']} x {row['members']}"]
            lines.append("| " + " | ".join([one.dataset, one.metric, one.settings, one.text, *cells]) + " |")
        path = out / self.file
        if any_found:
            write_text(path, "\n".join(lines) + "\n")
        return path if any_found else None


class Pictures(NamedTuple):
    """The first panels of evaluations, a row an image, as ``NAME.png``; ``columns``: pictures of a panel, in order."""

    name: str
    cells: tuple[str, ...]
    columns: tuple[str, ...]
    rows: int = 2

    @property
    def file(self) -> str:
        """The name of what is written."""
        return f"{self.name}.png"

    def summary(self, rows: Rows) -> list[str]:
        """Nothing more is printed."""
        return []

    def write(self, rows: Rows, out: Path) -> Path | None:
        from matplotlib.figure import Figure as Canvas
        from matplotlib.image import imread

        shown = []
        for cell in self.cells:
            if any(row["cell"] == cell for row in rows):
                panels = read_json(out / cell / "result.json")["panels"]
                shown += [(out / cell, panel) for panel in panels[: self.rows]]
        if not shown:
            return None
        canvas = Canvas(figsize=(1.6 * len(self.columns), 1.6 * len(shown)), dpi=150, layout="constrained")
        for at, (folder, panel) in enumerate(shown):
            for j, name in enumerate(self.columns):
                axis = canvas.add_subplot(len(shown), len(self.columns), at * len(self.columns) + j + 1)
                axis.axis("off")
                if name in panel:
                    axis.imshow(imread(folder / panel[name]))
                    axis.set_title(name, fontsize=7)
        path = out / self.file
        with atomic_path(path) as temporary:
            canvas.savefig(temporary, format="png")
        return path


def _points(rows: Rows, panel: Panel) -> dict[str, list[Mapping[str, Any]]]:
    """The lines of a panel by series, from small to large x; those without a positive x and value are left out."""
    series: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if (row["kind"], row["metric"]) != (panel.kind, panel.y) or not fnmatchcase(row["cell"], panel.cells):
            continue
        if (row.get(panel.x) or 0) > 0 and row["value"] > 0 and row.get("last", 1) == 1:
            series.setdefault(str(row.get(panel.group, "")), []).append(row)
    return {name: sorted(found, key=lambda row: row[panel.x]) for name, found in sorted(series.items())}


def _draw(axis: Any, panel: Panel, series: Mapping[str, Rows]) -> None:
    for at, (name, rows) in enumerate(series.items()):
        x, y = ([float(row[key]) for row in rows] for key in (panel.x, "value"))
        style = {"color": PALETTE[at % len(PALETTE)], "marker": MARKERS[at % len(MARKERS)], "ms": 4, "lw": 1}
        axis.plot(x, y, label=name, **style)
        known = [(a, row["low"], row["high"]) for a, row in zip(x, rows, strict=True) if row.get("low") is not None]
        if known:
            axis.vlines(*zip(*known, strict=True), color=style["color"], lw=0.8, alpha=0.6)
    every = [row for rows in series.values() for row in rows]
    if panel.law and every:
        x, y = (np.array([float(row[key]) for row in every]) for key in (panel.x, "value"))
        line = np.geomspace(x.min(), x.max(), 50)
        if len(set(x)) > 1:
            log_a, alpha, _, _ = iterated_hull(np.log(x), np.log(y))
            label = f"hull: {np.exp(log_a):.3g} C^{-alpha:.3g}"
            axis.plot(line, np.exp(log_a - alpha * np.log(line)), "k-", lw=1, label=label)
        law = published_laws()[panel.law]
        axis.plot(line, law.a * line**law.b, "k--", lw=1, label=f"published: {law.a:g} C^{law.b:g}")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(panel.x)
    axis.set_ylabel(panel.y)
    axis.spines[["top", "right"]].set_visible(False)
    if series:
        axis.legend(fontsize=6, frameon=False)
