"""Depth to evaluate on, as Marigold lays it out and as it is released; facts 6.1."""

from __future__ import annotations

import inspect
import math
import os
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from scaling_perception.data import formats
from scaling_perception.data.images import open_image
from scaling_perception.data.sources import nyu_mat, sens
from scaling_perception.data.sources.base import Entry, list_files
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
        **own: Any,
    ) -> None:
        if not (depth_scale >= 0 and math.isfinite(depth_scale)):
            raise UserError(f"depth_scale {depth_scale} must be above 0 (units a metre), or 0: that of {self.NAME}")
        self.list, self.eight_bits = list, bool(depth_scale)
        self.depth_scale = depth_scale or self.depth_scale
        self.set_own(**own)
        super().__init__(root, split, task, count=count)

    def set_own(self) -> None:
        """Take the options that this set alone has, as attributes of their names (see ``sources.source_options``)."""

    def options(self) -> dict[str, Any]:
        own = {name: one.default for name, one in inspect.signature(self.set_own).parameters.items()}
        turned = {name: getattr(self, name) for name, usual in own.items() if getattr(self, name) != usual}
        return {**super().options(), "list": Path(self.list).name, "depth_scale": self.depth_scale, **turned}

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
    """NYU depth v2, evaluated from 1 mm to 10 m: pairs of PNG in millimetres, such as Marigold's ``test/SCENE/``; where
    there are none, the published ``nyu_depth_v2_labeled.mat`` (1449 images; ``splits.mat`` names the 654 of the test).

    Args:
        truth: raw, what the sensor measured (published figures are of it), or filled; of the .mat alone: of the PNG
            files beside one another the ``filled_`` ones are not read.
    """

    NAME = "nyuv2"
    LAYOUT = (
        "nyu_depth_v2_labeled.mat with splits.mat, or rgb_ID.png (or .jpg) with depth_ID.png (or sync_depth_ID.png), "
        "such as test/SCENE/rgb_0001.png"
    )
    depth_scale = 1000.0
    depth_range = (1e-3, 10.0)
    SPLIT_FOLDERS = {"val": "test", "test": "test"}
    LAYOUTS = (
        (
            FOLDER + r"rgb_(?P<id>\w+)\.(?:jpg|png)",
            {"depth": ("{folder}sync_depth_{id}.png", "{folder}depth_{id}.png")},
        ),
    )

    def set_own(self, truth: str = "raw") -> None:
        if truth not in nyu_mat.TRUTHS:
            raise UserError(f"nyuv2 has no truth '{truth}'{did_you_mean(truth, nyu_mat.TRUTHS)}")
        self.truth, self.mat = truth, ""  # the .mat, where it was given itself

    def _root_of_file(self, path: Path) -> Path:
        if path.suffix != ".mat":
            return super()._root_of_file(path)
        self.mat = path.name
        return path.parent

    def find(self) -> list[Entry]:
        pairs = [] if self.mat or self.truth != "raw" else super().find()
        name = self.mat or nyu_mat.NAME
        if not (self.list or pairs) and (self.root / name).is_file():
            return nyu_mat.find(self.root, name, self.split, self.truth)
        if self.truth != "raw":
            raise UserError(f"truth '{self.truth}' is of {self.root / name} without a list: leave it out")
        return pairs

    def _read(self, field: str, path: Path, entry: Entry) -> Any:
        if "index" not in entry.values:
            return super()._read(field, path, entry)
        return nyu_mat.read(path, "images" if field == "image" else nyu_mat.TRUTHS[self.truth], entry.values["index"])


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
    """ETH3D's DSLR images with depth of laser scans: raw float32 metres in files called .JPG, inf where unknown.

    Args:
        masks: leave out what ``SCENE/masks_for_images`` marks (published figures do not).
    """

    NAME = "eth3d"
    LAYOUT = (
        "rgb/SCENE/images/dslr_images/ID.JPG with depth/SCENE_dslr_depth/SCENE/ground_truth_depth/dslr_images/ID.JPG, "
        "or SCENE/images and SCENE/ground_truth_depth"
    )
    depth_scale = 1.0
    depth_range = (1e-5, math.inf)
    _IMAGE = FOLDER + r"(?P<scene>[^/]+)/images/dslr_images/(?P<id>[^/]+)\.(?P<suffix>JPG|jpg)"
    _DEPTH = "{scene}/ground_truth_depth/dslr_images/{id}.{suffix}"
    _MASK = "{scene}/masks_for_images/dslr_images/{id}.png"

    def set_own(self, masks: bool = False) -> None:
        if masks and self.list:
            raise UserError("masks are not looked for beside the files of a list: give list or masks=true, not both")
        self.masks = masks
        files = {"depth": ("{folder}" + self._DEPTH, "*/" + self._DEPTH)}
        self.LAYOUTS = ((self._IMAGE, {**files, **({"invalid_mask": ("*/" + self._MASK,)} if masks else {})}),)

    def find(self) -> list[Entry]:
        entries = super().find()
        if self.masks and entries and not any("invalid_mask" in entry.files for entry in entries):
            raise UserError(f"{self.root} has no SCENE/masks_for_images: unpack them there, or leave masks out")
        return entries

    def _read(self, field: str, path: Path, entry: Entry) -> Any:
        if field == "depth":
            stored = formats.read_raw_depth(path, formats.image_size(self.root / entry.files["image"]))
            return stored / self.depth_scale
        if field == "invalid_mask":  # 1 and 2 are kinds of what is masked
            with open_image(path) as image:
                return np.asarray(image.convert("L")) > 0
        return super()._read(field, path, entry)


class ScanNet(DepthBenchmark):
    """ScanNet, millimetres; evaluated from 1 mm to 10 m. The published sample is 800 images of validation scenes.

    Read are the published recordings SCENE.sens, or frames exported of them. Colour that is larger than depth is
    brought to the size of depth. The names of a list count for both: ``SCENE/color/ID.jpg`` is frame ID.

    Args:
        every: of recordings without a list, take one frame of this many.
    """

    NAME = "scannet"
    LAYOUT = "SCENE.sens, or SCENE/color/ID.jpg with SCENE/depth/ID.png"
    depth_scale = 1000.0
    depth_range = (1e-3, 10.0)
    LAYOUTS = ((FOLDER + r"color/(?P<id>\w+)\.(?:jpg|png)", {"depth": ("{folder}depth/{id}.png",)}),)

    def set_own(self, every: int = 1) -> None:
        if every < 1:
            raise UserError(f"every {every} is below 1: give the step from frame to frame")
        self.every, self.offsets = every, {}

    def find(self) -> list[Entry]:
        names = list_files(self.root)
        recordings = {Path(name).stem: name for name in names if name.endswith(".sens")}
        if not recordings or any(re.fullmatch(self.LAYOUTS[0][0], name) for name in names):
            return super().find()
        if not self.list:
            frames = [
                (scene, number)
                for scene, name in sorted(recordings.items())
                for number in range(0, sens.read_header(self.root / name).frames, self.every)
            ]
        else:
            path = list_path(self.root, self.list)
            frames = [self._listed(path, words[0]) for words in read_list(path, ("SCENE/color/ID.jpg",))]
        entries = []
        for scene, number in frames:
            name = recordings.get(scene, f"{scene}.sens")
            files = {"image": name, "depth": name}
            entries.append(Entry(f"{scene}/color/{number:06d}", files, {"frame": number}))
        return entries

    def _listed(self, path: Path, name: str) -> tuple[str, int]:
        match = re.fullmatch(r"(?:.*/)?(?P<scene>[^/]+)/color/(?P<frame>\d+)\.(?:jpg|png)", name)
        if not match:
            raise UserError(f"{path} names '{name}': a frame of a recording is SCENE/color/ID.jpg")
        return match["scene"], int(match["frame"])

    def _stored(self, entry: Entry) -> dict[str, Any]:
        found = self._of_recording(entry) if "frame" in entry.values else super()._stored(entry)
        (height, width), (high, wide) = found["depth"].shape, found["image"].shape[:2]
        if height < high and abs(high * width / (height * wide) - 1) < 0.01:
            small = Image.fromarray(found["image"]).resize((width, height), Image.Resampling.BILINEAR)
            found["image"] = np.asarray(small)
        return found

    def _of_recording(self, entry: Entry) -> dict[str, Any]:
        name, number = entry.files["image"], entry.values["frame"]
        path = self.root / name
        if name not in self.offsets:
            self.offsets[name] = sens.frame_offsets(path)
        if number >= len(self.offsets[name]):
            if number < (count := sens.read_header(path).frames):
                raise sens.cut_short(path, number, count)
            raise UserError(f"{path} has {count} frames, and no frame {number}: correct the list")
        image, depth = sens.read_frame(path, int(self.offsets[name][number]))
        return {"image": image, "depth": depth}


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

    def set_own(self, scenes: str = "all") -> None:
        kinds = {"all": "indoors|outdoor", "indoors": "indoors", "outdoor": "outdoor"}
        if scenes not in kinds:
            raise UserError(f"diode has no scenes '{scenes}'{did_you_mean(scenes, kinds)}")
        self.scenes = scenes
        name = rf"(?P<stem>(?:.*/)?(?:{kinds[scenes]})/scene_\d+/scan_\d+/[^/]+)\.png"
        self.LAYOUTS = ((name, {"depth": ("{stem}_depth.npy",), "valid_mask": ("{stem}_depth_mask.npy",)}),)

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
