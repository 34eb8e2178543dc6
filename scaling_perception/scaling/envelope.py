"""Lower envelopes of points: the paper's iterated convex hull (its supplement, section 1).

The procedure: pool all points, take the lower side of their convex hull, fit y = A / x^alpha to it, add the points that
lie below the curve, and fit again until no new point lies below or 20 rounds are over. The paper leaves open in which
space: here hull and least squares are those of log x and log y, and a point lies below when its log y does by more than
1e-6. The hull selects the luckiest points, so that noise pulls it down; a quantile fit (``--loss quantile``) does not.

By how much it is pulled down can be simulated where the points scatter about one power law: `corrected_intervals`.
"""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from scaling_perception.scaling.law_fit import Options, Problem, fit_problem
from scaling_perception.scaling.law_intervals import count_clusters, expanded_z, jackknife_weights, resample_counts
from scaling_perception.scaling.law_solver import Best
from scaling_perception.scaling.points import Points

TOLERANCE = 1e-6
ROUNDS = 20
_BOOTSTRAPS = 500


def lower_hull(log_x: np.ndarray, log_y: np.ndarray) -> np.ndarray:
    """Indices of the vertices of the lower convex hull, from left to right."""
    order = np.lexsort((log_y, log_x))
    _, first = np.unique(log_x[order], return_index=True)  # of equal x the lowest
    hull: list[int] = []
    for point in order[first]:
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            turn = (log_x[b] - log_x[a]) * (log_y[point] - log_y[a]) - (log_y[b] - log_y[a]) * (log_x[point] - log_x[a])
            if turn > 0:
                break
            hull.pop()
        hull.append(int(point))
    return np.array(hull)


def iterated_hull(log_x: np.ndarray, log_y: np.ndarray) -> tuple[float, float, np.ndarray, int]:
    """The paper's fit: (log A, alpha) of y = A / x^alpha, indices of the points it rests on, and rounds taken."""
    chosen = lower_hull(log_x, log_y)
    middle = float(log_x.mean())
    log_a = alpha = 0.0
    number = 0
    while number < ROUNDS:
        number += 1
        slope, height = (
            np.polyfit(log_x[chosen] - middle, log_y[chosen], 1) if len(chosen) > 1 else (0.0, log_y[chosen[0]])
        )
        log_a, alpha = float(height - slope * middle), 0.0 - float(slope)
        below = np.flatnonzero(log_y < log_a - alpha * log_x - TOLERANCE)
        fresh = np.setdiff1d(below, chosen)
        if not len(fresh):
            break
        chosen = np.union1d(chosen, fresh)
    return log_a, alpha + 0.0, chosen, number


def _leaves(log_x: np.ndarray, log_y: np.ndarray, keep: np.ndarray) -> tuple[float, float] | None:
    """The fit of the points that are kept; None where they have one x."""
    if len(np.unique(log_x[keep])) < 2:
        return None
    log_a, alpha, _, _ = iterated_hull(log_x[keep], log_y[keep])
    return math.exp(min(max(log_a, -690), 690)), alpha


def fit_hull(points: Points, options: Options) -> tuple[Problem, Best, np.ndarray, np.ndarray, list[str]]:
    """Fit the iterated hull.

    Returns:
        the problem, the fit in inner parameters, published parameters (B, 2) of bootstraps and (J, 2) of the jackknife,
        and warnings.
    """
    problem = Problem.of(points, "hull", Options(loss="lsq"))
    log_x, log_y = problem.lx[0], problem.ly
    log_a, alpha, chosen, rounds = iterated_hull(log_x, log_y)
    inner = np.array([math.exp(log_a), alpha])
    loss = float(0.5 * (problem.residual(inner) ** 2).sum())
    best = Best(inner, loss, inner[None], np.array([loss]))
    rng = np.random.default_rng(options.seed)
    weights = resample_counts(points.groups, min(options.bootstraps, _BOOTSTRAPS), rng)
    drawn = [found for row in weights if (found := _leaves(log_x, log_y, row > 0))]
    left = [found for row in jackknife_weights(points.groups[0], rng) if (found := _leaves(log_x, log_y, row > 0))]
    warnings = []
    if rounds == ROUNDS:
        warnings.append(f"the hull still gained points in round {ROUNDS}: the fit is not the paper's converged one")
    lucky = lucky_pair(log_x, log_y, alpha, lower_hull(log_x, log_y))
    if lucky is not None:
        (first, second), without = lucky
        pair = f"{points.x[0, first]:.3g} and {points.x[0, second]:.3g}"
        warnings.append(
            f"the hull is carried by two points, at {points.x_names[0]} {pair}: without them alpha is {without:.3g}, "
            f"not {alpha:.3g}"
        )
    return problem, best, problem.published(np.array(drawn)), problem.published(np.array(left or drawn)), warnings


class Corrected(NamedTuple):
    """Intervals (2, 2), a row for A and one for alpha, of the law that the points scatter about; its estimate (2,) by
    the hull less its bias; ``pulled``: by how much the hull lies below that law in the middle of the data, log y."""

    intervals: np.ndarray
    estimate: np.ndarray
    pulled: float


def corrected_intervals(points: Points, hull: np.ndarray, options: Options) -> Corrected:
    """Simulate hulls of points about one power law, the robust fit of the mean with residuals drawn again, and take the
    hull's error there for its error here (a basic, or pivotal, interval).

    Residuals are drawn by cluster where there are clusters: a cluster's mean residual, and what is left of each point;
    smoothed, because the hull is made of the lowest and those that were seen end too early.

    Args:
        hull: published A and alpha (2,) of the points' own hull.
    """
    mean = Problem.of(points, "power", Options())
    best = fit_problem(mean, Options())
    law = mean.published(best.inner[None])[0]
    rng = np.random.default_rng(options.seed + 1)
    log_x, count = np.log(points.x[0]), len(points)
    clusters = count_clusters(points.groups, 2)
    residual = mean.residual(best.inner) * math.sqrt(count / max(count - 2, 1))
    codes = np.unique(points.groups[0], return_inverse=True)[1]
    shared = np.bincount(codes, residual) / np.bincount(codes) if not clusters.single else np.zeros(clusters.units)
    own = residual - shared[codes]
    found = []
    for _ in range(min(options.bootstraps, _BOOTSTRAPS)):
        noise = _smooth(shared, clusters.units, rng)[codes] + _smooth(own, count, rng)
        log_y = math.log(law[0]) - law[1] * log_x + noise
        log_a, alpha, _, _ = iterated_hull(log_x, log_y)
        found.append((log_a, alpha))
    drawn = np.array(found)
    off = drawn - [math.log(law[0]), law[1]]
    share = stats.norm.cdf(expanded_z(options.level, clusters))
    here = np.array([math.log(hull[0]), hull[1]])
    ends = here - np.quantile(off, [share, 1 - share], axis=0)
    estimate = here - off.mean(0)
    ends[:, 0], estimate[0] = np.exp(ends[:, 0]), math.exp(estimate[0])
    return Corrected(ends.T, estimate, float(-(off[:, 0] - off[:, 1] * log_x.mean()).mean()))


def correct(parameters: dict[str, dict[str, Any]], points: Points, options: Options) -> list[str]:
    """Add to a hull's ``parameters`` the interval and the value corrected for its bias, and make that interval the
    recommended one; returns what has to be said of it."""
    found = corrected_intervals(points, np.array([one["value"] for one in parameters.values()]), options)
    for one, ends, value in zip(parameters.values(), found.intervals, found.estimate, strict=True):
        one |= {"corrected": ends.tolist(), "corrected_value": float(value)}
        if options.interval in (None, "corrected"):
            one |= {"interval": one["corrected"], "by": "corrected"}
    values = ", ".join(f"{name} {one['corrected_value']:.4g}" for name, one in parameters.items())
    return [
        f"the hull follows the luckiest points: it lies {100 * found.pulled:.2g} % below the law that the "
        f"points scatter about, by simulation; without that bias {values}; compare --loss quantile",
        "corrected intervals are of that law, and hold if the points scatter about one power law; those of the "
        "bootstrap are of the hull, whose curve lies below it",
    ]


def _smooth(values: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` of the values (n,) with normal noise of n^(-1/5) of their deviation, shrunk to that deviation."""
    width = len(values) ** -0.2
    noise = width * values.std() * rng.normal(size=count)
    return (rng.choice(values, count) + noise) / math.sqrt(1 + width**2)


def lucky_pair(
    log_x: np.ndarray, log_y: np.ndarray, alpha: float, hull: np.ndarray
) -> tuple[tuple[int, int], float] | None:
    """The two points of the hull without which the exponent changes most, if by over a quarter: (pair, exponent)."""
    worst = None
    for pair in itertools.combinations(hull[:25].tolist(), 2):
        keep = np.ones(len(log_x), bool)
        keep[list(pair)] = False
        found = _leaves(log_x, log_y, keep)
        if found and (worst is None or abs(found[1] - alpha) > abs(worst[1] - alpha)):
            worst = (pair, found[1])
    return worst if worst and abs(worst[1] - alpha) > 0.25 * max(abs(alpha), 1e-3) else None
