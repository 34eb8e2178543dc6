"""What stands between a block's linear layers: norm, modulation and rounding to the compute dtype."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from scaling_perception.support.shapes import AnyArray, Array, Float

NORM_EPSILON = 1e-6
KEPT = "kept"  # name of what a block keeps for its backward pass


def layer_norm(x: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """Normalise the last axis in float32, without affine parameters; returns float32.

    Mean and deviation, two numbers a token, are ``KEPT``: the backward pass does not go over x for them again.
    """
    x = x.astype(jnp.float32)
    centred = x - checkpoint_name(x.mean(axis=-1, keepdims=True), KEPT)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return centred * checkpoint_name(jax.lax.rsqrt(variance + NORM_EPSILON), KEPT)


def modulate(
    x: Float[AnyArray, "B T D"], shift: Float[AnyArray, "B D"], scale: Float[AnyArray, "B D"]
) -> Float[Array, "B T D"]:
    """``x (1 + scale) + shift`` with x (B, T, D) and one shift and scale (B, D) per sample."""
    return x * (1.0 + scale[:, None, :]) + shift[:, None, :]


def stored(x: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """``x``, ``KEPT`` for the backward pass, and written in its dtype alone. Left alone, XLA also writes what is below
    float32 in float32, for what comes next."""
    return checkpoint_name(x if x.dtype == jnp.float32 else jax.lax.optimization_barrier(x), KEPT)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def rounded(x: Float[AnyArray, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """Float32 ``x`` in ``dtype``; its gradient, which comes in ``dtype``, is stored so until it is used.

    Left alone, XLA merges the gradient's conversion into the product that makes it: written and read as float32, it
    is twice the memory traffic, for digits that the product of a bfloat16 network is not meant to have.
    """
    return x.astype(dtype)


def _keep_none(x: jax.Array, dtype: Any) -> tuple[jax.Array, None]:
    return x.astype(dtype), None


def _pull(dtype: Any, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    if dtype != jnp.float32:
        gradient = jax.lax.optimization_barrier(gradient)
    return (gradient.astype(jnp.float32),)


rounded.defvjp(_keep_none, _pull)
