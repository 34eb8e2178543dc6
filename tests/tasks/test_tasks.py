"""The table of tasks, options, and what all tasks promise."""

import json

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from scaling_perception.support.errors import UserError
from scaling_perception.tasks import RELEASED, TASKS, TaskOptions, fields_of, get_pass, get_task

OPTIONS = TaskOptions()


def test_passes_are_the_released_labels():
    assert RELEASED == ("depth", "amodal", "flow_x", "flow_y")
    assert [[one.id for one in TASKS[name].passes] for name in ("depth", "amodal", "flow", "generation")] == [
        [0],
        [1],
        [2, 3],
        [4],
    ]


def test_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match="unknown task 'dept'; did you mean 'depth'"):
        get_task("dept")


def test_options_survive_json_and_refuse_nonsense():
    options = TaskOptions(flow_divisor=40.0, depth_quantiles=(0.1, 0.9))
    assert TaskOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options
    for bad in (
        {"flow_divisor": 0},
        {"depth_quantiles": (0.9, 0.1)},
        {"mask_threshold": 300},
        {"flow_refine": 5},
        {"flow_refine": 0.5},
        {"mask_opening": -1, "keep_visible": True},
        {"mask_opening": 1.0, "keep_visible": True},
        {"mask_opening": 1},
        {"flow_diviser": 1},
        {"flow_divisor": "75"},
        {"flow_divisor": True},
        {"flow_divisor": float("inf")},
        {"mask_threshold": None},
        {"depth_quantiles": "ab"},
        {"depth_quantiles": [0.1]},
        {"depth_quantiles": [0.1, "0.9"]},
    ):
        with pytest.raises(UserError, match="flow_divisor|flow_refine|depth_quantiles|mask_threshold|mask_opening"):
            TaskOptions.from_dict(bad)


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("size", [(16, 16), (33, 47), (3, 64), (70, 2)])
def test_samples_have_the_promised_fields(task, size, make_raw):
    what = get_task(task)
    raw = make_raw(*size, label=7)
    before = {name: np.array(value, copy=True) for name, value in raw.items()}
    samples = what.encode(raw, 16, OPTIONS)
    assert [get_pass(int(s["pass_id"])) for s in samples] == list(what.passes)
    inputs = what.conditions(raw, 16, OPTIONS)
    assert sorted([*inputs, "target"]) == sorted(fields_of(task))
    for sample in samples:
        assert sorted(sample) == sorted([*fields_of(task), "key", "label", "pass_id", "valid"])
        for field in fields_of(task):
            assert sample[field].shape == (16, 16, 3) and sample[field].dtype == np.float32
        for field in inputs:
            np.testing.assert_array_equal(sample[field], inputs[field])
            assert np.abs(sample[field]).max() <= 1
        assert sample["valid"].shape == (16, 16) and sample["valid"].dtype == bool
        assert sample["pass_id"].dtype == np.int32 and sample["label"] == 7 and sample["key"] == raw["key"]
    for name, value in before.items():
        np.testing.assert_array_equal(raw[name], value)  # pure: the raw sample is untouched


@pytest.mark.parametrize("task", sorted(TASKS))
def test_class_label_defaults_to_none(task, make_raw):
    assert get_task(task).encode(make_raw(8, 8), 8, OPTIONS)[0]["label"] == -1


@pytest.mark.parametrize(
    ("task", "field"),
    [
        ("depth", "image"),
        ("depth", "depth"),
        ("flow", "image2"),
        ("flow", "flow"),
        ("amodal", "visible_mask"),
        ("amodal", "whole"),
    ],
)
def test_missing_or_mis_sized_fields_name_the_sample(task, field, make_raw):
    raw = make_raw(12, 10)
    del raw[field]
    with pytest.raises(UserError, match=f"sample 'made/12x10' has no {field}"):
        get_task(task).encode(raw, 8, OPTIONS)
    if field != "image":
        raw = make_raw(12, 10)
        raw[field] = raw[field][:-1]
        with pytest.raises(UserError, match=f"{field} is 10x11 but image is 10x12"):
            get_task(task).encode(raw, 8, OPTIONS)


@pytest.mark.parametrize(("shape", "dtype"), [((8, 8), np.uint8), ((8, 8, 4), np.uint8), ((8, 8, 3), np.float32)])
def test_images_must_be_eight_bit_rgb(shape, dtype, make_raw):
    with pytest.raises(UserError, match="sample 'made/8x8': image has shape"):
        get_task("depth").encode(make_raw(8, 8, image=np.zeros(shape, dtype)), 8, OPTIONS)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_decoding_refuses_other_shapes(task):
    for shape in ((3, 1, 8, 8, 3), (1, 8, 8, 3)):
        with pytest.raises((ValueError, TypeCheckError), match="expected|Type-check"):
            get_task(task).decode_prediction(np.zeros(shape), (8, 8), OPTIONS)
