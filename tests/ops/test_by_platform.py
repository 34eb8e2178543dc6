"""A function by platform, over a vmapped axis."""

import jax
import jax.numpy as jnp
import numpy as np

from scaling_perception.ops.by_platform import by_platform
from scaling_perception.ops.flash import flash_attention


def test_vmap_puts_its_axis_in_front_of_the_samples():
    call = by_platform("twice_and", lambda a, b: a, lambda a, b: 2 * a + b, samples=True)
    a, b = jnp.arange(24.0).reshape(2, 3, 4), jnp.ones((3, 4))
    np.testing.assert_array_equal(jax.vmap(call, (0, None))(a, b), 2 * a + 1)
    moved = a.swapaxes(0, 1)
    np.testing.assert_array_equal(jax.vmap(call, (1, 1), 1)(moved, moved), 3 * moved)


def test_flash_attention_and_its_gradient_are_vmapped():
    array = jax.ShapeDtypeStruct((2, 3, 16, 2, 64), jnp.float32)

    def total(*arrays):
        return flash_attention(*arrays).sum()

    found = jax.eval_shape(jax.vmap(jax.grad(total, argnums=(0, 1, 2))), array, array, array)
    assert [one.shape for one in found] == [array.shape] * 3
