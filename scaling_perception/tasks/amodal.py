"""Amodal segmentation: paint the whole object on white from the image and the visible part's mask (facts 5.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling_perception.tasks.common import TaskOptions, check_pixels, picture, require, sample
from scaling_perception.tasks.resize import resize_bilinear, resize_nearest

PASSES = ("amodal",)

EMPTY_PROMPT = "no part of the object is visible: nothing asks for it"

# Blue's weight falls on red and red's on blue: pix2gestalt applies OpenCV's BGR-to-grey to an RGB array. Kept, because
# its numbers were measured so.
GREY_WEIGHTS = (0.114, 0.587, 0.299)


def encode(raw: Mapping[str, Any], resolution: int, options: TaskOptions) -> list[dict[str, Any]]:
    """One sample whose target is the RGB picture of the whole object on white; every pixel is valid.

    Raises:
        UserError: a field is missing or of another size than the image; the message names the sample.
    """
    inputs = conditions(raw, resolution, options)
    require(raw, "whole", like="image")
    target = picture(raw, "whole", resolution, options.nearest("amodal"))
    return [sample(raw, "amodal", inputs, target, np.ones((resolution, resolution), bool))]


def conditions(raw: Mapping[str, Any], resolution: int, options: TaskOptions) -> dict[str, np.ndarray]:
    """The image, and the visible part's mask as three channels of -1 and +1."""
    mask = require(raw, "visible_mask", like="image").astype(bool)
    prompt = np.where(resize_nearest(mask, (resolution, resolution)), np.float32(1), np.float32(-1))
    image = picture(raw, "image", resolution, options.nearest("amodal"))
    return {"image": image, "prompt": np.repeat(prompt[..., None], 3, axis=-1)}


def decode_prediction(pixels: np.ndarray, size: tuple[int, int], options: TaskOptions) -> np.ndarray:
    """The painted object, clipped to [-1, 1] and bilinear to ``size``; ``mask_from_whole`` makes the mask of it.

    Args:
        pixels: (1, M, R, R, 3) about [-1, 1].
        size: (H, W).

    Returns:
        float32 (M, H, W, 3) in [-1, 1].
    """
    whole = np.clip(check_pixels(pixels, 1)[0], -1, 1)
    return np.clip(np.stack([resize_bilinear(member, size) for member in whole]), -1, 1)


def mask_from_whole(rgb: np.ndarray, threshold: float = 250) -> np.ndarray:
    """Where the picture is not white: 0.114 R + 0.587 G + 0.299 B <= ``threshold`` on 0..255 (pix2gestalt's rule).

    Args:
        rgb: (..., 3) float in [-1, 1].

    Returns:
        bool (...).
    """
    levels = (np.clip(np.asarray(rgb, np.float64), -1, 1) + 1) * 127.5
    # Greys of 8-bit colours lie 0.001 apart: half of that absorbs the rounding of a picture stored as float32.
    return levels @ np.array(GREY_WEIGHTS) <= threshold + 5e-4
