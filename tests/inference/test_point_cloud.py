"""Point clouds: the pinhole camera's geometry, and PLY files read by another parser."""

import numpy as np
import pytest
from ply import read_ply

from scaling_perception.inference.point_cloud import Camera, camera_of_fov, parse_camera, unproject, write_ply
from scaling_perception.support.errors import UserError


def test_points_project_back_onto_their_pixels():
    rng = np.random.default_rng(0)
    depth = rng.uniform(0.5, 9, (6, 8))
    camera = Camera(7.5, 6.5, 3.2, 2.9)
    points = unproject(depth, camera)
    rows, columns = np.mgrid[:6, :8]
    np.testing.assert_allclose(points[..., 2], depth, rtol=1e-6)
    np.testing.assert_allclose(camera.fx * points[..., 0] / points[..., 2] + camera.cx, columns, atol=1e-5)
    np.testing.assert_allclose(camera.fy * points[..., 1] / points[..., 2] + camera.cy, rows, atol=1e-5)


def test_the_field_of_view_spans_the_width():
    camera = camera_of_fov(90, (30, 40))
    assert camera == pytest.approx((20, 20, 19.5, 14.5))
    edges = unproject(np.ones((30, 40)), camera)[0, [0, -1], 0]
    np.testing.assert_allclose(edges, [-0.975, 0.975], rtol=1e-6)  # the middles of the outermost pixels
    for wrong in (0, 180, -5, float("nan")):
        with pytest.raises(UserError, match="--fov"):
            camera_of_fov(wrong, (3, 4))


def test_cameras_are_four_numbers():
    assert parse_camera("500, 510.5,320,240") == (500, 510.5, 320, 240)
    for wrong in ("500,500,320", "a,b,c,d", "0,5,1,1", "5,5,nan,1"):
        with pytest.raises(UserError, match="fx,fy,cx,cy"):
            parse_camera(wrong)


def test_ply_is_read_back_exactly(tmp_path):
    rng = np.random.default_rng(1)
    points, colours = rng.normal(size=(5, 7, 3)).astype(np.float32), rng.integers(0, 256, (5, 7, 3), np.uint8)
    points[2, 3, 2] = np.nan
    write_ply(tmp_path / "a.ply", points, colours, ["made up"])
    comments, xyz, rgb = read_ply(tmp_path / "a.ply")
    known = np.isfinite(points).all(axis=-1)
    assert comments == ["made up"] and len(xyz) == 34
    np.testing.assert_array_equal(xyz, points[known])
    np.testing.assert_array_equal(rgb, colours[known])
