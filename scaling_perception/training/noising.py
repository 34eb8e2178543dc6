"""Noise on latents, as every diffusion objective draws it: timesteps, noise, the noisy latent and what to predict.

With (alpha, sigma) of the schedule at timestep t, z a clean latent and eps noise:

    x_t = alpha_t z + sigma_t eps                                                       (1)

Words: B batch, h w latent sides; latents are (B, h, w, 4) float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from scaling_perception.diffusion.noise import annealed_strength, pyramid_noise
from scaling_perception.diffusion.schedules import TRAIN_STEPS, DiffusionPreset
from scaling_perception.diffusion.targets import add_noise, training_target
from scaling_perception.support.configs import Config

LATENT = 4  # channels of every latent

_HIGH = 900  # `high_noise`: half of the draws come from 900..999

Noising = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


def sample_timesteps(key: jax.Array, batch: int, sampling: str) -> jax.Array:
    """Training timesteps, int32 (B,) in 0..999.

    ``uniform``: as in the paper. ``high_noise``: with probability 1/2 uniform over all, else uniform over 900..999,
    the levels where few-step sampling on the trailing grid spends its steps (one step runs at 999 alone).
    ``logit_normal``: 1000 times the logistic function of a standard normal, cut to a whole number: the middle of the
    path most often (Esser et al. 2024, section 3.1, with location 0 and scale 1).
    """
    every, top, which = jax.random.split(key, 3)
    if sampling == "logit_normal":
        place = jax.nn.sigmoid(jax.random.normal(every, (batch,)))
        return jnp.minimum((TRAIN_STEPS * place).astype(jnp.int32), TRAIN_STEPS - 1)
    t = jax.random.randint(every, (batch,), 0, TRAIN_STEPS)
    if sampling == "uniform":
        return t
    high = jax.random.randint(top, (batch,), _HIGH, TRAIN_STEPS)
    return jnp.where(jax.random.bernoulli(which, 0.5, (batch,)), high, t)


def sample_noise(
    key: jax.Array, index: jax.Array, shape: tuple[int, ...], config: Config
) -> tuple[jax.Array, jax.Array]:
    """Timesteps (B,) and noise of ``shape`` (B, h, w, 4), each sample's from ``key`` and its place in the batch alone.

    So they are the same however the batch is cut up or spread.
    """

    def one(place: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_t, key_noise = jax.random.split(jax.random.fold_in(key, place))
        t = sample_timesteps(key_t, 1, config.timestep_sampling)
        if config.noise == "multires":
            height, width, channels = shape[1:]
            return t[0], pyramid_noise(key_noise, (1, height, width, channels), annealed_strength(t))[0]
        return t[0], jax.random.normal(key_noise, shape[1:])

    return jax.vmap(one)(index)


def make_noising(preset: DiffusionPreset, config: Config) -> Noising:
    """(clean (B, h, w, 4), key, places (B,)) -> (noisy, wanted, t): equation (1), the target of ``preset``, timesteps.

    Args:
        config: ``timestep_sampling`` and ``noise`` are used.
    """
    levels = [np.asarray(table, np.float32) for table in preset.levels()]

    def noised(clean: jax.Array, key: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        t, eps = sample_noise(key, index, clean.shape, config)
        alpha, sigma = (jnp.asarray(table)[t] for table in levels)
        wanted = training_target(preset.prediction, clean, eps, alpha, sigma)
        return add_noise(clean, eps, alpha, sigma), wanted, t

    return noised
