"""Augmentation: what each change must leave as it is, and that it hangs on (seed, element number) alone."""

import numpy as np
import pytest
import stand_ins
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling_perception.data.augment import Augment, Crop, Jitter
from scaling_perception.data.pipeline import Batches
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import TaskOptions, get_task

OPTIONS, SIDE = TaskOptions(), 32
DRAWS = st.integers(0, 2**63 - 1)
LEAST = st.floats(0.2, 0.95)


def raw_sample(height=48, width=64):
    """A sample whose fields say where each pixel came from."""
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    place = (rows * width + columns)[..., None]
    image = np.stack([rows * 5, columns * 3, (rows + columns) * 2], -1).astype(np.uint8)
    normals = np.stack([columns - 20, rows - 10, np.full_like(rows, -30)], -1)
    mask = np.zeros((height, width), bool)
    mask[height // 2, width // 2] = mask[height // 2 + 1, width // 2] = True  # small: most crops lose it
    return {
        "key": "sample",
        "image": image,
        "image2": 255 - image,
        "depth": place[..., 0] + 1,
        "flow": np.concatenate([place / 40, -place / 30], -1),
        "normals": normals / np.linalg.norm(normals, axis=-1, keepdims=True),
        "visible_mask": mask,
        "whole_mask": mask,
        "whole": image,
        "valid": np.ones((height, width), bool),
        "label": 3,
    }


RAW = raw_sample()


@settings(max_examples=60, deadline=None)
@given(draw=DRAWS, least=LEAST)
def test_a_crop_is_one_window_of_every_field(draw, least):
    cut = Crop(least)(RAW, np.random.default_rng(draw))
    height, width = cut["depth"].shape
    top, left = divmod(int(cut["depth"][0, 0]) - 1, 64)
    assert least * 48 - 1 <= height <= 48 and abs(height / 48 - width / 64) <= 1 / 48
    for name, value in RAW.items():
        if np.ndim(value) >= 2:
            np.testing.assert_array_equal(cut[name], value[top : top + height, left : left + width], err_msg=name)
        else:
            assert cut[name] == value
    np.testing.assert_allclose(np.linalg.norm(cut["normals"], axis=-1), 1, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(draw=DRAWS, least=LEAST)
def test_encoded_crops_follow_the_window(draw, least):
    """Depth is normalised within the window, flow counts in its width, normals keep their length."""
    augment = Augment(Crop(least))
    window = augment.crop(RAW, np.random.default_rng([draw, 0]))
    (depth,) = augment.encode(get_task("depth"), RAW, SIDE, OPTIONS, draw)
    low, high = np.quantile(window["depth"], OPTIONS.depth_quantiles)
    kept = np.clip(2 * (window["depth"].astype(np.float64) - low) / (high - low) - 1, -1, 1)
    np.testing.assert_allclose([depth["target"].min(), depth["target"].max()], [kept.min(), kept.max()], atol=0.1)
    assert depth["target"].min() == -1 and np.all(np.diff(depth["target"][:, 0, 0]) >= 0)

    across, down = augment.encode(get_task("flow"), RAW, SIDE, OPTIONS, draw)
    height, width = window["flow"].shape[:2]
    for channel, sample in enumerate((across, down)):
        mean = window["flow"][..., channel].mean() * 512 / width / OPTIONS.flow_divisor
        assert sample["target"].mean() == pytest.approx(mean, rel=1e-3)
    np.testing.assert_allclose(across["image"] + across["prompt"], 0, atol=1e-5)  # both frames: the same window

    (normals,) = augment.encode(get_task("normals"), RAW, SIDE, OPTIONS, draw)
    np.testing.assert_allclose(np.linalg.norm(normals["target"], axis=-1), 1, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(draw=DRAWS, least=st.floats(0.05, 0.5))
def test_what_a_mask_asks_for_stays_in_the_picture(draw, least):
    (made,) = Augment(Crop(least)).encode(get_task("amodal"), RAW, 48, OPTIONS, draw)
    assert (made["prompt"] > 0).any()
    np.testing.assert_array_equal(made["target"], made["image"])  # both cut alike: ``whole`` is the image here


def test_a_sample_that_no_crop_can_teach_is_taken_whole():
    few = np.zeros((48, 64), bool)
    few[0, :5] = few[-1, -5:] = True  # never ten of them in a smaller window
    augment, depth = Augment(Crop(0.3)), get_task("depth")
    (made,) = augment.encode(depth, {**RAW, "valid": few}, 64, OPTIONS, 1)
    (whole,) = depth.encode({**RAW, "valid": few}, 64, OPTIONS)
    np.testing.assert_array_equal(made["target"], whole["target"])
    with pytest.raises(UserError, match="no depth pixel is valid"):
        augment.encode(depth, {**RAW, "valid": few & False}, SIDE, OPTIONS, 1)
    with pytest.raises(UserError, match="depth is 60x48 but image is 64x48"):
        augment.encode(depth, {**RAW, "depth": RAW["depth"][:, :60]}, SIDE, OPTIONS, 1)


@settings(max_examples=40, deadline=None)
@given(draw=DRAWS, task=st.sampled_from(["depth", "flow", "amodal", "normals"]))
def test_colours_change_photographs_alone(draw, task):
    augment, what = Augment(jitter=Jitter(0.4, 0.4, 0.4, 0.1)), get_task(task)
    for made, plain in zip(
        augment.encode(what, RAW, SIDE, OPTIONS, draw), what.encode(RAW, SIDE, OPTIONS), strict=True
    ):
        assert not np.array_equal(made["image"], plain["image"])
        assert np.array_equal(made["prompt"], plain["prompt"]) == (task != "flow")
        np.testing.assert_array_equal(made["target"], plain["target"])
        np.testing.assert_array_equal(made["valid"], plain["valid"])
    same = augment.encode(what, {**RAW, "image2": RAW["image"]}, SIDE, OPTIONS, draw)[0]
    if task == "flow":
        np.testing.assert_array_equal(same["image"], same["prompt"])  # both frames alike


@settings(max_examples=40, deadline=None)
@given(draw=DRAWS, grey=st.integers(0, 255))
def test_colours_in_closed_form(draw, grey):
    flat = np.full((4, 5, 3), grey, np.uint8)
    (turned,) = Jitter(contrast=1.0, saturation=1.0, hue=0.5)([flat], np.random.default_rng(draw))
    np.testing.assert_array_equal(turned, flat)  # grey has neither saturation nor hue, and is its own mean
    factor = np.random.default_rng(draw).uniform(0.5, 1.5)
    (bright,) = Jitter(brightness=0.5)([flat], np.random.default_rng(draw))
    assert np.abs(bright.astype(int) - min(255, grey * factor)).max() <= 0.5001
    picture = RAW["image"]
    (spun,) = Jitter(hue=1 / 3)([picture // 2], Turn())  # a third of the circle: channels change places
    np.testing.assert_allclose(spun, np.roll(picture // 2, 1, -1), atol=1)
    (plain,) = Jitter()([picture], np.random.default_rng(draw))
    np.testing.assert_array_equal(plain, picture)


class Turn:
    def uniform(self, low, high):
        return high


@pytest.fixture
def open_(monkeypatch):
    stand_ins.install(monkeypatch.setattr)
    entry = {"source": "scenes", "count": 8}
    data = {
        "mixture": {"d": {**entry, "task": "depth"}, "f": {**entry, "task": "flow"}},
        "flip": True,
        "resolution": 32,
    }

    def make(augment=None, size=8, seed=1, **more):
        return Batches({**data, **({} if augment is None else {"augment": augment}), **more}, size, seed)

    return make


def test_changes_hang_on_seed_and_element_alone(open_):
    augment = {"crop": 0.5, "brightness": 0.3}
    batches = open_(augment)
    first, again, halves = batches.at(3), open_(augment).at(3), [open_(augment, size=4).at(step) for step in (6, 7)]
    for name in ("image", "prompt", "target", "valid"):
        np.testing.assert_array_equal(first[name], again[name])
        np.testing.assert_array_equal(first[name], np.concatenate([half[name] for half in halves]))
        np.testing.assert_array_equal(first[name][[1, 6]], batches.holding([1, 6]).at(3)[name])
    plain = open_()
    assert first["key"] == plain.at(3)["key"] and not np.array_equal(first["target"], plain.at(3)["target"])
    assert [one[:3] for one in batches.elements(3)] == [one[:3] for one in plain.elements(3)]  # order and flips stay
    draws = [one.draw for step in range(4) for one in batches.elements(step)]
    assert len(set(draws)) == len(draws) and not any(one.draw for one in plain.elements(3))
    assert not np.array_equal(first["image"], open_(augment, seed=2).at(3)["image"])


def test_the_fingerprint_has_what_changes_something(open_):
    plain = open_().fingerprint
    assert open_({"crop": 1.0, "hue": 0.0}).fingerprint == plain and "augment" not in plain
    found = [open_({"crop": 0.5}).fingerprint, open_({"crop": 0.6}).fingerprint, open_({"hue": 0.1}).fingerprint]
    assert len({str(one["augment"]) for one in found}) == 3


@pytest.mark.parametrize(
    ("augment", "named"),
    [
        ({"crop": 0.0}, "data.augment.crop is 0.0"),
        ({"crop": float("nan")}, "data.augment.crop is nan"),
        ({"hue": 0.7}, "data.augment.hue is 0.7"),
        ({"crops": 0.5}, "data.augment.crops; did you mean 'crop'"),
    ],
)
def test_mistakes_are_told(open_, augment, named):
    with pytest.raises(UserError) as caught:
        open_(augment)
    assert named in str(caught.value)


def test_what_cannot_be_changed_is_refused(open_, tmp_path):
    stand_ins.prepare(tmp_path / "cache", "--tasks", "depth")
    for augment in ({"crop": 0.5}, {"hue": 0.1}):
        with pytest.raises(UserError, match=f"data.augment.{next(iter(augment))} changes pictures, and data.cache"):
            open_(augment, cache=str(tmp_path / "cache"), mixture={})
    generation = {"mixture": {"g": {"source": "scenes", "task": "generation", "count": 8}}}
    with pytest.raises(UserError, match="data.augment.hue changes the pictures that generation learns to make"):
        open_({"hue": 0.1}, **generation)
    assert open_({"crop": 0.5}, **generation).at(0)["target"].shape == (8, 32, 32, 3)
