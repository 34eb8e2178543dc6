"""The ray-traced worlds: determinism, exact geometry, consistent masks, and how little a row says of depth."""

import sys

import numpy as np
import pytest

pytest.importorskip("embreex")

from scaling_perception.data.manifest import RawSamples
from scaling_perception.data.sources import open_source
from scaling_perception.data.worlds import bank as bank_of
from scaling_perception.data.worlds import meshes, trace
from scaling_perception.data.worlds.build import CLASSES, Draft, World, dot, look, norm, turned
from scaling_perception.data.worlds.render import KINDS, render_world
from scaling_perception.support.errors import UserError
from scaling_perception.tasks.depth import depth_baselines
from scaling_perception.tasks.metrics import depth_metrics

SIZE = 48


@pytest.fixture(scope="module")
def worlds():
    """Two worlds of every kind at 48 pixels."""
    return {kind: [render_world(number, SIZE, kind=kind) for number in (2, 5)] for kind in KINDS}


@pytest.fixture(scope="module")
def every(worlds):
    return [world for some in worlds.values() for world in some]


def test_fields_shapes_types_and_ranges(every):
    shapes = {
        "image": ((3,), np.uint8), "image2": ((3,), np.uint8), "whole": ((3,), np.uint8), "depth": ((), np.float32),
        "depth2": ((), np.float32), "normals": ((3,), np.float32), "flow": ((2,), np.float32), "occluded": ((), bool),
        "valid": ((), bool), "visible_mask": ((), bool), "whole_mask": ((), bool),
    }  # fmt: skip
    for world in every:
        for name, (more, kind) in shapes.items():
            assert world[name].shape == (SIZE, SIZE, *more) and world[name].dtype == kind, name
        assert world["intrinsics"].shape == (3, 3) and world["intrinsics"].dtype == np.float32
        assert 0 <= world["label"] < len(CLASSES)
        assert (world["depth"][world["valid"]] > 0).all() and (world["depth"][~world["valid"]] == 0).all()
        assert np.isfinite(world["flow"]).all()


def test_a_world_is_a_pure_function_of_its_number(every):
    """Also when the textures are painted in another order, and with one frame instead of two."""
    bank_of.bank.cache_clear()
    render_world(77, 16)
    for number, kind in ((5, "street"),):
        before = next(world for world in every if world is every[2 * list(KINDS).index(kind) + (number == 5)])
        again, single = render_world(number, SIZE, kind=kind), render_world(number, SIZE, frames=1, kind=kind)
        assert set(before) - set(single) == {"image2", "depth2", "flow", "occluded"}
        for name, value in before.items():
            np.testing.assert_array_equal(value, again[name], err_msg=name)
            if name in single:
                np.testing.assert_array_equal(value, single[name], err_msg=name)


def _points(world):
    k = world["intrinsics"]
    x, y = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    depth = world["depth"].astype(np.float64)
    return np.stack([(x - k[0, 2]) / k[0, 0] * depth, (y - k[1, 2]) / k[1, 1] * depth, depth], axis=-1)


def test_normals_are_those_of_the_depth(every):
    checked = 0
    for world in every:
        points, normals, valid = _points(world), world["normals"], world["valid"]
        np.testing.assert_allclose(norm(normals)[valid], 1, atol=1e-5)
        assert not normals[~valid].any()
        assert (dot(normals, points)[valid] <= 1e-4 * norm(points)[valid]).all()  # towards the camera
        # three neighbours with one normal lie on a plane wherever they see one triangle or its coplanar neighbours
        same = (np.abs(np.diff(normals, axis=1)).max(axis=2) < 1e-6) & valid[:, 1:] & valid[:, :-1]
        off = np.abs(dot(np.diff(points, axis=1), normals[:, :-1]))[same] / world["depth"][:, 1:][same]
        assert np.mean(off < 1e-3) > 0.8  # the others are edges between parallel surfaces
        checked += same.sum()
    assert checked > 14 * 800


def test_flow_leads_to_the_same_point(every):
    """Where a point is not hidden, the second frame shows about its brightness there."""
    still, moved = [], []
    for world in every:
        x, y = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
        to = np.stack([x, y], axis=-1) + world["flow"]
        inside = ~world["occluded"] & world["valid"]
        assert (to[inside] >= -0.5).all() and (to[inside] <= SIZE - 0.5).all()
        column, row = np.clip(np.rint(to).astype(int), 0, SIZE - 1).transpose(2, 0, 1)
        inside &= np.hypot(*world["flow"].transpose(2, 0, 1)) > 1
        first, second = world["image"].mean(axis=2), world["image2"].mean(axis=2)
        still.append(np.abs(first - second)[inside])
        moved.append(np.abs(first - second[row, column])[inside])
    assert np.concatenate(moved).mean() < 0.75 * np.concatenate(still).mean()


def test_flow_of_a_moving_camera_is_that_of_depth_and_pose():
    world = World(np.random.default_rng(3))
    draft = Draft(world, "box")
    draft.part("box", (0, 0, 0), (1, 1, 1), world.material("plaster"))
    number = world.put(draft, (0, 5, 0))
    turn = turned(0.3)
    world.motion[number] = (turn, np.array([0, 5.0, 0]) - turn @ [0, 5.0, 0] + [0.2, 0, 0.1])
    point = np.array([[0.1, 4.5, 0.2]])
    camera = look(np.zeros(3), np.array([0, 1.0, 0]), 0.0, np.pi / 2)
    x, y, depth = camera.project(world.moved(point, np.array([number])), 100)
    c, s = np.cos(0.3), np.sin(0.3)
    there = np.array([0.1 * c + 0.5 * s + 0.2, 5 + 0.1 * s - 0.5 * c, 0.3])
    np.testing.assert_allclose([x[0], y[0]], 49.5 + 50 * np.array([there[0], -0.3]) / there[1], rtol=1e-5)
    np.testing.assert_allclose(depth[0], there[1], rtol=1e-5)


@pytest.mark.parametrize("number", [175, 428])
def test_no_flow_is_larger_than_the_picture(number):
    """Their first motions took points to where the second camera stood."""
    assert np.hypot(*render_world(number, SIZE)["flow"].transpose(2, 0, 1)).max() < SIZE


def test_masks_agree(every):
    for world in every:
        assert world["visible_mask"].any()
        assert not (world["visible_mask"] & ~world["whole_mask"]).any()
        assert (world["whole"][~world["whole_mask"]] == 255).all()
        assert (world["whole"][world["whole_mask"]] < 250).all()
    hidden = [1 - world["visible_mask"].sum() / world["whole_mask"].sum() for world in every]
    assert np.mean(np.array(hidden) > 0.05) > 0.5


def test_bodies_are_of_unit_size_and_their_normals_look_outward():
    for kind, some in meshes.bodies().items():
        for body in some:
            assert np.abs(body.corners).max() < 0.75, kind  # leaves reach a little beyond
            np.testing.assert_allclose(norm(body.normals), 1, atol=1e-5)
            if kind in ("box", "soft", "rod", "ball", "wheel", "roof", "shape"):
                face = np.cross(body.corners[:, 1] - body.corners[:, 0], body.corners[:, 2] - body.corners[:, 0])
                assert (dot(face, body.normals.mean(axis=1)) > 0).all(), kind
                volume = np.einsum("fi,fi->f", body.corners[:, 0], face).sum() / 6
                assert 0.15 < volume <= 1.0001, kind


def test_a_ray_meets_the_nearest_triangle():
    corners = np.array([[[-1, -1, z], [1, -1, z], [0, 1, z]] for z in (5.0, 3.0)])
    hits = trace.Tracer(corners).cast(np.zeros((2, 3)), np.array([[0, 0, 1.0], [0, 0, -1.0]]))
    np.testing.assert_array_equal(hits.face, [1, -1])
    np.testing.assert_allclose(hits.far, [3, np.inf])
    np.testing.assert_allclose(hits.weights[0] @ corners[1], [0, 0, 3], atol=1e-6)


def test_vertices_shared_by_triangles_change_no_hit():
    world = World(np.random.default_rng(4))
    draft = Draft(world, "box")
    for number, kind in enumerate(("box", "ball", "soft", "box", "wheel")):
        draft.part(kind, (number - 2, 0.1 * number, 0), (1, 0.7, 1.3), world.material("plaster"))
    for at, yaw in (((0, 5, 0), 0.3), ((1, 7, 1), 2.0)):
        world.put(draft, at, yaw)
    mesh = world.triangles()
    corners = mesh["corners"].reshape(-1, 3)
    np.testing.assert_array_equal(corners[mesh["vertices"]][mesh["index"]], mesh["corners"])
    assert len(mesh["vertices"]) < len(corners) / 2
    ways = np.random.default_rng(0).normal(0, 1, (4000, 3)) + (0, 2, 0)
    eyes = np.zeros_like(ways)
    shared, apart = trace.Tracer.of(mesh).cast(eyes, ways), trace.Tracer(mesh["corners"]).cast(eyes, ways)
    assert (shared.face >= 0).sum() > 200
    for one, other in zip(shared, apart, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_sky_has_few_marks():
    """The upper two fifths of the pictures behind flying things: differences of neighbours."""

    def marked(kind):
        paint, upper = bank_of.KINDS[kind], 2 * bank_of.SIDE // 5
        images = [np.clip(paint(np.random.default_rng(n)), 0, 1)[:upper].mean(axis=2) for n in range(6)]
        return np.median([np.abs(np.diff(image, axis=1)).mean() for image in images])

    assert marked("vista") < 0.2 * min(marked("leaves"), marked("facade"))


@pytest.mark.parametrize("part", ["textures", "shadows", "film"])
def test_parts_of_a_picture_do_not_change_what_is_where(every, part):
    whole = every[0]
    number = int(whole["key"].removeprefix("world-"))
    kind = next(iter(KINDS))
    bare = render_world(number, SIZE, kind=kind, without=part)
    for name in ("depth", "normals", "flow", "visible_mask", "whole_mask"):
        np.testing.assert_array_equal(bare[name], whole[name], err_msg=name)
    assert np.abs(bare["image"].astype(int) - whole["image"]).mean() > 1


def test_without_textures_neighbours_are_alike():
    both = [render_world(20, 64, 1, without=some) for some in ("film+textures", "film")]
    marks = [np.median(np.abs(np.diff(world["image"].astype(int), axis=1))) for world in both]
    assert marks[0] < 0.5 * marks[1]


def test_a_table_without_clutter_is_bare():
    things = [len(np.unique(render_world(3, 96, 1, "table", part)["normals"], axis=0)) for part in ("clutter", "")]
    assert things[0] < things[1]
    plain = open_source("worlds", "", "train", "depth", count=2)
    bare = open_source("worlds", "", "train", "depth", count=2, without="film+clutter+film")
    assert "without" not in plain.fingerprint(), "caches made before go on"
    assert bare.fingerprint()["without"] == "clutter+film"


def test_a_row_says_little_of_depth():
    """AbsRel of the fitted 1/row at least that of the real samples, .11 to .31 (tests/tasks/test_baselines.py)."""
    errors = []
    for number in range(24):
        world = render_world(number, 32, frames=1)
        answer = depth_baselines(world["depth"], world["valid"])["inverse_row"]
        errors.append(depth_metrics(answer, world["depth"], world["valid"])["abs_rel"])
    assert np.mean(errors) > 0.31


def test_wrong_numbers_are_refused(monkeypatch):
    for wrong, part in ((dict(kind="rooms"), "room"), (dict(frames=3), "frames"), (dict(resolution=8), "resolution"),
                        (dict(count=0), "count"), (dict(start=-1), "start"), (dict(split="vall"), "val"),
                        (dict(without="film+textured"), "textures"),
                        (dict(without="film+"), "without ''")):  # fmt: skip
        with pytest.raises(UserError, match=part):
            open_source("worlds", "", wrong.pop("split", "train"), "depth", **wrong)
    with pytest.raises(UserError, match="how many with --count"):
        RawSamples("worlds", "", "train", (), 0, 0, 64)
    with pytest.raises(UserError, match="without 'blur'.* known: clutter, film"):
        render_world(1, 16, without="blur")
    for number in (-1, 1.5, True):
        with pytest.raises(UserError, match="index"):
            render_world(number)
    source = open_source("worlds", "", "val", "flow", count=3, resolution=32)
    assert len(source) == 3 and source[2]["key"] == "world-1000000002"
    with pytest.raises(IndexError):
        source[3]
    trace._embree.cache_clear()
    monkeypatch.setitem(sys.modules, "embreex.rtcore", None)
    with pytest.raises(UserError, match=r"scaling-perception\[worlds\]"):
        trace.Tracer(np.zeros((1, 3, 3)))
    trace._embree.cache_clear()
