"""Tables in a model's folder, a JSON file with an entry for each task: ``budgets.json``, ``grids.json``.

{"format": 1, "tasks": {"depth": {...}, ...}}
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from scaling_perception.support.errors import UserError
from scaling_perception.support.files import read_json, write_text
from scaling_perception.support.locks import hold

IDENTITY = ("weights", "autoencoder")
"""Fields of an entry: the ids of what it was measured with. Earlier tables of budgets lack them."""


class TaskTable(NamedTuple):
    """A kind of table.

    Attributes:
        file: its name in a model folder. format: what this version reads and writes.
        missing: what a message says of a file that is none, such as "is no table of budgets".
        flag: of `evaluate`, which makes it.
        fault: what of an entry, any JSON value, is missing or wrong, in words; '' where it can be read.
    """

    file: str
    format: int
    missing: str
    flag: str
    fault: Callable[[Any], str]


def read_table(table: TaskTable, folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The table of a model folder, checked, or None where it has none.

    Raises:
        UserError: there is a file and it is damaged, or of another format.
    """
    path = Path(folder) / table.file
    if not path.is_file():
        return None
    found = read_json(path)
    if isinstance(found, dict) and found.get("format", table.format) != table.format:
        raise UserError(f"{path} has format {found['format']}, this version reads {table.format}: make it again")
    tasks = found.get("tasks") if isinstance(found, dict) and "format" in found else None
    faults = (
        ["tasks"]
        if not isinstance(tasks, dict)
        else [f"{task}: {fault}" for task, entry in tasks.items() if (fault := table.fault(entry))]
    )
    if faults:
        again = f"remove it, or make it again (`evaluate {table.flag} {folder}`)"
        raise UserError(f"{path} {table.missing} ({faults[0]}): {again}")
    return found


def refuse_other_weights(table: TaskTable, entry: Mapping[str, Any], identity: Mapping[str, str], mend: str) -> None:
    """UserError where an entry was made with other weights than a model's.

    Args:
        identity: the model's ids under the names of ``IDENTITY``. mend: how to mend it, for the message.
    """
    for name in IDENTITY:
        if entry.get(name) is not None and entry[name] != identity[name]:
            raise UserError(f"{table.file} was made with other {name} ({entry[name]}, now {identity[name]}): {mend}")


def refuse_other_model(folder: Path, weights: str | None) -> None:
    """UserError where the model in ``folder`` has other weights than those of a result (None: not known)."""
    from scaling_perception.interop.model_folder import load_model
    from scaling_perception.models.autoencoders import tree_hash

    if weights is not None and (own := tree_hash(load_model(folder)[0])) != weights:
        raise UserError(
            f"{folder} holds other weights ({own}) than the model that was evaluated ({weights}): give that "
            "model's own folder"
        )


def write_entry(table: TaskTable, folder: str | os.PathLike[str], task: str, entry: Mapping[str, Any]) -> Path:
    """Put one task's entry into the folder's table, in place of an older one; other tasks' stay. Atomic.

    Raises:
        UserError: the folder cannot be written, or holds a damaged table.
    """
    path = Path(folder) / table.file
    with hold(path.with_name(f".{table.file}.lock"), f"another evaluate is writing {path}", "wait for it", wait=True):
        found = read_table(table, folder) or {"format": table.format, "tasks": {}}
        tasks = {**found["tasks"], task: dict(entry)}
        write_text(path, _lines({**found, "tasks": dict(sorted(tasks.items()))}) + "\n")
    return path


def _lines(value: Any, margin: str = "") -> str:
    """JSON with every field, and every object of a list, on a line of its own, which a person can read and git can
    compare."""
    inner = margin + " "
    if isinstance(value, dict) and value:
        fields = [f"{inner}{json.dumps(name)}: {_lines(field, inner)}" for name, field in value.items()]
        return "{\n" + ",\n".join(fields) + f"\n{margin}}}"
    text = json.dumps(value, allow_nan=False)
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return "[\n" + ",\n".join(inner + json.dumps(one, allow_nan=False) for one in value) + f"\n{margin}]"
    return text
