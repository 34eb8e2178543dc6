"""Hashes of files' contents, computed once: an index remembers them with the times that prove nothing was changed.

The index is a JSON file a folder of data, in the user's cache folder. A remembered hash is believed while size, both
times (modified, changed), inode and device are the same. A file that had been touched less than ``_SETTLED`` seconds
before it was hashed is hashed again next time: within one tick of the clock it may have been written twice. Deleting
the index costs time and nothing else.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scaling_perception.support.errors import UserError
from scaling_perception.support.files import write_text

_SETTLED = 2.0  # seconds: the coarsest clock of a common file system (FAT)
_THREADS = 8  # hashing lets go of the interpreter; more only queue at the disk
_SHOW_FROM = 1 << 30  # bytes to hash from which progress is shown
_NAMED = 3  # files or samples that a message names


def digests(root: Path, paths: Iterable[str]) -> dict[str, str]:
    """SHA-256 (32 hexadecimal digits of it) of each of ``paths``, relative to ``root``.

    Raises:
        UserError: a file is missing or cannot be read, naming it.
    """
    wanted = sorted(set(paths))
    index = _Index(root)
    found: dict[str, str] = {}
    stale: list[tuple[str, list[int]]] = []
    for path in wanted:
        stamp = _stamp(f"{root}/{path}")
        held = index.entries.get(path)
        if held is not None and held[:-1] == stamp:
            found[path] = held[-1]
        else:
            stale.append((path, stamp))
    if stale:
        begin = time.time()
        for (path, stamp), made in zip(stale, _hashed(root, stale), strict=True):
            found[path] = made
            if max(stamp[1:3]) / 1e9 < begin - _SETTLED and stamp == _stamp(f"{root}/{path}"):
                index.entries[path] = [*stamp, made]
            else:
                index.entries.pop(path, None)
        index.save()
    return found


def combined(found: Mapping[str, str]) -> str:
    """One digest of names and hashes."""
    return hashlib.sha256("".join(f"{path}\t{found[path]}\n" for path in sorted(found)).encode()).hexdigest()


def described(source: Any, found: Mapping[str, str]) -> dict[str, Any]:
    """The source's fingerprint; with ``contents``, a digest of the table ``found`` of :func:`contents_of`, if any."""
    return {**source.fingerprint(), **({"contents": combined(found)} if found else {})}


def contents_of(source: Any, indices: Sequence[int] | None = None) -> dict[str, str]:
    """Path -> hash of the files of some samples of a source (None: of all); {} for a source that has no files."""
    if not hasattr(source, "file_paths"):
        return {}
    root, paths = source.file_paths(range(len(source)) if indices is None else indices)
    return digests(root, paths)


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs between two tables of path -> hash, in words: ``2 changed (a, b), 1 new (c)``, or ''."""
    both = before.keys() & now.keys()
    kinds = (
        ("changed", sorted(path for path in both if before[path] != now[path])),
        ("new", sorted(now.keys() - before.keys())),
        ("gone", sorted(before.keys() - now.keys())),
    )
    return ", ".join(f"{len(names)} {kind} ({first_names(names)})" for kind, names in kinds if names)


def first_names(names: Sequence[str]) -> str:
    """The first few of ``names``."""
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


def cache_folder() -> Path:
    """Where this package keeps what it can make again."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(base).expanduser() / "scaling-perception"


def _stamp(path: str) -> list[int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): restore it or check the path") from None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def _hashed(root: Path, stale: Sequence[tuple[str, list[int]]]) -> Iterable[str]:
    def one(path: str) -> str:
        try:
            with open(root / path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()[:32]
        except OSError as error:
            raise UserError(f"{root / path} cannot be read ({error.strerror}): restore it or check the path") from None

    with ThreadPoolExecutor(_THREADS) as pool:
        made: Iterable[str] = pool.map(one, (path for path, _ in stale))
        if sum(stamp[0] for _, stamp in stale) >= _SHOW_FROM:
            from scaling_perception.support.progress import progress

            made = progress(made, len(stale), f"hash the files of {root}, once")
        yield from made


class _Index:
    """path -> [size, modified, changed, inode, device, hash] of one folder of data."""

    def __init__(self, root: Path) -> None:
        real = os.path.realpath(root)
        name = hashlib.sha256(real.encode()).hexdigest()[:16]
        self.path = cache_folder() / "contents" / f"{name}.json"
        self.entries: dict[str, list[Any]] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            held = json.loads(self.path.read_text(encoding="utf-8"))
            if held["format"] == 1 and held["root"] == real:
                self.entries = dict(held["files"])
        self._about = {"format": 1, "root": real}

    def save(self) -> None:
        with contextlib.suppress(OSError, UserError, RuntimeError):  # nothing but time depends on it
            write_text(self.path, json.dumps({**self._about, "files": self.entries}))
