"""Depth: an affine-invariant picture of planar depth, near = -1, far = +1 (facts 5.1; Marigold's normalisation)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Real, Shaped, UInt16

from scaling_perception.support.errors import UserError
from scaling_perception.tasks import verifiers
from scaling_perception.tasks.alignment import THINNED, align, nearest_columns
from scaling_perception.tasks.base import (
    VALID_MINIMUM,
    Estimate,
    File,
    Metric,
    Pass,
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
from scaling_perception.tasks.colours import depth_to_color, heat
from scaling_perception.tasks.metrics import DEPTH_LIMITS, DEPTH_METRICS, depth_metrics
from scaling_perception.tasks.resize import resize_bilinear, resize_nearest
from scaling_perception.tasks.samples import TaskOptions, check_pixels, picture, require, sample
from scaling_perception.tasks.shapes import Colours, Mask, Pixels, Plain, Size

PASSES = (Pass("depth", 0),)
WORST_ABS_REL = 0.5  # relative depth error that is drawn at full scale

# Rectangles as fractions (top, bottom, left, right) of the height and width, rounded down to pixels.
CROPS = {
    "eigen_nyu": (45 / 480, 471 / 480, 41 / 640, 601 / 640),
    "eigen_kitti": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
}


def normalise(depth: Plain, valid: Mask, quantiles: tuple[float, float] = (0.02, 0.98)) -> Float[np.ndarray, "H W"]:
    """2 (d - q_low) / (q_high - q_low) - 1 clipped to [-1, 1]; the quantiles are over the valid, positive depths.

    Invalid pixels become +1, the far plane. A map whose two quantiles coincide has no scale: depths at them become 0,
    nearer ones -1, farther ones +1.

    Args:
        depth: (H, W) float, any unit.
        valid: (H, W) bool; non-finite and non-positive depths count as invalid too.
        quantiles: linear-interpolated quantiles that become -1 and +1.

    Returns:
        float32 (H, W).

    Raises:
        UserError: no pixel is valid.
    """
    with np.errstate(invalid="ignore"):
        valid = valid & np.isfinite(depth) & (depth > 0)
    kept = depth[valid].astype(np.float64)
    if not kept.size:
        raise UserError("no depth pixel is valid: check the unit (depth_scale), the range and the valid mask")
    low, high = np.quantile(kept, quantiles)
    span = high - low
    if span > 1e-6 * high:  # below float32's resolution the difference is rounding noise
        kept = 2.0 * (kept - low) / span - 1.0
    else:
        kept = np.where(np.abs(kept - low) <= 1e-6 * high, 0.0, np.sign(kept - low))
    out = np.ones(depth.shape, np.float32)
    out[valid] = np.clip(kept, -1.0, 1.0)
    return out


def encode(raw: Mapping[str, Any], resolution: int, options: TaskOptions) -> list[dict[str, Any]]:
    """One sample: normalised at native size, then resized by nearest (depths must not be mixed across edges).

    Raises:
        UserError: depth is missing, of another size than the image, or all invalid; the message names the sample.
    """
    inputs = conditions(raw, resolution, options)
    depth = require(raw, "depth", like="image")
    if depth.ndim != 2:
        raise UserError(f"sample '{raw.get('key', '?')}': depth has shape {depth.shape}: give one channel (H, W)")
    valid = _valid(raw, depth)
    try:
        target = normalise(depth, valid, options.depth_quantiles)
    except UserError as error:
        raise UserError(f"sample '{raw.get('key', '?')}': {error}") from None
    size = (resolution, resolution)
    return [sample(raw, PASSES[0], inputs, resize_nearest(target, size), resize_nearest(valid, size))]


def conditions(raw: Mapping[str, Any], resolution: int, options: TaskOptions) -> dict[str, Float[np.ndarray, "R R 3"]]:
    """The image, and a constant +1 prompt.

    With ``options.depth_prompt = "valid"`` the prompt is the mask of valid depths in {0, 1} where ``raw`` has depths,
    as the authors feed it: it leaks where the ground truth is missing (facts 10, row 8).
    """
    image = picture(raw, "image", resolution, options.nearest("depth"))
    if options.depth_prompt == "ones" or raw.get("depth") is None:
        return {"image": image, "prompt": np.ones_like(image)}
    valid = resize_nearest(_valid(raw, require(raw, "depth", like="image")), image.shape[:2])
    return {"image": image, "prompt": np.repeat(valid[..., None].astype(np.float32), 3, axis=-1)}


def _valid(raw: Mapping[str, Any], depth: np.ndarray) -> np.ndarray:
    """Where depth is finite, above 0, and not excluded by the sample's own mask."""
    with np.errstate(invalid="ignore"):
        valid = np.isfinite(depth) & (depth > 0)
    if raw.get("valid") is not None:
        valid &= require(raw, "valid", like="image").astype(bool)
    return valid


def decode_prediction(pixels: Pixels, size: Size, options: TaskOptions) -> Float[np.ndarray, "M height width"]:
    """Channel mean, clipped to [-1, 1], mapped to [0, 1] (0 near), then bilinear to ``size``.

    With ``options.clip_depth`` off it is the channel mean as decoded, about [-1, 1] (-1 near): all that follows then
    has to stretch it or to call ``to_range``.

    Args:
        pixels: (1, M, R, R, 3) about [-1, 1].
        size: (H, W).

    Returns:
        float32 (M, H, W) in [0, 1], affine-invariant.
    """
    depth = check_pixels(pixels, 1)[0].mean(axis=-1)
    if not options.clip_depth:
        return np.stack([resize_bilinear(member, size) for member in depth])
    return np.clip(np.stack([resize_bilinear(member, size) for member in to_range(depth)]), 0, 1)


def to_range(decoded: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Decoded depth, about [-1, 1], to [0, 1]; what lies outside is clipped."""
    return (np.clip(decoded, -1, 1) + 1) / 2


# Training data


def inspect(raw: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """``depth`` [least, most] metres (``relative_depth`` of a sample that is ``relative``) and ``depth_valid``, the
    valid share.

    Raises:
        UserError: depth is missing, not above 0, constant, or hardly anywhere valid.
    """
    valid = valid_of(raw, size)
    low, high = range_of(field_of(raw, "depth", size)[valid], "depth")
    if low <= 0:
        raise UserError(f"depth is {low:g} m in a valid pixel: it must be above 0")
    if low == high:
        raise UserError(f"depth is {low:g} m in every valid pixel, from which nothing can be learned: leave it out")
    name = "relative_depth" if raw.get("relative") else "depth"
    return {name: [low, high], "depth_valid": float(valid.mean())}


# Predicting


def merge(members: Real[np.ndarray, "M H W"], mode: str, options: TaskOptions) -> tuple[Plain, Plain]:
    """Members (M, R, R) to relative depth and its uncertainty (R, R), see ``tasks.ensemble``."""
    from scaling_perception.tasks import ensemble  # JAX: data workers load tasks without it

    if mode == "median" and not options.clip_depth:
        members = to_range(members)  # the one way of merging that stretches nothing
    merged = ensemble.ensemble_depth(members, mode) if mode == "marigold" else ensemble.jitted_depth(members, mode)
    return np.asarray(merged[0]), np.asarray(merged[1])


def _png16(estimate: Estimate) -> UInt16[np.ndarray, "H W"]:
    return np.round(np.clip(estimate.prediction, 0, 1) * 65535).astype(np.uint16)


FILES = {
    "png16": {"png16": File("depth_16bit.png", "png16", _png16)},
    "npy": {"npy": File("depth.npy", "npy", prediction_of)},
    "color": {"color": File("depth_color.png", "image", lambda estimate: depth_to_color(estimate.prediction))},
    "metric": {
        "metric_npy": File("depth_metric.npy", "metres_npy", prediction_of),
        "metric_png16": File("depth_metric_mm.png", "metres_png16", prediction_of),
    },
    "ply": {"ply": File("depth.ply", "point_cloud", prediction_of)},
}


def _view(name: str) -> View:
    return lambda estimate, image: depth_to_color(estimate.prediction, name=name)


VIEWS = {name: _view(name) for name in ("Spectral", "inferno", "viridis", "turbo", "gray")}  # matplotlib's names


# Measuring


def crop_mask(name: str | None, size: Size) -> Mask:
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


def prepare(raw: dict[str, Any], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The sample with ``valid`` where depth is known, within the protocol's range and crop."""
    depth = raw["depth"]
    valid = np.asarray(raw["valid"], bool) & np.isfinite(depth) & (depth > 0)
    if protocol["mask_by_range"]:
        valid &= depth > protocol["minimum"]
        if protocol["maximum"] is not None:
            valid &= depth < protocol["maximum"]
    return {**raw, "valid": valid & crop_mask(protocol["crop"], depth.shape)}


def unmeasurable(raw: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """Why a prepared sample has no figure: hardly a valid pixel, or one depth everywhere."""
    if why := few_valid(raw, protocol):
        return why
    if few := protocol.get("alignment_resolution"):
        if not raw["valid"][:, nearest_columns(raw["valid"].shape, few)].any():
            return THINNED
    known = raw["depth"][raw["valid"]]
    if np.ptp(known) == 0:
        return f"the true depth is {known[0]:g} m at all {known.size} valid pixels: any prediction fits it"
    return ""


def aligned(prediction: Plain, raw: Mapping[str, Any], protocol: Mapping[str, Any]) -> Float[np.ndarray, "H W"]:
    """A prediction (H, W) in metres: least-squares scale and shift to the truth, clipped to the range."""
    low, high = protocol["clip"]
    return align(prediction, raw["depth"], raw["valid"], low, high, protocol.get("alignment_resolution"))


def measure(
    prediction: Shaped[np.ndarray, "H W"],
    raw: Mapping[str, Any],
    protocol: Mapping[str, Any],
    /,
    fitted: bool = False,
    painted: Mask | None = None,
) -> dict[str, float]:
    """The protocol's metrics of an affine-invariant prediction (H, W); ``fitted``: it is in metres already."""
    metres = np.clip(prediction, *protocol["clip"]) if fitted else aligned(prediction, raw, protocol)
    wanted = [name for name in protocol["metrics"] if name in DEPTH_METRICS]
    return depth_metrics(metres, raw["depth"], raw["valid"], wanted)


def depth_baselines(gt: Plain, valid: Mask | None = None) -> dict[str, Float[np.ndarray, "H W"]]:
    """Depth without an image: three least-squares fits over the valid pixels.

    They are fitted to the truth itself (as the metric's own alignment would), so they are the best of their kind.
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


def panels(raw: Mapping[str, Any], estimate: Estimate, protocol: Mapping[str, Any]) -> dict[str, Colours]:
    """Drawn after alignment, on the scale of the truth's 2 % to 98 % quantiles; error |p - d| / d up to 0.5."""
    depth, valid = raw["depth"], raw["valid"]
    low, high = _drawn_range(raw)
    metres, span = aligned(estimate.prediction, raw, protocol), max(high - low, 1e-6)
    return {
        "truth": depth_to_color((depth - low) / span, valid),
        "prediction": depth_to_color((metres - low) / span),
        "error": heat(np.abs(metres - depth) / np.where(valid, depth, 1), WORST_ABS_REL, valid),
    }


def _drawn_range(raw: Mapping[str, Any]) -> tuple[float, float]:
    low, high = np.quantile(raw["depth"][raw["valid"]], (0.02, 0.98))
    return float(low), float(high)


def panel_scales(raw: Mapping[str, Any], protocol: Mapping[str, Any]) -> dict[str, Scale]:
    """Of ``panels``."""
    low, high = _drawn_range(raw)
    depth = Scale("near is red, far is blue", "m", low, high, "Spectral")
    error = Scale("|prediction − truth| / truth", "", 0.0, WORST_ABS_REL, "inferno")
    uncertainty = Scale("spread of the members, of relative depth from 0 to 1")
    return {"truth": depth, "prediction": depth, "error": error, "uncertainty": uncertainty}


TASK = Task(
    name="depth",
    passes=PASSES,
    encode=encode,
    conditions=conditions,
    loss=lazily("pixel_losses", "depth_loss"),
    columns=("image", "depth"),
    optional_columns=("valid_mask",),
    truth="depth",
    inspect=inspect,
    ranges={"depth": " m", "relative_depth": "", "depth_valid": ""},
    dataset="hypersim",
    decode_prediction=decode_prediction,
    reduce_modes=("lsq", "median", "minmax", "marigold"),
    latent_modes=("lsq", "median"),
    merge=merge,
    verifiers=verifiers.DEPTH,
    relative=True,
    flags=("ply", "intrinsics", "fov", "range", "align", "align_space", "align_fit"),
    files=FILES,
    usual_files=("png16", "npy", "color"),
    views=VIEWS,
    member_picture=depth_to_color,
    protocol={
        "metrics": ["abs_rel", "delta1"],
        "alignment": "least squares, depth space",
        "baselines": ["constant", "row", "inverse_row"],
        "minimum_valid": VALID_MINIMUM,
        # metres; of a data set that the protocols do not know
        "minimum": 1e-5,
        "maximum": None,
        "crop": None,
        "image_crop": None,
        "mask_by_range": True,
    },
    sizes="image squashed to the model's square, prediction bilinear to the truth's size",
    metrics=DEPTH_METRICS,
    limits=DEPTH_LIMITS,
    more_is_better=("delta1", "delta2", "delta3"),
    main=Metric("abs_rel", "AbsRel", less_is_better=True),
    prepare=prepare,
    unmeasurable=unmeasurable,
    measure=measure,
    baselines=lambda raw: depth_baselines(raw["depth"], raw["valid"]),
    baseline_names={
        "constant": "best constant (fitted)",
        "row": "image row (fitted)",
        "inverse_row": "1 / image row (fitted)",
    },
    panels=panels,
    panel_scales=panel_scales,
    clip_picture=lambda prediction, scale: depth_to_color(prediction),
)
