"""The procedural scenes: determinism, exact geometry, consistent masks, stated statistics."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scaling_perception.data.scenes import layout as layout_of
from scaling_perception.data.scenes.geometry import (
    BALL,
    BOX,
    CYLINDER,
    Camera,
    Solid,
    assemble,
    blocked,
    cast,
    interval,
    make_thing,
    yaw,
)
from scaling_perception.data.scenes.textures import LEVELS, pattern_bank, sample
from scaling_perception.data.sources import open_source
from scaling_perception.data.sources.scenes import CLASSES, SPLIT_STARTS, ScenesSource, render_scene
from scaling_perception.support.errors import UserError

VAL = SPLIT_STARTS["val"]


def _digest(sample_):
    digest = hashlib.sha256()
    for name in sorted(sample_):
        value = sample_[name]
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value).tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def scenes():
    """Sixty validation scenes at 64 pixels."""
    return [render_scene(VAL + i, 64) for i in range(60)]


@pytest.fixture(scope="module")
def large():
    """Ten scenes at 128 pixels."""
    return [render_scene(i, 128) for i in range(10)]


def _bilinear(picture, x, y):
    h, w = picture.shape[:2]
    x, y = np.clip(x, 0, w - 1.001), np.clip(y, 0, h - 1.001)
    x0, y0 = x.astype(int), y.astype(int)
    fx, fy = x - x0, y - y0
    if picture.ndim == 3:
        fx, fy = fx[..., None], fy[..., None]
    top = picture[y0, x0] * (1 - fx) + picture[y0, x0 + 1] * fx
    bottom = picture[y0 + 1, x0] * (1 - fx) + picture[y0 + 1, x0 + 1] * fx
    return top * (1 - fy) + bottom * fy


def _destination(scene):
    size = scene["image"].shape[0]
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    return x + scene["flow"][..., 0], y + scene["flow"][..., 1]


def test_fields_shapes_and_types():
    scene = render_scene(3, 32)
    shapes = {
        "image": ((32, 32, 3), np.uint8), "image2": ((32, 32, 3), np.uint8), "whole": ((32, 32, 3), np.uint8),
        "depth": ((32, 32), np.float32), "depth2": ((32, 32), np.float32), "flow": ((32, 32, 2), np.float32),
        "normals": ((32, 32, 3), np.float32),
        "occluded": ((32, 32), bool), "valid": ((32, 32), bool), "visible_mask": ((32, 32), bool),
        "whole_mask": ((32, 32), bool), "intrinsics": ((3, 3), np.float32),
    }  # fmt: skip
    assert {k: (v.shape, v.dtype.type if v.dtype != bool else bool) for k, v in scene.items() if k in shapes} == shapes
    assert set(scene) == {*shapes, "key", "label"}
    assert isinstance(scene["key"], str) and 0 <= scene["label"] < len(CLASSES)


def test_same_in_another_process():
    indices = [0, 7, VAL + 1]
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_scenes import _digest, render_scene\n"
        "print(*[_digest(render_scene(int(i), 48)) for i in sys.argv[2:]])"
    )
    # Backwards and in a fresh process: nothing may depend on what was rendered before.
    words = [sys.executable, "-c", program, str(Path(__file__).parent)]
    done = subprocess.run([*words, *map(str, indices[::-1])], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [_digest(render_scene(i, 48)) for i in indices][::-1]


def test_different_indices_differ():
    digests = {_digest({"image": render_scene(i, 32)["image"]}) for i in range(12)}
    assert len(digests) == 12


def test_global_random_state_is_left_alone():
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    first = render_scene(11, 32)
    assert np.random.random() == expected
    np.random.seed(6)
    assert _digest(render_scene(11, 32)) == _digest(first)


def test_second_frame_warped_by_flow_is_the_first(large):
    errors, identity = [], []
    for scene in large:
        seen = ~scene["occluded"] & scene["valid"]
        image, image2 = scene["image"].astype(float), scene["image2"].astype(float)
        errors.append(np.abs(_bilinear(image2, *_destination(scene)) - image).mean(-1)[seen].mean())
        identity.append(np.abs(image2 - image).mean(-1)[seen].mean())
    assert np.mean(errors) < 5 and max(errors) < 12  # of 255: texture resampling, highlights, moving shadows, noise
    assert np.mean(errors) < 0.45 * np.mean(identity)


def test_flow_and_depth_agree_with_the_second_frame(large):
    """The depth of every seen point in the second camera, from the poses alone, is the second frame's depth there."""
    for index, scene in enumerate(large):
        layout = layout_of.compose(np.random.default_rng(np.random.SeedSequence([index, 0x5CA1E]).spawn(2)[0]))
        size = scene["depth"].shape[0]
        x, y = (v.reshape(-1).astype(np.float32) for v in np.meshgrid(np.arange(size), np.arange(size)))
        first = assemble(layout.surroundings, layout.things)
        depth, solid, rays = cast(first, layout.camera, x, y, size)
        np.testing.assert_array_equal(depth.reshape(size, size), scene["depth"])
        points = layout.camera.eye[:, None] + rays * depth
        for number, thing in enumerate(layout.things):
            mine = first.owner[solid] == number
            points[:, mine] = layout_of.move(thing, points[:, mine])
        px, py, z = layout.camera2.project(points, size)
        to_x, to_y = _destination(scene)
        np.testing.assert_allclose(to_x.reshape(-1), px, atol=2e-3)
        np.testing.assert_allclose(to_y.reshape(-1), py, atol=2e-3)
        seen = (~scene["occluded"]).reshape(-1)
        # Exactly: the second camera's ray through that place meets the very point.
        hit, _, _ = cast(assemble(layout.surroundings, layout.things, 2), layout.camera2, px[seen], py[seen], size)
        gap = np.abs(hit - z[seen]) / z[seen]
        assert np.quantile(gap, 0.995) < 1e-3 and np.mean(gap > 0.01) < 2e-3
        # And in the picture, away from edges.
        second = _bilinear(scene["depth2"].astype(float), to_x, to_y).reshape(-1)[seen]
        assert np.median(np.abs(second - z[seen]) / z[seen]) < 2e-3


def test_occluded_points_are_hidden_or_outside(large):
    for scene in large:
        to_x, to_y = _destination(scene)
        size = scene["depth"].shape[0]
        outside = (to_x < -0.5) | (to_y < -0.5) | (to_x > size - 0.5) | (to_y > size - 0.5)
        assert (scene["occluded"] | ~outside).all()
        assert scene["occluded"].mean() < 0.5


def test_intrinsics_give_metric_shapes(large):
    """Back-projected floors and walls are planes: most neighbouring normals agree."""
    for scene in large[:4]:
        size = scene["depth"].shape[0]
        x, y = np.meshgrid(np.arange(size), np.arange(size))
        rays = np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(scene["intrinsics"].astype(float)).T
        points = rays * scene["depth"][..., None]
        normals = np.cross(points[:-1, 1:] - points[:-1, :-1], points[1:, :-1] - points[:-1, :-1])
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
        agreement = (normals[:, 1:] * normals[:, :-1]).sum(-1)
        assert np.median(agreement) > 0.9999


def test_masks_and_whole_agree(scenes):
    for scene in scenes:
        visible, whole = scene["visible_mask"], scene["whole_mask"]
        assert not (visible & ~whole).any() and visible.any()
        gray = scene["whole"] @ np.array([0.114, 0.587, 0.299])
        np.testing.assert_array_equal(gray <= 250, whole)
        assert (scene["whole"][~whole] == 255).all()


def test_whole_looks_as_in_the_picture(large):
    for scene in large:
        inside = scene["visible_mask"].copy()
        for axis in (0, 1):
            for step in (-1, 1):
                inside &= np.roll(scene["visible_mask"], step, axis)
        if inside.sum() > 50:
            gap = np.abs(scene["whole"][inside].astype(float) - scene["image"][inside])
            assert gap.mean() < 6  # noise and the cap below white are the only differences


def test_resolution_only_changes_sampling():
    for index in range(5):
        small, big = render_scene(index, 64), render_scene(index, 128)
        reduced = big["image"].reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        assert np.abs(reduced - small["image"]).mean() < 8
        assert small["label"] == big["label"] and small["key"] == big["key"]
        # A pixel centre of the small picture lies between four of the big one.
        four = big["depth"].reshape(64, 2, 64, 2)
        low, high = four.min(axis=(1, 3)), four.max(axis=(1, 3))
        within = (small["depth"] >= low * 0.999) & (small["depth"] <= high * 1.001)
        assert within.mean() > 0.97
        flow = big["flow"].reshape(64, 2, 64, 2, 2).mean(axis=(1, 3)) / 2
        assert np.median(np.abs(flow - small["flow"])) < 0.02
        area = [s["whole_mask"].mean() for s in (small, big)]
        assert abs(area[0] - area[1]) < 0.01


@pytest.mark.parametrize("resolution", [16, 40, 256])
def test_other_resolutions(resolution):
    scene = render_scene(5, resolution)
    assert scene["flow"].shape == (resolution, resolution, 2)
    assert np.isfinite(scene["depth"]).all() and scene["intrinsics"][0, 2] == (resolution - 1) / 2


def test_statistics(scenes):
    depth = np.stack([s["depth"] for s in scenes])
    assert np.isfinite(depth).all() and depth.min() > 0.15 and depth.max() < 60
    assert np.mean([s["valid"].mean() for s in scenes]) > 0.999
    spread = np.array([np.quantile(d, 0.95) / np.quantile(d, 0.05) for d in depth])
    assert 2 < np.median(spread) < 8 and spread.min() > 1.1
    length = np.stack([np.hypot(*np.moveaxis(s["flow"], -1, 0)) for s in scenes]) * 2  # pixels of a 128 frame
    assert 2.5 < length.mean() < 7 and np.median(length.mean(axis=(1, 2))) > 1.5
    assert 10 < np.quantile(length, 0.99) < 30 and length.max() < 60
    area = np.array([s["whole_mask"].mean() for s in scenes])
    assert ((area > 0.03) & (area < 0.45)).all() and 0.08 < area.mean() < 0.25
    share = np.array([s["visible_mask"].sum() / s["whole_mask"].sum() for s in scenes])
    assert share.min() > 0.2 and 0.6 < share.mean() < 0.85
    assert ((share > 0.3) & (share < 0.95)).mean() > 0.6 and (share > 0.97).any()
    assert len({s["label"] for s in scenes}) >= 10
    bright = np.array([s["image"].mean() for s in scenes])
    assert bright.min() > 40 and bright.max() < 215


def test_image_row_does_not_give_depth(scenes):
    """The line in the image row that fits best leaves most of the error of the constant that fits best."""

    def error(feature, depth):
        columns = np.stack([feature, np.ones_like(feature)], 1)
        fitted = np.maximum(columns @ np.linalg.lstsq(columns, depth, rcond=None)[0], 1e-3)
        return np.mean(np.abs(fitted - depth) / depth)

    row = np.repeat(np.arange(64.0), 64)
    pairs = [(error(row, d), error(row * 0, d)) for d in (s["depth"].reshape(-1).astype(float) for s in scenes)]
    by_row, constant = np.mean(pairs, axis=0)
    assert constant > 0.3 and by_row > 0.5 * constant


def test_source_items_and_splits():
    sources = {split: ScenesSource(split, 3, 32, start=2) for split in SPLIT_STARTS}
    for split, source in sources.items():
        assert len(source) == 3
        assert _digest(source[1]) == _digest(render_scene(SPLIT_STARTS[split] + 3, 32))
    keys = [source[i]["key"] for source in sources.values() for i in range(3)]
    assert len(set(keys)) == 9
    starts = sorted(SPLIT_STARTS.values())
    assert starts[1] - starts[0] == starts[2] - starts[1] == 1_000_000_000
    with pytest.raises(IndexError):
        sources["train"][3]
    assert sources["val"][-1]["key"] == sources["val"][2]["key"]


def test_fingerprint_tells_sources_apart():
    prints = [
        ScenesSource("train", 4, 32).fingerprint(), ScenesSource("val", 4, 32).fingerprint(),
        ScenesSource("train", 5, 32).fingerprint(), ScenesSource("train", 4, 64).fingerprint(),
        ScenesSource("train", 4, 32, start=1).fingerprint(),
    ]  # fmt: skip
    assert len({json.dumps(p, sort_keys=True) for p in prints}) == 5
    assert prints[0]["renderer"] >= 1 and prints[0] == ScenesSource("train", 4, 32).fingerprint()


def test_opened_by_name():
    source = open_source("scenes", "", "val", "flow", count=2, resolution=32)
    assert isinstance(source, ScenesSource) and source[0]["key"] == f"scene-{VAL:010d}"


@pytest.mark.parametrize(
    "make",
    [
        lambda: ScenesSource("vall", 4), lambda: ScenesSource("train", 0), lambda: ScenesSource("train", 4, 8),
        lambda: ScenesSource("train", 4, 32, start=-1), lambda: ScenesSource("train", 10, 32, start=999_999_999),
        lambda: ScenesSource("train", 2.5), lambda: render_scene(-1), lambda: render_scene(0, 4),
        lambda: render_scene(1.5), lambda: render_scene(True), lambda: render_scene(0, 128.0),
    ],
)  # fmt: skip
def test_mistakes_are_told(make):
    with pytest.raises(UserError, match="give|keep|did you mean"):
        make()


# Geometry by hand


def _straight(kind, half, turn=None):
    """A camera at the origin that looks along +y; a solid at 4 metres."""
    rotation = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], np.float32)
    camera = Camera(rotation, np.zeros(3, np.float32), 1.0)
    room = Solid(BOX, (0, 0, 0), (10, 10, 10), 0)
    thing = make_thing(0, [Solid(kind, (0, 0, 0), half, 0, turn)], np.array([0, 4, 0]), yaw(0))
    return camera, assemble(room, [thing])


@pytest.mark.parametrize(
    "kind, half, depth", [(BOX, (1, 0.5, 1), 3.5), (BALL, (1, 0.5, 1), 3.5), (CYLINDER, (1, 1, 1), 3)]
)
def test_depth_of_solids(kind, half, depth):
    camera, geometry = _straight(kind, half)
    x = np.array([50, 0], np.float32)
    found, solid, _ = cast(geometry, camera, x, np.array([50, 0], np.float32), 101)
    np.testing.assert_allclose(found, [depth, 10], rtol=1e-5)
    assert solid.tolist() == [1, 0]


def test_cylinder_is_capped():
    camera, geometry = _straight(CYLINDER, (0.5, 0.5, 0.5))
    y = np.linspace(0, 100, 101).astype(np.float32)
    _, solid, _ = cast(geometry, camera, np.full_like(y, 50), y, 101)
    height = np.abs(y[solid == 1] - 50).max() / 101 * 3.5
    assert 0.45 < height <= 0.51


def test_ball_of_ellipse_meets_its_equation():
    rng = np.random.default_rng(0)
    direction = rng.normal(size=(3, 200)).astype(np.float32)
    origin = np.array([[0.3], [-2.5], [0.4]], np.float32)
    enter, leave = interval(BALL, origin, direction)
    hit = enter < leave
    assert 5 < hit.sum() < 195
    for t in (enter, leave):
        np.testing.assert_allclose(np.linalg.norm(origin + t * direction, axis=0)[hit], 1, atol=1e-5)
    nearest = origin - (origin * direction).sum(0) / (direction**2).sum(0) * direction
    np.testing.assert_array_equal(hit, np.linalg.norm(nearest, axis=0) < 1)


def test_blocked_needs_the_thing_between():
    _, geometry = _straight(BOX, (1, 0.5, 1))
    points = np.array([[0, 0, 0, 3], [6, 3, 6, 6], [0, 0, 0, 0]], np.float32)
    steps = np.array([[0, 0, 0, 0], [-5, -2, -1, -5], [0, 0, 0, 0]], np.float32)
    assert blocked(geometry, points, steps).tolist() == [True, False, False, False]


def test_pattern_lookup_filters():
    bank = pattern_bank()
    u = np.linspace(0, 3, 500).astype(np.float32)
    for number in range(len(bank.names)):
        pattern = np.full(500, number)
        fine = sample(pattern, u, u * 0.37, np.zeros(500, np.float32))
        coarse = sample(pattern, u, u * 0.37, np.full(500, LEVELS, np.float32))
        assert 0 <= fine.min() and fine.max() <= 1 and fine.std() > 0.01, bank.names[number]
        assert coarse.std() < 0.02, bank.names[number]
        again = sample(pattern, u + 2, u * 0.37 - 5, np.zeros(500, np.float32))
        assert np.median(np.abs(again - fine)) < 1e-3, bank.names[number]
