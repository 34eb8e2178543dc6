"""Virtual KITTI 2 (Cabon et al. 2020) with depth, as Marigold trains on it beside Hypersim; facts 5.1."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from scaling_perception.data.sources.depth_benchmarks import DepthBenchmark
from scaling_perception.support.errors import UserError

_FRAME = "{scene}/{condition}/frames/depth/{camera}/depth_{id}.png"
_CROP = (352, 1216)  # KITTI's benchmark: height from the bottom, width from the centre


class VirtualKitti2(DepthBenchmark):
    """The archives ``vkitti_2.0.3_rgb`` and ``vkitti_2.0.3_depth``, unpacked into one folder or beside one another.

    Depth is stored in centimetres; the sky (655.35 m) and all from 80 m on is invalid. There is no published split:
    every split is everything, unless ``list`` names the frames (Marigold's ``vkitti_train.txt``).

    Args:
        crop: cut every map to KITTI's benchmark size, 352x1216, as Marigold's training does.
    """

    NAME = "vkitti2"
    SPLITS = ("train", "val", "all")
    LAYOUT = (
        "SceneNN/CONDITION/frames/rgb/Camera_N/rgb_NNNNN.jpg with SceneNN/CONDITION/frames/depth/Camera_N/"
        "depth_NNNNN.png"
    )
    depth_scale = 100.0
    depth_range = (1e-5, 80.0)
    LAYOUTS = (
        (
            r"(?P<top>(?:.*/)?)(?P<scene>Scene\d+)/(?P<condition>[^/]+)/frames/rgb/(?P<camera>Camera_\d)/"
            r"rgb_(?P<id>\d+)\.(?:jpg|png)",
            {"depth": ("{top}" + _FRAME, "*/" + _FRAME)},
        ),
    )

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        task: str = "depth",
        *,
        count: int = 0,
        list: str = "",
        depth_scale: float = 0.0,
        crop: bool = False,
    ) -> None:
        self.crop = crop
        super().__init__(root, split, task, count=count, list=list, depth_scale=depth_scale)
        if not list:
            self.not_split()

    def options(self) -> dict[str, Any]:
        return {**super().options(), "crop": self.crop}

    def __getitem__(self, index: int) -> dict[str, Any]:
        raw = super().__getitem__(index)
        if not self.crop:
            return raw
        (height, width), (high, wide) = raw["image"].shape[:2], _CROP
        if height < high or width < wide:
            raise UserError(f"{raw['key']} is {width}x{height}, less than the crop of {wide}x{high}: leave crop out")
        left = (width - wide) // 2
        maps = {name: raw[name] for name in ("image", "depth", "valid")}
        return raw | {name: np.ascontiguousarray(one[-high:, left : left + wide]) for name, one in maps.items()}
