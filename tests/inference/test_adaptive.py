"""Compute by image: members until the prediction rests, steps until the estimate rests, and what it saves."""

from types import SimpleNamespace

import numpy as np
import pytest

from scaling_perception.diffusion.sampler import State
from scaling_perception.inference.adaptive import _until_settled, remaining_change
from scaling_perception.inference.settings import Settings
from scaling_perception.support.errors import UserError

pytest_plugins = ("nano",)

FAST = {"steps": 4, "batch_size": 4}


def test_expected_change_is_that_of_random_members():
    """Closed form against many ensembles of normal numbers: mean of n against mean (median) of N."""
    rng = np.random.default_rng(0)
    members = rng.normal(size=(16, 200_000)).astype(np.float32)
    for n in (2, 4, 8):
        moved = np.sqrt(np.mean((members[:n].mean(axis=0) - members.mean(axis=0)) ** 2))
        spread = members[:n].std(axis=0)
        assert remaining_change(spread, n, 16, mean=True) == pytest.approx(moved, rel=0.02)
        middle, final = np.median(members[:n], axis=0), np.median(members, axis=0)
        moved = np.sqrt(np.mean((middle - final) ** 2))
        spread = np.median(np.abs(members[:n] - middle), axis=0)
        assert remaining_change(spread, n, 16, mean=False) == pytest.approx(moved, rel=0.35)  # an estimate
    assert remaining_change(spread, 16, 16, mean=True) == 0
    assert remaining_change(np.zeros(3), 1, 4, mean=True) == 0
    assert remaining_change(np.ones(3), 1, 4, mean=True) == np.inf


@pytest.mark.parametrize("task", ["depth", "flow"])
def test_no_tolerance_at_all_is_the_whole_ensemble(predictor, make_image, task):
    images = [make_image(seed=s) for s in range(5)]
    prompt = None if task == "depth" else images[::-1]
    whole = predictor(images, task, ensemble=6, prompt=prompt, **FAST)
    adaptive = predictor(images, task, ensemble=6, prompt=prompt, tolerance=0.0, first=2, **FAST)
    assert (adaptive.forwards == 24).all() and (whole.forwards == 24).all()
    np.testing.assert_allclose(adaptive.prediction, whole.prediction, atol=1e-4)
    np.testing.assert_allclose(adaptive.members, whole.members, atol=1e-4)


def test_images_stop_on_their_own_and_in_order(predictor, make_image):
    images = [make_image(seed=s) for s in range(7)]
    whole = predictor(images, ensemble=8, **FAST)
    settled = predictor(images, ensemble=8, tolerance=1e9, first=2, **FAST)
    assert (settled.forwards == 8).all()  # two members, four steps
    changes = []
    for image in range(7):
        estimate = predictor(images[image], ensemble=2, **FAST)
        changes.append(remaining_change(estimate._parts[0].uncertainty, 2, 8, mean=False))
    between = float(np.median(changes))
    some = predictor(images, ensemble=8, tolerance=between, first=2, **FAST)
    members = some.forwards // 4
    assert set(members) <= {2, 4, 6, 8} and members.min() < members.max()
    for i in range(7):
        assert len(some[i].members) == members[i]
        np.testing.assert_allclose(some[i].members, whole[i].members[: members[i]], atol=1e-4)
    np.testing.assert_allclose(some.macs, some.forwards * predictor.macs("depth", 1, 1))
    np.testing.assert_array_equal(
        predictor(images[::-1], ensemble=8, tolerance=between, first=2, **FAST).forwards, some.forwards[::-1]
    )


def test_steps_stop_when_the_estimate_rests(predictor, make_image):
    images = [make_image(seed=s) for s in range(3)]
    options = {"ensemble": 2, "steps": 7, "batch_size": 6}
    whole = predictor(images, **options)
    never = predictor(images, step_tolerance=0.0, step_chunk=3, **options)
    assert (never.forwards == 14).all()
    np.testing.assert_allclose(never.prediction, whole.prediction, atol=1e-4)
    early = predictor(images, step_tolerance=1e9, step_chunk=2, **options)
    assert (early.forwards == 8).all()  # two looks are needed to see a change
    stages = [predictor.intermediates(image, at=[3], ensemble=2, steps=7)[0] for image in images]
    for i, stage in enumerate(stages):
        np.testing.assert_allclose(early[i].prediction, stage.prediction, atol=1e-4)
        assert stage.forwards == 8
    both = predictor(images, step_tolerance=1e9, tolerance=1e9, first=1, **{**options, "ensemble": 4})
    assert (both.forwards <= 8).all()


class ScriptedEngine:
    """Clean estimates (I, M, P, 1, 1, 1) by script: a member moves by 1 a step until its turn comes, then rests."""

    def __init__(self, turns):
        self.turns = np.asarray(turns, np.float32)[..., None, None, None, None]  # (I, M)

    def init_state(self, params, latents, draw, passes, tables):
        index = np.arange(len(latents))
        return index, None, State(np.zeros(self.turns.shape, np.float32), np.zeros(self.turns.shape, np.float32))

    def run_steps(self, params, cond_tokens, modulation_table, state, labels, tables, first, count):
        x0 = np.minimum(first + count, self.turns[cond_tokens])
        return State(x0, x0)

    def decode(self, vae, z, passes):
        return np.swapaxes(z, 1, 2)


@pytest.mark.parametrize(("wanted", "taken"), [(1, [3, 6]), (2, [3, 10])])
def test_members_that_only_fill_a_batch_hold_up_no_exit(wanted, taken, pytestconfig):
    """The rule of `nested.stopped`, which never looks at them. The change is first seen to be 0 a step after."""
    if pytestconfig.getoption("--shapes"):
        pytest.skip("made of stand-ins that have no shapes")
    engine = ScriptedEngine([[2, 2], [5, 99], [99, 99]])  # the third image fills the batch as well
    predictor = SimpleNamespace(
        engine=engine, params=None, weights=(None, None), passes=lambda _: SimpleNamespace(labels=None)
    )
    settings = Settings(steps=10, ensemble=1, step_tolerance=0.5, step_chunk=1)
    pixels, steps = _until_settled(predictor, np.zeros((3, 1)), 2, "depth", settings, None, None, wanted, None)
    assert steps == taken and pixels.shape == (2, 1, 2, 1, 1, 1)
    assert pixels[:, 0, 0].ravel().tolist() == [2, 5]


def test_few_graphs_serve_many_images(make_predictor, make_image):
    predictor = make_predictor(seed=5)
    images = [make_image(seed=s) for s in range(9)]
    predictor(images, ensemble=6, tolerance=1e-3, first=2, **FAST)
    assert predictor.traces == {"encode": 1, "sample": 1}
    predictor(images[:4], ensemble=4, tolerance=0.1, first=2, key=7, **FAST)
    assert predictor.traces == {"encode": 1, "sample": 1}


def test_refusals(predictor, make_image):
    cases = [
        ({"tolerance": -1.0}, "tolerance -1.0"),
        ({"tolerance": 0.1, "first": 0}, "first 0"),
        ({"step_tolerance": 0.1, "solver": "ddpm"}, "without noise"),
        ({"solver": "ddmi"}, "did you mean"),
        ({"aspect": "tiles"}, "did you mean 'tile'"),
    ]
    for settings, message in cases:
        with pytest.raises(UserError, match=message):
            predictor(make_image(), **settings)
    with pytest.raises(TypeError, match="did you mean 'solver'"):
        predictor(make_image(), solvr="ddim")
