"""From light to a photograph: exposure, white balance, tone, lens, noise, JPEG."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

Array = np.ndarray


class Film(NamedTuple):
    """How pictures of one scene are taken."""

    key: float
    balance: Array
    contrast: float
    saturation: float
    vignette: float
    blur: float
    halo: float
    shot: float
    read: float
    quality: int


def choose(rng: np.random.Generator) -> Film:
    """A camera at random: mostly decent ones."""
    warm = rng.normal(0, 0.09)
    return Film(
        float(np.exp(rng.uniform(np.log(0.14), np.log(0.6)))),
        np.array([1 + warm, 1 + rng.normal(0, 0.03), 1 - warm], np.float32),
        float(rng.uniform(0.8, 1.7)),
        float(rng.uniform(0.6, 1.4)),
        float(rng.uniform(0, 0.8) * (rng.random() < 0.5)),
        float(rng.choice([0.0, rng.uniform(0.3, 0.5), rng.uniform(0.5, 1.0)], p=[0.6, 0.28, 0.12])),
        float(rng.uniform(0, 0.12) * (rng.random() < 0.4)),
        float(rng.choice([0.0, rng.uniform(0.002, 0.025)], p=[0.6, 0.4])),
        float(rng.choice([0.0, rng.uniform(0.002, 0.015)], p=[0.6, 0.4])),
        int(rng.choice([0, int(rng.integers(40, 75)), int(rng.integers(75, 97))], p=[0.35, 0.2, 0.45])),
    )


def plain(film: Film) -> Film:
    """The same exposure by an ideal camera."""
    return Film(film.key, np.ones(3, np.float32), 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)


def develop(film: Film, light: Array, gain: float) -> Array:
    """Linear light (H, W, 3) to display values in [0, 1], without the lens, noise and compression."""
    high, wide = light.shape[:2]
    value = light * (film.balance * np.float32(gain))
    if film.vignette:
        y, x = np.ogrid[-1 : 1 : high * 1j, -1 : 1 : wide * 1j]
        value = value / (1 + film.vignette * (x * x + y * y) * 0.5)[..., None] ** 2
    value = value * (1 + 0.12 * value) / (1 + value * 0.72)  # a shoulder that keeps bright windows
    value = np.clip(value, 0, 1.4).astype(np.float32)
    gray = value.mean(axis=2, keepdims=True)
    value = np.maximum(gray + (value - gray) * np.float32(film.saturation), 0)
    value = value ** np.float32(1 / 2.2)
    bend = np.float32(film.contrast - 1)
    value = np.clip(value, 0, 1)
    curve = value * value * (3 - 2 * value)
    return np.clip(value + (curve - value) * bend * np.float32(1.5), 0, 1)


def expose(film: Film, light: Array, gain: float, rng: np.random.Generator) -> Array:
    """Linear light (H, W, 3) to a photograph uint8 (H, W, 3)."""
    if film.halo:
        bright = np.minimum(light, 6 / max(gain, 1e-6))
        light = light + (ndimage.uniform_filter(bright, 9, axes=(0, 1)) - light) * np.float32(film.halo)
    if film.blur:
        light = ndimage.gaussian_filter(np.minimum(light, 4 / max(gain, 1e-6)), (film.blur, film.blur, 0), truncate=2.5)
    value = develop(film, light, gain)
    if film.shot or film.read:
        grain = rng.standard_normal(value.shape, np.float32)
        value = value + grain * (np.float32(film.read) + np.float32(film.shot) * np.sqrt(value))
    picture = np.clip(value * 255 + 0.5, 0, 255).astype(np.uint8)
    if not film.quality:
        return picture
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "JPEG", quality=film.quality)
    data.seek(0)
    return np.asarray(Image.open(data))
