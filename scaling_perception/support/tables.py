"""Tables of text: CSV with commas, semicolons, tabs or bars, any byte order mark, decimal points or commas.

What is ambiguous is refused in one line that names the file, the line and how to mend it, and is never guessed.
"""

import csv
import gc
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaling_perception.support.errors import UserError, did_you_mean

_DELIMITERS = (",", ";", "\t", "|")
_MISSING = {"", "na", "n/a", "null", "none", "-"}
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+(?:[eE][+-]?\d+)?")
_THREE = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?(?:inf|infinity|nan)", re.IGNORECASE)


class Table:
    """The rows of a file as text, with the place of each: the number of its ``unit`` (the line that it begins on, or
    the record of a file that is no text of lines), or a text that says the whole place."""

    def __init__(
        self,
        path: str,
        names: list[str],
        rows: list[list[str]],
        lines: Sequence[Any],
        delimiter: str = ",",
        unit: str = "line",
    ):
        self.path, self.names, self.rows, self.lines, self.delimiter = path, names, rows, lines, delimiter
        self.unit = unit
        self._at = {name: index for index, name in enumerate(names)}

    def place(self, at: int) -> str:
        """Where row ``at`` stands in the file, such as ``line 7``."""
        where = self.lines[at]
        return where if isinstance(where, str) else f"{self.unit} {where}"

    def other(
        self, rows: list[list[str]], lines: Sequence[Any] | None = None, names: list[str] | None = None
    ) -> "Table":
        """Other rows, and other columns if ``names`` is given, of the same file."""
        lines = self.lines if lines is None else lines
        return Table(self.path, names or self.names, rows, lines, self.delimiter, self.unit)

    def take(self, keep: Sequence[int]) -> "Table":
        """The rows at the indices ``keep``."""
        return self.other([self.rows[at] for at in keep], [self.lines[at] for at in keep])

    def __len__(self) -> int:
        return len(self.rows)

    def text(self, name: str) -> list[str]:
        """A column as it is written.

        Raises:
            UserError: there is no such column; the nearest name is offered.
        """
        if name not in self._at:
            raise UserError(f"{self.path} has no column '{name}'{did_you_mean(name, self.names)}")
        index = self._at[name]
        return [row[index] for row in self.rows]

    def numbers(self, name: str) -> np.ndarray:
        """A column as float64; what is missing (empty, NA, null) is NaN.

        Raises:
            UserError: there is no such column, or a value is no number or may be read in two ways.
        """
        words = self.text(name)
        decimal = self._decimal_comma(name, words)
        if not decimal:
            try:  # one call for a clean column; numpy takes some spellings that are refused below
                values = np.array(words, dtype=np.float64)
                if not any("_" in word for word in words):
                    return values
            except ValueError:
                pass
        return np.array([self._number(name, at, word.strip(), decimal) for at, word in enumerate(words)])

    def _decimal_comma(self, name: str, words: Sequence[str]) -> bool:
        """Whether numbers of this column are written with decimal commas."""
        with_comma = [at for at, word in enumerate(words) if "," in word]
        if not with_comma:
            others = self.delimiter != "," and any("." in word for word in words)
            if others and (mixed := self._comma_elsewhere(name)):
                raise UserError(f"{mixed} has a comma where {name} has a point: use points alone")
            return False
        first = with_comma[0]
        where = f"{self.path} {self.place(first)}: {name} '{words[first].strip()}'"
        if any(not _DECIMAL_COMMA.fullmatch(words[at].strip()) for at in with_comma):
            return False  # no number at all: the reading of that value says so
        if any("." in word and _NUMBER.fullmatch(word.strip()) for row in self.rows for word in row):
            raise UserError(f"{where} has a comma where other values of the file have a point: use points alone")
        if all(_THREE.fullmatch(words[at].strip()) for at in with_comma):
            raise UserError(
                f"{where} may be a decimal comma or a comma between thousands: write it with a decimal point"
            )
        return True

    def _comma_elsewhere(self, name: str) -> str:
        """Where another column has a number with a comma; empty: nowhere."""
        for at, row in enumerate(self.rows):
            for other, word in zip(self.names, row, strict=False):
                if "," in word and other != name and _DECIMAL_COMMA.fullmatch(word.strip()):
                    return f"{self.path} {self.place(at)}: {other} '{word.strip()}'"
        return ""

    def _number(self, name: str, at: int, word: str, decimal: bool) -> float:
        if word.lower() in _MISSING:
            return float("nan")
        plain = word.replace(",", ".") if decimal else word
        if not _NUMBER.fullmatch(plain):
            raise UserError(
                f"{self.path} {self.place(at)}: {name} '{word}' is no number: write it as 1234.5 or 1.2345e3"
            )
        return float(plain)


def decode(path: str, data: bytes) -> str:
    """Text of bytes: by byte order mark, else UTF-16 where every second byte is zero, else UTF-8, else Windows-1252.

    Raises:
        UserError: it is no text.
    """
    codec = "utf-8-sig"
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        codec = "utf-16"
    elif len(data) >= 4 and not any(data[1:200:2]):
        codec = "utf-16-le"
    elif len(data) >= 4 and not any(data[0:200:2]):
        codec = "utf-16-be"
    try:
        text = data.decode(codec)
    except UnicodeDecodeError:
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError:
            raise UserError(f"{path} is no text file: give a CSV in UTF-8") from None
    if "\0" in text[:4096]:
        raise UserError(f"{path} is no text file: give a CSV in UTF-8")
    return text


def read_text(path: str | Path) -> str:
    """The text of a file, whatever its encoding.

    Raises:
        UserError: it is missing, a folder, cannot be read, or is no text.
    """
    try:
        return decode(str(path), Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check the path") from None


def read_table(path: str | Path, text: str | None = None) -> Table:
    """Read a CSV file; the first line that is neither empty nor begins with # names the columns.

    Args:
        text: the file's text, if it was read already.

    Raises:
        UserError: it is missing, no text, has no rows, an unnamed or doubled column, or a line of another length.
    """
    name = str(path)
    text = read_text(path) if text is None else text
    lines = text.splitlines(keepends=True)
    skip = 0
    delimiter = None
    while skip < len(lines) and (not lines[skip].strip(" \t\r\n") or lines[skip].lstrip().startswith("#")):
        skip += 1
    if skip < len(lines) and re.fullmatch(r"\"?sep=(.)\"?\s*", lines[skip]):  # Excel's first line
        delimiter = lines[skip].strip().strip('"')[4]
        skip += 1
    if skip == len(lines):
        raise UserError(f"{name} is empty: its first line must name the columns")
    delimiter = delimiter or _sniff(lines[skip : skip + 40])
    try:
        reader = csv.reader(lines[skip:], delimiter=delimiter, skipinitialspace=True, strict=True)
        names = [word.strip() for word in next(reader)]
        width = len(names)
        if names and not names[-1]:  # every line ends in a delimiter
            names = names[:-1]
        rows, numbers = _rows(name, reader, names, width, skip)
    except csv.Error as error:
        raise UserError(f"{name} is no CSV ({error}): mend the quotes or save it again") from None
    _check_names(name, names)
    if not rows:
        raise UserError(f"{name} names columns and has no rows")
    return Table(name, names, rows, numbers, delimiter)


def _rows(path: str, reader, names: list[str], width: int, skip: int) -> tuple[list[list[str]], Sequence[int]]:
    """The rows of ``width`` fields and the lines they begin on."""
    first = reader.line_num
    gc.disable()  # a million small lists are no garbage, and looking through them takes longer than reading
    try:
        rows = list(reader)
    finally:
        gc.enable()
    if set(map(len, rows)) == {width} and reader.line_num - first == len(rows):
        if not any(row[0].startswith("#") for row in rows):
            return rows, range(skip + first + 1, skip + first + 1 + len(rows))
    kept, numbers, line = [], [], skip + first + 1
    for row in rows:
        at, line = line, line + 1 + sum(word.count("\n") for word in row)
        if not any(word.strip() for word in row) or (row[0].startswith("#") and len(row) != width):
            continue
        if len(row) > width and not any(word.strip() for word in row[width:]):
            row = row[:width]
        if len(row) not in (width, len(names)):
            comma = len(row) > width and reader.dialect.delimiter == ","
            hint = ": a decimal comma? write decimal points, or separate by semicolons"
            raise UserError(
                f"{path} line {at} has {len(row)} field{'s' * (len(row) != 1)} where the first line names "
                f"{len(names)}{hint if comma else ': complete the line or remove it'}"
            )
        kept.append(row)
        numbers.append(at)
    return kept, numbers


def _sniff(lines: Sequence[str]) -> str:
    """The delimiter by which most of the first lines have as many fields as the first one, and the most fields."""
    best, found = (0, 0), ","
    for delimiter in _DELIMITERS:
        try:
            counts = [len(row) for row in csv.reader(io.StringIO("".join(lines)), delimiter=delimiter) if row]
        except csv.Error:
            continue
        if counts and counts[0] > 1:
            score = (sum(count == counts[0] for count in counts), counts[0])
            if score > best:
                best, found = score, delimiter
    return found


def _check_names(path: str, names: Sequence[str]) -> None:
    seen = set()
    for at, name in enumerate(names):
        if not name:
            raise UserError(f"{path}: column {at + 1} of the first line has no name: name every column")
        if name in seen:
            raise UserError(f"{path}: the first line names '{name}' twice: rename one of the columns")
        seen.add(name)
