"""Pictures with a class each: ImageNet-1K as tensorflow-datasets writes it or as plain folders, or anybody's folders.

Pictures come as they are stored (no EXIF rotation), at native size; the task crops them. Nothing here needs TensorFlow.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scaling_perception.support.errors import UserError, did_you_mean

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
_PLACES = {"train": ("train",), "val": ("val", "validation")}  # a split's folder; its name for tensorflow-datasets
_INFO = "dataset_info.json"
_AGAIN = "copy or download it again"


class ImageNet:
    """Raw samples with ``image`` uint8 (H, W, 3), ``label`` int and ``key``; random access, picklable.

    ``root`` is one of:

    * a data folder of tensorflow-datasets that holds ``imagenet2012`` (or that folder, or a version in it), built with
      ``file_format="array_record"``; any other dataset of it with the features ``image`` and ``label`` will do;
    * a folder with ``train/CLASS/…`` and ``val/CLASS/…`` (ImageNet's own: ``train/n01440764/*.JPEG``);
    * a folder with ``CLASS/…`` alone, which is then the training split.

    In plain folders the classes are numbered as their names sort, as torchvision does and tensorflow-datasets agrees
    with, or by a list of them.

    Args:
        split: train or val.
        count: at most so many samples, the first ones; 0 takes all.
        labels: a text file, one class folder a line, whose label is the line's number from 0 (or the number after it);
            '' takes ``labels.txt`` in ``root`` if it is there.

    Raises:
        UserError: missing folder or files, no picture, a class that the labels file does not have. Reading a sample
            raises it too, for a damaged picture, naming it.
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

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"imagenet({self.root}, {len(self)} samples of {self._held.classes} classes)"

    def fingerprint(self) -> dict[str, Any]:
        """JSON values that change whenever the samples may have, but not with where they lie."""
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
    except Exception as error:  # Pillow reports damage with many kinds of exceptions
        text = " ".join(str(error).split()).split(" <")[0] or type(error).__name__
        raise UserError(f"{where} is damaged or no picture ({text}): {_AGAIN}") from None


class _Folders:
    """``train/CLASS/…``: names and labels only, for a million samples are to fit in memory many times."""

    def __init__(self, root: Path, split: str, labels: str) -> None:
        self.top = next((root / name for name in _PLACES[split] if (root / name).is_dir()), root)
        others = [name for names in _PLACES.values() for name in names if (root / name).is_dir()]
        if self.top == root and (split != "train" or others):
            raise UserError(f"{root} has no folder {_PLACES[split][0]}: give it, or choose another split")
        folders = sorted(entry.name for entry in os.scandir(self.top) if entry.is_dir() and entry.name[0] != ".")
        if not folders:
            raise UserError(f"{self.top} holds no class folders: it should hold CLASS/*.JPEG")
        numbers = _read_labels(Path(labels), folders) if labels else {name: i for i, name in enumerate(folders)}
        self.classes = max(numbers.values()) + 1
        self.names: list[str] = []
        found: list[int] = []
        digest = hashlib.sha256()
        for folder in folders:
            with os.scandir(self.top / folder) as listing:
                sizes = {entry.name: entry.stat().st_size for entry in listing if _is_picture(entry)}
            for name in sorted(sizes):
                if not sizes[name]:
                    raise UserError(f"{self.top / folder / name} is empty: {_AGAIN}")
                self.names.append(f"{folder}/{name}")
                found.append(numbers[folder])
                digest.update(f"{folder}/{name}\t{sizes[name]}\t{numbers[folder]}\n".encode())
        if not self.names:
            raise UserError(f"{self.top} holds no pictures ({', '.join(SUFFIXES)}) in its class folders")
        self.labels, self.digest, self.split = np.array(found, np.int32), digest.hexdigest(), split

    def __len__(self) -> int:
        return len(self.names)

    def fingerprint(self) -> dict[str, Any]:
        return {"split": self.split, "files": self.digest}

    def read(self, index: int) -> tuple[str, int, bytes, str]:
        path = self.top / self.names[index]
        try:
            return self.names[index], int(self.labels[index]), path.read_bytes(), str(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): restore it or check the path") from None


def _is_picture(entry: os.DirEntry[str]) -> bool:
    return entry.name[0] != "." and entry.name.lower().endswith(SUFFIXES) and entry.is_file()


def _read_labels(path: Path, folders: list[str]) -> dict[str, int]:
    """Folder -> label of a labels file; UserError unless it names each folder once, with a number of 0 or more."""
    if not path.is_file():
        raise UserError(f"labels {path} does not exist: give a text file with one class folder a line")
    numbers: dict[str, int] = {}
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for row, (name, *rest) in enumerate(lines):
        number = rest[0] if rest else str(row)
        if name in numbers or not number.isdecimal():
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
                raise UserError(f"{self.folder}: {_line(error)}: {_AGAIN}") from None
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
            raise UserError(f"{where} cannot be read ({_line(error)}): {_AGAIN}") from None
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
