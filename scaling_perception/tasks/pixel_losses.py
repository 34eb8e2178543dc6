"""What decoded pictures of a task cost, in JAX: the losses of training one step end to end (``training/one_step.py``).

Each is (prediction (R, R, 3), truth (R, R, 3), valid bool (R, R), options) -> float32 (), of one pass of one sample, in
the units of the encoded picture (about [-1, 1]). Only valid pixels count, what hides under the others may be anything
that is finite, and a sample without a valid pixel costs 0 and has no gradient.

Garcia et al. 2025 (E2E-FT) train depth and normals so; the gradient term is that of Ranftl et al. 2020 (MiDaS,
equation 11).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from scaling_perception.support.shapes import AnyArray, Array, Bool, Float
from scaling_perception.tasks.samples import TaskOptions

GRADIENT_SCALES = 4  # differences at distances of 1, 2, 4 and 8 pixels
GRADIENT_WEIGHT = 0.5
_CONSTANT = 1e-8  # variance below which a prediction has no scale
_SMOOTH = 1e-12  # under the roots, whose gradient at 0 would be infinite

Picture = Float[AnyArray, "R R 3"]
Mask = Bool[AnyArray, "R R"]


def _mean(values: Float[AnyArray, "H W"], valid: Bool[AnyArray, "H W"]) -> Float[Array, ""]:
    """Mean over valid pixels; 0 where there is none."""
    count = jnp.sum(valid, dtype=jnp.float32)
    return jnp.sum(jnp.where(valid, values, 0.0)) / jnp.where(count > 0, count, 1.0)


def depth_loss(prediction: Picture, truth: Picture, valid: Mask, options: TaskOptions) -> Float[Array, ""]:
    """Mean |e| + 0.5 sum_k mean (|d_x e| + |d_y e|), with e = s d + t - d*; s and t are the least-squares fit.

    d is the mean of the three channels, as when predicting. Differences are taken on every 2^k-th pixel, k = 0..3,
    between neighbours that are both valid. s d + t, and with it the loss, is the same for every a d + b with a not 0. A
    prediction without variance gets s = 0.
    """
    depth, wanted = jnp.mean(prediction, axis=-1), jnp.mean(truth, axis=-1)
    middle, middle_wanted = _mean(depth, valid), _mean(wanted, valid)
    depth, wanted = jnp.where(valid, depth - middle, 0.0), jnp.where(valid, wanted - middle_wanted, 0.0)
    variance = _mean(jnp.square(depth), valid)
    known = variance > _CONSTANT
    scale = jnp.where(known, _mean(depth * wanted, valid) / jnp.where(known, variance, 1.0), 0.0)
    error = scale * depth - wanted
    return _mean(jnp.abs(error), valid) + GRADIENT_WEIGHT * _gradients(error, valid)


def _gradients(error: Float[AnyArray, "R R"], valid: Mask) -> Float[Array, ""]:
    """Mean size of the differences of neighbours, rows and columns, summed over the scales."""
    total = jnp.zeros((), jnp.float32)
    for power in range(GRADIENT_SCALES):
        small, known = error[:: 2**power, :: 2**power], valid[:: 2**power, :: 2**power]
        total += _mean(jnp.abs(small[1:] - small[:-1]), known[1:] & known[:-1])
        total += _mean(jnp.abs(small[:, 1:] - small[:, :-1]), known[:, 1:] & known[:, :-1])
    return total


def flow_loss(prediction: Picture, truth: Picture, valid: Mask, options: TaskOptions) -> Float[Array, ""]:
    """Mean |u - u*| of one component, in encoded units: 1 is ``options.flow_divisor`` pixels of a 512-wide frame.

    The two components of a sample are rows of their own, so that their sum is what bounds the end-point error from
    above: sqrt(du^2 + dv^2) <= |du| + |dv|.
    """
    return _mean(jnp.abs(jnp.mean(prediction - truth, axis=-1)), valid)


def amodal_loss(
    prediction: Picture, truth: Picture, valid: Mask, options: TaskOptions, grey: Sequence[float]
) -> Float[Array, ""]:
    """(1 - soft IoU) + binary cross-entropy of the object's mask + mean |picture - truth| (so that colours stay).

    A pixel's probability is a logistic function of how much darker than ``options.mask_threshold`` it is, which
    is 1/2 at the threshold and 0.02 at white; the true mask is the truth by the threshold (``amodal.mask_from_whole``).
    ``grey``: the weights of the three channels.
    """
    weights = jnp.asarray(grey, jnp.float32)
    width = max(255.0 - options.mask_threshold, 4.0) / 4  # in grey levels
    logit = (options.mask_threshold - _grey(prediction, weights)) / width
    inside = (_grey(jnp.clip(truth, -1, 1), weights) <= options.mask_threshold).astype(jnp.float32)
    share = jax.nn.sigmoid(logit)
    both, either = _mean(share * inside, valid), _mean(share + inside - share * inside, valid)
    iou = jnp.where(either > 0, both / jnp.where(either > 0, either, 1.0), 1.0)
    entropy = _mean(jax.nn.softplus(logit) - inside * logit, valid)
    return 1.0 - iou + entropy + _mean(jnp.mean(jnp.abs(prediction - truth), axis=-1), valid)


def _grey(picture: Picture, weights: Float[Array, 3]) -> Float[Array, "R R"]:
    return (picture.astype(jnp.float32) + 1) * 127.5 @ weights


def normals_loss(prediction: Picture, truth: Picture, valid: Mask, options: TaskOptions) -> Float[Array, ""]:
    """Mean angle to the true normal in radians, 2 atan2(|a - b|, |a + b|) of the unit vectors a and b."""

    def length(vectors: Picture) -> Float[Array, "R R 1"]:
        return jnp.sqrt(jnp.sum(jnp.square(vectors), axis=-1, keepdims=True) + _SMOOTH)

    one, two = prediction / length(prediction), truth / length(truth)
    return _mean(2 * jnp.arctan2(length(one - two), length(one + two))[..., 0], valid)
