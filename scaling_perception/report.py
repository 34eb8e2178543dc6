"""One self-contained HTML page of a folder's evaluations: tables, error against compute, pictures, training curve.

Reads every evaluation JSON, `metrics.jsonl` and `run.json` below DIR; pictures are embedded, so that the page opens
offline. Of training runs it also prints where their time went: goodput, and badput by cause.
"""

import argparse
import html
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scaling_perception.evaluation.comparisons import Change, best_steps, change, savings, select, values, way
from scaling_perception.evaluation.intervals import FEWEST_IMAGES, interval_text
from scaling_perception.support.again import add_overwrite, check_output, replacing, settings_of
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import write_text
from scaling_perception.support.html_page import image, page, table
from scaling_perception.tasks import TASKS
from scaling_perception.training.goodput import goodput_tables

EXAMPLES = """
scaling-perception report runs/quickstart
scaling-perception report runs/quickstart --out report.html --title "My depth model"
scaling-perception report runs/scenes --figures docs/images
"""

# The metric a task is judged by, how it is written, and whether less is better.
MAIN_METRIC = {name: task.main for name, task in TASKS.items() if task.main is not None}
BASELINE_NAMES = {
    **{name: words for task in TASKS.values() for name, words in task.baseline_names.items()},
    "threshold": "thresholding the true picture (ceiling)",
    "autoencoder": "autoencoder round trip of the truth (floor)",
}
_COLOURS = (
    "#1f5fa8",
    "#c8502c",
    "#3b8a57",
    "#8455a3",
    "#a8882c",
    "#4aa3a8",
    "#b0487f",
    "#6b6b6b",
    "#7f9c2f",
    "#b8735a",
)
_CEILINGS = ("autoencoder", "threshold")
_ADAPTIVE_WORDS = (
    "Compute by image. Differences are paired by image: against all members and steps, and against as much compute, "
    "the same for every image (between the measured sizes interpolated in 1 / size)."
)
_ADAPTIVE = {"adaptive": ("members within", "^"), "steps": ("stopped at changes below", "s")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="folder with evaluation JSON files (searched below too)")
    parser.add_argument("--out", help="page to write (default DIR/report.html)")
    parser.add_argument("--figures", metavar="DIR", help="also write each evaluation's error against MACs as PNG here")
    parser.add_argument("--title", default="Error against compute", help="heading of the page")
    add_overwrite(parser, "a page or figure")


def _need_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the folder that holds evaluation JSON files")


def find_evaluations(folder: Path, needed: bool = True) -> list[tuple[Path, dict[str, Any]]]:
    """Every evaluation JSON below ``folder``, sorted by path: (path, content).

    Raises:
        UserError: the folder is missing or, if one is ``needed``, holds no evaluation.
    """
    _need_folder(folder)
    found = []
    for path in sorted(folder.rglob("*.json")):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError):
            continue  # other people's JSON may lie here; only evaluations are ours to judge
        if isinstance(value, dict) and "cells" in value and "task" in value:
            found.append((path, value))
    if needed and not found:
        raise UserError(
            f"{folder} holds no evaluation: run `scaling-perception evaluate … --json {folder}/eval.json` first"
        )
    return found


def paired_change(cells: list[dict], metric: str, start: dict, end: dict) -> Change | None:
    """Mean of per-image ``end - start`` of ``metric`` with its 95 % bootstrap interval, or None if a cell is absent."""
    first, second = (select(cells, **wanted) for wanted in (start, end))
    return change(values(first[0], metric), values(second[0], metric)) if first and second else None


def _ways(evaluation: dict) -> list[tuple[tuple[str, str], str, str]]:
    """Every preset and solver: (way, its name, its colour)."""
    ways = list(dict.fromkeys(way(cell) for cell in evaluation["cells"]))
    several = len({solver for _, solver in ways}) > 1
    names = [", ".join(one) if several else one[0] for one in ways]
    return [(one, name, _COLOURS[i % len(_COLOURS)]) for i, (one, name) in enumerate(zip(ways, names, strict=True))]


def _figure(draw, width: float = 4.6, height: float = 3.3, columns: int = 1) -> bytes:
    """Run ``draw`` on the fresh axes of a figure; returns its PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), dpi=130, layout="constrained")
    every = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    draw(*every)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def compute_table(evaluation: dict) -> tuple[list[str], list[list[str]]]:
    """Head and rows of error against compute: one row a (preset and solver, steps), one column an ensemble size."""
    metric, label, _ = MAIN_METRIC[evaluation["task"]]
    cells = select(evaluation["cells"], kind="fixed")
    sizes = sorted({cell["ensemble"] for cell in cells})
    head = ["preset", "steps", *[f"{label}, N = {size}" for size in sizes], "GMAC / image, N = 1"]
    rows = []
    for one, name, _ in _ways(evaluation):
        mine = select(cells, way=one)
        for steps in sorted({cell["steps"] for cell in mine}):
            at = {cell["ensemble"]: cell for cell in select(mine, steps=steps)}
            smallest = at[min(at)]
            gmac = "" if smallest["macs"] is None else f"{smallest['macs'] / smallest['ensemble'] / 1e9:.2f}"
            shown = [interval_text(at[size]["metrics"][metric], 3) if size in at else "" for size in sizes]
            rows.append([name, str(steps), *shown, gmac])
    return head, rows


def adaptive_table(evaluation: dict) -> tuple[list[str], list[list[str]]]:
    """Head and rows of adaptive compute, at the step count where the largest ensemble of each preset and solver is best
    (members), and for the largest ensemble (steps)."""
    metric, label, less_is_better = MAIN_METRIC[evaluation["task"]]
    head = ["", "members", "steps", "compute", label, "against all of it", "against as much for each"]
    rows = []
    for one, name, _ in _ways(evaluation):
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
                first = f"{name}, {cell['steps']} steps, {words} {tolerance:g}"
                rows.append([first, *spent, interval_text(cell["metrics"][metric], 3), *changes])
    return head, rows


def _curves(evaluation: dict, x: str) -> bytes:
    """Error against ``x`` ('steps' or 'ensemble'), the other at its largest and smallest value, a line each way."""
    other = "ensemble" if x == "steps" else "steps"
    cells = select(evaluation["cells"], kind="fixed")
    ends = sorted({cell[other] for cell in cells})
    ends = sorted({ends[0], ends[-1]})

    def draw(axes) -> None:
        for one, way_name, colour in _ways(evaluation):
            for style, value in zip(("--", "-"), ends[-2:], strict=False):
                line = sorted(select(cells, way=one, **{other: value}), key=lambda cell: cell[x])
                name = f"{way_name}, {'N' if other == 'ensemble' else 'steps'} = {value}"
                _line(axes, evaluation, line, [cell[x] for cell in line], ls=style, color=colour, label=name)
        _references(axes, evaluation)
        axes.set_xscale("log")
        ticks = sorted({cell[x] for cell in cells})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("denoising steps" if x == "steps" else "ensemble size N")
        _finish(axes, evaluation)

    return _figure(draw)


def _line(axes, evaluation: dict, cells: list[dict], xs: list, **style) -> None:
    """A curve with its intervals."""
    metric, _, _ = MAIN_METRIC[evaluation["task"]]
    if not cells:
        return
    means = [cell["metrics"][metric]["mean"] for cell in cells]
    axes.plot(xs, means, **{"marker": "o", "ms": 3.5, "lw": 1.3, **style})
    ends = [cell["metrics"][metric]["ci95"] for cell in cells]
    if "mfc" not in style and None not in ends:  # adaptive curves lie on constant ones, and so do their intervals
        low, high = np.asarray(ends).T
        axes.fill_between(xs, low, high, color=style["color"], alpha=0.06, lw=0)


def _references(axes, evaluation: dict) -> None:
    """The strongest trivial answer and the floor as lines."""
    metric, _, _ = MAIN_METRIC[evaluation["task"]]
    for style, name in zip((":", "-.", "--"), _shown_baselines(evaluation), strict=False):
        height = evaluation["baselines"][name]["metrics"][metric]["mean"]
        axes.axhline(height, ls=style, color="#777", lw=1)
        words = BASELINE_NAMES.get(name, name)
        axes.text(0.01, height, words, fontsize=6, va="bottom", color="#555", transform=axes.get_yaxis_transform())


def _finish(axes, evaluation: dict) -> None:
    _, label, less_is_better = MAIN_METRIC[evaluation["task"]]
    axes.set_ylabel(f"{label} ({'less' if less_is_better else 'more'} is better)")
    axes.legend(fontsize=6, framealpha=0.85, edgecolor="none")


def _shown_baselines(evaluation: dict) -> list[str]:
    """The strongest trivial answer and the floor."""
    metric, _, less_is_better = MAIN_METRIC[evaluation["task"]]
    trivial = {name: value for name, value in evaluation["baselines"].items() if name not in _CEILINGS}
    if not trivial:
        return []
    order = sorted(trivial, key=lambda name: trivial[name]["metrics"][metric]["mean"], reverse=not less_is_better)
    return order[:1] + [name for name in evaluation["baselines"] if name == "autoencoder"]


def compute_figure(evaluation: dict) -> bytes:
    """PNG of error against MACs: left what members buy (each line a step count; thick the best one, and adaptive
    members on it), right what steps buy with the largest ensemble, and early exits. Empty where MACs are unknown."""
    metric, _, less_is_better = MAIN_METRIC[evaluation["task"]]
    if any(cell["macs"] is None for cell in evaluation["cells"]):
        return b""
    from matplotlib.ticker import LogLocator, NullFormatter

    size = max(cell["ensemble"] for cell in evaluation["cells"])

    def line(axes, cells: list[dict], **style) -> None:
        cells = sorted(cells, key=lambda cell: cell["macs"])
        _line(axes, evaluation, cells, [cell["macs"] / 1e9 for cell in cells], **style)

    def draw(left, right) -> None:
        for one, name, colour in _ways(evaluation):
            cells = select(evaluation["cells"], way=one)
            fixed, best = select(cells, kind="fixed"), best_steps(cells, metric, less_is_better)
            for steps in sorted({cell["steps"] for cell in fixed} - {best}):
                faint = sorted(select(fixed, steps=steps), key=lambda cell: cell["macs"])
                means = [cell["metrics"][metric]["mean"] for cell in faint]
                left.plot([cell["macs"] / 1e9 for cell in faint], means, color=colour, lw=0.6, alpha=0.45)
            line(
                left,
                select(fixed, steps=best),
                color=colour,
                label=f"{name}: {best} step{'s' * (best > 1)}, constant N",
            )
            line(right, select(fixed, ensemble=size), color=colour, label=f"{name}: constant steps")
            dashed: dict[str, Any] = {"color": colour, "ls": "--", "mfc": "white"}
            if found := select(cells, kind="adaptive", steps=best):
                line(left, found, **dashed, marker="^", label=f"{name}: adaptive members")
            early = select(cells, kind="steps", ensemble=size)
            if early and (most := max(cell["steps"] for cell in early)):
                line(
                    right, select(early, steps=most), **dashed, marker="s", label=f"{name}: early exits of {most} steps"
                )
        for axes in (left, right):
            _references(axes, evaluation)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(axis="x", labelsize=8)
            axes.set_xlabel("GMAC per image (DiT only)")
            _finish(axes, evaluation)
        left.set_title("more members (thin: at other step counts)", fontsize=9)
        right.set_title(f"more steps, {size} member{'s' * (size > 1)}", fontsize=9)

    return _figure(draw, columns=2, height=3.8)


def verdicts(evaluation: dict) -> list[str]:
    """Plain sentences: what steps buy, what members buy, and how the model stands against trivial answers."""
    metric, label, less_is_better = MAIN_METRIC[evaluation["task"]]
    cells = select(evaluation["cells"], kind="fixed")
    said = []
    for one, way_name, _ in _ways(evaluation):
        mine = select(cells, way=one)
        steps, sizes = sorted({c["steps"] for c in mine}), sorted({c["ensemble"] for c in mine})
        pairs = [
            (f"{steps[0]} → {steps[-1]} steps at N = {sizes[-1]}", {"steps": steps[0], "ensemble": sizes[-1]},
             {"steps": steps[-1], "ensemble": sizes[-1]}),
            (f"1 → {sizes[-1]} members at {steps[-1]} steps", {"steps": steps[-1], "ensemble": sizes[0]},
             {"steps": steps[-1], "ensemble": sizes[-1]}),
            (f"1 → {sizes[-1]} members at {steps[0]} step(s)", {"steps": steps[0], "ensemble": sizes[0]},
             {"steps": steps[0], "ensemble": sizes[-1]}),
        ]  # fmt: skip
        for name, start, end in pairs:
            change = None if start == end else paired_change(mine, metric, start, end)
            if change is None:
                continue
            if change.low is None or change.high is None:
                word = f"too few images to tell (fewer than {FEWEST_IMAGES})"
            elif change.low <= 0 <= change.high:
                word = "no clear change"
            else:
                word = "better" if (change.mean < 0) == less_is_better else "worse"
            said.append(f"{way_name}: {name}: {label} {change} — {word}.")
    best = (min if less_is_better else max)(cells, key=lambda cell: cell["metrics"][metric]["mean"])
    trivial = [name for name in _shown_baselines(evaluation) if name not in _CEILINGS]
    if trivial:
        value = evaluation["baselines"][trivial[0]]["metrics"][metric]
        said.append(
            f"Best cell ({best['preset']}, {best['steps']} steps, N = {best['ensemble']}): {label} "
            f"{interval_text(best['metrics'][metric], 3)}; strongest trivial answer "
            f"({BASELINE_NAMES.get(trivial[0], trivial[0])}): {interval_text(value, 3)}."
        )
    return said


def _panels(evaluation: dict, folder: Path) -> str:
    blocks = []
    for panel in evaluation.get("panels", []):
        figures = []
        for name in ("image", "prompt", "truth", "prediction", "error", "uncertainty"):
            path = folder / panel[name] if panel.get(name) else None
            if path and path.is_file():
                figures.append(f"<figure>{image(path.read_bytes(), name)}<figcaption>{name}</figcaption></figure>")
        key = html.escape(str(panel["key"]))
        blocks.append(f'<div class="panel"><p>{key}</p><div>{"".join(figures)}</div></div>')
    return "".join(blocks)


def _training_curve(path: Path) -> str:
    """The logged loss of one run, smoothed, as a picture; empty when the file holds none."""
    steps, losses = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a line cut short by a kill
        if "loss" in row and "step" in row:
            steps.append(row["step"])
            losses.append(row["loss"])
    if len(losses) < 2:
        return ""

    def draw(axes) -> None:
        axes.plot(steps, losses, color="#bbb", lw=0.8)
        width = max(1, len(losses) // 20)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, color=_COLOURS[0])
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")

    return image(_figure(draw), "plot")


def _section(path: Path, evaluation: dict) -> str:
    task = evaluation["task"]
    metric, label, _ = MAIN_METRIC[task]
    names = list(next(iter(evaluation["cells"]))["metrics"])
    baselines = [
        [
            BASELINE_NAMES.get(name, name),
            *[interval_text(value["metrics"][m], 3) if m in value["metrics"] else "" for m in names],
        ]
        for name, value in evaluation["baselines"].items()
    ]
    facts = {
        "dataset": evaluation["dataset"], "model": evaluation["model"], "images": evaluation["images"],
        "resolution": evaluation["resolution"], "reduce": evaluation["cells"][0].get("reduce"),
        "protocol": evaluation["protocol"].get("fingerprint", ""), "file": path.name,
    }  # fmt: skip
    line = " · ".join(f"{name}: {value}" for name, value in facts.items())
    curves = "".join(image(_curves(evaluation, x), "plot") for x in ("steps", "ensemble"))
    compute, adaptive = compute_figure(evaluation), adaptive_table(evaluation)
    said = "".join(f"<li>{html.escape(text)}</li>" for text in verdicts(evaluation))
    return (
        f"<h2>{html.escape(task)} on {html.escape(str(evaluation['dataset']))}</h2>"
        f"<p><small>{html.escape(line)}</small></p>"
        f"<ul>{said}</ul><div class='plots'>{curves}</div>"
        f"<div class='plots wide'>{image(compute, 'plot') if compute else ''}</div>"
        f"{table(*compute_table(evaluation))}"
        f"{f'<p>{_ADAPTIVE_WORDS}</p>{table(*adaptive)}' if adaptive[1] else ''}"
        f"<p>Trivial answers and floor on the same images:</p>{table(['', *names], baselines)}"
        f"{_panels(evaluation, path.parent)}"
    )


def write_report(folder: Path, out: Path, title: str) -> Path:
    """Write the page of all evaluations below ``folder`` to ``out``, whatever is there; returns ``out``.

    Raises:
        UserError: neither evaluation nor training run is there, or an evaluation lacks what the page needs.
    """
    sections, times = [], goodput_tables(folder)
    for path, evaluation in find_evaluations(folder, needed=not times):
        try:
            sections.append(_section(path, evaluation))
        except (KeyError, TypeError, ValueError, IndexError, StopIteration) as error:
            raise UserError(f"{path}: not a whole evaluation ({error!r}): run `evaluate` again") from error
    for path in sorted(folder.rglob("metrics.jsonl")):
        if picture := _training_curve(path):
            sections.append(f"<h2>Training, {html.escape(path.parent.name)}</h2><div class='plots'>{picture}</div>")
    for name, text in times.items():
        sections.append(f"<h2>Where the time went, {html.escape(name)}</h2><pre>{html.escape(text)}</pre>")
    body = "".join(sections)
    intro = (
        "Means over images with 95 % bootstrap intervals; changes are paired by image. MACs count the DiT's forward "
        "multiply-accumulates, without the autoencoder."
    )
    write_text(out, page(title, intro, body))
    return out


def write_figures(folder: Path, into: Path, settings: Mapping[str, Any], overwrite: bool = False) -> list[Path]:
    """Each evaluation's error against MACs as a PNG named after its JSON, and after the folders too where several JSON
    have one name; returns the files.

    Raises:
        UserError: no evaluation is there, the files cannot be written, or were made with other ``settings``.
    """
    found = find_evaluations(folder)
    stems, made = [path.stem for path, _ in found], []
    for path, evaluation in found:
        if png := compute_figure(evaluation):
            parts = path.relative_to(folder).with_suffix("").parts
            name = path.stem if stems.count(path.stem) == 1 else "_".join(parts)
            made.append((into / f"compute_{name}.png", png))
            check_output(made[-1][0], settings, overwrite)
    for path, png in made:
        with replacing(path, settings) as file:
            file.write_bytes(png)
    return [path for path, _ in made]


def run(args: argparse.Namespace) -> int:
    folder = Path(args.dir)
    _need_folder(folder)  # before the place of the page is made inside it
    out = Path(args.out) if args.out else folder / "report.html"
    settings = settings_of(args, ("out", "figures"), ("dir",))
    check_output(out, settings, args.overwrite)
    about = {"dir": settings["dir"]}  # no title is in a figure
    for path in write_figures(folder, Path(args.figures), about, args.overwrite) if args.figures else ():
        print(f"figure: {path}")
    with replacing(out, settings) as file:
        write_report(folder, file, args.title)
    for name, text in goodput_tables(folder).items():
        print(f"{name}: {text}")
    print(f"report: {out}")
    return 0
