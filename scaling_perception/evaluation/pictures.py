"""Pictures of results: truth, prediction, error and uncertainty side by side, as uint8 RGB at native size."""

from typing import Any

import numpy as np

from scaling_perception.data.formats import depth_to_color, flow_to_color
from scaling_perception.evaluation.prediction import Estimate
from scaling_perception.evaluation.protocols import aligned_depth

WORST_ABS_REL = 0.5  # relative depth error that is drawn at full scale


def heat(values: np.ndarray, full: float | None = None, valid: np.ndarray | None = None) -> np.ndarray:
    """Non-negative (H, W) from black (0) to yellow (``full``; None: the largest value); invalid pixels are grey."""
    import matplotlib

    known = np.isfinite(values) if valid is None else np.asarray(valid, bool) & np.isfinite(values)
    values = np.where(known, values, 0)
    top = float(values.max(initial=0)) if full is None else full
    colour = matplotlib.colormaps["inferno"](np.clip(values / max(top, 1e-12), 0, 1))[..., :3]
    return np.where(known[..., None], (colour * 255).astype(np.uint8), np.uint8(128))


def mask_over(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int] = (255, 80, 0)) -> np.ndarray:
    """The image darkened, with ``mask`` in half-transparent colour."""
    base = image.astype(np.float32) * np.where(mask, 0.5, 0.6)[..., None]
    return (base + 0.5 * mask[..., None] * np.asarray(colour, np.float32)).clip(0, 255).astype(np.uint8)


def whole_picture(whole: np.ndarray) -> np.ndarray:
    """RGB in [-1, 1] as uint8."""
    return np.round((np.clip(whole, -1, 1) + 1) * 127.5).astype(np.uint8)


def panel_pictures(
    task: str, raw: dict[str, Any], estimate: Estimate, protocol: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Pictures of one evaluated image: image, prompt (flow, amodal), truth, prediction, error, uncertainty.

    Depth is drawn after its alignment, on the scale of the truth's 2 % to 98 % quantiles, and its error is |p - d| / d
    up to 0.5; flow on the truth's largest speed, error in pixels up to that speed; an amodal error is red where the
    prediction has too much, blue where it lacks.

    Args:
        raw: the prepared sample.
    """
    pictures = {"image": np.asarray(raw["image"])}
    spread = heat(estimate.uncertainty)
    if task == "depth":
        depth, valid = raw["depth"], raw["valid"]
        low, high = np.quantile(depth[valid], (0.02, 0.98))
        metres = aligned_depth(estimate.prediction, raw, protocol)
        span = max(high - low, 1e-6)
        pictures["truth"] = depth_to_color((depth - low) / span, valid)
        pictures["prediction"] = depth_to_color((metres - low) / span)
        error = np.abs(metres - depth) / np.where(valid, depth, 1)
        pictures["error"] = heat(error, WORST_ABS_REL, valid)
    elif task == "flow":
        flow, valid = raw["flow"], raw["valid"]
        fastest = max(float(np.linalg.norm(flow, axis=-1)[valid].max()), 1e-6)
        pictures["prompt"] = np.asarray(raw["image2"])
        pictures["truth"] = flow_to_color(flow, fastest, valid)
        pictures["prediction"] = flow_to_color(estimate.prediction, fastest)
        error = np.linalg.norm(estimate.prediction - np.where(valid[..., None], flow, 0), axis=-1)
        pictures["error"] = heat(error, fastest, valid)
    else:
        truth, mask = np.asarray(raw["whole_mask"], bool), estimate.prediction
        pictures["prompt"] = mask_over(pictures["image"], np.asarray(raw["visible_mask"], bool))
        pictures["truth"] = mask_over(pictures["image"], truth)
        pictures["prediction"] = mask_over(pictures["image"], mask)
        error = np.zeros((*truth.shape, 3), np.uint8)
        error[truth & mask] = 255
        error[mask & ~truth] = (220, 50, 40)
        error[truth & ~mask] = (40, 90, 220)
        pictures["error"] = error
    return {**pictures, "uncertainty": spread}
