"""Amodal masks drawn by people over photographs: COCO-A (Zhu et al. 2017), and MP3D-Amodal in the same form; facts 6.3.

Every annotated region of an image is one sample: its visible part's mask is the prompt, the mask of the whole is the
truth. There is no picture of the whole object, so this is data to evaluate on, not to train on.
"""

from __future__ import annotations

import collections
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from scaling_perception.data.images import read_image
from scaling_perception.data.sources.base import Entry, FileSource, list_files
from scaling_perception.data.sources.coco_masks import segmentation_mask
from scaling_perception.data.sources.lists import list_path, locate
from scaling_perception.support.errors import UserError, did_you_mean

REGIONS = ("all", "occluded")


class Region(NamedTuple):
    """One annotated object: its image's name, its number within the image, its masks as they are stored.

    ``size`` is the image's (H, W) by the annotation file, where it says.
    """

    image: str
    number: int
    visible: Any
    whole: Any
    file: str
    size: tuple[int, int] | None = None

    def mask(self, stored: Any, name: str, size: tuple[int, int]) -> np.ndarray:
        """One of its masks as bool (H, W)."""
        try:
            return segmentation_mask(stored, size)
        except ValueError as error:
            where = f"{self.file}: {self.image}, region {self.number}: the {name} mask"
            raise UserError(f"{where} cannot be read ({error}): download the annotations again") from None


class CocoAmodal(FileSource):
    """COCO-A: ``annotations/COCO_amodal_val2014.json`` and COCO's 2014 images; or files NAME.json beside NAME.jpg.

    A region's ``segmentation`` is the whole object (polygon or run lengths), its ``visible_mask`` what shows of it; a
    region without one is not occluded: both masks are the same.

    Args:
        annotations: the annotation file, where it has another name or place.
        regions: all, or occluded: those with a ``visible_mask``.
    """

    NAME = "coco_amodal"
    TASKS = ("amodal",)
    SPLITS = ("train", "val", "test", "all")
    LAYOUT = "annotations/COCO_amodal_val2014.json and val2014/COCO_val2014_NNNNNNNNNNNN.jpg"
    FILES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        split: (f"annotations/COCO_amodal_{split}2014.json", f"COCO_amodal_{split}2014.json")
        for split in ("train", "val", "test")
    }
    """Annotation files of each split, the first that exists counts; ``*`` stands for anything."""
    FOLDERS: ClassVar[tuple[str, ...]] = ("", "val2014", "train2014", "test2014", "images")
    """Where images are looked for first."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        task: str = "amodal",
        *,
        count: int = 0,
        annotations: str = "",
        regions: str = "all",
    ) -> None:
        if regions not in REGIONS:
            raise UserError(f"{self.NAME} has no regions '{regions}'{did_you_mean(regions, REGIONS)}")
        self.annotations, self.regions = annotations, regions
        super().__init__(root, split, task, count=count)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "annotations": Path(self.annotations).name, "regions": self.regions}

    def find(self) -> list[Entry]:
        paths = self._annotation_files() or [self.root / name for name in self._pairs()]
        rows = [row for path in paths for row in self._regions(path)]
        places = locate(self.root, (row.image for row in rows), self.FOLDERS)
        return [
            Entry(f"{os.path.splitext(row.image)[0]}/{row.number}", {"image": places[row.image]}, {"region": row})
            for row in rows
        ]

    def _annotation_files(self) -> list[Path]:
        if self.annotations:
            return [list_path(self.root, self.annotations)]
        found = []
        for split in self.FILES if self.split == "all" else (self.split,):
            for pattern in self.FILES[split]:
                paths = sorted(self.root.glob(pattern))
                if paths:
                    found.append(paths[0])
                    break
        return found

    def _pairs(self) -> list[str]:
        """Annotation files of one image each: NAME.json beside NAME.jpg."""
        names = list_files(self.root)
        stems = {os.path.splitext(name)[0] for name in names if name.endswith((".jpg", ".png"))}
        return [name for name in names if name.endswith(".json") and name[:-5] in stems]

    def _regions(self, path: Path) -> Iterator[Region]:
        """The regions of an annotation file, in its order."""
        content = _read_annotations(path)
        try:
            if "regions" in content:
                images, annotations = {None: self._image_beside(path)}, [{**content, "image_id": None}]
                sizes = {None: _declared(content)}
            else:
                images = {image["id"]: str(image["file_name"]) for image in content["images"]}
                sizes = {image["id"]: _declared(image) for image in content["images"]}
                annotations = content["annotations"]
            for annotation in annotations:
                image = images[annotation["image_id"]]
                for number, region in enumerate(annotation["regions"]):
                    visible, whole = region.get("visible_mask"), region["segmentation"]
                    if visible is not None or self.regions == "all":
                        yield Region(image, number, visible, whole, path.name, sizes[annotation["image_id"]])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no file of amodal annotations ({error!r}): download it again") from None

    def _image_beside(self, path: Path) -> str:
        image = next((one for end in (".jpg", ".png") if (one := path.with_suffix(end)).is_file()), None)
        if image is None or not image.is_relative_to(self.root):
            raise UserError(f"{path} has no picture beside it in {self.root}: put {path.stem}.jpg there")
        return image.relative_to(self.root).as_posix()

    def _arrays(self, entry: Entry) -> dict[str, Any]:
        """The picture as the annotation lies on it: as it is stored, unless the declared size is that of it upright."""
        found, declared = super()._arrays(entry), entry.values["region"].size
        if declared is None or found["image"].shape[:2] == declared:
            return found
        path = self.root / entry.files["image"]
        upright = read_image(path)
        if upright.shape[:2] != declared:
            (height, width), (high, wide) = declared, upright.shape[:2]
            what = f"{entry.values['region'].file} declares {width}x{height} for {path}, which is {wide}x{high}"
            raise UserError(f"{what}: give the picture that was annotated")
        return {**found, "image": upright}

    def __getitem__(self, index: int) -> dict[str, Any]:
        raw = super().__getitem__(index)
        region, size = self.entries[int(index)].values["region"], raw["image"].shape[:2]
        raw["whole_mask"] = region.mask(region.whole, "whole", size)
        visible = region.whole if region.visible is None else region.visible
        raw["visible_mask"] = region.mask(visible, "visible", size)
        return raw


class Mp3dAmodal(CocoAmodal):
    """MP3D-Amodal (Zhan et al. 2024): the unpacked ``mp3d_eval.zip`` beside its annotation file.

    The file is a pickle. Nothing in it is run: plain values are read, everything else is passed over.
    """

    NAME = "mp3d_amodal"
    LAYOUT = "the images of mp3d_eval.zip and MP3D_seleted_eval_10.29.pkl"
    # "seleted" is how the released files are called.
    FILES = {
        "train": ("MP3D_*train*.pkl", "MP3D_*train*.json", "annotations/*train*"),
        "val": ("MP3D_*eval*.pkl", "MP3D_*eval*.json", "annotations/*eval*"),
        "test": ("MP3D_*eval*.pkl", "MP3D_*eval*.json", "annotations/*eval*"),
    }
    FOLDERS = ("", "mp3d_eval", "mp3d_train", "images")

    def _annotation_files(self) -> list[Path]:
        return list(dict.fromkeys(super()._annotation_files()))


# Annotation files


def _declared(image: Any) -> tuple[int, int] | None:
    """(H, W) as an annotation file declares it; None where it does not."""
    height, width = image.get("height"), image.get("width")
    return (int(height), int(width)) if height and width else None


def _read_annotations(path: Path) -> Any:
    """The content of a JSON file or of a pickle of plain values.

    Raises:
        UserError: missing or damaged.
    """
    try:
        if path.suffix == ".pkl":
            with open(path, "rb") as file:
                return _PlainUnpickler(file).load()
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path and its permission") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to say
        kind = "pickle" if path.suffix == ".pkl" else "JSON file"
        raise UserError(f"{path} is no whole {kind} ({error}): download it again") from None


class _Ignored:
    """Stands for a value that is not needed (areas are numpy scalars); takes whatever it is made of."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


class _PlainUnpickler(pickle.Unpickler):
    """Reads plain containers, numbers and strings. No name that a pickle asks for is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # bytes in pickles of old protocols
            return lambda text, encoding="latin1": str(text).encode("latin1")
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module.split(".")[0] == "numpy":
            return _Ignored
        raise UserError(f"it asks for {module}.{name}, which could do harm and no annotation needs: do not use it")
