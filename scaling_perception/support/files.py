"""Files that are either whole or absent: written beside their place, flushed to disk, then renamed."""

import contextlib
import errno
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scaling_perception.support.errors import UserError
from scaling_perception.support.failures import explain_os
from scaling_perception.support.stopping import making_temporary

_UMASK = threading.Lock()
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it into place, on failure remove it.

    The temporary name keeps the final suffix, because many writers choose their format by it.

    A link is followed, so that its target is replaced and not the link.

    Raises:
        UserError: the folder cannot be written, the disk is full, or ``path`` is a folder or a device.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # renaming over /dev/null would remove the device
        raise UserError(f"cannot write {path}: it is there and is no regular file; choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with making_temporary() as temporaries:
            handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
            temporaries.add(temporary := Path(name).absolute())
        os.close(handle)
    except OSError as error:
        raise UserError(f"cannot write {explain_os(error, path)}") from error
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        with _UMASK:  # it can only be read by setting it, for the whole process
            umask = os.umask(0)
            os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files; a result should be as readable as any other
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise UserError(f"cannot write {explain_os(error, path)}") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
        temporaries.discard(temporary)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` (UTF-8) atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinity are refused by ``json`` readers, so by us."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_npy(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """As ``numpy.save``, whose error on a full disk has only a number of bytes: here it is the system's."""
    array = np.ascontiguousarray(array) if array.ndim else array
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.reshape(-1).view(np.uint8).data)


def json_lines(path: str | os.PathLike[str], text: str) -> tuple[list[Any], bool]:
    """The values of a text of one JSON value a line, without empty lines; and whether the last line was left out,
    which a writer that was killed leaves unfinished.

    Raises:
        UserError: another line is no JSON.
    """
    lines = text.splitlines()
    values: list[Any] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values.append(json.loads(line))
        except ValueError:
            if number == len(lines):
                return values, True
            raise UserError(f"{path} line {number} is not valid JSON: remove the line") from None
    return values, False


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path") from None
    except OSError as error:
        raise UserError(f"cannot read {explain_os(error, path)}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): restore it or make it again") from None
