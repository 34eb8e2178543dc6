"""One training step: loss, gradient, update, running average. A pure function; train.py compiles it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from scaling_perception.training.objective import Batch, Metrics, Objective
from scaling_perception.training.spikes import look
from scaling_perception.training.state import TrainState, path_name

Step = Callable[[TrainState, Batch, jax.Array, Any], tuple[TrainState, Metrics]]


def hold(params: Any, frozen: tuple[str, ...]) -> Any:
    """``params`` with a gradient of exactly zero for the leaves named in ``frozen`` (and for all below such a name)."""

    def visit(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(leaf) if is_frozen(path_name(path), frozen) else leaf

    return jax.tree_util.tree_map_with_path(visit, params) if frozen else params


def is_frozen(name: str, frozen: tuple[str, ...]) -> bool:
    """Whether the leaf ``name`` is listed in ``frozen`` or lies below a name that is."""
    return any(name == other or name.startswith(other + "/") for other in frozen)


def average(ema: Any, params: Any, decay: float) -> Any:
    """ema <- decay * ema + (1 - decay) * params, written so that a leaf that never moves stays exactly as it is."""
    return jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), ema, params)


def make_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    ema_decay: float | None,
    accumulate: int = 1,
    skip: bool = False,
    shardings: TrainState | None = None,
    spike_factor: float = 0.0,
    skip_spikes: bool = False,
) -> Step:
    """The step of ``objective`` under the optimiser ``tx``.

    Args:
        ema_decay: of the running average; None leaves it to somebody else (``averaging.py``).
        accumulate: parts that a batch is computed in, one after the other; the update is that of the whole batch, to
            rounding, except for a balance loss, whose shares are then those of each part.
        skip: a step whose loss or gradient is not finite changes nothing but the step's number; ``skipped`` tells.
        shardings: where the state lives. Gradients are kept so, too, which makes the reduction over the batch a
            reduce-scatter for leaves that are split.
        spike_factor: above 0, ``spike`` tells whether this step is a loss spike (``spikes.look``), by ``state.guard``.
        skip_spikes: a step that is one changes nothing but the step's number and the guard; ``skipped`` tells.

    Returns:
        step(state, batch, key, constants) -> (state, metrics). ``batch``: arrays (B, ...). ``key``: the run's key; the
        step folds its own number in, so that it draws the same noise whether or not the run was interrupted.
        ``metrics``: the objective's own, and ``loss`` and ``grad_norm`` (L2 norm over all trained leaves, before
        clipping), float32 scalars.
    """

    def step(state: TrainState, batch: Batch, key: jax.Array, constants: Any = None) -> tuple[TrainState, Metrics]:
        own_key = jax.random.fold_in(key, state.step)

        def loss_of(params: Any, part: Batch, index: jax.Array) -> tuple[jax.Array, Metrics]:
            fields = {**part, "index": index}
            fields = fields if constants is None else {**fields, "constants": constants}
            return objective.loss(hold(params, objective.frozen), fields, own_key)

        differentiate = jax.value_and_grad(loss_of, has_aux=True)
        size = jax.tree.leaves(batch)[0].shape[0]
        if accumulate == 1:
            (loss, metrics), gradient = differentiate(state.params, batch, jnp.arange(size))
        else:
            loss, metrics, gradient = _in_parts(differentiate, state.params, batch, accumulate)
        if shardings is not None:
            gradient = jax.lax.with_sharding_constraint(gradient, shardings.params)
        metrics = {name: value for name, value in metrics.items() if name != "weight"}
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema if ema_decay is None else average(state.ema, params, ema_decay)
        norm = optax.tree.norm(gradient)
        new = state._replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
        told = {**metrics, "loss": loss, "grad_norm": norm}
        sound = jnp.isfinite(loss) & jnp.isfinite(norm) if skip else jnp.ones((), jnp.bool_)
        if spike_factor:
            spike, guard = look(state.guard, loss, norm, spike_factor)
            new, told["spike"] = new._replace(guard=guard), spike
            sound = sound & ~spike if skip_spikes else sound
        if skip or skip_spikes:
            kept = state._replace(step=new.step, guard=new.guard)
            new = jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, kept)
            told["skipped"] = ~sound
        return new, {name: jnp.asarray(value, jnp.float32) for name, value in told.items()}

    return step


def _in_parts(differentiate: Any, params: Any, batch: Batch, count: int) -> tuple[jax.Array, Metrics, Any]:
    """Loss, metrics and gradient of a batch computed in ``count`` parts, each weighted by its metric ``weight``.

    Part m holds the samples m, m + count, …: neighbours stay on their device.
    """

    def terms(part: tuple[Batch, jax.Array]) -> Any:
        (loss, metrics), gradient = differentiate(params, *part)
        weight = jnp.asarray(metrics.get("weight", 1.0), jnp.float32)
        known = {name: jnp.isfinite(value) for name, value in metrics.items()}  # NaN: undefined for this part
        sums = {name: jnp.where(known[name], value, 0.0) * weight for name, value in metrics.items()}
        counts = {name: known[name] * weight for name in metrics}
        return weight, loss * weight, sums, counts, jax.tree.map(lambda leaf: leaf * weight, gradient)

    size = jax.tree.leaves(batch)[0].shape[0]
    parts = jax.tree.map(lambda array: jnp.moveaxis(array.reshape(-1, count, *array.shape[1:]), 1, 0), dict(batch))
    index = jnp.arange(size).reshape(-1, count).T
    shapes = jax.eval_shape(terms, jax.tree.map(lambda array: array[0], (parts, index)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    totals, _ = jax.lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, terms(part)), None), zeros, (parts, index)
    )
    weight, loss, sums, counts, gradient = totals
    metrics = {name: sums[name] / counts[name] for name in sums}
    return loss / weight, metrics, jax.tree.map(lambda leaf: leaf / weight, gradient)
