"""Looking at every sample of a dataset once: is it whole, of the right shapes, and in a sane range?

A manifest is ``manifest.jsonl``, one line a sample (its key, size, value ranges, or the reason why it is bad), and
``summary.json``, the counts and ranges over all of them.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from scaling_perception.data.contents import contents_of
from scaling_perception.data.selection import open_subset
from scaling_perception.data.sources import taken
from scaling_perception.data.sources.base import LeftOut, tolerating
from scaling_perception.support.again import replacing
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.failures import not_damage
from scaling_perception.support.files import write_json
from scaling_perception.support.streams import print_message
from scaling_perception.tasks import TASKS, TaskOptions, get_task
from scaling_perception.tasks.base import Task, valid_of

MANIFEST = "manifest.jsonl"
SUMMARY = "summary.json"
UNITS = {field: unit for task in TASKS.values() for field, unit in task.ranges.items()}
"""What the ranges in the summary are of -> their unit."""

_CHECK_SIZE = 64  # pixels of the trial encoding: small, as only its errors matter
_MOST_LISTED = 100  # bad samples that the summary repeats


class RawSamples:
    """The raw samples of a dataset for some tasks, in one fixed order; opened alike in every process.

    Tasks whose sources are the same (the scenes hold all fields) share one pass over it; others follow one another.

    Args:
        dataset, root, split: as for ``open_source``. tasks: names; empty = all that the dataset serves.
        count, start: the part to use (0 = all). resolution: to render scenes at. options: further ones of the source.

    Raises:
        UserError: unknown dataset or task, wrong folder, or an ambiguous choice.
    """

    def __init__(
        self,
        dataset: str,
        root: str,
        split: str,
        tasks: Iterable[str],
        count: int,
        start: int,
        resolution: int,
        options: Mapping[str, Any] = MappingProxyType({}),
    ):
        from scaling_perception.data.sources import ENDLESS, SOURCES

        if dataset not in SOURCES:
            raise UserError(f"unknown dataset '{dataset}'{did_you_mean(dataset, SOURCES)}")
        served = tuple(SOURCES[dataset][1])
        usual = [task for task in served if get_task(task).default]
        wanted = tuple(dict.fromkeys(tasks))
        if not wanted and len(served) > 1 and dataset not in ENDLESS:
            raise UserError(f"{dataset} serves {', '.join(served)}: say which with --tasks")
        for task in wanted:
            get_task(task)
            if task not in served:
                raise UserError(f"{dataset} does not serve {task}: choose from {', '.join(served)} with --tasks")
        if dataset in ENDLESS and not count:
            raise UserError(f"the {dataset} have no end: say how many with --count")
        self.options = dict(options)
        self.groups: list[tuple[Any, range, list[str]]] = []
        for task in wanted or usual:
            source, chosen = open_subset(dataset, root, split, task, count, start, resolution, **options)
            for other, _, names in self.groups:
                if not hasattr(source, "file_paths") and other.fingerprint() == source.fingerprint():
                    names.append(task)
                    break
            else:
                self.groups.append((source, chosen, [task]))
        self.tasks = [task for _, _, names in self.groups for task in names]

    def __len__(self) -> int:
        return sum(len(chosen) for _, chosen, _ in self.groups)

    def fingerprint(self) -> list[dict[str, Any]]:
        """JSON-able description of what is read, in order."""
        return [
            {"tasks": names, "first": chosen.start, "count": len(chosen), "source": source.fingerprint()}
            for source, chosen, names in self.groups
        ]

    def contents(self) -> dict[str, str]:
        """Path -> hash of the content of every file that is read; {} for sources without files."""
        return {path: made for s, chosen, _ in self.groups for path, made in contents_of(s, chosen).items()}

    def paths(self, index: int) -> list[str]:
        """The files of raw sample ``index``, the picture first; [] for sources without files."""
        source, place, _ = self._place(index)
        return source.file_paths([place])[1] if hasattr(source, "file_paths") else []

    def stamp(self, index: int) -> str:
        """A digest of the names, sizes and times of a sample's files; '' for sources without files."""
        source, place, _ = self._place(index)
        if not hasattr(source, "file_paths"):
            return ""
        root, paths = source.file_paths([place])
        return hashlib.blake2b(repr([_seen(root, path) for path in paths]).encode(), digest_size=8).hexdigest()

    def taken(self, dataset: str, root: str, split: str) -> list[str]:
        """A line a source: how many samples are used, and of how many; and what it notes of those left out."""
        lines = []
        for source, chosen, names in self.groups:
            line = taken(source, dataset, root, split, names[0], **self.options)
            lines.append(line if len(chosen) == len(source) else f"{line}; {len(chosen)} of them, from {chosen.start}")
            lines += [f"note: {note}" for note in (*getattr(source, "notes", ()), *getattr(source, "assumed", ()))]
        return lines

    def read(self, index: int) -> tuple[Mapping[str, Any], list[str]]:
        """Raw sample ``index`` and the tasks that it serves."""
        source, place, names = self._place(index)
        return source[place], names

    def _place(self, index: int) -> tuple[Any, int, list[str]]:
        for source, chosen, names in self.groups:
            if index < len(chosen):
                return source, chosen[index], names
            index -= len(chosen)
        raise IndexError(index)


def _seen(root: Path, path: str) -> tuple[str, int, int]:
    try:
        found = os.stat(root / path)
    except OSError:
        return path, -1, -1
    return path, found.st_size, found.st_mtime_ns


def reason(error: Exception) -> str:
    """One line for why a sample is bad. What a decoder raises on a broken file is its own affair, so any error counts.

    Raises:
        MemoryError: passed on, as it says nothing about the sample.
    """
    if isinstance(error, MemoryError):
        raise error
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def check_sample(raw: Mapping[str, Any], tasks: Iterable[str], options: TaskOptions) -> dict[str, Any]:
    """Check a raw sample for its tasks.

    Returns:
        JSON-able: key, size [H, W], and by task ``valid`` (fraction of valid pixels) and value ranges: ``depth``
        [least, most] metres; ``flow`` [least, most] of either component in pixels; ``visible`` fraction of the picture;
        ``label`` class. ``untrainable`` where it lacks the picture to learn, and can be evaluated on.

    Raises:
        UserError: what is wrong with it. LeftOut: it is to be evaluated on and asks for nothing.
    """
    key = raw.get("key")
    if not isinstance(key, str) or not key:
        raise UserError("the sample has no key")
    image = np.asarray(raw["image"])
    found: dict[str, Any] = {"key": key, "size": list(image.shape[:2])}
    for task in tasks:
        lacking = _untrainable(raw, get_task(task))
        for name in (name for name in get_task(task).pictures if name not in lacking):
            picture = np.asarray(raw[name]) if name in raw else None
            if picture is None or picture.dtype != np.uint8 or picture.shape != (*image.shape[:2], 3):
                shape = "absent" if picture is None else f"{picture.dtype} {picture.shape}"
                raise UserError(f"{name} is {shape}: it must be uint8 ({image.shape[0]}, {image.shape[1]}, 3)")
        if lacking:
            _ask(raw, task)
            found["untrainable"] = True
        found |= ranges_of(raw, [task])
        if lacking:
            get_task(task).conditions(raw, _CHECK_SIZE, options)
            continue
        for sample in get_task(task).encode(raw, _CHECK_SIZE, options):
            if not np.isfinite(sample["target"][sample["valid"]]).all():
                raise UserError(f"{task} encodes to values that are not finite")
    return found


def _untrainable(raw: Mapping[str, Any], task: Task) -> tuple[str, ...]:
    """The pictures that a sample lacks which has the truth to evaluate on in another form."""
    if not any(raw.get(name) is not None for name in task.one_of):
        return ()
    return tuple(name for name in task.pictures if name in task.one_of and raw.get(name) is None)


def _ask(raw: Mapping[str, Any], task: str) -> None:
    try:
        get_task(task).check(raw)
    except UserError as error:
        raise LeftOut(str(error)) from None


def ranges_of(raw: Mapping[str, Any], tasks: Iterable[str]) -> dict[str, Any]:
    """Least and most depth (metres) and so on of a sample for its tasks, as ``check_sample`` has them.

    Raises:
        UserError: the truth is missing, not finite, or too little of it is valid; the message names the sample.
    """
    size = np.asarray(raw["image"]).shape[:2] if "image" in raw else (0, 0)
    found: dict[str, Any] = {}
    try:
        for task in tasks:
            found |= get_task(task).inspect(raw, size)
    except UserError as error:
        raise UserError(f"sample '{raw.get('key', '?')}': {error}") from None
    return found


def wider(ranges: dict[str, list[float]], found: Mapping[str, Any]) -> None:
    """Let ranges take in those of another sample."""
    for field in UNITS:
        if field in found:
            values = np.atleast_1d(found[field])
            low, high = ranges.get(field, [math.inf, -math.inf])
            ranges[field] = [min(low, float(values.min())), max(high, float(values.max()))]


def widen_depth(ranges: dict[str, list[float]], raw: Mapping[str, Any]) -> None:
    """Let ranges take in the valid depths (metres) of a raw sample, if it has any."""
    if raw.get("depth") is None or raw.get("relative"):
        return
    depth = np.asarray(raw["depth"])
    values = depth[valid_of(raw, depth.shape[:2]) & np.isfinite(depth)]
    if values.size:
        wider(ranges, {"depth": [float(values.min()), float(values.max())]})


class Checker:
    """``checker(index)`` -> JSON of {index, stamp of the sample's files, manifest line}; made once in each process.

    Text, because a dictionary that comes from another process has its keys in another order.
    """

    def __init__(self, spec: tuple[Any, ...]):
        with tolerating():
            self.samples = RawSamples(*spec)

    def __call__(self, index: int) -> str:
        stamp = self.samples.stamp(index)  # before it is read: what changes from now on is noticed next time
        try:
            raw, tasks = self.samples.read(index)
            line = {"index": index, "ok": True, "tasks": tasks, **check_sample(raw, tasks, TaskOptions())}
        except Exception as error:
            if not isinstance(error, UserError) and (why := not_damage(error)):  # says nothing of the sample
                raise UserError(f"cannot read raw sample {index}: {why}") from error
            line = {"index": index, "ok": False, "reason": reason(error)}
            line |= {"left_out": True} if isinstance(error, LeftOut) else {}
        return json.dumps({"index": index, "stamp": stamp, "line": line})


_DEPTHS = (1e-3, 1e4)  # metres: 1 mm to 10 km


def unlikely(ranges: Mapping[str, Sequence[float]]) -> list[str]:
    """What the ranges of a summary say of a wrong set-up, one line each."""
    found, (least, most) = [], _DEPTHS
    low, high = ranges.get("depth", _DEPTHS)
    if low < least or high > most:
        found.append(
            f"depth is {low:g} to {high:g} m, outside 1 mm to 10 km: depth_scale is stored units a metre (1000 for "
            "millimetres): is it the wrong way round?"
        )
    facing = min(ranges.get("normals_facing", [1.0]))
    if facing < 0.5:
        found.append(
            f"in one sample only {facing:.0%} of the normals face the camera, as every visible surface does: x is "
            "right, y is down and z points away from the camera (z < 0 on a wall ahead): is a sign turned?"
        )
    return found


def say_ranges(ranges: dict[str, list[float]]) -> None:
    """Print the ranges of a summary, and on stderr what they say of a wrong set-up."""
    for name, (low, high) in ranges.items():
        print(f"{name}: {low:.4g} .. {high:.4g}{UNITS.get(name, '')}")
    for note in unlikely(ranges):
        print_message(f"warning: {note}")


def write_manifest(
    out: Path, lines: Iterable[dict[str, Any]], about: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Write manifest and summary, each with the record of its ``settings`` (``support.again``); a key that comes twice
    makes the second sample bad.

    Returns:
        The summary: ``about``, samples, good, bad, left_out (whole, and of no use as published),
        untrainable (of the good ones, to be evaluated on alone), sizes {"WxH": count},
        ranges {field: [least, most]}, bad_samples and left_out_samples (the first ones).
    """
    seen: dict[tuple[str, str], int] = {}
    sizes: dict[str, int] = {}
    ranges: dict[str, list[float]] = {}
    bad: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    count = untrainable = 0
    with replacing(out / MANIFEST, settings) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for line in lines:
            count += 1
            if line["ok"]:
                name = (line["key"], ",".join(line["tasks"]))
                if name in seen:
                    again = f"key '{line['key']}' is also that of sample {seen[name]}"
                    line = {"index": line["index"], "ok": False, "reason": again}
                else:
                    seen[name] = line["index"]
            if line["ok"]:
                size = f"{line['size'][1]}x{line['size'][0]}"
                sizes[size] = sizes.get(size, 0) + 1
                wider(ranges, line)
                untrainable += line.get("untrainable", False)
            else:
                (left_out if line.get("left_out") else bad).append(line)
            file.write(json.dumps(line) + "\n")
        file.flush()
    summary = {
        **about,
        "samples": count,
        "good": count - len(bad) - len(left_out),
        "bad": len(bad),
        "left_out": len(left_out),
        "untrainable": untrainable,
        "sizes": sizes,
        "ranges": ranges,
        "bad_samples": bad[:_MOST_LISTED],
        "left_out_samples": left_out[:_MOST_LISTED],
    }
    with replacing(out / SUMMARY, settings) as temporary:
        write_json(temporary, summary)
    return summary
