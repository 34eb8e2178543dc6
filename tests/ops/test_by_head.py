"""Attention by head, whose gradient is written out, against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_perception.ops.attention import attention_einsum
from scaling_perception.ops.by_head import attention_by_head


def draw(dtype=np.float32, scale=1.0):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(scale * rng.standard_normal((2, 7, 3, 8)), dtype) for _ in range(4))


@pytest.mark.parametrize(
    ("dtype", "scale", "off"), [("float32", 1.0, 2e-6), ("float32", 8.0, 1e-5), ("bfloat16", 6.0, 0.06)]
)
def test_values_and_gradients(dtype, scale, off):
    """Logits of about 100 and more, too: what is subtracted before the exponential matters then."""
    *arrays, gradient = draw(dtype, scale)

    def both(program, *arrays):
        out, pull = jax.vjp(program, *arrays)
        return out, *pull(gradient.astype(out.dtype))

    found = jax.jit(lambda *a: both(attention_by_head, *a))(*arrays)
    expected = both(attention_einsum, *(array.astype(jnp.float32) for array in arrays))
    for ours, right in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        largest = np.max(np.abs(right))
        np.testing.assert_allclose(np.asarray(ours, np.float32) / largest, right / largest, atol=off)


def test_nothing_but_the_inputs_is_kept():
    *arrays, _ = draw()
    kept = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(attention_by_head, *a)[1], *arrays))
    assert [leaf.shape for leaf in kept] == [array.shape for array in arrays]
