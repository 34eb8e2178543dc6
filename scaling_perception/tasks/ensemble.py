"""Many samples of one image into one prediction and a map of how much they disagree.

Depth is known only up to scale and shift, and every member picks its own. Four ways to bring members together:

* ``median``: none; the pixel-wise median of the members as they are.
* ``minmax``: each member stretched to [0, 1], then the median.
* ``lsq`` (default): start at ``minmax``; then, ten times, fit each member to the running median by least squares and
  stretch the median back to [0, 1]. The anchor is applied outside the fit, so nothing can gain by shrinking. Where half
  of the members or more are the reverse of the one that agrees best with all (two members, one of them inside out),
  their median says nothing, and the fit starts at that one instead (``opposed``).
* ``marigold``: the published procedure (Marigold, and the paper's "median compilation"): minimise the sum over pairs of
  members of their root-mean-square difference plus 0.02 (|min| + |1 - max|) of the median, by at most two BFGS steps.
  That objective costs only 0.02 where all scales and shifts are 0, less than any realistic disagreement, so a solver
  that converges shrinks every member to nothing: two steps are part of the method, not a saving. Here the objective and
  its gradient are exact (float64, host); the published code differentiates a float32 value with steps of 1.5e-8 and
  often takes no step at all.

All but ``marigold`` run under jit. Values are relative depth in [0, 1] and the disagreement is on the same scale.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.shapes import AnyArray, Array, Bool, Float, Int, Real

Members = Real[np.ndarray, "..."] | Real[Array, "..."]  # of a shape that the functions check themselves
DEPTH_MODES = ("median", "minmax", "lsq", "marigold")
FLOW_MODES = ("mean", "median")

_SMALLEST_RANGE = 1e-6
_LSQ_ROUNDS = 10
_REVERSE = -0.3  # correlation below which two members are the reverse of each other; unrelated ones are near 0
_NETWORK = 64  # members up to which the median is a network of exchanges; it grows with n log² n


def median(values: Float[AnyArray, " M *shape"], lower: bool = False) -> Float[Array, "*shape"]:
    """Median over the first axis; ``lower`` takes the lower of the two middle values of an even count, as torch does.

    NaN anywhere in a column gives NaN (a sort alone would push it to the end and hide it).
    """
    count = values.shape[0]
    middle = ((count - 1) // 2, (count - 1) // 2 if lower else count // 2)
    if count > _NETWORK:
        rows = jnp.sort(values, axis=0)
        found = 0.5 * rows[middle[0]] + 0.5 * rows[middle[1]]
        return jnp.where(jnp.isnan(values).any(axis=0), jnp.nan, found)

    def select(part: Float[Array, "M n"]) -> Float[Array, " n"]:
        rows = list(part)
        for low, high in exchanges(count, middle):
            rows[low], rows[high] = jnp.minimum(rows[low], rows[high]), jnp.maximum(rows[low], rows[high])
        return 0.5 * rows[middle[0]] + 0.5 * rows[middle[1]]

    # XLA sorts column by column; exchanging whole rows is some fifty times faster on a CPU, and carries NaN along. Two
    # halves, one after the other: a loop is computed once, while XLA would fuse the network into every use of it.
    size = math.prod(values.shape[1:])
    half = (size + 1) // 2
    halves = jnp.pad(values.reshape(count, size), ((0, 0), (0, 2 * half - size))).reshape(count, 2, half)
    return jax.lax.map(select, halves.swapaxes(0, 1)).reshape(-1)[:size].reshape(values.shape[1:])


def exchanges(count: int, wanted: tuple[int, ...]) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, to put in order one after the other, after which the ``wanted`` ranks are in their places.

    Batcher's odd-even merge sort (1968) without the exchanges that no wanted rank depends on.
    """
    pairs = []
    run = 1
    while run < count:
        gap = run
        while gap >= 1:
            for start in range(gap % run, count - gap, 2 * gap):
                for low in range(start, min(start + gap, count - gap)):
                    if low // (2 * run) == (low + gap) // (2 * run):
                        pairs.append((low, low + gap))
            gap //= 2
        run *= 2
    needed, kept = set(wanted), []
    for pair in reversed(pairs):
        if needed.intersection(pair):
            needed.update(pair)
            kept.append(pair)
    return kept[::-1]


def _stretch(values: jax.Array, axes: Any = None) -> tuple[jax.Array, jax.Array]:
    """(values stretched to [0, 1] over ``axes``, the range that was divided by)."""
    low = jnp.min(values, axis=axes, keepdims=True)
    size = jnp.maximum(jnp.max(values, axis=axes, keepdims=True) - low, _SMALLEST_RANGE)
    return (values - low) / size, size


def _fit_to(members: Float[Array, "M H W"], target: Float[Array, "H W"]) -> Float[Array, "M H W"]:
    """Each member (M, H, W) after its least-squares scale and shift to ``target`` (H, W).

    A negative scale would turn a member inside out to agree; it is held at 0, which leaves the target's mean.
    """
    centred = members - jnp.mean(members, axis=(1, 2), keepdims=True)
    level = jnp.mean(target)
    variance = jnp.mean(centred**2, axis=(1, 2), keepdims=True)
    covariance = jnp.mean(centred * (target - level)[None], axis=(1, 2), keepdims=True)
    scale = jnp.maximum(covariance, 0.0) / jnp.maximum(variance, 1e-12)
    return scale * centred + level


def _reduce(
    aligned: Float[Array, " M *shape"], reduction: str, lower: bool
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    if reduction == "mean":
        spread = jnp.std(aligned, axis=0, ddof=1) if aligned.shape[0] > 1 else jnp.zeros_like(aligned[0])
        return jnp.mean(aligned, axis=0), spread
    middle = median(aligned, lower)
    return middle, median(jnp.abs(aligned - middle[None]), lower)


def compile_aligned(
    aligned: Float[AnyArray, "M H W"],
    reduction: str = "median",
    lower_median: bool = False,
    shift_invariant: bool = True,
) -> tuple[Float[Array, "H W"], Float[Array, "H W"]]:
    """Aligned members into one map stretched to [0, 1] and their spread on its scale.

    Args:
        aligned: (M, H, W).
        reduction: ``median`` (spread = median absolute deviation) or ``mean`` (spread = standard deviation).
        shift_invariant: False keeps 0 in place and divides by the maximum alone.

    Returns:
        (prediction (H, W), uncertainty (H, W)), float32.
    """
    prediction, spread = _reduce(aligned, reduction, lower_median)
    low = jnp.min(prediction) if shift_invariant else jnp.zeros((), prediction.dtype)
    size = jnp.maximum(jnp.max(prediction) - low, _SMALLEST_RANGE)
    return (prediction - low) / size, spread / size


def ensemble_depth(
    members: Members, mode: str = "lsq", lower_median: bool | None = None, **marigold: Any
) -> tuple[Float[Array, "H W"], Float[Array, "H W"]]:
    """Depth members into one relative depth and its uncertainty. Jit-able (``mode`` static) except ``marigold``.

    Args:
        members: (M, H, W) relative depth, as decoded.
        mode: ``median``, ``minmax``, ``lsq`` or ``marigold``, see the module. All but ``median`` stretch the result to
            [0, 1].
        lower_median: take the lower middle value for even M, as torch does. None: only in ``marigold``.
        marigold: settings of `marigold_align`.

    Returns:
        (prediction (H, W), uncertainty (H, W)) float32: the median, and the median absolute deviation from it on the
        prediction's scale (0 for one member). A constant result is 0 everywhere. NaN in any member shows in the result.

    Raises:
        UserError: unknown mode.  ValueError: members are not (M, H, W); NaN or infinity in ``marigold``.
    """
    if mode not in DEPTH_MODES:
        raise UserError(f"unknown depth ensembling '{mode}'{did_you_mean(mode, DEPTH_MODES)}")
    if marigold and mode != "marigold":
        raise TypeError(f"settings {sorted(marigold)} belong to mode 'marigold', not '{mode}'")
    _check(members, 3, "depth members (M, H, W)")
    if mode == "marigold":
        lower = True if lower_median is None else lower_median
        params = marigold_align(members, lower_median=lower, **marigold)
        reduction = marigold.get("reduction", "median")
        shift_invariant = marigold.get("shift_invariant", True)
        return compile_aligned(_apply(members, params), reduction, lower, shift_invariant)
    lower = bool(lower_median)
    members = jnp.asarray(members, jnp.float32)
    if mode == "median":
        return _reduce(members, "median", lower)
    stretched, _ = _stretch(members, (1, 2))
    if mode == "minmax":
        return compile_aligned(stretched, lower_median=lower)

    def improve(_: Any, aligned: Float[Array, "M H W"]) -> Float[Array, "M H W"]:
        return _fit_to(stretched, _stretch(median(aligned, lower))[0])

    best, reverse = _agreement(stretched)
    start = jnp.where(reverse, _fit_to(stretched, stretched[best]), stretched)
    return compile_aligned(jax.lax.fori_loop(0, _LSQ_ROUNDS, improve, start), lower_median=lower)


def opposed(members: Members) -> bool:
    """Whether half of the depth members (M, H, W) or more are the reverse of the one that agrees best with all.

    No way of merging makes sense of them then; ``lsq`` follows that one.
    """
    return bool(_agreement(jnp.asarray(members, jnp.float32))[1])


@jax.jit
def _agreement(members: Float[Array, "M H W"]) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """Index of the member (M, H, W) with the largest sum of correlations, and whether half of them oppose it."""
    flat = members.reshape(members.shape[0], -1)
    flat = flat - jnp.mean(flat, axis=1, keepdims=True)
    flat = flat / jnp.maximum(jnp.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
    correlation = jnp.matmul(flat, flat.T, precision=jax.lax.Precision.HIGHEST)
    best = jnp.argmax(correlation.sum(axis=1))
    return best, 2 * jnp.sum(correlation[best] < _REVERSE) >= members.shape[0]


def _apply(members: Members, params: Float[np.ndarray, " params"]) -> Float[Array, "M H W"]:
    """s_i d_i + t_i for params = [s..., t...] (2M,) or [s...] (M,), in float32."""
    members = jnp.asarray(members, jnp.float32)
    count = members.shape[0]
    scale = jnp.asarray(params[:count], jnp.float32).reshape(count, 1, 1)
    if len(params) == count:
        return members * scale
    return members * scale + jnp.asarray(params[count:], jnp.float32).reshape(count, 1, 1)


def _shrink(members: Float[np.ndarray, "M H W"], longest: int | None) -> Float[np.ndarray, "M height width"]:
    """Nearest-exact (centre of each cell) subsampling so that the longer side is at most ``longest``.

    In float32, as torch does it: where a centre falls on the edge of two pixels the rounding decides.
    """
    height, width = members.shape[1:]
    if longest is None or max(height, width) <= longest:
        return members
    sizes = [max(1, side * longest // max(height, width)) for side in (height, width)]
    rows, columns = (
        np.floor((np.arange(new, dtype=np.float32) + np.float32(0.5)) * np.float32(old / new)).astype(int)
        for new, old in zip(sizes, (height, width), strict=True)
    )
    return members[:, rows][:, :, columns]


def marigold_start(members: Real[np.ndarray, "M H W"], shift_invariant: bool = True) -> Float[np.ndarray, " params"]:
    """The published starting point: each member's [0, 1] stretch, [s..., t...]; 1 / max alone without shifts."""
    flat = members.reshape(members.shape[0], -1).astype(np.float64)
    top = flat.max(axis=1)
    if not shift_invariant:
        return 1 / np.maximum(top, _SMALLEST_RANGE)
    low = flat.min(axis=1)
    scale = 1 / np.maximum(top - low, _SMALLEST_RANGE)
    return np.concatenate([scale, -scale * low])


def marigold_objective(
    members: Real[np.ndarray, "M H W"],
    reduction: str = "median",
    lower_median: bool = True,
    regularizer: float = 0.02,
) -> Callable[[Float[np.ndarray, " params"]], tuple[float, Float[np.ndarray, " params"]]]:
    """The published cost with its exact gradient, in float64.

    cost(params) = sum_{i<j} sqrt(mean (a_i - a_j)^2) + regularizer (|min m| + |1 - max m|), where a_i = s_i d_i + t_i
    and m is their pixel-wise median or mean. The pair terms come from members' means and covariances, computed once.

    Args:
        members: (M, H, W).
        reduction: ``median`` or ``mean``.

    Returns:
        params [s..., t...] (2M,), or [s...] (M,) for shifts held at 0 -> (cost, gradient of params' shape).
    """
    count = members.shape[0]
    flat = members.reshape(count, -1).astype(np.float64)
    means = flat.mean(axis=1)
    covariance = np.cov(flat, bias=True).reshape(count, count)
    first, second = np.triu_indices(count, 1)
    rank = [(count - 1) // 2] if lower_median else [(count - 1) // 2, count // 2]

    def reduced_at(aligned: np.ndarray, order: Callable[[np.ndarray], Any]) -> tuple[float, np.ndarray, int]:
        """The reduced map's extreme value, its weights over members, and its pixel."""
        if reduction == "mean":
            pixel = int(order(aligned.mean(axis=0)))
            weights = np.full(count, 1 / count)
        else:
            pixel = int(order(np.sort(aligned, axis=0)[rank].mean(axis=0)))
            chosen = np.argsort(aligned[:, pixel], kind="stable")[rank]
            weights = np.bincount(chosen, minlength=count) / len(rank)
        return float(weights @ aligned[:, pixel]), weights, pixel

    def objective(params: np.ndarray) -> tuple[float, np.ndarray]:
        scale = params[:count]
        shift = params[count:] if len(params) > count else np.zeros(count)
        level = scale * means + shift
        gap = level[first] - level[second]
        variance = (
            scale[first] ** 2 * covariance[first, first]
            + scale[second] ** 2 * covariance[second, second]
            - 2 * scale[first] * scale[second] * covariance[first, second]
        )
        rms = np.sqrt(np.maximum(variance, 0) + gap**2)
        inverse = 1 / np.maximum(rms, 1e-12)  # equal members: the root has a corner, where 0 is a subgradient
        by_scale, by_level = np.zeros(count), np.zeros(count)
        slope = scale[first] * covariance[first, first] - scale[second] * covariance[first, second]
        np.add.at(by_scale, first, slope * inverse)
        slope = scale[second] * covariance[second, second] - scale[first] * covariance[first, second]
        np.add.at(by_scale, second, slope * inverse)
        np.add.at(by_level, first, gap * inverse)
        np.add.at(by_level, second, -gap * inverse)
        cost = float(rms.sum())
        grad_scale, grad_shift = by_scale + by_level * means, by_level
        aligned = scale[:, None] * flat + shift[:, None]
        for order, anchor in ((np.argmin, 0.0), (np.argmax, 1.0)):
            value, weights, pixel = reduced_at(aligned, order)
            cost += regularizer * abs(value - anchor)
            pull = regularizer * np.sign(value - anchor) * weights
            grad_scale, grad_shift = grad_scale + pull * flat[:, pixel], grad_shift + pull
        return cost, np.concatenate([grad_scale, grad_shift]) if len(params) > count else grad_scale

    return objective


def marigold_align(
    members: Members,
    reduction: str = "median",
    lower_median: bool = True,
    max_resolution: int | None = 50,
    max_iterations: int = 2,
    tolerance: float = 1e-3,
    regularizer: float = 0.02,
    shift_invariant: bool = True,
) -> Float[np.ndarray, " params"]:
    """Scales and shifts of the published depth ensembling, by scipy's BFGS on the exact gradient.

    Args:
        members: (M, H, W).
        reduction: ``median`` or ``mean``, for the regulariser's map.
        max_resolution: the longer side at which members are aligned (nearest); None uses all pixels.
        max_iterations: 2 as published. More moves towards the collapsed optimum, see the module.
        shift_invariant: False fits scales alone.

    Returns:
        float64 (2M,) [s..., t...], or (M,) [s...].

    Raises:
        ValueError: NaN or infinity in a member.
    """
    from scipy.optimize import minimize

    pixels = np.asarray(members, np.float32)
    if not np.isfinite(pixels).all():
        raise ValueError("NaN or infinity in a member: its alignment is undefined")
    small = _shrink(pixels, max_resolution)
    start = marigold_start(small, shift_invariant)
    if len(pixels) == 1:
        return start
    objective = marigold_objective(small, reduction, lower_median, regularizer)
    options = {"maxiter": max_iterations}
    return minimize(objective, start, jac=True, method="BFGS", tol=tolerance, options=options).x


def ensemble_flow(members: Members, mode: str = "mean") -> tuple[Float[Array, "H W 2"], Float[Array, "H W"]]:
    """Flow members into one flow and its uncertainty in pixels. Jit-able.

    Args:
        members: (M, H, W, 2) pixels.
        mode: ``mean`` (as the authors' code) or ``median`` of each component.

    Returns:
        (flow (H, W, 2), uncertainty (H, W)) float32. Uncertainty is the root mean square (``mean``) or the median
        (``median``) over members of the distance to the result; 0 for one member.

    Raises:
        UserError: unknown mode.  ValueError: members are not (M, H, W, 2).
    """
    if mode not in FLOW_MODES:
        raise UserError(f"unknown flow ensembling '{mode}'{did_you_mean(mode, FLOW_MODES)}")
    _check(members, 4, "flow members (M, H, W, 2)", channels=2)
    members = jnp.asarray(members, jnp.float32)
    flow = jnp.mean(members, axis=0) if mode == "mean" else median(members)
    square = jnp.sum((members - flow[None]) ** 2, axis=-1)
    spread = jnp.sqrt(jnp.mean(square, axis=0)) if mode == "mean" else median(jnp.sqrt(square))
    return flow, spread


def ensemble_amodal(members: Members) -> tuple[Float[Array, "H W 3"], Float[Array, "H W"]]:
    """Pixel-wise median of whole-object pictures, to be thresholded into the mask afterwards. Jit-able.

    Args:
        members: (M, H, W, 3) RGB in [-1, 1].

    Returns:
        (RGB (H, W, 3), uncertainty (H, W)) float32; uncertainty is the median absolute deviation, mean over colours.

    Raises:
        ValueError: members are not (M, H, W, 3).
    """
    _check(members, 4, "amodal members (M, H, W, 3)", channels=3)
    middle, spread = _reduce(jnp.asarray(members, jnp.float32), "median", False)
    return middle, jnp.mean(spread, axis=-1)


jitted_depth = jax.jit(ensemble_depth, static_argnums=1)
jitted_flow = jax.jit(ensemble_flow, static_argnums=1)
jitted_amodal = jax.jit(ensemble_amodal)


def _check(members: Members, ndim: int, wanted: str, channels: int | None = None) -> None:
    shape = np.shape(members)
    if len(shape) != ndim or shape[0] < 1 or (channels is not None and shape[-1] != channels):
        raise ValueError(f"expected {wanted} with at least one member, not an array of shape {shape}")
