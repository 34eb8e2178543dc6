"""How each task is measured on each data set, as data: range, crop, clipping, alignment, metrics, trivial answers.

Depth (facts 6.1; Marigold's protocol): prediction resized bilinearly to the truth's size → least-squares scale and
shift over the valid pixels, in depth → clipped to the data set's range → AbsRel and δ1 on the valid pixels. Flow (facts
6.2): end-point error at native size in pixels, raw and after a fit of scale and shift per component (the paper's
pictures use the fitted one; FlyingChairs' table does not say). Amodal (facts 6.3): threshold → IoU at native size.
Every figure is the mean over images of the image's figure.

A protocol is a plain dictionary with a fingerprint, which is stored with every result: figures compare only where the
fingerprints are equal.
"""

import hashlib
import json
from typing import Any

import numpy as np

from scaling_perception.evaluation.alignment import align
from scaling_perception.evaluation.baselines import amodal_baselines, depth_baselines, flow_baselines
from scaling_perception.evaluation.metrics import depth_metrics, flow_metrics, mask_metrics
from scaling_perception.support.errors import UserError, did_you_mean

TASKS: dict[str, dict[str, Any]] = {
    "depth": {
        "metrics": ["abs_rel", "delta1"],
        "alignment": "least squares, depth space",
        "baselines": ["constant", "row", "inverse_row"],
    },
    "flow": {"metrics": ["epe", "epe_fitted"], "alignment": "none", "baselines": ["zero", "oracle_mean"]},
    "amodal": {"metrics": ["iou"], "alignment": "none", "baselines": ["visible"]},
}

REDUCE: dict[str, tuple[str, ...]] = {
    "depth": ("lsq", "median", "minmax", "marigold"),
    "flow": ("mean", "median"),
    "amodal": ("median",),
}
"""How the members of each task may be merged; the first is the default (facts 7)."""

# Metres. Pixels with minimum < depth < maximum count; predictions are clipped to that range; None is no limit.
DEPTH_SETS: dict[str, dict[str, Any]] = {
    "hypersim": {"minimum": 1e-5, "maximum": 65.0},
    "nyuv2": {"minimum": 1e-3, "maximum": 10.0, "crop": "eigen_nyu"},
    "kitti_depth": {"minimum": 1e-5, "maximum": 80.0, "image_crop": "kitti_benchmark", "crop": "eigen_kitti"},
    "eth3d": {"minimum": 1e-5, "maximum": None},
    "scannet": {"minimum": 1e-3, "maximum": 10.0},
    # The mask of the data set decides what is valid; the range only clips.
    "diode": {"minimum": 0.6, "maximum": 350.0, "mask_by_range": False},
    "icl_nuim": {"minimum": 1e-3, "maximum": 10.0},
    "tum_rgbd": {"minimum": 1e-3, "maximum": 10.0},
    "scenes": {"minimum": 1e-3, "maximum": None},
}
_ANY_DEPTH = {"minimum": 1e-5, "maximum": None}

# Rectangles as fractions (top, bottom, left, right) of the height and width, rounded down to pixels.
CROPS = {
    "eigen_nyu": (45 / 480, 471 / 480, 41 / 640, 601 / 640),
    "eigen_kitti": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
}
KITTI_BENCHMARK_CROP = (352, 1216)  # height from the bottom, width from the centre


def reduce_mode(task: str, mode: str | None) -> str:
    """``mode``, or the task's default for None.

    Raises:
        UserError: the task has no such mode.
    """
    if mode is None:
        return REDUCE[task][0]
    if mode not in REDUCE[task]:
        raise UserError(f"unknown way '{mode}' to merge {task} members{did_you_mean(mode, REDUCE[task])}")
    return mode


def get_protocol(task: str, dataset: str, **changes: Any) -> dict[str, Any]:
    """The protocol of a task on a data set; a data set that is not in the tables gets no range, crop or clipping.

    Args:
        changes: fields to change, such as ``image_crop=None`` for KITTI at full size; they show in the fingerprint.

    Returns:
        JSON-able dictionary with ``fingerprint``, 12 hexadecimal digits of the SHA-256 of the rest.
    """
    protocol = {"task": task, "dataset": dataset, "mean": "over images", **TASKS[task]}
    if task == "depth":
        protocol |= {"crop": None, "image_crop": None, "mask_by_range": True}
        protocol |= DEPTH_SETS.get(dataset, _ANY_DEPTH)
    protocol |= changes
    return {**protocol, "fingerprint": fingerprint(protocol)}


def fingerprint(protocol: dict[str, Any]) -> str:
    """12 hexadecimal digits of the SHA-256 of a protocol (its own fingerprint left out)."""
    rest = {name: value for name, value in protocol.items() if name != "fingerprint"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:12]


def crop_mask(name: str | None, size: tuple[int, int]) -> np.ndarray:
    """bool (H, W): True inside the named crop, everywhere for None."""
    height, width = size
    if name is None:
        return np.ones(size, bool)
    top, bottom, left, right = CROPS[name]
    # A hair is added so that 45 / 480 of 480 rows is row 45, not 44.999...
    rows = slice(int(top * height + 1e-6), int(bottom * height + 1e-6))
    columns = slice(int(left * width + 1e-6), int(right * width + 1e-6))
    inside = np.zeros(size, bool)
    inside[rows, columns] = True
    return inside


def prepare_raw(raw: dict[str, Any], protocol: dict[str, Any]) -> dict[str, Any]:
    """The sample as the protocol wants it: KITTI's benchmark crop of every map, and the valid mask of the metric.

    Args:
        raw: a raw sample; not changed.

    Returns:
        A sample whose ``valid`` (depth, flow) is what is measured. Without a valid pixel the image has no figure.
    """
    raw = dict(raw)
    if protocol.get("image_crop") == "kitti_benchmark":
        height, width = raw["image"].shape[:2]
        rows, columns = KITTI_BENCHMARK_CROP
        if height > rows or width > columns:
            top, left = max(height - rows, 0), max((width - columns) // 2, 0)
            for name, value in raw.items():
                if isinstance(value, np.ndarray) and value.shape[:2] == (height, width):
                    raw[name] = value[top : top + rows, left : left + columns]
    if protocol["task"] == "depth":
        depth = raw["depth"]
        valid = np.asarray(raw["valid"], bool) & np.isfinite(depth) & (depth > 0)
        if protocol["mask_by_range"]:
            valid &= depth > protocol["minimum"]
            if protocol["maximum"] is not None:
                valid &= depth < protocol["maximum"]
        raw["valid"] = valid & crop_mask(protocol["crop"], depth.shape)
    elif protocol["task"] == "flow":
        raw["valid"] = np.asarray(raw["valid"], bool) & np.isfinite(raw["flow"]).all(axis=-1)
    return raw


def unmeasurable(raw: dict[str, Any], protocol: dict[str, Any]) -> str:
    """Why a prepared sample has no figure; empty if it has one. Does not depend on any prediction."""
    if protocol["task"] == "amodal":
        return "" if raw["whole_mask"].any() else "the true mask is empty"
    return "" if raw["valid"].any() else "no valid pixel within range and crop"


def aligned_depth(prediction: np.ndarray, raw: dict[str, Any], protocol: dict[str, Any]) -> np.ndarray:
    """A depth prediction (H, W) in metres: least-squares scale and shift to the truth, clipped to the range."""
    return align(prediction, raw["depth"], raw["valid"], protocol["minimum"], protocol["maximum"])


def measure(
    prediction: np.ndarray, raw: dict[str, Any], protocol: dict[str, Any], fitted: bool = False
) -> dict[str, float]:
    """The protocol's metrics of one prediction at native size.

    Args:
        prediction: depth (H, W) affine-invariant (metres with ``fitted``), flow (H, W, 2) pixels, amodal bool (H, W).
        raw: the sample through ``prepare_raw``.
        fitted: depth is in metres already: no alignment, only clipping.

    Raises:
        ValueError: NaN or infinity in the prediction, or nothing to measure (see ``unmeasurable``).
    """
    task = protocol["task"]
    if task == "depth":
        if fitted:
            metres = np.clip(prediction, protocol["minimum"], protocol["maximum"])
        else:
            metres = aligned_depth(prediction, raw, protocol)
        found = depth_metrics(metres, raw["depth"], raw["valid"])
    elif task == "flow":
        found = flow_metrics(prediction, raw["flow"], raw["valid"])
    else:
        found = mask_metrics(np.asarray(prediction, bool), np.asarray(raw["whole_mask"], bool))
    return {name: found[name] for name in protocol["metrics"]}


def baseline_rows(raw: dict[str, Any], protocol: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The metrics of each trivial answer to one prepared sample: {baseline: {metric: value}}.

    Depth's are fitted to the truth as they are made, so they are clipped but not aligned again.
    """
    task = protocol["task"]
    if task == "depth":
        answers = depth_baselines(raw["depth"], raw["valid"])
    elif task == "flow":
        answers = flow_baselines(raw["flow"], raw["valid"])
    else:
        answers = amodal_baselines(raw["visible_mask"])
    return {name: measure(answers[name], raw, protocol, fitted=True) for name in protocol["baselines"]}
