"""Optical flow: two passes, one a component, each a grey picture of pixels / divisor (facts 2 and 5.2).

Both components are measured in pixels of a 512-wide frame, so that a motion looks the same at any native size; at
FlyingChairs' 512x384 that is exactly u/75 and v/75. With ``TaskOptions.flow_frame`` ``square`` they are measured in
pixels of the 512x512 that the frame is squashed to, so that a motion looks the same in frames of any shape too. Values
may exceed 1 and are not clipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Real, Shaped

from scaling_perception.support.errors import UserError
from scaling_perception.tasks import verifiers
from scaling_perception.tasks.base import (
    VALID_MINIMUM,
    WEIGHT,
    Estimate,
    File,
    Metric,
    Pass,
    Prompt,
    Scale,
    Task,
    View,
    few_valid,
    field_of,
    lazily,
    prediction_of,
    range_of,
    valid_of,
)
from scaling_perception.tasks.colours import flow_arrows, flow_to_color, heat
from scaling_perception.tasks.metrics import FLOW_LIMITS, FLOW_METRICS, OCCLUSION_METRICS, flow_metrics
from scaling_perception.tasks.resize import resize_bilinear, resize_flow, resize_nearest
from scaling_perception.tasks.samples import TaskOptions, check_pixels, picture, require, sample
from scaling_perception.tasks.shapes import Colours, Mask, Pixels, Size, Spread

PASSES = (Pass("flow_x", 2, mirrored=(-1.0, -1.0, -1.0)), Pass("flow_y", 3))  # what moved right moves left in a mirror
REFERENCE_WIDTH = 512


def encode(raw: Mapping[str, Any], resolution: int, options: TaskOptions) -> list[dict[str, Any]]:
    """Two samples, flow_x (u, right) then flow_y (v, down), that share their inputs.

    Raises:
        UserError: flow is missing, of another size than the image, or nowhere valid; the message names the sample.
    """
    inputs = conditions(raw, resolution, options)
    flow = require(raw, "flow", like="image")
    if flow.ndim != 3 or flow.shape[-1] != 2:
        raise UserError(f"sample '{raw.get('key', '?')}': flow has shape {flow.shape}: give two channels (H, W, 2)")
    valid = np.asarray(np.isfinite(flow).all(axis=-1))
    if raw.get("valid") is not None:
        valid &= require(raw, "valid", like="image").astype(bool)
    if not valid.any():
        raise UserError(f"sample '{raw.get('key', '?')}': no flow pixel is valid: check the flow file")
    size = (resolution, resolution)
    if options.nearest("flow"):
        scaled = resize_nearest(np.where(valid[..., None], flow, 0).astype(np.float32), size)
        valid = resize_nearest(valid, size)
    else:
        scaled, valid = resize_flow(flow, valid, size)
    scaled /= pixels_of_one(flow.shape[:2], options) * np.float32(options.flow_divisor)
    return [sample(raw, one, inputs, scaled[..., i], valid.copy()) for i, one in enumerate(PASSES)]


def pixels_of_one(size: Size, options: TaskOptions) -> Float[np.ndarray, " 2"]:
    """Native pixels of a frame (H, W) that are one pixel, across and down, of the frame that flow is measured in."""
    height, width = size
    return np.asarray([width, height if options.flow_frame == "square" else width], np.float32) / REFERENCE_WIDTH


def conditions(raw: Mapping[str, Any], resolution: int, options: TaskOptions) -> dict[str, Float[np.ndarray, "R R 3"]]:
    """The first frame, and the second as the prompt."""
    require(raw, "image2", like="image")
    nearest = options.nearest("flow")
    return {"image": picture(raw, "image", resolution, nearest), "prompt": picture(raw, "image2", resolution, nearest)}


def decode_prediction(pixels: Pixels, size: Size, options: TaskOptions) -> Float[np.ndarray, "M height width 2"]:
    """Channel means of the two passes, bilinear to ``size``, in native pixels: the inverse of ``encode``.

    Args:
        pixels: (2, M, R, R, 3), pass order flow_x, flow_y.
        size: (H, W) of the native frame, which sets the scale.

    Returns:
        float32 (M, H, W, 2), u right and v down.
    """
    components = np.moveaxis(check_pixels(pixels, 2).mean(axis=-1), 0, -1)
    scale = pixels_of_one(size, options) * np.float32(options.flow_divisor)
    return np.stack([resize_bilinear(member, size) for member in components]) * scale


def inspect(raw: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """``flow`` [least, most] of either component in pixels and ``flow_valid``, the valid share.

    Raises:
        UserError: flow is missing, hardly anywhere valid, or longer than four diagonals of the picture.
    """
    valid = valid_of(raw, size)
    low, high = range_of(field_of(raw, "flow", (*size, 2))[valid], "flow")
    longest = 4 * math.hypot(*size)
    if max(-low, high) > longest:
        raise UserError(f"flow reaches {max(-low, high):g} pixels in a picture of {size[1]}x{size[0]}")
    return {"flow": [low, high], "flow_valid": float(valid.mean())}


# Predicting


def merge(
    members: Real[np.ndarray, "M R R 2"], mode: str, options: TaskOptions
) -> tuple[Float[np.ndarray, "R R 2"], Spread]:
    """Members (M, R, R, 2) to a flow (R, R, 2) and its uncertainty (R, R), see ``tasks.ensemble``."""
    from scaling_perception.tasks import ensemble  # JAX: data workers load tasks without it

    merged = ensemble.jitted_flow(members, mode)
    return np.asarray(merged[0]), np.asarray(merged[1])


def refine(
    merged: Float[np.ndarray, "R R 2"], raw: Mapping[str, Any], options: TaskOptions
) -> Float[np.ndarray, "S S 2"]:
    """A merged flow at up to 2 ** ``options.flow_refine`` times its size, no larger than the frames need, refined by
    matching them around it."""
    from scaling_perception.models import matching  # JAX: data workers load tasks without it

    size = raw["image"].shape[:2]
    scale = verifiers.square_scale(size, options)
    for _ in range(options.flow_refine):
        if len(merged) >= max(size):
            break
        side = 2 * len(merged)
        frames = conditions(raw, side, options)
        larger = 2 * resize_bilinear(merged, (side, side)) * scale
        found = matching.jitted_refined()(*(frames[name][None] for name in ("image", "prompt")), larger[None])
        merged = np.asarray(found[0]) / scale
    return merged


def native(array: Real[np.ndarray, "R R *C"], size: Size, options: TaskOptions) -> Float[np.ndarray, "H W *C"]:
    """A flow or its spread (R, R[, 2]) at native size (H, W), bilinear, in native pixels; the spread, which has no
    direction, by the width."""
    scale = pixels_of_one(size, options) * np.float32(REFERENCE_WIDTH / array.shape[1])
    return resize_bilinear(array, size) * (scale if array.ndim == 3 else scale[0])


FILES = {
    "flo": {"flo": File("flow.flo", "flo", prediction_of)},
    "color": {"color": File("flow_color.png", "image", lambda estimate: flow_to_color(estimate.prediction))},
    "npy": {"npy": File("flow.npy", "npy", prediction_of)},
    "kitti": {"kitti": File("flow_kitti.png", "kitti", prediction_of)},
}


VIEWS: dict[str, View] = {
    "colours": lambda estimate, image: flow_to_color(estimate.prediction),
    "arrows": lambda estimate, image: flow_arrows(estimate.prediction, image),
    "arrows on colours": lambda estimate, image: flow_arrows(
        estimate.prediction, flow_to_color(estimate.prediction), (20, 20, 20)
    ),
}


# Measuring


def prepare(raw: dict[str, Any], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The sample with ``valid`` where both components are finite."""
    return {**raw, "valid": np.asarray(raw["valid"], bool) & np.isfinite(raw["flow"]).all(axis=-1)}


def unmeasurable(raw: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """Why a prepared sample has no figure: no mask of occlusions where a metric needs it, or hardly a valid pixel."""
    lacking = [name for name in protocol["metrics"] if name in OCCLUSION_METRICS and raw.get("occluded") is None]
    if lacking:
        return f"it has no mask of occlusions, which {lacking[0]} needs"
    return few_valid(raw, protocol)


def measure(
    prediction: Shaped[np.ndarray, "H W 2"],
    raw: Mapping[str, Any],
    protocol: Mapping[str, Any],
    /,
    fitted: bool = False,
    painted: Mask | None = None,
) -> dict[str, float]:
    """Every metric of a flow (H, W, 2) in pixels; of ``epe_noc`` and the like those that the image has pixels for."""
    found = flow_metrics(prediction, raw["flow"], raw["valid"], raw.get("occluded"))
    return found | {"fl_all" + WEIGHT: float(np.count_nonzero(raw["valid"]))}


def flow_baselines(gt: Real[np.ndarray, "H W 2"], valid: Mask | None = None) -> dict[str, Float[np.ndarray, "H W 2"]]:
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


def panels(raw: Mapping[str, Any], estimate: Estimate, protocol: Mapping[str, Any]) -> dict[str, Colours]:
    """Drawn on the truth's largest speed; error in pixels up to that speed."""
    flow, valid = raw["flow"], raw["valid"]
    fastest = max(float(np.linalg.norm(flow, axis=-1)[valid].max()), 1e-6)
    error = np.linalg.norm(estimate.prediction - np.where(valid[..., None], flow, 0), axis=-1)
    return {
        "prompt": np.asarray(raw["image2"]),
        "truth": flow_to_color(flow, fastest, valid),
        "prediction": flow_to_color(estimate.prediction, fastest),
        "error": heat(error, fastest, valid),
    }


def panel_scales(raw: Mapping[str, Any], protocol: Mapping[str, Any]) -> dict[str, Scale]:
    """Of ``panels``."""
    fastest = float(np.linalg.norm(raw["flow"], axis=-1)[raw["valid"]].max())
    flow = Scale(f"the hue is the direction, white is no motion, full colour {fastest:.3g} px")
    error = Scale("distance to the true motion", "px", 0.0, fastest, "inferno")
    uncertainty = Scale("spread of the members", "px")
    return {"truth": flow, "prediction": flow, "error": error, "uncertainty": uncertainty}


TASK = Task(
    name="flow",
    passes=PASSES,
    encode=encode,
    conditions=conditions,
    loss=lazily("pixel_losses", "flow_loss"),
    prompt=Prompt("image2", "the second frame", frame=True, cli="A,B"),
    columns=("image", "image2", "flow"),
    optional_columns=("valid_mask",),
    pictures=("image", "image2"),
    truth="flow",
    inspect=inspect,
    ranges={"flow": " px", "flow_valid": ""},
    dataset="flying_chairs",
    decode_prediction=decode_prediction,
    reduce_modes=("mean", "median"),
    latent_modes=("mean", "median"),
    merge=merge,
    verifiers=verifiers.FLOW,
    refine=refine,
    native=native,
    flags=("kitti",),
    files=FILES,
    usual_files=("flo", "color"),
    views=VIEWS,
    member_picture=flow_to_color,
    protocol={
        "metrics": ["epe", "epe_fitted"],
        "alignment": "none",
        "baselines": ["zero", "oracle_mean"],
        "minimum_valid": VALID_MINIMUM,
    },
    sizes="frames squashed to the model's square, prediction bilinear to the truth's size, in its pixels",
    metrics=FLOW_METRICS,
    limits=FLOW_LIMITS,
    more_is_better=("within_1px", "within_3px", "within_5px"),
    main=Metric("epe", "EPE (px)", less_is_better=True),
    prepare=prepare,
    unmeasurable=unmeasurable,
    measure=measure,
    baselines=lambda raw: flow_baselines(raw["flow"], raw["valid"]),
    baseline_names={"zero": "zero flow", "oracle_mean": "mean of the true flow"},
    panels=panels,
    panel_scales=panel_scales,
    clip_picture=flow_to_color,
    clip_scale=lambda flow: float(np.linalg.norm(flow, axis=-1).max()) + 1e-5,
)
