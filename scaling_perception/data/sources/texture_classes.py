"""Procedural pictures with a class each, for trials of pre-training without data: the class is how one is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np

from scaling_perception.data.sources.textures import RGB_KINDS, texture
from scaling_perception.support.errors import UserError, did_you_mean

SPLIT_STARTS = {"train": 0, "val": 1 << 40}
"""First index of each split."""
_KINDS = sorted(RGB_KINDS)


class TextureClasses:
    """Raw samples with ``image`` uint8 (S, S, 3) and ``label``, from the index alone; the classes take turns.

    Args:
        split: train or val: other pictures.
        count: pictures. side: S.

    Raises:
        UserError: an unknown split, or a count or side below 1.
    """

    def __init__(self, split: str, *, count: int = 50_000, side: int = 128) -> None:
        self.split = split or "train"
        if self.split not in SPLIT_STARTS:
            raise UserError(f"textures has no split '{split}'{did_you_mean(split, SPLIT_STARTS)}")
        if count < 1 or side < 8:
            raise UserError(f"textures: count {count} and side {side}: give at least 1 and 8")
        self.count, self.side = count, side
        self.class_names = list(_KINDS)

    def __len__(self) -> int:
        return self.count

    def fingerprint(self) -> dict[str, Any]:
        """JSON values that tell the samples."""
        about = {"name": "textures", "version": 1, "split": self.split, "length": self.count, "side": self.side}
        return {**about, "classes": len(_KINDS)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(f"sample {index} of {self.count}")
        label = index % len(_KINDS)
        picture = texture(SPLIT_STARTS[self.split] + index, self.side, _KINDS[label])
        image = np.round((picture + 1) * 127.5).astype(np.uint8)
        return {"key": f"textures/{self.split}/{index}", "image": image, "label": label}
