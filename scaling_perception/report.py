"""One self-contained HTML page of a folder's evaluations: what compute bought, curves, tables, pictures with sliders.

Reads every evaluation JSON, `metrics.jsonl` and `run.json` below DIR; all of it is embedded, so that the page opens
offline. Models that were evaluated on the same data are compared, paired by image. Of training runs it also prints
where their time went: goodput, and badput by cause.
"""

import argparse
import datetime
import html
import json
import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling_perception.evaluation.comparisons import kind
from scaling_perception.evaluation.findings import (
    Measured,
    adaptive_table,
    bought,
    compute_table,
    limits_table,
    model_table,
    paired_change,
    together,
    verdicts,
    ways,
)
from scaling_perception.evaluation.labels import BASELINE_NAMES, MAIN_METRIC, counted, terms
from scaling_perception.evaluation.png_figures import compute_figure
from scaling_perception.evaluation.report_charts import (
    bought_chart,
    compute_chart,
    grid_chart,
    loss_chart,
    single_setting,
)
from scaling_perception.evaluation.report_panels import DETAILS, Detail, panels
from scaling_perception.evaluation.result_files import USUAL, read_evaluation, wrong_field
from scaling_perception.evaluation.tables import cells_csv, images_csv
from scaling_perception.support.again import add_overwrite, check_output, replacing, settings_of
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import json_lines, write_text
from scaling_perception.support.html_page import chart_figure, items, link, page, table
from scaling_perception.support.tables import read_text
from scaling_perception.support.verbs import make_parser
from scaling_perception.training.goodput import goodput_tables

__all__ = ["BASELINE_NAMES", "MAIN_METRIC", "adaptive_table", "compute_figure", "compute_table", "paired_change"]

EXAMPLES = """
scaling-perception report runs/quickstart
scaling-perception report runs/quickstart --out report.html --title "My depth model"
scaling-perception report runs/scenes --figures docs/images
"""
OUTPUTS = ("out",)

MOST_BYTES = 2_000_000
"""Of a page, so that it can be sent by mail; pictures become coarser until it fits."""

_MOST_CSV = 100_000  # bytes of a table of all images that is put into the page
_BAND = "Band: 95 % interval of the mean of a full line; those of the others show under the pointer."
_ADAPTIVE_WORDS = (
    "Compute by image. Differences are paired by image: against all members and steps, and against as much compute, "
    "the same for every image (between the measured sizes interpolated in 1 / size)."
)


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
    """Every evaluation JSON below ``folder``, sorted by path: (path, content). Other JSON may lie beside them.

    Raises:
        UserError: the folder is missing or, if one is ``needed``, holds no evaluation; or an evaluation is damaged or
            of another format.
    """
    _need_folder(folder)
    found = []
    for path in sorted(folder.rglob("*.json")):
        if path.name.startswith(".") or not path.is_file():  # what `atomic_path` has not finished
            continue
        if (value := read_evaluation(path)) is not None:
            found.append((path, value))
    if needed and not found:
        raise UserError(
            f"{folder} holds no evaluation: run `scaling-perception evaluate … --json {folder}/eval.json` first"
        )
    return found


def evaluate_command(path: Path, evaluation: Mapping[str, Any]) -> str:
    """The command that makes an evaluation, from what it records; DIR stands for the data set's folder."""
    asked, parser = evaluation.get("asked") or {}, make_parser("evaluate")
    words = ["scaling-perception", "evaluate", "--task", evaluation["task"], "--dataset", str(evaluation["dataset"])]
    if "root" in (evaluation.get("data") or {}) or "contents" in (evaluation.get("data") or {}):
        words += ["--data", "DIR"]
    words += ["--model", str(evaluation["model"])]
    known = ("task", "dataset", "model", "data", "autoencoder")  # said above, or recorded as what they hold
    for action in parser._actions:
        value = asked.get(action.dest)
        if not action.option_strings or action.dest in known or value in (None, USUAL.get(action.dest, action.default)):
            continue
        for one in value if isinstance(value, list) else [value]:
            words += [action.option_strings[-1]] + ([] if one is True else [str(one)])
    return shlex.join([*words, "--json", str(path)])


class _Page:
    """The parts of a page in their order, with numbers of figures and an anchor for each section."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.parts: list[str | Sequence[Measured]] = []  # text, or whose pictures stand there
        self.contents: list[tuple[str, str]] = []
        self.figures = 0

    def section(self, title: str) -> None:
        self.parts.append(f'<a id="{self.anchor(title)}"></a><h2>{html.escape(title)}</h2>')

    def anchor(self, title: str) -> str:
        """A new line of the contents; returns what it leads to."""
        self.contents.append((f"part-{len(self.contents) + 1}", title))
        return self.contents[-1][0]

    def figure(self, chart: Any, caption: str, name: str, commands: Sequence[str], kind: str = "") -> str:
        self.figures += 1
        made = "\n".join([*commands, self.command])
        return chart_figure(chart, f"Figure {self.figures}. {caption}", f"{name}.csv", made, kind)

    def add(self, *texts: str) -> None:
        self.parts += texts

    def text(self, detail: Detail) -> str:
        """All parts, with pictures of this detail."""
        return "".join(part if isinstance(part, str) else panels(part, detail) for part in self.parts)


def _overview(page: _Page, measured: Sequence[Measured], commands: Mapping[Path, str]) -> tuple[str, str]:
    """The sentence and the picture that the page opens with."""
    wheres = {f"{counted(one.evaluation['images'], 'image')} of {one.evaluation['dataset']}" for one in measured}
    models = {one.label for one in measured}
    clauses = []
    for one in measured:
        words = [f"with {one.label}"] * (len(models) > 1)
        words += [f"on {counted(one.evaluation['images'], 'image')} of {one.evaluation['dataset']}"] * (len(wheres) > 1)
        clauses.append(" ".join([*words, bought(one.evaluation)]))
    common = [f"with {one}" for one in models if len(models) == 1] + [f"on {one}" for one in wheres if len(wheres) == 1]
    text = "; ".join(clauses) + "."
    text = f"{' '.join(common)}: {text}" if common else text
    caption = (
        "What compute bought: the change of the error against the least compute, for the best measured setting of "
        "steps and members that takes at most so much; hollow: the other settings. It was chosen on these images, "
        "which favours it slightly. Bands are 95 % intervals of the paired difference."
    )
    chart = page.figure(bought_chart(measured), caption, "what-compute-bought", list(commands.values()), "hero")
    return f'<p class="lead">{html.escape(text[:1].upper() + text[1:])}</p>', chart


def _group(page: _Page, group: Sequence[Measured], commands: Mapping[Path, str]) -> None:
    """A section: evaluations of one task and data set."""
    first = group[0].evaluation
    metric = MAIN_METRIC[first["task"]]
    stem = re.sub(r"[^\w.]+", "-", f"{first['task']}-{first['dataset']}").strip("-")
    made = [commands[one.path] for one in group]
    models = f", {len(group)} models" if len(group) > 1 else ""
    page.section(f"{first['task'].capitalize()} on {first['dataset']}{models}")
    for one in group:
        name = f"<h3>{html.escape(one.label)}</h3>" if len(group) > 1 else ""
        page.add(name, items(_sentences(one.evaluation)))
    if len(group) > 1:
        head, rows = model_table(group)
        words = f"Against {group[0].label}, paired by image; {metric.label}"
        shared = "<p>No image is shared with the same setting: nothing can be paired.</p>"
        page.add("<h3>Models side by side</h3>", table(head, rows, words) if rows else shared)
    if not single_setting(group):
        charts = [
            page.figure(grid_chart(group, "steps"), f"Error against denoising steps. {_BAND}", f"{stem}-steps", made),
            page.figure(grid_chart(group, "ensemble"), f"Error against members. {_BAND}", f"{stem}-members", made),
        ]
        for by, words in (("ensemble", "more members, at the best steps"), ("steps", "more steps, with all members")):
            if (chart := compute_chart(group, by)) is not None:
                charts.append(page.figure(chart, f"Error against compute: {words}.", f"{stem}-{by}-macs", made))
        page.add(f'<div class="charts">{"".join(charts)}</div>')
    for one in group:
        if len(group) > 1:
            page.add(f"<h3>{html.escape(one.label)}: figures</h3>")
        page.add(table(*compute_table(one.evaluation), f"{metric.label}, mean over images with 95 % interval"))
        if any(kind(cell) != "constant" for cell in one.evaluation["cells"]):
            adaptive = adaptive_table(one.evaluation)
            page.add(table(*adaptive, _ADAPTIVE_WORDS) if adaptive[1] else "")
        page.add(table(*limits_table(one.evaluation), "The same images without a model, and limits"))
        page.add(_about(one, commands[one.path], page.command))
    if any(one.evaluation.get("panels") for one in group):
        page.add("<h3>Pictures</h3>")
        page.parts.append(group)


def _sentences(evaluation: dict[str, Any]) -> list[str]:
    """What the best setting gains, and the verdicts; the grid is named where there are several."""
    several = ways(evaluation)
    head = "" if len(several) > 1 else f"{several[0][1]}: "
    gained = bought(evaluation, whole=True)
    return [gained[:1].upper() + gained[1:] + ".", *(text.removeprefix(head) for text in verdicts(evaluation))]


def _about(one: Measured, command: str, report: str) -> str:
    """What was evaluated, its command, and its tables as files."""
    evaluation = one.evaluation
    facts = {
        "model": evaluation["model"], "weights": evaluation.get("weights"), "images": evaluation["images"],
        "split": evaluation.get("split"), "resolution": f"{evaluation['resolution']} px",
        "members merged by": evaluation["cells"][0].get("reduce"),
        "protocol": evaluation["protocol"].get("fingerprint"), "left out": len(evaluation.get("skipped") or []) or None,
        "file": one.path.name,
    }  # fmt: skip
    line = " · ".join(f"{name}: {value}" for name, value in facts.items() if value not in (None, ""))
    files = [link(f"{one.path.stem}-cells.csv", cells_csv(evaluation))]
    if len(rows := images_csv(evaluation)) <= _MOST_CSV:
        files.append(link(f"{one.path.stem}-images.csv", rows))
    return (
        f'<div class="keep"><p class="small">{html.escape(line)}</p><p class="small">As files: {" · ".join(files)}</p>'
        f"<details open><summary>commands</summary><pre>{html.escape(command)}\n{html.escape(report)}</pre></details>"
        "</div>"
    )


def _terms_of(measured: Sequence[Measured]) -> list[str]:
    """The terms that the page uses."""
    used = ["step", "member, N", "MAC", "[a, b]", "paired difference"]
    cells = [cell for one in measured for cell in one.evaluation["cells"]]
    used += [str(cell["preset"]) for cell in cells]
    kinds = {kind(cell) for cell in cells}
    used += ["constant compute"] * (len(kinds) > 1) + ["adaptive members"] * ("adaptive" in kinds)
    used += ["early exit"] * ("steps" in kinds)
    if any(one.evaluation["baselines"] for one in measured):
        used += ["answer without a model", "floor, ceiling"]
    used += ["blind, shuffled"] * any(one.evaluation.get("controls") for one in measured)
    return used


def _training(page: _Page, path: Path, folder: Path) -> None:
    """The logged loss of one run; nothing where the file holds none.

    Raises:
        UserError: a line before the last is damaged.
    """
    rows, left = [], 0
    for row in json_lines(path, read_text(path))[0]:
        if not (isinstance(row, dict) and "step" in row and "loss" in row):
            continue  # of something else
        if all(isinstance(row[name], (int, float)) and math.isfinite(row[name]) for name in ("step", "loss")):
            rows.append((float(row["step"]), float(row["loss"])))
        else:
            left += 1
    if len(rows) > 1:
        name = str(path.parent.relative_to(folder)) if path.parent != folder else folder.resolve().name
        page.section(f"Training, {name}")
        chart = loss_chart(*zip(*rows, strict=True))
        lacks = f", without {counted(left, 'row')} that are no finite numbers" if left else ""
        words = f"Training loss{lacks}."
        figure = page.figure(chart, words, "training-loss", _run_command(path))
        page.add(f'<div class="charts">{figure}</div>')


def _run_command(path: Path) -> list[str]:
    """The command that a run's record holds."""
    try:
        command = json.loads((path.parent / "run.json").read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [shlex.join(map(str, command)) if isinstance(command, list) else str(command)]


def _check_whole(path: Path, evaluation: dict[str, Any]) -> None:
    """UserError, which names the file, where an evaluation lacks what the page needs."""
    try:
        if wrong := wrong_field(evaluation, MAIN_METRIC):
            raise UserError(f"{path}: not a whole evaluation ({wrong}): run `evaluate` again")
        verdicts(evaluation), bought(evaluation), compute_table(evaluation), limits_table(evaluation)
        images_csv(evaluation), evaluation["resolution"], evaluation["images"], evaluation["dataset"]
        main = MAIN_METRIC[evaluation["task"]].name
        for cell in (*evaluation["cells"], *evaluation["baselines"].values()):
            if not math.isfinite(cell["metrics"][main]["mean"]):
                raise ValueError(f"{main} is {cell['metrics'][main]['mean']}")
    except KeyError as error:
        raise UserError(f"{path}: not a whole evaluation ({error} is missing): run `evaluate` again") from error
    except (TypeError, ValueError, IndexError, AttributeError, StopIteration) as error:
        raise UserError(f"{path}: not a whole evaluation ({error!r}): run `evaluate` again") from error


def _built(folder: Path, command: str) -> _Page:
    """The page but for its pictures."""
    times, built = goodput_tables(folder), _Page(command)
    found = find_evaluations(folder, needed=not times)
    for path, evaluation in found:
        _check_whole(path, evaluation)
    commands = {path: evaluate_command(path, evaluation) for path, evaluation in found}
    groups = together(found)
    measured = [one for group in groups for one in group]
    lead, chart = _overview(built, measured, commands) if measured else ("", "")
    for group in groups:
        _group(built, group, commands)
    for path in sorted(folder.rglob("metrics.jsonl")):
        _training(built, path, folder)
    for name, text in times.items():
        built.section(f"Where the time went, {name}")
        built.add(f"<pre>{html.escape(text)}</pre>")
    if measured:
        name = "How to read this page"
        words = terms(_terms_of(measured))
        built.add(f'<details open id="{built.anchor(name)}" class="terms"><summary>{name}</summary>{words}</details>')
    parts = "".join(f'<li><a href="#{anchor}">{html.escape(name)}</a></li>' for anchor, name in built.contents)
    contents = f'<nav aria-label="contents"><b>Contents</b><ul>{parts}</ul></nav>'
    built.parts.insert(0, f'{lead}<div class="top">{chart}{contents}</div>')
    return built


def write_report(folder: Path, out: Path, title: str, command: str = "") -> Path:
    """Write the page of all evaluations below ``folder`` to ``out``, whatever is there; returns ``out``.

    The same inputs make the same page, but for its date. ``command`` is what the page says that it was made by.

    Raises:
        UserError: neither evaluation nor training run is there, or an evaluation lacks what the page needs.
    """
    command = command or shlex.join(["scaling-perception", "report", str(folder)])
    built, made, text = _built(folder, command), f"Made on {datetime.date.today().isoformat()} by: {command}", ""
    for detail in DETAILS:
        text = page(title, made, built.text(detail))
        if len(text.encode()) <= MOST_BYTES:
            break
    if len(text.encode()) > MOST_BYTES:
        size = len(text.encode()) / 1e6
        print(f"note: {out} has {size:.1f} MB without pictures: report folders of fewer evaluations", file=sys.stderr)
    write_text(out, text)
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
    words = ["scaling-perception", "report", args.dir]
    words += ["--title", args.title] if args.title != make_parser("report").get_default("title") else []
    with replacing(out, settings) as file:
        write_report(folder, file, args.title, shlex.join(words))
    for name, text in goodput_tables(folder).items():
        print(f"{name}: {text}")
    print(f"report: {out}")
    return 0
