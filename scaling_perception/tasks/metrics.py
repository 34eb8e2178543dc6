"""Error measures of depth, flow and masks, for one image each: float64 on the host, over the valid pixels.

A data set's figure is the mean over its images of the image's figure. Every function raises ValueError for a NaN or
infinite prediction at a valid pixel and for an image without a valid pixel, so neither can pass as a number.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Bool, Shaped

from scaling_perception.tasks.alignment import fit_scale_shift, valid_values
from scaling_perception.tasks.shapes import Mask, Unchecked

DEPTH_METRICS = ("abs_rel", "delta1", "delta2", "delta3", "sq_rel", "rmse", "rmse_log", "log10", "silog", "i_rmse")
OCCLUSION_METRICS = ("epe_noc", "epe_occ", "f1_noc", "f1_occ")
_SHARES = tuple(f"{kind}_{n}px" for kind in ("outlier", "within") for n in (1, 3, 5))
FLOW_METRICS = ("epe", "epe_fitted", "f1_all", "fl_all", *_SHARES, *OCCLUSION_METRICS)
MASK_METRICS = ("iou", "dice", "iou_painted", "iou_joined")

SHARE, NOT_NEGATIVE = (0.0, 1.0), (0.0, math.inf)
DEPTH_LIMITS = {name: SHARE if name.startswith("delta") else NOT_NEGATIVE for name in DEPTH_METRICS}
FLOW_LIMITS = {name: NOT_NEGATIVE if name.startswith("epe") else SHARE for name in FLOW_METRICS}
FLOW_LIMITS["fl_all"] = (0.0, 100.0)
MASK_LIMITS: dict[str, tuple[float, float]] = dict.fromkeys(MASK_METRICS, SHARE)
"""Metric -> the least and the most that it can be."""

SMALLEST_DEPTH = 1e-6
"""Metres. Predictions are clipped here before any ratio; two negative depths would otherwise agree within delta."""


def _some(values: np.ndarray) -> None:
    if values.size == 0:
        raise ValueError("no valid pixel: leave this image out")


def depth_metrics(
    pred: Unchecked,
    gt: Unchecked,
    valid: Bool[np.ndarray, "..."] | None = None,
    names: Iterable[str] = DEPTH_METRICS,
) -> dict[str, float]:
    """Depth errors of one image. Align and clip the prediction to the data set's range before (`alignment.align`).

    Args:
        pred, gt: (H, W) metres (pred is clipped to at least 1e-6).
        valid: (H, W) bool; None takes every pixel.
        names: which of ``DEPTH_METRICS``; what is not asked for is not computed (logarithms of 24 megapixels take
            a second).

    Returns:
        ``abs_rel`` = mean |p - d| / d; ``sq_rel`` = mean (p - d)^2 / d; ``rmse`` metres; ``i_rmse`` of 1 / p and 1 / d;
        ``rmse_log`` natural logarithm; ``log10`` = mean |log10 p - log10 d|; ``silog`` = 100 x the standard deviation
        of log p - log d; ``delta1``, ``delta2``, ``delta3`` = share with max(p / d, d / p) strictly below 1.25, 1.25^2,
        1.25^3.

    Raises:
        ValueError: shapes differ, a valid pixel is NaN or infinite, the truth is not positive there, or none is valid.
    """
    p, d = valid_values(pred, gt, valid)
    _some(d)
    if d.min() <= 0:
        raise ValueError("the true depth is zero or negative at a valid pixel: mend the valid mask")
    p = np.maximum(p, SMALLEST_DEPTH)
    names = tuple(names)
    error = p - d
    log_error = np.log(p) - np.log(d) if {"rmse_log", "log10", "silog"} & set(names) else error
    ratio = np.maximum(p / d, d / p) if {"delta1", "delta2", "delta3"} & set(names) else error
    formulas: dict[str, Callable[[], np.floating]] = {
        "abs_rel": lambda: np.mean(np.abs(error) / d),
        "sq_rel": lambda: np.mean(error**2 / d),
        "rmse": lambda: np.sqrt(np.mean(error**2)),
        "i_rmse": lambda: np.sqrt(np.mean((1 / p - 1 / d) ** 2)),
        "rmse_log": lambda: np.sqrt(np.mean(log_error**2)),
        "log10": lambda: np.mean(np.abs(log_error)) / np.log(10),
        "silog": lambda: 100 * np.std(log_error),
        "delta1": lambda: np.mean(ratio < 1.25),
        "delta2": lambda: np.mean(ratio < 1.25**2),
        "delta3": lambda: np.mean(ratio < 1.25**3),
    }
    return {name: float(formulas[name]()) for name in names}


def _flow_pixels(pred: np.ndarray, gt: np.ndarray, valid: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    gt = np.asarray(gt)
    if gt.ndim != 3 or gt.shape[-1] != 2:
        raise ValueError(f"a flow has shape (H, W, 2), not {gt.shape}")
    both = None if valid is None else np.repeat(np.asarray(valid, bool)[..., None], 2, axis=-1)
    p, g = valid_values(pred, gt, both)
    _some(g)
    return p.reshape(-1, 2), g.reshape(-1, 2)


def flow_metrics(
    pred: Unchecked,
    gt: Unchecked,
    valid: Bool[np.ndarray, "..."] | None = None,
    occluded: Shaped[np.ndarray, "H W"] | None = None,
) -> dict[str, float]:
    """Flow errors of one image pair.

    Args:
        pred, gt: (H, W, 2) pixels at native size (u right, v down).
        valid: (H, W) bool; None takes every pixel.
        occluded: (H, W) bool, pixels that the second frame does not show; None where that is unknown.

    Returns:
        ``epe`` = mean end-point error in pixels, as it is; ``epe_fitted`` = after a least-squares scale and shift of
        each component to the truth (the protocol of the paper's pictures; never compare it with a raw EPE);
        ``within_1px``, ``within_3px``, ``within_5px`` = share of pixels strictly below that error; ``outlier_1px``,
        ``outlier_3px``, ``outlier_5px`` = share above it; ``f1_all`` = share of outliers (KITTI: error above 3 px and
        above 5 % of the true length; a share, not per cent); ``fl_all`` = the same in per cent, KITTI's Fl-all where it
        is averaged over the pixels of all images, as published. With ``occluded`` also ``epe_noc``, ``f1_noc`` over the
        pixels that are seen twice and ``epe_occ``, ``f1_occ`` over the others; a kind that the image lacks has no
        entry.

    Raises:
        ValueError: shapes differ, a valid pixel is NaN or infinite, or none is valid.
    """
    p, g = _flow_pixels(pred, gt, valid)
    hidden = None
    if occluded is not None:
        keep = np.ones(np.shape(gt)[:2], bool) if valid is None else np.asarray(valid, bool)
        hidden = np.asarray(occluded, bool)[keep]
    fits = [fit_scale_shift(p[:, i], g[:, i]) for i in range(2)]
    fitted = np.stack([fit.scale * p[:, i] + fit.shift for i, fit in enumerate(fits)], axis=-1)
    error = np.linalg.norm(p - g, axis=-1)
    outlier = (error > 3) & (error > 0.05 * np.linalg.norm(g, axis=-1))
    found = {
        "epe": float(error.mean()),
        "epe_fitted": float(np.linalg.norm(fitted - g, axis=-1).mean()),
        **{f"within_{n}px": float(np.mean(error < n)) for n in (1, 3, 5)},
        **{f"outlier_{n}px": float(np.mean(error > n)) for n in (1, 3, 5)},
        "f1_all": float(np.mean(outlier)),
        "fl_all": 100 * float(np.mean(outlier)),
    }
    for name, part in () if hidden is None else (("noc", ~hidden), ("occ", hidden)):
        if part.any():
            found |= {f"epe_{name}": float(error[part].mean()), f"f1_{name}": float(np.mean(outlier[part]))}
    return found


def _mask_counts(pred: np.ndarray, gt: np.ndarray, valid: np.ndarray | None) -> tuple[int, int, int]:
    pred, gt = np.asarray(pred), np.asarray(gt)
    if pred.dtype != bool or gt.dtype != bool:
        raise ValueError(f"masks must be bool, not {pred.dtype} and {gt.dtype}: threshold them first")
    keep = np.ones(gt.shape, bool) if valid is None else np.asarray(valid, bool)
    if not pred.shape == gt.shape == keep.shape:
        raise ValueError(f"prediction {pred.shape}, truth {gt.shape} and valid mask {keep.shape} differ in shape")
    _some(keep[keep])
    both = int(np.count_nonzero(pred & gt & keep))
    return both, int(np.count_nonzero(pred & keep)), int(np.count_nonzero(gt & keep))


def mask_iou(
    pred: Shaped[np.ndarray, "..."], gt: Shaped[np.ndarray, "..."], valid: Bool[np.ndarray, "..."] | None = None
) -> float:
    """Intersection over union of two masks = TP / (TP + FP + FN). Both empty give 0 (see `mean_iou`).

    Args:
        pred, gt: (H, W) bool.
        valid: (H, W) bool pixels to count; None takes all.

    Raises:
        ValueError: shapes differ, the masks are not bool, or no pixel is valid.
    """
    both, ours, theirs = _mask_counts(pred, gt, valid)
    return both / max(ours + theirs - both, 1)


def mask_metrics(
    pred: Shaped[np.ndarray, "..."], gt: Shaped[np.ndarray, "..."], valid: Bool[np.ndarray, "..."] | None = None
) -> dict[str, float]:
    """``iou`` and ``dice`` = 2 TP / (2 TP + FP + FN) of one image; arguments and errors as `mask_iou`."""
    both, ours, theirs = _mask_counts(pred, gt, valid)
    return {"iou": both / max(ours + theirs - both, 1), "dice": 2 * both / max(ours + theirs, 1)}


def mean_iou(pairs: Iterable[tuple[Mask, Mask]]) -> float:
    """mIoU of amodal segmentation: the mean over samples of the IoU, leaving out samples where both masks are empty.

    (Not the mean over classes that the word means in semantic segmentation: there is one object a sample.)

    Args:
        pairs: iterable of (pred, gt), each (H, W) bool.

    Raises:
        ValueError: no sample has a mask, or as `mask_iou`.
    """
    values = [mask_iou(pred, gt) for pred, gt in pairs if np.any(pred) or np.any(gt)]
    if not values:
        raise ValueError("every mask is empty: there is no IoU to average")
    return float(np.mean(values))
