"""What the network is trained to return, and the masked loss. Pure functions of arrays, jit-able, any batch shape."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_perception.diffusion.schedules import PREDICTIONS
from scaling_perception.support.errors import UserError, did_you_mean


def _roots(alpha_bar: jax.Array | np.ndarray | float, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar), with trailing axes added to meet ``like``.

    Host values are rooted in float64. A traced float32 ``alpha_bar`` costs at most 5e-6 in the noise coefficient (at
    t = 0, where 1 - alpha_bar is 4e-5), and nothing visible elsewhere.
    """
    xp = jnp if isinstance(alpha_bar, jax.Array) else np
    alpha_bar = jnp.asarray(alpha_bar) if xp is jnp else np.asarray(alpha_bar, np.float64)
    alpha_bar = alpha_bar.reshape(alpha_bar.shape + (1,) * (like.ndim - alpha_bar.ndim))
    return jnp.asarray(xp.sqrt(alpha_bar), like.dtype), jnp.asarray(xp.sqrt(1 - alpha_bar), like.dtype)


def _unknown(prediction: str) -> UserError:
    return UserError(f"unknown prediction '{prediction}'{did_you_mean(prediction, PREDICTIONS)}")


def add_noise(x0: jax.Array, eps: jax.Array, alpha_bar: jax.Array | np.ndarray | float) -> jax.Array:
    """x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps (Ho et al. 2020, equation 4).

    Args:
        x0: (B, ...) clean latents; eps: the same shape, unit-variance noise.
        alpha_bar: () or (B,), the schedule's entry at each sample's timestep.
    """
    signal, noise = _roots(alpha_bar, x0)
    return signal * x0 + noise * eps


def training_target(
    prediction: str, x0: jax.Array, eps: jax.Array, alpha_bar: jax.Array | np.ndarray | float
) -> jax.Array:
    """What the network should return: eps, x0, or v = sqrt(a) eps - sqrt(1 - a) x0 (Salimans & Ho 2022, section 4).

    Shapes as in `add_noise`. ``prediction`` is static.

    Raises:
        UserError: unknown prediction.
    """
    if prediction == "epsilon":
        return eps
    if prediction == "x0":
        return x0
    if prediction == "v":
        signal, noise = _roots(alpha_bar, x0)
        return signal * eps - noise * x0
    raise _unknown(prediction)


def to_x0_eps(
    prediction: str, out: jax.Array, x_t: jax.Array, alpha_bar: jax.Array | np.ndarray | float
) -> tuple[jax.Array, jax.Array]:
    """The clean estimate and the noise estimate that a network output stands for.

    For epsilon x0 is divided by sqrt(alpha_bar): at the end of the cosine schedule (2.4e-9) float32 rounding of ``x_t``
    alone then moves x0 by 1e-3, and an error of the network by 2e4 times itself. For x0 the noise is divided by
    sqrt(1 - alpha_bar), which is at least 6e-3. v divides by nothing.

    Args:
        out, x_t: (B, ...) network output and its noisy input.
        alpha_bar: () or (B,).

    Returns:
        (x0, eps), each (B, ...).

    Raises:
        UserError: unknown prediction.
    """
    signal, noise = _roots(alpha_bar, x_t)
    if prediction == "epsilon":
        return (x_t - noise * out) / signal, out
    if prediction == "x0":
        return out, (x_t - signal * out) / noise
    if prediction == "v":
        return signal * x_t - noise * out, noise * x_t + signal * out
    raise _unknown(prediction)


def masked_mse(pred: jax.Array, target: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """Mean squared error over the valid cells, in float32.

    Values under invalid cells may be NaN; they reach neither the loss nor its gradient. If no cell of the whole batch
    is valid the loss and its gradient are 0.

    Args:
        pred, target: (B, h, w, C).
        valid: (B, h, w) bool; None takes every cell.

    Returns:
        float32 (): the sum of squares over valid cells and channels / (valid cells x C).

    Raises:
        ValueError: shapes do not agree (a learned-variance output must be cut to its first C channels before).
    """
    if valid is None and pred.shape == target.shape:
        return jnp.mean(jnp.square(pred.astype(jnp.float32) - target.astype(jnp.float32)))
    valid = jnp.ones(pred.shape[:-1], bool) if valid is None else valid
    squares, cells = masked_squares(pred, target, valid)
    return mean_of_cells(squares, cells, pred.shape[-1])


def masked_squares(pred: jax.Array, target: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two sums of `masked_mse`, float32 (): squared errors over valid cells and channels, and valid cells.

    Raises:
        ValueError: shapes do not agree.
    """
    if pred.shape != target.shape:
        raise ValueError(f"prediction {pred.shape} and target {target.shape} differ in shape")
    if valid.shape != pred.shape[:-1]:
        raise ValueError(f"the valid mask {valid.shape} does not fit a prediction {pred.shape}")
    mask = jnp.asarray(valid, bool)
    error = jnp.where(mask[..., None], pred.astype(jnp.float32) - target.astype(jnp.float32), 0.0)
    return jnp.sum(jnp.square(error)), jnp.sum(mask, dtype=jnp.float32)


def mean_of_cells(squares: jax.Array, cells: jax.Array, channels: int) -> jax.Array:
    """squares / (cells x channels); 0 where there is no cell (``squares`` is 0 then)."""
    return squares / (jnp.where(cells > 0, cells, 1.0) * channels)


def latent_mask(valid: Any, factor: int = 8) -> Any:
    """A pixel mask at latent resolution: a cell is valid only if all its factor x factor pixels are.

    The same as max-pooling the invalid mask, as Marigold's trainer does. numpy in, numpy out; jax in, jax out.

    Args:
        valid: (B, H, W) or (H, W) bool, H and W multiples of ``factor``.

    Returns:
        (B, H / factor, W / factor) bool.

    Raises:
        ValueError: H or W is no multiple of ``factor``.
    """
    *batch, height, width = valid.shape
    if height % factor or width % factor:
        raise ValueError(f"a mask of {height}x{width} pixels cannot be cut into cells of {factor}x{factor}")
    return valid.reshape(*batch, height // factor, factor, width // factor, factor).all(axis=(-3, -1))
