"""One training step: loss, gradient, update, running average. A pure function; train.py compiles it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scaling_perception.parallel.mesh import BATCH_AXES, on_own
from scaling_perception.parallel.rules import gathered
from scaling_perception.training.objective import Batch, Metrics, Objective, Parts
from scaling_perception.training.spikes import detect_spike
from scaling_perception.training.state import TrainState, path_name
from scaling_perception.training.streams import step_key

Step = Callable[[TrainState, Batch, jax.Array, Any], tuple[TrainState, Metrics]]


def stop_frozen_gradients(params: Any, frozen: tuple[str, ...]) -> Any:
    """``params`` with a gradient of exactly zero for the leaves named in ``frozen`` (and for all below such a name)."""

    def visit(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(leaf) if is_frozen(path_name(path), frozen) else leaf

    return jax.tree_util.tree_map_with_path(visit, params) if frozen else params


def is_frozen(name: str, frozen: tuple[str, ...]) -> bool:
    """Whether the leaf ``name`` is listed in ``frozen`` or lies below a name that is."""
    return any(name == other or name.startswith(other + "/") for other in frozen)


def at_step(opt_state: Any, step: jax.Array) -> Any:
    """``opt_state`` with the counters of its schedules at ``step``, so that skipped steps are steps of the schedule."""

    def follow(leaf: Any) -> Any:
        return leaf._replace(count=step) if isinstance(leaf, optax.ScaleByScheduleState) else leaf

    return jax.tree.map(follow, opt_state, is_leaf=lambda leaf: isinstance(leaf, optax.ScaleByScheduleState))


def average(ema: Any, params: Any, decay: float) -> Any:
    """ema <- decay * ema + (1 - decay) * params, written so that a leaf that never moves stays exactly as it is."""
    return move(ema, params, 1.0 - decay)


def move(ema: Any, params: Any, rate: Any) -> Any:
    """ema <- ema + rate * (params - ema)."""
    return jax.tree.map(lambda old, new: old + rate * (new - old), ema, params)


def average_rate(decay: float, warmup: bool, step: Any) -> Any:
    """What the average takes of the weights of step t = ``step`` (0 the first): 1 - min(decay, (1 + t) / (10 + t)).

    Without ``warmup`` it is 1 - decay throughout. ``averaging.py`` says why.
    """
    return jnp.maximum(1.0 - decay, 9.0 / (10.0 + jnp.asarray(step, jnp.float32))) if warmup else 1.0 - decay


def make_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    ema_decay: float | None,
    accumulate: int = 1,
    skip: bool = False,
    shardings: TrainState | None = None,
    spike_factor: float = 0.0,
    skip_spikes: bool = False,
    ema_warmup: bool = False,
    gather: Any = None,
) -> Step:
    """The step of ``objective`` under the optimiser ``tx``.

    Args:
        ema_decay: of the running average; None leaves it to somebody else (``averaging.py``).
        ema_warmup: its decay grows to ``ema_decay`` (``average_rate``).
        accumulate: parts that a batch is computed in, one after the other; loss, metrics and update are those of the
            whole batch, to rounding. A balance loss takes one more forward pass then, for the shares of all parts.
            On a mesh each device sums the gradients of its samples; they are reduced once (not all: ``sums_own``).
        skip: a step whose loss or gradient is not finite changes nothing but the step's number, which the learning
            rate follows (the moments' own counters do not, for they count updates); ``skipped`` tells.
        shardings: where the state lives. Gradients are kept so, too, which makes the reduction over the batch a
            reduce-scatter for leaves that are split.
        spike_factor: above 0, ``spike`` says whether this step is a loss spike (``spikes.detect_spike``), by
            ``state.guard``.
        skip_spikes: a step that is one changes nothing but the step's number and the guard; ``skipped`` tells.
        gather: dtype of the activations where weights are gathered once a step (``rules.gathered``); None: by each
            layer. Needs ``shardings``.

    Returns:
        step(state, batch, key, constants) -> (state, metrics). ``batch``: arrays (B, ...). ``key``: the run's key; the
        step folds its own number in, so that it draws the same noise whether or not the run was interrupted.
        ``metrics``: the objective's own, and ``loss`` and ``grad_norm`` (L2 norm over all trained leaves, before
        clipping), float32 scalars.
    """

    def step(state: TrainState, batch: Batch, key: jax.Array, constants: Any = None) -> tuple[TrainState, Metrics]:
        own_key = step_key(key, state.step)

        def given(function: Any) -> Any:
            def of(params: Any, part: Batch, index: jax.Array) -> Any:
                fields = {**part, "index": index}
                fields = fields if constants is None else {**fields, "constants": constants}
                return function(stop_frozen_gradients(params, objective.frozen), fields, own_key)

            return of

        size, weights = jax.tree.leaves(batch)[0].shape[0], state.params
        if gather is not None and shardings is not None:
            weights = gathered(weights, shardings.params, gather, accumulate > 1)
        if accumulate == 1:
            differentiate = jax.value_and_grad(given(objective.loss), has_aux=True)
            (loss, metrics), gradient = differentiate(weights, batch, jnp.arange(size))
        elif objective.parts is None:
            loss, metrics, gradient = _weighted(given(objective.loss), weights, batch, accumulate)
        else:
            own = objective.parts._replace(tally=given(objective.parts.tally))
            loss, metrics, gradient = _in_parts(own, weights, batch, accumulate, _summing_mesh(objective, shardings))
        if shardings is not None:
            gradient = jax.lax.with_sharding_constraint(gradient, shardings.params)
        gradient = jax.tree.map(lambda leaf, weight: leaf.astype(weight.dtype), gradient, state.params)
        metrics = {name: value for name, value in metrics.items() if name != "weight"}
        updates, opt_state = tx.update(gradient, at_step(state.opt_state, state.step), state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None:
            ema = move(ema, params, average_rate(ema_decay, ema_warmup, state.step))
        norm = optax.tree.norm(gradient)
        new = state._replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
        told = {**metrics, "loss": loss, "grad_norm": norm}
        sound = jnp.isfinite(loss) & jnp.isfinite(norm) if skip else jnp.ones((), jnp.bool_)
        if spike_factor:
            spike, guard = detect_spike(state.guard, loss, norm, spike_factor)
            new, told["spike"] = new._replace(guard=guard), spike
            sound = sound & ~spike if skip_spikes else sound
        if skip or skip_spikes:
            kept = state._replace(step=new.step, guard=new.guard)
            new = jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, kept)
            told["skipped"] = ~sound
        return new, {name: jnp.asarray(value, jnp.float32) for name, value in told.items()}

    return step


def gather_dtype(train: Any) -> Any:
    """``gather`` of ``make_step`` by a config's ``train``."""
    return jnp.dtype(train.dtype) if train.gather == "step" else None


def sums_own(model: Any) -> bool:
    """Whether each device sums the gradients of its own samples over the parts of a batch, reduced after the last.

    Not with experts, whose rows travel between devices inside a part: ``on_own`` takes the batch axes, and JAX has no
    ``shard_map`` over them within it. Not without a DiT: gradients of single devices for the kernels of convolutions
    would be grouped convolutions. There every part reduces its gradients. The sum and a part's gradients take, on every
    device, the memory of all that ``tensor`` does not split.
    """
    return model is not None and not model.experts


def _summing_mesh(objective: Objective, shardings: TrainState | None) -> Mesh | None:
    """The mesh whose devices sum their own gradients (``sums_own``); None: every part reduces them."""
    if shardings is None or not sums_own(objective.model):
        return None
    mesh = jax.tree.leaves(shardings.params)[0].mesh
    return mesh if _shares(mesh) > 1 else None


def _shares(mesh: Mesh | None) -> int:
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in BATCH_AXES)


def _sum_over(
    function: Callable[[Any, Batch, jax.Array], Any], params: Any, batch: Batch, count: int, mesh: Mesh | None = None
) -> Any:
    """The sum of ``function(params, part, index)`` over ``count`` parts of the batch, one after the other.

    Part m holds the samples m, m + count, …: neighbours stay on their device. With a mesh each device of the batch axes
    computes and sums the function of its own samples, and the sums are added once, after the last part.
    """
    size, shares = jax.tree.leaves(batch)[0].shape[0], _shares(mesh)
    own = function if mesh is None else on_own(function, (None, 0, 0))

    def split(array: jax.Array) -> jax.Array:
        lead = (-1,) if mesh is None else (shares, size // shares // count)
        return placed(jnp.moveaxis(array.reshape(*lead, count, *array.shape[1:]), len(lead), 0), None)

    def placed(array: jax.Array, *before: None) -> jax.Array:  # an array (*before, devices, ...)
        if mesh is None:
            return array
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*before, BATCH_AXES)))

    parts, index = jax.tree.map(split, (dict(batch), jnp.arange(size)))
    shapes = jax.eval_shape(own, params, *jax.tree.map(lambda array: array[0], (parts, index)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _sum_dtype(leaf.dtype)), shapes)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda a, b: placed(a + b), total, own(params, *part)), None

    total, _ = jax.lax.scan(add, jax.tree.map(placed, zeros), (parts, index))
    return total if mesh is None else jax.tree.map(lambda leaf: leaf.sum(axis=0), total)


def _sum_dtype(dtype: Any) -> Any:
    """Gradients of weights that were rounded ahead (``rules.gathered``) are rounded themselves; their sum is not."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _in_parts(parts: Parts, params: Any, batch: Batch, count: int, mesh: Mesh | None) -> tuple[jax.Array, Metrics, Any]:
    """Loss, metrics and gradient of a batch computed in ``count`` parts whose denominators are the whole batch's.

    What the score divides by is tallied first. Of a dense network these are counts of cells, and the compiler leaves
    its forward pass out. With a mesh (``_summing_mesh``) every device's share of a part is a part to the score.
    """
    pieces = count * _shares(mesh)

    def known_of(params: Any, part: Batch, index: jax.Array) -> Any:
        found = parts.tally(params, part, index)
        return {name: jax.lax.stop_gradient(found[name]) for name in parts.known if name in found}

    def mean(total: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf / pieces, total)

    known = mean(_sum_over(known_of, params, batch, count, mesh)) if parts.known else {}

    def loss_of(params: Any, part: Batch, index: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        found = parts.tally(params, part, index)
        return parts.score({**found, **known}, pieces)[0], found

    def terms(params: Any, part: Batch, index: jax.Array) -> Any:
        (_, found), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, part, index)
        return found, gradient

    found, gradient = mean(_sum_over(terms, params, batch, count, mesh))
    loss, metrics = parts.score({**found, **known}, pieces)
    return loss, metrics, gradient


def _weighted(loss_of: Any, params: Any, batch: Batch, count: int) -> tuple[jax.Array, Metrics, Any]:
    """Loss, metrics and gradient of a batch computed in ``count`` parts, each weighted by its metric ``weight``."""

    def terms(params: Any, part: Batch, index: jax.Array) -> Any:
        (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, part, index)
        weight = jnp.asarray(metrics.get("weight", 1.0), jnp.float32)
        known = {name: jnp.isfinite(value) for name, value in metrics.items()}  # NaN: undefined for this part
        sums = {name: jnp.where(known[name], value, 0.0) * weight for name, value in metrics.items()}
        counts = {name: known[name] * weight for name in metrics}
        # a part of weight 0 may have divided by it
        counted = [jax.tree.map(lambda x: jnp.where(weight > 0, x * weight, 0.0), tree) for tree in (loss, gradient)]
        return weight, counted[0], sums, counts, counted[1]

    weight, loss, sums, counts, gradient = _sum_over(terms, params, batch, count)
    whole = jnp.where(weight > 0, weight, 1.0)
    metrics = {name: sums[name] / counts[name] for name in sums}
    return loss / whole, metrics, jax.tree.map(lambda leaf: leaf / whole, gradient)
