"""The shipped generalist beats the trivial answers on held-out scenes, for each task, by the paired difference."""

from pathlib import Path

import numpy as np
import pytest

import scaling_perception as sp
from scaling_perception.data.sources.scenes import ScenesSource
from scaling_perception.evaluation.intervals import bootstrap_ci
from scaling_perception.evaluation.protocols import get_protocol
from scaling_perception.evaluation.sweep import sweep
from scaling_perception.inference.budgets import choose, load_budgets

IMAGES = 32
FOLDER = Path(sp.__file__).parent / "weights" / "mini"


@pytest.fixture(scope="module")
def predictor():
    return sp.Predictor.from_pretrained("mini")


@pytest.mark.parametrize(
    "task, metric, steps, sign, trivial",
    [
        ("depth", "abs_rel", 1, 1, ("constant", "row", "inverse_row")),
        ("flow", "epe", 1, 1, ("zero", "oracle_mean")),
        ("amodal", "iou", 1, -1, ("visible",)),
    ],
)
def test_beats_every_trivial_answer(predictor, task, metric, steps, sign, trivial):
    source = ScenesSource("val", IMAGES, 128)
    found, _ = sweep(predictor, source, task, get_protocol(task, "scenes"), steps=(steps,), ensemble=(1,))
    mine = np.asarray([row[metric] for row in found["cells"][0]["rows"]])
    assert mine.shape == (IMAGES,) and set(trivial) <= set(found["baselines"])
    for name in trivial:
        theirs = np.asarray([row[metric] for row in found["baselines"][name]["rows"]])
        low, _ = bootstrap_ci(sign * (theirs - mine), seed=0)
        assert low > 0, f"{task}: {metric} {mine.mean():.3f} against {theirs.mean():.3f} of {name}"


def test_budgets_are_those_of_these_weights(predictor):
    table = load_budgets(FOLDER)
    assert table and set(table["tasks"]) == set(predictor.tasks)
    for task, entry in table["tasks"].items():
        assert (entry["weights"], entry["autoencoder"]) == (predictor.id, predictor.autoencoder_id)
        fast, balanced, best = (choose(table, task, name=name) for name in ("fast", "balanced", "best"))
        assert fast.macs <= balanced.macs <= best.macs
        for one in (fast, balanced, best):
            assert one.macs == pytest.approx(predictor.macs(task, one.steps, one.ensemble), rel=1e-6)
