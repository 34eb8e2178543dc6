"""Optical flow: two passes, one a component, each a grey picture of pixels / divisor (facts 2 and 5.2).

Both components are measured in pixels of a 512-wide frame, so that a motion looks the same at any native size; at
FlyingChairs' 512x384 that is exactly u/75 and v/75. Values may exceed 1 and are not clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling_perception.support.errors import UserError
from scaling_perception.tasks.common import TaskOptions, check_pixels, picture, require, sample
from scaling_perception.tasks.resize import resize_bilinear, resize_flow, resize_nearest

PASSES = ("flow_x", "flow_y")
REFERENCE_WIDTH = 512


def encode(raw: Mapping[str, Any], resolution: int, options: TaskOptions) -> list[dict[str, Any]]:
    """Two samples, flow_x (u, right) then flow_y (v, down), that share their inputs.

    Raises:
        UserError: flow is missing, of another size than the image, or nowhere valid; the message names the sample.
    """
    inputs = conditions(raw, resolution, options)
    flow = require(raw, "flow", like="image")
    if flow.ndim != 3 or flow.shape[-1] != 2:
        raise UserError(f"sample '{raw.get('key', '?')}': flow has shape {flow.shape}: give two channels (H, W, 2)")
    valid = np.asarray(np.isfinite(flow).all(axis=-1))
    if raw.get("valid") is not None:
        valid &= require(raw, "valid", like="image").astype(bool)
    if not valid.any():
        raise UserError(f"sample '{raw.get('key', '?')}': no flow pixel is valid: check the flow file")
    size = (resolution, resolution)
    if options.nearest("flow"):
        scaled = resize_nearest(np.where(valid[..., None], flow, 0).astype(np.float32), size)
        valid = resize_nearest(valid, size)
    else:
        scaled, valid = resize_flow(flow, valid, size)
    scaled *= np.float32(REFERENCE_WIDTH / flow.shape[1] / options.flow_divisor)
    return [sample(raw, name, inputs, scaled[..., i], valid.copy()) for i, name in enumerate(PASSES)]


def conditions(raw: Mapping[str, Any], resolution: int, options: TaskOptions) -> dict[str, np.ndarray]:
    """The first frame, and the second as the prompt."""
    require(raw, "image2", like="image")
    nearest = options.nearest("flow")
    return {"image": picture(raw, "image", resolution, nearest), "prompt": picture(raw, "image2", resolution, nearest)}


def decode_prediction(pixels: np.ndarray, size: tuple[int, int], options: TaskOptions) -> np.ndarray:
    """Channel means of the two passes, bilinear to ``size``, in native pixels: the inverse of ``encode``.

    Args:
        pixels: (2, M, R, R, 3), pass order flow_x, flow_y.
        size: (H, W) of the native frame; W sets the scale.

    Returns:
        float32 (M, H, W, 2), u right and v down.
    """
    components = np.moveaxis(check_pixels(pixels, 2).mean(axis=-1), 0, -1)
    scale = np.float32(options.flow_divisor * size[1] / REFERENCE_WIDTH)
    return np.stack([resize_bilinear(member, size) for member in components]) * scale
