"""Lists of files that a person gives, and where the files that they name lie."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from scaling_perception.data.sources.base import file_sizes, list_files
from scaling_perception.support.errors import UserError
from scaling_perception.support.tables import read_text


def list_path(root: Path, given: str) -> Path:
    """The list that an option names: as it stands, else below ``root``."""
    path = Path(given).expanduser()
    return path if path.is_absolute() or path.exists() else root / path


def read_list(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """The words of every line that is not blank; further ones than ``columns`` are kept (Marigold's lists have some).
    Where a line has tabs they alone separate, so that names may have spaces.

    Raises:
        UserError: no text file, no line, or a line with too few words.
    """
    form = f"'{' '.join(columns)}'"
    try:
        lines = read_text(path).splitlines()
    except UserError as error:
        raise UserError(f"{error}; it must be text, lines {form}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        words = [word.strip() for word in line.split("\t")] if "\t" in line.strip() else line.split()
        if words and len(words) < len(columns):
            raise UserError(f"{path} line {number} is '{line}': it must be {form}")
        if words:
            rows.append(words)
    if not rows:
        raise UserError(f"{path} is empty: write one line {form} a sample")
    return rows


def tails(paths: Iterable[str], parts: int) -> dict[str, list[str]]:
    """The paths by their last ``parts`` components; shorter ones are left out."""
    found: dict[str, list[str]] = {}
    for path in paths:
        words = path.rsplit("/", parts)
        if len(words) >= parts:
            found.setdefault("/".join(words[-parts:]), []).append(path)
    return found


def locate(root: Path, names: Iterable[str], folders: Sequence[str] = ("",)) -> dict[str, str]:
    """Where files of given names lie below ``root``: in one of ``folders``, else wherever the path ends so.

    Returns:
        {name: path relative to root}. A name that is nowhere gets the place where it should be, in the first folder.

    Raises:
        UserError: a name that is in none of the folders fits several files elsewhere.
    """
    wanted = list(dict.fromkeys(names))
    found: dict[str, str] = {}
    for folder in folders:
        prefix = f"{folder}/" if folder else ""
        here = file_sizes(root, [prefix + name for name in wanted if name not in found])
        found |= {path[len(prefix) :]: path for path in here}
    lost = [name for name in wanted if name not in found]
    everything = list_files(root) if lost else []
    by_tail = {parts: tails(everything, parts) for parts in {name.count("/") + 1 for name in lost}}
    for name in lost:
        places = by_tail[name.count("/") + 1].get(name, [])
        if len(places) > 1:
            raise UserError(f"{root} holds {places[0]} and {places[1]}, and the list says {name}: keep one of them")
        found[name] = places[0] if places else (f"{folders[0]}/{name}" if folders[0] else name)
    return found
