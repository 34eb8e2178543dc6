"""An evaluation as CSV (a line for each cell, for laws and figures; a line for each image, for paired comparisons), and
as the table that is printed."""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from scaling_perception.evaluation.comparisons import against_usual, evaluations_of, kind, solver_of
from scaling_perception.evaluation.intervals import interval_text
from scaling_perception.inference.settings import NAMED
from scaling_perception.tasks import TASKS

MORE_IS_BETTER = tuple(name for task in TASKS.values() for name in task.more_is_better)
"""Shares that rise as results get better. Each has an error beside it, such as ``1-delta1``, which falls."""

_WHOLE = ("task", "dataset", "split", "images", "model", "weights", "params", "resolution")
_CELL = (
    *("kind", "preset", "spacing", "schedule", "solver", "steps", "ensemble", "reduce"),
    *("tolerance", "first", "step_tolerance", "step_chunk", "mean_steps", "mean_members", "macs", "seconds"),
)
NAMED_COLUMNS = (*NAMED, "cache", "cache_interval")
"""Columns of an evaluation that has such cells; a cell without one has the default."""
_IMAGE = ("kind", "preset", "spacing", "solver", "steps", "ensemble", "tolerance", "step_tolerance")


def cells_csv(result: dict[str, Any]) -> str:
    """One line a cell of an evaluation (`evaluate`'s JSON).

    Columns: what was evaluated (``task`` … ``resolution``, ``protocol``: the protocol's fingerprint), the cell's
    settings, its compute (means over images), and for every metric its mean, ``_low`` and ``_high``, the ends of the
    95 % interval (empty for too few images). A share that rises has a second set, such as ``1-iou``. A field that a
    cell does not have is empty.
    """
    names = list(dict.fromkeys(name for cell in result["cells"] for name in cell["metrics"]))
    ends = [f"{column}{end}" for name in names for column in _columns(name) for end in ("", "_low", "_high")]
    head = [*[result.get(name) for name in _WHOLE], result["protocol"].get("fingerprint")]
    own = [*_CELL, *_named(result)]
    lines = [[*_WHOLE, "protocol", *own, *ends]]
    for cell in result["cells"]:
        figures = [figure for name in names for figure in _figures(name, cell["metrics"].get(name))]
        lines.append([*head, *_of_cell(cell, own), *figures])
    return _text(lines)


def images_csv(result: dict[str, Any]) -> str:
    """One line an image and cell, and an image and trivial answer (``answer``: ``model``, or the answer's name).

    ``forwards`` are the network evaluations of each pass that the image took, ``macs`` all that they cost.
    """
    names = list(dict.fromkeys(n for found in _answers(result) for row in found[1]["rows"] for n in row if n != "key"))
    own = [*_IMAGE, *_named(result)]
    lines = [["task", "dataset", "model", "key", "answer", *own, "forwards", "macs", *names]]
    for answer, found in _answers(result):
        for index, row in enumerate(found["rows"]):
            spent: list[Any] = [None, None]
            if "steps" in found:
                forwards = (
                    found["forwards"][index] if "forwards" in found else evaluations_of(found) * found["ensemble"]
                )
                each = result.get("macs_per_forward")
                spent = [forwards, None if each is None else each * forwards]
            head = [result["task"], result["dataset"], result["model"], row["key"], answer]
            lines.append([*head, *_of_cell(found, own), *spent, *[row.get(name) for name in names]])
    return _text(lines)


def _named(result: dict[str, Any]) -> list[str]:
    return [name for name in NAMED_COLUMNS if any(name in cell for cell in result["cells"])]


def _of_cell(found: dict[str, Any], names: Sequence[str]) -> list[Any]:
    """The fields of a cell or trivial answer, which has no kind; the kind in today's word."""
    return [kind(found) if name == "kind" and name in found else found.get(name) for name in names]


def _answers(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from (("model", cell) for cell in result["cells"])
    yield from result["baselines"].items()


def _columns(name: str) -> list[str]:
    return [name, f"1-{name}"] if name in MORE_IS_BETTER else [name]


def _figures(name: str, summary: dict[str, Any] | None) -> list[Any]:
    if summary is None:
        return [None] * 3 * len(_columns(name))
    mean, ends = summary["mean"], summary["ci95"]
    low, high = ends or (None, None)
    falling = [1 - mean, *([None, None] if ends is None else [1 - ends[1], 1 - ends[0]])]
    return [mean, low, high, *falling][: 3 * len(_columns(name))]


def _text(lines: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)  # None becomes an empty field
    return text.getvalue()


def print_table(result: dict[str, Any]) -> None:
    """Print the cells and the trivial answers."""
    metrics = list(result["protocol"]["metrics"])

    def figures(summary: dict[str, Any]) -> list[str]:
        values = [summary.get(m) for m in metrics]
        return [interval_text(v) if v else "" for v in values]

    rows = [["preset", "solver", "steps", "N", "stops at", "GMAC", "s/image", *metrics]]
    for cell in result["cells"]:
        macs = "" if cell["macs"] is None else f"{cell['macs'] / 1e9:.3g}"
        steps, members = f"{cell['mean_steps']:.3g}", f"{cell['mean_members']:.3g}"
        stops = cell.get("tolerance", cell.get("step_tolerance", ""))
        name = {"constant": "", "adaptive": cell.get("verifier", "members"), "steps": "steps"}[kind(cell)]
        head = [cell["preset"], solver_of(cell), steps, members, f"{name} {stops}".strip(), macs]
        rows.append([*head, f"{cell['seconds']:.3g}", *figures(cell["metrics"])])
    rows += [[name, *[""] * 6, *figures(value["metrics"])] for name, value in result["baselines"].items()]
    controls = {name: value for name, value in result.get("controls", {}).items() if name != "cell"}
    for name, value in controls.items():
        cell = result["controls"]["cell"]
        rows.append(
            [name, solver_of(cell), *map(str, (cell["steps"], cell["ensemble"])), *[""] * 3, *figures(value["metrics"])]
        )
        rows.append([f"picture against {name}", *[""] * 6, *figures(value["adds"])])
    _print_rows(result, rows)
    main = TASKS[result["task"]].main
    if main is not None and (merged := against_usual(result["cells"], main.name)):
        print(f"  against the usual merge of as many evaluations, paired by image ({main.label}), and its seconds:")
        for cell, seconds, even in merged:
            times = "" if seconds is None else f"× {seconds:.2f}"
            where = f"{cell['preset']} {solver_of(cell)}, {cell['steps']} steps, N = {cell['ensemble']}"
            print(f"    {where}: {even or 'not measured'}  {times}")


def _print_rows(result: dict[str, Any], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(f"{result['task']} on {result['dataset']}: {result['images']} images, model {result['model']}")
    if depth := result.get("ranges", {}).get("depth"):
        print(f"  true depth: {depth[0]:.4g} .. {depth[1]:.4g} m")
    for row in rows:
        left = row[0].ljust(widths[0])
        print("  " + "  ".join([left, *[cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]]))
