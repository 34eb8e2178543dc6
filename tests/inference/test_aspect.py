"""Padding and tiling: what goes in comes back, whatever the picture's shape."""

import numpy as np
import pytest

from scaling_perception.inference.aspect import ASPECTS, Box, blend, check_aspect, ramp, windows, with_aspect
from scaling_perception.inference.prediction import Estimate
from scaling_perception.support.errors import UserError

SIDE = 32


def field(height, width):
    """A smooth depth in [0, 1] as an 8-bit picture, and itself."""
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    depth = 0.6 * rows / height + 0.3 * columns / width + 0.1 * np.sin(columns / 9)
    depth = (depth - depth.min()) / (depth.max() - depth.min())
    return np.repeat((depth * 255).round().astype(np.uint8)[..., None], 3, axis=2), depth


def reader(task, shift=False):
    """A predictor that reads the answer off the picture; ``shift`` gives every window its own scale and shift."""
    seen = []

    def predict(raws):
        for count, raw in enumerate(raws):
            seen.append(raw["image"].shape)
            size = raw["image"].shape[:2]
            value = raw["image"][..., 0].astype(np.float32) / 255
            members = np.zeros((2, SIDE, SIDE), np.float32)
            if task == "flow":
                value = np.stack([value, -value], axis=-1)
                members = np.zeros((2, SIDE, SIDE, 2), np.float32)
            if shift:
                value = value * (0.5 + 0.1 * count) + 0.01 * count
            if task == "amodal":
                painted = np.repeat(value[..., None], 3, axis=2)
                yield Estimate(value > 0.5, np.zeros(size, np.float32), members, painted, size)
            else:
                yield Estimate(value, np.full(size, 0.1, np.float32), members, None, size)

    predict.seen = seen
    return predict


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("size", [(40, 100), (100, 40), (64, 64), (20, 30), (101, 77)])
def test_every_shape_comes_back_as_it_was(aspect, size):
    image, depth = field(*size)
    for task in ("depth", "flow", "amodal"):
        raws = [{"image": image, "key": "a"}, {"image": image[:, :-3], "key": "b"}]
        first, second = with_aspect(reader(task), raws, task, aspect, SIDE)
        assert first.size == size and second.size == (size[0], size[1] - 3)
        assert first.prediction.shape[:2] == first.uncertainty.shape == size
        if task == "depth":
            np.testing.assert_allclose(first.prediction, depth, atol=0.01)
            assert first.prediction.dtype == np.float32
        elif task == "flow":
            np.testing.assert_allclose(first.prediction, np.stack([depth, -depth], -1), atol=0.01)
        else:
            sure = np.abs(depth - 0.5) > 0.01
            assert first.prediction.dtype == bool and (first.prediction == (depth > 0.5))[sure].all()


def test_windows_of_own_scale_are_brought_to_the_whole_picture():
    image, depth = field(90, 140)
    (estimate,) = with_aspect(reader("depth", shift=True), [{"image": image}], "depth", "tile", SIDE)
    np.testing.assert_allclose(estimate.prediction, depth, atol=0.02)
    steps = np.abs(np.diff(estimate.prediction, axis=1)) - np.abs(np.diff(depth, axis=1))
    assert steps.max() < 0.02  # no seam


@pytest.mark.parametrize("size", [(64, 64), (90, 140), (33, 200)])
def test_tiles_of_an_amodal_picture_without_the_object_paint_nothing(size):
    """A model that paints noise where nothing is asked for, and otherwise just what it is asked for."""
    mask = np.zeros(size, bool)
    mask[8:30, size[1] // 3 : size[1] // 3 + 25] = True
    asked = []

    def predict(raws):
        for raw in raws:
            prompt = raw["visible_mask"]
            asked.append(prompt.any())
            answer = prompt if prompt.any() else np.random.default_rng(0).random(prompt.shape) < 0.5
            painted = np.repeat(answer[..., None].astype(np.float32), 3, axis=2)
            members = np.zeros((1, SIDE, SIDE, 3), np.float32)
            yield Estimate(answer, np.zeros(answer.shape, np.float32), members, painted, answer.shape)

    image = np.zeros((*size, 3), np.uint8)
    (estimate,) = with_aspect(predict, [{"image": image, "visible_mask": mask}], "amodal", "tile", SIDE)
    np.testing.assert_array_equal(estimate.prediction, mask)
    assert all(asked) and 1 < len(asked)
    np.testing.assert_allclose(estimate.whole[..., 0], mask, atol=1e-5)


@pytest.mark.parametrize("task", ["depth", "flow"])
def test_ramps_have_no_seams(task):
    """The second difference of a ramp is 0; at a seam it is the height of the step."""
    columns = np.linspace(0, 1, 150, dtype=np.float32)
    image = np.broadcast_to(columns[None, :, None], (90, 150, 3))

    def predict(raws):
        for count, raw in enumerate(raws):
            value = np.asarray(raw["image"][..., 0]) * (0.5 + 0.1 * (count % 5) if task == "depth" else 1)
            value = np.stack([value, -value], -1) if task == "flow" else value
            size, members = raw["image"].shape[:2], np.zeros((1, SIDE, SIDE), np.float32)
            yield Estimate(value, np.zeros(size, np.float32), members, None, size)

    (estimate,) = with_aspect(predict, [{"image": image}], task, "tile", SIDE)
    assert np.abs(np.diff(estimate.prediction, n=2, axis=1)).max() < 1e-5


def test_letterbox_shows_the_model_a_square_and_nothing_beyond_an_object():
    image, _ = field(40, 100)
    mask = np.ones((40, 100), bool)
    shown = []

    def predict(raws):
        for raw in raws:
            shown.append(raw)
            yield from reader("amodal")([raw])

    list(with_aspect(predict, [{"image": image, "visible_mask": mask}], "amodal", "letterbox", SIDE))
    assert shown[0]["image"].shape == (100, 100, 3)
    assert shown[0]["visible_mask"].sum() == mask.sum()
    np.testing.assert_array_equal(shown[0]["image"][0], shown[0]["image"][30])  # the border goes on


def test_letterbox_keeps_the_members_of_the_picture_alone():
    image, _ = field(40, 80)
    (estimate,) = with_aspect(reader("depth"), [{"image": image}], "depth", "letterbox", SIDE)
    assert estimate.members.shape == (2, SIDE // 2, SIDE)


def test_small_pictures_are_not_cut_and_large_ones_are_lazily():
    small, _ = field(40, 48)
    predict = reader("depth")
    list(with_aspect(predict, [{"image": small}], "depth", "tile", SIDE))
    assert predict.seen == [(40, 48, 3)]
    large, _ = field(64, 64)
    predict = reader("depth")
    stream = with_aspect(predict, ({"image": large} for _ in range(100)), "depth", "tile", SIDE)
    next(stream)
    assert len(predict.seen) == 1 + len(windows((64, 64), SIDE))


def test_windows_cover_with_overlap_and_weights_sum_smoothly():
    boxes = windows((70, 100), 32)
    covered = np.zeros((70, 100), int)
    for box in boxes:
        covered[box.top : box.top + box.height, box.left : box.left + box.width] += 1
    assert covered.min() >= 1
    tops = sorted({box.top for box in boxes})
    assert all(b - a <= 0.75 * 32 + 1 for a, b in zip(tops[:-1], tops[1:], strict=True))
    constant = blend([np.full((32, 32), 3.0, np.float32)] * len(boxes), boxes, (70, 100))
    np.testing.assert_allclose(constant, 3.0, rtol=1e-6)
    assert ramp(Box(0, 0, 32, 32), (32, 32)).min() == pytest.approx(1, abs=1e-5)  # no neighbour, no fall


def test_unknown_aspect_names_the_known_ones():
    with pytest.raises(UserError, match="did you mean 'letterbox'"):
        check_aspect("leterbox")
