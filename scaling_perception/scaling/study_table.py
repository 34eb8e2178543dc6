"""What the cells of a study measured, as one tidy table: a line for each figure, with all that it belongs to.

Lines of ``kind`` evaluate: one metric of one cell of an evaluation, such as AbsRel at 10 steps and 5 members. Lines of
``kind`` train: a loss at a step of a run. Compute has two axes that must not be mixed: ``train_macs`` are those of the
training behind the figure, forward alone (the paper's count; times 3 with the backward pass), the run's own and those
of the runs of this study that it started from; ``macs`` are those of predicting one image.
"""

import contextlib
import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling_perception.evaluation.comparisons import change, kind, solver_of
from scaling_perception.evaluation.intervals import summarise
from scaling_perception.evaluation.result_files import differing_flag, is_evaluation
from scaling_perception.evaluation.tables import MORE_IS_BETTER, NAMED_COLUMNS
from scaling_perception.scaling.study import Cell, read_marker
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import json_lines, read_json
from scaling_perception.support.tables import read_text

COLUMNS = (
    *("cell", "kind", "run", "model", "task", "dataset", "split", "images", "metric", "value", "low", "high"),
    *("params", "active_params", "resolution", "prediction", "schedule", "preset", "spacing", "solver", "reduce"),
    *("steps", "members", "macs_per_forward", "macs", "seconds"),
    *("train_step", "train_steps", "last", "samples", "train_macs", "own_train_macs", "seed", "noise_seed"),
    *("protocol", "weights", "fingerprint", "study_cells"),
)
"""Columns of every table; the labels of the cells follow. ``seed`` is of the training, ``noise_seed`` of the sampling;
``low`` and ``high`` are the ends of the 95 % interval over images, empty for too few; ``last`` is 1 where the training
was finished, 0 for a loss on its way; ``study_cells`` are the cells that the table has, of
how many."""

_REFERENCE = re.compile(r"\{([^{}]*)\}")


def collect(cells: Sequence[Cell], out: Path, images: bool = False) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of all cells that are done, and the names of those that are not.

    Args:
        images: a line for each image (column ``key``) of an evaluation, in place of its mean; no other lines.

    Raises:
        UserError: a file of a cell that is done is missing or damaged.
    """
    known = {cell.name: cell for cell in cells}
    rows: list[dict[str, Any]] = []
    missing = []
    for cell in cells:
        marker = read_marker(out / cell.name)
        if marker is None or marker["state"] != "done":
            missing.append(cell.name)
            continue
        head = {"cell": cell.name, "fingerprint": marker["fingerprint"], **cell.labels}
        if cell.verb == "train" and not images:
            facts = run_facts(cell.name, known, out)
            before = (facts["train_macs"] or 0) - (facts["own_train_macs"] or 0)
            rows += [{**facts, **head, **row} for row in _losses(out / cell.name, before)]
        elif cell.verb == "evaluate":
            words = list(cell.words)
            model = words[words.index("--model") + 1] if "--model" in words else ""
            name = _referred(model)
            facts = run_facts(name, known, out, _step_of(model)) if name in known else {}
            labels = dict(known[name].labels) if name in known else {}
            rows += [{**labels, **row, **facts, **head} for row in _figures(out / cell.name, images)]
    told = f"{len(cells) - len(missing)}/{len(cells)}"
    return [{**row, "study_cells": told} for row in rows], missing


def table_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """``rows`` as CSV: `COLUMNS`, then the labels that occur, in their order; what a line does not have is empty.

    Seven digits: more than any of the figures is known to, and single precision has no more.
    """
    names = list(dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: f"{value:.7g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows
    )
    return text.getvalue()


def run_facts(name: str, cells: Mapping[str, Cell], out: Path, step: int | None = None) -> dict[str, Any]:
    """What a training cell's ``run.json`` and last line of metrics say of the run, with the compute of all runs that it
    goes back to.

    Args:
        step: of a model that was exported on the way (``train.export_kept``); None is the finished one.

    Raises:
        UserError: the files are missing or damaged.
    """
    folder = out / name
    record, last = _read(folder / "run.json"), _logged(folder)[-1:]
    if not last:
        raise UserError(f"{folder / 'metrics.jsonl'} is empty: {_again(folder)}")
    with _whole(folder / "run.json", folder):
        return _run_facts(name, cells, out, step, record, last)


def _run_facts(
    name: str, cells: Mapping[str, Cell], out: Path, step: int | None, record: Any, last: list[dict[str, Any]]
) -> dict[str, Any]:
    if step is not None:  # compute and samples grow evenly
        share = step / last[0]["step"]
        last = [{**last[0], "step": step, "samples": round(share * last[0]["samples"])}]
        last[0] |= {} if last[0].get("macs") is None else {"macs": share * last[0]["macs"]}
    config, own = record["config"], last[0].get("macs")
    total, start = own, _referred(_init_of(cells[name]))
    if start in cells and total is not None:
        total += run_facts(start, cells, out)["train_macs"]
    return {
        "run": name,
        "model": config["model"],
        "params": record["parameters"],
        "resolution": config["resolution"],
        "macs_per_forward": record.get("macs_per_sample"),
        "train_step": last[0]["step"],
        "train_steps": last[0]["step"],
        "samples": last[0]["samples"],
        "train_macs": total,
        "own_train_macs": own,
        "seed": config["seed"],
    }


def _init_of(cell: Cell) -> str:
    """The word in which a training cell names what it starts from."""
    for word in cell.words:
        found = re.search(r"(?:[:,]|^--config\.)init=([^,]*)", word)
        if found:
            return found[1]
    return ""


def _step_of(model: str) -> int | None:
    """The step of an exported model on the way, such as ``{run}/models/5000``."""
    found = re.search(r"/models/(\d+)$", model)
    return int(found[1]) if found else None


def _referred(text: str) -> str:
    found = _REFERENCE.search(text)
    return found[1] if found else ""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist: {_again(folder)}")
    rows, torn = json_lines(path, read_text(path))
    if torn:  # no run that has ended well leaves it so
        raise UserError(f"{path}: the last line is not valid JSON: restore it, or remove the line")
    return rows


def _again(folder: Path) -> str:
    return f"restore it, or remove the folder {folder} to do the cell again"


def _read(path: Path) -> Any:
    """The JSON of a cell that is done.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return read_json(path)
    except UserError as error:
        raise UserError(f"{str(error).rpartition(': ')[0]}: {_again(path.parent)}") from None


@contextlib.contextmanager
def _whole(path: Path, folder: Path) -> Iterator[None]:
    """Where a file of a cell lacks a field or has one of another kind, one line that names both."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} lacks a field, or has one of another kind ({error!r}): {_again(folder)}") from None


def _losses(folder: Path, before: float) -> list[dict[str, Any]]:
    """Every held-out loss of a run, and its last training loss; ``before``: MACs of the runs that it started from.

    ``mse`` is the network's error alone, logged where the loss holds more (a variational bound, a balance of experts).
    """
    return list(_loss_lines(_logged(folder), before))


def _logged(folder: Path) -> list[dict[str, Any]]:
    """`read_metrics` of a run that trains a network.

    Raises:
        UserError: a line has no numbers of step and samples.
    """
    rows = read_metrics(folder)
    for number, row in enumerate(rows, 1):
        counts = [row.get(name) for name in ("step", "samples")] if isinstance(row, dict) else []
        if not counts or not all(isinstance(count, (int, float)) for count in counts):
            raise UserError(f"{folder / 'metrics.jsonl'} row {number} has no step and samples: remove the line")
    return rows


def _loss_lines(rows: Sequence[dict[str, Any]], before: float) -> Iterator[dict[str, Any]]:
    for row in rows:
        names = [name for name in row if name.startswith("held_out_") and name.endswith(("loss", "mse"))]
        names += [name for name in ("loss", "mse") if row is rows[-1] and name in row]
        own = row.get("macs")
        spent = {} if own is None else {"own_train_macs": own, "train_macs": before + own}
        at = {
            "kind": "train",
            "train_step": row["step"],
            "last": int(row is rows[-1]),
            "samples": row["samples"],
            **spent,
        }
        yield from ({**at, "metric": name, "value": row[name]} for name in names)


def _figures(folder: Path, images: bool) -> list[dict[str, Any]]:
    """The figures of an evaluation, or those of its images.

    Raises:
        UserError: its result is missing, damaged, or of another cell.
    """
    path = folder / "result.json"
    found, marker = _read(path), read_marker(folder)
    with _whole(path, folder):
        if not is_evaluation(path, found):
            raise UserError(f"{path} is no evaluation: {_again(folder)}")
        if marker and (differs := differing_flag(found, marker["settings"])):
            raise UserError(f"{path} is the result of another cell ({differs}): {_again(folder)}")
        return list(_figure_lines(found, images))


def _figure_lines(found: dict[str, Any], images: bool) -> Iterator[dict[str, Any]]:
    whole = {
        name: found.get(name) for name in ("task", "dataset", "split", "images", "params", "resolution", "weights")
    }
    whole |= {"kind": "evaluate", "noise_seed": found.get("seed"), "protocol": found["protocol"].get("fingerprint")}
    whole |= {"prediction": found.get("prediction_type"), "macs_per_forward": found.get("macs_per_forward"), "last": 1}
    whole |= {"run": found["model"], "model": found["model"]}
    for cell in found["cells"]:
        if kind(cell) != "constant":
            continue
        names = ("preset", "spacing", "solver", "reduce", "schedule", "steps", "macs", "seconds")
        known = {name: cell.get(name) for name in names}
        known |= {name: cell[name] for name in NAMED_COLUMNS if name in cell}
        yield from _lines({**whole, **known, "members": cell["ensemble"]}, cell["rows"], images)
    for name, baseline in found["baselines"].items():
        if not images:
            yield from _lines({**whole, "kind": "baseline", "preset": name}, baseline["rows"], False)


def _lines(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], images: bool) -> Iterator[dict[str, Any]]:
    if images:
        figures = [(row["key"], name, row[name], None) for row in rows for name in row if name != "key"]
    else:
        figures = [(None, name, one["mean"], one["ci95"]) for name, one in summarise(rows).items()]
    for key, name, value, ends in figures:
        line = {**head, "metric": name, "value": value} | ({"key": key} if images else {})
        low, high = ends or (None, None)
        yield {**line, "low": low, "high": high}
        if name in MORE_IS_BETTER:
            both = {} if ends is None else {"low": 1 - ends[1], "high": 1 - ends[0]}
            yield {**line, "low": None, "high": None, "metric": f"1-{name}", "value": 1 - value, **both}


Setting = tuple[str, int, int]
"""Preset, steps and members of a figure."""


def differences(first: Path, second: Path, settings: tuple[Setting, Setting] | None = None) -> Iterator[str]:
    """Of two evaluations, what changes from the first to the second: a line for each setting and metric of both, with
    the mean over images of the paired difference and its 95 % interval.

    Args:
        first, second: folders of cells that evaluate.
        settings: compare these two, in place of all that both have.

    Raises:
        UserError: a folder holds no evaluation or not that setting, or they have no image and setting in common.
    """
    tables = []
    for number, folder in enumerate((first, second)):
        values: dict[tuple[Any, ...], dict[str, float]] = {}
        solvers: set[str] = set()
        for line in _figures(folder, True):
            setting, solver = (line["preset"], line["steps"], line["members"]), solver_of(line)
            if settings is None or setting == settings[number]:
                solvers.add(solver)
                name = (*((*setting, solver) if settings is None else ()), line["metric"])
                values.setdefault(name, {})[line["key"]] = line["value"]
        if settings is not None and not values:
            raise UserError(f"{folder} has no figures of {_settings_text(settings[number])}")
        if settings is not None and len(solvers) > 1:
            raise UserError(
                f"{folder} has {_settings_text(settings[number])} of several solvers ({', '.join(sorted(solvers))}): "
                "compare cells of one solver, or leave out PRESET,STEPS,MEMBERS"
            )
        tables.append(values)
    before, after = tables
    shared = [one for one in before if one in after and before[one].keys() & after[one].keys()]
    if not shared:
        raise UserError(f"{first} and {second} have no image, grid, steps and members in common: nothing is paired")
    for one in shared:
        keys = before[one].keys() & after[one].keys()
        found = [sum(table[one][key] for key in keys) / len(keys) for table in (before, after)]
        head = _settings_text(one[:4]) if settings is None else " to ".join(map(_settings_text, settings))
        yield f"{head}: {one[-1]} {found[0]:.4f} to {found[1]:.4f}, paired {change(before[one], after[one])}"


def _settings_text(setting: tuple[Any, ...]) -> str:
    solver = "" if setting[3:] in ((), ("ddim",)) else f", {setting[3]}"
    return "{}, {} step(s), {} member(s)".format(*setting) + solver
