"""A check of every sample that goes on where a kill at any moment left it.

What was found is kept in ``.manifest.jsonl.part`` beside the manifest: a line that says which check it is, then one a
sample, in the order in which they were finished. A last line that a kill cut short is cut off. A sample whose files
have changed since is checked again. The file is removed once manifest and summary are written.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scaling_perception.data.contents import cache_folder
from scaling_perception.data.manifest import MANIFEST, SUMMARY, Checker, RawSamples, write_manifest
from scaling_perception.data.sources.published import published
from scaling_perception.data.workers import ordered_map
from scaling_perception.support.again import check_output, refuse_other
from scaling_perception.support.errors import UserError
from scaling_perception.support.failures import explain_os
from scaling_perception.support.progress import progress

PART = f".{MANIFEST}.part"
_TEMPORARY = re.compile(r"\.+(?:manifest|summary)\.(?!jsonl?\.settings$|jsonl\.part$).*")  # of a killed writer
_SYNC = 2.0  # seconds after which what was found is on the disk, should the machine fail
_PARTIAL = ("scenes", "regions", "every", "count")  # options that choose a part of what is published


def check_all(
    out: Path, spec: tuple[Any, ...], samples: RawSamples, settings: Mapping[str, Any], workers: int, overwrite: bool
) -> dict[str, Any]:
    """Check every sample, and write manifest and summary into ``out``, whose lock is held.

    Args:
        spec: what ``samples`` was opened with. settings: the command's, which a result that is there must share.

    Returns:
        The summary, see ``manifest.write_manifest``; with ``published`` where numbers of the split are on record.

    Raises:
        UserError: ``out`` holds the result or the beginning of another check, or cannot be written.
    """
    for left in out.iterdir():
        if _TEMPORARY.fullmatch(left.name):
            left.unlink()
    for name in (MANIFEST, SUMMARY):
        check_output(out / name, settings, overwrite)
    about = {"format": 1, "dataset": spec[0], "split": spec[2], "sources": samples.fingerprint()}
    if numbers := _published(samples, spec):
        about["published"] = {"samples": numbers, "found": len(samples)}
    total = len(samples)
    with _Part(out / PART, settings, about["sources"], samples, overwrite) as part:
        missing = np.flatnonzero(part.places < 0)
        if len(missing) < total:
            print(f"going on: {total - len(missing)} of {total} samples were checked before", file=sys.stderr)
        workers = min(workers, -(-len(missing) // 8))  # no more processes than there is work for: each takes seconds
        found = ordered_map(Checker, (spec,), map(int, missing), workers)
        with contextlib.closing(found):
            for index, row in zip(missing, progress(found, len(missing), "check"), strict=True):
                part.add(int(index), row)
        summary = write_manifest(out, part.lines(), about, settings)
    (out / PART).unlink()
    return summary


def _published(samples: RawSamples, spec: tuple[Any, ...]) -> list[int]:
    """The numbers on record, where all of a split is looked at."""
    whole = all(len(chosen) == len(source) for source, chosen, _ in samples.groups)
    return published(spec[0], spec[2]) if whole and not set(_PARTIAL) & samples.options.keys() else []


def published_line(summary: Mapping[str, Any]) -> str:
    """How many samples there are beside how many were published; empty where no number is on record."""
    if "published" not in summary:
        return ""
    numbers, found = summary["published"]["samples"], summary["published"]["found"]
    wanted = " or ".join(f"{number:,}" for number in numbers)
    nearest = min(numbers, key=lambda number: abs(number - found))
    rest = f"{nearest - found:,} are not here" if found < nearest else f"{found - nearest:,} more than that"
    here = "all of them are here" if found == nearest else f"{found:,} are here, {rest}"
    return f"published: {wanted} samples of {summary['dataset']} ({summary['split'] or 'all'}); {here}"


def default_out(dataset: str, settings: Mapping[str, Any]) -> Path:
    """A folder of the user's cache for the check of these settings."""
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / "checks" / f"{dataset}-{name}"


class _Part:
    """What a check has found so far, for a ``with``; ``places`` says where the line of each sample begins, -1 none."""

    def __init__(
        self, path: Path, settings: Mapping[str, Any], sources: Any, samples: RawSamples, overwrite: bool
    ) -> None:
        self.path, self.samples, self._synced = path, samples, time.monotonic()
        self.places = np.full(len(samples), -1, np.int64)
        head = json.loads(json.dumps({"check": 1, "settings": settings, "sources": sources}))
        with self._writing():
            self._file = open(path, "a+b")
        first = self._head()
        if first is not None and first.get("settings") != head["settings"] and not overwrite:
            self._file.close()
            refuse_other(f"{path} (a check that was begun)", first.get("settings"), settings, flags=True)
        if first == head:
            self._resume()
            return
        if first is not None:
            print(f"{path}: the data or the settings are others now, so the check begins anew", file=sys.stderr)
        self._file.truncate(0)
        self._write(json.dumps(head))

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, index: int, row: str) -> None:
        """Keep what was found of a sample: JSON of {index, stamp, line}."""
        self.places[index] = self._write(row)
        if time.monotonic() - self._synced > _SYNC:
            with self._writing():
                os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def lines(self) -> Iterator[dict[str, Any]]:
        """What was found, in the order of the samples."""
        for place in self.places:
            self._file.seek(int(place))
            yield json.loads(self._file.readline())["line"]

    def _head(self) -> dict[str, Any] | None:
        self._file.seek(0)
        line = self._file.readline()
        try:
            found = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            return {}
        return found if isinstance(found, dict) or found is None else {}

    def _resume(self) -> None:
        end = self._file.tell()
        for line in self._file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if row is None:  # cut short by a kill, or by a full disk
                break
            index = row["index"]
            self.places[index] = end if row["stamp"] == self.samples.stamp(index) else -1
            end += len(line)
        self._file.truncate(end)

    def _write(self, row: str) -> int:
        data, handle = row.encode() + b"\n", self._file.fileno()
        place = os.fstat(handle).st_size
        with self._writing():
            while data:  # past Python's buffer: what a full disk does not take must not fail again when it is closed
                data = data[os.write(handle, data) :]
        return place

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {explain_os(error, self.path)}") from None
