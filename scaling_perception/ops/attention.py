"""Attention as a pure function of arrays: one signature, a program for each platform, one oracle."""

import jax
import jax.numpy as jnp


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Softmax attention of every token to every token, scaled by head_dim ** -0.5 (facts 1.1; no mask).

    Args:
        query, key, value: (B, T, heads, head_dim), of one dtype.

    Returns:
        (B, T, heads, head_dim) in the dtype of ``value``. Logits and softmax are float32 whatever the inputs are.
    """
    # both branches keep no more than their inputs for the backward pass: a branch that is not taken costs nothing
    by_head, whole = jax.checkpoint(attention_by_head), jax.checkpoint(attention_einsum)
    return jax.lax.platform_dependent(query, key, value, cpu=by_head, default=whole)


def attention_einsum(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """The oracle: two einsums and a softmax. See ``attention``."""
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", query * scale, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)


def attention_by_head(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """One head at a time: on a CPU, matmuls in memory order whose logits (B, T, T) stay in its caches.

    At (B, T, heads, head_dim) = (8, 256, 16, 16) this took a tenth of the oracle's time forward, and a quarter to half
    of it with gradients; at 64 tokens they are equal (two AMD cores, float32).
    """
    scale = query.shape[-1] ** -0.5

    @jax.checkpoint
    def one(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v = inputs  # (B, T, head_dim)
        logits = jnp.einsum("bqd,bkd->bqk", q * scale, k, preferred_element_type=jnp.float32)
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
        mixed = jnp.einsum("bqk,bkd->bqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (mixed / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)

    heads_first = tuple(jnp.moveaxis(array, 2, 0) for array in (query, key, value))
    return jnp.moveaxis(jax.lax.map(one, heads_first), 0, 2)
