"""Graphs: solvers and noise, antithetic members, several devices, memory, threads, intermediate estimates."""

import functools
import operator
import threading

import jax
import numpy as np
import pytest

from scaling_perception.inference import model as model_module
from scaling_perception.inference.batches import BatchPlan, shrink, split
from scaling_perception.inference.draws import draw_members
from scaling_perception.inference.predictor import Predictor
from scaling_perception.inference.settings import Settings
from scaling_perception.parallel.mesh import make_mesh
from scaling_perception.support.errors import UserError

pytest_plugins = ("nano",)

FAST = {"steps": 3, "batch_size": 4}


def test_solvers_agree_in_one_step_and_share_graphs(make_predictor, make_image):
    predictor, image = make_predictor(seed=2), make_image()
    one = {"ensemble": 2, "steps": 1, "batch_size": 2}
    expected = predictor(image, **one).prediction
    for solver in ("single", "dpm++2m", "unipc"):
        np.testing.assert_allclose(predictor(image, solver=solver, **one).prediction, expected, atol=1e-4)
    three = {"ensemble": 2, "steps": 3, "batch_size": 2}
    found = [predictor(image, solver=solver, **three).members for solver in ("ddim", "dpm++2m", "unipc")]
    assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(found[:-1], found[1:], strict=True))
    # per step count one graph without and one with history
    assert predictor.traces["sample"] == 4


def test_noise_of_stochastic_solvers_belongs_to_key_image_member_and_step(predictor, make_image):
    image = make_image()
    options = {"eta": 1.0, **FAST}
    four = predictor(image, ensemble=4, **options).members
    np.testing.assert_allclose(predictor(image, ensemble=2, **options).members, four[:2], atol=2e-5)
    in_batch = predictor([make_image(seed=1), image], ensemble=2, **options).members[1]
    np.testing.assert_allclose(in_batch, four[:2], atol=2e-5)
    assert np.abs(predictor(image, ensemble=4, key=1, **options).members - four).max() > 1e-3
    assert np.abs(predictor(image, ensemble=4, **FAST).members - four).max() > 1e-3
    ancestral = predictor(image, ensemble=4, solver="ddpm", **FAST).members
    np.testing.assert_allclose(ancestral, four, atol=1e-4)  # of the same posterior


def test_antithetic_members_are_pairs_of_opposite_noise():
    draw = draw_members(jax.random.key(0), np.zeros(1, np.uint32), 2, 4, antithetic=True)
    assert draw.members.tolist() == [1, 1, 2, 2] and draw.signs.tolist() == [1, -1, 1, -1]
    plain = draw_members(jax.random.key(0), np.zeros(1, np.uint32), 2, 4, antithetic=False)
    assert plain.members.tolist() == [2, 3, 4, 5] and (plain.signs == 1).all()


def test_antithetic_noise_cancels(make_predictor, make_image):
    """A network whose output is its noise's share alone: the two members of a pair lie on both sides of the middle."""
    predictor, image = make_predictor(), make_image()
    engine, plan = predictor.engine, BatchPlan(1, 4)
    raws = predictor.raw_inputs([image], "depth")
    draw = draw_members(jax.random.key(1), predictor.image_ids(raws, 1), 0, 4, antithetic=True)
    latents = predictor.encode(raws, "depth", plan)
    tables = Settings(steps=2).tables(predictor.diffusion)
    _, _, state = engine.init_state(predictor.params, latents, draw, predictor.passes("depth"), tables)
    x = np.asarray(state.x)
    np.testing.assert_array_equal(x[:, 0::2], -x[:, 1::2])
    assert np.abs(x[:, 0] - x[:, 2]).max() > 0.1
    pairs = predictor(image, ensemble=4, antithetic=True, **FAST).members
    plain = predictor(image, ensemble=2, **FAST).members
    np.testing.assert_allclose(pairs[[0, 2]], plain, atol=2e-5)


def test_intermediates_end_at_the_prediction(predictor, make_image):
    image, options = make_image(), {"steps": 3, "ensemble": 2}
    first, middle, last = predictor.intermediates(image, at=[0, 1, -1], **options)
    whole = predictor(image, **options)
    np.testing.assert_allclose(last.prediction, whole.prediction, atol=2e-5)
    assert [p.forwards for p in (first, middle, last)] == [2, 4, 6]
    assert np.abs(first.prediction - middle.prediction).max() > 1e-3
    flow = predictor.intermediates(image, task="flow", prompt=make_image(seed=3), at=[2], **options)
    assert flow[0].prediction.shape == (40, 56, 2)
    for at in ([], [3], [1, -2]):
        with pytest.raises(UserError, match="to look at"):
            predictor.intermediates(image, at=at, **options)


@pytest.mark.parametrize(
    ("changes", "sizes", "parts_of"),
    [
        ({}, {"data": 2, "fsdp": 2, "tensor": 2}, {"blocks/mlp/fc1/kernel": 4, "final/linear/kernel": 2}),
        ({"experts": 4}, {"fsdp": 4, "expert": 2}, {"blocks/moe/experts/fc1/kernel": 8, "blocks/attn/qkv/kernel": 4}),
    ],
)
def test_rows_and_weights_over_eight_devices(make_predictor, make_image, changes, sizes, parts_of):
    alone = make_predictor(model=changes)
    over = Predictor(alone.params, alone.meta, alone.autoencoder, mesh=make_mesh(**{"data": 1, **sizes}))
    for name, parts in parts_of.items():  # as training places them
        leaf = functools.reduce(operator.getitem, name.split("/"), over.params)
        assert leaf.addressable_shards[0].data.size == leaf.size // parts, name
    assert over.engine.devices == 8 // sizes.get("tensor", 1) and over.engine.layout.startswith("8 (fsdp")
    images = [make_image(seed=s) for s in range(3)]
    expected = alone(images, "flow", prompt=images[::-1], ensemble=3, steps=2)
    found = over(images, "flow", prompt=images[::-1], ensemble=3, steps=2)
    np.testing.assert_allclose(found.prediction, expected.prediction, atol=2e-4)  # of ±32 pixels
    for leaf in jax.tree.leaves(over.params):
        assert len(leaf.addressable_shards) == 8


def test_batches_divide_over_devices():
    assert split(5, 100, 1, 8) == (1, 8)
    assert split(5, 100, 10, 8) == (16, 5)
    assert split(4, 100, 10, 8) == (10, 4)
    assert split(3, 2, 7, 8) == (1, 8)


def test_batches_shrink_until_they_fit(make_predictor, make_image, monkeypatch):
    predictor = make_predictor(seed=8)
    tables = Settings(steps=2).tables(predictor.diffusion)
    large = predictor.plan("depth", 16, 1, tables=tables)
    assert large == (1, 16)
    half = predictor._sampling_bytes("depth", BatchPlan(1, 8), tables)
    assert half < predictor._sampling_bytes("depth", large, tables)
    monkeypatch.setattr(model_module, "free_bytes", lambda: half)
    small = predictor.plan("depth", 16, 1, tables=tables)
    assert small.images == 1 and 1 <= small.members <= 8
    assert predictor._sampling_bytes("depth", small, tables) <= half
    whole = predictor(make_image(), ensemble=16, steps=2)
    assert whole.members.shape[0] == 16
    assert shrink(10, 100, 99) == 9 and shrink(10, 100, 20) == 2 and shrink(10, 100, 1) == 1


def test_threads_share_one_predictor(make_predictor, make_image):
    predictor = make_predictor(seed=9)
    images = [make_image(seed=s) for s in range(4)]
    expected = make_predictor(seed=9)(images, ensemble=2, **FAST).prediction
    found = [None] * 4

    def work(i):
        found[i] = predictor(images[i], ensemble=2, **FAST).prediction

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_allclose(np.stack(found), expected, atol=2e-5)
    assert predictor.traces["sample"] == 1


def test_aspects_reach_the_predictor(predictor, make_image):
    image = make_image(40, 100)
    squash = predictor(image, ensemble=2, **FAST)
    letterbox = predictor(image, ensemble=2, aspect="letterbox", **FAST)
    tile = predictor(image, ensemble=2, aspect="tile", **FAST)
    for found in (letterbox, tile):
        assert found.prediction.shape == (40, 100)
        assert np.abs(found.prediction - squash.prediction).max() > 1e-3
    assert squash.forwards == letterbox.forwards == 6 and tile.forwards > 6
