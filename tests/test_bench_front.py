"""`bench front`: the loop is our own sampling on the same grid, and the first row that is not worse is named."""

from argparse import Namespace

import numpy as np
import pytest

from scaling_perception import Predictor
from scaling_perception.data.sources import open_source
from scaling_perception.support.errors import UserError
from scaling_perception.timing import front

pytest_plugins = ("nano",)


def _row(error, difference, seconds, model="m", **more):
    settings = {"steps": 2, "ensemble": 1, "preset": "fixed", "solver": "ddim", **more}
    paired = {"mean": difference, "ci95": (difference - 0.1, difference + 0.1)}
    numbers = {"error": error, "seconds": seconds, "speed_up": 4 / seconds, "difference": paired}
    return {"model": model, "settings": settings, **numbers}


def test_the_table_and_the_figure(tmp_path):
    rows = [_row(0.4, 0.1, 0.1), _row(0.3, 0.0, 0.2, spacing="learned"), _row(0.2, -0.1, 0.4)]
    rows += [_row(0.25, -0.05, 0.1, model="runs/one")]
    loop = {"steps": 50, "ensemble": 5, "error": 0.3, "seconds": 4.0}
    result = {"model": "m", "task": "amodal", "dataset": "scenes", "images": 8, "loop": loop, "rows": rows, "equal": 1}
    text = front.table(result)
    assert "at an error not above the loop's: 20.0 times faster (2 × 1 ddim learned)" in text
    assert "0.3000 | +0.0000 [-0.1000, +0.1000] | 0.200 | 20.0" in text
    assert "2 × 1 ddim of runs/one | 0.2500 | -0.0500 [-0.1500, +0.0500] | 0.100 | 40.0" in text
    assert "no row reaches the loop's error" in front.table({**result, "equal": None})
    front.draw(result, str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_of_noise_is_refused(make_predictor):
    predictor = make_predictor(diffusion={"schedule": "cosine", "prediction": "epsilon", "spacing": "leading"})
    with pytest.raises(UserError, match="written for models of v, and this one predicts epsilon"):
        front.make_loop(predictor)


def test_the_loop_is_our_sampling_on_the_leading_grid(make_predictor, make_raw, torch):
    predictor, raw = make_predictor(), make_raw()
    theirs = front.make_loop(predictor)[0](raw)
    ours = predictor(raw["image"], "depth", front.STEPS, front.MEMBERS, spacing="leading").prediction
    np.testing.assert_allclose(theirs, ours, atol=2e-3)


def test_the_loop_of_a_model_with_features_and_two_passes(torch, monkeypatch):
    """Flow of the shipped model: a latent and a match for each condition, and each direction sampled alone."""
    monkeypatch.setattr(front, "STEPS", 3)
    monkeypatch.setattr(front, "MEMBERS", 2)
    predictor, raw = Predictor.from_pretrained("mini"), open_source("worlds", "", "val", "flow", count=1)[0]
    theirs = front.make_loop(predictor, "flow")[0](raw)
    ours = predictor(raw["image"], "flow", 3, 2, prompt=raw["image2"], spacing="leading").prediction
    assert np.abs(ours).max() > 1
    np.testing.assert_allclose(theirs, ours, atol=2e-3)


@pytest.mark.parametrize("task", ["normals", "generation"])
def test_a_task_that_the_model_does_not_know(task, make_predictor, monkeypatch):
    monkeypatch.setattr(Predictor, "from_pretrained", lambda name: make_predictor())
    with pytest.raises(UserError, match=task):
        front.measure(Namespace(model="m", task=task, figure=None))


def test_a_model_of_many_steps_is_no_row_of_one_step(make_predictor):
    with pytest.raises(UserError, match="--one-step runs/x: not trained for one step"):
        front._of_one_step(make_predictor(), "runs/x", "depth")
