"""Attention for a CPU, one head after the other, with its gradient written out.

A head's logits (B, T, T) stay in the caches. What is kept for the backward pass is query, key and value alone.
"""

from typing import Any

import jax
import jax.numpy as jnp

from scaling_perception.support.shapes import AnyArray, Array, Float


@jax.custom_vjp
def attention_by_head(
    query: Float[AnyArray, "B T heads d"], key: Float[AnyArray, "B Tk heads d"], value: Float[AnyArray, "B Tk heads d"]
) -> Float[Array, "B T heads d"]:
    """See ``attention``: (B, T, heads, head_dim) each, to the same.

    At (B, T, heads, head_dim) = (8, 256, 16, 16) this took a tenth of the oracle's time forward (two AMD cores,
    float32); at 64 tokens they are equal.
    """
    return _heads(_forward, query, key, value)[0]


def _kept(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Any]:
    return attention_by_head(query, key, value), (query, key, value)


def _pulled(kept: Any, gradient: jax.Array) -> tuple[jax.Array, ...]:
    return _heads(_backward, *kept, gradient)


attention_by_head.defvjp(_kept, _pulled)


def _heads(one: Any, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """``one`` of each head's (B, T, head_dim)."""
    heads_first = tuple(jnp.moveaxis(array, 2, 0) for array in arrays)
    return tuple(jnp.moveaxis(out, 0, 2) for out in jax.lax.map(lambda own: one(*own), heads_first))


def _dot(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _forward(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array]:
    logits = _dot("bqd,bkd->bqk", query * query.shape[-1] ** -0.5, key)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    mixed = _dot("bqk,bkd->bqd", weights.astype(value.dtype), value)
    return ((mixed / weights.sum(axis=-1, keepdims=True)).astype(value.dtype),)


def _backward(query: jax.Array, key: jax.Array, value: jax.Array, gradient: jax.Array) -> tuple[jax.Array, ...]:
    """With w = exp(logits - max), z its sum over the keys and g = gradient / z: dv = w' g, dp = g v',
    dlogits = w (dp - sum(w dp) / z), dq = dlogits k, dk = dlogits' q.

    Logits are (B, keys, queries) here, for then two of the three products with them are in memory order; the third is
    made so, for XLA's product of a turned operand takes twice as long as turning it and the product together.
    """
    scale, dtype = query.shape[-1] ** -0.5, query.dtype
    scaled = query * scale
    logits = _dot("bkd,bqd->bkq", key, scaled)
    weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    inverse = 1.0 / weights.sum(axis=1)  # (B, queries)
    gradient = (gradient * inverse[..., None]).astype(dtype)
    moved = weights * _dot("bkd,bqd->bkq", value, gradient)
    moved = (moved - weights * (moved.sum(axis=1) * inverse)[:, None, :]).astype(dtype)
    turned = jax.lax.optimization_barrier(moved.swapaxes(1, 2))
    by_query = _dot("bqk,bkd->bqd", turned, key) * scale
    by_key, by_value = _dot("bkq,bqd->bkd", moved, scaled), _dot("bkq,bqd->bkd", weights.astype(dtype), gradient)
    return by_query.astype(dtype), by_key.astype(dtype), by_value.astype(dtype)
