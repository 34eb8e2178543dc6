"""Least-squares scale and shift of an affine-invariant prediction to the truth: closed form, float64, on the host.

Affine-invariant depth is scored after the best s * prediction + t in depth space over the valid pixels (Ranftl et al.
2020; Marigold's protocol). The fit is per image, and per component where a flow is fitted.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Real

from scaling_perception.tasks.shapes import Size, Unchecked

THINNED = "no valid pixel in the columns that its alignment looks at"


class Fit(NamedTuple):
    """truth is about scale * prediction + shift (shift in the truth's unit)."""

    scale: float
    shift: float


def valid_values(
    pred: Unchecked, gt: Unchecked, valid: Bool[np.ndarray, "..."] | None
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The valid entries of a prediction and its truth, float64 (n,) each.

    Args:
        pred, gt: the same shape.
        valid: bool of that shape; None takes every entry. The truth may be anything where it is not valid.

    Raises:
        ValueError: shapes differ, or a valid entry is NaN or infinite: a broken model must not score as a bad one.
    """
    pred, gt = np.asarray(pred), np.asarray(gt)
    mask = np.ones(gt.shape, bool) if valid is None else np.asarray(valid, bool)
    if not pred.shape == gt.shape == mask.shape:
        raise ValueError(f"prediction {pred.shape}, truth {gt.shape} and valid mask {mask.shape} differ in shape")
    values, truth = pred[mask].astype(np.float64), gt[mask].astype(np.float64)
    for name, entries in (("prediction", values), ("truth", truth)):
        broken = int(np.count_nonzero(~np.isfinite(entries)))
        if broken:
            raise ValueError(f"the {name} is NaN or infinite at {broken} of {entries.size} valid pixels")
    return values, truth


def fit_scale_shift(pred: Unchecked, gt: Unchecked, valid: Bool[np.ndarray, "..."] | None = None) -> Fit:
    """The scale and shift that minimise sum (scale * pred + shift - gt)^2 over the valid pixels.

    Degenerate cases have defined answers: a constant prediction (or one valid pixel) gives scale 0 and the mean of the
    truth, which is the best a constant can do; no valid pixel gives (1, 0). The scale may be negative.

    Args:
        pred, gt: (H, W) or any same shape; gt in metres for depth.
        valid: bool of that shape; None takes every pixel.

    Raises:
        ValueError: shapes differ, or a valid pixel is NaN or infinite.
    """
    values, truth = valid_values(pred, gt, valid)
    if values.size == 0:
        return Fit(1.0, 0.0)
    mean, mean_truth = float(values.mean()), float(truth.mean())
    centred = values - mean  # centring first keeps the digits that the textbook normal equations lose
    variance = float(np.mean(centred**2))
    if variance <= 1e-28 * max(mean**2, np.finfo(np.float64).tiny):
        return Fit(0.0, mean_truth)
    scale = float(np.mean(centred * (truth - mean_truth))) / variance
    return Fit(scale, mean_truth - scale * mean)


def nearest_columns(size: Size, max_resolution: int) -> Int[np.ndarray, " n"]:
    """The columns of (H, W) that a fit at most ``max_resolution`` on the long side looks at, int64 (n,), rising.

    Marigold thins ETH3D's maps for the fit with a filter that acts on the width alone (facts 6.1), in float32; so here.
    """
    height, width = size
    factor = min(max_resolution / height, max_resolution / width)
    if factor >= 1:
        return np.arange(width)
    columns = np.floor(np.arange(int(width * factor), dtype=np.float32) * np.float32(1 / factor))
    return np.minimum(columns.astype(np.int64), width - 1)


def align(
    pred: Real[np.ndarray, "*shape"],
    gt: Unchecked,
    valid: Bool[np.ndarray, "..."] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    max_resolution: int | None = None,
) -> Float[np.ndarray, "*shape"]:
    """The prediction after its least-squares scale and shift, clipped to the range of the data set.

    Args:
        pred, gt, valid: as in `fit_scale_shift`.
        minimum, maximum: metres; None leaves that side open.
        max_resolution: fit on fewer columns of larger maps (`nearest_columns`); None fits on every pixel.

    Returns:
        float64 of pred's shape.

    Raises:
        ValueError: as `fit_scale_shift`, or no pixel is valid in the columns that the fit looks at.
    """
    if max_resolution is None:
        scale, shift = fit_scale_shift(pred, gt, valid)
    else:
        height, width = np.asarray(gt).shape
        some = nearest_columns((height, width), max_resolution)
        few = None if valid is None else np.asarray(valid, bool)[:, some]
        if few is not None and not few.any():
            raise ValueError(f"{THINNED}: leave this image out")
        scale, shift = fit_scale_shift(np.asarray(pred)[:, some], np.asarray(gt)[:, some], few)
    aligned = scale * np.asarray(pred, np.float64) + shift
    return aligned if minimum is None and maximum is None else np.clip(aligned, minimum, maximum)
