"""Changes of raw samples before a task encodes them. The resizers are in ``tasks.resize``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling_perception.tasks.resize import resize_bilinear, resize_flow, resize_nearest

__all__ = ["flip", "resize_bilinear", "resize_flow", "resize_nearest"]

_PIXEL_FIELDS = ("image", "image2", "depth", "valid", "flow", "visible_mask", "whole_mask", "whole", "occluded")


def flip(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The raw sample seen in a mirror: every map is turned left to right, the flow's u changes its sign.

    Flipping twice gives the sample again. The key stays, so a mirror image counts as the same sample.

    Args:
        raw: see ``data.sources``.

    Returns:
        a new dict; ``raw`` is untouched.
    """
    out = dict(raw)
    for field in _PIXEL_FIELDS:
        if out.get(field) is not None:
            out[field] = np.ascontiguousarray(np.asarray(out[field])[:, ::-1])
    if out.get("flow") is not None:
        out["flow"] = out["flow"] * np.array([-1, 1], out["flow"].dtype)
    if out.get("intrinsics") is not None:
        matrix = np.array(out["intrinsics"])
        matrix[0, 2] = np.shape(out["image"])[1] - 1 - matrix[0, 2]  # the principal point, in pixel-centre coordinates
        out["intrinsics"] = matrix
    return out
