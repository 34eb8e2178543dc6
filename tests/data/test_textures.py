"""Procedural pictures: a function of the integer alone, in range, each kind what it says it is."""

import numpy as np
import pytest

from scaling_perception.data.sources.textures import RGB_KINDS, TARGET_KINDS, texture

KINDS = [*RGB_KINDS, *TARGET_KINDS]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_determined_by_its_index(kind):
    first, again, other = texture(7, 48, kind), texture(7, 48, kind), texture(8, 48, kind)
    assert first.shape == (48, 48, 3) and first.dtype == np.float32
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.05
    for index in range(12):
        picture = texture(index, 32, kind)
        assert np.isfinite(picture).all() and picture.min() >= -1 and picture.max() <= 1


def test_the_index_alone_chooses_among_all_kinds():
    pictures = [texture(index, 16) for index in range(60)]
    np.testing.assert_array_equal(pictures[3], texture(3, 16))
    grey = [np.ptp(picture, axis=-1).max() == 0 for picture in pictures]
    assert 6 <= sum(grey) <= 30  # depth, flow and masks: about a quarter
    assert len({picture.tobytes() for picture in pictures}) == 60


@pytest.mark.parametrize("kind", ["depth", "flow", "mask"])
def test_grey_kinds_are_grey(kind):
    for index in range(8):
        assert np.ptp(texture(index, 32, kind), axis=-1).max() == 0


def test_masks_are_binary_and_depths_fill_the_range():
    masks = np.stack([texture(index, 32, "mask") for index in range(20)])
    assert set(np.unique(masks)) == {-1.0, 1.0}
    depths = np.stack([texture(index, 32, "depth") for index in range(20)])
    assert (np.quantile(depths, 0.98, axis=(1, 2, 3)) > 0.8).all()
    assert (np.quantile(depths, 0.02, axis=(1, 2, 3)) < -0.8).mean() > 0.8  # an unknown area may hide what is near
    jumps = np.abs(np.diff(depths[..., 0], axis=2)).max(axis=(1, 2))
    assert (jumps > 0.2).mean() > 0.7  # sharp edges, not smooth fields alone


def test_flows_lie_near_zero_and_objects_on_pure_white():
    flows = np.stack([texture(index, 32, "flow") for index in range(40)])
    assert np.median(np.abs(flows)) < 0.3 < np.abs(flows).max()
    for index in range(12):
        picture = texture(index, 32, "on_white")
        white = (picture == 1).all(axis=-1)
        assert 0.2 < white.mean() < 1 or not white.all()
        assert picture[~white].max() <= 0.97 + 1e-6  # the object itself never passes for background
