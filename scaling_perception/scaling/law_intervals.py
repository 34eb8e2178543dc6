"""Intervals of a fitted law: bootstrap clustered by run, seed and image (percentile and BCa), and profile likelihood.

Percentile and BCa intervals use the level that Student's t and the number of clusters ask for (Hesterberg's expanded
percentiles): with few clusters plain percentiles are too narrow.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from scaling_perception.scaling.law_forms import Array, Form
from scaling_perception.scaling.law_solver import Best, Loss, jacobian, solve

_JACKKNIFE = 200
_PROFILE_STEPS = 24


def resample_counts(groups: Sequence[Array], count: int, rng: np.random.Generator) -> Array:
    """How often each point is drawn in each of ``count`` bootstraps: (count, n).

    Args:
        groups: codes (n,) from the outermost level inwards, such as runs, then seeds: clusters of the first level are
            drawn with replacement, then as many clusters of the second level inside each drawn one, and so on. What
            the innermost clusters hold stays together.
    """
    outer = np.unique(groups[0], return_inverse=True)[1]
    drawn = rng.multinomial(outer.max() + 1, np.full(outer.max() + 1, 1 / (outer.max() + 1)), count)
    for level in groups[1:]:
        pairs, inner = np.unique(np.stack([outer, level]), axis=1, return_inverse=True)
        inner = inner.reshape(-1)
        counts = np.empty((count, pairs.shape[1]), np.int64)
        for parent in range(drawn.shape[1]):
            children = np.flatnonzero(pairs[0] == parent)
            number = len(children)
            counts[:, children] = rng.multinomial(drawn[:, parent] * number, np.full(number, 1 / number))
        outer, drawn = inner, counts
    return drawn[:, outer].astype(float)


def image_means(values: Array, count: int, rng: np.random.Generator) -> Array:
    """Means over images drawn with replacement, the same images for every point: (count, n) from values (n, images).

    NaN where a point does not have an image. A point that has none of the drawn images keeps its own mean.
    """
    images = values.shape[1]
    drawn = rng.multinomial(images, np.full(images, 1 / images), count).astype(float)
    present = np.isfinite(values)
    total, number = drawn @ np.where(present, values, 0.0).T, drawn @ present.T.astype(float)
    own = np.nanmean(values, 1)
    return np.where(number > 0, total / np.maximum(number, 1), own)


class Clusters(NamedTuple):
    """How many independent units there are and how many of them the fit uses up."""

    units: int
    free: int
    single: bool  # each unit is one point


def count_clusters(groups: Sequence[Array], parameters: int) -> Clusters:
    """Units of the outermost level, and degrees of freedom for t."""
    points = len(groups[0])
    units = len(np.unique(groups[0]))
    single = units == points
    free = points - parameters if single else min(points - parameters, units - 1)
    return Clusters(units, max(free, 1), single)


def expanded_z(level: float, clusters: Clusters) -> float:
    """The normal quantile at which percentiles are taken: t's, widened for the degrees of freedom that the fit used."""
    units = clusters.units
    used = units - clusters.free if clusters.single else 1
    widen = math.sqrt(units / max(units - used, 1))
    return float(min(special.stdtrit(clusters.free, 0.5 + level / 2) * widen, 8.0))


def percentile_intervals(samples: Array, z: float) -> Array:
    """(P, 2) of samples (B, P)."""
    return np.quantile(samples, special.ndtr([-z, z]), axis=0).T


def bca_intervals(samples: Array, estimate: Array, jackknife: Array, z: float) -> Array:
    """Bias-corrected accelerated intervals: (P, 2) from samples (B, P), estimate (P,) and jackknife values (J, P)."""
    out = np.empty((samples.shape[1], 2))
    for j in range(samples.shape[1]):
        column, tolerance = samples[:, j], 1e-12 * max(abs(estimate[j]), 1e-300)
        below = np.mean(column < estimate[j] - tolerance) + 0.5 * np.mean(np.abs(column - estimate[j]) <= tolerance)
        bias = special.ndtri(np.clip(below, 0.5 / len(column), 1 - 0.5 / len(column)))
        away = jackknife[:, j].mean() - jackknife[:, j]
        away = away / max(float(np.abs(away).max()), 1e-300)
        spread = float((away**2).sum())
        speed = float((away**3).sum()) / (6 * spread**1.5) if spread > 1e-300 else 0.0
        ends = []
        for side in (-z, z):
            whole = bias + side
            bent = 1 - speed * whole
            ends.append(special.ndtr(bias + whole / bent) if bent > 0.05 else special.ndtr(math.copysign(8, side)))
        out[j] = np.quantile(column, ends)
    return out


def jackknife_weights(outer: Array, rng: np.random.Generator) -> Array:
    """Weights (J, n) that leave out one cluster each; of more than 200 clusters, one of 200 random blocks."""
    codes = np.unique(outer, return_inverse=True)[1]
    units = codes.max() + 1
    if units > _JACKKNIFE:
        codes = (rng.permutation(units) % _JACKKNIFE)[codes]
    return (codes[None] != np.arange(codes.max() + 1)[:, None]).astype(float)


def robust_scale(residual: Array, loss: Loss, parameters: int) -> float:
    """Twice a difference of losses times this is about chi-squared with one degree of freedom."""
    points = len(residual)
    spread = 1.4826 * float(np.median(np.abs(residual))) + 1e-300

    def influence(r: Array) -> Array:
        return loss.weights(r) * r

    width = max(spread * points**-0.2, 1e-12) if math.isfinite(loss.delta) else spread
    slope = float((influence(residual + width) - influence(residual - width)).mean()) / (2 * width)
    variance = float((influence(residual) ** 2).sum()) / max(points - parameters, 1)
    return slope / max(variance, 1e-300)


def covariance(form: Form, inner: Array, lx: Array, ly: Array, loss: Loss, groups: Sequence[Array]) -> tuple:
    """Covariance of the inner parameters for independent points (p, p), and the ratio (p,) of variances by cluster.

    The ratio is 1 where every cluster is one point; above 1, points of one cluster err together.
    """
    log_f, jac = jacobian(form, inner[None], lx)
    residual, jac = ly - log_f[0], jac[0]
    scale = np.maximum(np.sqrt((jac**2).sum(1)), 1e-12)
    unit = jac / scale[:, None]
    inverse = np.linalg.pinv(unit @ unit.T, rcond=1e-12)
    scores = unit * (loss.weights(residual) * residual)
    codes = np.unique(groups[0], return_inverse=True)[1]
    units = codes.max() + 1
    sums = np.stack([np.bincount(codes, row, units) for row in scores])
    alone = np.diag(inverse @ (scores @ scores.T) @ inverse)
    together = np.diag(inverse @ (sums @ sums.T) @ inverse) * units / max(units - 1, 1)
    ratio = np.ones(len(inner)) if units == len(ly) or units < 2 else together / np.maximum(alone, 1e-300)
    variance = float((loss.weights(residual) * residual**2).sum()) / max(len(ly) - len(inner), 1)
    return inverse / np.outer(scale, scale) * variance, np.maximum(ratio, 1.0)


class Profiled(NamedTuple):
    """A parameter whose profile is taken: its inner name's index at the fit ``at``, over log x ``shifted`` so that the
    two are the same, and what turns a difference of losses into the statistic that ``threshold`` is of."""

    name: str
    at: Array
    lx: Array
    index: int
    kind: str
    cov: Array
    factor: float
    threshold: float


class Profile(NamedTuple):
    """The profile of a published parameter: values (K,), the statistic (K,), its threshold; ends (None: open)."""

    values: Array
    statistic: Array
    threshold: float
    ends: tuple[float | None, ...]


def _profiled(
    form: Form, best: Best, lx: Array, ly: Array, loss: Loss, centre: Array, groups: Sequence[Array], level: float
) -> Iterator[Profiled]:
    residual = ly - jacobian(form, best.inner[None], lx)[0][0]
    if float(np.abs(residual).max()) < 1e-10:  # exact data: every interval is its value
        return
    factor = 2 * robust_scale(residual, loss, form.size)
    limit = float(special.fdtri(1, count_clusters(groups, form.size).free, level))
    for name, (inner_name, zeroed, kind) in form.profiles.items():
        delta = np.zeros(len(lx))
        delta[list(zeroed)] = centre[list(zeroed)]
        at = form.shift(best.inner[None], delta)[0]
        shifted = lx + delta[:, None]
        index = form.inner.index(inner_name)
        cov, ratio = covariance(form, at, shifted, ly, loss, groups)
        yield Profiled(name, at, shifted, index, kind, cov, factor, limit * ratio[index])


def _profile_ends(form: Form, one: Profiled, ly: Array, loss: Loss, least: float) -> list[float | None]:
    return [_profile_end(form, one.at, least, one.lx, ly, loss, one.index, side, one.cov, one.factor, one.threshold)
            for side in (-1, 1)]  # fmt: skip


def profile_intervals(
    form: Form, best: Best, lx: Array, ly: Array, loss: Loss, centre: Array, scale: float,
    groups: Sequence[Array], level: float,
) -> dict[str, tuple[float | None, ...]]:  # fmt: skip
    """Profile-likelihood intervals of the published parameters that have one; an end is None where the data set none.

    Each parameter is held at values around its estimate and the others are fitted again; the interval holds the values
    whose loss is not significantly larger (for Huber's loss the robust tau test, F-distributed; where points come in
    clusters, the threshold is widened by the ratio of the clustered to the independent variance).
    """
    out: dict[str, tuple[float | None, ...]] = {}
    for one in _profiled(form, best, lx, ly, loss, centre, groups, level):
        ends = _profile_ends(form, one, ly, loss, best.loss)
        out[one.name] = tuple(None if e is None else _outward(e, one.kind, scale, float(centre[0])) for e in ends)
    return out


def profile_curves(
    form: Form, best: Best, lx: Array, ly: Array, loss: Loss, centre: Array, scale: float,
    groups: Sequence[Array], level: float, count: int = 31,
) -> dict[str, Profile]:  # fmt: skip
    """The curves behind `profile_intervals`, from half as far again below the interval to as far above it."""
    out = {}
    lower, upper = form.bounds()
    for one in _profiled(form, best, lx, ly, loss, centre, groups, level):
        ends = _profile_ends(form, one, ly, loss, best.loss)
        middle, spread = float(one.at[one.index]), math.sqrt(max(one.cov[one.index, one.index], 1e-30))
        low, high = (
            middle + side * 4 * spread if e is None else middle + 1.5 * (e - middle)
            for side, e in zip((-1, 1), ends, strict=True)
        )
        values = np.union1d(np.linspace(low, high, count), [middle])
        values = np.unique(np.clip(values, lower[one.index], upper[one.index]))
        held = np.zeros(form.size, bool)
        held[one.index] = True
        plain = np.repeat(one.at[None], len(values), 0)
        slope = one.cov[:, one.index] / max(one.cov[one.index, one.index], 1e-300)
        moved = np.clip(one.at + np.outer(values - middle, slope), lower, upper)
        plain[:, one.index] = moved[:, one.index] = values
        starts = (moved, plain)
        losses = [solve(form, one.lx, ly, x, loss, fixed=held, iterations=120, tolerance=1e-11).loss for x in starts]
        statistic = np.maximum(one.factor * (np.minimum(*losses) - best.loss), 0.0)
        first = float(centre[0])
        shown = np.array([_outward(float(value), one.kind, scale, first) for value in values])
        outward = tuple(None if e is None else _outward(e, one.kind, scale, first) for e in ends)
        out[one.name] = Profile(shown, statistic, one.threshold, outward)
    return out


def _outward(value: float, kind: str, scale: float, centre: float) -> float:
    """An inner value as a published one; see ``Form.profiles``."""
    if kind in ("exp", "place"):
        return math.exp(value + (centre if kind == "place" else 0.0))
    return float(value * scale if kind == "scale" else value)


def _profile_end(form, at, least, lx, ly, loss, index, side, cov, factor, threshold) -> float | None:
    lower, upper = (bound[index] for bound in form.bounds())
    limit = upper if side > 0 else lower
    coefficient = index < len(form.terms)
    error = math.sqrt(max(cov[index, index], 1e-30))
    if coefficient:
        error = min(error, 2 * abs(at[index]) + 1e-6)
    held = np.zeros(form.size, bool)
    held[index] = True
    direction = cov[:, index] / max(cov[index, index], 1e-300)
    start, reach = at, 5 * error * math.sqrt(max(threshold / 4, 1))
    for _ in range(6):
        offsets = np.linspace(0, reach, _PROFILE_STEPS + 1)[1:]
        values = at[index] + side * offsets
        if coefficient and side > 0 and reach > 2 * abs(at[index]):  # over decades: geometric steps
            values = at[index] + np.geomspace(reach / 1e3, reach, _PROFILE_STEPS)
        values = np.clip(values, lower, upper)
        begin = np.clip(start + np.outer(values - start[index], direction), *form.bounds())
        plain = np.repeat(start[None], len(values), 0)
        begin[:, index] = plain[:, index] = values
        both = [solve(form, lx, ly, one, loss, fixed=held, iterations=120, tolerance=1e-11) for one in (begin, plain)]
        losses = np.minimum(both[0].loss, both[1].loss)
        root = np.sqrt(np.maximum(factor * (losses - least), 0.0))
        over = np.flatnonzero(root >= math.sqrt(threshold))
        if len(over):
            first = over[0]
            left = (at[index], 0.0) if first == 0 else (values[first - 1], root[first - 1])
            share = (math.sqrt(threshold) - left[1]) / max(root[first] - left[1], 1e-300)
            return float(left[0] + share * (values[first] - left[0]))
        if values[-1] == limit:
            return float(limit) if math.isfinite(limit) else None
        reach *= 4
    return None
