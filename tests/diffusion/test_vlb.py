"""The bound against a plain float64 implementation of its definition, and against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from scaling_perception.diffusion.schedules import betas, get_diffusion
from scaling_perception.diffusion.targets import add_noise, training_target
from scaling_perception.diffusion.vlb import (
    discretised_log_likelihood,
    learned_range_bits,
    log_variance,
    variance_tables,
)

BITS = jax.jit(learned_range_bits, static_argnums=1)
LIKELIHOOD = jax.jit(discretised_log_likelihood)
TIMES = np.array([0, 0, 1, 2, 17, 250, 500, 998, 999, 3])
SHAPE = (len(TIMES), 4, 4, 2)


def preset(prediction="epsilon", schedule="linear"):
    return get_diffusion("paper", schedule=schedule, prediction=prediction)


def by_definition(schedule, prediction, out, v, x0, x_t, t):
    """Bits of one sample, float64: both Gaussians written out, one value at a time in effect."""
    beta = betas(schedule)
    alpha_bar = np.cumprod(1 - beta)
    previous = np.append(1.0, alpha_bar)[t]
    variance = beta[t] * (1 - previous) / (1 - alpha_bar[t])
    posterior = variance if t else beta[1] * (1 - alpha_bar[0]) / (1 - alpha_bar[1])
    first = beta[t] * np.sqrt(previous) / (1 - alpha_bar[t])
    second = (1 - previous) * np.sqrt(1 - beta[t]) / (1 - alpha_bar[t])
    signal, noise = np.sqrt(alpha_bar[t]), np.sqrt(1 - alpha_bar[t])
    guess = {"epsilon": (x_t - noise * out) / signal, "x0": out, "v": signal * x_t - noise * out}[prediction]
    true_mean, mean = first * x0 + second * x_t, first * guess + second * x_t
    sigma = np.exp(0.5 * ((v + 1) / 2 * np.log(beta[t]) + (1 - v) / 2 * np.log(posterior)))
    if t:
        s = np.sqrt(variance)
        nats = np.log(sigma / s) + (s**2 + (true_mean - mean) ** 2) / (2 * sigma**2) - 0.5
    else:

        def cdf(x):
            return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

        up, down = cdf((x0 - mean + 1 / 255) / sigma), cdf((x0 - mean - 1 / 255) / sigma)
        mass = np.where(x0 < -0.999, up, np.where(x0 > 0.999, 1 - down, up - down))
        nats = -np.log(np.maximum(mass, 1e-12))
    return nats.mean() / np.log(2)


def draw(prediction, schedule, error=0.1):
    rng = np.random.default_rng(0)
    x0 = rng.normal(size=SHAPE).astype(np.float32)
    eps = rng.normal(size=SHAPE).astype(np.float32)
    levels = [level[TIMES].astype(np.float32) for level in preset(prediction, schedule).levels()]
    x_t = add_noise(x0, eps, *levels)
    out = training_target(prediction, x0, eps, *levels)
    out = out + error * rng.normal(size=SHAPE).astype(np.float32)
    return out, rng.uniform(-1.3, 1.3, SHAPE).astype(np.float32), x0, x_t


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "scaled_linear"])
def test_equals_the_definition(prediction, schedule):
    out, v, x0, x_t = draw(prediction, schedule)
    tables = variance_tables(preset(prediction, schedule))
    bits = BITS(tables, prediction, out, v, x0, x_t, jnp.asarray(TIMES))
    wide = [np.asarray(array, np.float64) for array in (out, v, x0, x_t)]
    want = [by_definition(schedule, prediction, *(a[i] for a in wide), t) for i, t in enumerate(TIMES)]
    assert bits.shape == (len(TIMES),) and bits.dtype == jnp.float32
    np.testing.assert_allclose(bits, want, rtol=2e-3, atol=2e-5)


def test_closed_forms():
    out, v, x0, x_t = draw("epsilon", "linear", error=0.0)
    tables, later = variance_tables(preset()), TIMES[2:]
    bits = BITS(tables, "epsilon", out, jnp.full(SHAPE, -1.0), x0, x_t, jnp.asarray(TIMES))
    np.testing.assert_allclose(bits[2:], 0, atol=1e-3)  # the very posterior
    bits = BITS(tables, "epsilon", out, jnp.full(SHAPE, 1.0), x0, x_t, jnp.asarray(TIMES))
    beta, alpha_bar = betas("linear"), np.cumprod(1 - betas("linear"))
    ratio = (1 - alpha_bar[later - 1]) / (1 - alpha_bar[later])
    np.testing.assert_allclose(bits[2:], 0.5 * (ratio - 1 - np.log(ratio)) / np.log(2), atol=1e-3)
    np.testing.assert_allclose(
        log_variance(tables, jnp.full(SHAPE, 1.0), jnp.asarray(TIMES))[:, 0, 0, 0], np.log(beta[TIMES]), rtol=1e-5
    )
    assert tables.low[0] == tables.low[1] and np.all(tables.low[1:] < tables.high[1:])


def test_likelihood_of_bins_is_that_of_a_normal():
    x = np.linspace(-0.9, 0.9, 41, dtype=np.float32).reshape(1, 1, -1, 1)
    for mean, scale in ((0.0, 0.3), (0.5, 0.05)):
        got = np.exp(LIKELIHOOD(x, jnp.full_like(x, mean), jnp.full_like(x, math.log(scale))))
        want = norm.cdf(x + 1 / 255, mean, scale) - norm.cdf(x - 1 / 255, mean, scale)
        np.testing.assert_allclose(got, want, atol=4e-4)
    ends = np.array([-2.0, 2.0], np.float32).reshape(1, 1, 2, 1)  # the last bins have no end
    tails = np.exp(LIKELIHOOD(ends, jnp.zeros_like(ends), jnp.zeros_like(ends)))
    np.testing.assert_allclose(tails, norm.cdf(-2 + 1 / 255), atol=1e-3)


def test_gradient_reaches_the_variance_alone_and_is_finite():
    out, v, x0, x_t = draw("epsilon", "linear", error=1.0)
    tables, times = variance_tables(preset()), jnp.asarray(TIMES)

    @jax.jit
    def slopes(out, v):
        def total(out, v):
            return learned_range_bits(tables, "epsilon", out, v, x0, x_t, times).sum()

        return jax.value_and_grad(total, argnums=(0, 1))(out, v)

    _, (by_out, by_v) = slopes(out, v)
    assert not np.any(by_out) and np.isfinite(by_v).all()
    assert (np.abs(np.asarray(by_v)).max(axis=(1, 2, 3)) > 0).all()
    move = np.zeros(SHAPE, np.float32)
    move[2:] = np.random.default_rng(1).normal(size=SHAPE)[2:]
    slope = float(np.vdot(by_v, move))
    numeric = float(slopes(out, v + 1e-2 * move)[0] - slopes(out, v - 1e-2 * move)[0]) / 2e-2
    assert numeric == pytest.approx(slope, rel=1e-2)
    for extreme in (-30.0, 30.0):  # a network that has just started may say anything
        value, (_, slope) = slopes(1e3 * out, jnp.full(SHAPE, extreme))
        assert not np.isnan(slope).any() and not np.isnan(value)


def test_the_best_variance_is_that_of_the_error():
    out, _, x0, x_t = draw("epsilon", "linear", error=0.5)
    tables, times = variance_tables(preset()), jnp.full(len(TIMES), 500)
    beta, alpha_bar = betas("linear"), np.cumprod(1 - betas("linear"))
    guess = (x_t - np.sqrt(1 - alpha_bar[500]) * out) / np.sqrt(alpha_bar[500])
    posterior = beta[500] * (1 - alpha_bar[499]) / (1 - alpha_bar[500])
    weight = beta[500] * np.sqrt(alpha_bar[499]) / (1 - alpha_bar[500])
    best = np.log(posterior + np.square(weight * (x0 - np.asarray(guess))))
    v = 2 * (best - np.log(posterior)) / (np.log(beta[500]) - np.log(posterior)) - 1
    slope = jax.jit(jax.grad(lambda v: learned_range_bits(tables, "epsilon", out, v, x0, x_t, times).sum()))
    assert np.abs(np.asarray(slope(v.astype(np.float32)))).max() < 1e-5
