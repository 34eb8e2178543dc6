"""Depth: an affine-invariant picture of planar depth, near = -1, far = +1 (facts 5.1; Marigold's normalisation)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling_perception.support.errors import UserError
from scaling_perception.tasks.common import TaskOptions, check_pixels, picture, require, sample
from scaling_perception.tasks.resize import resize_bilinear, resize_nearest

PASSES = ("depth",)


def normalise(depth: np.ndarray, valid: np.ndarray, quantiles: tuple[float, float] = (0.02, 0.98)) -> np.ndarray:
    """2 (d - q_low) / (q_high - q_low) - 1 clipped to [-1, 1]; the quantiles are over the valid, positive depths.

    Invalid pixels become +1, the far plane. A map whose two quantiles coincide has no scale: depths at them become 0,
    nearer ones -1, farther ones +1.

    Args:
        depth: (H, W) float, any unit.
        valid: (H, W) bool; non-finite and non-positive depths count as invalid too.
        quantiles: linear-interpolated quantiles that become -1 and +1.

    Returns:
        float32 (H, W).

    Raises:
        UserError: no pixel is valid.
    """
    with np.errstate(invalid="ignore"):
        valid = valid & np.isfinite(depth) & (depth > 0)
    kept = depth[valid].astype(np.float64)
    if not kept.size:
        raise UserError("no depth pixel is valid: check the unit (depth_scale), the range and the valid mask")
    low, high = np.quantile(kept, quantiles)
    span = high - low
    if span > 1e-6 * high:  # below float32's resolution the difference is rounding noise
        kept = 2.0 * (kept - low) / span - 1.0
    else:
        kept = np.where(np.abs(kept - low) <= 1e-6 * high, 0.0, np.sign(kept - low))
    out = np.ones(depth.shape, np.float32)
    out[valid] = np.clip(kept, -1.0, 1.0)
    return out


def encode(raw: Mapping[str, Any], resolution: int, options: TaskOptions) -> list[dict[str, Any]]:
    """One sample: normalised at native size, then resized by nearest (depths must not be mixed across edges).

    Raises:
        UserError: depth is missing, of another size than the image, or all invalid; the message names the sample.
    """
    inputs = conditions(raw, resolution, options)
    depth = require(raw, "depth", like="image")
    if depth.ndim != 2:
        raise UserError(f"sample '{raw.get('key', '?')}': depth has shape {depth.shape}: give one channel (H, W)")
    with np.errstate(invalid="ignore"):
        valid = np.isfinite(depth) & (depth > 0)
    if raw.get("valid") is not None:
        valid &= require(raw, "valid", like="image").astype(bool)
    try:
        target = normalise(depth, valid, options.depth_quantiles)
    except UserError as error:
        raise UserError(f"sample '{raw.get('key', '?')}': {error}") from None
    size = (resolution, resolution)
    return [sample(raw, "depth", inputs, resize_nearest(target, size), resize_nearest(valid, size))]


def conditions(raw: Mapping[str, Any], resolution: int, options: TaskOptions) -> dict[str, np.ndarray]:
    """The image, and a constant +1 prompt (the authors feed the true valid mask, which leaks; facts 10, row 8)."""
    image = picture(raw, "image", resolution)
    return {"image": image, "prompt": np.ones_like(image)}


def decode_prediction(pixels: np.ndarray, size: tuple[int, int], options: TaskOptions) -> np.ndarray:
    """Channel mean, clipped to [-1, 1], mapped to [0, 1] (0 near), then bilinear to ``size``.

    Args:
        pixels: (1, M, R, R, 3) about [-1, 1].
        size: (H, W).

    Returns:
        float32 (M, H, W) in [0, 1], affine-invariant.
    """
    depth = (np.clip(check_pixels(pixels, 1)[0].mean(axis=-1), -1, 1) + 1) / 2
    return np.clip(np.stack([resize_bilinear(member, size) for member in depth]), 0, 1)
