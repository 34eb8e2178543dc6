"""Where experts are computed: one signature, several dispatchers, the same parameters, values and gradients.

``dense`` computes every expert on every token: the oracle. ``ragged`` sorts the (token, expert) pairs by expert and
computes each once; with a mesh, each device does so for its own tokens, with all experts. The others leave the experts
where they are, split over the mesh axis ``expert``. ``exchange`` sends each pair's row to the device that has its
expert, and the result back (``models/exchange.py``). ``ring`` gathers the tokens of that axis on each device, which
computes the pairs whose expert it has; the results are summed back to the tokens' owners. No token is ever dropped.
"""

from collections.abc import Callable, Mapping
from functools import partial, reduce
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from scaling_perception.models import exchange
from scaling_perception.ops.grouped_matmul import block_rows
from scaling_perception.ops.grouped_mlp import LAYERS, Rows, mlp_backward, mlp_forward
from scaling_perception.parallel.mesh import BATCH_AXES
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.shapes import AnyArray, Array, Float, Int

DISPATCHES = ("auto", "dense", "ragged", "ring", "exchange")
OVER_AXIS = ("ring", "exchange")  # those that split experts over the mesh axis "expert"


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
        dispatch: one of ``DISPATCHES``; ``auto`` is, where the mesh splits experts, exchange, or on CPUs ring.
        mesh: the mesh that the arrays live on (``parallel.mesh``), None = one device.

    Returns:
        (N, D) in the dtype of x; the sum over a token's experts is float32.

    Raises:
        UserError: no such dispatcher; ring or exchange without an ``expert`` axis, or with one that does not divide
            the experts.
    """
    if dispatch not in DISPATCHES:
        raise UserError(f"unknown dispatch '{dispatch}'{did_you_mean(dispatch, DISPATCHES)}")
    axis = mesh.shape.get("expert", 1) if mesh is not None else 1
    count = jax.tree.leaves(dict(experts))[0].shape[0]
    if dispatch == "auto" and axis > 1:
        dispatch = "ring" if _on_cpus(mesh) else "exchange"
    if dispatch in OVER_AXIS and axis == 1:
        raise UserError(
            f"dispatch '{dispatch}' needs a mesh whose expert axis is larger than 1: set mesh.expert, or 'ragged'"
        )
    if dispatch in OVER_AXIS and count % axis:
        raise UserError(f"{count} experts cannot be split over an expert axis of {axis}: choose a size that divides")
    if dispatch == "dense":
        return checkpoint_name(_dense(x, index, weight, experts, kind), "moe_out")
    plan = _plan(kind, dispatch, mesh, experts)
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
    dispatch: str
    mesh: Any = None  # None: one device
    split: bool = False  # hidden width split over the axis "tensor"
    batch: tuple[str, ...] = ()  # axes that split the tokens
    scatter: bool = False  # of the gradients of kernels each device along fsdp keeps a part
    dtype: Any = jnp.float32  # of the gradients of kernels, as they are summed over devices

    @property
    def over_axis(self) -> bool:
        """Whether experts are split over the axis ``expert``."""
        return self.dispatch in OVER_AXIS

    @property
    def native(self) -> bool:
        """Whether rows are sent by XLA's operation, which CPUs lack."""
        return not _on_cpus(self.mesh)

    @property
    def packs(self) -> bool:
        """Whether rows travel as ``exchange.pack`` makes them."""
        return self.mesh.devices.flat[0].platform == "tpu"

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
    def kept(self) -> Any:
        """Of what the forward pass keeps for the backward pass."""
        hidden = (self.hidden,) * len(LAYERS[self.kind][0])
        return _Kept(hidden, *(self.tokens,) * 3) if self.dispatch == "exchange" else hidden

    @property
    def experts(self) -> dict[str, Any]:
        return self._experts(None)

    @property
    def gradients(self) -> dict[str, Any]:
        return self._experts("fsdp" if self.scatter else None)

    def _experts(self, fsdp: str | None) -> dict[str, Any]:
        lead, tensor = "expert" if self.over_axis else None, "tensor" if self.split else None
        wide = {"kernel": PartitionSpec(lead, fsdp, tensor), "bias": PartitionSpec(lead, tensor)}
        narrow = {"kernel": PartitionSpec(lead, tensor, fsdp), "bias": PartitionSpec(lead, None)}
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


def _on_cpus(mesh: Any) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _plan(kind: str, dispatch: str, mesh: Any, experts: Mapping[str, Any]) -> _Plan:
    if mesh is None or mesh.size == 1:
        return _Plan(kind, "ragged")
    _, hidden, width = experts[LAYERS[kind][1]]["kernel"].shape
    tensor, fsdp = (mesh.shape.get(name, 1) for name in ("tensor", "fsdp"))
    batch = tuple(name for name in BATCH_AXES if name in mesh.shape)
    split, scatter = (size > 1 and of % size == 0 for size, of in ((tensor, hidden), (fsdp, width)))
    dtype = experts[LAYERS[kind][1]]["kernel"].dtype
    return _Plan(kind, dispatch, mesh, split, batch, scatter, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _routed(plan: _Plan, x: jax.Array, index: jax.Array, weight: jax.Array, experts: Any) -> jax.Array:
    return _run_forward(plan, False, x, index, weight, experts)[0]


def _run_forward(plan: _Plan, keep: bool, x: jax.Array, index: jax.Array, weight: jax.Array, experts: Any) -> Any:
    cast = jax.tree.map(lambda leaf: leaf.astype(x.dtype), experts)  # before they are gathered over devices
    takes = (plan.tokens, plan.tokens, plan.tokens, plan.experts)
    local = _exchange_forward if plan.dispatch == "exchange" else _local_forward
    return plan.run(partial(local, keep), takes, (plan.tokens, plan.kept if keep else ()))(x, index, weight, cast)


def _routed_forward(plan: _Plan, x: jax.Array, index: jax.Array, weight: jax.Array, experts: Any) -> Any:
    out, kept = _run_forward(plan, True, x, index, weight, experts)
    kept = jax.tree.map(lambda part: checkpoint_name(part, "moe_hidden"), kept)
    return out, (x, index, weight, experts, kept)


def _routed_backward(plan: _Plan, residuals: Any, gradient: jax.Array) -> Any:
    x, index, weight, experts, kept = residuals
    cast = jax.tree.map(lambda leaf: leaf.astype(x.dtype), experts)
    takes = (plan.tokens, plan.tokens, plan.tokens, plan.experts, plan.kept, plan.tokens)
    local = _exchange_backward if plan.dispatch == "exchange" else _local_backward
    run = plan.run(local, takes, (plan.tokens, plan.tokens, plan.gradients))
    to_x, to_weight, grads = run(x, index, weight, cast, kept, gradient)
    return to_x, None, to_weight, jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, experts)


_routed.defvjp(_routed_forward, _routed_backward)


# --- one device's part ---------------------------------------------------------------------------------------------


class _Sorted(NamedTuple):
    order: jax.Array  # (N K,) int32: the (token, expert) pairs, sorted by expert
    sizes: jax.Array  # (count,) int32: pairs of each expert
    position: jax.Array  # (N, K) int32: where each pair is in that order


def _sort(index: jax.Array, first: Any, count: int) -> _Sorted:
    """Sort the (token, expert) pairs of experts ``first`` … ``first + count - 1``; all other pairs come last."""
    pairs = index.size
    here = index.reshape(-1) - first
    here = jnp.where((here >= 0) & (here < count), here, count)
    owned = (here[:, None] == jnp.arange(count + 1)[None]).astype(jnp.int32)
    rank = jnp.cumsum(owned, axis=0)
    sizes = rank[-1]
    position = ((rank - 1 + (jnp.cumsum(sizes) - sizes)[None]) * owned).sum(axis=1)
    order = jnp.sort(here * pairs + jnp.arange(pairs)) % pairs  # one key: several times faster than argsort
    return _Sorted(order, sizes[:count], position.reshape(index.shape))


def _own_rows(index: jax.Array, weight: jax.Array, first: Any, count: int) -> tuple[Rows, jax.Array, int]:
    """(rows of the experts that are here, the row of each pair (N, K), rows of a block); of a pair whose expert is not
    here it is a row of nobody."""
    order, sizes, position = _sort(index, first, count)
    tokens, active = index.shape
    most = tokens * min(active, count)  # a token's experts are all different, so no more of them can be here
    block = block_rows(most, count)
    spare = (0, -most % block + block)  # what the loop over blocks may touch past the last row, and whole tiles
    token = jnp.pad(order[:most] // active, spare)
    scale = jnp.pad(weight.reshape(-1)[order[:most]], spare)
    return Rows(token, scale, sizes), position, block


def _gather(plan: _Plan, *arrays: jax.Array) -> list[jax.Array]:
    """The arrays of all tokens that this device's experts may meet."""
    return [jax.lax.all_gather(array, "expert", axis=0, tiled=True) if plan.over_axis else array for array in arrays]


def _give_back(plan: _Plan, array: jax.Array, dtype: Any) -> jax.Array:
    """Sum (N, …) float32 over the devices that each did a part of it; each is left with its own tokens, in ``dtype``.

    What crosses the axis "expert" is in ``dtype`` already: half the bytes in bfloat16, and of two experts, which were
    rounded as they came from their matmul, the sum is the same.
    """
    if plan.split:
        array = jax.lax.psum(array, "tensor")
    array = array.astype(dtype)
    return jax.lax.psum_scatter(array, "expert", scatter_dimension=0, tiled=True) if plan.over_axis else array


def _local_experts(plan: _Plan, experts: Any) -> tuple[Any, Any, int]:
    """(this device's experts, the number of the first, how many)."""
    count = jax.tree.leaves(experts)[0].shape[0]
    last = LAYERS[plan.kind][1]
    if plan.split and "bias" in experts[last]:  # the outputs are summed over the axis: one device adds the bias
        bias = jnp.where(jax.lax.axis_index("tensor") == 0, experts[last]["bias"], 0)
        experts = {**experts, last: {**experts[last], "bias": bias}}
    return experts, jax.lax.axis_index("expert") * count if plan.over_axis else 0, count


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
    rows, position, block = _own_rows(index, weight, first, count)
    out, hidden = mlp_forward(x, rows, experts, plan.kind, block, keep)
    return _give_back(plan, _sum_over_experts(out, position, count), x.dtype), hidden


def _local_backward(
    plan: _Plan, x: jax.Array, index: jax.Array, weight: jax.Array, experts: Any, hidden: Any, gradient: jax.Array
) -> Any:
    x, index, weight, gradient = _gather(plan, x, index, weight, gradient)
    experts, first, count = _local_experts(plan, experts)
    rows, position, block = _own_rows(index, weight, first, count)
    to_rows, to_scale, grads = mlp_backward(x, rows, experts, hidden, gradient, plan.kind, block, plan.dtype)
    to_weight = jnp.asarray(to_scale).at[position].get(mode="fill", fill_value=0)
    to_x = _give_back(plan, _sum_over_experts(to_rows, position, count), x.dtype)
    return to_x, _give_back(plan, to_weight, jnp.float32), _sum_gradients(plan, grads)


def _sum_gradients(plan: _Plan, grads: Any) -> Any:
    """The experts' gradients, summed over the devices that have the same experts; of a kernel's each keeps the part
    that it has of the weights."""
    if plan.mesh is None:
        return grads
    axes = tuple(name for name in plan.batch if not (plan.over_axis and name == "expert"))

    def total(layer: str, name: str, grad: jax.Array) -> jax.Array:
        if name != "kernel" or not plan.scatter:
            return jax.lax.psum(grad, axes)
        at = 2 if layer == LAYERS[plan.kind][1] else 1
        part = jax.lax.psum_scatter(grad, "fsdp", scatter_dimension=at, tiled=True)
        return jax.lax.psum(part, tuple(axis for axis in axes if axis != "fsdp"))

    return {layer: {name: total(layer, name, grad) for name, grad in own.items()} for layer, own in grads.items()}


# --- one device's part of an exchange ------------------------------------------------------------------------------


class _Kept(NamedTuple):  # or the PartitionSpec of each
    hidden: tuple[Any, ...]  # rows (R, F) of the first window before the activation
    arrived: Any  # (R, D): its rows
    results: Any  # (N K, …): what came back of all windows, for this device's pairs in their order, packed
    counts: Any  # (all devices, E) int32: rows that each sends to each expert


class _Layout(NamedTuple):
    """How the rows of one layer are exchanged."""

    plan: _Plan
    counts: jax.Array  # (G, E): rows of each of the group's devices for each expert
    windows: jax.Array  # how many the busiest device of the mesh needs: all take part in each
    length: int  # rows of a window
    most: int  # rows that a device can receive at most
    block: int  # rows computed together on a CPU
    width: int  # D

    def window(self, first: Any) -> exchange.Window:
        return exchange.window(self.counts, jax.lax.axis_index("expert"), first, self.length)

    def pack(self, rows: jax.Array) -> jax.Array:
        """Rows (R, D) as they travel, (R, …)."""
        return exchange.pack(rows) if self.plan.packs else rows

    def unpack(self, rows: jax.Array) -> jax.Array:
        """Rows (R, …) that have travelled, (R, D)."""
        return exchange.unpack(rows, self.width) if self.plan.packs else rows

    def own(self, rows: jax.Array, position: jax.Array) -> list[jax.Array]:
        """Of each of a token's experts the rows (N, D), of this device's (N K, …) at ``position`` (N, K)."""
        return [self.unpack(rows[position[:, k]]) for k in range(position.shape[1])]

    def send(self, rows: jax.Array, slices: exchange.Slices) -> jax.Array:
        """(R, D): the rows (packed) of a window that come to this device's experts; the rest is 0."""
        spare = 0 if self.plan.native else self.block  # what the loop over blocks may touch past the last row
        into = jnp.zeros((self.length + spare, *rows.shape[1:]), rows.dtype)
        return self.unpack(exchange.send(rows, into, slices, self.plan.native))

    def send_back(self, rows: jax.Array, into: jax.Array, slices: exchange.Slices) -> jax.Array:
        """``into``, this device's rows (packed), with those of a window (R, D) from the devices that have their
        experts."""
        if self.plan.split:
            rows = jax.lax.psum(rows.astype(jnp.float32), "tensor").astype(rows.dtype)
        rows = self.pack(rows)
        with jax.named_scope(exchange.BACK):
            return exchange.send(rows, into, slices, self.plan.native)

    def past_first(self, visit: Callable[[Any, Any], Any], carry: Any) -> Any:
        """``visit(first row, carry)`` for each window but the first."""
        if self.length >= self.most:
            return carry

        def step(state: Any) -> Any:
            at, carry = state
            return at + 1, visit(at * self.length, carry)

        with jax.named_scope(exchange.OVERFLOW):
            return jax.lax.while_loop(lambda state: state[0] < self.windows, step, (jnp.int32(1), carry))[1]


def _layout(plan: _Plan, index: jax.Array, counts: jax.Array, width: int) -> _Layout:
    """counts: (all devices, E) int32, rows that each sends to each expert."""
    devices, (tokens, active) = plan.mesh.shape["expert"], index.shape
    count = counts.shape[1] // devices
    share, most = tokens * active, devices * tokens * min(active, count)
    block = block_rows(share, count)
    length = -(-min(int(share * exchange.ROOM), most) // block) * block
    groups = counts.reshape(-1, devices, counts.shape[1])
    windows = (jax.vmap(exchange.busiest)(groups).max() + length - 1) // length
    own = groups[jax.lax.axis_index(tuple(name for name in plan.batch if name != "expert"))]
    return _Layout(plan, own, windows, length, most, block, width)


def _exchange_forward(keep: bool, plan: _Plan, x: jax.Array, index: jax.Array, weight: jax.Array, experts: Any) -> Any:
    experts, _, count = _local_experts(plan, experts)
    order, sizes, position = _sort(index, 0, count * plan.mesh.shape["expert"])
    counts = jax.lax.all_gather(sizes, plan.batch)
    layout = _layout(plan, index, counts, x.shape[1])
    rows = layout.pack(x)[order // index.shape[1]]

    def visit(first: Any, results: jax.Array, keep: bool) -> Any:
        at = layout.window(first)
        arrived = layout.send(rows, at.out)
        out, hidden = mlp_forward(arrived, Rows(None, None, at.sizes), experts, plan.kind, layout.block, keep)
        return layout.send_back(out, results, at.back), arrived, hidden

    # results take the places of the rows that were sent for them: all come back, so nothing of those is left
    results, arrived, hidden = visit(0, rows, keep)
    results = layout.past_first(lambda first, results: visit(first, results, False)[0], results)
    parts = [weight[:, k, None] * row.astype(jnp.float32) for k, row in enumerate(layout.own(results, position))]
    out = reduce(jnp.add, parts).astype(x.dtype)
    return out, _Kept(hidden, arrived, results, counts[None]) if keep else ()


def _exchange_backward(
    plan: _Plan, x: jax.Array, index: jax.Array, weight: jax.Array, experts: Any, kept: Any, gradient: jax.Array
) -> Any:
    experts, _, count = _local_experts(plan, experts)
    order, _, position = _sort(index, 0, count * plan.mesh.shape["expert"])
    layout, token = _layout(plan, index, kept.counts[0], x.shape[1]), order // index.shape[1]
    wide = gradient.astype(jnp.float32)
    pulls = layout.pack((gradient[token].astype(jnp.float32) * weight.reshape(-1)[order][:, None]).astype(x.dtype))

    def visit(at: exchange.Window, to_rows: jax.Array, arrived: jax.Array, hidden: Any) -> Any:
        own, pull = Rows(None, None, at.sizes), layout.send(pulls, at.out)
        to_own, _, grads = mlp_backward(arrived, own, experts, hidden, pull, plan.kind, layout.block, plan.dtype)
        return layout.send_back(to_own, to_rows, at.back), grads

    def visit_again(first: Any, carry: Any) -> Any:
        at = layout.window(first)
        arrived = layout.send(layout.pack(x)[token], at.out)
        own = Rows(None, None, at.sizes)
        _, hidden = mlp_forward(arrived, own, experts, plan.kind, layout.block, keep=True)
        to_rows, grads = visit(at, carry[0], arrived, hidden)
        return to_rows, jax.tree.map(jnp.add, carry[1], grads)

    to_rows, grads = layout.past_first(visit_again, visit(layout.window(0), pulls, kept.arrived, kept.hidden))
    to_x = jnp.sum(jnp.stack(layout.own(to_rows, position)), axis=0, dtype=jnp.float32).astype(x.dtype)
    parts = [jnp.sum(wide * row, axis=1) for row in layout.own(kept.results, position)]
    return to_x, jnp.stack(parts, axis=1), _sum_gradients(plan, grads)
