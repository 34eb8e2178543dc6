"""COCO's masks: run lengths (compressed or as numbers) and polygons, to and from bool arrays.

Run lengths go down the columns, the first counts pixels outside. Compressed, a count is written in characters of six
bits (48 added): five of the number, lowest first, and one that says that more follow; the number's sign is that of its
last character, and from the fourth count on it is the difference to the count before the last. Polygons are filled as
COCO's own tool fills them: its masks are the truth that figures were measured on, so ours must agree in every pixel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

_STEPS = 5  # COCO traces a polygon's outline on a grid that is five times finer than the pixels


def read_counts(text: str | bytes) -> list[int]:
    """The counts of a compressed string.

    Raises:
        ValueError: a character that no such string has, or an end within a number.
    """
    codes = np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8).astype(int) - 48
    if codes.size and (codes.min() < 0 or codes.max() > 63):
        raise ValueError("a character outside of '0' to 'o'")
    counts: list[int] = []
    value = shift = 0
    for code in codes.tolist():
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("it ends within a number")
    return counts


def rle_mask(rle: Mapping[str, Any], size: tuple[int, int] | None = None) -> np.ndarray:
    """The mask of ``{"size": [H, W], "counts": string, bytes or numbers}``.

    Args:
        size: (H, W) that it must have; None takes any.

    Returns:
        bool (H, W).

    Raises:
        ValueError: a field is missing or damaged, another size, or counts that do not sum to H * W.
    """
    stated, counts = rle.get("size"), rle.get("counts")
    if not _are_numbers(stated, 2) or counts is None:
        raise ValueError("run lengths need a size [height, width] and counts")
    height, width = (int(length) for length in stated)
    if size is not None and (height, width) != tuple(size):
        raise ValueError(f"its mask is {width}x{height}, the image {size[1]}x{size[0]}")
    runs = read_counts(counts) if isinstance(counts, (str, bytes)) else counts
    if not _are_numbers(runs):
        raise ValueError("counts are neither a string nor numbers")
    runs = np.asarray(runs, np.int64)
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"counts cover {runs.sum()} pixels of {width}x{height}")
    inside = np.arange(runs.size) % 2 == 1
    return np.repeat(inside, runs).reshape(width, height).T.copy()


def polygon_mask(points: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """The pixels of a polygon [x0, y0, x1, y1, …], as COCO's tool decides them.

    The outline is followed in steps of a fifth of a pixel. Wherever it crosses the middle of a pixel column, everything
    in the column from there downwards changes sides.

    Returns:
        bool (H, W).

    Raises:
        ValueError: fewer than three points, or coordinates that are no finite numbers.
    """
    if not _are_numbers(points) or len(points) < 6 or len(points) % 2:
        raise ValueError("a polygon needs x and y of three points or more")
    height, width = size
    corners = np.trunc(np.asarray(points, np.float64).reshape(-1, 2) * _STEPS + 0.5).astype(np.int64)
    traced = [_trace(begin, end) for begin, end in zip(corners, np.roll(corners, -1, axis=0), strict=True)]
    x, y = np.concatenate(traced).T
    steps = np.flatnonzero(x[1:] != x[:-1])
    column, row = (np.minimum(line[1:], line[:-1])[steps] - _STEPS // 2 for line in (x, y))
    middle = (column % _STEPS == 0) & (column >= 0) & (column <= (width - 1) * _STEPS)
    row = np.clip(-(-row[middle] // _STEPS), 0, height)
    crossings = np.bincount(column[middle] // _STEPS * height + row, minlength=height * width + 1)
    return (np.cumsum(crossings)[:-1] % 2 == 1).reshape(width, height).T.copy()


def _trace(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Grid points (n, 2) from one corner to the next, one step at a time along the longer side."""
    long = 0 if abs(end[0] - begin[0]) >= abs(end[1] - begin[1]) else 1
    backwards = begin[long] > end[long]  # rounding always starts at the lower end
    first, last = (end, begin) if backwards else (begin, end)
    length = int(last[long] - first[long])
    steps = np.arange(length + 1)
    points = np.empty((length + 1, 2), np.int64)
    points[:, long] = first[long] + steps
    slope = (last[1 - long] - first[1 - long]) / length if length else 0.0
    points[:, 1 - long] = np.trunc(first[1 - long] + slope * steps + 0.5)
    return points[::-1] if backwards else points


def segmentation_mask(value: Any, size: tuple[int, int]) -> np.ndarray:
    """A ``segmentation`` of any kind: run lengths, one polygon, or several (their union), as bool ``size`` (H, W).

    Raises:
        ValueError: as ``rle_mask`` and ``polygon_mask``, or run lengths of another size.
    """
    if isinstance(value, Mapping):
        return rle_mask(value, size)
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError("a segmentation must be run lengths or polygons")
    polygons = value if isinstance(value[0], (list, tuple)) else [value]
    return np.logical_or.reduce([polygon_mask(points, size) for points in polygons])


def _are_numbers(values: Any, count: int | None = None) -> TypeGuard[Sequence[float]]:
    """Whether it is a list of finite numbers (``count`` of them)."""
    if not isinstance(values, (list, tuple)) or (count is not None and len(values) != count):
        return False
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
