"""A two-layer MLP per expert on rows sorted by expert, forward and backward written out.

The formulas stand here once. On a CPU they run block by block, so that what lies between the two matmuls stays in the
caches; elsewhere on all rows at once, each matmul a grouped one. Written out, the backward pass needs only the inputs
and the hidden rows: the gradient of a row's scale comes from the hidden side, without the row's output.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from scaling_perception.ops.by_platform import by_platform
from scaling_perception.ops.grouped_matmul import (
    block_of,
    matmul,
    outer,
    over_blocks,
    put_block,
    row_expert,
    rows_of,
    times,
)
from scaling_perception.support.shapes import AnyArray, Array, Float, Int

# kind: names of the layers that widen, in the order that the activation takes them, and of the one that narrows
LAYERS = {"gelu": (("fc1",), "fc2"), "swiglu": (("gate", "up"), "down")}
Layer = Mapping[str, Float[AnyArray, "..."]]  # kernel and, if it has one, bias


def _gelu(hidden: jax.Array) -> jax.Array:
    return jax.nn.gelu(hidden)


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


_ACTIVATIONS: dict[str, Callable[..., jax.Array]] = {"gelu": _gelu, "swiglu": _swiglu}


class Rows(NamedTuple):
    """The rows that are computed, sorted by expert.

    Attributes:
        token: (R,) int32, the token of each row; None: the tokens are the rows, in that order.
        scale: (R,) float32, what its output is multiplied by; None: nothing.
        sizes: (E,) int32, rows of each expert; rows past their sum are nobody's.
    """

    token: Int[Array, " R"] | None
    scale: Float[Array, " R"] | None
    sizes: Int[Array, " E"]


class _Matmuls(NamedTuple):
    """What the formulas are made of, for one block of one expert or for all rows of all experts."""

    times: Callable[[jax.Array, Layer], jax.Array]  # (n, in) to (n, out) float32, without bias
    back: Callable[[jax.Array, Layer], jax.Array]  # (n, out) to (n, in) float32: times the transpose
    bias: Callable[[Layer], jax.Array]  # float32, broadcast or gathered to rows
    outer: Callable[[jax.Array, jax.Array, Layer], dict[str, jax.Array]]  # gradient of a layer


def _layers(experts: Mapping[str, Layer], kind: str) -> tuple[list[Layer], Layer]:
    widening, narrowing = LAYERS[kind]
    return [experts[name] for name in widening], experts[narrowing]


def _linear(m: _Matmuls, x: jax.Array, layer: Layer) -> jax.Array:
    out = m.times(x, layer)
    return out + m.bias(layer) if "bias" in layer else out


def _forward(
    m: _Matmuls, x: jax.Array, scale: jax.Array | None, experts: Any, kind: str
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Rows (n, D) to (scaled output (n, D) float32, hidden rows (n, F) before the activation, float32)."""
    first, last = _layers(experts, kind)
    hidden = tuple(_linear(m, x, layer) for layer in first)
    out = _linear(m, _ACTIVATIONS[kind](*hidden).astype(x.dtype), last)
    return out if scale is None else out * scale[:, None], hidden


def _backward(
    m: _Matmuls, x: jax.Array, scale: jax.Array | None, experts: Any, kind: str, hidden: Any, gradient: jax.Array
) -> tuple[jax.Array, jax.Array | None, dict[str, Any]]:
    """Gradients of rows (n, D) and scale (n,), float32, and of the experts; gradient (n, D) is the output's."""
    first, last = _layers(experts, kind)
    active, pull = jax.vjp(_ACTIVATIONS[kind], *(part.astype(jnp.float32) for part in hidden))
    to_active, to_scale = m.back(gradient, last), None
    if scale is not None:
        wide = gradient.astype(jnp.float32)
        to_scale = jnp.sum(to_active * active, axis=1)
        if "bias" in last:
            to_scale = to_scale + jnp.sum(wide * m.bias(last), axis=1)
        to_active, gradient = to_active * scale[:, None], (wide * scale[:, None]).astype(x.dtype)
    to_hidden = [part.astype(x.dtype) for part in pull(to_active)]
    grads = {LAYERS[kind][1]: m.outer(active.astype(x.dtype), gradient, last)}
    for name, layer, part in zip(LAYERS[kind][0], first, to_hidden, strict=True):
        grads[name] = m.outer(x, part, layer)
    to_x = sum(m.back(part, layer) for layer, part in zip(first, to_hidden, strict=True))
    return jnp.asarray(to_x), to_scale, grads


# --- CPU: block by block -------------------------------------------------------------------------------------------


def _block_outer(x: jax.Array, y: jax.Array, layer: Layer) -> dict[str, jax.Array]:
    grads = {"kernel": matmul(x, y, (0, 0))}
    return {**grads, "bias": y.astype(jnp.float32).sum(axis=0)} if "bias" in layer else grads


_BLOCK = _Matmuls(
    times=lambda x, layer: matmul(x, layer["kernel"]),
    back=lambda x, layer: matmul(x, layer["kernel"], (1, 1)),
    bias=lambda layer: layer["bias"].astype(jnp.float32)[None],
    outer=_block_outer,
)


def _block_tokens(x: jax.Array, rows: Rows, at: jax.Array, mine: jax.Array) -> jax.Array:
    """The tokens of a block's rows, of x or of anything else that tokens have."""
    return block_of(x, at, mine) if rows.token is None else x[block_of(rows.token, at, mine)]


def _forward_cpu(x: jax.Array, rows: Rows, experts: Any, kind: str, block: int, keep: bool) -> Any:
    def body(carry: Any, total: None, weights: Any, at: jax.Array, mine: jax.Array) -> tuple[Any, None]:
        scale = None if rows.scale is None else block_of(rows.scale, at, mine)
        out, parts = _forward(_BLOCK, _block_tokens(x, rows, at, mine), scale, weights, kind)
        hidden = tuple(put_block(old, part, at) for old, part in zip(carry[1], parts, strict=False))
        return (put_block(carry[0], jnp.where(mine[:, None], out, 0), at), hidden), total

    shapes = _forward_shape(x, rows, experts, kind, block, keep)
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return over_blocks(rows.sizes, experts, empty, None, block, body)[0]


def _backward_cpu(
    x: jax.Array, rows: Rows, experts: Any, hidden: Any, gradient: jax.Array, kind: str, block: int, dtype: str
) -> Any:
    def body(carry: Any, total: Any, weights: Any, at: jax.Array, mine: jax.Array) -> tuple[Any, Any]:
        # the rows of others add nothing to sums over rows
        pulls = jnp.where(mine[:, None], _block_tokens(gradient, rows, at, mine), 0)
        scale = None if rows.scale is None else block_of(rows.scale, at, mine)
        parts = [block_of(part, at, mine) for part in hidden]
        own = _block_tokens(x, rows, at, mine)
        to_x, to_scale, grads = _backward(_BLOCK, own, scale, weights, kind, parts, pulls)
        to_x = put_block(carry[0], jnp.where(mine[:, None], to_x, 0), at)
        to_scale = None if to_scale is None else put_block(carry[1], jnp.where(mine, to_scale, 0), at)
        return (to_x, to_scale), jax.tree.map(jnp.add, total, grads)

    total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], jnp.float32), experts)
    *shapes, wanted = _backward_shape(x, rows, experts, hidden, gradient, kind, block, dtype)
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tuple(shapes))
    (to_x, to_scale), grads = over_blocks(rows.sizes, experts, empty, total, block, body)
    return to_x, to_scale, jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, wanted)


# --- elsewhere: all rows at once -----------------------------------------------------------------------------------


def _whole(count: int, sizes: jax.Array, dtype: str = "float32") -> _Matmuls:

    def whole_outer(x: jax.Array, y: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        grads = {"kernel": outer(x, y, sizes, dtype)}
        if "bias" in layer:
            owner = jax.nn.one_hot(row_expert(sizes, count), sizes.shape[0], dtype=y.dtype)
            grads["bias"] = matmul(owner, y, (0, 0))
        return grads

    return _Matmuls(
        times=lambda x, layer: times(x, layer["kernel"], sizes).astype(jnp.float32),
        back=lambda x, layer: times(x, layer["kernel"], sizes, transpose=True).astype(jnp.float32),
        bias=lambda layer: rows_of(layer["bias"], sizes, count).astype(jnp.float32),
        outer=whole_outer,
    )


def forward_whole(
    x: Float[AnyArray, "N D"], rows: Rows, experts: Any, kind: str, block: int, keep: bool
) -> tuple[Float[Array, "R D"], tuple[Float[Array, "R F"], ...]]:
    """``mlp_forward`` as a chain of grouped matmuls."""
    own = x if rows.token is None else x[rows.token]
    out, hidden = _forward(_whole(own.shape[0], rows.sizes), own, rows.scale, experts, kind)
    return out.astype(x.dtype), tuple(part.astype(x.dtype) for part in hidden) if keep else ()


def backward_whole(
    x: Float[AnyArray, "N D"],
    rows: Rows,
    experts: Any,
    hidden: Any,
    gradient: Float[AnyArray, "N D"],
    kind: str,
    block: int,
    dtype: str = "float32",
) -> Any:
    """``mlp_backward`` as a chain of grouped matmuls."""
    own, pulls = (x, gradient) if rows.token is None else (x[rows.token], gradient[rows.token])
    m = _whole(own.shape[0], rows.sizes, dtype)
    to_x, to_scale, grads = _backward(m, own, rows.scale, experts, kind, hidden, pulls)
    return to_x.astype(x.dtype), to_scale, grads


def _row_count(x: Any, rows: Rows) -> int:
    return (x if rows.token is None else rows.token).shape[0]


def _forward_shape(x: Any, rows: Rows, experts: Any, kind: str, block: int, keep: bool) -> Any:
    count, shape = _row_count(x, rows), jax.ShapeDtypeStruct
    hidden = [shape((count, experts[name]["kernel"].shape[2]), x.dtype) for name in LAYERS[kind][0]]
    return shape((count, x.shape[1]), x.dtype), tuple(hidden) if keep else ()


def _backward_shape(
    x: Any, rows: Rows, experts: Any, hidden: Any, gradient: Any, kind: str, block: int, dtype: str
) -> Any:
    count, shape = _row_count(x, rows), jax.ShapeDtypeStruct
    kinds = {"kernel": dtype, "bias": "float32"}
    grads = {
        layer: {name: shape(leaf.shape, kinds[name]) for name, leaf in leaves.items()}
        for layer, leaves in experts.items()
    }
    to_scale = None if rows.scale is None else shape((count,), jnp.float32)
    return shape((count, x.shape[1]), x.dtype), to_scale, grads


_mlp_forward = by_platform("grouped_mlp_forward", _forward_shape, forward_whole, cpu=_forward_cpu)
_mlp_backward = by_platform("grouped_mlp_backward", _backward_shape, backward_whole, cpu=_backward_cpu)


def mlp_forward(
    x: Float[AnyArray, "N D"], rows: Rows, experts: Mapping[str, Layer], kind: str, block: int, keep: bool
) -> tuple[Float[Array, "R D"], tuple[Float[Array, "R F"], ...]]:
    """Each row's token through its expert, times the row's scale. No derivative: ``mlp_backward`` is the other half.

    Args:
        x: (N, D) tokens, float32 or bfloat16. rows: which token goes where.
        experts: one layer's tree, each leaf with a leading expert axis, of the dtype of x.
        kind: ``gelu`` (``fc1``, tanh GELU, ``fc2``, with biases) or ``swiglu`` (``down(silu(gate x) * up x)``).
        block: rows computed together on a CPU; the last ``block`` rows must be nobody's (``block_rows``).
        keep: also return what ``mlp_backward`` needs.

    Returns:
        (R, D) in the dtype of x, 0 in nobody's rows; and the hidden rows (R, F) before the activation, one array for
        ``gelu``, two for ``swiglu``, none without ``keep``.
    """
    return _mlp_forward(x, rows, dict(experts), kind=kind, block=block, keep=keep)


def mlp_backward(
    x: Float[AnyArray, "N D"],
    rows: Rows,
    experts: Mapping[str, Layer],
    hidden: tuple[Float[AnyArray, "R F"], ...],
    gradient: Float[AnyArray, "N D"],
    kind: str,
    block: int,
    dtype: Any = jnp.float32,
) -> tuple[Float[Array, "R D"], Float[Array, " R"] | None, dict[str, dict[str, Float[Array, "E ..."]]]]:
    """Gradients of ``mlp_forward`` where each row's output was added to its token's, whose gradient is (N, D).

    Returns:
        (R, D) to each row's token, in the dtype of x; (R,) float32 to each row's scale, None where there is none; the
        experts', summed in float32, the kernels' given in ``dtype``, the biases' in float32.
    """
    given = jnp.dtype(dtype).name
    return _mlp_backward(x, rows, dict(experts), hidden, gradient, kind=kind, block=block, dtype=given)
