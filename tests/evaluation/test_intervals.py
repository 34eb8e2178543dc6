"""Intervals of a mean over images: none for a few, wider for some, and how often they hold the true mean."""

import numpy as np
import pytest

from scaling_perception.evaluation.intervals import FEWEST_IMAGES, bootstrap_ci, interval_text, summarise
from scaling_perception.tasks import TASKS


def test_a_metric_that_some_images_lack_is_averaged_over_the_others():
    rows = [{"key": "a", "epe": 1.0}, {"key": "b", "epe": 3.0, "epe_occ": 7.0}]
    found = summarise(rows)
    assert found["epe"]["mean"] == 2 and "images" not in found["epe"]
    assert found["epe_occ"] == {"mean": 7.0, "ci95": None, "images": 1}


def test_bootstrap_interval_has_the_normal_width_and_repeats():
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = bootstrap_ci(values, seed=1)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(400), rel=0.1)
    assert bootstrap_ci(list(values), seed=1) == (low, high) != bootstrap_ci(values, seed=2)
    narrow = bootstrap_ci(values, seed=1, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = 0
    for i in range(150):
        low, high = bootstrap_ci(rng.exponential(1.0, 40), seed=i, resamples=200)
        hits += low <= 1 <= high
    assert 0.85 <= hits / 150 <= 0.99


def test_bootstrap_edges():
    for few in range(1, FEWEST_IMAGES):
        assert bootstrap_ci(np.arange(few, dtype=float)) is None
    assert bootstrap_ci([2.5] * FEWEST_IMAGES) == (2.5, 2.5)
    for bad in ([], [1.0, np.nan], np.ones((2, 2))):
        with pytest.raises(ValueError):
            bootstrap_ci(bad)


SETS = 500


def test_what_is_written_says_when_there_is_no_interval():
    assert interval_text({"mean": 0.25384, "ci95": None}) == "0.2538 [n < 5]"
    assert interval_text({"mean": 0.25384, "ci95": [0.2, 0.3]}, 2) == "0.25 [0.20, 0.30]"


def test_few_images_are_wider_than_resampling_says():
    values = np.random.default_rng(1).normal(0, 1, 49)
    ends = [bootstrap_ci(values[:n]) for n in (5, 49)]
    exact = [2.776 * values[:5].std(ddof=1) / np.sqrt(5), 2.011 * values.std(ddof=1) / 7]
    for (low, high), half in zip(ends, exact, strict=True):  # about Student's, which is exact for normal values
        assert (high - low) / 2 == pytest.approx(half, rel=0.12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["normal", "skewed"])
def test_coverage_by_number_of_images(name):
    """The table of the module's docstring and of docs/evaluate.md: run with ``-m slow -s``."""
    rng = np.random.default_rng(0)
    draw, truth = (rng.normal, 0.0) if name == "normal" else (rng.lognormal, np.exp(0.5))
    wanted = {"normal": {5: 0.91, 10: 0.925, 50: 0.93}, "skewed": {5: 0.79, 10: 0.84, 50: 0.89}}[name]
    for count in (2, 3, 5, 10, 50):
        plain = hits = 0
        for seed in range(SETS):
            values = draw(0, 1, count)
            means = values[np.random.default_rng(seed).integers(0, count, (1000, count))].mean(axis=1)
            low, high = np.quantile(means, [0.025, 0.975])
            plain += low <= truth <= high
            ends = bootstrap_ci(values, seed)
            assert (ends is None) == (count < FEWEST_IMAGES)
            hits += ends is not None and ends[0] <= truth <= ends[1]
        print(f"{name} {count}: plain {plain / SETS:.3f}, used {hits / SETS:.3f}")
        assert hits / SETS >= wanted.get(count, 0)


def test_a_weighted_metric_is_pooled_over_pixels():
    rng = np.random.default_rng(2)
    counts = rng.integers(10, 1000, 30)
    wrong = rng.binomial(counts, rng.random(30))
    rows = [
        {"key": str(i), "fl_all": 100 * bad / n, "fl_all_pixels": float(n)}
        for i, (bad, n) in enumerate(zip(wrong, counts, strict=True))
    ]
    found = summarise(rows)
    assert list(found) == ["fl_all"] and found["fl_all"]["mean"] == pytest.approx(100 * wrong.sum() / counts.sum())
    low, high = found["fl_all"]["ci95"]
    assert low < found["fl_all"]["mean"] < high


@pytest.mark.parametrize(
    ("metric", "values", "end", "limit"),
    [
        ("epe", [0, 0, 0, 0, 3], 0, 0.0),
        ("delta1", [1, 1, 1, 1, 0.4], 1, 1.0),
        ("iou", [0, 0, 0, 0, 1], 0, 0.0),
        ("fl_all", [100, 100, 100, 100, 5], 1, 100.0),
        ("outlier_3px", [1, 1, 1, 1, 0], 1, 1.0),
        ("within_11.25", [1, 1, 1, 1, 0.2], 1, 1.0),
        ("mean_angle", [180, 180, 180, 180, 10], 1, 180.0),
    ],
)
def test_intervals_stay_within_what_a_metric_can_be(metric, values, end, limit):
    mean, ends = np.mean(values), bootstrap_ci(values)
    assert ends is not None and (ends[end] < limit if end == 0 else ends[end] > limit), "differences are not cut"
    found = summarise([{"key": str(i), metric: value} for i, value in enumerate(values)])[metric]
    assert found["mean"] == pytest.approx(mean) and found["ci95"][end] == limit
    assert found["ci95"][1 - end] == pytest.approx(ends[1 - end]) or found["ci95"][1 - end] in (0.0, limit)


def test_every_metric_of_a_task_has_limits():
    for task in TASKS.values():
        assert set(task.metrics) == set(task.limits)
        if task.main is not None:
            assert task.main.error_limits(task.limits)[0] == 0
