"""Amodal encoding and pix2gestalt's threshold."""

import dataclasses

import numpy as np
import pytest

from scaling_perception.support.errors import UserError
from scaling_perception.tasks import TaskOptions, amodal

OPTIONS = TaskOptions()


def test_prompt_is_plus_minus_one_and_target_is_the_picture(make_raw):
    raw = make_raw(16, 16)
    sample = amodal.encode(raw, 16, OPTIONS)[0]
    np.testing.assert_array_equal(sample["prompt"], np.where(raw["visible_mask"][..., None], 1, -1).repeat(3, -1))
    np.testing.assert_allclose(sample["target"], raw["whole"] / 127.5 - 1, atol=1e-6)
    assert sample["valid"].all()
    halved = amodal.encode(raw, 8, OPTIONS)[0]
    assert set(np.unique(halved["prompt"])) == {-1.0, 1.0}  # nearest: no grey mask


def test_prediction_needs_no_truth(make_raw):
    raw = make_raw(10, 14)
    inputs = amodal.conditions({k: raw[k] for k in ("key", "image", "visible_mask")}, 8, OPTIONS)
    assert inputs["image"].shape == inputs["prompt"].shape == (8, 8, 3)


@pytest.mark.parametrize("size", [16, 23])
def test_decoding_inverts_encoding_exactly(make_raw, size):
    raw = make_raw(size, size)
    out = amodal.decode_prediction(amodal.encode(raw, size, OPTIONS)[0]["target"][None, None], (size, size), OPTIONS)
    assert out.shape == (1, size, size, 3)
    np.testing.assert_array_equal(np.round((out[0] + 1) * 127.5).astype(np.uint8), raw["whole"])


def test_decoding_clips_and_resizes():
    pixels = np.full((1, 2, 8, 8, 3), 4.0, np.float32)
    pixels[0, 1] = -3
    out = amodal.decode_prediction(pixels, (3, 40), OPTIONS)
    assert out.shape == (2, 3, 40, 3) and (out[0] == 1).all() and (out[1] == -1).all()


def test_threshold_weighs_red_as_blue():
    colours = np.array(
        [
            [255, 255, 255],  # white: background
            [250, 250, 250],  # grey 250: object
            [251, 251, 251],
            [255, 255, 238],  # 0.299 on the third channel: 249.917
            [255, 255, 239],  # 250.216
            [211, 255, 255],  # 0.114 on the first channel: 249.984
            [212, 255, 255],  # 250.098
            [0, 0, 0],
        ],
        np.uint8,
    )
    rgb = (colours.astype(np.float32) / np.float32(127.5)) - 1
    assert amodal.mask_from_whole(rgb).tolist() == [False, True, False, True, False, True, False, True]
    assert amodal.mask_from_whole(rgb, threshold=100).tolist() == [False] * 7 + [True]


def test_threshold_is_exact_for_every_grey():
    grey = np.arange(256, dtype=np.uint8)
    rgb = np.repeat((grey.astype(np.float32) / np.float32(127.5) - 1)[:, None], 3, axis=1)
    for threshold in (17, 128, 250):
        np.testing.assert_array_equal(amodal.mask_from_whole(rgb, threshold), grey <= threshold)


def test_mask_of_several_members(make_raw):
    rgb = np.random.default_rng(0).uniform(-1.2, 1.2, (3, 5, 6, 3)).astype(np.float32)
    assert amodal.mask_from_whole(rgb).shape == (3, 5, 6)


def test_a_thin_rim_beside_the_given_mask_is_left_out():
    """What is painted joins where a square of three pixels fits: the hidden half does, not the rim around it."""
    visible = np.zeros((32, 32), bool)
    visible[8:20, 4:14] = True
    painted = np.full((32, 32, 3), 1.0, np.float32)
    painted[7:21, 3:15] = -1  # a rim of one pixel
    painted[10:16, 14:24] = -1  # the hidden part
    painted[0:2, 28:32] = -1  # a corner: goes on beyond the border, as far as anybody knows
    painted[31, 0:10] = -1  # one row at the border
    options = TaskOptions(keep_visible=True, mask_opening=1)
    hidden = np.zeros((32, 32), bool)
    hidden[10:16, 14:24] = hidden[0:2, 28:32] = True

    answer = amodal.restore(painted, (32, 32), options, visible)
    np.testing.assert_array_equal(answer.prediction, visible | hidden)
    np.testing.assert_array_equal(answer.painted, amodal.mask_from_whole(painted))  # as it was painted, rim and all
    twice = amodal.restore(painted, (64, 64), options, visible.repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(twice.prediction, answer.prediction.repeat(2, 0).repeat(2, 1))
    unasked = amodal.restore(painted, (32, 32), options, None)
    np.testing.assert_array_equal(unasked.prediction, answer.painted)  # nothing was given: nothing is beside it

    wide = dataclasses.replace(options, mask_opening=3)  # the hidden part is six pixels high
    without = amodal.restore(painted, (32, 32), wide, visible).prediction
    np.testing.assert_array_equal(without, visible)


def test_opening_by_its_definition():
    mask = np.random.default_rng(0).random((20, 30)) < 0.8
    beyond = np.pad(mask, 2, constant_values=True)
    expected = np.zeros_like(mask)
    for row in range(20):
        for column in range(30):
            if beyond[row : row + 5, column : column + 5].all():
                expected[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3] = True
    assert expected.any() and not expected.all()
    np.testing.assert_array_equal(amodal.opened(mask, 2), expected & mask)


def _object(white=255):
    visible, whole_mask = np.zeros((2, 20, 30), bool)
    visible[4:16, 5:15], whole_mask[4:16, 5:25] = True, True
    whole = np.where(whole_mask[..., None], np.uint8(90), np.uint8(white)).repeat(3, -1)
    return {"visible_mask": visible, "whole_mask": whole_mask, "whole": whole}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"whole_mask": ~_object()["whole_mask"]}, "0% of visible_mask lies in the mask of the whole object"),
        ({"visible_mask": ~_object()["visible_mask"]}, "25% of visible_mask lies"),
        ({"visible_mask": ~_object()["visible_mask"], "whole_mask": None}, "25% of visible_mask lies"),
        ({"whole": _object(0)["whole"]}, "whole has colours in 100.0% of its pixels: give the whole object on white"),
        ({"whole": _object(200)["whole"], "whole_mask": None}, "give the whole object on white"),
        ({"whole_mask": np.zeros((20, 30), bool)}, "whole_mask is empty"),
    ],
)
def test_masks_that_cannot_be_of_one_object_are_refused(changes, told):
    with pytest.raises(UserError, match=told):
        amodal.inspect(_object() | changes, (20, 30))


@pytest.mark.parametrize("missing", [(), ("whole",), ("whole_mask",), ("whole", "whole_mask")])
def test_masks_of_one_object_pass(missing):
    raw = {name: value for name, value in _object().items() if name not in missing}
    assert amodal.inspect(raw, (20, 30)) == {"visible": 0.2}
    if "whole" in missing:  # an object that is all of the picture, such as a wall
        raw |= {"whole_mask": np.ones((20, 30), bool)}
        amodal.inspect(raw, (20, 30))
