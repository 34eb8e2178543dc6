"""Fitting a form: a grid with the linear part solved, batched damped Gauss-Newton, and L-BFGS on the best starts.

The loss is Huber's on the error of log y, optionally asymmetric, so that the same code fits a mean and a quantile.
``solve`` fits thousands of parameter sets at once over the same x (bootstraps, profiles, starts), in plain numpy.
"""

import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from scipy import optimize

from scaling_perception.scaling.law_forms import Array, Form

_CHUNK_NUMBERS = 1 << 17  # of (sets, points) handled at once: the arrays of one chunk stay in the cache
_GRID_POINTS = 2000
_STARTS = 12


class Loss(NamedTuple):
    """``w(r) * huber(r; delta)`` of r = log y - log f, with w = 2 tau above the curve and 2 (1 - tau) below it.

    Huber's function is r^2 / 2 up to ``delta``, then delta (|r| - delta / 2). ``delta`` inf: least squares; ``tau``
    0.5: symmetric; a small ``tau`` and ``delta``: the lower quantile.
    """

    delta: float = math.inf
    tau: float = 0.5

    def values(self, r: Array) -> Array:
        size = np.abs(r)
        inside = np.minimum(size, self.delta)
        return self._sides(r) * inside * (size - 0.5 * inside)

    def weights(self, r: Array) -> Array:
        """psi(r) / r, the weights of iteratively reweighted least squares."""
        if math.isinf(self.delta):
            return self._sides(r) * np.ones_like(r)
        return self._sides(r) * self.delta / np.maximum(np.abs(r), self.delta)

    def _sides(self, r: Array) -> Array | float:
        return 1.0 if self.tau == 0.5 else np.where(r > 0, 2 * self.tau, 2 * (1 - self.tau))


class Fitted(NamedTuple):
    """Parameter sets (B, p) and the loss of each (B,), a weighted sum over points."""

    inner: Array
    loss: Array


def jacobian(form: Form, inner: Array, lx: Array) -> tuple[Array, Array]:
    """log f (B, n) and its derivatives (B, p, n) by the inner parameters."""
    count = len(form.terms)
    coefficients, theta = inner[:, :count], inner[:, count:]
    terms, slopes = form.basis(theta, lx)
    total = np.zeros((len(inner), lx.shape[1]))
    for k, term in enumerate(terms):
        total += coefficients[:, k, None] * term
    total = np.maximum(total, 1e-300)
    derivatives = np.empty((len(inner), form.size, lx.shape[1]))
    ratios = [term / total for term in terms]
    for k, ratio in enumerate(ratios):
        derivatives[:, k] = ratio
    for j, parts in enumerate(slopes):
        derivatives[:, count + j] = sum(coefficients[:, k, None] * ratios[k] * slope for k, slope in parts)
    return np.log(total), derivatives


def solve(
    form: Form,
    lx: Array,
    ly: Array,
    start: Array,
    loss: Loss,
    weights: Array | None = None,
    fixed: Array | None = None,
    iterations: int = 80,
    tolerance: float = 1e-9,
) -> Fitted:
    """Fit B parameter sets from ``start`` (B, p), each with its own weights, by damped Gauss-Newton within the bounds.

    Args:
        lx: centred log x (v, n). ly: centred log y, (n,) or (B, n).
        weights: of points, (n,) or (B, n); None: ones.
        fixed: (p,) of bool: parameters that keep their starting value.
        tolerance: a set is finished when an accepted step lowers its loss by less than this share of it.
    """
    batch, points = len(start), lx.shape[1]
    size = max(1, _CHUNK_NUMBERS // max(points, 1))
    ranges = [slice(at, min(at + size, batch)) for at in range(0, batch, size)]

    def part(one: slice) -> Fitted:
        y = ly if ly.ndim == 1 else ly[one]
        w = weights if weights is None or weights.ndim == 1 else weights[one]
        return _solve_chunk(form, lx, y, start[one], loss, w, fixed, iterations, tolerance)

    if len(ranges) == 1:
        return part(ranges[0])
    with ThreadPoolExecutor(min(len(ranges), os.cpu_count() or 1)) as pool:
        parts = list(pool.map(part, ranges))
    return Fitted(np.concatenate([p.inner for p in parts]), np.concatenate([p.loss for p in parts]))


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # a step too far is not taken
def _solve_chunk(
    form: Form,
    lx: Array,
    ly: Array,
    start: Array,
    loss: Loss,
    weights: Array | None,
    fixed: Array | None,
    iterations: int,
    tolerance: float,
) -> Fitted:
    lower, upper = form.bounds()
    held = np.zeros(form.size, bool) if fixed is None else fixed
    count = len(start)
    ly = np.broadcast_to(ly, (count, lx.shape[1]))
    weights = np.broadcast_to(np.ones(1) if weights is None else weights, ly.shape)
    best = np.where(held, start, np.clip(start, lower, upper))
    log_f, jac = jacobian(form, best, lx)
    residual = ly - log_f
    value = (weights * loss.values(residual)).sum(1)
    out, out_value = best.copy(), value.copy()
    damping = np.full(count, 1e-3)
    alive = np.arange(count)
    for _ in range(iterations):
        step = _step(jac, weights * loss.weights(residual), residual, best, (lower, upper, held), damping)
        trial = np.where(held, best, np.clip(best + step, lower, upper))
        new_log, new_jac = jacobian(form, trial, lx)
        new_residual = ly - new_log
        new_value = (weights * loss.values(new_residual)).sum(1)
        better = new_value < value
        gain = np.where(better, value - new_value, 0.0)
        small = (better & (gain <= tolerance * value)) | (~better & (damping > 1e6)) | (value <= 1e-24)
        small |= ~better & (np.abs(trial - best).max(1) <= 1e-11)
        best = _where(better[:, None], trial, best)
        value = _where(better, new_value, value)
        residual = _where(better[:, None], new_residual, residual)
        jac[better] = new_jac[better]
        damping = np.clip(_where(better, damping * 0.2, damping * 6), 1e-9, 1e8)
        out[alive], out_value[alive] = best, value
        if small.any():
            keep = ~small
            if not keep.any():
                break
            running = (alive, best, value, residual, damping, jac, ly, weights)
            alive, best, value, residual, damping, jac, ly, weights = _rows(keep, running)
    return Fitted(out, out_value)


def _step(
    jac: Array, weighted: Array, residual: Array, at: Array, within: tuple[Array, Array, Array], damping: Array
) -> Array:
    """The damped step of each set from ``at`` (B, p); ``within``: lower and upper bounds, and what is held."""
    lower, upper, held = within
    diagonal = np.arange(at.shape[1])
    gradient = np.matmul(jac, (weighted * residual)[:, :, None])[:, :, 0]
    normal = np.matmul(jac * weighted[:, None], jac.transpose(0, 2, 1))
    stuck = held | ((at <= lower) & (gradient < 0)) | ((at >= upper) & (gradient > 0))
    gradient[stuck] = 0.0
    normal[stuck[:, :, None] | stuck[:, None, :]] = 0.0
    scale = normal[:, diagonal, diagonal]
    scale = np.where(stuck, 1.0, scale + 1e-12 * scale.max(1, keepdims=True) + 1e-30)
    normal[:, diagonal, diagonal] += damping[:, None] * scale + stuck + 1e-14 * scale
    root = 1 / np.sqrt(normal[:, diagonal, diagonal])
    return root * np.linalg.solve(normal * root[:, :, None] * root[:, None, :], (root * gradient)[:, :, None])[..., 0]


def _where(take: Array, new: Array, old: Array) -> Array:
    # with a declared type: from one turn of the loop to the next a type checker would infer it for a long time
    return np.where(take, new, old)


def _rows(keep: Array, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(array[keep] for array in arrays)


def _project(form: Form, theta: Array, lx: Array, ly: Array) -> tuple[Array, Array]:
    """For each theta (G, q) the best non-negative coefficients (G, K) for relative errors, and the sum of squares (G,).

    The active set is found by trying all of them: a form has at most six terms.
    """
    count = len(form.terms)
    terms, _ = form.basis(theta, lx)
    inverse = np.exp(-ly)
    stack = np.stack([np.broadcast_to(term, (len(theta), lx.shape[1])) * inverse for term in terms], 1)
    normal = np.matmul(stack, stack.transpose(0, 2, 1))
    right = stack.sum(2)
    best = np.zeros((len(theta), count))
    squares = np.full(len(theta), float(lx.shape[1]))
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            index = np.array(chosen)
            part = normal[:, index[:, None], index]
            ridge = 1e-12 * np.trace(part, axis1=1, axis2=2)[:, None, None] * np.eye(size)
            found = np.linalg.solve(part + ridge, right[:, index, None])[..., 0]
            sums = lx.shape[1] - (found * right[:, index]).sum(1)
            use = (found >= 0).all(1) & (sums < squares)
            squares = _where(use, sums, squares)
            filled = np.zeros_like(best)
            filled[:, index] = found
            best = _where(use[:, None], filled, best)
    return best, squares


def starts(form: Form, lx: Array, ly: Array, count: int = _STARTS) -> Array:
    """The ``count`` best distinct points of the form's grid, with their coefficients: (S, p)."""
    points = lx.shape[1]
    if points > _GRID_POINTS:
        pick = np.random.default_rng(0).choice(points, _GRID_POINTS, replace=False)
        lx, ly = lx[:, pick], ly[pick]
    grid = np.array(list(itertools.product(*form.grid)))
    found, sums = [], []
    size = max(1, (1 << 21) // (lx.shape[1] * len(form.terms)))
    for at in range(0, len(grid), size):
        coefficients, squares = _project(form, grid[at : at + size], lx, ly)
        found.append(coefficients)
        sums.append(squares)
    coefficients, squares = np.concatenate(found), np.concatenate(sums)
    least = 1e-3 * np.exp(ly.min())  # a term of exactly zero has no slope by its exponent: begin a little above
    inner = np.concatenate([np.maximum(coefficients, least), grid], 1)
    return inner[np.argsort(squares, kind="stable")[:count]]


class Best(NamedTuple):
    """The best fit (p,), its loss (sum over points), and what every start reached: (S, p) and (S,)."""

    inner: Array
    loss: float
    reached: Array
    losses: Array


def fit(form: Form, lx: Array, ly: Array, loss: Loss, begin: Array | None = None, count: int = _STARTS) -> Best:
    """Fit from the best points of the grid (or from ``begin``, (S, p)): Gauss-Newton on all, then L-BFGS on the best.

    Of over 20,000 points the starts are tried on a subset, and the best one goes on with all.
    """
    begin = starts(form, lx, ly, count) if begin is None else np.atleast_2d(begin)
    points = lx.shape[1]
    if points > 20000:
        pick = np.random.default_rng(0).choice(points, 5000, replace=False)
        tried = solve(form, lx[:, pick], ly[pick], begin, loss, tolerance=1e-12)
        order = np.argsort(tried.loss, kind="stable")
        final = solve(form, lx, ly, tried.inner[order[:1]], loss, iterations=30)
        share = points / len(pick)
        return Best(final.inner[0], float(final.loss[0]), tried.inner[order], tried.loss[order] * share)
    found = solve(form, lx, ly, begin, loss, iterations=200, tolerance=1e-12)
    order = np.argsort(found.loss, kind="stable")
    inner, value = found.inner[order[0]].copy(), float(found.loss[order[0]])
    if value > 1e-20 * points:
        for _ in range(2):
            polished, reached = _lbfgs(form, lx, ly, loss, inner)
            again = solve(form, lx, ly, polished[None], loss, iterations=100, tolerance=1e-14)
            candidates = [(value, inner), (reached, polished), (float(again.loss[0]), again.inner[0])]
            better, chosen = min(candidates, key=lambda one: one[0])
            done = value - better <= 1e-10 * value
            inner, value = chosen, better
            if done:
                break
    shape = inner[len(form.terms) :]
    shape[np.abs(shape) < 1e-12] = 0.0  # equal errors: the exponent is zero, not 1e-29
    return Best(inner, value, found.inner[order], found.loss[order])


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def _lbfgs(form: Form, lx: Array, ly: Array, loss: Loss, start: Array) -> tuple[Array, float]:
    lower, upper = form.bounds()
    _, jac = jacobian(form, start[None], lx)
    scale = 1 / np.maximum(np.sqrt((jac[0] ** 2).mean(1)), 1e-6)

    def objective(z: Array) -> tuple[float, Array]:
        log_f, jac = jacobian(form, np.clip(z * scale, lower, upper)[None], lx)
        r = ly - log_f[0]
        return float(loss.values(r).mean()), -(jac[0] @ (loss.weights(r) * r)) / len(r) * scale

    at = start / scale
    first, slope = objective(at)
    unit = max(abs(first), 1e-300)
    result = optimize.minimize(
        lambda z: tuple(v / unit for v in objective(z)),
        at,
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(lower / scale, upper / scale, strict=True)),
        options={"maxiter": 500, "ftol": 1e-15, "gtol": 1e-12},
    )
    inner = np.clip(result.x * scale, lower, upper)
    return inner, float(loss.values(ly - jacobian(form, inner[None], lx)[0][0]).sum())


def noise_scale(residual: Array, parameters: int) -> float:
    """A robust standard deviation of residuals, corrected for the fitted parameters."""
    points = len(residual)
    free = max(points - parameters, 1)
    spread = 1.4826 * float(np.median(np.abs(residual)))
    return spread * math.sqrt(points / free)
