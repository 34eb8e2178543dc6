"""Metric depth from sparse points: known scale and shift recovered, wrong points survived, mistakes in one line."""

import numpy as np
import pytest

from scaling_perception.inference.find import Picture
from scaling_perception.inference.metric_depth import (
    Points,
    at_points,
    fit_points,
    fit_warning,
    points_of,
    read_points,
    to_metres,
)
from scaling_perception.support.errors import UserError


def relative(height=30, width=40):
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    depth = 0.5 * rows / height + 0.4 * columns / width + 0.1 * np.sin(columns / 5)
    return (depth - depth.min()) / np.ptp(depth)


def draw(depth, count, law, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, depth.shape[1], count).astype(float), rng.integers(0, depth.shape[0], count).astype(float)
    return Points(x, y, law(depth[y.astype(int), x.astype(int)].astype(float)), np.arange(count) + 2.0)


@pytest.mark.parametrize("method", ["least-squares", "robust"])
@pytest.mark.parametrize(
    ("space", "law"), [("depth", lambda d: 7 * d + 1.5), ("disparity", lambda d: 1 / (2 - 1.9 * d))]
)
def test_a_known_scale_and_shift_are_recovered(space, law, method):
    depth = relative()
    fit = fit_points(depth, draw(depth, 12, law), space, method)
    np.testing.assert_allclose((fit.scale, fit.shift), (7, 1.5) if space == "depth" else (-1.9, 2), rtol=1e-6)
    np.testing.assert_allclose(to_metres(depth, fit), law(depth), rtol=1e-5)
    assert not fit.inverted and fit.to_dict()["largest_m"] < 1e-5 and fit.to_dict()["points"] == 12


def test_two_points_are_enough_and_are_met():
    depth = relative()
    points = Points(np.array([2.0, 30.0]), np.array([3.0, 20.0]), np.array([1.0, 4.0]), np.array([2.0, 3.0]))
    np.testing.assert_allclose(at_points(to_metres(depth, fit_points(depth, points)), points), [1, 4], rtol=1e-6)


def test_robust_survives_wrong_points():
    depth = relative()
    points = draw(depth, 200, lambda d: 7 * d + 1.5)
    noise = np.random.default_rng(1).normal(0, 0.02, 200)
    wrong = np.where(np.arange(200) % 5 < 2, 30.0, points.depth + noise)  # two of five
    points = points._replace(depth=wrong)
    robust, plain = fit_points(depth, points, "depth", "robust"), fit_points(depth, points)
    assert abs(robust.scale - 7) < 0.05 and abs(robust.shift - 1.5) < 0.05
    assert abs(plain.scale - 7) > 1
    told = robust.to_dict()
    assert told["median_m"] < 0.05 and told["largest_m"] > 20 and len(told["residuals_m"]) == 200
    three = Points(*(column[:3] for column in points))
    assert fit_points(depth, three, "depth", "robust")[:2] == fit_points(depth, three)[:2]


@pytest.mark.parametrize("method", ["least-squares", "robust"])
@pytest.mark.parametrize("space", ["depth", "disparity"])
@pytest.mark.parametrize("count", [2, 12])
def test_points_of_one_distance_give_no_scale(count, space, method):
    depth = relative()
    points = draw(depth, count, lambda d: np.full_like(d, 2.5))
    with pytest.raises(UserError, match=f"all {count} points are 2.5 m away: add one that is nearer or farther"):
        fit_points(depth, points, space, method)
    if count > 2 and method == "robust":  # most at one distance: the line through them is flat
        points.depth[0] = 9.0
        with pytest.raises(UserError, match="gives one distance everywhere"):
            fit_points(depth, points, space, method)


@pytest.mark.parametrize(("factor", "many"), [(1, False), (1000, True)])
def test_points_in_millimetres_are_doubted(factor, many):
    depth = relative()
    fit = fit_points(depth, draw(depth, 12, lambda d: factor * (7 * d + 1.5)))
    assert ("100% of its pixels are 65.535 m away" in fit_warning(depth, fit)) == many == bool(fit_warning(depth, fit))


def test_what_is_not_in_front_of_the_camera_is_nan():
    depth = np.linspace(0, 1, 11, dtype=np.float32)[None]
    points = Points(np.array([5.0, 10.0]), np.zeros(2), np.array([1.0, 3.0]), np.zeros(2))
    metres = to_metres(depth, fit_points(depth, points))
    assert np.isnan(metres[0, :3]).all() and (metres[0, 3:] > 0).all()
    fit = fit_points(depth, points._replace(depth=np.array([3.0, 1.0])))
    assert fit.inverted


def test_between_pixels_the_map_is_interpolated():
    depth = np.array([[0.0, 1.0], [2.0, 5.0]])
    points = Points(np.array([0.5, 1.4, 0.25]), np.array([0.5, 0.0, 1.0]), np.ones(3), np.zeros(3))
    np.testing.assert_allclose(at_points(depth, points), [2, 1, 2.75])
    with pytest.raises(UserError, match=r"line 7 \(x 1.6, y 0\) lies outside the picture of 2x2"):
        at_points(depth, Points(np.array([1.6]), np.zeros(1), np.ones(1), np.array([7.0])))


def test_too_little_to_tell_is_refused():
    depth = relative()
    same = Points(np.array([3.0, 3.0]), np.array([4.0, 4.0]), np.array([1.0, 2.0]), np.zeros(2))
    with pytest.raises(UserError, match="two different points"):
        fit_points(depth, same)
    with pytest.raises(UserError, match="the same|is 0.5 at all"):
        fit_points(np.full((5, 5), 0.5), same._replace(x=np.array([1.0, 3.0])))
    with pytest.raises(UserError, match="did you mean 'disparity'"):
        fit_points(depth, same, "disparty")


def test_points_of_several_images(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text("\ufeffimage, x,y ,depth,note\na/x.png,1,2,3,ok\nb.jpg,4,5.5,6,\nx.png,7,8,9,\n", encoding="utf-8")
    table = read_points(str(path))
    images = [Picture(tmp_path / name) for name in ("a/x.png", "b.jpg", "c.png")]
    first, second, third = points_of(str(path), table, images)
    assert first is not None and first.depth.tolist() == [3, 9] and first.lines.tolist() == [2, 4]
    assert second is not None and second.y.tolist() == [5.5] and third is None
    with pytest.raises(UserError, match="'x.png' names 2 images"):
        points_of(str(path), table, [*images, Picture(tmp_path / "b" / "x.png")])
    path.write_text("x,y,depth,image\n1,2,3,clip_000004\n")
    (found,) = points_of(str(path), read_points(str(path)), [Picture(tmp_path / "clip.mp4", 4)])
    assert found is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y\n1,2\n", "no column 'depth'"),
        ("x,y,depth\n1,2,\n", "line 2: depth '' is no number"),
        ("x,y,depth\n1,2,3\n1,b,3\n", "line 3: y 'b' is no number"),
        ("x,y,depth\n1,2,0\n", "line 2: depth 0 is no distance"),
        ("x,y,depth\n", "has no rows"),
        ("x,y,depth,image\n1,2,3,\n", "line 2: the image is missing"),
        ("x,y,depth\n1,2,1,25\n", "line 2 has 4 fields where the first line names 3: a decimal comma"),
        ("x,y,depth\n1,2,nan\n", "'nan' is no number"),
    ],
)
def test_mistakes_in_the_file_name_the_line(tmp_path, text, message):
    path = tmp_path / "points.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_points(str(path))


def test_one_list_of_points_is_for_one_image(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text("x,y,depth\n1,2,3\n")
    with pytest.raises(UserError, match="no column 'image' but there are 2 images"):
        points_of(str(path), read_points(str(path)), [Picture(tmp_path / "a.png"), Picture(tmp_path / "b.png")])
    with pytest.raises(UserError, match="does not exist"):
        read_points(str(tmp_path / "none.csv"))
