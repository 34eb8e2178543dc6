"""Attention as a pure function of arrays: one signature, and the einsum that every faster version is held against."""

import jax
import jax.numpy as jnp


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Softmax attention of every token to every token, scaled by head_dim ** -0.5 (facts 1.1; no mask, no QK-norm).

    Args:
        query, key, value: (B, T, heads, head_dim), of one dtype.

    Returns:
        (B, T, heads, head_dim) in the dtype of ``value``. Logits and softmax are float32 whatever the inputs are.
    """
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", query * scale, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)
