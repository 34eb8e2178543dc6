"""Resizers against the definition of their filter, and by their properties."""

import numpy as np
import pytest

from scaling_perception.tasks.resize import nearest_index, resize_bilinear, resize_flow, resize_nearest

SIZES = [
    ((8, 8), (8, 8)),
    ((37, 53), (16, 16)),
    ((16, 16), (41, 29)),
    ((3, 200), (16, 16)),
    ((200, 1), (16, 16)),
    ((1, 1), (5, 7)),
]


def triangle(length, wanted):
    """The matrix of the filter, straight from its definition: a triangle one (wider) pixel to each side."""
    scale = length / wanted
    support = max(scale, 1.0)
    centre = (np.arange(wanted)[:, None] + 0.5) * scale
    weight = np.maximum(0, 1 - np.abs(np.arange(length)[None] + 0.5 - centre) / support)
    return weight / weight.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("native", "wanted"), SIZES)
def test_bilinear_is_the_triangle_filter(native, wanted):
    array = np.random.default_rng(0).normal(size=native)
    expected = triangle(native[0], wanted[0]) @ array @ triangle(native[1], wanted[1]).T
    out = resize_bilinear(array, wanted)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_bilinear_handles_channels_alike_and_copies():
    array = np.random.default_rng(1).normal(size=(9, 14, 3)).astype(np.float32)
    out = resize_bilinear(array, (5, 20))
    for channel in range(3):
        np.testing.assert_array_equal(out[..., channel], resize_bilinear(array[..., channel], (5, 20)))
    same = resize_bilinear(array, (9, 14))
    np.testing.assert_array_equal(same, array)
    same[0] = 7
    assert not (array[0] == 7).any()


@pytest.mark.parametrize(("native", "wanted"), SIZES)
def test_bilinear_keeps_constants_and_bounds(native, wanted):
    np.testing.assert_allclose(resize_bilinear(np.full(native, 3.25), wanted), 3.25, rtol=1e-6)
    noise = np.random.default_rng(2).uniform(-1, 1, native)
    assert np.abs(resize_bilinear(noise, wanted)).max() <= 1 + 1e-6


def test_nearest_takes_exact_centres():
    assert nearest_index(4, 2).tolist() == [1, 3]  # torch nearest-exact; plain nearest would give 0, 2
    assert nearest_index(2, 4).tolist() == [0, 0, 1, 1]
    array = np.arange(12, dtype=np.uint16).reshape(3, 4)
    out = resize_nearest(array, (6, 2))
    assert out.dtype == np.uint16
    assert out.tolist() == [[1, 3], [1, 3], [5, 7], [5, 7], [9, 11], [9, 11]]


def test_flow_ignores_invalid_pixels():
    flow = np.full((8, 12, 2), (4.0, -3.0), np.float32)
    valid = np.random.default_rng(3).random((8, 12)) < 0.4
    valid[:2] = False
    flow[~valid] = np.nan
    flow[0, 0] = 1e10
    for size in [(8, 12), (5, 5), (16, 24)]:
        out, good = resize_flow(flow, valid, size)
        np.testing.assert_allclose(out[good], np.broadcast_to((4.0, -3.0), out[good].shape), rtol=1e-5)
        assert not out[~good].any()
        np.testing.assert_array_equal(good, resize_nearest(valid, size))
        assert good.any() and not good.all()
