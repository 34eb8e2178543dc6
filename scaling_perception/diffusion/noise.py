"""Multi-resolution noise: Gaussian noise with upsampled coarser noise added (Marigold; Kasiopy 2023).

Two paths. On the host, `ladder` and `combine_levels` follow what was published, including the random sizes of
``original`` and the division by one standard deviation of the whole batch. Under jit, `pyramid_noise` uses a fixed
ladder (each level half the last) and divides every sample by its own standard deviation, so that a sample's noise does
not depend on its batch.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.shapes import AnyArray, Array, Float, RandomKey, Real

STRATEGIES = ("original", "every_layer", "power_of_two", "random_step")
_MOST_LEVELS = 10


def annealed_strength(
    t: Real[AnyArray, "*B"] | float, strength: float = 0.9, train_steps: int = 1000
) -> Real[AnyArray, "*B"] | float:
    """strength * t / train_steps per sample: plain noise at t = 0, the full pyramid at the end.

    (Plain with `pyramid_noise` and the ladders ``original`` and ``power_of_two``, whose first level has full size; the
    other ladders keep their first, coarser, level at weight 1.)
    """
    return strength * t / train_steps


def ladder(
    strategy: str, height: int, width: int, uniforms: Sequence[float] | np.ndarray | np.random.Generator = ()
) -> list[tuple[int, int]]:
    """Sizes of the added levels, fine to coarse.

    ``every_layer`` halves floor(log2(min side)) times. The others run until a side is 1, at most ten levels:
    ``random_step`` divides by r, ``original`` and ``power_of_two`` (r = 2) divide the last size by r^level, so level 0
    has full size and the ladder falls faster and faster. r = 2 + 2 u is drawn anew at each level. The division is done
    in float32 and truncated, as in the published code.

    Args:
        uniforms: for the random strategies, the values u of each level, or a generator to draw them from.

    Returns:
        [(height, width), ...].

    Raises:
        UserError: unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"unknown noise strategy '{strategy}'{did_you_mean(strategy, STRATEGIES)}")
    if strategy == "every_layer":
        return [(max(1, height >> i), max(1, width >> i)) for i in range(1, int(math.log2(min(height, width))) + 1)]
    sizes: list[tuple[int, int]] = []
    for level in range(_MOST_LEVELS):
        if strategy == "power_of_two":
            ratio = np.float32(2)
        elif isinstance(uniforms, np.random.Generator):
            ratio = np.float32(uniforms.random(dtype=np.float32)) * np.float32(2) + np.float32(2)
        else:
            ratio = np.float32(uniforms[level]) * np.float32(2) + np.float32(2)
        divisor = ratio if strategy == "random_step" else np.float32(ratio**level)
        height, width = (max(1, int(np.float32(side) / divisor)) for side in (height, width))
        sizes.append((height, width))
        if height == 1 or width == 1:
            break
    return sizes


def _upsample_matrix(size_in: int, size_out: int) -> np.ndarray:
    """(size_out, size_in) float32 weights of bilinear upsampling with half-pixel centres and clamped edges."""
    centre = np.clip((np.arange(size_out) + 0.5) * size_in / size_out - 0.5, 0, size_in - 1)
    low = np.minimum(centre.astype(int), max(size_in - 2, 0))
    weight = centre - low
    matrix = np.zeros((size_out, size_in), np.float32)
    matrix[np.arange(size_out), low] += 1 - weight
    if size_in > 1:
        matrix[np.arange(size_out), low + 1] += weight
    return matrix


def _sum_levels(xp: Any, draws: Sequence[Any], strength: Any, first_power: int = 0) -> Any:
    """Base noise plus sum_l strength^(l + first_power) upsampled(draw_l), for ``draws`` = [base, level 0, ...]."""
    base, *levels = draws
    _, height, width, _ = base.shape
    strength = xp.asarray(strength, base.dtype)
    strength = strength.reshape(strength.shape + (1,) * (4 - strength.ndim)) if strength.ndim else strength
    total, weight = base, strength**first_power
    for level in levels:
        rows, columns = (_upsample_matrix(*pair) for pair in zip(level.shape[1:3], (height, width), strict=True))
        total = total + weight * xp.einsum("yh,xw,bhwc->byxc", rows, columns, level)
        weight = weight * strength
    return total


def combine_levels(
    draws: Sequence[Float[np.ndarray, "B _ _ C"]], strength: float | Float[np.ndarray, " B"], per_sample: bool = False
) -> Float[np.ndarray, "B h w C"]:
    """Add drawn levels into multi-resolution noise, on the host.

    Args:
        draws: [(B, H, W, C), then one (B, h_l, w_l, C) for each level of the ladder].
        strength: the weight of level l is strength^l; () or (B,).
        per_sample: divide each sample by its own standard deviation; by default, as published, the whole batch is
            divided by one, so samples of small strength come out below unit variance and those of large strength above.

    Returns:
        float32 (B, H, W, C).
    """
    total = _sum_levels(np, draws, strength)
    axes = (1, 2, 3) if per_sample else None
    return (total / total.std(axis=axes, ddof=1, keepdims=True)).astype(np.float32)


def pyramid_noise(
    key: RandomKey,
    shape: tuple[int, int, int, int],
    strength: float | Float[AnyArray, ""] | Float[AnyArray, " B"] = 0.9,
) -> Float[Array, "B h w C"]:
    """Multi-resolution noise with the fixed ``every_layer`` ladder, jit-able; unit standard deviation per sample.

    The level halved l times has weight strength^l, so strength 0 is plain Gaussian noise.

    Args:
        key: random key.
        shape: (B, H, W, C), static.
        strength: () or (B,), may be traced (see `annealed_strength`).

    Returns:
        float32 (B, H, W, C).
    """
    batch, height, width, channels = shape
    sizes = [(height, width), *ladder("every_layer", height, width)]
    keys = jax.random.split(key, len(sizes))
    draws = [jax.random.normal(k, (batch, h, w, channels)) for k, (h, w) in zip(keys, sizes, strict=True)]
    total = _sum_levels(jnp, draws, strength, first_power=1)
    return total / total.std(axis=(1, 2, 3), ddof=1, keepdims=True)
