"""How many samples the published splits have: what `prepare --check` and the protocols compare a folder with."""

from __future__ import annotations

from typing import Any

PUBLISHED: dict[str, dict[str, Any]] = {
    "hypersim": {"train": 53885, "val": 7370, "test": 7682},  # Marigold's filtered lists
    "flying_chairs": {"train": 22232, "val": 640},
    "imagenet": {"train": 1281167, "val": 50000},
    "vkitti2": {"all": 42520},  # 5 scenes of 2,126 frames, 10 conditions, 2 cameras
    "nyuv2": {"val": 654, "test": 654},
    "kitti_depth": {"val": 652, "test": 652},
    "eth3d": dict.fromkeys(("val", "test", "all"), 454),
    "scannet": {"val": 800},
    "diode": {"val": 771},
    "sintel": {"val": 1041},
    "kitti_flow": {"val": [200, 194]},  # of 2015, of 2012
    "middlebury_flow": {"val": 8},
    "coco_amodal": {"val": 12753},
}
"""Source -> split -> its number of samples, or a list of numbers that are all published."""


def published(name: str, split: str) -> list[int]:
    """The numbers on record of a split; empty where none is."""
    known = PUBLISHED.get(name, {}).get(split or "all", [])
    return known if isinstance(known, list) else [known]
