"""Attention against float64 arithmetic written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_perception.ops.attention import attention, attention_by_head, attention_einsum


def by_hand(query, key, value):
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    out = np.zeros_like(value)
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            logits = query[b, :, h] @ key[b, :, h].T / np.sqrt(query.shape[-1])
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            out[b, :, h] = weights / weights.sum(axis=1, keepdims=True) @ value[b, :, h]
    return out


def draw(dtype=np.float32, scale=1.0):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(scale * rng.standard_normal((2, 7, 3, 8)), dtype) for _ in range(3))


PROGRAMS = pytest.mark.parametrize("program", [attention, attention_einsum, attention_by_head])


@PROGRAMS
def test_values(program):
    np.testing.assert_allclose(program(*draw()), by_hand(*draw()), atol=1e-6)


def test_each_platform_gets_its_program(monkeypatch):
    monkeypatch.setattr("scaling_perception.ops.attention.native_is_for", lambda *_: False)  # tests/ops/test_native.py
    shape = jax.ShapeDtypeStruct((2, 7, 3, 8), jnp.float32)
    for platform, loops in (("cpu", True), ("tpu", False), ("cuda", False)):
        text = jax.jit(attention).trace(shape, shape, shape).lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.while" in text) == loops
    assert "conditional" not in jax.jit(attention).lower(shape, shape, shape).compile().as_text()


@PROGRAMS
def test_gradients_equal_finite_differences(program):
    arrays = draw()
    weight = np.random.default_rng(1).standard_normal((2, 7, 3, 8))
    gradients = jax.grad(lambda *a: jnp.sum(program(*a) * weight), argnums=(0, 1, 2))(*arrays)
    step = 1e-5
    for which, at in ((0, (1, 2, 0, 3)), (1, (0, 6, 2, 0)), (2, (1, 0, 1, 7))):
        moved = [[np.asarray(a, np.float64).copy() for a in arrays] for _ in range(2)]
        moved[0][which][at] += step
        moved[1][which][at] -= step
        slope = (np.sum(by_hand(*moved[0]) * weight) - np.sum(by_hand(*moved[1]) * weight)) / (2 * step)
        assert float(gradients[which][at]) == pytest.approx(slope, rel=1e-4, abs=1e-6)


@PROGRAMS
def test_bfloat16_keeps_a_float32_softmax(program):
    arrays = draw(jnp.bfloat16, scale=6.0)  # logits of about 100: a bfloat16 softmax would be off by tens of percent
    out = program(*arrays)
    assert out.dtype == jnp.bfloat16
    expected = by_hand(*arrays)
    assert np.max(np.abs(np.asarray(out, np.float64) - expected)) < 0.02 * np.max(np.abs(expected))
