"""Depth to evaluate on, as Marigold lays it out and as it is released; facts 6.1."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, ClassVar

from scaling_perception.data import formats
from scaling_perception.data.sources.base import Entry
from scaling_perception.data.sources.benchmarks import FOLDER, Benchmark
from scaling_perception.data.sources.lists import list_path, locate, read_list
from scaling_perception.support.errors import UserError, did_you_mean


class DepthBenchmark(Benchmark):
    """A set of images with depth.

    Args:
        list: file of lines ``image depth …`` as Marigold's data splits have them; the samples are those lines, in that
            order. Names are relative to ``root``, or the end of a path below it. ``None`` as the depth leaves an image
            out.
        depth_scale: stored units a metre; 0 is the set's own.
    """

    TASKS = ("depth",)
    LIST_FIELDS: ClassVar[tuple[str, ...]] = ("image", "depth")

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        task: str = "depth",
        *,
        count: int = 0,
        list: str = "",
        depth_scale: float = 0.0,
    ) -> None:
        if not (depth_scale >= 0 and math.isfinite(depth_scale)):
            raise UserError(f"depth_scale {depth_scale} must be above 0 (units a metre), or 0: that of {self.NAME}")
        self.list, self.depth_scale = list, depth_scale or self.depth_scale
        super().__init__(root, split, task, count=count)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "list": Path(self.list).name, "depth_scale": self.depth_scale}

    def find(self) -> list[Entry]:
        if not self.list:
            return super().find()
        path = list_path(self.root, self.list)
        lines = read_list(path, [f"{field}-file" for field in self.LIST_FIELDS])
        rows = [words[: len(self.LIST_FIELDS)] for words in lines]
        kept = [row for row in rows if "None" not in row]
        self.leave_out(len(rows) - len(kept), len(rows))
        places = locate(self.root, (name for row in kept for name in row), self.list_folders())
        fields = self.LIST_FIELDS
        return [
            Entry(os.path.splitext(row[0])[0], {f: places[name] for f, name in zip(fields, row, strict=True)})
            for row in kept
        ]

    def list_folders(self) -> tuple[str, ...]:
        """Folders below the root that listed names may be relative to."""
        return "", self.split


class NYUv2(DepthBenchmark):
    """NYU depth v2, millimetres; evaluated from 1 mm to 10 m. Marigold's ``test/SCENE/`` is the published 654 images.

    The raw depth is the truth; the ``filled_`` maps beside it are not read.
    """

    NAME = "nyuv2"
    LAYOUT = "rgb_ID.png (or .jpg) with depth_ID.png (or sync_depth_ID.png), such as test/SCENE/rgb_0001.png"
    depth_scale = 1000.0
    depth_range = (1e-3, 10.0)
    SPLIT_FOLDERS = {"val": "test", "test": "test"}
    LAYOUTS = (
        (
            FOLDER + r"rgb_(?P<id>\w+)\.(?:jpg|png)",
            {"depth": ("{folder}sync_depth_{id}.png", "{folder}depth_{id}.png")},
        ),
    )


class KittiDepth(DepthBenchmark):
    """KITTI LiDAR depth, 1/256 m; evaluated up to 80 m.

    Reads the raw recordings with the annotated depth (``list`` = the Eigen test files: 697 lines, of which 45 have no
    depth), the depth benchmark's ``val_selection_cropped``, and plain pairs.
    """

    NAME = "kitti_depth"
    LAYOUT = (
        "DATE/DRIVE/image_02/data/ID.png with DRIVE/proj_depth/groundtruth/image_02/ID.png, "
        "the folders image and groundtruth_depth, or rgb_ID.png with depth_ID.png"
    )
    depth_scale = 256.0
    depth_range = (1e-5, 80.0)
    LEAVE_OUT = "depth"
    LAYOUTS = (
        (FOLDER + r"rgb_(?P<id>\w+)\.(?:jpg|png)", {"depth": ("{folder}depth_{id}.png",)}),
        (
            FOLDER + r"image/(?P<drive>\w+)_image_(?P<id>\d+_image_\d+)\.png",
            {"depth": ("{folder}groundtruth_depth/{drive}_groundtruth_depth_{id}.png",)},
        ),
        (
            r"(?:.*/)?\d{4}_\d\d_\d\d/(?P<drive>[^/]+)/image_02/data/(?P<id>\d+)\.(?:png|jpg)",
            {"depth": ("*/{drive}/proj_depth/groundtruth/image_02/{id}.png",)},
        ),
    )


class Eth3d(DepthBenchmark):
    """ETH3D's DSLR images with depth of laser scans: raw float32 metres in files called .JPG, inf where unknown."""

    NAME = "eth3d"
    LAYOUT = (
        "rgb/SCENE/images/dslr_images/ID.JPG with depth/SCENE_dslr_depth/SCENE/ground_truth_depth/dslr_images/ID.JPG, "
        "or SCENE/images and SCENE/ground_truth_depth"
    )
    depth_scale = 1.0
    depth_range = (1e-5, math.inf)
    LAYOUTS = (
        (
            FOLDER + r"(?P<scene>[^/]+)/images/dslr_images/(?P<id>[^/]+)\.(?P<suffix>JPG|jpg)",
            {
                "depth": (
                    "{folder}{scene}/ground_truth_depth/dslr_images/{id}.{suffix}",
                    "*/{scene}/ground_truth_depth/dslr_images/{id}.{suffix}",
                )
            },
        ),
    )

    def _read(self, field: str, path: Path, entry: Entry) -> Any:
        if field == "depth":
            stored = formats.read_raw_depth(path, formats.image_size(self.root / entry.files["image"]))
            return stored / self.depth_scale
        return super()._read(field, path, entry)


class ScanNet(DepthBenchmark):
    """ScanNet, millimetres; evaluated from 1 mm to 10 m. The published sample is 800 images of validation scenes."""

    NAME = "scannet"
    LAYOUT = "SCENE/color/ID.jpg with SCENE/depth/ID.png"
    depth_scale = 1000.0
    depth_range = (1e-3, 10.0)
    LAYOUTS = ((FOLDER + r"color/(?P<id>\w+)\.(?:jpg|png)", {"depth": ("{folder}depth/{id}.png",)}),)


class Diode(DepthBenchmark):
    """DIODE, metres; its mask alone decides what is valid. The published set is val: 325 images indoors, 446 outdoors.

    Args:
        scenes: all, indoors or outdoor.
    """

    NAME = "diode"
    SPLITS = ("train", "val", "all")
    LAYOUT = "val/indoors/scene_*/scan_*/ID.png with ID_depth.npy and ID_depth_mask.npy, and val/outdoor likewise"
    depth_scale = 1.0
    depth_range = (-math.inf, math.inf)
    SPLIT_FOLDERS = {"train": "train", "val": "val"}
    LIST_FIELDS = ("image", "depth", "valid_mask")

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        task: str = "depth",
        *,
        count: int = 0,
        list: str = "",
        depth_scale: float = 0.0,
        scenes: str = "all",
    ) -> None:
        kinds = {"all": "indoors|outdoor", "indoors": "indoors", "outdoor": "outdoor"}
        if scenes not in kinds:
            raise UserError(f"diode has no scenes '{scenes}'{did_you_mean(scenes, kinds)}")
        self.scenes = scenes
        name = rf"(?P<stem>(?:.*/)?(?:{kinds[scenes]})/scene_\d+/scan_\d+/[^/]+)\.png"
        self.LAYOUTS = ((name, {"depth": ("{stem}_depth.npy",), "valid_mask": ("{stem}_depth_mask.npy",)}),)
        super().__init__(root, split, task, count=count, list=list, depth_scale=depth_scale)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "scenes": self.scenes}

    def find(self) -> list[Entry]:
        kinds = {"indoors", "outdoor"} if self.scenes == "all" else {self.scenes}
        return [entry for entry in super().find() if kinds & set(entry.files["image"].split("/"))]


class IclNuim(DepthBenchmark):
    """ICL-NUIM, a rendered living room, millimetres."""

    NAME = "icl_nuim"
    LAYOUT = "image_ID.jpg (or .png) with depth_ID.png"
    depth_scale = 1000.0
    LAYOUTS = ((FOLDER + r"image_(?P<id>\w+)\.(?:jpg|png)", {"depth": ("{folder}depth_{id}.png",)}),)


class TumRgbd(DepthBenchmark):
    """TUM RGB-D, registered pairs, 1/5000 m."""

    NAME = "tum_rgbd"
    LAYOUT = "color_ID.png with depth_ID.png"
    depth_scale = 5000.0
    LAYOUTS = ((FOLDER + r"color_(?P<id>\w+)\.(?:jpg|png)", {"depth": ("{folder}depth_{id}.png",)}),)
