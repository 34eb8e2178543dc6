"""Flow encoding: scale, inversion, validity."""

import numpy as np
import pytest

from scaling_perception.support.errors import UserError
from scaling_perception.tasks import TaskOptions, flow

OPTIONS, SQUARE = TaskOptions(), TaskOptions(flow_frame="square")


def pixels_of(samples):
    return np.stack([sample["target"] for sample in samples])[:, None]


def test_chairs_size_is_plain_division(make_raw):
    """At 512 wide the target is u/75 and v/75, both components alike in spite of the vertical stretch (facts 5.2)."""
    raw = make_raw(384, 512, flow=np.tile(np.float32([-121.0, 37.5]), (384, 512, 1)))
    x, y = flow.encode(raw, 32, OPTIONS)
    np.testing.assert_allclose(x["target"], -121 / 75, rtol=1e-6)  # beyond -1: not clipped
    np.testing.assert_allclose(y["target"], 0.5, rtol=1e-6)
    assert (x["pass_id"], y["pass_id"]) == (2, 3)


def test_values_are_pixels_of_a_512_wide_frame(make_raw):
    """The same relative motion gives the same target at any native size and resolution."""
    small = make_raw(96, 128, flow=np.tile(np.float32([10.0, -4.0]), (96, 128, 1)))
    large = make_raw(480, 640, flow=np.tile(np.float32([50.0, -20.0]), (480, 640, 1)))
    for resolution in (16, 64):
        first, second = (pixels_of(flow.encode(raw, resolution, OPTIONS)) for raw in (small, large))
        np.testing.assert_allclose(first, second, rtol=1e-5)


@pytest.mark.parametrize("divisor", [75.0, 20.0])
@pytest.mark.parametrize("size", [24, 31])
def test_decoding_inverts_encoding_exactly(make_raw, size, divisor):
    options = TaskOptions(flow_divisor=divisor)
    raw = make_raw(size, size)
    out = flow.decode_prediction(pixels_of(flow.encode(raw, size, options)), (size, size), options)
    assert out.shape == (1, size, size, 2) and out.dtype == np.float32
    np.testing.assert_allclose(out[0], raw["flow"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [OPTIONS, SQUARE], ids=["native", "square"])
@pytest.mark.parametrize("size", [(33, 57), (2, 300), (301, 3), (1, 1)])
def test_constant_motion_survives_any_aspect(make_raw, size, options):
    raw = make_raw(*size, flow=np.tile(np.float32([7.0, -2.0]), (*size, 1)))
    pixels = pixels_of(flow.encode(raw, 16, options))
    out = flow.decode_prediction(pixels, size, options)
    np.testing.assert_allclose(out[0], raw["flow"], rtol=1e-5)
    # the same by way of the model's square, where members are merged
    merged = flow.decode_prediction(pixels, (16, 16), options)[0]
    np.testing.assert_allclose(flow.native(merged, size, options), raw["flow"], rtol=1e-5)
    spread = flow.native(np.full((16, 16), 0.5, np.float32), size, options)
    np.testing.assert_allclose(spread, 0.5 * size[1] / 16, rtol=1e-5)


def test_in_the_square_a_motion_is_a_share_of_height_and_width(make_raw):
    """Shares of height and width become shares of the square, whatever the shape of the frame."""
    for height, width in ((48, 96), (96, 48), (64, 64)):
        raw = make_raw(height, width, flow=np.tile(np.float32([width / 4, -height / 8]), (height, width, 1)))
        target = pixels_of(flow.encode(raw, 32, SQUARE))[:, 0, ..., 0] * 75 * 32 / 512
        np.testing.assert_allclose(target, np.broadcast_to([[[8.0]], [[-4.0]]], target.shape), rtol=1e-5)
    square = make_raw(40, 40)
    for one, two in zip(flow.encode(square, 16, OPTIONS), flow.encode(square, 16, SQUARE), strict=True):
        np.testing.assert_array_equal(one["target"], two["target"])


def test_smooth_motion_survives_resizing():
    rows, columns = np.mgrid[0:75, 0:131].astype(np.float32)
    truth = np.stack([0.2 * columns - 5, 0.1 * rows + 0.05 * columns], axis=-1)
    black = np.zeros((75, 131, 3), np.uint8)
    raw = {"key": "zoom", "image": black, "image2": black, "flow": truth}
    out = flow.decode_prediction(pixels_of(flow.encode(raw, 64, OPTIONS)), (75, 131), OPTIONS)[0]
    np.testing.assert_allclose(out[6:-6, 6:-6], truth[6:-6, 6:-6], atol=0.01)  # linear, away from the border


def test_members_and_channel_mean():
    pixels = np.zeros((2, 3, 8, 8, 3), np.float32)
    pixels[0, 1] = (0.1, 0.2, 0.6)
    out = flow.decode_prediction(pixels, (4, 256), OPTIONS)
    assert out.shape == (3, 4, 256, 2)
    np.testing.assert_allclose(out[1, ..., 0], 0.3 * 75 * 256 / 512, rtol=1e-5)
    assert not out[0].any() and not out[1, ..., 1].any()


def test_unknown_flow_is_kept_out(make_raw):
    raw = make_raw(20, 20, flow=np.tile(np.float32([5.0, 1.0]), (20, 20, 1)))
    raw["valid"][4:9, 4:9] = False
    raw["flow"][~raw["valid"]] = 1e10
    raw["flow"][0, 0] = np.nan
    for sample, value in zip(flow.encode(raw, 12, OPTIONS), (5.0, 1.0), strict=True):
        assert 0 < sample["valid"].sum() < 144 and not sample["valid"][0, 0]
        np.testing.assert_allclose(sample["target"][sample["valid"]], value * 512 / 20 / 75, rtol=1e-5)
        assert not sample["target"][~sample["valid"]].any()


def test_nowhere_valid_and_wrong_channels_name_the_sample(make_raw):
    with pytest.raises(UserError, match="sample 'made/9x9': no flow pixel is valid"):
        flow.encode(make_raw(9, 9, valid=np.zeros((9, 9), bool)), 8, OPTIONS)
    with pytest.raises(UserError, match="two channels"):
        flow.encode(make_raw(9, 9, flow=np.zeros((9, 9, 3), np.float32)), 8, OPTIONS)


def test_prompt_is_the_second_frame(make_raw):
    raw = make_raw(8, 8)
    inputs = flow.conditions({k: raw[k] for k in ("key", "image", "image2")}, 8, OPTIONS)
    np.testing.assert_allclose(inputs["prompt"], raw["image2"] / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(inputs["image"], raw["image"] / 127.5 - 1, atol=1e-6)
