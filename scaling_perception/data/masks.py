"""Masks: what counts as object in a file, a Pillow picture or an array. One rule for all of them.

========================================  ====================================================
bool                                      True
floats in [0, 1]                          above 0.5 (probabilities)
floats of 0 to 255                        from 128 up, where anything is
0 and 1, in integers                      1
8 bits                                    from 128 up (probabilities, blurred edges, JPEG)
16 bits                                   from 32768 up
a palette of colours, an RGB picture      the colour beside black; from 128 up in any channel
========================================  ====================================================

Refused, each in one line: NaN, negative values and other floats (logits), class or instance numbers (nothing reaches
the middle of the range, or areas of one low value each beside 0), several colours, 0 and 1 in a lossy file,
transparency.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from scaling_perception.data.formats import read_npy
from scaling_perception.data.images import FilePath, open_image, set_upright
from scaling_perception.support.errors import UserError

_ROUNDING = 1e-3  # resizing brings a float that far beyond [0, 1]
_AREA = 1e-3  # of the picture: more pixels than that are no edge
_FEW = 16  # different values: numbers of classes or objects, not a ramp
_CHOOSE = "choose one of them and save it as 0 and 255"


def read_mask(path: FilePath, upright: bool = True) -> np.ndarray:
    """The mask of a file as bool (H, W), by the rules above; an ``.npy`` file holds (H, W) or (H, W, 1).

    Args:
        upright: apply the EXIF orientation, as ``images.read_image`` does.

    Raises:
        UserError: missing, damaged, or refused by the rules above.
    """
    if Path(path).suffix.lower() == ".npy":
        array = read_npy(path, "fiub")
        if array.ndim == 3 and array.shape[-1] != 1:
            raise UserError(f"{path} holds {array.shape}: a mask needs one channel (H, W)")
        return _of_array(array, str(path))
    with open_image(path) as image:
        return _of_picture(image, str(path), upright)


def to_mask(mask: Any, name: str = "the mask") -> np.ndarray:
    """A path, Pillow picture or array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) as bool (H, W), by the rules above.

    Raises:
        UserError: as ``read_mask``, or an array of another shape.
    """
    if isinstance(mask, (str, os.PathLike)):
        return read_mask(mask)
    return _of_picture(mask, name, True) if hasattr(mask, "convert") else _of_array(np.asarray(mask), name)


def _of_picture(image: Any, name: str, upright: bool) -> np.ndarray:
    image = set_upright(image) if upright else image
    if image.mode == "P":
        if "transparency" in image.info:
            return _of_array(np.asarray(image.convert("RGBA")), name)
        colours = np.asarray(image.convert("RGB"))
        if (colours == colours[..., :1]).all():
            return _of_array(colours[..., 0], name)
        _one_colour(colours, name)
        return np.asarray(colours.any(axis=-1))
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBa"):
        image = image.convert("RGBA")
    array = np.asarray(image)
    if image.format in ("JPEG", "WEBP", "MPO") and array.max() == 1:
        raise UserError(f"{name} holds 0 and 1, which {image.format} does not keep: save it as PNG, with 0 and 255")
    return _of_array(array, name)


def _of_array(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim == 3 and array.shape[-1] == 4:
        opaque = array[..., 3] >= (1 if array.dtype.kind in "fb" else np.iinfo(array.dtype).max)
        if not opaque.all():
            raise UserError(f"{name} has transparency, which a mask must not have: save it as grey 0 and 255")
        array = array[..., :3]
    if array.ndim == 3 and array.shape[-1] == 3 and array.dtype.kind in "iu":
        _one_colour(array, name)
    if array.ndim == 3 and array.shape[-1] in (1, 3):
        array = array.max(axis=-1)
    if array.ndim != 2 or 0 in array.shape:
        raise UserError(f"{name} holds {array.shape}: a mask needs one channel (H, W)")
    if array.dtype == bool:
        return array.copy()
    if array.dtype.kind not in "fiu":
        raise UserError(f"{name} has type {array.dtype}: give bool, 0 and 1, 0 to 255, or probabilities in [0, 1]")
    if not np.isfinite(array).all():
        raise UserError(f"{name} holds NaN or infinity: a mask has an answer for every pixel")
    low, high = array.min(), array.max()
    if array.dtype.kind == "f":
        if -_ROUNDING <= low and high <= 1 + _ROUNDING:
            return array > 0.5
        if low < 0 or high > 255:
            kind = "give probabilities in [0, 1] (of logits: their sigmoid)"
            raise UserError(f"{name} holds floats from {low:g} to {high:g}: {kind}")
    elif low < 0:
        raise UserError(f"{name} holds integers from {low} to {high}: give 0 and 1, or 0 to 255")
    return _of_levels(array, name)


def _of_levels(array: np.ndarray, name: str) -> np.ndarray:
    """Of values from 0 up: 0 and 1, or from the middle of 8 or 16 bits up."""
    top = array.max()
    if top <= 1:
        return array > 0
    middle = 128 if top <= 255 else 32768
    if top < middle or top > 65535:
        what = f"{_values(array)} and nothing from {middle} up" if top < middle else f"{_values(array)}, beyond 16 bits"
        raise UserError(f"{name} holds {what}: numbers of classes or objects? {_CHOOSE}")
    if _numbers_areas(array, middle):
        raise UserError(f"{name} holds areas of {_values(array)}: numbers of classes or objects? {_CHOOSE}")
    return array >= middle


def _numbers_areas(array: np.ndarray, middle: int) -> bool:
    """Whether low values beside 0 fill areas, as the numbers of classes do, and not edges or a background of noise."""
    values = np.unique(array)
    if len(values) > _FEW or values[0] != 0 or not ((values > 0) & (values < middle)).any():
        return False
    inside = _inside(array)
    centre = array[1:-1, 1:-1]
    return bool((inside & (centre > 0) & (centre < middle)).sum() > _AREA * array.size)


def _inside(array: np.ndarray) -> np.ndarray:
    """Of all pixels but the outermost (H - 2, W - 2): whether the four neighbours have the same value."""
    centre = array[1:-1, 1:-1]
    height, width = centre.shape
    same = [
        array[rows : rows + height, columns : columns + width] == centre
        for rows, columns in ((0, 1), (2, 1), (1, 0), (1, 2))
    ]
    return np.logical_and.reduce(same)


def _one_colour(colours: np.ndarray, name: str) -> None:
    """UserError where areas of several colours beside black stand for several objects."""
    if (colours == colours[..., :1]).all() or min(colours.shape[:2]) < 3:
        return
    levels = (np.clip(colours, 0, 255).astype(np.int64) // 16) @ np.array([256, 16, 1])  # JPEG changes colours a little
    found, counts = np.unique(levels[1:-1, 1:-1][_inside(levels)], return_counts=True)
    areas = int(((found > 0) & (counts > _AREA * levels.size)).sum())
    if areas > 1:
        raise UserError(f"{name} holds areas of {areas} colours beside black: several objects? {_CHOOSE}")


def _values(array: np.ndarray) -> str:
    values = np.unique(array)
    shown = [f"{value:g}" for value in values[:4]]
    return ", ".join(shown) + (f", … {values[-1]:g}" if len(values) > 4 else "")
