"""Furnished worlds: rendered samples that look like photographs. Every sample is a pure function of an integer.

Rooms, corridors, table tops, heaps, streets, open ground, and things that fly before a picture; see ``data/worlds``.
Geometry is exact: depth, normals, flow and masks come from the ray through each pixel's centre.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from scaling_perception.data.sources.scenes import SPLIT_STARTS
from scaling_perception.data.worlds.build import CLASSES, PARTS
from scaling_perception.data.worlds.render import KINDS, parts_of, render_world
from scaling_perception.support.errors import UserError, did_you_mean

__all__ = ["CLASSES", "KINDS", "PARTS", "RENDERER", "WorldsSource", "render_world"]

RENDERER = 2
"""Version of the pictures; bumped whenever an index gives other arrays, so that caches of old ones are refused."""

_ROOM = 1_000_000_000


class WorldsSource:
    """Worlds ``start`` to ``start + count`` of a split, as raw samples (see ``data.sources``).

    Args:
        split: train, val or test; '' is train. Their indices never meet.
        count: how many. resolution: pixels a side. start: the first one within the split. frames: 2, or 1 for samples
        without a second frame and flow, in half the time. kind: one of ``KINDS``, or '' for all. without: some of
        ``PARTS``, joined by +, that the worlds are rendered without.

    Raises:
        UserError: an unknown split, kind or part, or a number out of range.
    """

    def __init__(
        self,
        split: str = "train",
        count: int = 1024,
        resolution: int = 128,
        start: int = 0,
        frames: int = 2,
        kind: str = "",
        without: str = "",
    ) -> None:
        split = split or "train"
        if split not in SPLIT_STARTS:
            raise UserError(f"worlds have no split '{split}'{did_you_mean(split, SPLIT_STARTS)}")
        if kind and kind not in KINDS:
            raise UserError(f"worlds have no kind '{kind}'{did_you_mean(kind, KINDS)}")
        limits = {
            "count": (count, 1, _ROOM),
            "start": (start, 0, _ROOM - 1),
            "resolution": (resolution, 16, 2048),
            "frames": (frames, 1, 2),
        }
        for name, (value, least, most) in limits.items():
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
                raise UserError(f"{name} {value!r} of worlds does not fit: give an integer from {least} to {most}")
        if start + count > _ROOM:
            raise UserError(f"worlds {start}..{start + count} leave the split: keep start + count up to {_ROOM}")
        self.split, self.count, self.resolution, self.start = split, int(count), int(resolution), int(start)
        self.frames, self.kind, self.without = int(frames), kind, "+".join(parts_of(without))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        if not -self.count <= index < self.count:
            raise IndexError(f"world {index} of {self.count}")
        number = SPLIT_STARTS[self.split] + self.start + index % self.count
        return render_world(number, self.resolution, self.frames, self.kind, self.without)

    def __repr__(self) -> str:
        return f"WorldsSource({self.split}, {self.count} from {self.start}, {self.resolution} pixels)"

    def fingerprint(self) -> dict[str, Any]:
        """JSON values that change whenever the samples may have."""
        return {
            "name": "worlds",
            "renderer": RENDERER,
            "split": self.split,
            "length": self.count,
            "start": self.start,
            "resolution": self.resolution,
            "frames": self.frames,
            "kind": self.kind,
            **({"without": self.without} if self.without else {}),  # as caches record it that were made before
        }
