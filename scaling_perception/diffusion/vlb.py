"""The variational bound that trains a learned variance (Nichol & Dhariwal 2021, section 3.1; DiT, facts 4.1).

The network's second half of channels v in about [-1, 1] interpolates between the smallest and the largest sensible
log-variance of the reverse step, which are those of the posterior q(x_(t-1) | x_t, x_0) and of q(x_t | x_(t-1)):

    log sigma^2 = (v + 1)/2 log beta_t + (1 - v)/2 log beta~_t
    beta~_t = beta_t (1 - alpha_bar_(t-1)) / (1 - alpha_bar_t)

(beta~_0 is 0 and is replaced by beta~_1). The bound's terms, in bits for each latent value:

    t > 0: KL of the posterior N(mu~(x_t, x_0), beta~_t) to N(mu~(x_t, x^_0), sigma^2)
    t = 0: negative log-likelihood of x_0 under N(x^_0, sigma^2), its density summed over a bin of width 2/255

where x^_0 is the clean estimate that the network's output stands for. The bins are those of 8-bit pixels, though
latents have none, with open ends beyond 0.999; kept, because DiT was trained so. So is the tanh form of the normal's
distribution function.

Words: B batch, h w latent sides, C channels.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling_perception.diffusion.schedules import DiffusionPreset
from scaling_perception.diffusion.targets import to_x0_eps
from scaling_perception.support.errors import UserError
from scaling_perception.support.shapes import AnyArray, Array, Float, Int

BIN = 1.0 / 255.0  # half a bin
EDGE = 0.999
_SMALLEST = 1e-12  # of a probability whose logarithm is taken


class VarianceTables(NamedTuple):
    """float32 (1000,) by timestep: alpha, sigma, the weight of x_0 in mu~, and the two bounds of the log-variance."""

    alpha: Float[np.ndarray, "1000"]
    sigma: Float[np.ndarray, "1000"]
    x0_weight: Float[np.ndarray, "1000"]
    low: Float[np.ndarray, "1000"]
    high: Float[np.ndarray, "1000"]


def variance_tables(preset: DiffusionPreset) -> VarianceTables:
    """The tables of a schedule, computed in float64 on the host.

    Raises:
        UserError: the schedule does not preserve variance; the bound is not written for it.
    """
    if preset.schedule == "rectified":
        raise UserError(
            "a learned variance does not go with schedule 'rectified': set model_changes.learn_sigma=false, or choose "
            "another diffusion_changes.schedule"
        )
    alpha_bar = preset.alphas_cumprod()
    before = np.append(1.0, alpha_bar[:-1])
    beta = 1 - alpha_bar / before
    posterior = beta * (1 - before) / (1 - alpha_bar)
    posterior[0] = posterior[1]
    x0_weight = beta * np.sqrt(before) / (1 - alpha_bar)
    found = *preset.levels(), x0_weight, np.log(posterior), np.log(beta)
    return VarianceTables(*(np.asarray(table, np.float32) for table in found))


def log_variance(
    tables: VarianceTables, v: Float[AnyArray, "B h w C"], t: Int[AnyArray, " B"]
) -> Float[Array, "B h w C"]:
    """log sigma^2 (B, h, w, C) of the network's variance channels v (B, h, w, C) at timesteps t (B,)."""
    low, high = _at(tables.low, t, v), _at(tables.high, t, v)
    share = (v + 1) / 2
    return share * high + (1 - share) * low


def learned_range_bits(
    tables: VarianceTables,
    prediction: str,
    out: Float[AnyArray, "B h w C"],
    v: Float[AnyArray, "B h w C"],
    x0: Float[AnyArray, "B h w C"],
    x_t: Float[AnyArray, "B h w C"],
    t: Int[AnyArray, " B"],
) -> Float[Array, " B"]:
    """The bound's term of each sample, float32 (B,), in bits a latent value.

    It trains the variance alone: no gradient goes through ``out``.

    Args:
        prediction: what ``out`` is: a name of `schedules.PREDICTIONS`.
        out: (B, h, w, C) the network's prediction.
        v: (B, h, w, C) its variance channels.
        x0, x_t: (B, h, w, C) the clean and the noisy latent.
        t: (B,) int timesteps.
    """
    out = jax.lax.stop_gradient(out)
    guess, _ = to_x0_eps(prediction, out, x_t, jnp.asarray(tables.alpha)[t], jnp.asarray(tables.sigma)[t])
    log_var = log_variance(tables, v, t)
    low = _at(tables.low, t, v)
    # the two means differ by their clean latents alone: no difference of large numbers
    distance = jnp.square(_at(tables.x0_weight, t, v) * (x0 - guess))
    divergence = 0.5 * (log_var - low - 1 + jnp.exp(low - log_var) + distance * jnp.exp(-log_var))
    first = (t == 0)[:, None, None, None]  # there the mean is the clean estimate
    # elsewhere a harmless one: what is not chosen must not overflow either, or the gradient is NaN
    likelihood = discretised_log_likelihood(x0, jnp.where(first, guess, x0), 0.5 * log_var)
    nats = jnp.where(first, -likelihood, divergence)
    return nats.mean(axis=(1, 2, 3)) / math.log(2)


def discretised_log_likelihood(
    x: Float[AnyArray, "*shape"], mean: Float[AnyArray, "*shape"], log_scale: Float[AnyArray, "*shape"]
) -> Float[Array, "*shape"]:
    """Log of the normal's mass within 1/255 of x; the bins beyond +-0.999 have no end. Shapes alike."""
    inverse, away = jnp.exp(-log_scale), x - mean
    # masses of the lower tail, where float32 keeps small numbers apart that lie beside 1 in the upper one
    inside = _cdf(inverse * (BIN - jnp.abs(away))) - _cdf(inverse * (-BIN - jnp.abs(away)))
    lowest, highest = _cdf(inverse * (BIN + away)), _cdf(inverse * (BIN - away))
    mass = jnp.where(x < -EDGE, lowest, jnp.where(x > EDGE, highest, inside))
    return jnp.log(jnp.maximum(mass, _SMALLEST))


def _cdf(x: jax.Array) -> jax.Array:
    """(1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2, without the difference that tanh would be near -1."""
    return jax.nn.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


def _at(
    table: Float[np.ndarray, "1000"] | Float[Array, "1000"], t: Int[AnyArray, " B"], like: Float[AnyArray, "B ..."]
) -> Float[Array, "B ..."]:
    return jnp.asarray(table)[t].reshape(t.shape + (1,) * (like.ndim - 1))
