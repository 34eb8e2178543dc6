"""Surface normals: encoding and mirroring, metrics against angles that are known, trivial answers, exact scenes."""

import numpy as np
import pytest
from PIL import Image

from scaling_perception.data.formats import read_normals, write_image
from scaling_perception.data.pipeline import flip_sample
from scaling_perception.data.sources import open_source
from scaling_perception.data.sources.scenes import render_scene
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import PERCEPTION, RELEASED, TaskOptions, get_task, model_passes
from scaling_perception.tasks.normals import (
    angles,
    decode_prediction,
    encode,
    facing,
    inspect,
    merge,
    normal_baselines,
    normal_metrics,
    normals_to_color,
    unit,
)

OPTIONS = TaskOptions()


def turned(degrees, shape=(4, 6)):
    """Vectors that are turned by ``degrees`` from facing the camera to the right."""
    angle = np.radians(degrees)
    return np.broadcast_to(np.array([np.sin(angle), 0, -np.cos(angle)], np.float32), (*shape, 3)).copy()


@pytest.mark.parametrize("size", [(16, 16), (33, 47), (70, 2)])
def test_decoding_is_the_inverse_of_encoding(size, make_raw):
    angle = np.linspace(-1, 1, size[1])[None] * np.ones((size[0], 1))
    normals = unit(np.stack([angle, 0.5 * np.ones(size), -np.ones(size)], axis=-1))
    (made,) = encode(make_raw(*size, normals=normals), 64, OPTIONS)
    np.testing.assert_allclose(np.linalg.norm(made["target"], axis=-1), 1, atol=1e-5)
    found = decode_prediction(made["target"][None, None], size, OPTIONS)[0]
    assert angles(found, normals).max() < 6 if size[1] > 2 else angles(found, normals).mean() < 25
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-5)


def test_holes_are_left_out_of_the_mean_and_of_the_loss(make_raw):
    normals = turned(30, (32, 32))
    normals[:, :16] = np.nan
    (made,) = encode(make_raw(32, 32, normals=normals), 16, OPTIONS)
    assert not made["valid"][:, :8].any() and made["valid"][:, 8:].all()
    np.testing.assert_allclose(made["target"][:, 8:], turned(30, (16, 8)), atol=1e-5)
    assert not made["target"][:, :8].any()
    with pytest.raises(UserError, match="sample 'made/32x32': no normal is valid"):
        encode(make_raw(32, 32, normals=np.full((32, 32, 3), np.nan)), 16, OPTIONS)


@pytest.mark.parametrize("task", ["depth", "flow", "amodal", "normals"])
def test_the_mirror_image_of_a_sample_is_the_sample_of_the_mirror_image(task, make_raw):
    raw = make_raw(48, 48, seed=3)  # thirds: nearest has no ties, which a mirror would break the other way
    mirrored = {name: value[:, ::-1] if isinstance(value, np.ndarray) else value for name, value in raw.items()}
    mirrored["flow"] = mirrored["flow"] * [-1, 1]
    mirrored["normals"] = mirrored["normals"] * [-1, 1, 1]
    for one, other in zip(
        get_task(task).encode(raw, 16, OPTIONS), get_task(task).encode(mirrored, 16, OPTIONS), strict=True
    ):
        for name, value in flip_sample(one).items():
            if isinstance(value, np.ndarray):
                np.testing.assert_allclose(value, other[name], atol=2e-6, err_msg=name)


@pytest.mark.parametrize("degrees", [0.0, 0.01, 5.0, 11.0, 11.5, 90.0, 180.0])
def test_metrics_of_a_known_angle(degrees):
    found = normal_metrics(turned(degrees), turned(0))
    for name in ("mean_angle", "median_angle", "rmse_angle"):
        assert found[name] == pytest.approx(degrees, rel=1e-3, abs=1e-5)
    assert found["within_11.25"] == (degrees < 11.25) and found["within_30"] == (degrees < 30)


def test_metrics_weigh_pixels_and_leave_out_the_invalid():
    truth, pred = turned(0), turned(0)
    pred[0], pred[1] = turned(40)[0], np.nan
    valid = np.ones((4, 6), bool)
    valid[1] = False
    found = normal_metrics(pred, truth, valid)
    assert found["mean_angle"] == pytest.approx(40 / 3) and found["median_angle"] == 0
    assert found["rmse_angle"] == pytest.approx(40 / np.sqrt(3)) and found["within_5"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="NaN"):
        normal_metrics(pred, truth)
    with pytest.raises(ValueError, match="no valid pixel"):
        normal_metrics(pred, truth, np.zeros((4, 6), bool))


def test_trivial_answers_are_the_best_of_their_kind():
    floor, wall = np.array([0, -1, 0], np.float32), np.array([0, 0, -1], np.float32)
    truth = np.empty((34, 8, 3), np.float32)
    truth[:20], truth[20:] = wall, floor
    answers = normal_baselines(truth)
    assert normal_metrics(answers["ground_plane"], truth)["mean_angle"] < 1e-3, "a floor and a wall are met"
    error = normal_metrics(answers["constant"], truth)["mean_angle"]
    assert 30 < error < 60
    lower = normal_baselines(truth, np.arange(34)[:, None] * np.ones((1, 8)) >= 20)
    np.testing.assert_allclose(lower["constant"], np.broadcast_to(floor, truth.shape), atol=1e-6)


def test_members_are_merged_on_the_sphere():
    members = np.stack([turned(10), turned(-10), turned(0)])
    merged, spread = merge(members, "mean", OPTIONS)
    np.testing.assert_allclose(merged, turned(0), atol=1e-5)
    np.testing.assert_allclose(spread, np.sqrt(200 / 3), rtol=1e-3)
    assert not merge(members[:1], "mean", OPTIONS)[1].any(), "one member says nothing of its spread"
    for mode in ("mean", "median"):
        np.testing.assert_allclose(np.linalg.norm(merge(members * 0.3, mode, OPTIONS)[0], axis=-1), 1, atol=1e-5)
    with pytest.raises(UserError, match="did you mean 'median'"):
        merge(members, "medain", OPTIONS)


@pytest.mark.parametrize("index", [3, 8])
def test_the_renderers_normals_are_those_of_its_depth(index):
    scene = render_scene(index, 96)
    normals, depth, (focal, middle) = scene["normals"], scene["depth"], scene["intrinsics"][0, [0, 2]]
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-4)
    row, column = np.mgrid[:96, :96]
    rays = np.stack([(column - middle) / focal, (row - middle) / focal, np.ones((96, 96))], axis=-1)
    assert ((rays * normals).sum(axis=-1) < 1e-4).all(), "what is seen faces the camera"
    points = rays * depth[..., None]
    across, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
    derived = unit(np.cross(down, across))
    assert np.median(angles(derived, normals[1:-1, 1:-1])) < 0.5, "derived from depth, away from edges"


def test_files_hold_what_is_written(tmp_path):
    normals = unit(np.random.default_rng(0).normal(size=(5, 7, 3)) - [0, 0, 2])
    np.save(tmp_path / "n.npy", normals * 1.05)
    found, valid = read_normals(tmp_path / "n.npy")
    np.testing.assert_allclose(found, normals, atol=1e-6)
    assert valid.all()
    shown = np.ones((5, 7), bool)
    shown[0, 0] = False
    write_image(tmp_path / "n.png", normals_to_color(normals, shown))
    found, valid = read_normals(tmp_path / "n.png")
    assert angles(found, normals)[shown].max() < 1 and (valid == shown).all()
    np.save(tmp_path / "flat.npy", normals[..., 0])
    with pytest.raises(UserError, match=r"flat.npy has shape \(5, 7\): normals are \(H, W, 3\)"):
        read_normals(tmp_path / "flat.npy")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda n: normals_to_color(n), "holds uint8: normals in .npy are floats"),
        (lambda n: (n * 100).astype(np.int16), "holds int16: normals in .npy are floats"),
        (lambda n: normals_to_color(n).astype(np.float64), "normals have a median length of"),
        (lambda n: (n + 1) / 2, "most are not of unit length"),
        (lambda n: n * 0.5, "normals have a median length of 0.5"),
    ],
)
def test_what_is_no_direction_is_refused(tmp_path, change, told):
    normals = unit(np.random.default_rng(0).normal(size=(9, 11, 3)) - [0, 0, 2])
    np.save(tmp_path / "n.npy", change(normals))
    with pytest.raises(UserError, match=told) as error:
        read_normals(tmp_path / "n.npy")
    assert str(error.value).startswith(str(tmp_path / "n.npy"))


def test_a_persons_own_folder_of_normals(tmp_path, make_raw):
    raw = make_raw(24, 32)
    for name in ("image", "normals"):
        (tmp_path / name).mkdir()
    Image.fromarray(raw["image"]).save(tmp_path / "image" / "a.png")
    np.save(tmp_path / "normals" / "a.npy", raw["normals"])
    (sample,) = list(open_source("folder", tmp_path, "all", "normals"))
    np.testing.assert_allclose(sample["normals"], raw["normals"], atol=1e-6)
    found = inspect(sample, (24, 32))
    assert found["normals_valid"] == 1 and 0.9 < found["normals_facing"] < 1  # some of the random ones point away
    with pytest.raises(UserError, match="normals have a median length of 5, and most are not of unit length"):
        inspect({**raw, "normals": raw["normals"] * 5}, (24, 32))


@pytest.mark.parametrize("pitch", [-10, 0, 10])
def test_what_a_camera_sees_faces_it(pitch):
    """A floor below the horizon and a wall above, seen by a camera that looks up or down; if z has the wrong sign, the
    wall faces away."""
    angle = np.radians(pitch)
    normals = np.empty((60, 80, 3), np.float32)
    normals[:30], normals[30:] = (0, -np.sin(angle), -np.cos(angle)), (0, -np.cos(angle), np.sin(angle))
    assert facing(normals)[:28].all() and facing(normals)[45:].all()
    assert not facing(normals * np.float32([1, 1, -1]))[:28].any()


def test_a_task_that_is_added_renumbers_nothing():
    assert PERCEPTION == (*RELEASED, "normals")
    assert model_passes(["depth", "flow"]) == model_passes(["amodal"]) == RELEASED
    assert model_passes(["normals", "depth"]) == PERCEPTION and model_passes(["generation"]) == ("generation",)
