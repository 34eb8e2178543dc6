"""What evaluations say: tables of error against compute, plain sentences, one model against another.

Differences are paired by image (`comparisons`).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scaling_perception.evaluation.comparisons import (
    Change,
    best_steps,
    change,
    evaluations_of,
    savings,
    select,
    values,
    way,
)
from scaling_perception.evaluation.intervals import FEWEST_IMAGES, interval_text
from scaling_perception.evaluation.labels import (
    LIMITS,
    MAIN_METRIC,
    Unit,
    baseline_label,
    counted,
    metric_label,
    setting,
)
from scaling_perception.tasks.base import Metric

Evaluation = dict[str, Any]
Table = tuple[list[str], list[list[str]]]
_ADAPTIVE = {"adaptive": ("members within", "^"), "steps": ("stopped at changes below", "s")}


def paired_change(cells: list[dict], metric: str, start: dict, end: dict) -> Change | None:
    """Mean of per-image ``end - start`` of ``metric`` with its 95 % bootstrap interval, or None if a cell is absent."""
    first, second = (select(cells, **wanted) for wanted in (start, end))
    return change(values(first[0], metric), values(second[0], metric)) if first and second else None


def verdict(found: Change, metric: Metric) -> str:
    """A paired difference in words: better, worse, no clear change, or too few images to tell."""
    if found.low is None or found.high is None:
        return f"too few images to tell (fewer than {FEWEST_IMAGES})"
    if found.low <= 0 <= found.high:
        return "no clear change"
    return "better" if (found.mean < 0) == metric.less_is_better else "worse"


def ways(evaluation: Evaluation) -> list[tuple[tuple[str, str], str]]:
    """Every preset and solver: (way, its name)."""
    found = list(dict.fromkeys(way(cell) for cell in evaluation["cells"]))
    several = len({solver for _, solver in found}) > 1
    return [(one, ", ".join(one) if several else one[0]) for one in found]


def shown_baselines(evaluation: Evaluation) -> list[str]:
    """The strongest trivial answer and the autoencoder's limit."""
    metric, _, less_is_better = MAIN_METRIC[evaluation["task"]]
    trivial = {name: value for name, value in evaluation["baselines"].items() if name not in LIMITS}
    if not trivial:
        return []
    order = sorted(trivial, key=lambda name: trivial[name]["metrics"][metric]["mean"], reverse=not less_is_better)
    return order[:1] + [name for name in evaluation["baselines"] if name == "autoencoder"]


# --- Tables of one evaluation ----------------------------------------------------------------------------------------


def compute_table(evaluation: Evaluation) -> Table:
    """Head and rows of error against compute: one row a (preset and solver, steps), one column an ensemble size."""
    metric, label, _ = MAIN_METRIC[evaluation["task"]]
    cells = select(evaluation["cells"], kind="constant")
    sizes = sorted({cell["ensemble"] for cell in cells})
    unit = Unit(cell["macs"] / cell["ensemble"] for cell in cells if cell["macs"] is not None)
    head = ["preset", "steps", *[f"{label}, N = {size}" for size in sizes], f"{unit.name} / image, N = 1"]
    rows = []
    for one, name in ways(evaluation):
        mine = select(cells, way=one)
        for steps in sorted({cell["steps"] for cell in mine}):
            at = {cell["ensemble"]: cell for cell in select(mine, steps=steps)}
            smallest = at[min(at)]
            macs = "" if smallest["macs"] is None else unit.text(smallest["macs"] / smallest["ensemble"])
            shown = [interval_text(at[size]["metrics"][metric], 3) if size in at else "" for size in sizes]
            rows.append([name, str(steps), *shown, macs])
    return head, rows


def adaptive_table(evaluation: Evaluation) -> Table:
    """Head and rows of adaptive compute, at the step count where the largest ensemble of each preset and solver is best
    (members), and for the largest ensemble (steps)."""
    metric, label, less_is_better = MAIN_METRIC[evaluation["task"]]
    head = ["", "members", "steps", "compute", label, "against all of it", "against as much for each"]
    rows = []
    for one, name in ways(evaluation):
        cells = select(evaluation["cells"], way=one)
        best = best_steps(cells, metric, less_is_better)
        size = max(cell["ensemble"] for cell in cells)
        for of, wanted in (("adaptive", {"steps": best}), ("steps", {"ensemble": size})):
            for found in savings(cells, metric, of):
                cell, (words, _) = found.cell, _ADAPTIVE[of]
                if not select([cell], **wanted):
                    continue
                tolerance = cell["tolerance" if of == "adaptive" else "step_tolerance"]
                changes = ["" if change is None else str(change) for change in (found.whole, found.even)]
                spent = [f"{cell['mean_members']:.1f}", f"{cell['mean_steps']:.1f}", f"{100 * found.share:.0f} %"]
                words = f"{cell['verifier']} at most" if "verifier" in cell else words
                first = f"{name}, {cell['steps']} steps, {words} {tolerance:g}"
                rows.append([first, *spent, interval_text(cell["metrics"][metric], 3), *changes])
    return head, rows


def limits_table(evaluation: Evaluation) -> Table:
    """Every metric of the model's best cell, of the answers without a model, the limits and the controls."""
    main = MAIN_METRIC[evaluation["task"]]
    cells = select(evaluation["cells"], kind="constant")
    names = list(cells[0]["metrics"])
    best = best_cell(cells, main)
    rows: list[tuple[str, dict[str, Any]]] = [
        (f"the model, {setting(best['steps'], best['ensemble'])}", best["metrics"]),
        *((baseline_label(n, main.less_is_better), found["metrics"]) for n, found in evaluation["baselines"].items()),
    ]
    controls = evaluation.get("controls") or {}
    words = {"blind": "the model without the picture", "shuffled": "the model with another image's picture"}
    for name, found in controls.items():
        if name != "cell":
            cell = controls["cell"]
            at = f"{setting(cell['steps'], cell['ensemble'])}, {counted(len(found['rows']), 'image')}"
            rows.append((f"{words.get(name, name)} ({at})", found["metrics"]))
    return ["", *map(metric_label, names)], [
        [name, *[interval_text(found[m], 3) if m in found else "" for m in names]] for name, found in rows
    ]


# --- What compute bought ---------------------------------------------------------------------------------------------


def forwards(cell: dict[str, Any]) -> float:
    """Network evaluations of each pass that an image took."""
    return evaluations_of(cell) * cell["ensemble"]


def best_cell(cells: Iterable[dict[str, Any]], metric: Metric) -> dict[str, Any]:
    """The best mean; of equals the cheapest."""
    sign = 1 if metric.less_is_better else -1
    return min(cells, key=lambda cell: (sign * cell["metrics"][metric.name]["mean"], forwards(cell)))


class Bought(NamedTuple):
    """A cell against the one of the least compute: times its compute, and the paired difference."""

    cell: dict[str, Any]
    times: float
    change: Change


def against_least(evaluation: Evaluation) -> list[Bought]:
    """Every cell of constant compute against the best one of the least compute, which is the first, by compute."""
    metric = MAIN_METRIC[evaluation["task"]]
    cells = sorted(select(evaluation["cells"], kind="constant"), key=forwards)
    start = best_cell([cell for cell in cells if forwards(cell) == forwards(cells[0])], metric)
    order = [start, *(cell for cell in cells if cell is not start)]
    before = values(start, metric.name)
    return [Bought(cell, forwards(cell) / forwards(start), change(before, values(cell, metric.name))) for cell in order]


def frontier(evaluation: Evaluation, every: Sequence[Bought] | None = None) -> list[Bought]:
    """The best cells for at most so much compute, from the least on; ``every``: of `against_least`, if at hand."""
    metric = MAIN_METRIC[evaluation["task"]]
    found: list[Bought] = []
    for one in against_least(evaluation) if every is None else every:
        if not found or best_cell((found[-1].cell, one.cell), metric) is one.cell:
            if found and found[-1].times == one.times:
                found.pop()
            found.append(one)
    return found


def bought(evaluation: Evaluation, whole: bool = False) -> str:
    """One clause: what the best measured setting gains over the least compute; ``whole``: with all figures."""
    metric, found = MAIN_METRIC[evaluation["task"]], frontier(evaluation)
    start, last = found[0], found[-1]
    least, most = (metric.error(one.cell["metrics"][metric.name]["mean"]) for one in (start, last))
    name = metric.label if metric.less_is_better else f"1 − {metric.label}"
    if last is start:
        return (
            f"no setting that takes more compute than {_named(evaluation, start.cell)} lowered the "
            f"{evaluation['task']} error ({name})"
        )
    if whole:
        before, after = (one.cell["metrics"][metric.name]["mean"] for one in (start, last))
        return (
            f"the best measured setting, {_named(evaluation, last.cell)}, takes {last.times:.3g} times the compute of "
            f"{_named(evaluation, start.cell)}: {metric.label} {before:.3f} → {after:.3f}, paired difference "
            f"{last.change} — {verdict(last.change, metric)}"
        )
    share = f" by {100 * (1 - most / least):.1f} %" if least else ""
    clear = {"no clear change": "not a clear change", "better": "a clear change"}
    word = verdict(last.change, metric)
    return (
        f"{last.times:.3g} times the least compute lowered the {evaluation['task']} error ({name}){share} "
        f"({clear.get(word, word)})"
    )


def _named(evaluation: Evaluation, cell: dict[str, Any]) -> str:
    several = ways(evaluation)
    name = f" ({dict(several)[way(cell)]})" if len(several) > 1 else ""
    return setting(cell["steps"], cell["ensemble"]) + name


def verdicts(evaluation: Evaluation) -> list[str]:
    """Plain sentences: what steps buy, what members buy, and how the model stands against trivial answers."""
    main = MAIN_METRIC[evaluation["task"]]
    metric, label, less_is_better = main
    cells = select(evaluation["cells"], kind="constant")
    said = []
    for one, way_name in ways(evaluation):
        mine = select(cells, way=one)
        steps, sizes = sorted({c["steps"] for c in mine}), sorted({c["ensemble"] for c in mine})
        pairs = [
            (f"{steps[0]} → {steps[-1]} steps at N = {sizes[-1]}", {"steps": steps[0], "ensemble": sizes[-1]},
             {"steps": steps[-1], "ensemble": sizes[-1]}),
            (f"{sizes[0]} → {sizes[-1]} members at {counted(steps[-1], 'step')}",
             {"steps": steps[-1], "ensemble": sizes[0]}, {"steps": steps[-1], "ensemble": sizes[-1]}),
            (f"{sizes[0]} → {sizes[-1]} members at {counted(steps[0], 'step')}",
             {"steps": steps[0], "ensemble": sizes[0]}, {"steps": steps[0], "ensemble": sizes[-1]}),
        ]  # fmt: skip
        for name, start, end in {pair[0]: pair for pair in pairs}.values():
            found = None if start == end else paired_change(mine, metric, start, end)
            if found is not None:
                said.append(f"{way_name}: {name}: {label} {found} — {verdict(found, main)}.")
    best = best_cell(cells, main)
    trivial = [name for name in shown_baselines(evaluation) if name not in LIMITS]
    if trivial:
        value = evaluation["baselines"][trivial[0]]["metrics"][metric]
        said.append(
            f"Best cell ({best['preset']}, {best['steps']} steps, N = {best['ensemble']}): {label} "
            f"{interval_text(best['metrics'][metric], 3)}; strongest trivial answer "
            f"({baseline_label(trivial[0], less_is_better)}): {interval_text(value, 3)}."
        )
    return said


# --- Several models --------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """An evaluation, its file, and what its model is called on the page."""

    path: Path
    evaluation: Evaluation
    label: str


def together(found: Sequence[tuple[Path, Evaluation]]) -> list[list[Measured]]:
    """Evaluations that can be compared, together: of one task, data set, split and protocol; tasks in their order.

    Models of one name are told apart by their files.
    """
    groups: dict[tuple[Any, ...], list[tuple[Path, Evaluation]]] = {}
    order = list(MAIN_METRIC)
    for path, one in sorted(found, key=lambda pair: (order.index(pair[1]["task"]), str(pair[1]["dataset"]))):
        key = one["task"], str(one["dataset"]), one.get("split"), one["protocol"].get("fingerprint")
        groups.setdefault(key, []).append((path, one))
    return [_labelled(group) for group in groups.values()]


def _labelled(group: list[tuple[Path, Evaluation]]) -> list[Measured]:
    names = [Path(str(one["model"])).name or str(one["model"]) for _, one in group]
    if len(set(names)) < len(names):
        names = [str(one["model"]) for _, one in group]
    if len(set(names)) < len(names):
        stems = [path.stem for path, _ in group]
        ends = stems if len(set(stems)) == len(stems) else [str(path) for path, _ in group]
        names = [f"{name} ({end})" for name, end in zip(names, ends, strict=True)]
    return [Measured(path, one, name) for (path, one), name in zip(group, names, strict=True)]


def model_table(group: Sequence[Measured]) -> Table:
    """Each further model against the first, paired by image, wherever both have the same setting."""
    metric = MAIN_METRIC[group[0].evaluation["task"]]
    first = group[0]
    means = [first.label, group[1].label if len(group) == 2 else "this model"]
    head = ["model", "preset", "steps", "N", *means, f"difference in {metric.label}", "images", ""]
    rows = []
    for other in group[1:]:
        for cell in select(other.evaluation["cells"], kind="constant"):
            same = {"steps": cell["steps"], "ensemble": cell["ensemble"], "way": way(cell)}
            for start in select(first.evaluation["cells"], kind="constant", **same)[:1]:
                one, two = values(start, metric.name), values(cell, metric.name)
                shared = len(one.keys() & two.keys())
                if not shared:
                    continue
                found = change(one, two)
                where = [other.label, ", ".join(way(cell)), str(cell["steps"]), str(cell["ensemble"])]
                both = [f"{of['metrics'][metric.name]['mean']:.3f}" for of in (start, cell)]
                rows.append([*where, *both, str(found), str(shared), verdict(found, metric)])
    return head, rows
