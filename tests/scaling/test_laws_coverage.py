"""Simulated coverage of every form's intervals, and the bias of hull and quantile fits: the figures of docs/laws.md.

`python -m pytest -m slow -s tests/scaling/test_laws_coverage.py` prints the tables.
"""

import numpy as np
import pytest
from synthetic_laws import TRUTHS, made

from scaling_perception.scaling.envelope import iterated_hull
from scaling_perception.scaling.law_fit import Options, Problem, bootstrap, fit_problem, intervals
from scaling_perception.scaling.laws import fit_law
from scaling_perception.scaling.points import Points

SETS = 200
DESIGNS = {  # points and noise (standard deviation of log y) of one data set
    "power": (40, 0.05),
    "power_floor": (60, 0.02),
    "broken": (100, 0.01),
    "additive": (100, 0.01),
    "joint": (120, 0.005),
    "kaplan": (60, 0.02),
    "test_time": (120, 0.02),
    "upcycling": (100, 0.01),
}
OPTIONS = Options(bootstraps=500)
QUICK = Options(bootstraps=500, profile=False)


def coverage(form: str, sets: int = SETS) -> dict[str, dict[str, float]]:
    """Share of data sets whose 95 % interval holds the truth: {kind of interval: {parameter: share}}."""
    points, noise = DESIGNS[form]
    truth = TRUTHS[form][0]
    hits: dict[str, dict[str, list[bool]]] = {}
    for seed in range(sets):
        problem = Problem.of(made(form, points, noise, seed), form, OPTIONS)
        best = fit_problem(problem, OPTIONS)
        samples, jackknife = bootstrap(problem, best, OPTIONS)
        estimate = problem.published(best.inner[None])[0]
        found = intervals(problem, best, estimate, samples, jackknife, OPTIONS)
        for (name, one), true in zip(found.items(), truth, strict=True):
            for kind in ("interval", "bootstrap", "bca", "profile"):
                if one[kind] is not None:
                    low, high = one[kind]
                    inside = (low is None or low <= true) and (high is None or true <= high)
                    hits.setdefault(kind, {}).setdefault(name, []).append(inside)
    return {kind: {name: float(np.mean(one)) for name, one in by.items()} for kind, by in hits.items()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("form", DESIGNS)
def test_intervals_cover_the_truth(form):
    found = coverage(form)
    for kind, shares in found.items():
        shown = "  ".join(f"{name} {100 * share:.1f}" for name, share in shares.items())
        print(f"\n{form:12s} {kind:10s} {shown}", end="")
    assert all(0.90 <= share <= 0.98 for share in found["interval"].values()), found["interval"]


def envelope_bias(noise: float, sets: int = 60, points: int = 60) -> dict[str, tuple[float, float]]:
    """Mean error of the exponent and of log y in the middle of the data, of a hull, 5 % quantile and mean fit of points
    about a power law. The quantile fit is held against the true 5 % quantile, the others against the law."""
    errors: dict[str, list[tuple[float, float]]] = {}
    _, ((low, high),) = TRUTHS["power"]
    a, alpha = TRUTHS["power"][0]
    middle = 0.5 * (np.log(low) + np.log(high))
    for seed in range(sets):
        data = made("power", points, noise, seed)
        log_a, slope, _, _ = iterated_hull(np.log(data.x[0]), np.log(data.y))
        rows = {"hull": (log_a, slope, 0.0)}
        for name, options, shift in (("quantile", Options(loss="quantile"), -1.6449), ("mean", Options(), 0.0)):
            problem = Problem.of(data, "power", options)
            fitted_a, fitted = problem.published(fit_problem(problem, options).inner[None])[0]
            rows[name] = (np.log(fitted_a), fitted, shift * noise)
        for name, (log_height, exponent, shift) in rows.items():
            height = log_height - exponent * middle - (np.log(a) - alpha * middle + shift)
            errors.setdefault(name, []).append((exponent - alpha, height))
    return {name: tuple(np.mean(one, 0)) for name, one in errors.items()}


@pytest.mark.slow
def test_noise_pulls_the_hull_down_and_not_the_quantile():
    for noise in (0.01, 0.03, 0.1):
        found = envelope_bias(noise)
        print(f"\nnoise {noise}", {name: (round(e, 4), round(h, 4)) for name, (e, h) in found.items()}, end="")
        assert found["hull"][1] < -noise and abs(found["mean"][1]) < 0.1 * noise
        assert abs(found["quantile"][1]) < 0.35 * abs(found["hull"][1])


def clustered_coverage(grouped: bool, sets: int = 200, runs: int = 20, each: int = 5) -> float:
    """Coverage of the exponent where the points of a run err together (3 %) and alone (1 %)."""
    a, alpha = TRUTHS["power"][0]
    run = np.repeat(np.arange(runs), each)
    inside = []
    for seed in range(sets):
        rng = np.random.default_rng(seed)
        log_x = rng.uniform(*np.log([1e10, 1e14]), runs)[run] + rng.uniform(-1, 1, len(run))
        y = a * np.exp(-alpha * log_x + 0.03 * rng.normal(size=runs)[run] + 0.01 * rng.normal(size=len(run)))
        points = Points(np.exp(log_x)[None], y, ("a",), "y", [run] if grouped else [], ("run",) if grouped else ())
        problem = Problem.of(points, "power", QUICK)
        best = fit_problem(problem, QUICK)
        estimate = problem.published(best.inner[None])[0]
        low, high = intervals(problem, best, estimate, *bootstrap(problem, best, QUICK), QUICK)["alpha"]["interval"]
        inside.append(low <= alpha <= high)
    return float(np.mean(inside))


@pytest.mark.slow
def test_clusters_matter():
    found = clustered_coverage(True), clustered_coverage(False)
    print(f"\nclustered by run {100 * found[0]:.1f}, as if independent {100 * found[1]:.1f}", end="")
    assert 0.9 <= found[0] <= 0.98 and found[1] < 0.8


def hull_coverage(count: int, noise: float, sets: int = 100) -> dict[str, np.ndarray]:
    """Coverage of the law's height in the middle of the data and of its exponent, by the hull's intervals."""
    a, alpha = TRUTHS["power"][0]
    middle = np.exp(0.5 * np.log(1e10 * 1e14))
    hits: dict[str, list[list[bool]]] = {}
    for seed in range(sets):
        points = made("power", count, noise, seed)
        points.x = points.x / middle  # so that A is the height there
        law = fit_law(points, "hull", Options(bootstraps=200, seed=seed))
        for kind in ("corrected", "bootstrap"):
            ends = [one[kind] for one in law.parameters.values()]
            truth = a * middle**-alpha, alpha
            hits.setdefault(kind, []).append([low <= x <= high for (low, high), x in zip(ends, truth, strict=True)])
    return {kind: np.mean(one, 0) for kind, one in hits.items()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_corrected_interval_of_a_hull_holds_the_law():
    found = hull_coverage(60, 0.03)
    print("\nhull, height and alpha:", {kind: (100 * one).round(1).tolist() for kind, one in found.items()}, end="")
    assert all(0.88 <= share <= 1 for share in found["corrected"]) and found["bootstrap"][0] < 0.1


@pytest.mark.slow
def test_more_points_pull_the_hull_further_down():
    a, alpha = TRUTHS["power"][0]
    middle = 0.5 * np.log(1e10 * 1e14)
    depths = []
    for count in (20, 60, 240, 1000):
        found = []
        for seed in range(100):
            data = made("power", count, 0.03, seed)
            log_a, slope, _, _ = iterated_hull(np.log(data.x[0]), np.log(data.y))
            found.append((log_a - slope * middle - np.log(a) + alpha * middle) / 0.03)
        depths.append(float(np.mean(found)))
    print("\nhull below the law, in standard deviations of the noise:", [round(depth, 2) for depth in depths], end="")
    assert all(deeper < depth for depth, deeper in zip(depths, depths[1:], strict=False)) and depths[0] < -0.5
