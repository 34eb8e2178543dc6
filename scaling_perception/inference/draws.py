"""What tells the members of an ensemble apart: their noise, and what each of them sees of the picture."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling_perception.support.errors import UserError, short
from scaling_perception.support.shapes import EitherArray, Float, Int, RandomKey, Real, UInt
from scaling_perception.tasks import get_task

VIEWS = ("plain", "flip")
"""What the members of an ensemble see: all the picture as it is, or every second one (from the second on) its mirror
image, left to right, whose prediction is mirrored back before members are merged."""


class NoiseKeys(NamedTuple):
    """What decides the noise of every row, and which view of the picture its member sees.

    Attributes:
        key: JAX key. ids: (I,) uint32, of the images. members: (M,) uint32. signs: (M,) float32, 1 or -1.
        views: (M,) int32, 0 the picture, 1 its mirror image, where the latents hold both.
    """

    key: RandomKey
    ids: UInt[EitherArray, " I"]
    members: UInt[EitherArray, " M"]
    signs: Float[EitherArray, " M"]
    views: Int[EitherArray, " M"]


def draw_members(key: RandomKey, ids: UInt[np.ndarray, " I"], first: int, count: int, antithetic: bool) -> NoiseKeys:
    """The noise of members ``first`` to ``first + count - 1``; antithetic ones are pairs that differ in sign alone."""
    numbers = np.arange(first, first + count)
    signs = np.where(numbers % 2, -1.0, 1.0) if antithetic else np.ones(count)
    members = numbers // 2 if antithetic else numbers
    views = (numbers % 2).astype(np.int32)
    return NoiseKeys(key, ids, members.astype(np.uint32), signs.astype(np.float32), views)


def mirrored_back(
    pixels: Real[np.ndarray, "*images P M R R 3"], task: str, first: int = 0
) -> Real[np.ndarray, "*images P M R R 3"]:
    """Pixels of members ``first`` and after as in the picture itself: those of odd numbers saw its mirror image."""
    out = np.array(pixels)
    start = 1 - first % 2
    for number, one in enumerate(get_task(task).passes):
        seen = out[..., number, start::2, :, :, :]
        out[..., number, start::2, :, :, :] = seen[..., ::-1, :] * np.asarray(one.mirrored, out.dtype)
    return out


def image_id(raw: dict[str, Any]) -> int:
    """A number that the image's own pixels decide (CRC-32), its share of the noise key; a frame of a clip may hold that
    of the first as ``noise_id``."""
    if "noise_id" in raw:
        return raw["noise_id"]
    return zlib.crc32(raw["image"].tobytes(), zlib.crc32(repr(raw["image"].shape).encode()))


def key_of(key: int | RandomKey) -> RandomKey:
    """A JAX key of a whole number; a key as it is.

    Raises:
        UserError: neither, or a number that is too large.
    """
    if isinstance(key, (jax.Array, np.ndarray)):
        new = key.ndim == 0 and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if new or (key.ndim == 1 and key.dtype == np.uint32):
            return key
    elif isinstance(key, (int, np.integer)) and not isinstance(key, bool) and 0 <= key < 2**32:
        return jax.random.key(int(key))
    raise UserError(f"key {short(key)}: give a whole number from 0 to {2**32 - 1}, or one JAX key")
