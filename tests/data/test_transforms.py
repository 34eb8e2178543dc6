"""The mirror: an involution that keeps the meaning of every field."""

import numpy as np

from scaling_perception.data.transforms import flip
from scaling_perception.tasks import TaskOptions, flow


def make():
    rng = np.random.default_rng(0)
    return {
        "key": "a",
        "label": 3,
        "image": rng.integers(0, 256, (6, 9, 3), dtype=np.uint8),
        "image2": rng.integers(0, 256, (6, 9, 3), dtype=np.uint8),
        "flow": rng.normal(size=(6, 9, 2)).astype(np.float32),
        "valid": rng.random((6, 9)) < 0.5,
        "intrinsics": np.array([[5.0, 0, 3], [0, 5, 2], [0, 0, 1]], np.float32),
    }


def test_flipping_twice_is_nothing():
    raw = make()
    twice = flip(flip(raw))
    for name, value in raw.items():
        np.testing.assert_array_equal(twice[name], value)


def test_flow_keeps_pointing_at_the_same_thing():
    raw = make()
    out = flip(raw)
    np.testing.assert_array_equal(out["flow"][2, 1], raw["flow"][2, 7] * [-1, 1])
    np.testing.assert_array_equal(out["image"][:, 0], raw["image"][:, -1])
    np.testing.assert_array_equal(out["valid"], raw["valid"][:, ::-1])
    assert out["intrinsics"][0, 2] == 5 and raw["intrinsics"][0, 2] == 3
    assert out["label"] == 3 and out["key"] == "a"


def test_flip_and_encode_commute():
    raw = make()
    x, y = flow.encode(raw, 9, TaskOptions())
    fx, fy = flow.encode(flip(raw), 9, TaskOptions())
    np.testing.assert_allclose(fx["target"], -x["target"][:, ::-1], atol=1e-6)
    np.testing.assert_allclose(fy["target"], y["target"][:, ::-1], atol=1e-6)
    np.testing.assert_allclose(fx["prompt"], x["prompt"][:, ::-1], atol=1e-6)
