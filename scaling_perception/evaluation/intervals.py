"""How well a mean over images is known: bootstrap intervals, what they cover, and how they are written.

Coverage of the 95 % interval, simulated with 500 sets of n errors each (``pytest -m slow
tests/evaluation/test_intervals.py -s``); "skewed" is log-normal with sigma 1, more than errors of depth are:

======  =======================  ======================
n       normal: plain, used      skewed: plain, used
======  =======================  ======================
2       0.52: none given         0.41: none given
3       0.73: none given         0.61: none given
5       0.83, 0.93               0.75, 0.84
10      0.90, 0.93               0.82, 0.87
50      0.94, 0.94               0.89, 0.89
======  =======================  ======================
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import ndtri, stdtrit

from scaling_perception.tasks import TASKS
from scaling_perception.tasks.base import WEIGHT

FEWEST_IMAGES = 5
"""Below this no interval is given: resampling so few images says nothing about those that were not drawn."""

LIMITS = {name: ends for task in TASKS.values() for name, ends in task.limits.items()}
"""Metric of any task -> the least and the most that it can be."""

_AT_ONCE = 20_000  # draws: all of them would need resamples x n numbers
_ENOUGH = 50  # images from which on the plain interval is used: the correction would be under 5 %


def bootstrap_ci(
    values: Sequence[float] | np.ndarray,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean over images. The same values and seed give the same interval.

    Below 50 images its ends are moved away from the mean by t(n - 1) / z * sqrt(n / (n - 1)): resampling sees too small
    a spread, and does not know that the spread is estimated (Hesterberg 2015, "What Teachers Should Know About the
    Bootstrap", section 4).

    Args:
        values: (n,) one figure an image.
        resamples: how many times the n images are drawn with replacement.
        level: coverage, 0.95 for the 2.5 % and 97.5 % quantiles.
        limits: the least and the most that a mean can be, where the moved ends stop; differences have none.

    Returns:
        (low, high), around ``np.mean(values)``; None for fewer than ``FEWEST_IMAGES`` values.

    Raises:
        ValueError: no values, or NaN among them.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"a confidence interval needs a list of values, not an array of shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("NaN or infinity among the values: the mean has no interval")
    if values.size < FEWEST_IMAGES:
        return None
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    some = max(1, _AT_ONCE // values.size)  # the same draws as one by one, and of few images far faster
    for first in range(0, resamples, some):
        part = means[first : first + some]
        part[:] = values[rng.integers(0, values.size, (part.size, values.size))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    mean, wider = values.mean(), _widening(values.size, level)
    low, high = np.clip([mean + wider * (low - mean), mean + wider * (high - mean)], *limits)
    return float(low), float(high)


def _widening(count: int, level: float) -> float:
    if count >= _ENOUGH:
        return 1.0
    tail = (1 + level) / 2
    return float(stdtrit(count - 1, tail) / ndtri(tail) * np.sqrt(count / (count - 1)))


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean over images of every metric, with its 95 % bootstrap interval: {metric: {"mean", "ci95"}}.

    ``ci95`` is [low, high] within what the metric can be, or None for too few images (see ``bootstrap_ci``). A metric
    that some images lack (an image
    without occluded pixels has no ``epe_occ``) is averaged over the others, and "images" is their number. A metric with
    a weight (NAME_pixels) is averaged by it.

    Args:
        rows: one an image: {"key": name, metric: value}.
    """
    names = dict.fromkeys(name for row in rows for name in row if name != "key" and not name.endswith(WEIGHT))
    summary: dict[str, dict[str, Any]] = {}
    for name in names:
        values = np.asarray([row[name] for row in rows if name in row], np.float64)
        weights = np.asarray([row.get(name + WEIGHT, 1.0) for row in rows if name in row], np.float64)
        pooled = float(np.average(values, weights=weights))
        values = pooled + weights / weights.mean() * (values - pooled)  # their mean is the pooled one; else unchanged
        ends = bootstrap_ci(values, seed=0, limits=LIMITS.get(name, (-math.inf, math.inf)))
        summary[name] = {"mean": float(values.mean()), "ci95": _ends(ends)}
        if values.size < len(rows):
            summary[name]["images"] = int(values.size)
    return summary


def _ends(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)


def interval_text(summary: Mapping[str, Any], digits: int = 4) -> str:
    """``mean [low, high]``, or the mean alone where too few images give no interval."""
    mean = f"{summary['mean']:.{digits}f}"
    if summary["ci95"] is None:
        return f"{mean} [n < {FEWEST_IMAGES}]"
    return f"{mean} [{summary['ci95'][0]:.{digits}f}, {summary['ci95'][1]:.{digits}f}]"
