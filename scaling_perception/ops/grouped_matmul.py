"""Rows sorted by expert, each times its expert's matrix: one signature, a program for each platform.

No row is ever dropped and every shape is static. ``sizes`` (E,) int32 says how many rows each expert has; rows past
their sum are no expert's and come out 0. Never ``vmap`` over these: flatten instead.
"""

import importlib.util
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from scaling_perception.ops.by_platform import by_platform
from scaling_perception.support.shapes import AnyArray, Array, Bool, Float, Int, Shaped

LARGEST_BLOCK = 512
_CPU_BLOCK = 256  # measured: the hidden rows of a block stay in the caches, and a matmul still fills both cores


def block_rows(rows: int, experts: int) -> int:
    """Rows that are computed together: a power of two, 16 to 512, near the mean number of rows of an expert."""
    mean = max(rows // max(experts, 1), 1)
    return min(max(1 << (mean.bit_length() - 1), 16), LARGEST_BLOCK)


def row_expert(sizes: Int[AnyArray, " E"], rows: int) -> Int[Array, " R"]:
    """(rows,) int32: whose row it is; E for rows past the last."""
    found = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows), side="right", method="compare_all")
    return found.astype(jnp.int32)


def rows_of(table: Float[AnyArray, "E F"], sizes: Int[AnyArray, " E"], rows: int) -> Float[Array, "R F"]:
    """(E, F) to (rows, F): for each row the line of its expert, 0 for rows past the last."""
    return table.at[row_expert(sizes, rows)].get(mode="fill", fill_value=0)


def mask_rows(x: Float[AnyArray, "R F"], sizes: Int[AnyArray, " E"]) -> Float[Array, "R F"]:
    """x (M, F) with 0 in the rows past the last, whatever they hold: kernels leave garbage there."""
    return jnp.where(jnp.arange(x.shape[0])[:, None] < sizes.sum(), x, 0)


# --- CPU: blocks of rows -------------------------------------------------------------------------------------------


def over_blocks(
    sizes: Int[AnyArray, " E"], weights: Any, carry: Any, total: Any, block: int, body: Callable[..., tuple[Any, Any]]
) -> tuple[Any, Any]:
    """Visit the rows block by block, expert by expert, in order; blocks that nobody needs are not visited.

    A block may reach past its expert's last row: the next expert's first block comes later and writes over it. The
    last expert's reaches past the end, so buffers need ``block`` rows more than there are. An expert's last rows are
    visited in quarters of a block, so that few are computed for nothing.

    Args:
        weights: tree of (E, …), of which body sees one expert's. carry: what goes from block to block.
        total: what each expert starts with, such as sums over its rows.
        body: (carry, total, expert's weights, first row, mine (n,) bool: which rows are this expert's) to
            (carry, total).

    Returns:
        carry, and the experts' totals stacked (E, …).
    """
    block = min(block, _CPU_BLOCK)
    small = max(block // 4, 8)

    def expert(carry: Any, one: Any) -> tuple[Any, Any]:
        weight, start, size = one

        def visit(offset: Any, length: int) -> Callable[..., Any]:
            def step(i: Any, state: Any) -> Any:
                at = start + offset + i * length
                return body(*state, weight, at, at + jnp.arange(length) < start + size)

            return step

        whole = size // block
        state = jax.lax.fori_loop(0, whole, visit(0, block), (carry, total))
        rest = size - whole * block
        return jax.lax.fori_loop(0, (rest + small - 1) // small, visit(whole * block, small), state)

    starts = jnp.cumsum(sizes) - sizes
    return jax.lax.scan(expert, carry, (weights, starts, sizes))


def block_of(
    x: Shaped[AnyArray, " R *more"], at: Int[AnyArray, ""], mine: Bool[AnyArray, " block"]
) -> Shaped[Array, " block *more"]:
    """The rows of x (M, …) that a block covers."""
    return jax.lax.dynamic_slice_in_dim(x, at, mine.shape[0])


def put_block(
    x: Float[AnyArray, " R *more"], rows: Float[AnyArray, " block *more"], at: Int[AnyArray, ""]
) -> Float[Array, " R *more"]:
    """x (M, …) with the rows of a block in their place, in the dtype of x."""
    return jax.lax.dynamic_update_slice_in_dim(x, rows.astype(x.dtype), at, 0)


def matmul(
    x: Float[AnyArray, "_ _"], y: Float[AnyArray, "_ _"], contract: tuple[int, int] = (1, 0)
) -> Float[Array, "_ _"]:
    """Product of two matrices over axis ``contract[0]`` of x and ``contract[1]`` of y, float32."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def _times_cpu(x: jax.Array, kernel: jax.Array, sizes: jax.Array, transpose: bool) -> jax.Array:
    rows, block = x.shape[0], block_rows(x.shape[0], kernel.shape[0])
    spare = jnp.pad(x, ((0, block), (0, 0)))

    def body(out: jax.Array, total: None, w: jax.Array, at: jax.Array, mine: jax.Array) -> tuple[jax.Array, None]:
        return put_block(out, matmul(block_of(spare, at, mine), w, (1, int(transpose))), at), total

    out = jnp.zeros((rows + block, kernel.shape[1 if transpose else 2]), x.dtype)
    return mask_rows(over_blocks(sizes, kernel, out, None, block, body)[0][:rows], sizes)


def _outer_cpu(x: jax.Array, y: jax.Array, sizes: jax.Array, dtype: str) -> jax.Array:
    block = block_rows(x.shape[0], sizes.shape[0])
    x, y = (jnp.pad(array, ((0, block), (0, 0))) for array in (x, y))

    def body(carry: None, total: jax.Array, _: None, at: jax.Array, mine: jax.Array) -> tuple[None, jax.Array]:
        rows = jnp.where(mine[:, None], block_of(y, at, mine), 0)
        return carry, total + matmul(block_of(x, at, mine), rows, (0, 0))

    zero = jnp.zeros((x.shape[1], y.shape[1]), jnp.float32)
    return over_blocks(sizes, None, None, zero, block, body)[1].astype(dtype)


# --- TPU: megablox -------------------------------------------------------------------------------------------------


def tile_of(size: int) -> int:
    """A tile that divides ``size`` (a ragged last tile is masked at a cost): the largest multiple of 128 up to 512, or
    the whole of a size that has none; 0 if that is too much for the chip's memory."""
    fits = [tile for tile in (512, 384, 256, 128) if size % tile == 0]
    return fits[0] if fits else (size if size < 1024 else 0)


def _tiling(x: jax.Array, experts: int, inner: int, outer: int) -> tuple[int, int, int] | None:
    """(rows, inner, outer), or None where megablox is not for these arrays."""
    tiles = tile_of(inner), tile_of(outer)
    if not all(tiles) or x.dtype not in (jnp.float32, jnp.bfloat16):
        return None
    # an expert's border costs one more visit of a tile: small tiles for few rows, large ones where they are amortised
    mean, block = x.shape[0] // experts, block_rows(x.shape[0], experts)
    return (512 if mean >= 2048 else min(block, 256 if mean >= 512 else 128), *tiles)


def _padded(x: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(x, ((0, -x.shape[0] % multiple), (0, 0)))


def times_megablox(
    x: Float[AnyArray, "R _"],
    kernel: Float[AnyArray, "E D F"],
    sizes: Int[AnyArray, " E"],
    transpose: bool,
    interpret: bool = False,
) -> Float[Array, "R _"]:
    """``times`` with the TPU's kernel; ``interpret`` runs it anywhere, slowly."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # only where it is used: a slow import

    tiling = _tiling(x, kernel.shape[0], x.shape[1], kernel.shape[1 if transpose else 2])
    if tiling is None:
        return _times_ragged(jax.lax.ragged_dot_general, x, kernel, sizes, transpose)
    rows = _padded(x, tiling[0])
    out = gmm(rows, kernel, sizes, x.dtype, tiling, transpose_rhs=transpose, interpret=interpret)
    return mask_rows(out[: x.shape[0]], sizes)


def outer_megablox(
    x: Float[AnyArray, "R D"],
    y: Float[AnyArray, "R F"],
    sizes: Int[AnyArray, " E"],
    dtype: str = "float32",
    interpret: bool = False,
) -> Float[Array, "E D F"]:
    """``outer`` with the TPU's kernel; ``interpret`` runs it anywhere, slowly."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiling = _tiling(x, sizes.shape[0], x.shape[1], y.shape[1])
    if tiling is None:
        return _outer_ragged(jax.lax.ragged_dot_general, x, y, sizes, dtype)
    x, y = _padded(x, tiling[0]), _padded(y, tiling[0])
    return tgmm(x.swapaxes(0, 1), y, sizes, jnp.dtype(dtype), tiling, interpret=interpret)


# --- GPU, and what there is everywhere -----------------------------------------------------------------------------


def _times_ragged(dot: Callable[..., Any], x: jax.Array, kernel: jax.Array, sizes: jax.Array, transpose: bool) -> Any:
    dims = jax.lax.RaggedDotDimensionNumbers((((1,), (2 if transpose else 1,)), ((), ())), (0,), (0,))
    return mask_rows(dot(x, kernel, sizes, dims, preferred_element_type=x.dtype), sizes)


def _outer_ragged(dot: Callable[..., Any], x: jax.Array, y: jax.Array, sizes: jax.Array, dtype: str) -> Any:
    dims = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    return dot(x, y, sizes, dims, preferred_element_type=jnp.float32).astype(dtype)


@lru_cache(maxsize=1)
def _warn_of_dense_lowering() -> None:
    text = (
        "tokamax is not installed, so each expert is computed on every row on this GPU: "
        "pip install 'scaling-perception[gpu-kernels]'"
    )
    warnings.warn(text, stacklevel=2)


def _ragged_dot_gpu() -> Callable[..., Any]:
    if importlib.util.find_spec("tokamax") is None:
        _warn_of_dense_lowering()
        return jax.lax.ragged_dot_general
    import tokamax  # pyright: ignore[reportMissingImports]

    return tokamax.ragged_dot_general


def _times_gpu(x: jax.Array, kernel: jax.Array, sizes: jax.Array, transpose: bool) -> jax.Array:
    return _times_ragged(_ragged_dot_gpu(), x, kernel, sizes, transpose)


def _outer_gpu(x: jax.Array, y: jax.Array, sizes: jax.Array, dtype: str) -> jax.Array:
    return _outer_ragged(_ragged_dot_gpu(), x, y, sizes, dtype)


def _times_shape(x: Any, kernel: Any, sizes: Any, transpose: bool) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((x.shape[0], kernel.shape[1 if transpose else 2]), x.dtype)


def _outer_shape(x: Any, y: Any, sizes: Any, dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((sizes.shape[0], x.shape[1], y.shape[1]), dtype)


_times = by_platform(
    "grouped_times",
    _times_shape,
    partial(_times_ragged, jax.lax.ragged_dot_general),
    cpu=_times_cpu,
    tpu=times_megablox,
    cuda=_times_gpu,
    rocm=_times_gpu,
)
_outer = by_platform(
    "grouped_outer",
    _outer_shape,
    partial(_outer_ragged, jax.lax.ragged_dot_general),
    cpu=_outer_cpu,
    tpu=outer_megablox,
    cuda=_outer_gpu,
    rocm=_outer_gpu,
)


def times(
    x: Float[AnyArray, "R _"], kernel: Float[AnyArray, "E D F"], sizes: Int[AnyArray, " E"], transpose: bool = False
) -> Float[Array, "R _"]:
    """Rows (M, D) times their expert's matrix of kernel (E, D, F), or with ``transpose`` rows (M, F) times its
    transpose; x and kernel of one dtype, which the result has; sums are float32. No gradient.

    On a TPU the megablox kernel, on a GPU tokamax's where it is installed (else a dense lowering, with one warning),
    on a CPU a loop over blocks of rows whose number depends on the data."""
    return _times(x, kernel, sizes, transpose=transpose)


def outer(
    x: Float[AnyArray, "R D"], y: Float[AnyArray, "R F"], sizes: Int[AnyArray, " E"], dtype: Any = jnp.float32
) -> Float[Array, "E D F"]:
    """x (M, D) and y (M, F) to (E, D, F): for each expert ``x^T y`` over its rows, summed in float32 and given in
    ``dtype``. No gradient."""
    return _outer(x, y, sizes, dtype=jnp.dtype(dtype).name)
