"""Attention for a CPU by a kernel of this package in C++ (``attention.cc``), float32 inside."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from scaling_perception.support.native import targets
from scaling_perception.support.shapes import AnyArray, Array, Float

LARGEST = 128  # size of a head: one of an autoencoder, alone and of 512, would have one thread


def native_is_for(size: int, dtype: Any, mesh: Any) -> bool:
    """Whether `native_projection` is for heads of this size and dtype: on one CPU device, where the kernel is (it is
    compiled if need be). Asked while tracing: XLA cannot split the kernel, so several devices have ``by_head.py``."""
    devices = list(mesh.devices.flat) if isinstance(mesh, Mesh) else jax.devices()[:1]
    if len(devices) > 1 or devices[0].platform != "cpu":
        return False
    return size <= LARGEST and dtype in (jnp.float32, jnp.bfloat16) and bool(targets())


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def native_projection(qkv: Float[AnyArray, "B T width"], heads: int) -> Float[Array, "B T D"]:
    """Attention of a fused projection (B, T, 3 D), laid out (3, heads, head_dim), to (B, T, D) of its dtype, where
    ``native_is_for``. Only the projection is kept for the backward pass."""
    result = jax.ShapeDtypeStruct((*qkv.shape[:-1], qkv.shape[-1] // 3), jnp.float32)
    return _call("attention_forward", result, heads, qkv).astype(qkv.dtype)


def _keep(qkv: jax.Array, heads: int) -> tuple[jax.Array, jax.Array]:
    return native_projection(qkv, heads), qkv


def _pull(heads: int, qkv: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    result = jax.ShapeDtypeStruct(qkv.shape, jnp.float32)
    return (_call("attention_backward", result, heads, qkv, gradient).astype(qkv.dtype),)


native_projection.defvjp(_keep, _pull)


def _call(kernel: str, result: jax.ShapeDtypeStruct, heads: int, *arrays: jax.Array) -> jax.Array:
    call = jax.ffi.ffi_call(targets()[kernel], result, vmap_method="broadcast_all")
    return call(*(array.astype(jnp.float32) for array in arrays), heads=np.int64(heads))
