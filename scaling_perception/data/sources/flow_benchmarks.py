"""Optical flow to evaluate on: Middlebury, Sintel, KITTI; facts 6.2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from scaling_perception.data import formats
from scaling_perception.data.sources.base import Entry
from scaling_perception.data.sources.benchmarks import FOLDER, Benchmark
from scaling_perception.support.errors import UserError, did_you_mean

_TRAINING = dict.fromkeys(Benchmark.SPLITS, "training")  # the truth of the other part is not public


class MiddleburyFlow(Benchmark):
    """Middlebury's eight sequences with public truth; unknown flow is invalid."""

    NAME = "middlebury_flow"
    TASKS = ("flow",)
    LAYOUT = "SCENE/frame10.png, SCENE/frame11.png and SCENE/flow10.flo (in one folder or in those of the release)"
    LAYOUTS = (
        (
            r"(?P<top>(?:.*/)?)(?P<scene>[^/]+)/frame10\.png",
            {
                "image2": ("{top}{scene}/frame11.png",),
                "flow": ("{top}{scene}/flow10.flo", "*/{scene}/flow10.flo"),
            },
        ),
    )


class Sintel(Benchmark):
    """MPI Sintel's training part (1041 pairs), with occlusions and invalid pixels where their masks are there.

    Args:
        rendering: clean or final.
    """

    NAME = "sintel"
    TASKS = ("flow",)
    LAYOUT = "SCENE/clean/frame_NNNN.png with SCENE/flow_NNNN.flo, or the released clean/SCENE and flow/SCENE"
    SPLIT_FOLDERS = _TRAINING

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


_CAMERAS = {"2015": "image_2", "2012": "colored_0"}


class KittiFlow(Benchmark):
    """KITTI's training pairs with sparse flow: 194 of 2012 (``colored_0``), 200 of 2015 (``image_2``).

    ``flow_occ`` is the truth; what ``flow_noc`` lacks of it is occluded.

    Args:
        year: 2012 or 2015, where the folder holds both.
    """

    NAME = "kitti_flow"
    TASKS = ("flow",)
    LAYOUT = "image_2/NNNNNN_10.png, image_2/NNNNNN_11.png and flow_occ/NNNNNN_10.png (colored_0 in 2012)"
    SPLIT_FOLDERS = _TRAINING

    def __init__(
        self, root: str | os.PathLike[str], split: str, task: str = "flow", *, count: int = 0, year: str = ""
    ) -> None:
        if year and year not in _CAMERAS:
            raise UserError(f"kitti_flow has no year '{year}'{did_you_mean(year, _CAMERAS)}")
        self.year = year
        cameras = _CAMERAS[year] if year else "|".join(_CAMERAS.values())
        self.LAYOUTS = (
            (
                FOLDER + rf"(?P<camera>{cameras})/(?P<id>\d+)_10\.png",
                {
                    "image2": ("{folder}{camera}/{id}_11.png",),
                    "flow": ("{folder}flow_occ/{id}_10.png",),
                    "seen": ("{folder}flow_noc/{id}_10.png",),
                },
            ),
        )
        super().__init__(root, split, task, count=count)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "year": self.year}

    def _read(self, field: str, path: Path, entry: Entry) -> Any:
        return formats.read_kitti_flow(path)[1] if field == "seen" else super()._read(field, path, entry)

    def __getitem__(self, index: int) -> dict[str, Any]:
        raw = super().__getitem__(index)
        if "seen" in raw:
            raw["occluded"] = raw["valid"] & ~raw.pop("seen")
        return raw
