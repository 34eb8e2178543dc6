"""Surface normals: one pass, whose three channels are the three components (x right, y down, z away from the camera).

One picture of three channels, not three passes: the autoencoder carries colours as it carries greys, the components
are bound by their unit length, and a pass costs as much as all of depth. A surface that faces the camera has z = -1.
Lengths are restored after every mean: members, resizing and what the autoencoder blurs give shorter vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Real, Shaped

from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.tasks import verifiers
from scaling_perception.tasks.base import (
    VALID_MINIMUM,
    Estimate,
    File,
    Metric,
    Pass,
    Scale,
    Task,
    few_valid,
    field_of,
    lazily,
    prediction_of,
    range_of,
    valid_of,
)
from scaling_perception.tasks.colours import heat
from scaling_perception.tasks.metrics import SHARE
from scaling_perception.tasks.resize import resize_bilinear, resize_flow, resize_nearest
from scaling_perception.tasks.samples import TaskOptions, check_pixels, picture, require, sample
from scaling_perception.tasks.shapes import Colours, Mask, Pixels, Size

PASSES = (Pass("normals", 5, mirrored=(-1.0, 1.0, 1.0)),)  # what faces right faces left in a mirror
MODES = ("mean", "median")
FACING = (0.0, 0.0, -1.0)
"""The normal of a surface that faces the camera: what a vector without a direction becomes."""

_SHARES = (5.0, 7.5, 11.25, 22.5, 30.0)  # degrees
NORMAL_METRICS = ("mean_angle", "median_angle", "rmse_angle", *(f"within_{degrees:g}" for degrees in _SHARES))
_WORST_ANGLE = 60.0  # degrees that are drawn at full scale
_LENGTH_ERROR = 0.1
_FOCAL = 0.7  # focal length over the longer side: 71 degrees
_SPLITS = 16  # rows that the fitted horizon may lie at


def unit(vectors: Real[np.ndarray, "*shape 3"]) -> Float[np.ndarray, "*shape 3"]:
    """Vectors (..., 3) at unit length, float32; those shorter than 1e-6 face the camera."""
    vectors = np.asarray(vectors, np.float32)
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.where(length > 1e-6, vectors / np.maximum(length, 1e-6), np.asarray(FACING, np.float32))


def angles(first: Real[np.ndarray, "... 3"], second: Real[np.ndarray, "... 3"]) -> Float[np.ndarray, ...]:
    """Degrees between unit vectors (..., 3), float64 (...); exact for small angles too."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    apart, together = np.linalg.norm(first - second, axis=-1), np.linalg.norm(first + second, axis=-1)
    return np.degrees(2 * np.arctan2(apart, together))


def check_lengths(vectors: Real[np.ndarray, "n 3"], what: str) -> None:
    """Raise UserError if more than half of the vectors (n, 3) are not of unit length, as colours are not.

    Vectors that were resized are shorter along edges, so not all need to have it.
    """
    lengths = np.linalg.norm(np.asarray(vectors, np.float64), axis=-1)
    if lengths.size and not np.median(np.abs(lengths - 1)) < _LENGTH_ERROR:
        raise UserError(
            f"{what} have a median length of {np.median(lengths):.3g}, and most are not of unit length: give unit "
            "vectors, x right, y down, z away (colours are read from a picture, not from .npy)"
        )


def facing(normals: Real[np.ndarray, "H W 3"]) -> Bool[np.ndarray, "H W"]:
    """Where normals (H, W, 3) point against the ray through their pixel, bool (H, W), for a usual angle of view.

    z < 0 is not enough: a floor that a camera sees while it looks slightly upwards has z > 0.
    """
    height, width = normals.shape[:2]
    row, column = np.mgrid[:height, :width] - np.reshape([height - 1, width - 1], (2, 1, 1)) / 2
    depth = np.full_like(row, _FOCAL * max(height, width))
    return (normals * np.stack([column, row, depth], axis=-1)).sum(axis=-1) < 0


def encode(raw: Mapping[str, Any], resolution: int, options: TaskOptions) -> list[dict[str, Any]]:
    """One sample: the mean direction of the valid normals below each pixel.

    Raises:
        UserError: normals are missing, of another size than the image, or nowhere valid; the message names the sample.
    """
    inputs = conditions(raw, resolution, options)
    normals = require(raw, "normals", like="image")
    if normals.ndim != 3 or normals.shape[-1] != 3:
        raise UserError(f"sample '{raw.get('key', '?')}': normals have shape {normals.shape}: give (H, W, 3)")
    valid = np.asarray(np.isfinite(normals).all(axis=-1)) & valid_of(raw, (normals.shape[0], normals.shape[1]))
    if not valid.any():
        raise UserError(f"sample '{raw.get('key', '?')}': no normal is valid: check the file and the valid mask")
    size = (resolution, resolution)
    if options.nearest("normals"):
        small, valid = resize_nearest(np.where(valid[..., None], normals, 0), size), resize_nearest(valid, size)
    else:
        small, valid = resize_flow(normals, valid, size)
    return [sample(raw, PASSES[0], inputs, np.where(valid[..., None], unit(small), 0), valid)]


def conditions(raw: Mapping[str, Any], resolution: int, options: TaskOptions) -> dict[str, Float[np.ndarray, "R R 3"]]:
    """The image, and a constant +1 prompt."""
    image = picture(raw, "image", resolution, options.nearest("normals"))
    return {"image": image, "prompt": np.ones_like(image)}


def inspect(raw: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """``normals_valid``, the valid share, and ``normals_facing``, the share of these that face the camera, as all do
    that it sees.

    Raises:
        UserError: normals are missing, hardly anywhere valid, or not of unit length.
    """
    valid = valid_of(raw, size)
    known = field_of(raw, "normals", (*size, 3))[valid]
    range_of(known, "normals")
    check_lengths(known, "normals")
    return {"normals_valid": float(valid.mean()), "normals_facing": float(facing(raw["normals"])[valid].mean())}


# Predicting


def decode_prediction(pixels: Pixels, size: Size, options: TaskOptions) -> Float[np.ndarray, "M height width 3"]:
    """Unit normals at ``size``: the inverse of ``encode``.

    Args:
        pixels: (1, M, R, R, 3) about [-1, 1].
        size: (H, W).

    Returns:
        float32 (M, H, W, 3).
    """
    return np.stack([native(member, size, options) for member in check_pixels(pixels, 1)[0]])


def native(array: Real[np.ndarray, "R R *C"], size: Size, options: TaskOptions) -> Float[np.ndarray, "H W *C"]:
    """Normals (R, R, 3) or their spread (R, R) at native size (H, W), bilinear; normals at unit length."""
    resized = resize_bilinear(array, size)
    return unit(resized) if array.ndim == 3 else resized


def merge(
    members: Real[np.ndarray, "M H W 3"], mode: str, options: TaskOptions
) -> tuple[Float[np.ndarray, "H W 3"], Float[np.ndarray, "H W"]]:
    """Members (M, R, R, 3) to unit normals (R, R, 3) and their uncertainty (R, R) in degrees.

    ``mean``: the direction of the sum, and the root-mean-square angle to it; ``median``: of the medians of the
    components, and the median angle. 0 for one member.

    Raises:
        UserError: unknown mode.
    """
    if mode not in MODES:
        raise UserError(f"unknown merging of normals '{mode}'{did_you_mean(mode, MODES)}")
    members = unit(members)
    merged = unit(members.mean(axis=0) if mode == "mean" else np.median(members, axis=0))
    apart = angles(members, merged[None])
    spread = np.sqrt(np.mean(np.square(apart), axis=0)) if mode == "mean" else np.median(apart, axis=0)
    return merged, spread.astype(np.float32)


def agreement(members: Real[np.ndarray, "M R R 3"], seen: verifiers.Seen) -> Float[np.ndarray, " M"]:
    """Mean angle to the merged normals, in degrees."""
    return np.asarray([angles(unit(member), seen.merged).mean() for member in members])


VERIFIERS = {
    "edges": verifiers.Verifier(
        "part of the normals' change where the picture does not change, of [0, 1]", verifiers.edges
    ),
    "agreement": verifiers.Verifier("mean angle to the merged normals, degrees", agreement, among=True),
}


def normals_to_color(normals: Real[np.ndarray, "H W 3"], valid: Mask | None = None) -> Colours:
    """Right is red, up is green, towards the camera is blue: 127.5 (1 + (x, -y, -z)); invalid pixels are black.

    Args:
        normals: (H, W, 3).

    Returns:
        uint8 (H, W, 3). ``data.formats.read_normals`` is the inverse.
    """
    colour = np.round(127.5 * (1 + np.clip(normals * np.array([1, -1, -1], np.float32), -1, 1)))
    return colour.astype(np.uint8) if valid is None else np.where(valid[..., None], colour, 0).astype(np.uint8)


FILES = {
    "color": {"color": File("normals_color.png", "image", lambda estimate: normals_to_color(estimate.prediction))},
    "npy": {"npy": File("normals.npy", "npy", prediction_of)},
}


# Measuring


def prepare(raw: dict[str, Any], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The sample with ``valid`` where the normal is finite and has a direction; normals at unit length."""
    normals = np.asarray(raw["normals"], np.float32)
    with np.errstate(invalid="ignore"):
        known = np.isfinite(normals).all(axis=-1) & (np.linalg.norm(normals, axis=-1) > 1e-6)
    valid = valid_of(raw, (normals.shape[0], normals.shape[1])) & known
    return {**raw, "normals": unit(np.where(valid[..., None], normals, 0)), "valid": valid}


def normal_metrics(
    pred: Real[np.ndarray, ...], gt: Real[np.ndarray, "H W 3"], valid: Bool[np.ndarray, ...] | None = None
) -> dict[str, float]:
    """Angular errors of one image (Fouhey et al. 2013, as every paper since has them).

    Args:
        pred, gt: (H, W, 3) unit vectors.
        valid: bool (H, W); None takes every pixel.

    Returns:
        ``mean_angle``, ``median_angle``, ``rmse_angle`` in degrees; ``within_11.25`` and the like: the share of pixels
        strictly below that angle.

    Raises:
        ValueError: shapes differ, a valid pixel is NaN or infinite, or none is valid.
    """
    pred, gt = np.asarray(pred), np.asarray(gt)
    keep = np.ones(gt.shape[:2], bool) if valid is None else np.asarray(valid, bool)
    if pred.shape != gt.shape or keep.shape != gt.shape[:2]:
        raise ValueError(f"prediction {pred.shape}, truth {gt.shape} and valid mask {keep.shape} differ in shape")
    if not keep.any():
        raise ValueError("no valid pixel: leave this image out")
    if not (np.isfinite(pred[keep]).all() and np.isfinite(gt[keep]).all()):
        raise ValueError("the prediction or the truth is NaN or infinite at a valid pixel")
    apart = angles(unit(pred[keep]), unit(gt[keep]))
    found = {
        "mean_angle": float(apart.mean()),
        "median_angle": float(np.median(apart)),
        "rmse_angle": float(np.sqrt(np.mean(np.square(apart)))),
    }
    return found | {f"within_{degrees:g}": float(np.mean(apart < degrees)) for degrees in _SHARES}


def measure(
    prediction: Shaped[np.ndarray, "H W 3"],
    raw: Mapping[str, Any],
    protocol: Mapping[str, Any],
    /,
    fitted: bool = False,
    painted: Mask | None = None,
) -> dict[str, float]:
    """Every metric of unit normals (H, W, 3)."""
    return normal_metrics(prediction, raw["normals"], raw["valid"])


def normal_baselines(gt: Real[np.ndarray, "H W 3"], valid: Mask | None = None) -> dict[str, Float[np.ndarray, "H W 3"]]:
    """Normals without an image, fitted to the truth, so they are the best of their kind.

    ``constant``: the mean direction everywhere. ``ground_plane``: one plane below a horizon and another above it (a
    floor and a wall), each the mean direction of its part; the horizon is the best of 16 rows.

    Args:
        gt: (H, W, 3) unit vectors.
        valid: bool (H, W); None takes every pixel.

    Returns:
        {name: float32 (H, W, 3)}.

    Raises:
        ValueError: no pixel is valid.
    """
    gt = np.asarray(gt, np.float32)
    keep = np.ones(gt.shape[:2], bool) if valid is None else np.asarray(valid, bool)
    if not keep.any():
        raise ValueError("no valid pixel: leave this image out")
    kept = np.where(keep[..., None], gt, 0)
    constant = np.broadcast_to(unit(kept.sum(axis=(0, 1))), gt.shape).copy()
    best, least = constant, float(angles(constant, gt)[keep].mean())
    for row in np.unique(np.linspace(0, gt.shape[0], _SPLITS + 2).astype(int)[1:-1]):
        answer = np.empty_like(constant)
        answer[:row], answer[row:] = unit(kept[:row].sum(axis=(0, 1))), unit(kept[row:].sum(axis=(0, 1)))
        error = float(angles(answer, gt)[keep].mean())
        if error < least:
            best, least = answer, error
    return {"constant": constant, "ground_plane": best}


def panels(raw: Mapping[str, Any], estimate: Estimate, protocol: Mapping[str, Any]) -> dict[str, Colours]:
    """Normals as colours; error in degrees up to 60."""
    return {
        "truth": normals_to_color(raw["normals"], raw["valid"]),
        "prediction": normals_to_color(estimate.prediction),
        "error": heat(angles(estimate.prediction, raw["normals"]), _WORST_ANGLE, raw["valid"]),
    }


def panel_scales(raw: Mapping[str, Any], protocol: Mapping[str, Any]) -> dict[str, Scale]:
    """Of ``panels``."""
    normals = Scale("red faces right, green up, blue the camera")
    error = Scale("angle to the true normal", "°", 0.0, _WORST_ANGLE, "inferno")
    uncertainty = Scale("spread of the members", "°")
    return {"truth": normals, "prediction": normals, "error": error, "uncertainty": uncertainty}


TASK = Task(
    name="normals",
    passes=PASSES,
    encode=encode,
    conditions=conditions,
    loss=lazily("pixel_losses", "normals_loss"),
    columns=("image", "normals"),
    optional_columns=("valid_mask",),
    truth="normals",
    inspect=inspect,
    ranges={"normals_valid": "", "normals_facing": ""},
    default=False,  # what `prepare scenes` makes unasked stays as it was
    dataset="scenes",
    decode_prediction=decode_prediction,
    reduce_modes=MODES,
    latent_modes=MODES,
    merge=merge,
    verifiers=VERIFIERS,
    native=native,
    files=FILES,
    usual_files=("color", "npy"),
    views={"colours": lambda estimate, image: normals_to_color(estimate.prediction)},
    member_picture=normals_to_color,
    protocol={
        "metrics": ["mean_angle", "median_angle", "within_11.25"],
        "alignment": "none",
        "baselines": ["constant", "ground_plane"],
        "minimum_valid": VALID_MINIMUM,
    },
    sizes="image squashed to the model's square, normals bilinear to the truth's size and to unit length",
    metrics=NORMAL_METRICS,
    limits={name: SHARE if name.startswith("within") else (0.0, 180.0) for name in NORMAL_METRICS},
    more_is_better=tuple(name for name in NORMAL_METRICS if name.startswith("within")),
    main=Metric("mean_angle", "mean angle (°)", less_is_better=True),
    prepare=prepare,
    unmeasurable=few_valid,
    measure=measure,
    baselines=lambda raw: normal_baselines(raw["normals"], raw["valid"]),
    baseline_names={"constant": "best constant (fitted)", "ground_plane": "floor and wall (fitted)"},
    panels=panels,
    panel_scales=panel_scales,
    clip_picture=lambda prediction, scale: normals_to_color(prediction),
)
