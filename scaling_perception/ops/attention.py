"""Attention as a pure function of arrays: one signature, a program for each platform, one oracle."""

import warnings
from functools import lru_cache, partial
from typing import Any

import jax
import jax.extend.backend
import jax.numpy as jnp
from jax.sharding import Mesh

from scaling_perception.ops.by_head import attention_by_head
from scaling_perception.ops.flash import (
    LANES,
    LARGE,
    LEAST_TOKENS,
    fits_projection,
    flash_attention,
    flash_projection,
    local_plan,
    plan,
)
from scaling_perception.ops.native import native_is_for, native_projection
from scaling_perception.support.shapes import AnyArray, Array, Float


def attention(
    query: Float[AnyArray, "B T heads d"],
    key: Float[AnyArray, "B Tk heads d"],
    value: Float[AnyArray, "B Tk heads d"],
    mesh: Any = None,
) -> Float[Array, "B T heads d"]:
    """Softmax attention of every token to every token, scaled by head_dim ** -0.5 (facts 1.1; no mask).

    On a TPU the kernel of ``ops/flash.py``, on an NVIDIA GPU cuDNN's, where they are for such arrays (docs/kernels.md);
    on a CPU that of ``ops/native.py`` where it is there, else one head after the other.

    Args:
        query, key, value: (B, T, heads, head_dim), of one dtype.
        mesh: the mesh that they live on, None = one device.

    Returns:
        (B, T, heads, head_dim) in the dtype of ``value``. Logits and softmax are float32 whatever the inputs are.
    """
    # every branch keeps no more than its inputs for the backward pass: a branch that is not taken costs nothing
    whole = jax.checkpoint(attention_einsum)
    fused = {}
    if _flash_is_for(query, key, mesh):
        fused["tpu"] = partial(flash_attention, mesh=mesh)
    if _cudnn_is_for(query):
        fused["cuda"] = partial(jax.nn.dot_product_attention, implementation="cudnn")
    native = query.shape == key.shape and native_is_for(query.shape[3], query.dtype, mesh)
    cpu = _native if native else attention_by_head
    return jax.lax.platform_dependent(query, key, value, cpu=cpu, default=whole, **fused)


def projection_attention(qkv: Float[AnyArray, "B T width"], heads: int, mesh: Any = None) -> Float[Array, "B T D"]:
    """`attention` of a fused projection (B, T, 3 D), as `split_heads` has it, to (B, T, D).

    Query, key and value are not written apart on a TPU, where nothing has to be padded, and on a CPU with the kernel of
    ``ops/native.py``.
    """
    batch, tokens, width = qkv.shape
    if _is_tpu(mesh) and fits_projection(mesh, (batch, tokens, heads, width // (3 * heads)), qkv.dtype):
        return flash_projection(qkv, heads, mesh)

    def apart(qkv: jax.Array) -> jax.Array:
        mixed: Any = attention(*split_heads(qkv, heads), mesh)
        return mixed.reshape(batch, tokens, -1)

    if native_is_for(width // (3 * heads), qkv.dtype, mesh):
        return jax.lax.platform_dependent(qkv, cpu=partial(native_projection, heads=heads), default=apart)
    return apart(qkv)


def _native(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    qkv = jnp.concatenate([part.reshape(*part.shape[:2], -1) for part in (query, key, value)], axis=-1)
    mixed: Any = native_projection(qkv, query.shape[2])
    return mixed.reshape(query.shape)


def split_heads(
    qkv: Float[AnyArray, "B T width"], heads: int
) -> tuple[Float[Array, "B T heads d"], Float[Array, "B T heads d"], Float[Array, "B T heads d"]]:
    """Query, key and value (B, T, heads, head_dim) of a fused projection (B, T, 3 * heads * head_dim), laid out
    (3, heads, head_dim)."""
    batch, tokens, width = qkv.shape
    shape = (batch, tokens, heads, width // (3 * heads))

    def at_once(qkv: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.moveaxis(qkv.reshape(batch, tokens, 3, *shape[2:]), 2, 0))

    def in_parts(qkv: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(part.reshape(shape) for part in jnp.split(qkv, 3, axis=-1))

    # the same numbers: told of heads first, a TPU lays the projection out by them, and then copies it for the kernel
    query, key, value = jax.lax.platform_dependent(qkv, cpu=at_once, default=in_parts)
    return query, key, value


def _flash_is_for(query: jax.Array, key: jax.Array, mesh: Any) -> bool:
    tokens, heads = query.shape[1:3]
    if query.shape != key.shape or heads < 2 or tokens < LEAST_TOKENS:
        return False  # not worth a kernel
    fits = local_plan(mesh, query.shape, query.dtype) is not None
    if not fits and _is_tpu(mesh):
        needs = f"bfloat16 or float32, head_dim a multiple of 8 up to {LANES}"
        if plan(tokens, heads, query.shape[3], query.dtype, LARGE):
            needs = "fewer tokens, or a chip with more memory beside its units (v5e and later)"
        _warn("TPU", needs, query.dtype.name, query.shape)
    return fits


def _is_tpu(mesh: Any) -> bool:
    return (mesh.devices.flat[0] if isinstance(mesh, Mesh) else jax.devices()[0]).platform == "tpu"


def _cudnn_is_for(query: jax.Array) -> bool:
    """Asked while tracing: cuDNN's own rules for gradients and meshes are then in force, but it must be there."""
    half, head_dim = query.dtype in (jnp.bfloat16, jnp.float16), query.shape[-1]
    if not half or query.shape[2] < 2 or not _on_cuda():
        return False
    fits = head_dim % 8 == 0 and head_dim <= 128
    if not fits:
        _warn("GPU", "head_dim a multiple of 8 up to 128", query.dtype.name, query.shape)
    return fits


@lru_cache(maxsize=1)
def _on_cuda() -> bool:
    return jax.default_backend() == "gpu" and "cuda" in jax.extend.backend.get_backend().platform_version


@lru_cache(maxsize=1)
def _warn(chip: str, needs: str, dtype: str, shape: tuple[int, ...]) -> None:
    text = (
        f"attention on this {chip} is not fused for {dtype} arrays of {shape[2]} heads of {shape[3]} at {shape[1]} "
        f"tokens, so its logits go through main memory: the kernel takes {needs}"
    )
    warnings.warn(text, stacklevel=2)


def attention_einsum(
    query: Float[AnyArray, "B T heads d"], key: Float[AnyArray, "B Tk heads d"], value: Float[AnyArray, "B Tk heads d"]
) -> Float[Array, "B T heads d"]:
    """The oracle: two einsums and a softmax. See ``attention``."""
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", query * scale, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)
