"""The balance loss of models with experts: shares of the whole batch, however it is cut up (``models/moe.py``)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from scaling_perception.models.dit import DiTConfig
from scaling_perception.support.configs import Config
from scaling_perception.training.objective import Metrics


def routing_tally(stats: Mapping[str, jax.Array], dit: DiTConfig, pictures: int) -> dict[str, jax.Array]:
    """What `with_balance` needs of the routing of a batch of ``pictures``, or of a part of one; {} without experts."""
    if not stats:
        return {}
    pairs = pictures * dit.tokens * dit.active_experts  # whole numbers: float32 shares of them add up to 1 or nearly so
    dropped = jnp.sum(jnp.round(pairs * (1.0 - jnp.sum(stats["load"], axis=-1))))
    return {**stats, "dropped": dropped}


def balance_known(config: Config) -> tuple[str, ...]:
    """The entries of `routing_tally` that all parts of a batch must know before the gradient of one is taken."""
    return ("load",) if config.balance_loss else ()


def with_balance(
    value: jax.Array, found: Mapping[str, jax.Array], dit: DiTConfig, config: Config, metrics: Metrics, parts: int
) -> jax.Array:
    """``value`` plus the balance loss of a model with experts; ``metrics`` gets how they are used.

    Shares and mean scores are those of the whole batch. ``dropped`` counts what no expert got of its (token, expert)
    pairs: 0, or something is wrong.
    """
    if "balance" not in found:
        return value
    balance = found["balance"]
    if "probability" in found:  # of parts, not the mean of their products
        balance = dit.experts * jnp.sum(found["load"] * found["probability"], axis=-1)
    metrics["balance"] = jnp.mean(balance)
    metrics["expert_load_max"] = jnp.max(found["load"]) * dit.experts  # 1: all experts get as much
    metrics["expert_load_min"] = jnp.min(found["load"]) * dit.experts
    metrics["router_entropy"] = jnp.mean(found["entropy"])
    metrics["dropped"] = found["dropped"] * parts
    return value + config.balance_loss * jnp.sum(balance)
