"""What all sources of files share: finding, checking, reading, fingerprints.

A concrete source says which files make a sample (``find``) and in which units; everything else is here.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import errno
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from scaling_perception.data import formats
from scaling_perception.data.images import orientation, turned
from scaling_perception.data.masks import read_mask
from scaling_perception.support.errors import UserError, did_you_mean

_PICTURES = ("image", "image2", "whole")
_MASKS = ("visible_mask", "whole_mask", "valid_mask", "invalid_mask", "occluded")


TOLERANT: contextvars.ContextVar[bool] = contextvars.ContextVar("tolerant", default=False)
"""Whether missing and empty files are taken, see ``tolerating``."""


@contextlib.contextmanager
def tolerating() -> Iterator[None]:
    """Sources opened in the block take missing and empty files, which are then bad when they are read: so that a check
    can count them all."""
    token = TOLERANT.set(True)
    try:
        yield
    finally:
        TOLERANT.reset(token)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One sample before it is read.

    Attributes:
        key: stable id, unique within the source.
        files: field -> path, relative to the source's root, with forward slashes.
        values: what is no file: ``label``, ``depth_scale``.
    """

    key: str
    files: Mapping[str, str]
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class LeftOut(UserError):
    """A sample whose files are whole and which is of no use as it was published: it is left out and counted."""


class FileSource:
    """Raw samples of files under ``root`` (see ``data.sources`` for their fields); random access, picklable.

    Args:
        root: the data set's folder.
        split: one of ``SPLITS``.
        task: one of ``TASKS``; only the files that it needs are asked for.
        count: at most so many samples, the first ones; 0 takes all.

    Raises:
        UserError: missing folder or files, nothing found, contradictory lists. Reading a sample raises it too, for a
            damaged file, sizes that differ, or a map without a valid pixel; every message names the file.
    """

    NAME: ClassVar[str]
    TASKS: ClassVar[tuple[str, ...]]
    SPLITS: ClassVar[tuple[str, ...]] = ("train", "val", "all")
    LAYOUT: ClassVar[str]
    """What the folder holds, for messages."""

    depth_scale: float | None = 1000.0
    """Stored units a metre; None lets the kind of file decide (see ``formats.read_depth``)."""
    eight_bits = False
    """Whether depth may be stored in 8 bits: not where all that is published has 16, unless a scale was given."""
    depth_range: tuple[float, float] = (1e-5, float("inf"))
    """Metres, both ends excluded; other depths are invalid."""

    def __init__(self, root: str | os.PathLike[str], split: str, task: str, *, count: int = 0) -> None:
        self.split = split or "all"
        self.task = task
        if self.task not in self.TASKS:
            raise UserError(f"{self.NAME} has no {task}: it serves {', '.join(self.TASKS)}")
        if self.split not in self.SPLITS:
            raise UserError(f"{self.NAME} has no split '{split}'{did_you_mean(split, self.SPLITS)}")
        if count < 0:
            raise UserError(f"count {count} is below 0: give the number of samples, or 0 for all")
        if not str(root):
            raise UserError(f"{self.NAME} needs a root: the folder that holds {self.LAYOUT}")
        self.root = Path(root).expanduser()
        if not os.path.exists(self.root):
            raise UserError(f"{self.root} does not exist: give the folder that holds {self.LAYOUT}")
        if not self.root.is_dir():
            self.root = self._root_of_file(self.root)
        self.count = count
        self.notes: list[str] = []
        """What a person should know of the samples: what was left out, and why."""
        self.assumed: list[str] = []
        """How the files are read where nothing says it: `prepare` prints it."""
        self.whole = False
        """Whether the data is not split, so that every split is everything."""
        entries = self.find()
        if not entries:
            raise UserError(f"{self.root} holds no samples of {self.NAME}: it should hold {self.LAYOUT}")
        self.entries = entries[:count] if count else entries
        self._check_keys()
        self._digest, self._names = self._check_files()

    # For a concrete source

    def find(self) -> list[Entry]:
        """The entries of the split, in a fixed order."""
        raise NotImplementedError

    def _root_of_file(self, path: Path) -> Path:
        raise UserError(f"{path} is a file: give the folder that holds {self.LAYOUT}")

    def not_split(self) -> None:
        """Note that what is there does not depend on the split."""
        self.whole = True
        if self.split not in ("train", "all"):
            self.notes.append(f"{self.root} has no splits: split '{self.split}' is everything")

    def options(self) -> dict[str, Any]:
        """What else decides the samples; part of the fingerprint."""
        return {"count": self.count}

    # Checks

    def _check_keys(self) -> None:
        seen: set[str] = set()
        for entry in self.entries:
            if entry.key in seen:
                raise UserError(f"{self.root}: two samples are called '{entry.key}': give every sample its own name")
            seen.add(entry.key)

    def _check_files(self) -> tuple[str, str]:
        """Refuse missing and empty files; return a hash of names, sizes and values, and one without sizes."""
        wanted = sorted({path for entry in self.entries for path in entry.files.values()})
        refuse_no_text(self.root, wanted)
        sizes = file_sizes(self.root, wanted)
        missing = [path for path in wanted if path not in sizes]
        if missing and not TOLERANT.get():
            some = ", ".join(missing[1:10]) + ", …" * (len(missing) > 10)
            more = f" (and {len(missing) - 1} more files: {some})" if len(missing) > 1 else ""
            raise UserError(f"{self.root / missing[0]} is missing{more}: restore it or take the sample off the list")
        digest, names = hashlib.sha256(), hashlib.sha256()
        for path in wanted:
            if sizes.get(path) == 0 and not TOLERANT.get():
                raise UserError(f"{self.root / path} is empty: copy or download it again")
            digest.update(f"{path}\t{sizes.get(path)}\n".encode())
        for entry in self.entries:
            line = repr((entry.key, sorted(entry.files.items()), sorted(entry.values.items()))).encode()
            digest.update(line)
            names.update(line)
        return digest.hexdigest(), names.hexdigest()

    # What everyone uses

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"{self.NAME}({self.root}, split={self.split}, task={self.task}, {len(self)} samples)"

    def fingerprint(self) -> dict[str, Any]:
        """JSON values that tell which samples these are: names, sizes of files and options, but not where they lie.

        A file that was rewritten in its size leaves it as it is: see ``contents.described``, which reads the files.
        """
        return {
            "name": self.NAME,
            "split": self.split,
            "task": self.task,
            "length": len(self),
            "files": self._digest,
            "entries": self._names,
            "options": self.options(),
        }

    def file_paths(self, indices: Iterable[int]) -> tuple[Path, list[str]]:
        """The root, and the files of some samples, relative to it; of each sample the picture first."""
        chosen = (self.entries[index].files for index in indices)
        return self.root, [path for files in chosen for path in {"image": files["image"], **files}.values()]

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[int(index)]
        found = self._arrays(entry)
        masks = {field: found.pop(field) for field in ("valid_mask", "invalid_mask") if field in found}
        raw: dict[str, Any] = {"key": entry.key, **found}
        for field in formats.VECTORS.keys() & raw.keys():
            raw[field], raw["valid"] = raw[field]
        if "depth" in raw:
            depth, (near, far) = raw["depth"], self.depth_range
            with np.errstate(invalid="ignore"):
                raw["valid"] = np.isfinite(depth) & (depth > near) & (depth < far)
            raw["depth"] = np.where(np.isfinite(depth), depth, np.float32(0))
        if "valid_mask" in masks:
            raw["valid"] &= masks["valid_mask"]
        if "invalid_mask" in masks:
            raw["valid"] &= ~masks["invalid_mask"]
        if "valid" in raw and not raw["valid"].any():
            self._refuse_invalid(entry, raw)
        if entry.values.get("label") is not None:
            raw["label"] = int(entry.values["label"])
        return raw

    def _arrays(self, entry: Entry) -> dict[str, Any]:
        """What every file of a sample holds, all of them as they are stored, or all set upright by their EXIF tags.

        Truth lies on the pixels as they are stored, unless the sizes say that it was made for the upright picture.

        Raises:
            UserError: sizes that differ either way.
        """
        found = self._stored(entry)
        misfit = _misfit(found)
        if misfit and any(orientation(self.root / path) > 1 for path in entry.files.values()):
            upright = {f: self._upright(f, found[f], self.root / path) for f, path in entry.files.items()}
            if not _misfit(upright):
                return upright
        if misfit:
            path, image = self.root / entry.files[misfit], self.root / entry.files["image"]
            size, wanted = (_text(_size(found[field])) for field in (misfit, "image"))
            turn = orientation(image)
            exif = f" (as stored; its EXIF orientation is {turn})" if turn > 1 else ""
            raise UserError(f"{path} is {size} but {image} is {wanted}{exif}: give both the same size")
        return found

    def _stored(self, entry: Entry) -> dict[str, Any]:
        return {field: self._read(field, self.root / path, entry) for field, path in entry.files.items()}

    def _upright(self, field: str, value: Any, path: Path) -> Any:
        turn = orientation(path)
        if field in formats.VECTORS and turn > 1:
            raise UserError(f"{path} has an EXIF orientation, which vectors cannot follow: remove the tag")
        return value if field in formats.VECTORS else np.ascontiguousarray(turned(value, turn))

    def _read(self, field: str, path: Path, entry: Entry) -> Any:
        """What a file holds, pixels as they are stored; of vectors the field and its valid mask."""
        if field in _PICTURES:
            return formats.read_image(path, upright=False)
        if field in _MASKS:
            return read_mask(path, upright=False)
        if field == "depth":
            eight_bits = self.eight_bits or "depth_scale" in entry.values
            return formats.read_depth(path, entry.values.get("depth_scale", self.depth_scale), eight_bits)
        return formats.VECTORS[field](path)

    def _refuse_invalid(self, entry: Entry, raw: Mapping[str, Any]) -> None:
        if "depth" not in raw:
            path = self.root / next(entry.files[field] for field in formats.VECTORS if field in entry.files)
            raise UserError(f"{path} has no valid pixel: check the file and the valid mask")
        low, high = float(raw["depth"].min()), float(raw["depth"].max())
        why = f"depths {low:g}..{high:g} m, valid {self.depth_range[0]:g}..{self.depth_range[1]:g} m"
        path = self.root / entry.files["depth"]
        raise UserError(f"{path} has no valid pixel ({why}): check depth_scale and the mask")


# Sizes


def _size(value: Any) -> tuple[int, int]:
    array = value[0] if isinstance(value, tuple) else value
    return array.shape[0], array.shape[1]


def _text(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def _misfit(found: Mapping[str, Any]) -> str:
    """The first field whose size is not that of the image; empty where all are alike."""
    return next((field for field, value in found.items() if _size(value) != _size(found["image"])), "")


# Finding files


def refuse_no_text(root: Path, names: Iterable[str], what: str = "") -> None:
    """UserError when a file's name is no text, or what else would be a sample's key and is called ``what``."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            shown = name.encode("utf-8", "surrogatepass").decode("utf-8", "backslashreplace")
            with contextlib.suppress(UnicodeEncodeError):  # as it is on the disk
                shown = os.fsencode(name).decode("utf-8", "backslashreplace")
            what = what or f"{root} has a file called"
            raise UserError(f"{what} {shown}, which is not UTF-8: rename it") from None


def file_sizes(root: Path, paths: Iterable[str]) -> dict[str, int]:
    """Bytes of those of ``paths`` (relative to ``root``) that are files; one listing a folder, not one call a file."""
    by_folder: dict[str, set[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        by_folder.setdefault(folder, set()).add(name)
    sizes = {}
    for folder, names in by_folder.items():
        try:
            with os.scandir(root / folder if folder else root) as listing:
                for item in listing:
                    with contextlib.suppress(OSError):  # a link to itself: no file
                        if item.name in names and item.is_file():
                            sizes[f"{folder}/{item.name}" if folder else item.name] = item.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError:
            raise UserError(f"{root / folder} cannot be read: give yourself permission to read it") from None
        except OSError as error:
            if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
                raise
    return sizes


def list_files(root: Path, folder: str = "") -> list[str]:
    """All files below ``root / folder``, relative to ``root``, sorted.

    Hidden ones are left out, links to folders are followed.
    """
    found: list[str] = []
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: give yourself permission to read it") from None

    top = root / folder
    for place, folders, names in os.walk(top, followlinks=True, onerror=refuse):
        real = os.path.realpath(place)
        if real in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(place).relative_to(root).as_posix()
        prefix = "" if relative == "." else relative + "/"
        found += [prefix + name for name in names if not name.startswith(".")]
    return sorted(found)
