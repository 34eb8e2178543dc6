"""Mixture of experts in place of a block's MLP: a router, E expert MLPs of which each token meets K, a shared one.

Source: DiT-MoE (Fei et al. 2024) and the paper's upcycled models (facts 3.1, 3.2). Nothing is ever dropped. What an
expert computes, and where, is ``models/dispatch.py``; here are the parameters, the routing and its statistics.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from scaling_perception.models.config import DiTConfig
from scaling_perception.models.dispatch import expert_mlp
from scaling_perception.support.shapes import AnyArray, Array, Float, Int

_zeros = nn.initializers.zeros_init()
_expert_init = nn.initializers.xavier_uniform(batch_axis=(0,))


class Routing(NamedTuple):
    """Which experts a token meets.

    Attributes:
        index: (N, K) int32, by falling score; of equal scores the lower expert comes first.
        weight: (N, K) float32, what each expert's output is multiplied by.
        scores: (N, E) float32, softmax over all experts.
    """

    index: Int[Array, "N K"]
    weight: Float[Array, "N K"]
    scores: Float[Array, "N E"]


def route(x: Float[AnyArray, "N D"], kernel: Float[AnyArray, "D E"], active: int, gating: str) -> Routing:
    """The K = ``active`` best experts of each token x (N, D) under the router ``kernel`` (D, E), all in float32.

    ``gating``: ``paper`` leaves the softmax weights as they are, so that they sum to less than 1 (facts 3.1);
    ``renormalised`` divides them by their sum, so that identical experts give what one of them gives (facts 3.2).
    """
    # full precision: a rounded logit picks another expert, and no tolerance covers that
    logits = jnp.dot(x.astype(jnp.float32), kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    scores = jax.nn.softmax(logits, axis=-1)
    weight, index = _largest(scores, active)
    if gating == "renormalised":  # of one expert it is 1, and w / w would give the router rounding for a gradient
        weight = weight / weight.sum(axis=-1, keepdims=True) if active > 1 else jnp.ones_like(weight)
    return Routing(index, weight, scores)


def _largest(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The ``count`` largest of each row (N, E), by falling value, and where they are; of equal ones the first.

    As ``jax.lax.top_k``, which the compiler cannot split over devices on a CPU or GPU: it would gather all rows first.
    """
    values, places, left = [], [], scores
    for _ in range(count):
        place = jnp.argmax(left, axis=-1)
        here = jax.nn.one_hot(place, scores.shape[-1], dtype=jnp.bool_)
        values.append(jnp.where(here, scores, 0.0).sum(axis=-1))
        places.append(place)
        left = jnp.where(here, -jnp.inf, left)
    return jnp.stack(values, axis=-1), jnp.stack(places, axis=-1).astype(jnp.int32)


def routing_stats(routing: Routing) -> dict[str, Float[Array, "..."]]:
    """Statistics of one layer's routing over the whole batch, on every device together.

    Returns:
        ``balance``: sum over experts of f P, with f = E x share of the N K assignments and P = mean score; 1 at
        perfect balance. Times alpha it is the balance loss, whose gradient reaches the router through P (facts 3.1).
        ``probability``: (E,) P.
        ``load``: (E,) share of the assignments that goes to each expert, sum 1.
        ``entropy``: mean over tokens of the entropy of the scores, in nats.
    """
    experts = routing.scores.shape[-1]
    load = jax.nn.one_hot(routing.index, experts, dtype=jnp.float32).mean(axis=(0, 1))
    probability = routing.scores.mean(axis=0)
    balance = experts * jnp.sum(load * probability)
    entropy = -jnp.sum(jax.scipy.special.xlogy(routing.scores, routing.scores), axis=-1).mean()
    return {"balance": balance, "load": load, "probability": probability, "entropy": entropy}


def _router_init(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    bound = shape[0] ** -0.5  # torch's kaiming_uniform(a = sqrt 5) on an (E, D) matrix
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class Weights(nn.Module):
    """Parameters alone: what is done with them is a pure function elsewhere."""

    shapes: dict[str, tuple[tuple[int, ...], Any]]  # name -> (shape, initialiser)

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        return {name: self.param(name, init, shape) for name, (shape, init) in self.shapes.items()}


class Experts(nn.Module):
    """The experts' parameters: each kernel (E, in, out), each bias (E, out)."""

    config: DiTConfig

    @nn.compact
    def __call__(self) -> dict[str, dict[str, jax.Array]]:
        config = self.config
        count, width, hidden = config.experts, config.dim, config.hidden
        if config.expert_mlp == "swiglu":
            sizes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        else:
            sizes = {"fc1": (width, hidden), "fc2": (hidden, width)}
        found = {}
        for name, size in sizes.items():
            shapes: dict[str, tuple[tuple[int, ...], Any]] = {"kernel": ((count, *size), _expert_init)}
            if config.expert_mlp == "gelu":
                shapes["bias"] = ((count, size[1]), _zeros)
            found[name] = Weights(shapes, name=name)()
        return found


class SwiGLU(nn.Module):
    """``down(silu(gate x) * up x)`` without biases, (N, D) to (N, D): the shared expert."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[AnyArray, "N D"]) -> Float[Array, "N D"]:
        def dense(features: int, name: str) -> nn.Dense:
            init = nn.initializers.xavier_uniform()
            return nn.Dense(features, use_bias=False, kernel_init=init, dtype=self.dtype, name=name)

        hidden = nn.silu(dense(self.hidden, "gate")(x)) * dense(self.hidden, "up")(x)
        return dense(x.shape[-1], "down")(hidden)


class MoE(nn.Module):
    """(B, T, D) float32 to (B, T, D) in the compute dtype, and the statistics of the routing (``routing_stats``).

    Attributes:
        dispatch: ``dense``, ``ragged``, ``ring`` or ``auto`` (``models/dispatch.py``); same parameters, same result.
        mesh: the mesh that the arrays live on, None = one device.
    """

    config: DiTConfig
    dtype: Any = jnp.float32
    dispatch: str = "auto"
    mesh: Any = None

    @nn.compact
    def __call__(self, x: Float[AnyArray, "B T D"]) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "..."]]]:
        config = self.config
        flat = x.reshape(-1, config.dim)
        router = Weights({"kernel": ((config.dim, config.experts), _router_init)}, name="router")()["kernel"]
        routing = route(flat, router, config.active_experts, config.gating)
        self.sow("intermediates", "index", routing.index)
        self.sow("intermediates", "weight", routing.weight)
        flat = flat.astype(self.dtype)
        experts = Experts(config, name="experts")()
        out = expert_mlp(
            flat, routing.index, routing.weight, experts, config.expert_mlp, dispatch=self.dispatch, mesh=self.mesh
        )
        if config.shared_experts:
            out = out + SwiGLU(config.shared_experts * config.dim, self.dtype, name="shared")(flat)
        return out.reshape(x.shape), routing_stats(routing)
