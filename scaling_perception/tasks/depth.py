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
    valid = _valid(raw, depth)
    try:
        target = normalise(depth, valid, options.depth_quantiles)
    except UserError as error:
        raise UserError(f"sample '{raw.get('key', '?')}': {error}") from None
    size = (resolution, resolution)
    return [sample(raw, "depth", inputs, resize_nearest(target, size), resize_nearest(valid, size))]


def conditions(raw: Mapping[str, Any], resolution: int, options: TaskOptions) -> dict[str, np.ndarray]:
    """The image, and a constant +1 prompt.

    With ``options.depth_prompt = "valid"`` the prompt is the mask of valid depths in {0, 1} where ``raw`` has depths,
    as the authors feed it: it leaks where the ground truth is missing (facts 10, row 8).
    """
    image = picture(raw, "image", resolution, options.nearest("depth"))
    if options.depth_prompt == "ones" or raw.get("depth") is None:
        return {"image": image, "prompt": np.ones_like(image)}
    valid = resize_nearest(_valid(raw, require(raw, "depth", like="image")), image.shape[:2])
    return {"image": image, "prompt": np.repeat(valid[..., None].astype(np.float32), 3, axis=-1)}


def _valid(raw: Mapping[str, Any], depth: np.ndarray) -> np.ndarray:
    """Where depth is finite, above 0, and not excluded by the sample's own mask."""
    with np.errstate(invalid="ignore"):
        valid = np.isfinite(depth) & (depth > 0)
    if raw.get("valid") is not None:
        valid &= require(raw, "valid", like="image").astype(bool)
    return valid


def decode_prediction(pixels: np.ndarray, size: tuple[int, int], options: TaskOptions) -> np.ndarray:
    """Channel mean, clipped to [-1, 1], mapped to [0, 1] (0 near), then bilinear to ``size``.

    With ``options.clip_depth`` off it is the channel mean as decoded, about [-1, 1] (-1 near): all that follows then
    has to stretch it or to call ``to_range``.

    Args:
        pixels: (1, M, R, R, 3) about [-1, 1].
        size: (H, W).

    Returns:
        float32 (M, H, W) in [0, 1], affine-invariant.
    """
    depth = check_pixels(pixels, 1)[0].mean(axis=-1)
    if not options.clip_depth:
        return np.stack([resize_bilinear(member, size) for member in depth])
    return np.clip(np.stack([resize_bilinear(member, size) for member in to_range(depth)]), 0, 1)


def to_range(decoded: np.ndarray) -> np.ndarray:
    """Decoded depth, about [-1, 1], to [0, 1]; what lies outside is clipped."""
    return (np.clip(decoded, -1, 1) + 1) / 2
