"""How tasks are measured on each data set, as data: range, crop, clipping, alignment, metrics, trivial answers.

What a task knows itself is in ``tasks``; what is here is known of data sets.

Depth (facts 6.1; Marigold's protocol): prediction resized bilinearly to the truth's size → least-squares scale and
shift over the valid pixels, in depth → clipped to the data set's range → AbsRel and δ1 on the valid pixels. Flow (facts
6.2): end-point error at native size in pixels, raw and after a fit of scale and shift per component (the paper's
pictures use the fitted one; FlyingChairs' table does not say). Amodal (facts 6.3): whole image to the model's square →
threshold → mask back to native size by nearest → IoU there. Every figure is the mean over images of the image's figure.

A protocol is a plain dictionary with a fingerprint, which is stored with every result: figures compare only where the
fingerprints are equal.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from scaling_perception.data.sources.published import PUBLISHED
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.tasks import TaskOptions, get_task
from scaling_perception.tasks.base import WEIGHT

# Metres. Pixels with minimum < depth < maximum count; predictions are clipped to that range; None is no limit.
DEPTH_SETS: dict[str, dict[str, Any]] = {
    "hypersim": {"minimum": 1e-5, "maximum": 65.0},
    "nyuv2": {"minimum": 1e-3, "maximum": 10.0, "crop": "eigen_nyu"},
    "kitti_depth": {"minimum": 1e-5, "maximum": 80.0, "image_crop": "kitti_benchmark", "crop": "eigen_kitti"},
    "eth3d": {"minimum": 1e-5, "maximum": None, "alignment_resolution": 1024},
    "scannet": {"minimum": 1e-3, "maximum": 10.0},
    # The mask of the data set decides what is valid; the range only clips.
    "diode": {"minimum": 0.6, "maximum": 350.0, "mask_by_range": False},
    "vkitti2": {"minimum": 1e-5, "maximum": 80.0},
    "icl_nuim": {"minimum": 1e-3, "maximum": 10.0},
    "tum_rgbd": {"minimum": 1e-3, "maximum": 10.0},
    "scenes": {"minimum": 1e-3, "maximum": None},
}

# What is on record of each set. It describes a figure and does not decide it, so it is no part of the fingerprint.
# ``published_resolution``: the long side at which Marigold's published figures were predicted, 0 the picture's own
# (amodal: the square of pix2gestalt). ``samples``, how many a split has, is ``data.sources.published``.
_RECORD = {"split": "val", "samples": {}, "decode": "", "published_resolution": None, "rule": ""}
RECORDS: dict[str, dict[str, Any]] = {
    "hypersim": {
        "decode": "16-bit PNG / 1000",
        "published_resolution": 0,
        "rule": "facts 6.1",
    },
    "nyuv2": {
        "split": "test",
        "decode": "16-bit PNG / 1000, the raw map",
        "published_resolution": 0,
        "rule": "facts 6.1",
    },
    "kitti_depth": {
        "split": "test",
        "decode": "16-bit PNG / 256",
        "published_resolution": 0,
        "rule": "facts 6.1; Eigen test files with ground truth, 697 listed - 45 without",
    },
    "eth3d": {
        "split": "all",
        "decode": "raw float32, inf unknown",
        "published_resolution": 756,
        "rule": "facts 6.1",
    },
    "scannet": {
        "decode": "16-bit PNG / 1000",
        "published_resolution": 0,
        "rule": "facts 6.1; Marigold's sample of the validation scenes",
    },
    "diode": {
        "decode": "npy, valid by its mask",
        "published_resolution": 640,
        "rule": "facts 6.1",
    },
    "flying_chairs": {"decode": ".flo", "rule": "facts 6.2"},
    "sintel": {"decode": ".flo", "rule": "facts 6.2; the training part, as RAFT validates"},
    "kitti_flow": {
        "decode": "16-bit PNG, (v - 32768) / 64",
        "rule": "facts 6.2; the training part, as RAFT validates",
    },
    "middlebury_flow": {"decode": ".flo, unknown above 1e9", "rule": "facts 6.2"},
    "pix2gestalt": {
        "decode": "PNG, masks from 128",
        "published_resolution": 256,
        "rule": "facts 5.3 and 6.3; the last 1 % by name",
    },
    "coco_amodal": {
        "decode": "polygons and run lengths as COCO's tool fills them",
        "published_resolution": 256,
        "rule": "facts 6.3; every region of 1323 images",
    },
    "mp3d_amodal": {
        "split": "test",
        "decode": "run lengths",
        "published_resolution": 256,
        "rule": "facts 6.3; every region",
    },
}

KITTI_BENCHMARK_CROP = (352, 1216)  # height from the bottom, width from the centre


def get_protocol(task: str, dataset: str, metrics: Iterable[str] | None = None, **changes: Any) -> dict[str, Any]:
    """The protocol of a task on a data set; a data set that is not in the tables gets no range, crop or clipping.

    Args:
        metrics: names of the task's ``metrics`` to measure instead of the task's own; "all" takes every one.
        changes: fields to change, such as ``image_crop=None`` for KITTI at full size; they show in the fingerprint.

    Returns:
        JSON-able dictionary. What decides a figure: ``task``, ``dataset``, ``mean``, ``alignment``, ``metrics``,
        ``baselines``; depth: the valid range ``minimum``, ``maximum`` in metres (unless ``mask_by_range`` is false),
        ``image_crop`` of every map, ``crop`` of the valid mask, ``clip`` of the prediction, ``alignment_resolution``;
        depth and flow: ``minimum_valid``, the fewest valid pixels of an image that has a figure (a fit of scale and
        shift passes through two pixels whatever was predicted); amodal: ``threshold`` of what is
        painted, and whether the given mask joins it (``keep_visible``), both as the model has them. What describes it:
        ``resolution``, ``split``, ``samples``, ``decode``, ``published_resolution`` and ``rule``, the source of all
        this. And ``fingerprint``, 12 hexadecimal digits of the SHA-256 of what decides; it is the same whichever
        metrics are asked for.

    Raises:
        UserError: an unknown metric or field.
    """
    what = get_task(task)
    protocol = {"task": task, "dataset": dataset, "mean": "over images", **what.protocol}
    if "crop" in protocol:  # a task that is measured within a range
        protocol |= DEPTH_SETS.get(dataset, {})
    if metrics is not None:
        protocol["metrics"] = list(what.metrics if metrics == "all" else metrics)
        for name in protocol["metrics"]:
            if name not in what.metrics:
                raise UserError(f"{task} has no metric '{name}'{did_you_mean(name, what.metrics)}")
    for name in changes:
        if name not in (*protocol, "alignment_resolution"):
            raise UserError(f"the protocol of {task} has no field '{name}'{did_you_mean(name, protocol)}")
    protocol |= changes
    if "maximum" in protocol:
        protocol["clip"] = [protocol["minimum"], protocol["maximum"]]
    samples = PUBLISHED.get(dataset, {})
    described = {**_RECORD, **RECORDS.get(dataset, {}), "samples": samples, "resolution": what.sizes}
    return {**protocol, **described, "fingerprint": fingerprint(protocol)}


def protocol_of(options: TaskOptions, task: str, dataset: str, metrics: Iterable[str] | None = None) -> dict[str, Any]:
    """`get_protocol` as a model of these options makes its answers."""
    own = {"threshold": options.mask_threshold, "keep_visible": options.keep_visible}
    known = get_task(task).protocol
    return get_protocol(task, dataset, metrics, **{name: value for name, value in own.items() if name in known})


def fingerprint(protocol: dict[str, Any]) -> str:
    """12 hexadecimal digits of the SHA-256 of the fields that decide a figure; not of how many metrics are shown."""
    left_out = {*_RECORD, "fingerprint", "resolution", "clip"}  # clip is the range
    rest = {name: value for name, value in protocol.items() if name not in left_out}
    rest["metrics"] = get_task(protocol["task"]).protocol["metrics"]
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:12]


def count_note(protocol: dict[str, Any], split: str, found: int) -> str:
    """What to tell where a set has another number of samples than on record; empty where it fits or none is known."""
    known = protocol["samples"].get(split)
    expected = known if isinstance(known, list) else [known]
    if known is None or found in expected:
        return ""
    return f"{protocol['dataset']} {split}: {' or '.join(map(str, expected))} samples expected, {found} found"


def prepare_raw(raw: dict[str, Any], protocol: dict[str, Any]) -> dict[str, Any]:
    """The sample as the protocol wants it: KITTI's benchmark crop of every map, and the valid mask of the metric.

    Args:
        raw: a raw sample; not changed.

    Returns:
        A sample whose ``valid`` (depth, flow) is what is measured. Without a valid pixel the image has no figure. An
        amodal sample without a ``whole`` picture gets what is seen inside the true mask: for the floor, not for IoU.
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
    return get_task(protocol["task"]).prepare(raw, protocol)


def unmeasurable(raw: dict[str, Any], protocol: dict[str, Any]) -> str:
    """Why a prepared sample has no figure; empty if it has one. Does not depend on any prediction."""
    return get_task(protocol["task"]).unmeasurable(raw, protocol)


def measure(
    prediction: np.ndarray,
    raw: dict[str, Any],
    protocol: dict[str, Any],
    fitted: bool = False,
    painted: np.ndarray | None = None,
) -> dict[str, float]:
    """The protocol's metrics of one prediction at native size.

    Of ``epe_noc`` and the like those that the image has pixels for (see ``flow_metrics``). Of amodal masks ``iou`` is
    that of the answer, ``iou_painted`` that of what was painted, ``iou_joined`` that of both with the given mask.

    Args:
        prediction: depth (H, W) affine-invariant (metres with ``fitted``), flow (H, W, 2) pixels, amodal bool (H, W).
        raw: the sample through ``prepare_raw``.
        fitted: depth is in metres already: no alignment, only clipping.
        painted: bool (H, W), the mask of what was painted, where the prediction may hold more.

    Raises:
        ValueError: NaN or infinity in the prediction, or nothing to measure (see ``unmeasurable``).
    """
    task = get_task(protocol["task"])
    assert task.measure is not None
    found = task.measure(prediction, raw, protocol, fitted, painted)
    wanted = (key for name in protocol["metrics"] for key in (name, name + WEIGHT))
    return {name: found[name] for name in wanted if name in found}


def baseline_rows(raw: dict[str, Any], protocol: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The metrics of each trivial answer to one prepared sample: {baseline: {metric: value}}.

    Depth's are fitted to the truth as they are made, so they are clipped but not aligned again.
    """
    task = get_task(protocol["task"])
    assert task.baselines is not None
    answers = task.baselines(raw)
    return {name: measure(answers[name], raw, protocol, fitted=True) for name in protocol["baselines"]}
