"""A person's own data: a manifest (CSV or JSON lines), or folders whose files share names."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scaling_perception.data import formats
from scaling_perception.data.sources.base import Entry, FileSource, list_files, refuse_no_text
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.tables import read_table, read_text
from scaling_perception.tasks import TASKS
from scaling_perception.tasks.amodal import mask_from_whole
from scaling_perception.tasks.samples import to_unit

SERVED = {name: task for name, task in TASKS.items() if task.columns}
FILE_COLUMNS = tuple(dict.fromkeys(c for t in SERVED.values() for c in (*t.columns, *t.optional_columns)))
COLUMNS = (*FILE_COLUMNS, "depth_scale", "label", "key", "split")
KINDS = ("depth", "inverse", "disparity")
MANIFESTS = ("manifest.csv", "manifest.jsonl")


class Folder(FileSource):
    """Either of two layouts.

    A manifest: ``root`` is the file, or a folder with ``manifest.csv`` or ``manifest.jsonl``. Columns are ``COLUMNS``;
    file names are relative to the manifest. With a ``split`` column only the rows of the split are taken; without one,
    all. ``key`` is the image's path without its suffix unless given.

    Folders: ``root/image/…``, ``root/depth/…`` and so on, named as the file columns; files that belong together have
    the same name up to the suffix. ``root/<split>/image/…`` is taken first where it exists, and all of these are split
    all; without such folders every split is everything, which ``prepare`` and ``train`` refuse for any but train and
    all.

    ``val_share`` splits data that has no splits: by a hash of each name, so that a sample stays where it is when
    others are added.

    A depth file is what ``formats.read_depth`` reads, a flow file what ``formats.read_flow`` reads. For amodal data at
    least one of whole and whole_mask is needed: a missing mask is made from whole by pix2gestalt's threshold, and a
    missing whole leaves data to evaluate on, not to train on.

    Args:
        depth_scale: stored units a metre where a row has none; 0: 1000 for integers, 1 for floats.
        min_depth, max_depth: metres; depths outside are invalid.
        depth_kind: what is stored: depth, inverse (1 / metres) or disparity (pixels); of the last two what is not above
            0 is unknown.
        focal_baseline: pixels times metres: depth = focal_baseline / disparity.
        relative: depth has no unit: it is known up to a factor.
        val_share: in (0, 1): the share of the names that is the split val; 0 does not split.
    """

    NAME = "folder"
    TASKS = tuple(SERVED)
    SPLITS = ("train", "val", "test", "all")
    LAYOUT = "manifest.csv, manifest.jsonl, or the folders image, depth, image2, flow, visible_mask, whole, whole_mask"

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        task: str,
        *,
        count: int = 0,
        depth_scale: float = 0.0,
        min_depth: float = 1e-5,
        max_depth: float = math.inf,
        depth_kind: str = "depth",
        focal_baseline: float = 0.0,
        relative: bool = False,
        val_share: float = 0.0,
    ) -> None:
        _check_kind(depth_kind, focal_baseline, relative)
        if not 0 <= val_share < 1:
            raise UserError(f"val_share {val_share} must be in [0, 1): the share of the samples that is val")
        if not (depth_scale >= 0 and math.isfinite(depth_scale)):
            raise UserError(f"depth_scale {depth_scale} must be above 0 (units a metre), or 0: the file decides")
        if not 0 <= min_depth < max_depth:
            raise UserError(f"min_depth {min_depth} and max_depth {max_depth} must rise from 0: give both in metres")
        self.depth_scale, self.eight_bits = depth_scale or None, bool(depth_scale)
        self.depth_range = (min_depth, max_depth)
        self.depth_kind, self.focal_baseline, self.relative = depth_kind, focal_baseline, relative
        self.val_share, self.manifest = val_share, ""
        super().__init__(root, split, task, count=count)

    def options(self) -> dict[str, Any]:
        near, far = self.depth_range
        far = far if math.isfinite(far) else None  # JSON has no infinity
        usual = {"depth_kind": "depth", "focal_baseline": 0.0, "relative": False, "val_share": 0.0}
        further = {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}
        return {**super().options(), "depth_scale": self.depth_scale, "min_depth": near, "max_depth": far, **further}

    def _root_of_file(self, path: Path) -> Path:
        if path.suffix.lower() not in (".csv", ".jsonl"):
            raise UserError(f"{path} is no manifest: give a .csv or .jsonl file, or a folder that holds {self.LAYOUT}")
        self.manifest = path.name
        return path.parent

    def find(self) -> list[Entry]:
        manifests = [name for name in MANIFESTS if (self.root / name).is_file()]
        if not self.manifest and len(manifests) > 1:
            raise UserError(f"{self.root} holds both {' and '.join(manifests)}: give the path of one of them")
        self.manifest = self.manifest or "".join(manifests)
        found = self._from_manifest(self.root / self.manifest) if self.manifest else self._from_folders()
        for path in (entry.files.get("depth", "") for entry in found):
            if path.lower().endswith(".exr"):
                formats.need_exr(self.root / path)  # once, and not for every sample
                break
        found = self._share(found) if self.val_share else found
        if self.depth_scale is None and self.depth_kind == "depth" and not self.relative:
            if any("depth" in entry.files and "depth_scale" not in entry.values for entry in found):
                self.assumed.append("depth without depth_scale: integers are read as millimetres, floats as metres")
        return found

    def _share(self, entries: list[Entry]) -> list[Entry]:
        """Of data without splits those of the split, by their names."""
        if not self.whole:
            raise UserError(f"{self.root} has splits of its own: leave val_share out")
        if self.split == "test":
            raise UserError("val_share makes the splits train and val, and no test: choose one of them")
        self.whole, self.notes = False, []
        if self.split == "all":
            return entries
        chosen = [one for one in entries if (_fraction(one.key) < self.val_share) == (self.split == "val")]
        if not chosen:
            raise UserError(
                f"val_share {self.val_share:g} puts none of the {len(entries)} samples of {self.root} into "
                f"'{self.split}': take another share"
            )
        return chosen

    def _read(self, field: str, path: Path, entry: Entry) -> Any:
        if field != "depth" or self.depth_kind == "depth":
            return super()._read(field, path, entry)
        scale = entry.values.get("depth_scale", self.depth_scale)
        stored = formats.read_stored(path, eight_bits=scale is not None)
        if scale is None and stored.dtype.kind in "iu":
            raise UserError(
                f"{path} holds integers: give depth_scale, stored units of {self.depth_kind} (256 in KITTI)"
            )
        factor = self.focal_baseline or 1.0
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            values = formats.float32(stored) / np.float32(scale or 1)
            return np.where(values > 0, np.float32(factor) / values, np.float32(0))

    def __getitem__(self, index: int) -> dict[str, Any]:
        raw = super().__getitem__(index)
        if self.relative and "depth" in raw:
            raw["relative"] = True
        if "whole" in raw and "whole_mask" not in raw:
            raw["whole_mask"] = mask_from_whole(to_unit(raw["whole"]))
        return raw

    # A manifest

    def _from_manifest(self, path: Path) -> list[Entry]:
        entries, splits, rows = [], set(), 0
        missing: list[str] = []
        for line, row in _rows(path):
            rows += 1
            where = f"{path} line {line}"
            for column in row:
                if column not in COLUMNS:
                    raise UserError(f"{where}: unknown column '{column}'{did_you_mean(column, COLUMNS)}")
            if "split" in row:
                splits.add(str(row["split"]))
                if self.split not in ("all", str(row["split"])):
                    continue
            entries.append(self._entry(row, where, missing))
        if missing:
            shown = "; ".join(missing[:10]) + ("; …" if len(missing) > 10 else "")
            are = "1 file does" if len(missing) == 1 else f"{len(missing)} files do"
            raise UserError(f"{path}: {are} not exist: {shown}: restore them or drop the lines")
        if rows and not splits:
            self.not_split()
        if rows and not entries:
            raise UserError(f"{path} has no row of split '{self.split}': choose of {', '.join(sorted(splits))}")
        if not rows:
            columns = ", ".join(SERVED[self.task].columns)
            raise UserError(f"{path} has no rows: write one a sample, with the columns {columns}")
        return entries

    def _entry(self, row: dict[str, Any], where: str, missing: list[str]) -> Entry:
        files = {}
        for column in (*SERVED[self.task].columns, *SERVED[self.task].optional_columns):
            name = row.get(column)
            if name in (None, ""):
                continue
            if not isinstance(name, str):
                raise UserError(f"{where}: {column} is {name!r}: give the name of a file")
            if not os.path.isfile(self.root / name):  # which is no error where the name is none
                missing.append(f"line {where.rsplit(' ', 1)[1]}: {column} {name}")
            files[column] = name
        for column in SERVED[self.task].columns:
            if column not in files:
                raise UserError(f"{where} has no {column}, which {self.task} needs: fill in the column")
        self._need_whole(files, where)
        values: dict[str, Any] = {}
        if row.get("depth_scale") not in (None, "") and "depth" in files:
            scale = _number(row["depth_scale"], float)
            if scale is None or not (scale > 0 and math.isfinite(scale)):
                raise UserError(f"{where}: depth_scale '{row['depth_scale']}' must be above 0: stored units a metre")
            values["depth_scale"] = scale
        if row.get("label") not in (None, ""):
            values["label"] = _number(row["label"], int)
            if values["label"] is None or not 0 <= values["label"] < 2**31:
                raise UserError(f"{where}: label '{row['label']}' is no class: give an integer from 0, or nothing")
        key = str(row.get("key") or os.path.splitext(files["image"])[0])
        refuse_no_text(self.root, [key], f"{where}: the key")
        return Entry(key, files, values)

    def _need_whole(self, files: dict[str, str], where: str) -> None:
        any_of = SERVED[self.task].one_of
        if any_of and not set(any_of) & set(files):
            raise UserError(f"{where} has neither {' nor '.join(any_of)}: {self.task} needs one of them")

    # Folders

    def _from_folders(self) -> list[Entry]:
        parts = [split for split in ("train", "val", "test") if (self.root / split / "image").is_dir()]
        if self.split == "all" and not (self.root / "image").is_dir() and parts:
            found = [(part, entry) for part in parts for entry in self._of_folder(part)]
            return [Entry(f"{part}/{entry.key}", entry.files) for part, entry in found]
        if parts and self.split not in ("all", *parts) and not (self.root / "image").is_dir():
            lacking = self.root / self.split / "image"
            raise UserError(f"{lacking} is missing: choose of the splits {', '.join(parts)}, or all")
        return self._of_folder(self.split if self.split in parts else "")

    def _of_folder(self, inside: str) -> list[Entry]:
        base = self.root / inside
        if not inside:
            self.not_split()
        by_field = {}
        for field in (*SERVED[self.task].columns, *SERVED[self.task].optional_columns):
            if (base / field).is_dir():
                by_field[field] = self._by_stem(inside, field)
            elif field in SERVED[self.task].columns:
                raise UserError(f"{base / field} is missing: {self.task} needs it; the root should hold {self.LAYOUT}")
        self._need_whole(dict.fromkeys(by_field, ""), str(base))
        stems = sorted(set().union(*by_field.values()))
        for field, found in by_field.items():
            if lost := [stem for stem in stems if stem not in found]:
                counts = ", ".join(f"{name} {len(paths)}" for name, paths in by_field.items())
                raise UserError(
                    f"{base / field} has no file '{lost[0]}', {len(lost)} are missing ({counts}): "
                    "restore them or remove those of the other folders"
                )
        return [Entry(stem, {field: found[stem] for field, found in by_field.items()}) for stem in stems]

    def _by_stem(self, inside: str, field: str) -> dict[str, str]:
        folder = f"{inside}/{field}" if inside else field
        found: dict[str, str] = {}
        for path in list_files(self.root, folder):
            stem = os.path.splitext(path[len(folder) + 1 :])[0]
            if stem in found:
                raise UserError(f"{self.root / found[stem]} and {self.root / path} share a name: keep one of them")
            found[stem] = path
        return found


def _check_kind(kind: str, focal_baseline: float, relative: bool) -> None:
    if kind not in KINDS:
        raise UserError(f"folder has no depth_kind '{kind}'{did_you_mean(kind, KINDS)}")
    if not (focal_baseline >= 0 and math.isfinite(focal_baseline)):
        raise UserError(
            f"focal_baseline {focal_baseline} must be above 0: focal length in pixels times baseline in metres"
        )
    if focal_baseline and kind != "disparity":
        raise UserError(f"focal_baseline is for depth_kind=disparity, not for {kind}: leave it out")
    if kind == "disparity" and bool(focal_baseline) == relative:
        raise UserError(
            "depth_kind=disparity needs focal_baseline (focal length in pixels times baseline in metres), or "
            "relative=true for depth without a unit: give one of them"
        )


def _fraction(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 2**48


def _number(value: Any, kind: type) -> Any:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if kind is int:
        return int(number) if math.isfinite(number) and number == int(number) else None
    return number


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a manifest; blank lines are skipped."""
    yield from (_csv_rows if path.suffix.lower() == ".csv" else _json_rows)(path)


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    table = read_table(path)
    columns = {name: table.text(name) for name in table.names}
    if any("," in word for word in columns.get("depth_scale", ())):  # decimal commas
        columns["depth_scale"] = ["" if math.isnan(x) else repr(float(x)) for x in table.numbers("depth_scale")]
    for at, line in enumerate(table.lines):
        yield line, {name: words[at].strip() for name, words in columns.items()}


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is no JSON ({error}): write one object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number} is no JSON object: write one object a line")
        yield number, row
