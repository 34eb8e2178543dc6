"""Where experts are computed: one signature, several dispatchers, the same parameters, values and gradients.

``dense`` computes every expert on every token: the oracle. ``ragged`` sorts the (token, expert) pairs by expert and
computes each once; with a mesh, each device does so for its own tokens, with all experts. ``ring`` leaves the experts
where they are, split over the mesh axis ``expert``: the tokens of that axis are gathered, each device computes the
pairs whose expert it has, and the results are summed back to the tokens' owners. No token is ever dropped.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from scaling_perception.ops.grouped_matmul import block_rows
from scaling_perception.ops.grouped_mlp import LAYERS, Rows, mlp_backward, mlp_forward
from scaling_perception.parallel.mesh import BATCH_AXES
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.shapes import AnyArray, Array, Float, Int

DISPATCHES = ("auto", "dense", "ragged", "ring")


def expert_mlp(
    x: Float[AnyArray, "N D"],
    index: Int[AnyArray, "N K"],
    weight: Float[AnyArray, "N K"],
    experts: Mapping[str, Any],
    kind: str,
    dispatch: str = "auto",
    mesh: Any = None,
) -> Float[Array, "N D"]:
    """The weighted sum of each token's experts.

    The forward pass names what is worth keeping for the backward pass (``checkpoint_name``): ``moe_hidden``, the rows
    before the activation, and ``moe_out``, the result. With both kept, nothing of the experts is computed twice.

    Args:
        x: (N, D) float32 or bfloat16; any N.
        index: (N, K) int32, the experts of each token, all different. weight: (N, K) float32.
        experts: one layer's tree, ``fc1`` and ``fc2`` for kind ``gelu``, ``gate``, ``up`` and ``down`` for ``swiglu``;
            each leaf with a leading expert axis, float32; matmuls are done in the dtype of x with float32 sums.
        dispatch: ``dense``, ``ragged``, ``ring`` or ``auto``, which is ring where the mesh splits experts.
        mesh: the mesh that the arrays live on (``parallel.mesh``), None = one device.

    Returns:
        (N, D) in the dtype of x; the sum over a token's experts is float32.

    Raises:
        UserError: no such dispatcher; ring without an ``expert`` axis, or with one that does not divide the experts.
    """
    if dispatch not in DISPATCHES:
        raise UserError(f"unknown dispatch '{dispatch}'{did_you_mean(dispatch, DISPATCHES)}")
    axis = mesh.shape.get("expert", 1) if mesh is not None else 1
    count = jax.tree.leaves(dict(experts))[0].shape[0]
    if dispatch == "auto":
        dispatch = "ring" if axis > 1 else "ragged"
    if dispatch == "ring" and axis == 1:
        raise UserError("dispatch 'ring' needs a mesh whose expert axis is larger than 1: set mesh.expert, or 'ragged'")
    if dispatch == "ring" and count % axis:
        raise UserError(f"{count} experts cannot be split over an expert axis of {axis}: choose a size that divides")
    if dispatch == "dense":
        return checkpoint_name(_dense(x, index, weight, experts, kind), "moe_out")
    plan = _plan(kind, dispatch == "ring", mesh, experts)
    short = -x.shape[0] % plan.shards
    if short:  # tokens of nobody: no row is computed for them
        x, weight = (jnp.pad(array, ((0, short), (0, 0))) for array in (x, weight))
        index = jnp.pad(index, ((0, short), (0, 0)), constant_values=count)
    out: Any = _routed(plan, x, index, weight, dict(experts))
    return checkpoint_name(out[: out.shape[0] - short], "moe_out")


def _dense(x: jax.Array, index: jax.Array, weight: jax.Array, experts: Mapping[str, Any], kind: str) -> jax.Array:
    count = jax.tree.leaves(dict(experts))[0].shape[0]
    share = (jax.nn.one_hot(index, count, dtype=jnp.float32) * weight[..., None]).sum(axis=1)

    def one(total: jax.Array, expert: tuple[Any, jax.Array]) -> tuple[jax.Array, None]:
        e, part = expert
        if kind == "gelu":
            hidden = jax.nn.gelu(x @ e["fc1"]["kernel"] + e["fc1"]["bias"][None])
            out = hidden @ e["fc2"]["kernel"] + e["fc2"]["bias"][None]
        else:
            out = (jax.nn.silu(x @ e["gate"]["kernel"]) * (x @ e["up"]["kernel"])) @ e["down"]["kernel"]
        return total + part[:, None] * out.astype(jnp.float32), None

    cast = jax.tree.map(lambda leaf: leaf.astype(x.dtype), dict(experts))
    return jax.lax.scan(one, jnp.zeros(x.shape, jnp.float32), (cast, share.T))[0].astype(x.dtype)


class _Plan(NamedTuple):
    """How one call is laid out over devices; static."""

    kind: str
    mesh: Any = None  # None: one device
    ring: bool = False  # experts split over the axis "expert"
    split: bool = False  # hidden width split over the axis "tensor"
    batch: tuple[str, ...] = ()  # axes that split the tokens

    @property
    def shards(self) -> int:
        """Into how many parts the tokens are split."""
        return prod(self.mesh.shape[name] for name in self.batch)

    @property
    def tokens(self) -> PartitionSpec:
        return PartitionSpec(self.batch)

    @property
    def hidden(self) -> PartitionSpec:
        return PartitionSpec(self.batch, "tensor" if self.split else None)

    @property
    def experts(self) -> dict[str, Any]:
        lead, tensor = "expert" if self.ring else None, "tensor" if self.split else None
        wide = {"kernel": PartitionSpec(lead, None, tensor), "bias": PartitionSpec(lead, tensor)}
        narrow = {"kernel": PartitionSpec(lead, tensor, None), "bias": PartitionSpec(lead, None)}
        first, last = LAYERS[self.kind]
        names = ("kernel", "bias") if self.kind == "gelu" else ("kernel",)
        layers = {**dict.fromkeys(first, wide), last: narrow}
        return {layer: {name: specs[name] for name in names} for layer, specs in layers.items()}

    def run(self, function: Callable[..., Any], takes: tuple[Any, ...], gives: tuple[Any, ...]) -> Callable[..., Any]:
        """``function(plan, *arrays)`` on every device's part of the arrays."""
        local = partial(function, self)
        if self.mesh is None:
            return local
        # every sum over devices is written out, forward and backward: there is nothing for check_vma to check
        return jax.shard_map(local, mesh=self.mesh, in_specs=takes, out_specs=gives, check_vma=False)


def _plan(kind: str, ring: bool, mesh: Any, experts: Mapping[str, Any]) -> _Plan:
    if mesh is None or mesh.size == 1:
        return _Plan(kind)
    hidden = experts[LAYERS[kind][1]]["kernel"].shape[1]
    tensor = mesh.shape.get("tensor", 1)
    batch = tuple(name for name in BATCH_AXES if name in mesh.shape)
    return _Plan(kind, mesh, ring, tensor > 1 and hidden % tensor == 0, batch)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _routed(plan: _Plan, x: jax.Array, index: jax.Array, weight: jax.Array, experts: Any) -> jax.Array:
    return _run_forward(plan, False, x, index, weight, experts)[0]


def _run_forward(plan: _Plan, keep: bool, x: jax.Array, index: jax.Array, weight: jax.Array, experts: Any) -> Any:
    cast = jax.tree.map(lambda leaf: leaf.astype(x.dtype), experts)  # before they are gathered over devices
    hidden = (plan.hidden,) * len(LAYERS[plan.kind][0]) if keep else ()
    takes = (plan.tokens, plan.tokens, plan.tokens, plan.experts)
    return plan.run(partial(_local_forward, keep), takes, (plan.tokens, hidden))(x, index, weight, cast)


def _routed_forward(plan: _Plan, x: jax.Array, index: jax.Array, weight: jax.Array, experts: Any) -> Any:
    out, hidden = _run_forward(plan, True, x, index, weight, experts)
    hidden = tuple(checkpoint_name(part, "moe_hidden") for part in hidden)
    return out, (x, index, weight, experts, hidden)


def _routed_backward(plan: _Plan, kept: Any, gradient: jax.Array) -> Any:
    x, index, weight, experts, hidden = kept
    cast = jax.tree.map(lambda leaf: leaf.astype(x.dtype), experts)
    takes = (plan.tokens, plan.tokens, plan.tokens, plan.experts, (plan.hidden,) * len(hidden), plan.tokens)
    run = plan.run(_local_backward, takes, (plan.tokens, plan.tokens, plan.experts))
    to_x, to_weight, grads = run(x, index, weight, cast, hidden, gradient)
    return to_x, None, to_weight, jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, experts)


_routed.defvjp(_routed_forward, _routed_backward)


# --- one device's part ---------------------------------------------------------------------------------------------


class _Sorted(NamedTuple):
    rows: Rows
    position: jax.Array  # (N, K) int32: the row of each (token, expert) pair; a row of nobody if the expert is not here
    block: int


def _sort(index: jax.Array, weight: jax.Array, first: Any, count: int) -> _Sorted:
    """Sort the (token, expert) pairs of experts ``first`` … ``first + count - 1``; all other pairs come last."""
    tokens, active = index.shape
    pairs = tokens * active
    here = index.reshape(-1) - first
    here = jnp.where((here >= 0) & (here < count), here, count)
    owned = (here[:, None] == jnp.arange(count + 1)[None]).astype(jnp.int32)
    rank = jnp.cumsum(owned, axis=0)
    sizes = rank[-1]
    position = ((rank - 1 + (jnp.cumsum(sizes) - sizes)[None]) * owned).sum(axis=1)
    order = jnp.sort(here * pairs + jnp.arange(pairs)) % pairs  # one key: several times faster than argsort
    most = tokens * min(active, count)  # a token's experts are all different, so no more of them can be here
    block = block_rows(most, count)
    spare = (0, -most % block + block)  # what the loop over blocks may touch past the last row, and whole tiles
    token = jnp.pad(order[:most] // active, spare)
    scale = jnp.pad(weight.reshape(-1)[order[:most]], spare)
    return _Sorted(Rows(token, scale, sizes[:count]), position.reshape(index.shape), block)


def _gather(plan: _Plan, *arrays: jax.Array) -> list[jax.Array]:
    """The arrays of all tokens that this device's experts may meet."""
    return [jax.lax.all_gather(array, "expert", axis=0, tiled=True) if plan.ring else array for array in arrays]


def _give_back(plan: _Plan, array: jax.Array, dtype: Any) -> jax.Array:
    """Sum (N, …) float32 over the devices that each did a part of it; each is left with its own tokens, in ``dtype``.

    What crosses the axis "expert" is in ``dtype`` already: half the bytes in bfloat16, and of two experts, which were
    rounded as they came from their matmul, the sum is the same.
    """
    if plan.split:
        array = jax.lax.psum(array, "tensor")
    array = array.astype(dtype)
    return jax.lax.psum_scatter(array, "expert", scatter_dimension=0, tiled=True) if plan.ring else array


def _local_experts(plan: _Plan, experts: Any) -> tuple[Any, Any, int]:
    """(this device's experts, the number of the first, how many)."""
    count = jax.tree.leaves(experts)[0].shape[0]
    last = LAYERS[plan.kind][1]
    if plan.split and "bias" in experts[last]:  # the outputs are summed over the axis: one device adds the bias
        bias = jnp.where(jax.lax.axis_index("tensor") == 0, experts[last]["bias"], 0)
        experts = {**experts, last: {**experts[last], "bias": bias}}
    return experts, jax.lax.axis_index("expert") * count if plan.ring else 0, count


def _sum_over_experts(rows: jax.Array, position: jax.Array, count: int) -> jax.Array:
    """Rows (R, D) to (N, D) float32: a gather for each of a token's experts, of which ``count`` are here at most. The
    rows of all others are nobody's, so 0, and come after those that are here."""
    if count < position.shape[1]:
        position = jnp.sort(position, axis=1)[:, :count]
    parts = [rows.at[position[:, k]].get(mode="clip") for k in range(position.shape[1])]
    return jnp.sum(jnp.stack(parts), axis=0, dtype=jnp.float32)


def _local_forward(keep: bool, plan: _Plan, x: jax.Array, index: jax.Array, weight: jax.Array, experts: Any) -> Any:
    x, index, weight = _gather(plan, x, index, weight)
    experts, first, count = _local_experts(plan, experts)
    rows, position, block = _sort(index, weight, first, count)
    out, hidden = mlp_forward(x, rows, experts, plan.kind, block, keep)
    return _give_back(plan, _sum_over_experts(out, position, count), x.dtype), hidden


def _local_backward(
    plan: _Plan, x: jax.Array, index: jax.Array, weight: jax.Array, experts: Any, hidden: Any, gradient: jax.Array
) -> Any:
    x, index, weight, gradient = _gather(plan, x, index, weight, gradient)
    experts, first, count = _local_experts(plan, experts)
    rows, position, block = _sort(index, weight, first, count)
    to_rows, to_scale, grads = mlp_backward(x, rows, experts, hidden, gradient, plan.kind, block)
    to_weight = to_scale.at[position].get(mode="fill", fill_value=0)
    to_x = _give_back(plan, _sum_over_experts(to_rows, position, count), x.dtype)
    if plan.mesh is not None:
        others = tuple(name for name in plan.batch if not (plan.ring and name == "expert"))
        grads = jax.lax.psum(grads, others)
    return to_x, _give_back(plan, to_weight, jnp.float32), grads
