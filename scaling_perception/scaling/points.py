"""Points of a law: from any CSV, long or wide, from `evaluate`'s CSV and JSON, and from what `train` writes."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scaling_perception.evaluation.result_files import is_evaluation
from scaling_perception.scaling.paper_laws import PREFIX, published_points
from scaling_perception.scaling.point_rows import (
    codes_of,
    find_column,
    first_column,
    need_column,
    refuse_unlike,
    tidy,
    valid_rows,
    where_rows,
    with_kinds,
    without_copies,
)
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.files import json_lines
from scaling_perception.support.tables import Table, read_table, read_text

Y_NAMES = (
    "abs_rel",
    "epe",
    "1-iou",
    "1-delta1",
    "error",
    "err",
    "eval_loss",
    "val_loss",
    "held_out_loss",
    "loss",
    "value",
)
GROUP_NAMES = ("run", "run_id", "weights", "file")
X_NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "": (("macs", "train_macs", "flops", "compute", "c", "x"),),
    "two": (("params", "n", "model_size"), ("tokens", "samples", "d", "examples")),
    "upcycling": (("d1", "dense_tokens", "pretrain_tokens"), ("d2", "moe_tokens", "upcycling_tokens")),
    "test_time": (
        ("steps", "denoising_steps"), ("ensemble", "members"), ("params", "model_size"),
        ("train_macs", "training_macs", "train_compute"),
    ),
}  # fmt: skip
"""Columns that are looked for where --x names none, by form; the first that is there is taken."""
SETTINGS = (
    *("cell", "task", "dataset", "model", "answer", "kind", "metric", "preset", "spacing", "solver", "steps"),
    *("ensemble", "members", "tolerance", "step_tolerance"),
)
"""Columns that distinguish the settings of a per-image table."""
SIZES = ("params", "model_size", "model", "size", "n")
LABELS = (*GROUP_NAMES, *SETTINGS, *SIZES, "seed", "name", "label", "method", "split", "arm")
"""Columns beside which, in a wide table, the names of the others are taken as values of x."""


@dataclass
class Points:
    """Positive x (v, n) and y (n,), clusters, and where they come from.

    ``groups``: codes (n,) from the outermost level inwards; ``group_names`` their columns, empty where every point is
    a cluster of its own. ``images``: per-image errors (n, images), NaN where absent, of which ``y`` is the mean; None:
    no image level. ``notes``: what was left out or decided, in sentences. ``extra``: further columns (n,) by name, NaN
    where a row has none.
    """

    x: np.ndarray
    y: np.ndarray
    x_names: tuple[str, ...]
    y_name: str
    groups: list[np.ndarray] = field(default_factory=list)
    group_names: tuple[str, ...] = ()
    images: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)
    source: list[dict[str, str]] = field(default_factory=list)
    one_size: str = ""
    labels: list[str] = field(default_factory=list)
    extra: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.groups:
            self.groups = [np.arange(len(self.y))]
        if not self.labels:
            self.labels = [""] * len(self.y)

    def __len__(self) -> int:
        return len(self.y)

    def take(self, keep: np.ndarray) -> "Points":
        """The points where ``keep`` (n,) is true."""
        images = None if self.images is None else self.images[keep]
        labels = [label for label, kept in zip(self.labels, keep, strict=True) if kept]
        return Points(
            self.x[:, keep], self.y[keep], self.x_names, self.y_name, [g[keep] for g in self.groups],
            self.group_names, images, list(self.notes), self.source, self.one_size, labels,
            {name: values[keep] for name, values in self.extra.items()},
        )  # fmt: skip


# Files to one table


def load_tables(paths: Sequence[str | Path]) -> tuple[Table, list[dict[str, str]]]:
    """One table of all files, and of each its path and SHA-256. With several files a column ``file`` is added.

    A folder stands for every ``metrics.jsonl`` below it; ``paper:fig8a`` for points made from that published law.

    Raises:
        UserError: a file cannot be read or is nothing that holds points.
    """
    files: list[Path] = []
    made = [str(path) for path in paths if str(path).startswith(PREFIX)]
    if made:
        if len(paths) > 1:
            raise UserError(f"{made[0]}: fit published points alone")
        return published_points(made[0].removeprefix(PREFIX)), [{"file": made[0], "sha256": ""}]
    for path in map(Path, paths):
        if path.is_dir():
            below = sorted(path.rglob("metrics.jsonl"))
            if not below:
                raise UserError(f"{path} holds no metrics.jsonl: give a training run, a CSV or an evaluation's JSON")
            files += below
        else:
            files.append(path)
    tables, source = [], []
    for path in files:
        text = read_text(path)
        tables.append(_load(path, text))
        source.append({"file": path.name, "sha256": hashlib.sha256(text.encode()).hexdigest()})
    return (tables[0] if len(tables) == 1 else _join(tables)), source


def _join(tables: Sequence[Table]) -> Table:
    names = list(dict.fromkeys(name for table in tables for name in table.names))
    if "file" not in names:
        names.append("file")
    rows: list[list[str]] = []
    for table in tables:
        at = {name: index for index, name in enumerate(table.names)}
        stem = Path(table.path).parent.name if Path(table.path).name == "metrics.jsonl" else Path(table.path).stem
        for row in table.rows:
            rows.append([row[at[name]] if name in at else stem if name == "file" else "" for name in names])
    places = [f"{table.place(at)} of {table.path}" for table in tables for at in range(len(table))]
    return Table(" + ".join(table.path for table in tables), names, rows, places)


def _load(path: Path, text: str) -> Table:
    if path.suffix.lower() == ".jsonl":
        return _training_rows(path, text)
    if path.suffix.lower() != ".json":
        return with_kinds(read_table(path, text))
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): restore it or make it again") from None
    if is_evaluation(path, value):
        return _evaluation(path, value)
    if isinstance(value, dict) and {"attempts", "started"} <= value.keys():
        rows = path.with_name("metrics.jsonl")
        return _training_rows(rows, read_text(rows))
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        return _records(str(path), value)
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len(lengths := {name: len(column) for name, column in value.items()}) and len(set(lengths.values())) > 1:
            raise UserError(f"{path}: columns are of different lengths ({lengths}): complete them")
        return _records(str(path), [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)])
    raise UserError(f"{path} holds no points: give a CSV, `evaluate`'s JSON, `train`'s metrics.jsonl or run.json")


def _evaluation(path: Path, value: dict[str, Any]) -> Table:
    from scaling_perception.evaluation.tables import cells_csv

    try:
        table = read_table(path, cells_csv(value))
        return Table(table.path, table.names, table.rows, range(1, len(table) + 1), table.delimiter, "cell")
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not a whole evaluation: make it again with `evaluate --json`") from None


def _records(path: str, rows: Sequence[dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    text = [["" if row.get(name) is None else str(row[name]) for name in names] for row in rows]
    return Table(path, names, text, range(1, len(text) + 1), unit="record")


def _training_rows(path: Path, text: str) -> Table:
    """A run's rows with ``run``, ``params``, ``samples`` and ``macs`` (forward, until that step) from its run.json."""
    rows, _ = json_lines(path, text)
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} has no rows of values: give the metrics.jsonl of a training run")
    record = path.with_name("run.json")
    if record.is_file():
        try:
            facts = json.loads(read_text(record))
        except ValueError:
            facts = None
        rows = [_with_facts(row, facts, path) for row in rows] if isinstance(facts, dict) else rows
    return _records(str(path), rows)


def _with_facts(row: dict[str, Any], facts: dict[str, Any], path: Path) -> dict[str, Any]:
    """A row with what run.json knows; what the row has itself, and what an older run.json lacks, is left alone."""
    weights = facts.get("parameters")
    known: dict[str, Any] = {"run": path.parent.name or path.resolve().parent.name}
    known["params"] = weights.get("active") if isinstance(weights, dict) else weights
    step, samples, macs = row.get("step"), facts.get("samples_per_step"), facts.get("macs_per_sample")
    if step is not None and samples:
        known["samples"] = step * samples
        if macs:
            known["macs"] = step * samples * macs
    return {**{name: value for name, value in known.items() if value is not None}, **row}


# A table to points


def melt(
    table: Table, y: Sequence[str], x: Sequence[str], named: Sequence[str], notes: list[str]
) -> tuple[Table, list[str], list[str]]:
    """A wide table made long: several y columns, or columns whose names are the values of x.

    Args:
        named: columns that other flags name.
        notes: takes which names are values of x.

    Returns:
        the long table and its x and y names; a table that is long is returned as it is.

    Raises:
        UserError: the names of columns are numbers, and it is not clear that they are names.
    """
    if len(y) < 2:
        values = _values_of_x(table, [*x, *y], named)
        if not values:
            return table, list(x), list(y)
        x_name, y_name = (x[0] if x else "x"), (y[0] if y else "y")
        some = ", ".join(values[:4]) + (", …" if len(values) > 4 else "")
        notes.append(f"a wide table: the names of {len(values)} columns ({some}) are the values of {x_name}")
        return _long(table, values, x_name, y_name), [x_name], [y_name]
    columns = [need_column(table, one, "--y") for one in y]
    return _long(table, columns, "column" if "run" in {*table.names} - {*columns} else "run", "y"), list(x), ["y"]


def _long(table: Table, columns: Sequence[str], name_column: str, value_column: str) -> Table:
    """A row for each row and each of ``columns``, with the column's name and its value."""
    at = {name: index for index, name in enumerate(table.names)}
    kept = [name for name in table.names if name not in columns]
    rows, lines = [], []
    for line, row in zip(table.lines, table.rows, strict=True):
        for name in columns:
            rows.append([*(row[at[k]] for k in kept), name, row[at[name]]])
            lines.append(line)
    return table.other(rows, lines, [*kept, name_column, value_column])


def _values_of_x(table: Table, asked: Sequence[str], named: Sequence[str]) -> list[str]:
    """The columns whose names are values of x; none where a column is named as x or y usually is, or is asked for.

    Raises:
        UserError: the names may as well be the first row of a table without names.
    """
    usual = [*asked, *Y_NAMES, *(name for kinds in X_NAMES.values() for options in kinds for name in options)]
    numbers = [name for name in table.names if _NUMBER.fullmatch(name)]
    if first_column(table, usual) or (len(numbers) < 2 and len(numbers) < len(table.names)):
        return []
    labels = [name for name in table.names if name not in numbers and name != "file"]  # which `_join` adds
    known = {found for one in (*LABELS, *named) if (found := find_column(table.names, one))}
    positive = [name for name in numbers if "," not in name and float(name) > 0]
    if labels and not {*labels} <= known and 2 * len(numbers) <= len(table.names):
        return []
    if not labels or not {*labels} <= known or len(positive) < 2:
        some = ", ".join(table.names[:4]) + (", …" if len(table.names) > 4 else "")
        more = f"give --group {labels[0]}" if labels and len(positive) > 1 else "add a column run"
        raise UserError(
            f"{table.path}: the first line ({some}) holds numbers in place of names: name the columns in it, such as "
            f"run,macs,abs_rel (of a wide table, whose columns are named by values of x: {more})"
        )
    return positive


_NUMBER = re.compile(r"[+-]?(?:\d+[.,]?\d*|[.,]\d+)(?:[eE][+-]?\d+)?")


def _expand(names: Sequence[str], y: Sequence[str]) -> list[str]:
    out = []
    for one in y:
        if "*" in one:
            pattern = re.compile(".*".join(map(re.escape, one.split("*"))))
            matched = [name for name in names if pattern.fullmatch(name)]
            if not matched:
                raise UserError(f"--y '{one}' matches no column{did_you_mean(one, names)}")
            out += matched
        else:
            out.append(one)
    return out


def choose_x(table: Table, form: str) -> list[str]:
    """The columns of x that a form takes when none are named.

    Raises:
        UserError: they are not there.
    """
    kind = form if form in ("upcycling", "test_time") else "two" if form in ("additive", "joint", "kaplan") else ""
    found = [(options, first_column(table, options)) for options in X_NAMES[kind]]
    if kind == "test_time":
        there = [name for _, name in found if name and len(np.unique(table.numbers(name))) > 1]
        if len(there) < 2:
            raise UserError(
                f"--x: name the columns of the surface, such as steps ensemble; known: {', '.join(table.names)}"
            )
        return there
    for options, name in found:
        if name is None:
            raise UserError(
                f"--x: {table.path} has no column {' or '.join(options[:3])}: name it with --x; "
                f"known: {', '.join(table.names)}"
            )
    return [name for _, name in found if name]


def read_points(
    paths: Sequence[str | Path],
    x: Sequence[str] = (),
    y: Sequence[str] = (),
    group: Sequence[str] | None = None,
    image: str | None = None,
    form: str = "auto",
    where: Sequence[str] = (),
    drop_invalid: bool = False,
    keep_duplicates: bool = False,
    extra: Sequence[str] = (),
) -> Points:
    """Read points.

    Args:
        paths: files, or folders of training runs.
        x, y: columns; empty: the usual names. Several ``y``: each is a run of a wide table.
        group: columns of clusters from the outermost inwards; None: ``run``, ``run_id`` or ``weights`` if one is there;
            empty: none.
        image: column of an image's name in a table of one line an image; y becomes the mean over images.
        where: ``column=value`` conditions; rows that meet all are used.
        drop_invalid: leave out zero, negative and non-finite values instead of refusing them.
        keep_duplicates: keep rows that are copies of others in every column.
        extra: further columns of numbers to keep beside the points, where they are there.

    Raises:
        UserError: anything that cannot become points.
    """
    table, source = load_tables(paths)
    notes: list[str] = []
    named = [*(group or ()), *([image] if image else ()), *(one.partition("=")[0] for one in where)]
    table, x, y = melt(table, _expand(table.names, y), x, named, notes)
    table = where_rows(table, where)
    if not keep_duplicates:
        table = without_copies(table, notes)
    x_names = [need_column(table, one, "--x") for one in x] if x else choose_x(table, form)
    both = [first_column(table, options) for options in X_NAMES["two"]]
    if not x and form == "auto" and all(both) and not {*both} & {*x_names}:
        notes.append(f"{both[0]} and {both[1]} are there as well: --form additive fits a law of both")
    y_name = need_column(table, y[0], "--y") if y else first_column(table, Y_NAMES)
    if y_name is None:
        raise UserError(f"--y: name the column of the error; known: {', '.join(table.names)}")
    if y_name in x_names or len(set(x_names)) < len(x_names):
        raise UserError(f"--x {' '.join(x_names)} --y {y_name}: a column is named twice: name different columns")
    columns = np.stack([table.numbers(name) for name in (*x_names, y_name)])
    keep = valid_rows(table, columns, (*x_names, y_name), drop_invalid, notes, zero=image is not None)
    refuse_unlike(table, keep, (*x_names, y_name), notes)
    group_names = _groups(table, group, notes)
    codes = [codes_of(table.text(name))[keep] for name in group_names]
    if group is None and group_names and len(np.unique(codes[0])) == 1:
        notes.append(f"all points are of one {group_names[0]}: intervals treat every point as independent")
        group_names, codes = (), []
    for name in group_names:
        unnamed = [at for at in np.flatnonzero(keep) if not table.rows[at][table.names.index(name)].strip()]
        if unnamed:
            rows = f"{len(unnamed)} rows have" if len(unnamed) > 1 else "1 row has"
            notes.append(
                f"{rows} no {name} (first at {table.place(int(unnamed[0]))}) and count as one {name}: name it, or "
                "remove such rows"
            )
    size = first_column(table, SIZES)
    one_size = ""
    if size and size not in x_names:
        sizes = {word for word, kept in zip(table.text(size), keep, strict=True) if kept} - {""}
        one_size = f"{size} {tidy(next(iter(sizes)))}" if len(sizes) == 1 else ""
    text = table.text(group_names[0]) if group_names else [""] * len(table)
    labels = [word for word, kept in zip(text, keep, strict=True) if kept]
    x_kept, y_kept = columns[:-1, keep], columns[-1, keep]
    metric = first_column(table, ("metric",))
    if y_name == "value" and metric:  # which of one, refuse_unlike has seen
        y_name = next(word for word, kept in zip(table.text(metric), keep, strict=True) if kept) or y_name
    points = Points(x_kept, y_kept, tuple(x_names), y_name, codes, group_names, None, notes, source, one_size, labels)
    points.extra = {name: table.numbers(name)[keep] for one in extra if (name := find_column(table.names, one))}
    return points if image is None else _by_image(points, table, need_column(table, image, "--image"), keep)


def _groups(table: Table, group: Sequence[str] | None, notes: list[str]) -> tuple[str, ...]:
    if group is not None:
        return tuple(need_column(table, one, "--group") for one in group)
    found = first_column(table, GROUP_NAMES)
    if found is None:
        notes.append("no column names the run (--group): intervals treat every point as independent")
    return (found,) if found else ()


def _by_image(points: Points, table: Table, image: str, keep: np.ndarray) -> Points:
    """One point for each setting: the mean over images, with every image's value kept for the bootstrap."""
    names = [word for word, kept in zip(table.text(image), keep, strict=True) if kept]
    present = [found for one in SETTINGS if (found := find_column(table.names, one))]
    columns = [codes_of(table.text(one))[keep] for one in present if one != image]
    settings = np.stack([*(columns or list(points.x)), *(points.groups if points.group_names else [])])
    unique, first, which = np.unique(settings, axis=1, return_index=True, return_inverse=True)
    which = which.reshape(-1)
    codes = codes_of(names)
    if len(np.unique(np.stack([which, codes]), axis=1).T) < len(names):
        raise UserError(
            f"--image {image}: an image has several values at one setting: tell settings apart with --where or --group"
        )
    sets = find_column(table.names, "dataset")
    kept = _of_all_settings(points, which, codes, codes_of(table.text(sets))[keep] if sets else None, image)
    points, which, codes = points.take(kept), which[kept], np.unique(codes[kept], return_inverse=True)[1]
    first = np.array([np.flatnonzero(which == one)[0] for one in range(unique.shape[1])])
    values = np.full((unique.shape[1], codes.max() + 1), np.nan)
    values[which, codes] = points.y
    levels = [group[first] for group in points.groups] if points.group_names else []
    labels = [points.labels[at] for at in first]
    number = np.bincount(which)
    x = np.stack([np.bincount(which, row) / number for row in points.x])  # adaptive compute differs by image
    return Points(
        x, np.nanmean(values, 1), points.x_names, points.y_name, levels, points.group_names, values,
        points.notes, points.source, points.one_size, labels,
        {name: column[first] for name, column in points.extra.items()},
    )  # fmt: skip


def _of_all_settings(
    points: Points, which: np.ndarray, codes: np.ndarray, sets: np.ndarray | None, image: str
) -> np.ndarray:
    """The rows (n,) of images that all settings of their data set have: means over others cannot be compared. Where
    every run has the same x, those that all settings of their run have: the images then do not differ along x.

    Args:
        which, codes, sets: of each row the number of its setting, image and data set.

    Raises:
        UserError: the settings of a data set have no image in common.
    """
    sets = np.zeros(len(which), int) if sets is None else sets
    runs, places = points.groups[0], np.unique(points.x, axis=1, return_inverse=True)[1].reshape(-1)
    if points.group_names and len({tuple(np.unique(places[runs == one])) for one in np.unique(runs)}) == 1:
        sets = np.unique(np.stack([sets, runs]), axis=1, return_inverse=True)[1].reshape(-1)
    kept = np.zeros(len(which), bool)
    for one in np.unique(sets):
        mine = sets == one
        count = len(np.unique(which[mine]))
        images, rows = np.unique(codes[mine], return_counts=True)  # one row for each setting and image
        common = images[rows == count]
        if not len(common):
            raise UserError(
                f"--image {image}: the {count} settings have no image in common, and means over different images "
                "cannot be compared: choose settings with --where, or evaluate them on the same images"
            )
        kept |= mine & np.isin(codes, common)
    if not kept.all():
        images = len(np.unique(codes[~kept]))
        points.notes.append(
            f"{int((~kept).sum())} rows left out: not every setting has their images ({images} of "
            f"{len(np.unique(codes))})"
        )
    return kept
