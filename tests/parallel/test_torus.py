"""Where the devices of a slice stand on a mesh with experts."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from scaling_perception.parallel import mesh
from scaling_perception.parallel.torus import arranged


def torus(*shape, kind="TPU v5"):
    places = product(*map(range, shape))
    return [SimpleNamespace(coords=at, device_kind=kind, id=number) for number, at in enumerate(places)]


def extents(grid, axis):
    """How many places a group along ``axis`` takes along each dimension, and how far apart its ends are."""
    group = np.array([device.coords for device in np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1)[:, 0]])
    return [(len(np.unique(line)), int(np.ptp(line))) for line in group.T]


@pytest.mark.parametrize(
    ("shape", "kind", "sizes", "expert"),
    [
        ((16, 16), "TPU v6 lite", (1, 64, 4, 1), [(2, 1), (2, 1)]),  # a square, not a line of 4
        ((4, 4, 8), "TPU v5", (4, 4, 8, 1), [(1, 0), (4, 3), (2, 1)]),  # a ring of 4, twice: not one of 8
        ((4, 4, 4), "TPU v5", (4, 4, 4, 1), [(1, 0), (4, 3), (1, 0)]),  # a ring of 4 is as good as a square
        ((4, 4), "TPU v6 lite", (2, 2, 4, 1), [(2, 1), (2, 1)]),  # a line of 4 is not: this side is no ring
    ],
)
def test_experts_stand_close_together(shape, kind, sizes, expert):
    grid = arranged(sizes, torus(*shape, kind=kind))
    assert grid.shape == sizes and sorted(device.id for device in grid.flat) == list(range(grid.size))
    assert sorted(extents(grid, 2)) == sorted(expert)
    # every group is the first, moved
    groups = np.moveaxis(grid, 2, -1).reshape(-1, sizes[2])
    steps = {tuple(tuple(np.subtract(one.coords, group[0].coords)) for one in group) for group in groups}
    assert len(steps) == 1


def test_fsdp_takes_a_whole_ring_where_there_is_one():
    grid = arranged((4, 4, 8, 1), torus(4, 4, 8))
    assert sorted(extents(grid, 1)) == [(1, 0), (1, 0), (4, 3)]


def test_tensor_comes_first():
    grid = arranged((1, 2, 2, 8), torus(4, 2, 4))
    assert extents(grid, 3) in ([(4, 3), (2, 1), (1, 0)], [(1, 0), (2, 1), (4, 3)])  # a ring and a link, not a line


def test_no_arrangement_of_devices_that_are_no_torus():
    pairs = [device for device in torus(2, 2) for _ in range(2)]  # two cores of a chip
    assert arranged((1, 2, 4, 1), pairs) is None
    assert arranged((1, 1, 3, 1), torus(2, 2)[:3]) is None
    assert arranged((1, 2, 2, 1), [SimpleNamespace(id=at) for at in range(4)]) is None


def test_meshes_without_experts_are_arranged_as_before(monkeypatch):
    monkeypatch.setattr(mesh, "arranged", None)  # not asked
    assert mesh.make_mesh(data=4, fsdp=2).devices.shape == (4, 2, 1, 1)
