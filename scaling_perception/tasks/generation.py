"""Class-conditional generation: the picture itself is the target, and its class the only condition (facts 8).

What the networks are pre-trained on, before any of them sees a perception task. A sample has a target and a label, but
neither image nor prompt; the loss (``training/pretrain.py``) draws the latent from the autoencoder's posterior and
drops labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from scaling_perception.support.errors import UserError
from scaling_perception.tasks.base import Pass, Task
from scaling_perception.tasks.resize import resize_bilinear
from scaling_perception.tasks.samples import TaskOptions, check_pixels, require_picture, sample, to_unit
from scaling_perception.tasks.shapes import Colours, Pixels, Size

PASSES = (Pass("generation", 4),)


def encode(raw: Mapping[str, Any], resolution: int, options: TaskOptions) -> list[dict[str, Any]]:
    """One sample: the picture, cropped to a square as ADM does; every pixel is valid. No option matters.

    Raises:
        UserError: the picture is missing or is no 8-bit RGB; the message names the sample.
    """
    target = to_unit(centre_crop(require_picture(raw, "image"), resolution))
    return [sample(raw, PASSES[0], {}, target, np.ones((resolution, resolution), bool))]


def conditions(raw: Mapping[str, Any], resolution: int, options: TaskOptions) -> dict[str, Float[np.ndarray, "R R 3"]]:
    """None: the network's input is the noisy latent alone."""
    return {}


def centre_crop(pixels: Colours, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """ADM's centre crop (Dhariwal & Nichol 2021), which DiT trains on: whole pictures, sharp at every scale.

    While the shorter side is at least twice ``size`` both sides are halved by 2 x 2 means (odd ones rounded down); then
    the shorter side is brought to ``size`` by bicubic, and the middle is cut out (one pixel up or left of it where the
    rest is odd).

    Args:
        pixels: uint8 (H, W, 3).

    Returns:
        uint8 (size, size, 3).
    """
    image = Image.fromarray(pixels)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    wanted = (round(image.width * scale), round(image.height * scale))
    cropped = np.asarray(image.resize(wanted, Image.Resampling.BICUBIC))
    top, left = (cropped.shape[0] - size) // 2, (cropped.shape[1] - size) // 2
    return cropped[top : top + size, left : left + size]


def decode_prediction(pixels: Pixels, size: Size, options: TaskOptions) -> Float[np.ndarray, "M height width 3"]:
    """The pictures, clipped to [-1, 1] and bilinear to ``size``.

    Args:
        pixels: (1, M, R, R, 3) about [-1, 1].
        size: (H, W).

    Returns:
        float32 (M, H, W, 3) in [-1, 1].
    """
    pictures = np.clip(check_pixels(pixels, 1)[0], -1, 1)
    return np.clip(np.stack([resize_bilinear(picture, size) for picture in pictures]), -1, 1)


def inspect(raw: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """``label``, the class.

    Raises:
        UserError: the sample has none.
    """
    label = int(raw.get("label", -1))
    if label < 0:
        raise UserError("the sample has no class")
    return {"label": label}


TASK = Task(
    name="generation",
    passes=PASSES,
    fields=("target",),
    encode=encode,
    conditions=conditions,
    inspect=inspect,
    ranges={"label": ""},
    dataset="imagenet",
    decode_prediction=decode_prediction,
)
