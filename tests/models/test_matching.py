"""Matching of two frames: known motions, what it is invariant to, and that every way of encoding gives the same."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_perception.cli import main
from scaling_perception.data.latents import CacheReader
from scaling_perception.data.pipeline import open_batches
from scaling_perception.inference.engine import Engine
from scaling_perception.models import matching
from scaling_perception.models.autoencoders import Autoencoder, check_flow_frame, is_matching, load_autoencoder
from scaling_perception.models.presets import get_preset
from scaling_perception.support.configs import load_config
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import FRAME_PASSES, TaskOptions, flow, get_pass
from scaling_perception.training.diffusion import latents_of

SIDE = 64


def texture(seed, side=SIDE):
    """Smooth noise in [-1, 1], (side, side, 3)."""
    noise = np.random.default_rng(seed).normal(size=(side, side, 3))
    waves = np.fft.fft2(noise, axes=(0, 1))
    y, x = np.meshgrid(*[np.fft.fftfreq(side)] * 2, indexing="ij")
    made = np.fft.ifft2(waves * np.exp(-(x**2 + y**2)[..., None] * 120), axes=(0, 1)).real
    return np.clip(made / np.abs(made).max() * 1.2, -1, 1).astype(np.float32)


def moved(picture, u, v):
    """The picture after a motion of (u, v) pixels, by its Fourier series."""
    y, x = np.meshgrid(*[np.fft.fftfreq(len(picture))] * 2, indexing="ij")
    turn = np.exp(-2j * np.pi * (x * u + y * v))[..., None]
    return np.fft.ifft2(np.fft.fft2(picture, axes=(0, 1)) * turn, axes=(0, 1)).real.astype(np.float32)


@pytest.fixture(scope="module")
def run():
    jitted = jax.jit(matching.match)
    return lambda first, second: {name: np.asarray(part) for name, part in jitted(first, second).items()}


@pytest.fixture(scope="module")
def features():
    return jax.jit(matching.features)


MOTIONS = [(0.0, 0.0), (3.0, -2.0), (0.5, 0.25), (-7.0, 5.5)]


@pytest.fixture(scope="module")
def made(run):
    first = np.stack([texture(i) for i in range(len(MOTIONS))])
    second = np.stack([moved(picture, u, v) for picture, (u, v) in zip(first, MOTIONS, strict=True)])
    return first, second, run(first, second)


@pytest.mark.parametrize("number", range(len(MOTIONS)))
def test_a_shift_is_found_to_a_fraction_of_a_pixel(made, number):
    inner = slice(12, -12)  # what comes in at the border has no counterpart
    found = made[2]["filled"][number, inner, inner]
    assert np.abs(found - MOTIONS[number]).max() < 0.25
    assert np.abs(found.mean((0, 1)) - MOTIONS[number]).max() < 0.02
    assert made[2]["apart"][number, inner, inner].max() < 0.15
    assert 0 < made[2]["certainty"].min() and made[2]["certainty"].max() < 1.002


def test_light_and_mirror_change_nothing_but_the_sign(made, run):
    first, second, found = made
    darker = run(0.6 * first - 0.2, 0.6 * second - 0.2)["filled"]
    assert np.abs(darker - found["filled"])[:, 12:-12, 12:-12].mean() < 0.05
    turned = run(first[:, :, ::-1], second[:, :, ::-1])["filled"][:, :, ::-1] * [-1, 1]
    np.testing.assert_allclose(turned, found["filled"], atol=2e-2)


def test_where_nothing_can_be_seen_nothing_is_certain(run, made, features):
    grey = np.full((4, SIDE, SIDE, 3), 0.1, np.float32)
    found = run(grey, grey)
    assert found["certainty"].max() < 0.5 * np.median(made[2]["certainty"])
    np.testing.assert_allclose(found["filled"], 0, atol=1e-3)
    assert np.isfinite(features(grey, grey)).all()


def test_warp_takes_the_values_that_the_flow_points_to():
    y, x = np.mgrid[:6, :5].astype(np.float32)
    plane = np.stack([x, y], -1)[None]
    flow = np.random.default_rng(0).uniform(-1, 1, (1, 6, 5, 2)).astype(np.float32)
    wanted = np.clip(plane + flow, 0, [4, 5])
    np.testing.assert_allclose(matching.warp(jnp.asarray(plane), jnp.asarray(flow)), wanted, atol=1e-5)


def test_refining_finds_the_rest_of_a_motion_and_keeps_what_cannot_be_seen(made):
    first, second, _ = made
    truth = np.broadcast_to(np.asarray(MOTIONS, np.float32)[:, None, None], (*first.shape[:3], 2))
    coarse = truth + np.float32([0.8, -0.6])
    inner = np.s_[:, 12:-12, 12:-12]
    found = np.asarray(matching.jitted_refined()(first, second, coarse))
    assert np.linalg.norm(found - truth, axis=-1)[inner].mean() < 0.2  # of 1.0; mixed twice, it comes nearer by parts
    np.testing.assert_allclose(
        np.asarray(matching.jitted_refined()(first, second, truth))[inner], truth[inner], atol=0.2
    )
    grey = np.full_like(first, 0.1)
    np.testing.assert_allclose(matching.jitted_refined()(grey, grey, coarse), coarse, atol=1e-3)


def test_flow_is_refined_in_frames_larger_than_the_model_s(made):
    """Of 64 x 64 and 64 x 128 pixels, from half the size: the same whatever frame flow is measured in."""
    first, second = ((np.clip(one[1], -1, 1) * 127.5 + 127.5).astype(np.uint8) for one in made[:2])
    square = TaskOptions(flow_frame="square", flow_refine=1)
    for raw, wide in (({"image": first, "image2": second}, 1), (_wide(first, second), 2)):
        u, v = MOTIONS[1]
        coarse = np.broadcast_to(np.float32([u / 2 + 0.3, v / 2 - 0.3]), (32, 32, 2))
        found = flow.refine(coarse, {**raw, "key": "a"}, square)
        assert found.shape == (64, 64, 2)
        near = np.linalg.norm(found - [u, v], axis=-1)[12:-12, 12:-12]
        assert near.mean() < 0.15 < np.linalg.norm(2 * coarse - [u, v], axis=-1).mean()
        by_width = dataclasses.replace(square, flow_frame="native")
        same = flow.refine(coarse * np.float32([1, 1 / wide]), {**raw, "key": "a"}, by_width)
        np.testing.assert_allclose(same * [1, wide], found, atol=1e-4)
        assert flow.refine(coarse, raw, TaskOptions(flow_frame="square")) is coarse
        if wide == 1:
            assert flow.refine(found, raw, square) is found, "no larger than the frames"


def _wide(first, second):
    """The same pair, each pixel twice as wide."""
    return {"image": np.repeat(first, 2, axis=1), "image2": np.repeat(second, 2, axis=1)}


def test_features_are_the_means_of_quarters_of_a_cell(made, features):
    first, second, found = made
    got = np.asarray(features(first, second)).reshape(4, 8, 8, 2, 2, 8)  # quarters: row, column
    u = np.clip(found["filled"][..., 0] / 4, -8, 8).reshape(4, 8, 2, 4, 8, 2, 4).mean((3, 6))
    np.testing.assert_allclose(got[..., 0], u.transpose(0, 1, 3, 2, 4), atol=1e-3)
    assert got.shape[-1] == len(matching.CHANNELS) and 8 * 4 == matching.FEATURES


def test_a_second_frame_gets_the_match_and_everything_else_what_it_had(made, features):
    plain, both = load_autoencoder("tiny+lite0"), load_autoencoder("tiny+lite0+match")
    assert both.matches and is_matching(both.name) and both.id != plain.id and both.features == 32
    first, second = made[0], made[1]
    encode = jax.jit(both.encode)
    alone, paired = encode(both.params, second)[0], encode(both.params, second, first)[0]
    np.testing.assert_array_equal(alone[..., :4], paired[..., :4])
    np.testing.assert_allclose(paired[..., 4:], features(first, second), atol=1e-3)

    # a batch of pixels in training, flow and others mixed
    assert [get_pass(number).name for number in FRAME_PASSES] == ["flow_x", "flow_y"]
    batch = {"image": first, "prompt": second, "target": first, "valid": np.ones(first.shape[:3], bool)}
    batch |= {"pass_id": np.asarray([0, 2, 3, 1], np.int32), "constants": both.params}
    found = latents_of(batch, lambda *given: encode(*given)[0], 2, FRAME_PASSES)
    assert found[1] is not None
    np.testing.assert_allclose(found[1], [alone[0], paired[1], paired[2], alone[3]], atol=2e-3)


def test_an_autoencoder_without_such_features_cannot_match():
    with pytest.raises(UserError, match=r"'tiny\+match': a match takes the place of 32 features, and 'tiny' has 0"):
        load_autoencoder("tiny+match")


def test_motion_is_measured_in_the_square_that_is_matched(tmp_path, capsys):
    """Whatever prepares or trains with a match: the default of `prepare`, and one line for anything else."""
    words = ["prepare", "worlds", "--tasks", "flow", "--count", "1", "--resolution", "32", "--workers", "0"]
    words += ["--latents", "--flips", "none", "--out", str(tmp_path / "cache"), "--vae", "tiny+lite0+match"]
    words += ["--batch", "1"]  # for each of eight devices
    assert main([*words, "--flow-frame", "native"]) == 2
    assert "measured in native ones: give --flow-frame square" in capsys.readouterr().err
    assert main([*words, "--flow-frame", "cube"]) == 2
    assert "--flow-frame 'cube' is unknown; known: native, square" in capsys.readouterr().err
    assert main(words) == 0
    reader = CacheReader(tmp_path / "cache")
    assert reader.settings["task_options"]["flow_frame"] == "square"
    config = load_config(f"configs/worlds.py:dim=32,depth=1,res=32,steps=1,batch=2,cache={tmp_path / 'cache'}")
    assert config.task_options.flow_frame == "square"
    config.task_options.flow_frame, config.data.flip = "native", False
    with pytest.raises(UserError, match=r"give task_options.flow_frame=square"):
        check_flow_frame(config.autoencoder, config.task_options.flow_frame, "task_options.flow_frame=square")
    with pytest.raises(UserError, match=r"was prepared with task_options.flow_frame=square, not native"):
        open_batches({**config.data.to_dict(), "resolution": 32, "task_options": config.task_options.to_dict()}, 2, 0)


def test_a_model_refuses_an_autoencoder_that_encodes_frames_in_another_way():
    from scaling_perception.inference.model import Model

    config = types.SimpleNamespace(input_size=8, features=32, conditions=2)
    meta = {"model": {}, "resolution": 64, "tasks": ["flow"], "autoencoder": "tiny+lite0+match"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scaling_perception.inference.model.config_from_dict", lambda fields: config)
        with pytest.raises(UserError, match="'tiny.lite0' encodes a second frame in another way"):
            Model({}, meta, load_autoencoder("tiny+lite0"))


def test_prediction_encodes_the_second_frame_with_the_first():
    def encode(params, images, first=None):
        return (images if first is None else images - first / 2)[:, ::8, ::8], None

    autoencoder = Autoencoder("stand-in+match", "", {}, encode, lambda params, z: z, matches=True)
    engine = Engine(get_preset("nano"), autoencoder, "float32")
    one, two = (np.stack([texture(seed), texture(seed + 1)]) for seed in (5, 7))
    for frames, prompt in ((True, two - one / 2), (False, two)):
        wanted = np.concatenate([one, prompt], axis=-1)[:, ::8, ::8]
        np.testing.assert_allclose(engine.encode({}, np.stack([one, two]), frames), wanted, atol=1e-6)
