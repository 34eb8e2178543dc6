"""The shipped generalists beat the trivial answers on held-out samples, for each task, by the paired difference."""

import functools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from pages import ROOT

import scaling_perception as sp
from scaling_perception.data.sources import open_source, scenes, worlds
from scaling_perception.evaluation.intervals import bootstrap_ci
from scaling_perception.evaluation.protocols import get_protocol
from scaling_perception.evaluation.sweep import sweep
from scaling_perception.inference.budgets import choose, load_budgets, table_choices
from scaling_perception.inference.settings import Settings
from scaling_perception.interop.find import SHIPPED, shipped_models

IMAGES = {"normals": 32}  # 16 tell the others apart
MINI_CARD = SHIPPED / "mini" / "README.md"
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
        *(("mini", "worlds", task) for task in ("depth", "flow", "amodal", "normals")),
    ],
)
def test_beats_every_trivial_answer(predictors, model, dataset, task):
    metric, sign, trivial = TRIVIAL[task]
    source = open_source(dataset, "", "val", task, count=IMAGES.get(task, 16), resolution=128)
    found, _ = sweep(predictors[model], source, task, get_protocol(task, dataset), steps=(1,), ensemble=(1,))
    mine = np.asarray([row[metric] for row in found["cells"][0]["rows"]])
    assert mine.shape == (IMAGES.get(task, 16),) and set(trivial) <= set(found["baselines"])
    for name in trivial:
        theirs = np.asarray([row[metric] for row in found["baselines"][name]["rows"]])
        between = bootstrap_ci(sign * (theirs - mine), seed=0)
        assert between is not None and between[0] > 0, (
            f"{task}: {metric} {mine.mean():.3f} against {theirs.mean():.3f} of {name}"
        )


@pytest.mark.parametrize("model", ["mini", "mini-scenes"])
def test_budgets_are_those_of_these_weights(predictors, model):
    predictor, table = predictors[model], load_budgets(SHIPPED / model)
    assert table and set(table["tasks"]) == set(predictor.tasks)
    for task, entry in table["tasks"].items():
        assert (entry["weights"], entry["autoencoder"]) == (predictor.id, predictor.autoencoder_id)
        fast, balanced, best = (choose(table, task, name=name) for name in ("fast", "balanced", "best"))
        assert fast.compute <= balanced.compute <= best.compute
        decoding = predictor.decoder_macs(task)
        for one in table_choices(entry):
            settings = Settings(**one.settings)
            # a learned grid is there, of these weights; the cache and the way of merging exist
            predictor.tables(settings, task, predictor.choose_diffusion(settings.preset, settings.spacing))
            settings.reduce_for(task)
            evaluations = predictor.evaluations(settings)
            assert one.macs == pytest.approx(predictor.macs(task, evaluations, one.ensemble), rel=1e-6)
            decoded = 1 if settings.merge_in == "latents" else one.ensemble
            assert one.decoder_macs == pytest.approx(decoding * decoded, rel=1e-6)


# the lowest errors of plain settings (steps and members of the trailing grid) of the same weights, on the same samples
BEFORE = {
    "mini": {"depth": 0.25363, "flow": 1.22291, "amodal": 0.207452, "normals": 21.7487},
    "mini-scenes": {"depth": 0.245215, "flow": 2.15439, "amodal": 0.195488},
}


@pytest.mark.parametrize("model, task", [(model, task) for model, tasks in BEFORE.items() for task in tasks])
def test_the_best_setting_is_no_worse_than_without_levers(model, task):
    entry = load_budgets(SHIPPED / model)["tasks"][task]
    best = choose({"tasks": {task: entry}}, task, name="best")
    (cell,) = (cell for cell, one in zip(entry["cells"], table_choices(entry), strict=True) if one == best)
    assert min(one["error"] for one in entry["cells"]) <= BEFORE[model][task] * (1 + 1e-4)
    assert cell["excess"]["ci95"][0] <= 0, "its error can be told from the lowest"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_card_s_commands_reach_the_published_curve(tmp_path):
    """From nothing, a tenth of the batch, 1 of 90 worlds: 200 steps, in which the rate is still constant."""
    curve = {}
    for line in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines():
        if row := re.fullmatch(r"\| (100|200) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|.*", line):
            curve[int(row[1])] = [float(value) for value in row.groups()[1:]]
    assert set(curve) == {100, 200}
    prepare, train = re.findall(r"^scaling-perception (.*?[^\\])$", MINI_CARD.read_text("utf-8"), re.M | re.S)[:2]
    words = re.sub(
        r"--count \d+ --out \S+", f"--count 400 --out {tmp_path}/worlds", prepare.replace("\\\n", "")
    ).split()
    own = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # those of tests run slowly
    run = functools.partial(subprocess.run, env=own, check=True)
    run([sys.executable, "-m", "scaling_perception", *words])
    words = train.replace("steps=19000,batch=512", f"steps=200,batch=48,cache={tmp_path}/worlds").split()
    words = [*words[:-1], str(tmp_path / "run"), "--config.optim.schedule=constant"]
    run([sys.executable, "-m", "scaling_perception", *words])
    logged = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines())
    found = {
        row["step"]: [row[name] for name in ("loss", "loss_depth", "loss_flow_x")] for row in logged if "loss" in row
    }
    for step, published in curve.items():
        np.testing.assert_allclose(found[step], published, rtol=0.3)  # a tenth of the batch: a fifth above it
