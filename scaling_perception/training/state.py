"""Everything a run must remember from one step to the next, as one tree of arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
    """The state of a run. All of it is saved; nothing else is needed to go on bit for bit.

    Attributes:
        step: int32 scalar, the number of finished steps; also the index of the next batch.
        params: the trained weights.
        opt_state: the optimiser's moments and counters.
        ema: running average of ``params`` (same tree), which is what gets evaluated and exported.
        guard: what the policy for loss spikes remembers (``spikes.py``); () without one.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    guard: Any = ()


def new_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step: zero moments, and the average starts at the weights themselves."""
    # a copy, for the state is donated to the first step and one buffer cannot be given away twice
    ema = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ema)


def abstract_state(init: Callable[[jax.Array], Any], tx: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of the state, without making an array."""
    return jax.eval_shape(lambda key: new_state(init(key), tx), jax.random.key(0))


def path_name(path: tuple[Any, ...]) -> str:
    """The path of a leaf as names joined by '/', such as ``params/blocks/mlp/kernel``."""
    return "/".join(str(getattr(part, "name", getattr(part, "key", getattr(part, "idx", part)))) for part in path)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaf name -> leaf, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
