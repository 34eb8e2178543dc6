"""Optimisers and learning-rate schedules (facts 8: the paper's values, and Marigold's where the paper is silent)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from scaling_perception.support.configs import Config
from scaling_perception.training.state import path_name
from scaling_perception.training.step import is_frozen

# Layers that read pixels or write them stay with AdamW under Muon, as Muon's authors advise for a network's two ends.
_ENDS = ("embed", "final", "context")


def make_schedule(optim: Config, steps: int) -> optax.Schedule:
    """Learning rate by step n, for a run of ``steps`` steps with ``w = optim.warmup`` steps of linear warm-up.

    In a run shorter than 2 w, w is half the run.

    n < w: ``lr n / w``. After that, with p = (n - w) / (steps - w) held at 1 from the end on:
    ``exponential``: ``lr exp(ln(lr_final / lr) p)`` (Marigold's IterExponential, facts 8); ``cosine``: from lr to
    lr_final along half a cosine; ``constant``: lr.
    """
    name, lr, final, warmup = optim.schedule, float(optim.lr), float(optim.lr_final), int(optim.warmup)
    warmup = min(warmup, steps // 2)

    def schedule(count: Any) -> jax.Array:
        n = jnp.asarray(count, jnp.float32)
        past = jnp.clip((n - warmup) / (steps - warmup), 0.0, 1.0)
        if name == "exponential":
            decayed = lr * jnp.exp(jnp.log(final / lr) * past)
        elif name == "cosine":
            decayed = final + (lr - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * past))
        else:
            decayed = jnp.full_like(past, lr)
        return jnp.where(n < warmup, lr * n / max(warmup, 1), decayed)

    return schedule


def is_matrix(name: str) -> bool:
    """Whether the leaf holds weights of a linear map. By name, for stacked biases (L, D) have two axes as well."""
    return name.rsplit("/", 1)[-1] == "kernel"


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: kernels, neither biases, norms, tables nor position embeddings."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path_name(path)), params)


def muon_axes(params: Any) -> Any:
    """Which axes of each leaf Muon orthogonalises; None = the leaf belongs to AdamW.

    Kernels inside ``blocks`` are stacked (L, in, out), experts' (L, E, in, out): the leading axes are left out of both
    lists, and optax then treats each matrix by itself (``MuonDimensionNumbers``: unlisted axes are batch axes). Other
    kernels (in, out) are taken whole. Kernels at the network's ends, routers, convolutions, biases, norms and tables
    get AdamW.
    """

    def axes(path: tuple[Any, ...], leaf: Any) -> contrib.MuonDimensionNumbers | None:
        name = path_name(path)
        parts = name.split("/")
        stacked = 1 + ("experts" in parts) if "blocks" in parts else 0
        if not is_matrix(name) or leaf.ndim != stacked + 2 or "router" in parts:
            return None
        if not stacked and any(end in name for end in _ENDS):
            return None
        return contrib.MuonDimensionNumbers(reduction_axis=stacked, output_axis=stacked + 1)

    return jax.tree_util.tree_map_with_path(axes, params)


_NEWTON_SCHULZ = 5
"""Steps by which Muon orthogonalises a matrix."""


def update_flops(optim: Config, params: Any, frozen: tuple[str, ...] = ()) -> float:
    """FLOPs of the matrix products of one update of all weights: Muon's, as AdamW has none.

    Each of its steps computes X Xᵀ, the square of that, and a product of both with X (facts 8), for X of m rows and
    n >= m columns: 2 (2 m² n + m³).
    """
    if optim.name != "muon":
        return 0.0

    def flops(path: tuple[Any, ...], leaf: Any, axes: contrib.MuonDimensionNumbers | None) -> float:
        if axes is None or is_frozen(path_name(path), frozen):
            return 0.0
        m, n = sorted(leaf.shape[-2:])
        return 2.0 * _NEWTON_SCHULZ * (2 * m * m * n + m**3) * math.prod(leaf.shape[:-2])

    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(flops, params, muon_axes(params))))


def _muon_or_rest(params: Any) -> Any:
    def leaf(value: Any) -> bool:
        return value is None or isinstance(value, contrib.MuonDimensionNumbers)

    return jax.tree.map(lambda axes: "rest" if axes is None else "muon", muon_axes(params), is_leaf=leaf)


def make_optimizer(
    optim: Config, steps: int, frozen: tuple[str, ...] = ()
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser of ``config.optim`` and its schedule.

    Leaves in ``frozen`` (names as in ``Objective.frozen``) get no update, no moments and no part in clipping.
    ``grad_clip`` 0 means no clipping. Muon's updates are scaled to AdamW's size (consistent RMS 0.2), so that one
    learning rate serves both kinds of leaves.
    """
    schedule = make_schedule(optim, steps)
    if optim.name == "adam":
        core = optax.adam(schedule, optim.b1, optim.b2, optim.eps)
    else:
        core = optax.adamw(schedule, optim.b1, optim.b2, optim.eps, weight_decay=optim.weight_decay, mask=decay_mask)
    if optim.name == "muon":
        # not the AdamW inside `contrib.muon`: that one takes Muon's Nesterov flag and is then NAdam
        muon = contrib.muon(
            schedule,
            weight_decay=optim.weight_decay,
            ns_steps=_NEWTON_SCHULZ,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=muon_axes,
        )
        core = optax.partition({"muon": muon, "rest": core}, _muon_or_rest)
    if optim.grad_clip:
        core = optax.chain(optax.clip_by_global_norm(optim.grad_clip), core)
    if not frozen:
        return core, schedule

    def kinds(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "held" if is_frozen(path_name(path), frozen) else "trained", params
        )

    return optax.partition({"trained": core, "held": optax.set_to_zero()}, kinds), schedule
