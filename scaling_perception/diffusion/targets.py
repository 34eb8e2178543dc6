"""What the network is trained to return, and the masked loss. Pure functions of arrays, jit-able, any batch shape."""

import jax.numpy as jnp

from scaling_perception.diffusion.schedules import PREDICTIONS
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.shapes import AnyArray, Array, Bool, Float, Level


def _facing(level: Level, like: Float[AnyArray, "..."]) -> Float[Array, "..."]:
    """``level`` in the dtype of ``like``, with trailing axes added to meet it."""
    level = jnp.asarray(level, like.dtype)
    return level.reshape(level.shape + (1,) * (like.ndim - level.ndim))


def _unknown(prediction: str) -> UserError:
    return UserError(f"unknown prediction '{prediction}'{did_you_mean(prediction, PREDICTIONS)}")


def add_noise(
    x0: Float[AnyArray, " B *shape"], eps: Float[AnyArray, " B *shape"], alpha: Level, sigma: Level
) -> Float[Array, " B *shape"]:
    """x_t = alpha x0 + sigma eps (Ho et al. 2020, equation 4; Kingma et al. 2021, equation 1).

    Args:
        x0: (B, ...) clean latents; eps: the same shape, unit-variance noise.
        alpha, sigma: () or (B,), the schedule's entries at each sample's timestep (`DiffusionPreset.levels`).
    """
    return _facing(alpha, x0) * x0 + _facing(sigma, x0) * eps


def training_target(
    prediction: str, x0: Float[AnyArray, " B *shape"], eps: Float[AnyArray, " B *shape"], alpha: Level, sigma: Level
) -> Float[AnyArray, " B *shape"]:
    """What the network should return.

    eps; x0; v = alpha eps - sigma x0 (Salimans & Ho 2022, section 4); or the velocity eps - x0 of the straight path
    (Liu et al. 2023, equation 1, with noise at its end).

    Shapes as in `add_noise`. ``prediction`` is static.

    Raises:
        UserError: unknown prediction.
    """
    if prediction == "epsilon":
        return eps
    if prediction == "x0":
        return x0
    if prediction == "velocity":
        return eps - x0
    if prediction == "v":
        return _facing(alpha, x0) * eps - _facing(sigma, x0) * x0
    raise _unknown(prediction)


def to_x0_eps(
    prediction: str, out: Float[AnyArray, " B *shape"], x_t: Float[AnyArray, " B *shape"], alpha: Level, sigma: Level
) -> tuple[Float[AnyArray, " B *shape"], Float[AnyArray, " B *shape"]]:
    """The clean estimate and the noise estimate that a network output stands for.

    For epsilon x0 is divided by alpha: at the end of the cosine schedule (4.9e-5) float32 rounding of ``x_t`` alone
    then moves x0 by 1e-3, and an error of the network by 2e4 times itself. For x0 the noise is divided by sigma, which
    is at least 6e-3 (1e-3 for ``rectified``). v divides by nothing, and velocity by alpha + sigma, at least 1.

    Args:
        out, x_t: (B, ...) network output and its noisy input.
        alpha, sigma: () or (B,).

    Returns:
        (x0, eps), each (B, ...).

    Raises:
        UserError: unknown prediction.
    """
    signal, noise = _facing(alpha, x_t), _facing(sigma, x_t)
    if prediction == "epsilon":
        return (x_t - noise * out) / signal, out
    if prediction == "x0":
        return out, (x_t - signal * out) / noise
    if prediction == "v":
        return signal * x_t - noise * out, noise * x_t + signal * out
    if prediction == "velocity":
        return (x_t - noise * out) / (signal + noise), (x_t + signal * out) / (signal + noise)
    raise _unknown(prediction)


def masked_squares(
    pred: Float[AnyArray, "B *cells C"], target: Float[AnyArray, "..."], valid: Bool[AnyArray, "..."]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The two sums of a mean squared error, float32 (): squares over valid cells and channels, and valid cells.

    Values under invalid cells may be NaN; they reach neither the sums nor their gradients.

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


def mean_of_cells(squares: Float[AnyArray, ""], cells: Float[AnyArray, ""], channels: int) -> Float[Array, ""]:
    """squares / (cells x channels); 0 where there is no cell (``squares`` is 0 then)."""
    return squares / (jnp.where(cells > 0, cells, 1.0) * channels)


def latent_mask(valid: Bool[AnyArray, "*B H W"], factor: int = 8) -> Bool[AnyArray, "*B h w"]:
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
