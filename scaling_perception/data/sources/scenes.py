"""Procedural scenes: the embedded data set. Every sample is a pure function of an integer; nothing is read or stored.

Rooms with furniture and open ground with hills, textured, lit with shadows, seen by a moving camera while some things
move by themselves. Geometry is exact: depth, flow and masks come from the ray through each pixel's centre, colours from
the same ray with filtered textures, and from 2x2 rays where surfaces or shadows meet.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from scaling_perception.data.scenes import layout as layout_of
from scaling_perception.data.scenes.geometry import Camera, Geometry, assemble, blocked, cast
from scaling_perception.data.scenes.layout import Scene
from scaling_perception.data.scenes.objects import CLASSES
from scaling_perception.data.scenes.shading import develop, shade, surface
from scaling_perception.support.errors import UserError, did_you_mean

__all__ = ["CLASSES", "RENDERER", "SPLIT_STARTS", "ScenesSource", "render_scene"]

RENDERER = 3
"""Version of the pictures; bumped whenever an index gives other arrays, so that caches of old ones are refused."""

SPLIT_STARTS = {"train": 0, "val": 1_000_000_000, "test": 2_000_000_000}
"""First index of each split; each has room for 10**9 scenes."""

_ROOM = 1_000_000_000
_SALT = 0x5CA1E
_QUARTERS = np.array([[-0.25, 0.25, -0.25, 0.25], [-0.25, -0.25, 0.25, 0.25]], np.float32)
_WHITEST = 0.94  # of things in `whole`: darker than the threshold that tells the white ground

Array = np.ndarray


class _View:
    """One frame's centre rays and finished colours."""

    def __init__(self, scene: Scene, camera: Camera, geometry: Geometry, resolution: int, x: Array, y: Array) -> None:
        self.scene, self.camera, self.geometry, self.resolution = scene, camera, geometry, resolution
        self.x, self.y = x, y
        self.depth, self.solid, self.rays = cast(geometry, camera, x, y, resolution)
        self.owner = geometry.owner[self.solid]

    def shade(self, depth: Array, solid: Array, rays: Array, finer: float = 1.0) -> tuple[Array, Array, Array]:
        """Linear colours (3, N), shadow (N,) and a number (N,) that changes across every edge."""
        scene, geometry = self.scene, self.geometry
        hits = surface(geometry, self.camera, rays, depth, solid)
        pixel = finer / (self.camera.focal * self.resolution)
        room = float(scene.size[2]) if scene.indoor else None
        colour, shadow = shade(
            geometry, self.camera, scene.tables, scene.lights, scene.look, rays, depth, solid, hits, pixel, room
        )
        return colour, shadow, (solid * 8 + hits.face) * 2 + shadow

    def colours(self) -> tuple[Array, Array, Array]:
        """Colours with 2x2 rays at edges, colours of the centres alone (3, N), and whether all rays of a pixel see the
        same thing (N,)."""
        size = self.resolution
        centre, _, key = self.shade(self.depth, self.solid, self.rays)
        key = key.reshape(size, size)
        edge = np.zeros((size, size), bool)
        across, down = key[:, 1:] != key[:, :-1], key[1:] != key[:-1]
        edge[:, 1:] |= across
        edge[:, :-1] |= across
        edge[1:] |= down
        edge[:-1] |= down
        chosen = np.flatnonzero(edge)
        smooth = centre.copy()
        same = np.ones(size * size, bool)
        if chosen.size:
            x = (self.x[chosen, None] + _QUARTERS[0]).reshape(-1)
            y = (self.y[chosen, None] + _QUARTERS[1]).reshape(-1)
            depth, solid, rays = cast(self.geometry, self.camera, x, y, size)
            colour, _, _ = self.shade(depth, solid, rays, 0.5)
            smooth[:, chosen] = np.minimum(colour, 4).reshape(3, -1, 4).mean(axis=2)
            owner = self.geometry.owner[solid].reshape(-1, 4)
            same[chosen] = (owner == self.owner[chosen, None]).all(axis=1)
        return smooth, centre, same

    def normals(self) -> Array:
        """Unit normals (3, N) in the camera's frame (x right, y down, z forward), towards the camera."""
        hits = surface(self.geometry, self.camera, self.rays, self.depth, self.solid)
        return self.camera.rotation @ hits.normals

    def develop(self, colour: Array, gain: float, chosen: Array | slice = slice(None)) -> Array:
        return develop(colour, self.scene.look, gain, self.x[chosen], self.y[chosen], self.resolution)


def _bytes(value: Array, resolution: int) -> Array:
    """(3, N) in [0, 1] to uint8 (R, R, 3)."""
    out = np.clip(value * np.float32(255) + np.float32(0.5), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(out.T).reshape(resolution, resolution, 3)


def _gain(scene: Scene, geometry: Geometry, wish: float) -> float:
    """Exposure that brings the scene's 70 % brightness to ``wish``; from a coarse picture, so for all resolutions."""
    line = np.arange(24, dtype=np.float32)
    x, y = (v.reshape(-1) for v in np.meshgrid(line, line))
    view = _View(scene, scene.camera, geometry, 24, x, y)
    colour, _, _ = view.shade(view.depth, view.solid, view.rays)
    return wish / max(float(np.quantile(colour.mean(axis=0), 0.7)), 0.02)


def render_scene(index: int, resolution: int = 128) -> dict[str, Any]:
    """Scene number ``index`` with everything that is known about it.

    The same index gives the same scene at every resolution, sampled more or less finely. Pixel centres are integers.

    Args:
        index: 0 or more. resolution: pixels a side, 16 to 2048.

    Returns:
        key str; image, image2 uint8 (R, R, 3) two frames; depth, depth2 float32 (R, R) metres along the optical axis;
        normals float32 (R, R, 3) unit vectors in the camera's frame: x right, y down, z away, so that they have z < 0;
        flow float32 (R, R, 2) pixels, u right and v down, of the point seen in ``image`` to ``image2``; occluded bool
        (R, R) that point is hidden or outside the frame in ``image2``; valid bool (R, R) depth and flow are defined;
        visible_mask, whole_mask bool (R, R) seen part and whole silhouette of the target thing; whole uint8 (R, R, 3)
        the target alone, lit as in the scene, on white; label int number of ``CLASSES``; intrinsics float32 (3, 3).

    Raises:
        UserError: index below 0, resolution outside 16..2048, or no integers.
    """
    index, resolution = _checked(index, resolution)
    layout, noise = _generators(index)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scene = layout_of.compose(layout)
        return _render(scene, f"scene-{index:010d}", resolution, layout.uniform(0.2, 0.52), noise)


def render_clip(index: int, frames: int = 8, resolution: int = 128) -> list[dict[str, Any]]:
    """Scene number ``index`` as a clip: camera and things move evenly from their first poses to their second ones.

    Returns:
        What `render_scene` does, of each of the ``frames`` 2 or more; ``flow`` and ``image2`` lead to the next frame
        (of the last, as far beyond it). All frames have one exposure, and each its own grain.

    Raises:
        UserError: as `render_scene`; fewer than two frames.
    """
    index, resolution = _checked(index, resolution)
    if isinstance(frames, bool) or not isinstance(frames, (int, np.integer)) or frames < 2:
        raise UserError(f"frames {frames!r} of a clip: give an integer of 2 or more")
    layout, noise = _generators(index)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scene, clip = layout_of.compose(layout), []
        gain = _gain(scene, assemble(scene.surroundings, scene.things), layout.uniform(0.2, 0.52))
        for frame in range(frames):
            now = layout_of.between(scene, frame / (frames - 1), (frame + 1) / (frames - 1))
            clip.append(_render(now, f"scene-{index:010d}-{frame:04d}", resolution, 0.0, noise, gain))
    return clip


def _checked(index: int, resolution: int) -> tuple[int, int]:
    if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or index < 0:
        raise UserError(f"scene index {index!r} is no number of a scene: give an integer of 0 or more")
    if isinstance(resolution, bool) or not isinstance(resolution, (int, np.integer)) or not 16 <= resolution <= 2048:
        raise UserError(f"resolution {resolution!r} cannot be rendered: give an integer from 16 to 2048")
    return int(index), int(resolution)


def _generators(index: int) -> list[np.random.Generator]:
    """Of the layout and of the grain."""
    return [np.random.default_rng(seed) for seed in np.random.SeedSequence([index, _SALT]).spawn(2)]


def _render(
    scene: Scene, key: str, resolution: int, wish: float, noise: np.random.Generator, gain: float | None = None
) -> dict[str, Any]:
    line = np.arange(resolution, dtype=np.float32)
    x, y = (np.ascontiguousarray(v.reshape(-1)) for v in np.meshgrid(line, line))
    geometry = assemble(scene.surroundings, scene.things)
    geometry2 = assemble(scene.surroundings, scene.things, frame=2)
    gain = _gain(scene, geometry, wish) if gain is None else gain
    first = _View(scene, scene.camera, geometry, resolution, x, y)
    second = _View(scene, scene.camera2, geometry2, resolution, x, y)
    smooth, centre, same = first.colours()
    smooth2, _, _ = second.colours()

    shape = (resolution, resolution)
    flow, occluded, valid = _flow(scene, first, geometry2)
    visible = first.owner == scene.target
    whole_mask, whole = _whole(scene, first, visible, np.where(same, smooth, centre), gain)
    pictures = []
    for view, colour in ((first, smooth), (second, smooth2)):
        grain = noise.standard_normal((3, resolution * resolution), np.float32) * np.float32(scene.look.noise)
        pictures.append(_bytes(view.develop(colour, gain) + grain, resolution))
    focal, middle = scene.camera.focal * resolution, (resolution - 1) / 2
    return {
        "key": key,
        "image": pictures[0],
        "image2": pictures[1],
        "depth": first.depth.reshape(shape),
        "depth2": second.depth.reshape(shape),
        "flow": np.ascontiguousarray(flow.T).reshape(*shape, 2),
        "normals": np.ascontiguousarray(first.normals().T).reshape(*shape, 3),
        "occluded": occluded.reshape(shape),
        "valid": valid.reshape(shape),
        "visible_mask": visible.reshape(shape),
        "whole_mask": whole_mask.reshape(shape),
        "whole": _bytes(whole, resolution),
        "label": scene.things[scene.target].label,
        "intrinsics": np.array([[focal, 0, middle], [0, focal, middle], [0, 0, 1]], np.float32),
    }


def _flow(scene: Scene, view: _View, geometry2: Geometry) -> tuple[Array, Array, Array]:
    """Flow (2, N), occluded (N,) and valid (N,) of the points seen in the first frame."""
    points = view.camera.eye[:, None] + view.rays * view.depth
    for number, thing in enumerate(scene.things):
        mine = np.flatnonzero(view.owner == number)
        if mine.size and not thing.backdrop:
            points[:, mine] = layout_of.move(thing, points[:, mine])
    x, y, z = scene.camera2.project(points, view.resolution)
    valid = z > 0.05
    flow = np.stack([x - view.x, y - view.y]) * valid
    edge = view.resolution - 0.5
    outside = ~valid | (x < -0.5) | (y < -0.5) | (x > edge) | (y > edge)
    # Hidden: something lies on the way from the second eye to the point; the last thousandth is the surface itself.
    inside = np.flatnonzero(~outside)
    steps = scene.camera2.eye[:, None] - points[:, inside]
    hidden = blocked(geometry2, points[:, inside] + steps * np.float32(2e-3), steps * np.float32(0.99), shadows=False)
    outside[inside] |= hidden
    return flow, outside, valid


def _whole(scene: Scene, view: _View, visible: Array, colour: Array, gain: float) -> tuple[Array, Array]:
    """The target's silhouette (N,) and its picture (3, N) in [0, 1] on white."""
    depth, solid, _ = cast(view.geometry, view.camera, view.x, view.y, view.resolution, view.rays, [scene.target])
    mask = solid >= 0
    picture = np.ones((3, mask.size), np.float32)
    hidden = np.flatnonzero(mask & ~visible)
    colour = colour.copy()
    if hidden.size:
        colour[:, hidden], _, _ = view.shade(depth[hidden], solid[hidden], view.rays[:, hidden])
    chosen = np.flatnonzero(mask)
    picture[:, chosen] = np.minimum(view.develop(colour[:, chosen], gain, chosen), _WHITEST)
    return mask, picture


class ScenesSource:
    """Scenes ``start`` to ``start + count`` of a split, as raw samples (see ``data.sources``).

    Args:
        split: train, val or test; '' is train. Their indices never meet.
        count: how many scenes. resolution: pixels a side. start: the first one within the split.

    Raises:
        UserError: unknown split, a count below 1, scenes beyond the split, or a resolution outside 16..2048.
    """

    def __init__(self, split: str = "train", count: int = 1024, resolution: int = 128, start: int = 0) -> None:
        split = split or "train"
        if split not in SPLIT_STARTS:
            raise UserError(f"scenes have no split '{split}'{did_you_mean(split, SPLIT_STARTS)}")
        for name, value, least in (("count", count, 1), ("start", start, 0)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise UserError(f"{name} {value!r} does not fit: give an integer of {least} or more")
        if start + count > _ROOM:
            raise UserError(f"scenes {start}..{start + count} leave the split: keep start + count up to {_ROOM}")
        if not isinstance(resolution, (int, np.integer)) or not 16 <= resolution <= 2048:
            raise UserError(f"resolution {resolution!r} cannot be rendered: give an integer from 16 to 2048")
        self.split, self.count, self.resolution, self.start = split, int(count), int(resolution), int(start)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        if not -self.count <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        return render_scene(SPLIT_STARTS[self.split] + self.start + index % self.count, self.resolution)

    def __repr__(self) -> str:
        return f"ScenesSource({self.split}, {self.count} from {self.start}, {self.resolution} pixels)"

    def fingerprint(self) -> dict[str, Any]:
        """JSON values that change whenever the samples may have."""
        return {
            "name": "scenes",
            "renderer": RENDERER,
            "split": self.split,
            "length": self.count,
            "start": self.start,
            "resolution": self.resolution,
        }
