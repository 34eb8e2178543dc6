"""Pictures with a class each: ImageNet-1K as tensorflow-datasets writes it or as plain folders, or anybody's folders.

Pictures come as they are stored (no EXIF rotation), at native size; the task crops them. Nothing here needs TensorFlow.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scaling_perception.data.images import AGAIN
from scaling_perception.data.sources.base import TOLERANT, refuse_no_text
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.tables import read_text

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
_PLACES = {"train": ("train",), "val": ("val", "validation")}  # a split's folder; its name for tensorflow-datasets
_INFO = "dataset_info.json"
_NAMED = re.compile(r"(?<![A-Za-z0-9])(n\d{8})(?![A-Za-z0-9])")


class ImageNet:
    """Raw samples with ``image`` uint8 (H, W, 3), ``label`` int and ``key``; random access, picklable.

    ``root`` is one of:

    * a data folder of tensorflow-datasets that holds ``imagenet2012`` (or that folder, or a version in it), built with
      ``file_format="array_record"``; any other dataset of it with the features ``image`` and ``label`` will do;
    * a folder with ``train/CLASS/…`` and ``val/CLASS/…`` (ImageNet's own: ``train/n01440764/*.JPEG``);
    * a folder with ``CLASS/…`` alone, which is then the training split;
    * a folder of pictures with ImageNet's class in their names (``n01440764_10026.JPEG``), likewise in place of
      ``train`` or ``val``.

    In plain folders the classes are numbered by ``train`` alone, whichever split is read, as their names sort: those
    that are numbers as numbers (0, 1, 2, 10), the others as text, as torchvision and tensorflow-datasets do; or by a
    list of them. Folders that are hidden or hold no picture are no classes.

    Args:
        split: train or val.
        count: at most so many samples, the first ones; 0 takes all.
        labels: a text file, one class folder a line, whose label is the line's number from 0 (or the number after it);
            '' takes ``labels.txt`` in ``root`` if it is there.

    Raises:
        UserError: missing folder or files, no picture, a class that train or the labels file does not have. Reading
            a sample raises it too, for a damaged picture, naming it.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        task: str = "generation",
        *,
        count: int = 0,
        labels: str = "",
    ) -> None:
        split = split or "train"
        if split not in _PLACES:
            raise UserError(f"imagenet has no split '{split}'{did_you_mean(split, _PLACES)}")
        if count < 0:
            raise UserError(f"count {count} is below 0: give the number of samples, or 0 for all")
        layout = "imagenet2012 of tensorflow-datasets, or train/CLASS/*.JPEG"
        if not str(root):
            raise UserError(f"imagenet needs a root: the folder that holds {layout}")
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise UserError(f"{self.root} is no folder: give the one that holds {layout}")
        prepared = _prepared(self.root)
        if prepared and labels:
            raise UserError(f"labels {labels}: {prepared} has labels of its own; leave them out")
        if not prepared and not labels and (self.root / "labels.txt").is_file():
            labels = str(self.root / "labels.txt")
        self._held = _Prepared(prepared, split) if prepared else _Folders(self.root, split, labels)
        self.count = min(count or len(self._held), len(self._held))
        self.class_names: list[str] = self._held.class_names
        """By label; '' for a number that no class has."""
        if isinstance(self._held, _Folders):
            self.file_paths = self._held.file_paths

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"imagenet({self.root}, {len(self)} samples of {self._held.classes} classes)"

    def fingerprint(self) -> dict[str, Any]:
        """JSON values that tell which samples these are, but not where they lie; files by name and size (see
        ``contents.described``), a data set of tensorflow-datasets by what it says of itself."""
        return {"name": "imagenet", "length": len(self), "classes": self._held.classes, **self._held.fingerprint()}

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        key, label, data, where = self._held.read(index)
        return {"key": key, "image": decode(data, where), "label": label}


def decode(data: bytes, where: str) -> np.ndarray:
    """A stored picture as uint8 RGB (H, W, 3), as it is stored: no rotation, grey repeated, CMYK converted.

    Raises:
        UserError: damaged, or no picture; ``where`` names it.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # Pillow reports damage with many kinds of exceptions
        text = " ".join(str(error).split()).split(" <")[0] or type(error).__name__
        raise UserError(f"{where} is damaged or no picture ({text}): {AGAIN}") from None


class _Folders:
    """``train/CLASS/…``: names and labels only, for a million samples are to fit in memory many times."""

    def __init__(self, root: Path, split: str, labels: str) -> None:
        places = {
            one: next((root / name for name in names if (root / name).is_dir()), None) for one, names in _PLACES.items()
        }
        split_folders = any(places.values())
        self.top = places[split] or root
        if self.top == root and (split != "train" or split_folders):
            raise UserError(f"{root} has no folder {_PLACES[split][0]}: give it, or choose another split")
        pictures = _pictures(self.top)
        refuse_no_text(self.top, itertools.chain.from_iterable(pictures.values()))
        if not pictures:
            raise UserError(f"{self.top} holds no class folders with pictures: it should hold CLASS/*.JPEG")
        numbers = _read_labels(Path(labels), list(pictures)) if labels else self._numbers(places, pictures, split)
        self.classes = max(numbers.values()) + 1
        self.class_names = [""] * self.classes
        for name, number in numbers.items():
            self.class_names[number] = self.class_names[number] or name
        self.names: list[str] = []
        found: list[int] = []
        digest, entries = hashlib.sha256(), hashlib.sha256()
        for one, sizes in pictures.items():
            for name in sorted(sizes):
                if not sizes[name] and not TOLERANT.get():
                    what = "is empty" if sizes[name] == 0 else "is a link to nothing"
                    raise UserError(f"{self.top / name} {what}: {AGAIN}")
                self.names.append(name)
                found.append(numbers[one])
                digest.update(f"{name}\t{sizes[name]}\t{numbers[one]}\n".encode())
                entries.update(f"{name}\t{numbers[one]}\n".encode())
        self.labels, self.split = np.array(found, np.int32), split
        self.digest, self.entries = digest.hexdigest(), entries.hexdigest()

    def _numbers(self, places: dict[str, Path | None], pictures: dict[str, Any], split: str) -> dict[str, int]:
        """The labels of all classes: their places among those of the training split, whichever split is read."""
        if split == "train":
            return _numbered(pictures, self.top)
        if places["train"] is None:
            raise UserError(
                f"{self.top.parent} has {self.top.name} and no train, whose classes number those of {self.top.name}: "
                "write labels.txt there, one class folder a line"
            )
        numbers = _numbered(_pictures(places["train"]), places["train"])
        if strange := [name for name in pictures if name not in numbers]:
            raise UserError(
                f"{self.top / strange[0]} is no class of {places['train']} ({len(strange)} are not): move it away, or "
                "write labels.txt, one class folder a line"
            )
        return numbers

    def __len__(self) -> int:
        return len(self.names)

    def fingerprint(self) -> dict[str, Any]:
        return {"split": self.split, "files": self.digest, "entries": self.entries}

    def file_paths(self, indices: Iterable[int]) -> tuple[Path, list[str]]:
        return self.top, [self.names[index] for index in indices]

    def read(self, index: int) -> tuple[str, int, bytes, str]:
        path = self.top / self.names[index]
        try:
            return self.names[index], int(self.labels[index]), path.read_bytes(), str(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): restore it or check the path") from None


def _pictures(top: Path) -> dict[str, dict[str, int | None]]:
    """Class -> picture, relative to ``top`` -> bytes, in the order of the classes; folders that are hidden or without
    pictures are none."""
    found = {}
    for folder in sorted((name for name in os.listdir(top) if os.path.isdir(top / name)), key=_order):
        if folder[0] != ".":
            with os.scandir(top / folder) as listing:
                if sizes := {f"{folder}/{entry.name}": _size(entry) for entry in listing if _is_picture(entry)}:
                    found[folder] = sizes
    return found or _by_name(top)


def _by_name(top: Path) -> dict[str, dict[str, int | None]]:
    """The same of pictures that lie in ``top`` itself, with classes in their names; {} unless there are several."""
    with os.scandir(top) as listing:
        sizes = {entry.name: _size(entry) for entry in listing if _is_picture(entry)}
    classes = {name: match[1] for name in sizes if (match := _NAMED.search(name))}
    if len(set(classes.values())) < 2:
        return {}
    if strange := sorted(sizes.keys() - classes.keys()):
        raise UserError(
            f"{top / strange[0]} has no class in its name, such as n01440764_10026.JPEG ({len(strange)} have none): "
            "move it away"
        )
    found: dict[str, dict[str, int | None]] = {one: {} for one in sorted(set(classes.values()))}
    for name, one in classes.items():
        found[one][name] = sizes[name]
    return found


def _size(entry: os.DirEntry[str]) -> int | None:
    """Bytes of a file; None of a link that leads nowhere."""
    try:
        return entry.stat().st_size
    except OSError:
        return None


def _order(name: str) -> tuple[bool, int, str]:
    """Names that are numbers come first, as numbers; the others as text."""
    number = name.isascii() and name.isdecimal()
    return not number, int(name) if number else 0, name


def _numbered(folders: Iterable[str], top: Path) -> dict[str, int]:
    names = list(folders)
    for one, two in itertools.pairwise(names):
        if _order(one)[:2] == _order(two)[:2] and not _order(one)[0]:
            raise UserError(f"{top} holds {one} and {two}, one number: rename one, or write labels.txt")
    return {name: i for i, name in enumerate(names)}


def _is_picture(entry: os.DirEntry[str]) -> bool:
    return entry.name[0] != "." and entry.name.lower().endswith(SUFFIXES) and not os.path.isdir(entry.path)


def _read_labels(path: Path, folders: list[str]) -> dict[str, int]:
    """Folder -> label of a labels file; UserError unless it names each folder once, with a number of 0 or more."""
    if not path.is_file():
        raise UserError(f"labels {path} does not exist: give a text file with one class folder a line")
    numbers: dict[str, int] = {}
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    for row, line in enumerate(lines):
        name, *rest = [line] if line in folders else line.rsplit(maxsplit=1)  # a folder's name may have spaces
        number = rest[0] if rest else str(row)
        if name in numbers or not re.fullmatch(r"\d{1,7}", number):
            what = "comes twice" if name in numbers else f"has the label '{number}'"
            raise UserError(f"labels {path}: {name} {what}: give each folder once, with a whole number or none")
        numbers[name] = int(number)
    missing = [folder for folder in folders if folder not in numbers]
    if missing:
        raise UserError(f"labels {path} does not name the folder {missing[0]}: add a line")
    return numbers


class _Prepared:
    """A version folder of tensorflow-datasets, read record by record and without decoding."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, _PLACES[split][-1]
        info = self._builder().info
        if self.split not in info.splits:
            raise UserError(f"{folder} has no split {self.split}, it has {', '.join(sorted(info.splits))}")
        for field in ("image", "label"):
            if field not in info.features:
                raise UserError(f"{folder} has no feature '{field}': give a dataset of pictures with classes")
        held = info.splits[self.split]
        self.length, self.classes = int(held.num_examples), int(info.features["label"].num_classes)
        self.class_names = list(info.features["label"].names or map(str, range(self.classes)))
        self.about = {"name": info.name, "version": str(info.version), "split": self.split, "bytes": held.num_bytes}
        self.about["shards"] = [int(length) for length in held.shard_lengths]
        self._source: Any = None
        self._open()

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        try:
            return tfds.builder_from_directory(self.folder)
        except Exception as error:
            raise UserError(f"{self.folder} cannot be read ({_line(error)}): prepare the dataset again") from None

    def _open(self) -> Any:
        import tensorflow_datasets as tfds

        if self._source is None:
            try:
                undecoded = {"image": tfds.decode.SkipDecoding()}
                self._source = self._builder().as_data_source(self.split, decoders=undecoded)
            except NotImplementedError:
                raise UserError(
                    f"{self.folder} is in a format without random access: build it with file_format='array_record'"
                ) from None
            except (OSError, RuntimeError, ValueError) as error:
                raise UserError(f"{self.folder}: {_line(error)}: {AGAIN}") from None
        return self._source

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}  # file handles stay at home

    def __len__(self) -> int:
        return self.length

    def fingerprint(self) -> dict[str, Any]:
        return {"dataset": self.about}

    def read(self, index: int) -> tuple[str, int, bytes, str]:
        where = f"{self.folder}: record {index} of {self.split}"
        try:
            record = self._open()[index]
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            raise UserError(f"{where} cannot be read ({_line(error)}): {AGAIN}") from None
        name = record.get("file_name", b"")
        name = name.decode() if isinstance(name, bytes) else str(name)
        key = name or f"{self.about['name']}/{self.split}/{index}"
        return key, int(record["label"]), record["image"], f"{where}, {key},"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160].split(";")[0] or type(error).__name__


def _prepared(root: Path) -> Path | None:
    """The newest version folder of tensorflow-datasets in ``root``, None where there is none."""
    for place in (root, root / "imagenet2012"):
        if (place / _INFO).is_file():
            return place
        versions = [path.parent for path in place.glob(f"*/{_INFO}")]
        if versions:
            return max(versions, key=lambda path: [int(n) if n.isdecimal() else -1 for n in path.name.split(".")])
    return None
