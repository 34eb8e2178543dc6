"""Answers that need no model, to be beaten before a figure means anything; ceilings; and means with their intervals.

The depth answers are fitted to the truth itself (as the metric's own alignment would), so they are the best of their
kind: what looking at the picture must improve upon.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from scaling_perception.evaluation.metrics import mask_iou
from scaling_perception.tasks.amodal import mask_from_whole
from scaling_perception.tasks.common import to_unit
from scaling_perception.tasks.resize import resize_bilinear, resize_nearest


def depth_baselines(gt: Any, valid: Any | None = None) -> dict[str, np.ndarray]:
    """Depth without an image: three least-squares fits over the valid pixels.

    ``constant``: one depth (the mean). ``row``: a + b * row. ``inverse_row``: 1 / (a + b * row), fitted in inverse
    depth (a plane seen in perspective has an inverse depth linear in the row), clipped to the range of the valid truth.

    Args:
        gt: (H, W) metres, positive where valid.
        valid: (H, W) bool; None takes every pixel.

    Returns:
        {name: float64 (H, W) metres}.

    Raises:
        ValueError: no pixel is valid.
    """
    gt = np.asarray(gt, np.float64)
    mask = np.ones(gt.shape, bool) if valid is None else np.asarray(valid, bool)
    if not mask.any():
        raise ValueError("no valid pixel: leave this image out")
    depth = gt[mask]
    height, width = gt.shape
    # Centred rows of unit scale keep the two columns of the fit apart; one valid row leaves the slope at 0.
    row = np.repeat((np.arange(height) / max(height, 1) - 0.5)[:, None], width, axis=1)

    def line(values: np.ndarray) -> np.ndarray:
        design = np.stack([np.ones_like(values), row[mask]], axis=-1)
        (offset, slope), *_ = np.linalg.lstsq(design, values, rcond=None)
        return offset + slope * row

    nearness = np.clip(line(1 / depth), 1 / depth.max(), 1 / depth.min())
    return {"constant": np.full(gt.shape, depth.mean()), "row": line(depth), "inverse_row": 1 / nearness}


def flow_baselines(gt: Any, valid: Any | None = None) -> dict[str, np.ndarray]:
    """Flow without an image: ``zero``, and ``oracle_mean``, the mean true flow over the valid pixels everywhere.

    Args:
        gt: (H, W, 2) pixels.
        valid: (H, W) bool; None takes every pixel.

    Returns:
        {name: float64 (H, W, 2) pixels}.

    Raises:
        ValueError: no pixel is valid.
    """
    gt = np.asarray(gt, np.float64)
    mask = np.ones(gt.shape[:2], bool) if valid is None else np.asarray(valid, bool)
    if not mask.any():
        raise ValueError("no valid pixel: leave this pair out")
    mean = np.broadcast_to(gt[mask].mean(axis=0), gt.shape).copy()
    return {"zero": np.zeros(gt.shape), "oracle_mean": mean}


def amodal_baselines(visible_mask: Any) -> dict[str, np.ndarray]:
    """The amodal mask without completion: ``visible``, the mask that was given. (H, W) bool -> {name: (H, W) bool}."""
    return {"visible": np.asarray(visible_mask, bool)}


def painted_whole(image: Any, whole_mask: Any) -> np.ndarray:
    """What is seen inside the true mask, on white: uint8 (H, W, 3), where nobody has the whole object's picture."""
    return np.where(np.asarray(whole_mask, bool)[..., None], np.asarray(image, np.uint8), np.uint8(255))


def amodal_ceiling(
    raw: Mapping[str, Any],
    resolution: int,
    threshold: float = 250,
    round_trip: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, float]:
    """IoU that a perfect painter of one object would get: the protocol's rule applied to the true picture.

    A threshold finds a painted object on white only where the object is darker than the threshold, and its blurred
    border is white (facts 5.3: 0.90 to 0.98 on pix2gestalt's own pictures). What a model reaches is to be read against
    this, not against 1.

    Args:
        raw: an amodal sample; without a ``whole`` picture, what is seen inside the true mask takes its place.
        resolution: side R of the model's square, to which the picture goes and from which the mask comes back by
            nearest.
        threshold: on 0..255.
        round_trip: pictures (1, R, R, 3) in [-1, 1] through an autoencoder and back; None leaves that ceiling out.

    Returns:
        ``threshold``: IoU of the mask from the true picture; ``autoencoder``: the same after the round trip.
    """
    truth = np.asarray(raw["whole_mask"], bool)
    whole = raw.get("whole")
    whole = painted_whole(raw["image"], truth) if whole is None else whole
    picture = to_unit(resize_bilinear(whole, (resolution, resolution)))

    def score(pixels: np.ndarray) -> float:
        return mask_iou(resize_nearest(mask_from_whole(pixels, threshold), truth.shape), truth)

    ceilings = {"threshold": score(picture)}
    if round_trip is not None:
        ceilings["autoencoder"] = score(np.asarray(round_trip(picture[None]), np.float32)[0])
    return ceilings
