"""Fused attention for a TPU: heads side by side in the lanes, as the projection leaves them, logits on the chip alone.

The arrays stay (B, T, heads * head_dim). A visit takes all tokens of one sample and as many heads as fill whole tiles
of 128 lanes, and goes through them one by one, so that nothing is transposed and nothing is padded on its way to and
from main memory. All keys are on the chip at once (T is at most some thousands here): each softmax is computed whole,
forward and again backward, and nothing but query, key and value is kept for the backward pass. See docs/kernels.md.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from scaling_perception.ops.by_platform import by_platform
from scaling_perception.support.own_samples import inside_own
from scaling_perception.support.shapes import AnyArray, Array, Float

LANES = 128
HEADS = 8  # of a visit, or more: while one waits for its sums, the next is multiplied
LEAST_TOKENS = 128  # below, the logits are small and a tile of them is mostly padding
SMALL, LARGE = 16 * 2**20, 60 * 2**20  # bytes of on-chip memory that a visit may take
# By the kind of the device. v4 has 16 MiB; v5p and v7 have 64, of which XLA keeps some; v5e and v6e have 128, where
# larger visits gain nothing. v2 and v3 cannot multiply bfloat16 in a kernel. Kinds that are not here get SMALL, which
# every TPU since v4 has.
MEMORY = {"TPU v2": 0, "TPU v3": 0, "TPU v4": SMALL, "TPU v4 lite": SMALL}
MEMORY |= dict.fromkeys(("TPU v5", "TPU v5p", "TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e"), LARGE)
MEMORY |= dict.fromkeys(("TPU7", "TPU7x"), LARGE)
_NT, _NN, _TN = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ())), (((0,), (0,)), ((), ()))


class TilePlan(NamedTuple):
    """How one device's (B, T, heads, head_dim) is computed; static.

    Attributes:
        size: lanes of a head: head_dim, or more where heads are padded. lanes: those of one visit, all its heads'.
        tokens: T, padded to a multiple of 128. queries: how many at a time.
    """

    size: int
    lanes: int
    tokens: int
    queries: int


def plan(tokens: int, heads: int, head_dim: int, dtype: Any, memory: int) -> TilePlan | None:
    """How to compute it in ``memory`` bytes on the chip, or None where the kernel is not for these arrays."""
    size = jnp.dtype(dtype).itemsize
    if heads < 2 or head_dim > LANES or head_dim % 8 or tokens < LEAST_TOKENS:
        return None  # one head is an autoencoder's, whose program is told of no mesh
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        return None
    padded = -(-tokens // LANES) * LANES
    queries = 256 if padded % 256 == 0 and padded <= 1024 else 128
    for wide in (head_dim, LANES):  # as they are; or each padded to a tile, where too many heads share tiles
        whole = math.lcm(wide, LANES) // wide
        counts = [count for count in range(whole, heads, whole) if heads % count == 0] + [heads]
        # backward: q, k, v, the gradient, and theirs
        fit = [count for count in counts if _taken(7, padded, count * wide, queries, size) <= memory]
        if fit:
            return TilePlan(
                wide, min((count for count in fit if count >= HEADS), default=fit[-1]) * wide, padded, queries
            )
    return None


def _taken(arrays: int, tokens: int, lanes: int, queries: int, size: int) -> int:
    """Bytes on the chip of a visit: while one visit's arrays are used, the next one's come in; beside them the float32
    sums of two gradients and five arrays of logits, and what the compiler keeps (it took 1 to 3 % less than this)."""
    return 2 * arrays * tokens * lanes * size + 4 * tokens * (2 * LANES + 5 * queries) + 2**20


def device_memory(mesh: Any) -> int:
    """Bytes on the chip that a visit may take on the mesh's devices (None: JAX's first one, which is the CPU where a
    program is compiled for chips that are not there: give a mesh of one device then)."""
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else jax.devices()[0]
    return MEMORY.get(device.device_kind, SMALL)


# --- One visit -----------------------------------------------------------------------------------------------------


def _dot(a: jax.Array, b: jax.Array, dims: Any) -> jax.Array:
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _softmax(logits: jax.Array, scale: float, keys: int) -> jax.Array:
    """Softmax over the keys of logits (T, queries), of which the rows from ``keys`` on are padding. Keys by queries,
    not queries by keys: maxima and sums then go down the rows, lane by lane, and not across the lanes (by the
    compiler's own schedules a fifth to two fifths fewer cycles, docs/kernels.md)."""
    if logits.shape[0] > keys:
        logits = jnp.where(jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0) < keys, logits, -1e30)
    weights = jnp.exp((logits - logits.max(axis=0, keepdims=True)) * scale)
    return weights * (1.0 / weights.sum(axis=0, keepdims=True))


def _over_queries(tokens: int, queries: int, body: Any, carry: Any) -> Any:
    from jax.experimental import pallas as pl

    def step(i: Any, carry: Any) -> Any:
        return body(pl.ds(pl.multiple_of(i * queries, queries), queries), carry)

    return jax.lax.fori_loop(0, tokens // queries, step, carry)


def _forward_visit(
    q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, *, plan: TilePlan, scale: float, keys: int
) -> None:
    for start in range(0, plan.lanes, plan.size):
        head = slice(start, start + plan.size)
        k, v = k_ref[0, :, head], v_ref[0, :, head]

        def some(rows: Any, carry: None, head: Any = head, k: Any = k, v: Any = v) -> None:
            weights = _softmax(_dot(k, q_ref[0, rows, head], _NT), scale, keys)
            out_ref[0, rows, head] = _dot(weights.astype(v.dtype), v, _TN).astype(out_ref.dtype)

        _over_queries(plan.tokens, plan.queries, some, None)


def _backward_visit(
    q_ref: Any, k_ref: Any, v_ref: Any, g_ref: Any, dq_ref: Any, dk_ref: Any, dv_ref: Any,
    *, plan: TilePlan, scale: float, keys: int,
) -> None:  # fmt: skip
    for start in range(0, plan.lanes, plan.size):
        head = slice(start, start + plan.size)
        k, v = k_ref[0, :, head], v_ref[0, :, head]

        def some(rows: Any, carry: Any, head: Any = head, k: Any = k, v: Any = v) -> Any:
            dk, dv = carry
            q, g = q_ref[0, rows, head], g_ref[0, rows, head]
            weights = _softmax(_dot(k, q, _NT), scale, keys)
            to_weights = _dot(v, g, _NT)
            to_logits = weights * (to_weights - (weights * to_weights).sum(axis=0, keepdims=True))
            to_logits = to_logits.astype(q.dtype)
            dq_ref[0, rows, head] = (_dot(to_logits, k, _TN) * scale).astype(dq_ref.dtype)
            return dk + _dot(to_logits, q, _NN), dv + _dot(weights.astype(g.dtype), g, _NN)

        zero = jnp.zeros((plan.tokens, plan.size), jnp.float32)
        dk, dv = _over_queries(plan.tokens, plan.queries, some, (zero, zero))
        dk_ref[0, :, head] = (dk * scale).astype(dk_ref.dtype)
        dv_ref[0, :, head] = dv.astype(dv_ref.dtype)


# --- All visits ----------------------------------------------------------------------------------------------------


def _visits(
    kernel: Any, name: str, results: int, products: int, arrays: tuple[jax.Array, ...], how: TilePlan, memory: int,
    interpret: bool,
) -> Any:  # fmt: skip
    batch, tokens, heads, head_dim = arrays[0].shape
    width, padded = heads * how.size, (0, how.tokens - tokens)
    if how.size > head_dim:
        arrays = tuple(jnp.pad(array, (*[(0, 0)] * 3, (0, how.size - head_dim))) for array in arrays)
    arrays = tuple(array.reshape(batch, tokens, width) for array in arrays)
    if padded[1]:  # a padded query's gradient is 0, a padded key has no weight
        arrays = tuple(jnp.pad(array, ((0, 0), padded, (0, 0))) for array in arrays)
    starts = (0,) * len(arrays)
    found = _call(kernel, name, results, products, arrays, starts, how, (tokens, heads, head_dim), memory, interpret)
    found = [array[:, :tokens].reshape(batch, tokens, heads, how.size)[..., :head_dim] for array in found]
    return found[0] if results == 1 else tuple(found)


def _call(
    kernel: Any, name: str, results: int, products: int, arrays: tuple[jax.Array, ...], starts: tuple[int, ...],
    how: TilePlan, sizes: tuple[int, int, int], memory: int, interpret: bool, together: bool = False,
) -> Sequence[jax.Array]:  # fmt: skip
    """The kernel's results, each (B, how.tokens, all heads' lanes), of flat arrays (B, how.tokens, lanes).

    Args:
        starts: the visit at whose lanes each array begins. sizes: tokens, heads and head_dim without padding.
        together: results side by side in one array, where a visit has all heads.
    """
    from jax.experimental import pallas as pl  # only where it is used: a slow import
    from jax.experimental.pallas import tpu as pltpu

    (tokens, heads, head_dim), batch, width = sizes, arrays[0].shape[0], sizes[1] * how.size

    def block(start: int, wide: int = 1) -> Any:
        return pl.BlockSpec((1, how.tokens, wide * how.lanes), lambda sample, part: (sample, 0, part + start))

    shape = jax.ShapeDtypeStruct((batch, how.tokens, width), arrays[0].dtype)
    out = [block(0)] * results, [shape] * results
    visit = partial(kernel, plan=how, scale=head_dim**-0.5, keys=tokens)
    if together:
        out = [block(0, results)], [jax.ShapeDtypeStruct((batch, how.tokens, results * width), shape.dtype)]
        visit = partial(_side_by_side, visit, results, width)
    taken = _taken(len(arrays) + results, how.tokens, how.lanes, how.queries, shape.dtype.itemsize)
    limit = min(taken + 16 * 2**20, memory)  # a program that may take more is scheduled better
    logits = batch * heads * tokens**2
    moved = (len(arrays) + results) * math.prod(shape.shape) * shape.dtype.itemsize
    return pl.pallas_call(
        visit,
        grid=(batch, width // how.lanes),
        in_specs=[block(start) for start in starts],
        out_specs=out[0],
        out_shape=out[1],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=limit),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * logits * head_dim, transcendentals=logits, bytes_accessed=moved
        ),
        interpret=interpret,
        name=name,
    )(*arrays)


def _side_by_side(visit: Any, results: int, width: int, *refs: Any) -> None:
    """A visit whose results are columns of one array."""
    *given, out = refs
    visit(*given, *(out.at[:, :, index * width : (index + 1) * width] for index in range(results)))


def _on_mesh(function: Any, mesh: Any, spec: PartitionSpec, arrays: tuple[jax.Array, ...]) -> Any:
    """A kernel is not the compiler's to split: each device calls it on its samples and, with ``tensor``, its heads."""
    if mesh is None or mesh.size == 1:
        return function(*arrays)
    # every array is split alike and there is no sum over devices: nothing for check_vma to check
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)


def mesh_spec(mesh: Any, shape: tuple[int, ...]) -> PartitionSpec:
    """How (B, T, heads, head_dim) is split over a mesh: the batch as elsewhere, heads over ``tensor``; what does not
    divide is whole on every device."""
    axes = () if inside_own() else tuple(name for name in mesh.axis_names if name != "tensor")
    parts, tensor = math.prod(mesh.shape[name] for name in axes), mesh.shape.get("tensor", 1)
    return PartitionSpec(axes if shape[0] % parts == 0 else None, None, "tensor" if shape[2] % tensor == 0 else None)


def local_plan(mesh: Any, shape: tuple[int, ...], dtype: Any) -> TilePlan | None:
    """``plan`` for what one device of the mesh (None: the only one) has of (B, T, heads, head_dim)."""
    _, tokens, heads, head_dim = shape
    tensor = 1 if mesh is None else mesh.shape.get("tensor", 1)
    heads = heads // tensor if heads % tensor == 0 else heads
    return plan(tokens, heads, head_dim, dtype, device_memory(mesh))


def _over_mesh(kernel: Any, name: str, results: int, products: int, arrays: Any, mesh: Any, interpret: bool) -> Any:
    how = local_plan(mesh, arrays[0].shape, arrays[0].dtype)
    assert how is not None, "the caller asks local_plan()"

    def local(*arrays: jax.Array) -> Any:
        return _visits(kernel, name, results, products, arrays, how, device_memory(mesh), interpret)

    return _on_mesh(local, mesh, PartitionSpec() if mesh is None else mesh_spec(mesh, arrays[0].shape), arrays)


def flash_forward(
    query: Float[AnyArray, "B T heads d"],
    key: Float[AnyArray, "B T heads d"],
    value: Float[AnyArray, "B T heads d"],
    mesh: Any = None,
    interpret: bool = False,
) -> Float[Array, "B T heads d"]:
    """Attention of arrays (B, T, heads, head_dim) with the TPU's kernel, where ``local_plan`` is not None; no gradient.
    ``interpret`` runs it anywhere, slowly."""
    return _over_mesh(_forward_visit, "attention_forward", 1, 2, (query, key, value), mesh, interpret)


def flash_backward(
    query: Float[AnyArray, "B T heads d"],
    key: Float[AnyArray, "B T heads d"],
    value: Float[AnyArray, "B T heads d"],
    gradient: Float[AnyArray, "B T heads d"],
    mesh: Any = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T heads d"], Float[Array, "B T heads d"], Float[Array, "B T heads d"]]:
    """Gradients of query, key and value for that of the result, all (B, T, heads, head_dim). See ``flash_forward``."""
    return _over_mesh(_backward_visit, "attention_backward", 3, 5, (query, key, value, gradient), mesh, interpret)


# --- As one function -----------------------------------------------------------------------------------------------


def _elsewhere(*arrays: jax.Array, **options: Any) -> Any:
    raise NotImplementedError("the kernel is for a TPU")


_forward = by_platform(
    "attention_forward", lambda *arrays, mesh: arrays[0], _elsewhere, samples=True, tpu=flash_forward
)
_backward = by_platform(
    "attention_backward", lambda *arrays, mesh: arrays[:3], _elsewhere, samples=True, tpu=flash_backward
)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def flash_attention(
    query: Float[AnyArray, "B T heads d"],
    key: Float[AnyArray, "B T heads d"],
    value: Float[AnyArray, "B T heads d"],
    mesh: Any = None,
) -> Float[Array, "B T heads d"]:
    """Attention of arrays (B, T, heads, head_dim) on a TPU, where ``local_plan`` is not None. See ``ops.attention``."""
    return _forward(query, key, value, mesh=mesh)


def _keep(query: jax.Array, key: jax.Array, value: jax.Array, mesh: Any) -> tuple[jax.Array, Any]:
    return _forward(query, key, value, mesh=mesh), (query, key, value)


def _pull(mesh: Any, kept: Any, gradient: jax.Array) -> Any:
    return _backward(*kept, gradient, mesh=mesh)


flash_attention.defvjp(_keep, _pull)


# --- Of a fused projection -----------------------------------------------------------------------------------------


def fits_projection(mesh: Any, shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether ``flash_projection`` is for what its kernel sees as (B, T, heads, head_dim): nothing is padded, and no
    heads are split over ``tensor``, for the columns of a projection are not split by heads."""
    how = local_plan(mesh, shape, dtype)
    alone = mesh is None or mesh.shape.get("tensor", 1) == 1
    return how is not None and alone and (how.size, how.tokens) == (shape[3], shape[1])


def _projection(kernel: Any, name: str, results: int, products: int) -> Any:
    """A kernel that reads query, key and value out of one array (B, T, 3 * heads * head_dim), which is not cut up."""

    def run(qkv: jax.Array, *others: jax.Array, heads: int, mesh: Any, interpret: bool = False) -> jax.Array:
        batch, tokens, width = qkv.shape
        sizes = (tokens, heads, width // (3 * heads))
        how = local_plan(mesh, (batch, *sizes), qkv.dtype)
        assert how is not None, "the caller asks fits_projection()"
        visits = heads * how.size // how.lanes
        starts = (0, visits, 2 * visits, *[0] * len(others))

        def local(qkv: jax.Array, *others: jax.Array) -> jax.Array:
            arrays, memory = (qkv, qkv, qkv, *others), device_memory(mesh)
            given = (arrays, starts, how, sizes, memory, interpret, visits == 1)
            return jnp.concatenate(_call(kernel, name, results, products, *given), axis=-1)

        spec = PartitionSpec() if mesh is None else PartitionSpec(mesh_spec(mesh, (batch, *sizes))[0])
        return _on_mesh(local, mesh, spec, (qkv, *others))

    return run


projection_forward = _projection(_forward_visit, "attention_forward", 1, 2)
projection_backward = _projection(_backward_visit, "attention_backward", 3, 5)


def _attended(qkv: Any, *, heads: int, mesh: Any) -> Any:
    return jax.ShapeDtypeStruct((*qkv.shape[:2], qkv.shape[2] // 3), qkv.dtype)


_forward_of = by_platform("projection_forward", _attended, _elsewhere, samples=True, tpu=projection_forward)
_backward_of = by_platform(
    "projection_backward", lambda qkv, *others, heads, mesh: qkv, _elsewhere, samples=True, tpu=projection_backward
)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def flash_projection(qkv: Float[AnyArray, "B T width"], heads: int, mesh: Any = None) -> Float[Array, "B T D"]:
    """Attention of a fused projection (B, T, 3 D), laid out (3, heads, head_dim), to (B, T, D) on a TPU, where
    ``fits_projection``. Query, key and value are not written apart, which is a pass over all three, twice a layer."""
    return _forward_of(qkv, heads=heads, mesh=mesh)


def _keep_projection(qkv: jax.Array, heads: int, mesh: Any) -> tuple[jax.Array, jax.Array]:
    return _forward_of(qkv, heads=heads, mesh=mesh), qkv


def _pull_projection(heads: int, mesh: Any, qkv: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (_backward_of(qkv, gradient, heads=heads, mesh=mesh),)


flash_projection.defvjp(_keep_projection, _pull_projection)
