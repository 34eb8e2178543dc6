"""The shipped generalists beat the trivial answers on held-out samples, for each task, by the paired difference."""

import functools

import numpy as np
import pytest

import scaling_perception as sp
from scaling_perception.data.sources import open_source, scenes, worlds
from scaling_perception.evaluation.intervals import bootstrap_ci
from scaling_perception.evaluation.protocols import get_protocol
from scaling_perception.evaluation.sweep import sweep
from scaling_perception.inference.budgets import choose, load_budgets
from scaling_perception.interop.find import SHIPPED, shipped_models

IMAGES = 32
TRIVIAL = {
    "depth": ("abs_rel", 1, ("constant", "row", "inverse_row")),
    "flow": ("epe", 1, ("zero", "oracle_mean")),
    "amodal": ("iou", -1, ("visible",)),
    "normals": ("mean_angle", 1, ("constant", "ground_plane")),
}


@pytest.fixture(scope="module", autouse=True)
def rendered_once():
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((scenes, "render_scene"), (worlds, "render_world")):
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        yield


@pytest.fixture(scope="module")
def predictors():
    return {name: sp.Predictor.from_pretrained(name) for name in shipped_models()}


@pytest.mark.parametrize(
    "model, dataset, task",
    [
        *(("mini-scenes", "scenes", task) for task in ("depth", "flow", "amodal")),
        *(("mini", "worlds", task) for task in ("depth", "flow", "normals")),  # amodal: its card
    ],
)
def test_beats_every_trivial_answer(predictors, model, dataset, task):
    metric, sign, trivial = TRIVIAL[task]
    source = open_source(dataset, "", "val", task, count=IMAGES, resolution=128)
    found, _ = sweep(predictors[model], source, task, get_protocol(task, dataset), steps=(1,), ensemble=(1,))
    mine = np.asarray([row[metric] for row in found["cells"][0]["rows"]])
    assert mine.shape == (IMAGES,) and set(trivial) <= set(found["baselines"])
    for name in trivial:
        theirs = np.asarray([row[metric] for row in found["baselines"][name]["rows"]])
        low, _ = bootstrap_ci(sign * (theirs - mine), seed=0)
        assert low > 0, f"{task}: {metric} {mine.mean():.3f} against {theirs.mean():.3f} of {name}"


@pytest.mark.parametrize("model", ["mini", "mini-scenes"])
def test_budgets_are_those_of_these_weights(predictors, model):
    predictor, table = predictors[model], load_budgets(SHIPPED / model)
    assert table and set(table["tasks"]) == set(predictor.tasks)
    for task, entry in table["tasks"].items():
        assert (entry["weights"], entry["autoencoder"]) == (predictor.id, predictor.autoencoder_id)
        fast, balanced, best = (choose(table, task, name=name) for name in ("fast", "balanced", "best"))
        assert fast.macs <= balanced.macs <= best.macs
        for one in (fast, balanced, best):
            assert one.macs == pytest.approx(predictor.macs(task, one.steps, one.ensemble), rel=1e-6)
