"""The visible part of an object as a mask (H, W): of what was painted, of a box, of points.

A box and points are refined by the picture's colours. That is a help, no segmentation model: the page shows the mask
before it is used.
"""

import re
from typing import Any

import numpy as np
from PIL import Image

from scaling_perception.support.errors import UserError

_CLUSTERS = 6  # colours that describe the surroundings of a box


def numbers(text: str, what: str, form: str) -> np.ndarray:
    """Pairs of numbers of a text such as ``12,30 40,80``, float (N, 2).

    Raises:
        UserError: other words, or a number without its partner.
    """
    words = re.split(r"[\s,;]+", text.strip()) if text.strip() else []
    try:
        found = np.asarray([float(word) for word in words])
    except ValueError:
        found = np.asarray([np.nan])
    if len(found) % 2 or not np.isfinite(found).all():
        raise UserError(f"{what} '{text}': give {form}, in pixels of the picture")
    return found.reshape(-1, 2)


def of_painting(drawn: Any, size: tuple[int, int]) -> np.ndarray | None:
    """What was painted with the brush, at native size (H, W); None where nothing was.

    Args:
        drawn: value of the editor: ``layers`` are RGBA arrays.
    """
    layers = [np.asarray(layer) for layer in (drawn or {}).get("layers") or () if layer is not None]
    painted = [layer[..., 3] > 127 for layer in layers if layer.ndim == 3 and layer.shape[2] == 4]
    if not any(one.any() for one in painted):
        return None
    whole = np.any(np.stack(painted), axis=0)
    return np.asarray(Image.fromarray(whole).resize((size[1], size[0]), Image.Resampling.NEAREST))


def of_box(text: str, image: np.ndarray, refine: bool = True) -> np.ndarray | None:
    """The object in a box ``x0,y0 x1,y1``: the pixels in it whose colours are rare around it; None for an empty text.

    Args:
        refine: False takes the whole box.

    Raises:
        UserError: no two corners, or a box without a pixel in the picture.
    """
    corners = numbers(text, "box", "two corners x0,y0 x1,y1")
    if not len(corners):
        return None
    if len(corners) != 2:
        raise UserError(f"box '{text}': give two corners x0,y0 x1,y1, in pixels of the picture")
    height, width = image.shape[:2]
    (left, top), (right, bottom) = np.floor(corners.min(0)).astype(int), np.ceil(corners.max(0)).astype(int) + 1
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if right - left < 2 or bottom - top < 2:
        raise UserError(f"box '{text}' holds no part of the picture of {width}x{height}: give two corners in it")
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return _rare_within(image, mask, (top, bottom, left, right)) if refine else mask


def _rare_within(image: np.ndarray, box: np.ndarray, edges: tuple[int, int, int, int]) -> np.ndarray:
    """The pixels of a box that differ from the colours of a frame around it; the box where hardly any or all do."""
    from scipy import ndimage
    from scipy.cluster.vq import kmeans2

    top, bottom, left, right = edges
    wide = max(3, (bottom - top) // 6, (right - left) // 6)
    around = np.zeros_like(box)
    around[max(top - wide, 0) : bottom + wide, max(left - wide, 0) : right + wide] = True
    around &= ~box
    if around.sum() < 8 * _CLUSTERS:
        return box
    smooth = ndimage.gaussian_filter(image.astype(np.float32), (0.7, 0.7, 0))
    outside = smooth[around]
    outside = outside[:: max(1, len(outside) // 4000)]
    centres = np.unique(outside.round(), axis=0)
    if len(centres) > _CLUSTERS:
        centres, _ = kmeans2(outside, _CLUSTERS, rng=np.random.default_rng(0), minit="++")
    inside = smooth[top:bottom, left:right]
    away = np.min(np.linalg.norm(inside[:, :, None] - centres[None, None], axis=-1), axis=-1)
    usual = np.min(np.linalg.norm(outside[:, None] - centres[None], axis=-1), axis=-1)
    own = away > max(float(np.quantile(usual, 0.95)), 12.0, 0.45 * float(np.quantile(away, 0.98)))
    own = ndimage.binary_opening(own)
    labels, count = _labelled(own)
    if count:
        sizes = np.bincount(labels.ravel())[1:]
        own = np.isin(labels, 1 + np.flatnonzero(sizes >= 0.2 * sizes.max()))
        own = ndimage.binary_fill_holes(own)
    if own is None or own.mean() < 0.05:
        return box
    found = np.zeros_like(box)
    found[top:bottom, left:right] = own
    return found


def _labelled(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Connected parts of a mask, numbered from 1, and how many there are."""
    from scipy import ndimage

    labels = np.zeros(mask.shape, np.int32)
    return labels, int(ndimage.label(mask, output=labels))  # pyright: ignore[reportArgumentType]


def of_points(text: str, image: np.ndarray, tolerance: float) -> np.ndarray | None:
    """The connected pixels around every point ``x,y`` whose colour is like the point's; None for an empty text.

    Args:
        tolerance: how far a colour may be from that around the point, in levels of 0..255.

    Raises:
        UserError: no pairs of numbers, or a point outside of the picture.
    """
    from scipy import ndimage

    points = numbers(text, "points", "points x,y x,y")
    if not len(points):
        return None
    height, width = image.shape[:2]
    smooth = ndimage.gaussian_filter(image.astype(np.float32), (0.7, 0.7, 0))
    mask = np.zeros((height, width), bool)
    for x, y in np.round(points).astype(int):
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(f"points: {x},{y} lies outside of the picture of {width}x{height}: give points in it")
        near = np.linalg.norm(smooth - smooth[y, x], axis=-1) <= tolerance
        labels, _ = _labelled(near)
        mask |= labels == labels[y, x]
    return ndimage.binary_fill_holes(mask)
