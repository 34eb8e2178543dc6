"""Classifier-free guidance around a denoising function (Ho & Salimans 2022)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from scaling_perception.models.dit import guide
from scaling_perception.support.shapes import AnyArray, Array, Float

Denoise = Callable[[jax.Array, Any], jax.Array]


def guided(denoise_pair: Denoise, scale: Float[AnyArray, ""] | float, channels: int = 3) -> Denoise:
    """A denoising function that runs a conditional and an unconditional half in one batch and mixes their outputs.

    Guidance mixes with weights that add up to 1, so it is the same in noise, velocity and clean estimate.

    Args:
        denoise_pair: (x (2 B, h, w, C), row) -> (2 B, h, w, C), for labels of which the first B are the conditions and
            the last B the null label. Both halves of x are the same.
        scale: float or scalar array; 1 is no guidance. May be traced.
        channels: how many of the first channels are guided. DiT's own sampler guides 3 of 4 (see `models.dit.guide`).

    Returns:
        (x (B, h, w, C), row) -> (B, h, w, C), for `sampler.sample`.
    """

    def denoise(x: Float[AnyArray, "B h w C"], row: Any) -> Float[Array, "B h w C"]:
        conditional, unconditional = jnp.split(denoise_pair(jnp.concatenate([x, x]), row), 2)
        return guide(conditional, unconditional, scale, channels)

    return denoise
