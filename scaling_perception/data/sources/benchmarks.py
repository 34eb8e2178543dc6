"""Small sources to evaluate on. Each says how its files are called; ``Benchmark`` does the rest."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from scaling_perception.data.sources.base import Entry, FileSource, list_files
from scaling_perception.support.errors import UserError, did_you_mean


class Benchmark(FileSource):
    """Files found by a pattern of the first image.

    ``LAYOUTS`` are tried in order: (pattern of the image's path, field -> templates of which the first that exists
    counts). Templates use the pattern's groups, and ``{next}``: the group ``frame`` plus one, as wide.
    """

    SPLITS = ("val", "test", "all")
    LAYOUTS: tuple[tuple[str, Mapping[str, tuple[str, ...]]], ...]

    def find(self) -> list[Entry]:
        names = list_files(self.root)
        known = set(names)
        for pattern, templates in self.LAYOUTS:
            entries = []
            for name in names:
                if not (match := re.fullmatch(pattern, name)):
                    continue
                groups = match.groupdict()
                if "frame" in groups:
                    groups["next"] = str(int(groups["frame"]) + 1).zfill(len(groups["frame"]))
                files = {"image": name}
                for field, choices in templates.items():
                    paths = [choice.format(**groups) for choice in choices]
                    found = [path for path in paths if path in known]
                    if field in ("occluded", "invalid_mask") and not found:
                        continue  # a bonus, not everyone copies them
                    files[field] = (found or paths)[0]
                last = "next" in groups and files["image2"] not in known and files["flow"] not in known
                if not last:  # the end of a sequence has neither
                    entries.append(Entry(os.path.splitext(name)[0], files))
            if entries:
                return entries
        return []


_FOLDER = r"(?P<folder>(?:.*/)?)"


class NYUv2(Benchmark):
    """NYU depth v2, millimetres; evaluated from 1 mm to 10 m (facts 6.1)."""

    NAME = "nyuv2"
    TASKS = ("depth",)
    LAYOUT = "rgb_ID.jpg (or .png) with sync_depth_ID.png (or depth_ID.png)"
    depth_scale = 1000.0
    depth_range = (1e-3, 10.0)
    LAYOUTS = (
        (
            _FOLDER + r"rgb_(?P<id>\w+)\.(?:jpg|png)",
            {"depth": ("{folder}sync_depth_{id}.png", "{folder}depth_{id}.png")},
        ),
    )


class KittiDepth(Benchmark):
    """KITTI LiDAR depth, 1/256 m; evaluated up to 80 m (facts 6.1). Also reads ``val_selection_cropped``."""

    NAME = "kitti_depth"
    TASKS = ("depth",)
    LAYOUT = "rgb_ID.png with depth_ID.png, or the folders image and groundtruth_depth"
    depth_scale = 256.0
    depth_range = (1e-5, 80.0)
    LAYOUTS = (
        (_FOLDER + r"rgb_(?P<id>\w+)\.(?:jpg|png)", {"depth": ("{folder}depth_{id}.png",)}),
        (
            _FOLDER + r"image/(?P<drive>\w+)_image_(?P<id>\d+_image_\d+)\.png",
            {"depth": ("{folder}groundtruth_depth/{drive}_groundtruth_depth_{id}.png",)},
        ),
    )


class IclNuim(Benchmark):
    """ICL-NUIM, a rendered living room, millimetres."""

    NAME = "icl_nuim"
    TASKS = ("depth",)
    LAYOUT = "image_ID.jpg (or .png) with depth_ID.png"
    depth_scale = 1000.0
    LAYOUTS = ((_FOLDER + r"image_(?P<id>\w+)\.(?:jpg|png)", {"depth": ("{folder}depth_{id}.png",)}),)


class TumRgbd(Benchmark):
    """TUM RGB-D, registered pairs, 1/5000 m."""

    NAME = "tum_rgbd"
    TASKS = ("depth",)
    LAYOUT = "color_ID.png with depth_ID.png"
    depth_scale = 5000.0
    LAYOUTS = ((_FOLDER + r"color_(?P<id>\w+)\.(?:jpg|png)", {"depth": ("{folder}depth_{id}.png",)}),)


class MiddleburyFlow(Benchmark):
    """Middlebury's training sequences with public truth; unknown flow is invalid."""

    NAME = "middlebury_flow"
    TASKS = ("flow",)
    LAYOUT = "SCENE/frame10.png, SCENE/frame11.png and SCENE/flow10.flo"
    LAYOUTS = (
        (r"(?P<scene>.+)/frame10\.png", {"image2": ("{scene}/frame11.png",), "flow": ("{scene}/flow10.flo",)}),
    )


class Sintel(Benchmark):
    """MPI Sintel, clean or final rendering, with occlusions and invalid pixels where their masks are there."""

    NAME = "sintel"
    TASKS = ("flow",)
    LAYOUT = "SCENE/clean/frame_NNNN.png with SCENE/flow_NNNN.flo, or the released clean/SCENE and flow/SCENE"

    def __init__(
        self, root: str | os.PathLike[str], split: str, task: str = "flow", *, count: int = 0, rendering: str = "clean"
    ) -> None:
        if rendering not in ("clean", "final"):
            raise UserError(f"sintel has no rendering '{rendering}'{did_you_mean(rendering, ('clean', 'final'))}")
        self.rendering = rendering
        self.LAYOUTS = (
            (
                rf"(?P<scene>.+)/{rendering}/frame_(?P<frame>\d+)\.png",
                {
                    "image2": ("{scene}/" + rendering + "/frame_{next}.png",),
                    "flow": ("{scene}/flow_{frame}.flo",),
                    "occluded": ("{scene}/occlusions_{frame}.png",),
                    "invalid_mask": ("{scene}/invalid_{frame}.png",),
                },
            ),
            (
                rf"(?P<top>(?:.*/)?){rendering}/(?P<scene>[^/]+)/frame_(?P<frame>\d+)\.png",
                {
                    "image2": ("{top}" + rendering + "/{scene}/frame_{next}.png",),
                    "flow": ("{top}flow/{scene}/frame_{frame}.flo",),
                    "occluded": ("{top}occlusions/{scene}/frame_{frame}.png",),
                    "invalid_mask": ("{top}invalid/{scene}/frame_{frame}.png",),
                },
            ),
        )
        super().__init__(root, split, task, count=count)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "rendering": self.rendering}


class KittiFlow(Benchmark):
    """KITTI 2012 and 2015 training pairs with sparse flow."""

    NAME = "kitti_flow"
    TASKS = ("flow",)
    LAYOUT = "image_2/NNNNNN_10.png, image_2/NNNNNN_11.png and flow_occ/NNNNNN_10.png"
    LAYOUTS = (
        (
            _FOLDER + r"(?P<camera>image_2|colored_0)/(?P<id>\d+)_10\.png",
            {"image2": ("{folder}{camera}/{id}_11.png",), "flow": ("{folder}flow_occ/{id}_10.png",)},
        ),
    )
