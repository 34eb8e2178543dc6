"""One fit: points centred and scaled, the loss chosen, bootstraps and intervals of the published parameters."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from scaling_perception.scaling.law_forms import Array, Form, make_form
from scaling_perception.scaling.law_intervals import (
    bca_intervals,
    count_clusters,
    expanded_z,
    image_means,
    jackknife_weights,
    percentile_intervals,
    profile_intervals,
    resample_counts,
)  # fmt: skip
from scaling_perception.scaling.law_solver import Best, Loss, fit, jacobian, noise_scale, solve
from scaling_perception.scaling.points import Points

_EFFICIENT = 1.345  # Huber's delta in standard deviations: 95 % of the efficiency of least squares
_LEAST_DELTA = 1e-7
MANY = 20_000
_BLOCKS = 2000
_FEW = 8  # degrees of freedom below which resampling says too little


class Options(NamedTuple):
    """How to fit.

    ``loss``: ``huber``, ``lsq`` or ``quantile`` (of ``tau``). ``delta``: of Huber's loss on log y; None: 1.345 robust
    standard deviations of the residuals. ``bootstraps``: how many; ``level`` of intervals; ``seed`` of all draws;
    ``profile``: also profile-likelihood intervals; ``interval``: which interval is the recommended one.
    """

    loss: str = "huber"
    delta: float | None = None
    tau: float = 0.05
    level: float = 0.95
    bootstraps: int = 2000
    seed: int = 0
    profile: bool = True
    interval: str | None = None


@dataclass(frozen=True)
class Problem:
    """A form over centred log x (v, n) and centred log y (n,), the loss, and the points they come from."""

    form: Form
    lx: Array
    ly: Array
    centre: Array
    scale: float
    loss: Loss
    points: Points

    @staticmethod
    def of(points: Points, form: str, options: Options) -> "Problem":
        """Centre the points and choose the loss."""
        log_x, log_y = np.log(points.x), np.log(points.y)
        centre, middle = log_x.mean(1), float(log_y.mean())
        lx, ly = log_x - centre[:, None], log_y - middle
        made = make_form(form, points.x_names, (float(lx[0].min()), float(lx[0].max())))
        problem = Problem(made, lx, ly, centre, math.exp(middle), Loss(), points)
        return problem.with_loss(choose_loss(problem, options))

    def with_loss(self, loss: Loss) -> "Problem":
        return Problem(self.form, self.lx, self.ly, self.centre, self.scale, loss, self.points)

    def published(self, inner: Array) -> Array:
        """(B, p) to published parameters (B, P)."""
        return self.form.to_published(inner, self.centre, self.scale)

    def residual(self, inner: Array) -> Array:
        """log y - log f (n,)."""
        return self.ly - jacobian(self.form, inner[None], self.lx)[0][0]


def choose_loss(problem: Problem, options: Options) -> Loss:
    """The loss that the options ask for; a first robust fit measures the noise where it is needed."""
    if options.loss == "lsq":
        return Loss()
    if options.loss == "huber" and options.delta is not None:
        return Loss(options.delta)
    lx, ly = problem.lx, problem.ly
    if len(ly) > MANY:
        pick = np.random.default_rng(0).choice(len(ly), MANY // 4, replace=False)
        lx, ly = lx[:, pick], ly[pick]
    rough = fit(problem.form, lx, ly, Loss(0.01), count=4)
    noise = noise_scale(ly - jacobian(problem.form, rough.inner[None], lx)[0][0], problem.form.size)
    if options.loss == "quantile":
        return Loss(max(0.1 * noise if options.delta is None else options.delta, _LEAST_DELTA), options.tau)
    return Loss(max(_EFFICIENT * noise, _LEAST_DELTA))


def fit_problem(problem: Problem, options: Options) -> Best:
    """The best fit over several starts."""
    return fit(problem.form, problem.lx, problem.ly, problem.loss)


def bootstrap(problem: Problem, best: Best, options: Options) -> tuple[Array, Array]:
    """Published parameters of every bootstrap (B, P) and of every jackknife fit (J, P)."""
    rng = np.random.default_rng(options.seed)
    points = problem.points
    if len(points) > MANY:
        return _one_step(problem, best, options, rng)
    weights = resample_counts(points.groups, options.bootstraps, rng)
    ly = problem.ly
    several = len(np.unique(points.groups[0])) > 1
    if points.images is not None:
        means = image_means(points.images, options.bootstraps, rng)
        ly = np.log(np.maximum(means, 1e-300)) - math.log(problem.scale)
        if not points.group_names:
            weights = np.ones_like(weights)  # cells of one model on the same images: images are the units
    start = np.repeat(best.inner[None], options.bootstraps, 0)
    drawn = solve(problem.form, problem.lx, ly, start, problem.loss, weights, tolerance=1e-6)
    if points.images is not None and not (points.group_names and several):
        out = np.log(_images_left_out(points.images)) - math.log(problem.scale)
        start = np.repeat(best.inner[None], len(out), 0)
        left = solve(problem.form, problem.lx, out, start, problem.loss, tolerance=1e-8)
    else:
        left_out = jackknife_weights(points.groups[0], rng)
        start = np.repeat(best.inner[None], len(left_out), 0)
        left = solve(problem.form, problem.lx, problem.ly, start, problem.loss, left_out, tolerance=1e-8)
    return problem.published(drawn.inner), problem.published(left.inner)


def _images_left_out(images: Array) -> Array:
    """Means (J, n) with one image left out each (of more than 200, the first 200)."""
    present = np.isfinite(images)
    total, number = np.where(present, images, 0.0).sum(1), present.sum(1)
    out = []
    for j in range(min(images.shape[1], 200)):
        here = present[:, j] & (number > 1)
        out.append((total - np.where(here, images[:, j], 0.0)) / (number - here))
    return np.maximum(np.array(out), 1e-300)


def _one_step(problem: Problem, best: Best, options: Options, rng: np.random.Generator) -> tuple[Array, Array]:
    """Bootstrap of very many points: one Gauss-Newton step from the estimate, from the sums of each cluster.

    Of more than 2,000 clusters, random blocks of them are drawn instead: they are as independent.
    """
    outer = np.unique(problem.points.groups[0], return_inverse=True)[1]
    units = int(outer.max()) + 1
    if units > _BLOCKS:
        outer, units = (rng.permutation(units) % _BLOCKS)[outer], _BLOCKS
    log_f, jac = jacobian(problem.form, best.inner[None], problem.lx)
    residual, jac = problem.ly - log_f[0], jac[0]
    weight = problem.loss.weights(residual)
    size = problem.form.size
    gradients = np.stack([np.bincount(outer, row * weight * residual, units) for row in jac], 1)
    # The slope of psi, not psi(r) / r: a full Newton step of Huber's loss.
    slope = problem.loss.weights(residual) * (np.abs(residual) <= problem.loss.delta)
    curvature = np.empty((units, size, size))
    for i in range(size):
        for j in range(i, size):
            curvature[:, i, j] = curvature[:, j, i] = np.bincount(outer, jac[i] * jac[j] * slope, units)
    lower, upper = problem.form.bounds()

    def step(counts: Array) -> Array:
        total = np.tensordot(counts, curvature, 1)
        total[:, range(size), range(size)] += 1e-12 * np.trace(total, axis1=1, axis2=2)[:, None]
        moved = np.linalg.solve(total, (counts @ gradients)[..., None])[..., 0]
        return np.clip(best.inner + moved, lower, upper)

    drawn = rng.multinomial(units, np.full(units, 1 / units), options.bootstraps).astype(float)
    left = 1.0 - np.eye(units)[: min(units, 400)]
    return problem.published(step(drawn)), problem.published(step(left))


def intervals(
    problem: Problem, best: Best, estimate: Array, samples: Array, jackknife: Array, options: Options
) -> dict[str, dict[str, Any]]:
    """Of every published parameter its value and its intervals, as the law's JSON has them."""
    clusters = count_clusters(problem.points.groups, problem.form.size)
    z = expanded_z(options.level, clusters)
    percentile = percentile_intervals(samples, z)
    bca = bca_intervals(samples, estimate, jackknife, z)
    profile: dict[str, Any] = {}
    smooth = problem.form.name != "hull" and problem.loss.tau == 0.5 and len(problem.points) <= MANY
    if options.profile and smooth:
        profile = profile_intervals(
            problem.form, best, problem.lx, problem.ly, problem.loss, problem.centre, problem.scale,
            problem.points.groups, options.level,
        )  # fmt: skip
    out = {}
    for j, name in enumerate(problem.form.published):
        found: dict[str, Any] = {"value": float(estimate[j])}
        kinds = {"bootstrap": percentile[j].tolist(), "bca": bca[j].tolist()}
        kinds["profile"] = list(profile[name]) if name in profile else None
        by = options.interval or default_interval(problem)
        by = by if kinds.get(by) is not None else "bootstrap"
        out[name] = {**found, "interval": kinds[by], "by": by, **kinds}
    return out


def default_interval(problem: Problem) -> str:
    """The interval that is recommended: see docs/laws.md for the coverage of each."""
    few = count_clusters(problem.points.groups, problem.form.size).free < _FEW
    return "profile" if few else "bootstrap"


def with_noise(logs: Array, quantiles: Array) -> Array:
    """Every (set, point) with 41 evenly spaced residuals added: (B * 41, n)."""
    noise = np.quantile(quantiles, (np.arange(41) + 0.5) / 41)
    return (logs[:, None, :] + noise[None, :, None]).reshape(-1, logs.shape[1])
