"""The same command again: equal settings go on, other settings are refused by name, ``--overwrite`` replaces.

What a file or folder was made with stands in a small hidden record, ``.NAME.settings`` beside a file and ``.settings``
in a folder, with the sizes and times of what it describes: a record does not vouch for what somebody else put there.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scaling_perception.support.configs import flatten
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import atomic_path, write_json
from scaling_perception.support.stopping import finished_first

_RECORD = ".settings"
_MOST = 5  # differences that a refusal names
_DIGEST = re.compile(r"[0-9a-f]{32,}")
_NO_SETTINGS = {"overwrite", "help"}
_WORDS = {"source", "target", "points", "inputs", "dir", "what", "dataset", "sha256", "weights", "protocol", "data"}
"""Settings that no flag stands for."""


def add_overwrite(parser: argparse.ArgumentParser, what: str = "a result") -> None:
    """The flag of every verb that writes."""
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what} that was made with other settings")


def settings_of(args: argparse.Namespace, outputs: tuple[str, ...], places: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a command was asked: its flags that are set, without ``outputs``. Names in ``places`` that exist are made
    absolute, so that the same words in another folder are other settings."""

    def whole(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [whole(one) for one in value]
        return os.path.realpath(value) if isinstance(value, str) and os.path.exists(value) else value

    left = {*outputs, *_NO_SETTINGS}
    told = {name: whole(value) if name in places else value for name, value in vars(args).items() if name not in left}
    return {name: value for name, value in told.items() if value is not False and value not in (None, "", [], ())}


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """``field: old there, new here`` for each setting of two nested tables that differs; JSON's lists equal tuples.

    Lists of as many tables are compared table by table: ``sources[1].count: 8 there, 9 here``.
    """
    old, new = (flatten(json.loads(json.dumps(side))) for side in (there, here))
    found = []
    for name in differing_names(old, new):
        rows, others = old.get(name, []), new.get(name, [])
        if _tables(rows) and _tables(rows) == _tables(others):
            for i, pair in enumerate(zip(rows, others, strict=True)):
                found += [f"{name}[{i}].{line}" for line in differing(*pair)]
        else:
            found.append(f"{name}: {shown(old, name)} there, {shown(new, name)} here")
    return found


def _tables(value: Any) -> int:
    """How many tables a list consists of; 0 for anything else."""
    return len(value) if isinstance(value, list) and all(isinstance(row, dict) for row in value) else 0


def differing_names(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names of the settings of two flat tables that differ, sorted."""
    return [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]


def shown(side: Mapping[str, Any], name: str) -> str:
    """A setting of a flat table as a message shows it."""
    value = side.get(name, "absent")
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return json.dumps(value[:12])
    return json.dumps(value)[:80]


def refuse_other(place: Any, there: Mapping[str, Any] | None, here: Mapping[str, Any], flags: bool = False) -> None:
    """Refuse to replace the result at ``place``, made with ``there`` (None: not known), by one of ``here``.

    Args:
        flags: the settings are those of ``settings_of``: name them as they are typed.

    Raises:
        UserError: the settings differ, naming the first that do.
    """
    if flags:
        here = {_typed(name): value for name, value in here.items()}
        there = None if there is None else {_typed(name): value for name, value in there.items()}
    found = ["its settings are not known"] if there is None else differing(there, here)
    if found:
        more = f"; and {len(found) - _MOST} more" if len(found) > _MOST else ""
        raise UserError(
            f"{place} holds another result ({'; '.join(found[:_MOST])}{more}): give another name, or --overwrite to "
            "replace it"
        )


def _typed(name: str) -> str:
    return name if name in _WORDS else f"--{name.replace('_', '-')}"


# --- Records -------------------------------------------------------------------------------------------------------


def check_output(path: str | os.PathLike[str] | None, settings: Mapping[str, Any], overwrite: bool = False) -> None:
    """Refuse, before any work, to replace what is at ``path`` (None: no such output). An empty file is nothing.

    Raises:
        UserError: it was made with other settings, or nothing says with which.
    """
    if path is None or overwrite:
        return
    real = Path(os.path.realpath(path))
    if real.is_file() and real.stat().st_size:
        refuse_other(path, settings_there(real), settings, flags=True)


def settings_there(path: Path) -> dict[str, Any] | None:
    """The settings that the file or folder at ``path`` was made with; None where no record is of what is there."""
    path = Path(os.path.realpath(path))
    try:
        made = json.loads(_record_of(path).read_text(encoding="utf-8"))["made"]
        state = _state(path)
        return next((one["settings"] for one in made if one["state"] == state), None)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep_settings(path: Path, made: Path, settings: Mapping[str, Any]) -> None:
    """Record the settings of ``made``, a file about to be renamed to ``path``. Until then the record is also of what is
    there, so that a crash between the two leaves each with its settings."""
    path = Path(os.path.realpath(path))
    rows = [{"state": _state(made), "settings": settings}]
    if (before := settings_there(path)) is not None:
        rows.append({"state": _state(path), "settings": before})
    write_json(_record_of(path), {"format": 1, "made": rows})


def keep_folder_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Record the settings of a folder in it, when all else is there."""
    write_json(folder / _RECORD, {"format": 1, "made": [{"state": _state(folder), "settings": settings}]})


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> Iterator[Path]:
    """``files.atomic_path`` for a result whose settings are recorded. Ask ``check_output`` before the work."""
    with atomic_path(path) as temporary:
        yield temporary
        keep_settings(Path(path), temporary, settings)


def _record_of(path: Path) -> Path:
    return path / _RECORD if path.is_dir() else path.with_name(f".{path.name}{_RECORD}")


def _state(path: Path) -> list[Any]:
    """Names, sizes and times of change: what shows that something else was written there since."""
    if path.is_dir():
        files = sorted(one for one in path.rglob("*") if one.is_file() and one != path / _RECORD)
        return [[str(one.relative_to(path)), *_state(one)] for one in files]
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


# --- Folders -------------------------------------------------------------------------------------------------------


def swap_folder(made: Path, target: Path) -> None:
    """Put the finished folder ``made`` in the place of ``target``; ``restore_folder`` mends what a crash left of it."""
    old = _old(target)
    shutil.rmtree(old, ignore_errors=True)
    with finished_first():
        if target.exists():
            os.replace(target, old)
        os.replace(made, target.absolute())
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(target: Path) -> None:
    """Bring back the folder that a crash in ``swap_folder`` left under its other name."""
    if _old(target).exists() and not target.exists():
        os.replace(_old(target), target)


def _old(target: Path) -> Path:
    return target.absolute().with_name(f".{target.name}.old")
