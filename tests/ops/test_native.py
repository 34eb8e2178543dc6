"""The kernel for CPUs against the oracle in float64, and where it is used."""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_perception.ops.attention import attention, attention_einsum, projection_attention, split_heads
from scaling_perception.ops.native import LARGEST, native_is_for, native_projection
from scaling_perception.parallel.mesh import make_mesh
from scaling_perception.support import native

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="needs a C++ compiler")
# tokens and head sizes that are whole vectors of every processor, parts of one, and fewer than one; more than a block
SHAPES = [
    (2, 32, 2, 16),
    (1, 100, 3, 24),
    (3, 7, 1, 8),
    (1, 1, 2, 3),
    (2, 67, 2, 72),
    (1, 49, 1, LARGEST),
    (1, 300, 2, 5),
]


@pytest.fixture(autouse=True)
def used(monkeypatch):
    """On whatever processor."""
    monkeypatch.setenv(native.NATIVE, str(native.folder() or Path(tempfile.gettempdir()) / "scaling-perception-native"))
    native._registered.cache_clear()
    yield
    native._registered.cache_clear()


def draw(shape, scale=1.0, dtype=np.float32):
    batch, tokens, heads, size = shape
    rng = np.random.default_rng(0)
    qkv = scale * rng.standard_normal((batch, tokens, 3 * heads * size))
    return jnp.asarray(qkv, dtype), jnp.asarray(rng.standard_normal((batch, tokens, heads * size)), dtype)


def in_double(qkv, gradient, heads):
    """Attention and its gradient by their formulas."""
    qkv, gradient = np.asarray(qkv, np.float64), np.asarray(gradient, np.float64)
    batch, tokens, width = qkv.shape
    size = width // (3 * heads)
    query, key, value = np.moveaxis(qkv.reshape(batch, tokens, 3, heads, size), (2, 3), (0, 2))
    pulled = np.moveaxis(gradient.reshape(batch, tokens, heads, size), 2, 1)
    logits = query @ key.swapaxes(2, 3) / np.sqrt(size)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    moved = pulled @ value.swapaxes(2, 3)
    moved = weights * (moved - (weights * moved).sum(axis=-1, keepdims=True)) / np.sqrt(size)
    pulls = [moved @ key, moved.swapaxes(2, 3) @ query, weights.swapaxes(2, 3) @ pulled]
    out = np.moveaxis(weights @ value, 1, 2).reshape(batch, tokens, -1)
    return out, np.moveaxis(np.stack(pulls), (0, 2), (2, 3)).reshape(qkv.shape)


def both(function, qkv, gradient):
    out, pull = jax.vjp(function, qkv)
    return out, pull(gradient)[0]


@pytest.mark.parametrize("scale", [1.0, 8.0])  # of logits: the softmax is nearly a maximum at the larger
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_formulas(shape, scale):
    qkv, gradient = draw(shape, scale)
    found = jax.jit(functools.partial(both, lambda qkv: native_projection(qkv, shape[2])))(qkv, gradient)
    for own, true in zip(found, in_double(qkv, gradient, shape[2]), strict=True):
        # a logit's rounding error, which grows with it, is a relative error of its weight
        np.testing.assert_allclose(own, true, atol=1e-6 * max(4.0, scale**2) * max(1.0, np.abs(true).max()))


def test_bfloat16_is_computed_in_float32_and_rounded_once():
    qkv, gradient = draw((2, 40, 2, 16), 4.0, jnp.bfloat16)
    found = both(lambda qkv: native_projection(qkv, 2), qkv, gradient)
    for own, true in zip(found, in_double(qkv, gradient, 2), strict=True):
        assert own.dtype == jnp.bfloat16
        np.testing.assert_allclose(own.astype(np.float32), true, atol=1e-2 * np.abs(true).max())


@pytest.mark.parametrize("factor", [1e4, 1e18])
def test_logits_of_any_size_are_no_overflow(factor):
    qkv, _ = draw((1, 20, 2, 8))
    qkv = qkv.at[..., :32].multiply(np.sqrt(factor))  # queries and keys
    query, key, value = split_heads(qkv, 2)
    np.testing.assert_allclose(
        native_projection(qkv, 2), attention_einsum(query, key, value).reshape(1, 20, 16), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_what_is_no_number_stays_none_where_the_oracle_has_none(part, wrong):
    qkv, gradient = draw((2, 20, 2, 8))
    qkv = qkv.at[0, 3, ["query", "key", "value"].index(part) * 16 + 2].set(wrong)  # of the first head
    found = both(lambda qkv: native_projection(qkv, 2), qkv, gradient)
    true = both(lambda qkv: attention_einsum(*split_heads(qkv, 2)).reshape(2, 20, 16), qkv, gradient)
    for own, oracle in zip(found, true, strict=True):
        np.testing.assert_array_equal(np.isfinite(own), np.isfinite(oracle))


def test_samples_do_not_depend_on_their_batch():
    qkv, gradient = draw((5, 33, 3, 16))
    whole = both(lambda qkv: native_projection(qkv, 3), qkv, gradient)
    mapped = jax.vmap(lambda q, g: both(lambda qkv: native_projection(qkv, 3), q[None], g[None]))(qkv, gradient)
    alone = both(lambda qkv: native_projection(qkv, 3), qkv[2:3], gradient[2:3])
    for every, one, single in zip(whole, mapped, alone, strict=True):
        np.testing.assert_array_equal(every, one[:, 0])
        np.testing.assert_array_equal(every[2:3], single)


def test_where_it_is_used():
    qkv, gradient = draw((2, 20, 2, 8))
    query, key, value = split_heads(qkv, 2)
    target = native.targets()["attention_forward"]

    def lowered(function, *arrays, platform="cpu"):
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()

    def whole(qkv):
        return projection_attention(qkv, 2)

    assert target in lowered(whole, qkv) and target in lowered(attention, query, key, value)
    for platform in ("tpu", "cuda"):
        assert target not in lowered(whole, qkv, platform=platform)
    # other shapes of the keys, a head as wide as an autoencoder's, several devices
    assert target not in lowered(attention, query, key[:, :5], value[:, :5])
    wide = jnp.ones((1, 4, 1, 512))
    assert target not in lowered(attention, wide, wide, wide)
    mesh = make_mesh(devices=jax.devices()[:2])
    assert not native_is_for(8, jnp.float32, mesh) and native_is_for(
        8, jnp.float32, make_mesh(devices=jax.devices()[:1])
    )
    np.testing.assert_allclose(
        both(whole, qkv, gradient)[1],
        both(lambda qkv: attention_einsum(*split_heads(qkv, 2)).reshape(2, 20, 16), qkv, gradient)[1],
        atol=1e-6,
    )
