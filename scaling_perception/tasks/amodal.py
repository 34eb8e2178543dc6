"""Amodal segmentation: paint the whole object on white from the image and the visible part's mask (facts 5.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Real, Shaped

from scaling_perception.support.errors import UserError
from scaling_perception.tasks import verifiers
from scaling_perception.tasks.base import (
    Answer,
    Estimate,
    File,
    Metric,
    Pass,
    Prompt,
    Scale,
    Task,
    Traced,
    View,
    field_of,
    plain_native,
)
from scaling_perception.tasks.colours import mask_over, whole_picture
from scaling_perception.tasks.metrics import MASK_LIMITS, MASK_METRICS, mask_iou, mask_metrics
from scaling_perception.tasks.resize import resize_bilinear, resize_nearest
from scaling_perception.tasks.samples import TaskOptions, check_pixels, picture, require, sample
from scaling_perception.tasks.shapes import Colours, Mask, Pixels, Size, Spread

PASSES = (Pass("amodal", 1),)

EMPTY_PROMPT = "no part of the object is visible: nothing asks for it"

# Blue's weight falls on red and red's on blue: pix2gestalt applies OpenCV's BGR-to-grey to an RGB array. Kept, because
# its numbers were measured so.
GREY_WEIGHTS = (0.114, 0.587, 0.299)


def encode(raw: Mapping[str, Any], resolution: int, options: TaskOptions) -> list[dict[str, Any]]:
    """One sample whose target is the RGB picture of the whole object on white; every pixel is valid.

    Raises:
        UserError: a field is missing or of another size than the image; the message names the sample.
    """
    inputs = conditions(raw, resolution, options)
    require(raw, "whole", like="image")
    target = picture(raw, "whole", resolution, options.nearest("amodal"))
    return [sample(raw, PASSES[0], inputs, target, np.ones((resolution, resolution), bool))]


def conditions(raw: Mapping[str, Any], resolution: int, options: TaskOptions) -> dict[str, Float[np.ndarray, "R R 3"]]:
    """The image, and the visible part's mask as three channels of -1 and +1."""
    mask = require(raw, "visible_mask", like="image").astype(bool)
    prompt = np.where(resize_nearest(mask, (resolution, resolution)), np.float32(1), np.float32(-1))
    image = picture(raw, "image", resolution, options.nearest("amodal"))
    return {"image": image, "prompt": np.repeat(prompt[..., None], 3, axis=-1)}


def decode_prediction(pixels: Pixels, size: Size, options: TaskOptions) -> Float[np.ndarray, "M height width 3"]:
    """The painted object, clipped to [-1, 1] and bilinear to ``size``; ``mask_from_whole`` makes the mask of it.

    Args:
        pixels: (1, M, R, R, 3) about [-1, 1].
        size: (H, W).

    Returns:
        float32 (M, H, W, 3) in [-1, 1].
    """
    whole = np.clip(check_pixels(pixels, 1)[0], -1, 1)
    return np.clip(np.stack([resize_bilinear(member, size) for member in whole]), -1, 1)


def mask_from_whole(rgb: Real[np.ndarray, "*shape 3"], threshold: float = 250) -> Bool[np.ndarray, "*shape"]:
    """Where the picture is not white: 0.114 R + 0.587 G + 0.299 B <= ``threshold`` on 0..255 (pix2gestalt's rule).

    Args:
        rgb: (..., 3) float in [-1, 1].

    Returns:
        bool (...).
    """
    levels = (np.clip(np.asarray(rgb, np.float64), -1, 1) + 1) * 127.5
    # Greys of 8-bit colours lie 0.001 apart: half of that absorbs the rounding of a picture stored as float32.
    return levels @ np.array(GREY_WEIGHTS) <= threshold + 5e-4


_FULL = 0.99  # share of a picture above which `whole` has no white background
_INSIDE = 0.5  # least share of the visible part in the whole object: outlines of annotators differ


def inspect(raw: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """``visible``, the share of the picture that the visible part covers.

    Raises:
        UserError: a mask is missing or empty, the whole object leaves most of its visible part out, or it is all of
            the picture, as where the picture of the whole object is not on white.
    """
    visible = field_of(raw, "visible_mask", size).astype(bool)
    if not visible.any():
        raise UserError(f"visible_mask is empty: {EMPTY_PROMPT}")
    painted = None if raw.get("whole") is None else mask_from_whole(field_of(raw, "whole", (*size, 3)) / 127.5 - 1)
    if painted is not None and painted.mean() > _FULL:
        raise UserError(f"whole has colours in {painted.mean():.1%} of its pixels: give the whole object on white")
    whole = painted if raw.get("whole_mask") is None else field_of(raw, "whole_mask", size).astype(bool)
    if whole is not None:
        if not whole.any():
            raise UserError("whole_mask is empty")
        inside = float((visible & whole).sum() / visible.sum())
        if inside < _INSIDE:
            raise UserError(
                f"{inside:.0%} of visible_mask lies in the mask of the whole object, which contains the visible part: "
                "is one of them inverted, or of another object?"
            )
    return {"visible": float(visible.mean())}


# Predicting


def check(raw: Mapping[str, Any]) -> None:
    """UserError for a mask that shows no part of the object."""
    if not raw["visible_mask"].any():
        raise UserError(f"sample '{raw['key']}': the mask is empty: {EMPTY_PROMPT}")


def merge(
    members: Real[np.ndarray, "M R R 3"], mode: str, options: TaskOptions
) -> tuple[Float[np.ndarray, "R R 3"], Spread]:
    """Members (M, R, R, 3) to the painted object (R, R, 3) and its uncertainty (R, R), see ``tasks.ensemble``."""
    from scaling_perception.tasks import ensemble  # JAX: data workers load tasks without it

    merged = ensemble.jitted_amodal(members)
    return np.asarray(merged[0]), np.asarray(merged[1])


def uncovered(members: Real[np.ndarray, "M R R 3"], seen: verifiers.Seen) -> Float[np.ndarray, " M"]:
    """The share of the visible part that the painted mask leaves out; 0 where nothing is visible at this size."""
    visible = seen.prompt[..., 0] > 0
    painted = mask_from_whole(members, seen.options.mask_threshold)
    return (visible & ~painted).sum(axis=(1, 2)) / max(int(visible.sum()), 1)


def agreement(members: Real[np.ndarray, "M R R 3"], seen: verifiers.Seen) -> Float[np.ndarray, " M"]:
    """1 - IoU of the painted mask with the merged one's; 0 where both are empty."""
    threshold = seen.options.mask_threshold
    painted, merged = mask_from_whole(members, threshold), mask_from_whole(seen.merged, threshold)[None]
    either = (painted | merged).sum(axis=(1, 2))
    return np.where(either > 0, 1 - (painted & merged).sum(axis=(1, 2)) / np.maximum(either, 1), 0.0)


VERIFIERS = {
    "visible": verifiers.Verifier("share of the visible part that the mask leaves out, of [0, 1]", uncovered),
    "agreement": verifiers.Verifier("1 - IoU with the merged mask", agreement, among=True),
}


def restore(
    merged: Float[np.ndarray, "R R 3"],
    size: Size,
    options: TaskOptions,
    prompt: Shaped[np.ndarray, "H W"] | None,
) -> Answer:
    """The mask of the painted object at native size; ``prompt``, the given mask, joins it under ``keep_visible``.

    The published rule: a mask at the model's size, brought back by nearest (facts 6.3).
    """
    found = mask_from_whole(merged, options.mask_threshold)
    mask = painted = resize_nearest(found, size)
    if options.keep_visible and prompt is not None:
        visible = np.asarray(prompt, bool)
        if options.mask_opening:
            mask = resize_nearest(opened(found & ~resize_nearest(visible, found.shape), options.mask_opening), size)
        mask = mask | visible
    return Answer(mask, plain_native(merged, size), painted)


def opened(mask: Bool[np.ndarray, "H W"], radius: int) -> Bool[np.ndarray, "H W"]:
    """``mask`` where a square of 2 ``radius`` + 1 pixels fits into it, as if it went on beyond the picture's border."""
    from scipy import ndimage  # data workers load tasks without it

    square = np.ones((2 * radius + 1, 2 * radius + 1), bool)
    core = ndimage.binary_erosion(mask, square, border_value=1)
    return ndimage.binary_dilation(core, square) & mask


def pixel_loss(prediction: Traced, truth: Traced, valid: Traced, options: TaskOptions, /) -> Traced:
    """See ``tasks.pixel_losses.amodal_loss``."""
    from scaling_perception.tasks import pixel_losses  # JAX: data workers load tasks without it

    return pixel_losses.amodal_loss(prediction, truth, valid, options, GREY_WEIGHTS)


FILES = {
    "mask": {"mask": File("amodal_mask.png", "image", lambda estimate: estimate.prediction.astype(np.uint8) * 255)},
    "whole": {"whole": File("amodal_whole.png", "image", lambda estimate: whole_picture(np.asarray(estimate.whole)))},
}


VIEWS: dict[str, View] = {
    "mask on the picture": lambda estimate, image: mask_over(image, estimate.prediction),
    "mask": lambda estimate, image: np.repeat(estimate.prediction[..., None].astype(np.uint8) * 255, 3, axis=-1),
    "whole object": lambda estimate, image: whole_picture(np.asarray(estimate.whole)),
}


# Measuring


def prepare(raw: dict[str, Any], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Without a picture of the whole object, what is seen inside the true mask: for the floor, not for IoU."""
    whole = painted_whole(raw["image"], raw["whole_mask"]) if raw.get("whole") is None else raw["whole"]
    return {**raw, "whole": whole}


def unmeasurable(raw: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """Why a sample has no figure: an empty mask."""
    if not raw["whole_mask"].any():
        return "the true mask is empty"
    return "" if np.any(raw["visible_mask"]) else EMPTY_PROMPT


def measure(
    prediction: Shaped[np.ndarray, "H W"],
    raw: Mapping[str, Any],
    protocol: Mapping[str, Any],
    /,
    fitted: bool = False,
    painted: Mask | None = None,
) -> dict[str, float]:
    """``iou`` and ``dice`` of the answer, bool (H, W), ``iou_painted`` of what was painted (None: all of the answer),
    ``iou_joined`` of that and the given mask."""
    truth, visible = np.asarray(raw["whole_mask"], bool), np.asarray(raw["visible_mask"], bool)
    painted = np.asarray(prediction if painted is None else painted, bool)
    found = mask_metrics(np.asarray(prediction, bool), truth)
    return found | {"iou_painted": mask_iou(painted, truth), "iou_joined": mask_iou(painted | visible, truth)}


def amodal_baselines(visible_mask: Shaped[np.ndarray, "H W"]) -> dict[str, Mask]:
    """The amodal mask without completion: ``visible``, the mask that was given. (H, W) bool -> {name: (H, W) bool}."""
    return {"visible": np.asarray(visible_mask, bool)}


def painted_whole(image: Colours, whole_mask: Shaped[np.ndarray, "H W"]) -> Colours:
    """What is seen inside the true mask, on white: uint8 (H, W, 3), where there is no picture of the whole object."""
    return np.where(np.asarray(whole_mask, bool)[..., None], np.asarray(image, np.uint8), np.uint8(255))


def panels(raw: Mapping[str, Any], estimate: Estimate, protocol: Mapping[str, Any]) -> dict[str, Colours]:
    """Masks over the picture; the error is red where the prediction has too much, blue where it lacks."""
    truth, mask = np.asarray(raw["whole_mask"], bool), estimate.prediction
    error = np.zeros((*truth.shape, 3), np.uint8)
    error[truth & mask] = 255
    error[mask & ~truth] = (220, 50, 40)
    error[truth & ~mask] = (40, 90, 220)
    image = np.asarray(raw["image"])
    return {
        "prompt": mask_over(image, np.asarray(raw["visible_mask"], bool)),
        "truth": mask_over(image, truth),
        "prediction": mask_over(image, mask),
        "error": error,
    }


def panel_scales(raw: Mapping[str, Any], protocol: Mapping[str, Any]) -> dict[str, Scale]:
    """Of ``panels``."""
    return {
        "prompt": Scale("the visible part of the object, in orange"),
        "truth": Scale("the whole object, in orange"),
        "prediction": Scale("the whole object, in orange"),
        "error": Scale("white: in both masks, red: in the prediction alone, blue: in the truth alone"),
        "uncertainty": Scale("spread of the members' painted colours, black to white being 2"),
    }


TASK = Task(
    name="amodal",
    passes=PASSES,
    encode=encode,
    conditions=conditions,
    loss=pixel_loss,
    prompt=Prompt("visible_mask", "the mask of the object's visible part", frame=False, cli="--mask"),
    columns=("image", "visible_mask"),
    optional_columns=("whole", "whole_mask"),
    one_of=("whole", "whole_mask"),
    pictures=("image", "whole"),
    inspect=inspect,
    ranges={"visible": ""},
    dataset="pix2gestalt",
    check=check,
    decode_prediction=decode_prediction,
    reduce_modes=("median",),
    latent_modes=("median",),
    merge=merge,
    verifiers=VERIFIERS,
    restore=restore,
    flags=("mask",),
    files=FILES,
    usual_files=("mask", "whole"),
    views=VIEWS,
    member_picture=whole_picture,
    protocol={
        "metrics": ["iou"],
        "alignment": "none",
        "baselines": ["visible"],
        "threshold": 250,
        "keep_visible": False,
    },
    sizes="whole image squashed to the model's square, mask back to its size by nearest",
    metrics=MASK_METRICS,
    limits=MASK_LIMITS,
    more_is_better=MASK_METRICS,
    reported=("iou_painted", "iou_joined"),
    main=Metric("iou", "IoU", less_is_better=False),
    prepare=prepare,
    unmeasurable=unmeasurable,
    measure=measure,
    baselines=lambda raw: amodal_baselines(raw["visible_mask"]),
    baseline_names={"visible": "visible mask itself"},
    ceilings=("threshold",),
    panels=panels,
    panel_scales=panel_scales,
    clip_picture=lambda mask, scale: np.repeat(np.uint8(255) * mask[..., None], 3, axis=-1),
)
