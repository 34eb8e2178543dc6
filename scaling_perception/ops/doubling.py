"""Pictures at twice their size."""

import jax
import jax.numpy as jnp

from scaling_perception.support.shapes import AnyArray, Array, Float


def doubled(x: Float[AnyArray, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
    """What ``jax.image.resize`` gives at twice the size with "linear": each pixel becomes two, of three quarters of it
    and a quarter of its neighbour; at the edges, of it alone. Elementwise: faster on a CPU than resize's products."""
    x = jnp.asarray(x)
    for axis in (1, 2):
        length = x.shape[axis]
        edges = jax.lax.slice_in_dim(x, 0, 1, axis=axis), jax.lax.slice_in_dim(x, length - 1, length, axis=axis)
        before = jnp.concatenate([edges[0], jax.lax.slice_in_dim(x, 0, length - 1, axis=axis)], axis)
        after = jnp.concatenate([jax.lax.slice_in_dim(x, 1, length, axis=axis), edges[1]], axis)
        both = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1)
        x = both.reshape(*x.shape[:axis], 2 * length, *x.shape[axis + 1 :])
    return x
