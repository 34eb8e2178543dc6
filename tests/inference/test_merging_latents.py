"""Members merged as latents: what stays exactly the same, what the alignment of depth undoes, what is counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_perception.evaluation.comparisons import solver_of
from scaling_perception.evaluation.nested import Adaptive
from scaling_perception.evaluation.protocols import get_protocol, measure, prepare_raw
from scaling_perception.evaluation.sweep import sweep
from scaling_perception.inference.clips import Motion, check_clip
from scaling_perception.inference.latents import merge_latents
from scaling_perception.inference.settings import Settings
from scaling_perception.models.compute import graph_macs
from scaling_perception.support.errors import UserError

pytest_plugins = ("nano",)

MODES = ("mean", "median", "lsq")


def _latents(members=5, seed=0):
    return np.random.default_rng(seed).normal(size=(2, members, 2, 4, 4, 3)).astype(np.float32)


@pytest.mark.parametrize("mode", MODES)
def test_equal_members_are_that_member_and_their_order_does_not_matter(mode):
    one = _latents(1)
    merged, spread = merge_latents(np.repeat(one, 6, axis=1), mode)
    np.testing.assert_allclose(merged, one, atol=0 if mode != "lsq" else 2e-6)
    np.testing.assert_allclose(spread, 0, atol=0 if mode != "lsq" else 2e-6)
    several = _latents()
    first, second = (merge_latents(several[:, order], mode) for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_scale_and_shifts_of_depth_members_are_undone():
    """Members that differ in one scale and a shift of each channel are one; the plain median is not."""
    rng, one = np.random.default_rng(1), _latents(1)
    scale, shift = rng.uniform(0.5, 2, (2, 5, 2, 1, 1, 1)), rng.normal(size=(2, 5, 2, 1, 1, 3))
    members = (scale * one + shift).astype(np.float32)
    merged, spread = merge_latents(members, "lsq")
    centred = [np.asarray(z - z.mean((3, 4), keepdims=True)).reshape(4, -1) for z in (merged, one)]
    for a, b in zip(*centred, strict=True):
        assert np.corrcoef(a, b)[0, 1] > 1 - 1e-6
    assert spread.max() < 1e-5 < merge_latents(members, "median")[1].max()
    np.testing.assert_allclose(merged.mean((3, 4)), members.mean((1, 3, 4))[:, None], atol=1e-5)
    outlier = members.copy()
    outlier[:, 0] = -outlier[:, 0]
    again = np.asarray(merge_latents(outlier, "lsq")[0])
    assert np.corrcoef((again - again.mean((3, 4), keepdims=True))[0, 0, 0].ravel(), centred[1][0])[0, 1] > 0.99


@pytest.mark.parametrize("task", ["depth", "flow"])
def test_predictor(predictor, make_image, task):
    """One member is the ordinary path bit for bit; of several the batches do not matter, and one is decoded."""
    image, other = make_image(), make_image(seed=1)
    prompt = {"flow": other}.get(task)
    plain = predictor(image, task, 2, 1, prompt=prompt)
    merged = predictor(image, task, 2, 1, prompt=prompt, merge_in="latents")
    np.testing.assert_array_equal(plain.prediction, merged.prediction)
    whole = predictor(image, task, 2, 5, prompt=prompt, merge_in="latents")
    seen = []
    raws = predictor.raw_inputs([image], task, [prompt])
    settings = Settings(2, 5, merge_in="latents")
    (parts,) = predictor.stream(raws, task, settings, 0, batch_size=2, watch=seen.append)
    np.testing.assert_allclose(whole.prediction, parts.prediction, atol=1e-5)
    assert whole.forwards == 10 == parts.forwards and [one.forwards for one in seen] == [4, 8]
    assert len(whole.members) == 1 and whole.uncertainty.shape == image.shape[:2]
    assert whole.uncertainty.max() > 0 and np.isfinite(whole.uncertainty).all()


def test_a_cell_is_what_the_predictor_gives_and_counts_one_decode(predictor, make_image):
    truth = {"depth": np.linspace(1, 9, 40 * 56, dtype=np.float32).reshape(40, 56), "valid": np.ones((40, 56), bool)}
    source = [{"key": str(i), "image": make_image(seed=i), **truth} for i in range(2)]
    protocol = get_protocol("depth", "scenes")
    result, _ = sweep(predictor, source, "depth", protocol, [2], [1, 3], adaptive=Adaptive(latents=True), batch_size=4)
    one, three, latents = result["cells"]
    assert (
        "merge_in" not in three and latents["merge_in"] == "latents" and solver_of(latents) == "ddim merge_in latents"
    )
    assert latents["macs"] == three["macs"] and latents["seconds"] > 0
    assert [cell["decoder_macs"] / result["macs_per_decode"] for cell in (one, three, latents)] == [1, 3, 1]
    answers = [predictor(raw["image"], "depth", 2, 3, merge_in="latents").prediction for raw in source]
    assert [len(np.unique(answer)) > 9 for answer in answers] == [True, True]
    plain, _ = sweep(predictor, source, "depth", protocol, [2], [1, 3], batch_size=4)
    for a, b in zip(plain["cells"], (one, three), strict=True):
        for row, other in zip(a["rows"], b["rows"], strict=True):
            assert row["abs_rel"] == pytest.approx(other["abs_rel"], rel=1e-4)
    for answer, raw, row in zip(answers, source, latents["rows"], strict=True):
        found = measure(answer, prepare_raw(raw, protocol), protocol)
        assert found["abs_rel"] == pytest.approx(row["abs_rel"], rel=1e-4)


def test_macs_of_a_graph():
    kernel, dense = np.zeros((3, 3, 4, 6), np.float32), np.zeros((6, 5), np.float32)

    def graph(x):
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.lax.scan(lambda c, _: (c, jax.jit(jnp.matmul)(c, dense)), y, length=3)[1]

    assert graph_macs(graph, np.zeros((2, 8, 8, 4), np.float32)) == 2 * 64 * (9 * 4 * 6 + 3 * 6 * 5)


def test_what_is_refused(predictor, make_image):
    with pytest.raises(UserError, match=r"unknown merge_in 'latent'.*latents"):
        Settings(merge_in="latent")
    for name in ("tolerance", "step_tolerance"):
        with pytest.raises(UserError, match=f"merge_in 'latents' does not go with {name}"):
            Settings(merge_in="latents", **{name: 0.1})
    with pytest.raises(UserError, match="no way to merge depth latents: give lsq, median"):
        predictor(make_image(), "depth", reduce="marigold", merge_in="latents")
    with pytest.raises(UserError, match="neither tolerance, aspect, merge_in"):
        predictor.intermediates(make_image(), merge_in="latents")
    with pytest.raises(UserError, match="leave out --merge-in"):
        check_clip(dataclasses.replace(Settings(), merge_in="latents"), Motion())
