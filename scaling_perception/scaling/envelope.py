"""Lower envelopes of points: the paper's iterated convex hull (its supplement, section 1).

The procedure: pool all points, take the lower side of their convex hull, fit y = A / x^alpha to it, add the points that
lie below the curve, and fit again until no new point lies below or 20 rounds are over. The paper leaves open in which
space: here hull and least squares are those of log x and log y, and a point lies below when its log y does by more than
1e-6. The hull selects the luckiest points, so that noise pulls it down; a quantile fit (``--loss quantile``) does not.
"""

import itertools
import math

import numpy as np

from scaling_perception.scaling.law_fit import Options, Problem
from scaling_perception.scaling.law_intervals import jackknife_weights, resample_counts
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
    warnings = ["the hull follows the luckiest points: noise pulls it below the law; compare --loss quantile"]
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
