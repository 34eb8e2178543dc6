"""Depth encoding against the authors' normaliser, and the odd maps."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from scaling_perception.support.errors import UserError
from scaling_perception.tasks import TaskOptions, depth
from scaling_perception.tasks.resize import resize_nearest

OPTIONS = TaskOptions()


@pytest.mark.parametrize("quantile", [0.02, 0.1, 0.0])
def test_normalise_equals_the_authors(golden, quantile):
    arrays = load_file(golden / "tasks" / "depth_normaliser.safetensors")
    values, mask = arrays["in/depth"][0], arrays["in/valid_mask"][0]
    expected = arrays[f"out/q{quantile}_clipTrue_-1.0_1.0/masked"][0]
    out = depth.normalise(values, mask, (quantile, 1 - quantile))
    good = mask & (values > 0)
    assert 0 < good.sum() < good.size
    np.testing.assert_allclose(out[good], expected[good], atol=2e-6)
    assert (out[~good] == 1).all()  # ours: the far plane; the authors leave the near one (facts 5.1)


@pytest.mark.parametrize("size", [(16, 16), (31, 45), (5, 160)])
def test_decoding_inverts_encoding(make_raw, size):
    """At native resolution the decoded map is the clipped depth up to one scale and shift, exactly."""
    raw = make_raw(*size)
    low, high = np.quantile(raw["depth"].astype(np.float64), OPTIONS.depth_quantiles)
    sample = depth.encode(raw, 16, OPTIONS)[0]
    out = depth.decode_prediction(sample["target"][None, None], (16, 16), OPTIONS)
    assert out.shape == (1, 16, 16) and out.dtype == np.float32
    expected = resize_nearest(np.clip(raw["depth"], low, high), (16, 16))
    np.testing.assert_allclose(out[0] * (high - low) + low, expected, atol=1e-5)


def test_smooth_depth_survives_odd_sizes():
    rows, columns = np.mgrid[0:90, 0:131]
    plane = (2 + rows * 0.03 + columns * 0.01).astype(np.float32)
    raw = {"key": "plane", "image": np.zeros((90, 131, 3), np.uint8), "depth": plane, "valid": np.ones((90, 131), bool)}
    sample = depth.encode(raw, 64, OPTIONS)[0]
    out = depth.decode_prediction(sample["target"][None, None], (90, 131), OPTIONS)[0]
    low, high = np.quantile(plane, OPTIONS.depth_quantiles)
    assert np.abs(out * (high - low) + low - np.clip(plane, low, high)).max() < 0.04  # under one 64-cell of slope


def test_prompt_is_constant_and_never_shows_validity(make_raw):
    valid = np.zeros((12, 12), bool)
    valid[3:9] = True
    sample = depth.encode(make_raw(12, 12, valid=valid), 12, OPTIONS)[0]
    assert (sample["prompt"] == 1).all()
    np.testing.assert_array_equal(sample["valid"], valid)
    assert (sample["target"][~valid] == 1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0, -2.0])
def test_bad_depths_are_invalid_and_far(make_raw, bad):
    raw = make_raw(10, 10)
    raw["depth"][2:4, 5] = bad
    sample = depth.encode(raw, 10, OPTIONS)[0]
    assert (~sample["valid"]).sum() == 2 and not sample["valid"][2:4, 5].any()
    assert (sample["target"][2:4, 5] == 1).all() and np.isfinite(sample["target"]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_nothing_valid_names_the_sample(make_raw, bad):
    with pytest.raises(UserError, match="sample 'made/10x10': no depth pixel is valid"):
        depth.encode(make_raw(10, 10, depth=np.full((10, 10), bad, np.float32)), 8, OPTIONS)
    with pytest.raises(UserError, match="sample 'made/10x10': no depth pixel is valid"):
        depth.encode(make_raw(10, 10, valid=np.zeros((10, 10), bool)), 8, OPTIONS)


def test_constant_map_is_the_middle(make_raw):
    sample = depth.encode(make_raw(10, 10, depth=np.full((10, 10), 3.7, np.float32)), 8, OPTIONS)[0]
    assert (sample["target"] == 0).all()
    mostly = np.full((100, 100), 3.7, np.float32)
    mostly[0, 0], mostly[1, 1] = 1.0, 9.0
    out = depth.normalise(mostly, np.ones_like(mostly, bool))
    assert out[0, 0] == -1 and out[1, 1] == 1 and (out == 0).sum() == mostly.size - 2


def test_decoding_clips_and_averages_channels():
    pixels = np.zeros((1, 2, 4, 4, 3), np.float32)
    pixels[0, 0] = (3.0, -0.5, 0.5)  # mean 1
    pixels[0, 1] = -9
    out = depth.decode_prediction(pixels, (7, 5), OPTIONS)
    assert out.shape == (2, 7, 5)
    np.testing.assert_allclose(out[0], 1, atol=1e-6)
    assert (out[1] == 0).all()


def test_depth_must_have_one_channel(make_raw):
    with pytest.raises(UserError, match="give one channel"):
        depth.encode(make_raw(6, 6, depth=np.ones((6, 6, 3), np.float32)), 8, OPTIONS)
