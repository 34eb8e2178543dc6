"""Resizing of pictures and maps: pixel centres at half integers, borders by renormalised weights.

``resize_bilinear`` is the antialiased triangle filter (as Pillow's BILINEAR and torch's ``antialias=True``);
``resize_nearest`` is torch's nearest-exact. Facts 10, row 26 says which is used where.
"""

from __future__ import annotations

import functools

import numpy as np


@functools.lru_cache(maxsize=128)
def _triangle(length: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """Source indices and weights, both (wanted, taps): out[i] = sum_k weight[i, k] * in[index[i, k]]."""
    scale = length / wanted
    support = max(scale, 1.0)  # shrinking widens the filter, so that every source pixel counts
    centre = (np.arange(wanted) + 0.5) * scale
    first = np.floor(centre - support).astype(np.int64)
    index = first[:, None] + np.arange(int(np.ceil(2 * support)) + 2)
    weight = np.maximum(0.0, 1.0 - np.abs(index + 0.5 - centre[:, None]) / support)
    weight[(index < 0) | (index >= length)] = 0.0
    weight /= weight.sum(axis=1, keepdims=True)
    used = weight.any(axis=0)
    index = np.clip(index[:, used], 0, length - 1)
    weight = np.ascontiguousarray(weight[:, used], np.float32)
    index.setflags(write=False)
    weight.setflags(write=False)
    return index, weight


def _along(array: np.ndarray, axis: int, wanted: int) -> np.ndarray:
    index, weight = _triangle(array.shape[axis], wanted)
    shape = [1] * array.ndim
    shape[axis] = wanted
    out = np.zeros(array.shape[:axis] + (wanted,) + array.shape[axis + 1 :], np.float32)
    for tap in range(index.shape[1]):
        out += np.take(array, index[:, tap], axis=axis) * weight[:, tap].reshape(shape)
    return out


def resize_bilinear(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Antialiased bilinear resize.

    Args:
        array: (H, W) or (H, W, C), any real type.
        size: wanted (height, width).

    Returns:
        float32 (height, width[, C]), a new array. The same size gives exactly the input values.
    """
    out = np.array(array, np.float32)
    # The axis that shrinks more goes first: less to do for the other.
    for axis in sorted((0, 1), key=lambda a: size[a] / out.shape[a]):
        if out.shape[axis] != size[axis]:
            out = _along(out, axis, size[axis])
    return out


def nearest_index(length: int, wanted: int) -> np.ndarray:
    """Which of ``length`` pixels each of ``wanted`` pixels takes: floor((i + 1/2) * length / wanted), in integers."""
    return ((2 * np.arange(wanted) + 1) * length) // (2 * wanted)


def resize_nearest(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest (exact centres) resize of (H, W[, C]) to ``size`` (height, width); keeps the type, copies."""
    rows = nearest_index(array.shape[0], size[0])
    columns = nearest_index(array.shape[1], size[1])
    return array[rows[:, None], columns[None, :]]


def resize_flow(flow: np.ndarray, valid: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
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
