"""Columns and rows of a table of points: which are meant, which are used, which are refused."""

import re
from collections.abc import Sequence

import numpy as np

from scaling_perception.evaluation.comparisons import OLD_KINDS
from scaling_perception.evaluation.tables import NAMED_COLUMNS
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.tables import Table

UNLIKE = ("metric", "task")
"""Columns that tell apart what no law holds together."""
SETS = ("kind", "dataset", "split", "preset", "spacing", "schedule", "solver", "prediction", "reduce", "last")
"""Columns whose values may be fitted together, which is then said; those of `NAMED_COLUMNS` likewise, where empty is
the default."""


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def with_kinds(table: Table) -> Table:
    """A table with today's names of the kinds of cells, if it is one of `evaluate`."""
    if not {"kind", "preset"} <= set(table.names):
        return table
    at = table.names.index("kind")
    rows = [[*row[:at], OLD_KINDS.get(row[at], row[at]), *row[at + 1 :]] for row in table.rows]
    return table.other(rows)


def find_column(names: Sequence[str], wanted: str) -> str | None:
    """The column ``wanted``, as written or else by its letters and digits alone (``absrel`` finds ``abs_rel``)."""
    if wanted in names:
        return wanted
    same = [name for name in names if _plain(name) == _plain(wanted)]
    return same[0] if len(same) == 1 else None


def need_column(table: Table, wanted: str, flag: str) -> str:
    """The column that a flag names.

    Raises:
        UserError: it is not there; the nearest name is offered.
    """
    found = find_column(table.names, wanted)
    if found is None:
        raise UserError(f"{flag}: {table.path} has no column '{wanted}'{did_you_mean(wanted, table.names)}")
    return found


def first_column(table: Table, options: Sequence[str]) -> str | None:
    """The first of ``options`` that the table has."""
    return next((found for one in options if (found := find_column(table.names, one))), None)


def where_rows(table: Table, where: Sequence[str]) -> Table:
    """The rows that meet every ``column=value``.

    Raises:
        UserError: a condition that is none, or that no row meets.
    """
    for one in where:
        name, equals, value = one.partition("=")
        if not equals:
            raise UserError(f"--where '{one}': write column=value")
        words = table.text(need_column(table, name, "--where"))
        if name == "kind" and value not in words:
            value = OLD_KINDS.get(value, value)
        keep = [at for at, word in enumerate(words) if word.strip() == value]
        if not keep:
            some = sorted(set(words))[:8]
            raise UserError(f"--where {one}: no row has it{did_you_mean(value, some)}")
        table = table.take(keep)
    return table


def tidy(word: str) -> str:
    """A number in few digits; other words as they are."""
    try:
        return f"{float(word):.4g}"
    except ValueError:
        return word


def refuse_unlike(table: Table, keep: np.ndarray, used: Sequence[str], notes: list[str]) -> None:
    """Refuse points of several metrics or tasks, and say what else differs between them.

    Raises:
        UserError: a column of ``UNLIKE`` has several values.
    """
    for one in (*UNLIKE, *SETS, *NAMED_COLUMNS):
        name = find_column(table.names, one)
        if name is None or name in used:
            continue
        found = sorted({word for word, kept in zip(table.text(name), keep, strict=True) if kept})
        found = [word or "default" for word in found if word or one in NAMED_COLUMNS]
        if len(found) < 2:
            continue
        some = ", ".join(found[:6]) + (", …" if len(found) > 6 else "")
        if one in UNLIKE:
            raise UserError(
                f"{table.path}: {used[-1]} is of several {name}s ({some}), which no law holds together: choose one, "
                f"such as --where {name}={found[0]}"
            )
        notes.append(f"the points are of {name} {some} together: --where {name}=… chooses")


def without_copies(table: Table, notes: list[str]) -> Table:
    """The table without rows that are copies of others in every column, which are counted in ``notes``."""
    seen: dict[tuple[str, ...], int] = {}
    for at, row in enumerate(table.rows):
        seen.setdefault(tuple(row), at)
    copies = len(table) - len(seen)
    if not copies:
        return table
    notes.append(
        f"{copies} row{'s are copies' if copies > 1 else ' is a copy'} of another in every column and left out "
        "(--keep-duplicates keeps them)"
    )
    return table.take(list(seen.values()))


def valid_rows(
    table: Table, columns: np.ndarray, names: Sequence[str], drop: bool, notes: list[str], zero: bool
) -> np.ndarray:
    """Rows with all values; missing values are left out and counted, impossible ones refused or left out.

    ``zero``: the last column may be zero, such as an image's error of which the mean is taken.
    """
    keep = np.ones(len(table), bool)
    for name, values in zip(names, columns, strict=True):
        bad = ~(np.isfinite(values) & ((values > 0) | ((values == 0) & (zero and name == names[-1]))))
        if not bad.any():
            continue
        words = table.text(name)
        empty = np.array([word.strip().lower() in ("", "na", "n/a", "null", "none", "-") for word in words])
        wrong = np.flatnonzero(bad & ~empty)
        if len(wrong) and not drop:
            first = int(wrong[0])
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise UserError(
                f"{table.path} {table.place(first)}: {name} is {words[first].strip()}{more}; a law needs values "
                "above zero: mend them, or leave such rows out with --drop-invalid"
            )
        keep &= ~bad
        for which, text in ((wrong, "is not above zero or not finite"), (np.flatnonzero(empty), "is missing")):
            if len(which):
                rows = f"{len(which)} row{'s' * (len(which) > 1)}"
                notes.append(f"{rows} left out: {name} {text} (first at {table.place(int(which[0]))})")
    if not keep.any():
        raise UserError(f"{table.path}: no row has all of {', '.join(names)}: check --x, --y and --where")
    return keep


def codes_of(words: Sequence[str]) -> np.ndarray:
    """A number for each word, equal for equal words."""
    known: dict[str, int] = {}
    return np.array([known.setdefault(word, len(known)) for word in words])
