"""Resizing of pictures and maps: pixel centres at half integers, borders by renormalised weights.

``resize_bilinear`` is the antialiased triangle filter (torch's ``antialias=True``);
``resize_nearest`` is torch's nearest-exact. Facts 10, row 26 says which is used where.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int, Real, Shaped
from PIL import Image

from scaling_perception.tasks.shapes import Mask, Native, Size


def resize_bilinear(array: Native, size: Size) -> Float[np.ndarray, "height width *C"]:
    """Antialiased bilinear resize, one float32 plane at a time (Pillow's, which lets other threads run meanwhile).

    Args:
        array: (H, W) or (H, W, C), any real type.
        size: wanted (height, width).

    Returns:
        float32 (height, width[, C]), a new array. The same size gives exactly the input values.
    """
    array = np.array(array, np.float32)
    if array.shape[:2] == tuple(size):
        return array
    planes = array.reshape(*array.shape[:2], -1)
    out = np.empty((*size, planes.shape[-1]), np.float32)
    for channel in range(planes.shape[-1]):
        plane = Image.fromarray(np.ascontiguousarray(planes[..., channel]))
        out[..., channel] = np.asarray(plane.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return out.reshape(*size, *array.shape[2:])


def nearest_index(length: int, wanted: int) -> Int[np.ndarray, " {wanted}"]:
    """Which of ``length`` pixels each of ``wanted`` pixels takes: floor((i + 1/2) * length / wanted), in integers."""
    return ((2 * np.arange(wanted) + 1) * length) // (2 * wanted)


def resize_nearest(array: Native, size: Size) -> Shaped[np.ndarray, "height width *C"]:
    """Nearest (exact centres) resize of (H, W[, C]) to ``size`` (height, width); keeps the type, copies."""
    rows = nearest_index(array.shape[0], size[0])
    columns = nearest_index(array.shape[1], size[1])
    return array[rows[:, None], columns[None, :]]


def resize_flow(
    flow: Real[np.ndarray, "H W C"], valid: Mask, size: Size
) -> tuple[Float[np.ndarray, "height width C"], Bool[np.ndarray, "height width"]]:
    """Bilinear resize of a vector field that ignores invalid pixels. The VALUES are not scaled.

    An output pixel is valid where the nearest source pixel is (that one always has weight, so sparse maps such as
    KITTI's survive); its value averages the valid pixels only; invalid outputs are 0.

    Args:
        flow: (H, W, C) float; may hold anything (NaN, 1e10) where invalid.
        valid: (H, W) bool.
        size: wanted (height, width).

    Returns:
        flow float32 (height, width, C), valid bool (height, width).
    """
    kept = np.where(valid[..., None], flow, 0).astype(np.float32)
    small = resize_nearest(valid, size)
    if valid.all():
        return resize_bilinear(kept, size), small
    weight = resize_bilinear(valid, size)
    total = resize_bilinear(kept, size)
    return np.where(small[..., None], total / np.where(small, weight, 1)[..., None], 0).astype(np.float32), small
