"""One training step: loss, gradient, update, running average. A pure function; train.py compiles it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from scaling_perception.training.objective import Batch, Metrics, Objective
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


def make_step(objective: Objective, tx: optax.GradientTransformation, ema_decay: float) -> Step:
    """The step of ``objective`` under the optimiser ``tx``.

    Returns:
        step(state, batch, key, constants) -> (state, metrics). ``batch``: arrays (B, ...). ``key``: the run's key; the
        step folds its own number in, so that it draws the same noise whether or not the run was interrupted.
        ``metrics``: the objective's own, and ``loss`` and ``grad_norm`` (L2 norm over all trained leaves, before
        clipping), float32 scalars.
    """

    def step(state: TrainState, batch: Batch, key: jax.Array, constants: Any = None) -> tuple[TrainState, Metrics]:
        own_key = jax.random.fold_in(key, state.step)
        fields = batch if constants is None else {**batch, "constants": constants}

        def loss_of(params: Any) -> tuple[jax.Array, Metrics]:
            return objective.loss(hold(params, objective.frozen), fields, own_key)

        (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = average(state.ema, params, ema_decay)
        told = {**metrics, "loss": loss, "grad_norm": optax.tree.norm(gradient)}
        told = {name: jnp.asarray(value, jnp.float32) for name, value in told.items()}
        return TrainState(state.step + 1, params, opt_state, ema), told

    return step
