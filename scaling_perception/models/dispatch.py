"""Where experts are computed: one signature, several dispatchers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

DISPATCHES = ("auto", "dense", "ragged", "ring")


def expert_mlp(
    x: jax.Array,
    index: jax.Array,
    weight: jax.Array,
    experts: Mapping[str, Any],
    kind: str,
    dispatch: str = "auto",
    mesh: Any = None,
) -> jax.Array:
    """Every expert on every token, weighted by the routing: (N, D) to (N, D)."""
    del dispatch, mesh
    dtype = x.dtype
    e = jax.tree.map(lambda leaf: leaf.astype(dtype), dict(experts))
    if kind == "gelu":
        hidden = jax.nn.gelu(jnp.einsum("nd,edf->enf", x, e["fc1"]["kernel"]) + e["fc1"]["bias"][:, None])
        out = jnp.einsum("enf,efd->end", hidden, e["fc2"]["kernel"]) + e["fc2"]["bias"][:, None]
    else:
        hidden = jax.nn.silu(jnp.einsum("nd,edf->enf", x, e["gate"]["kernel"]))
        hidden = hidden * jnp.einsum("nd,edf->enf", x, e["up"]["kernel"])
        out = jnp.einsum("enf,efd->end", hidden, e["down"]["kernel"])
    share = (jax.nn.one_hot(index, out.shape[0], dtype=jnp.float32) * weight[..., None]).sum(axis=1)
    return jnp.einsum("ne,end->nd", share, out.astype(jnp.float32)).astype(dtype)
