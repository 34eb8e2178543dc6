"""Solids, poses and exact ray casting for the procedural scenes; numpy float32, structure of arrays, (3, N) vectors.

World: metres, z up. Camera: x right, y down, z forward. Rays have a z of 1 in the camera, so that the distance along a
ray *is* planar depth. Every solid is a unit box, ball or cylinder behind an affine map, so one routine casts them all.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

Array = np.ndarray

BOX, BALL, CYLINDER = 0, 1, 2
NEAR = 0.02
"""Metres: nothing closer is seen."""

_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32)


class Solid(NamedTuple):
    """A box, ball or cylinder (axis z) with half sizes ``half`` (3,), at ``centre`` (3,), in the frame of its thing."""

    kind: int
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    material: int
    rotation: Array | None = None


@dataclasses.dataclass
class Thing:
    """A rigid group of solids that is seen, moves and is segmented as one.

    Attributes:
        label: class number. solids: in the thing's frame, whose origin is the middle of the thing.
        radius: of a sphere about the origin that holds everything, metres.
        rotation, position: pose in frame 1 (3, 3), (3,); rotation2, position2 in frame 2.
        backdrop: part of the surroundings: casts no shadow, is no target and does not move.
    """

    label: int
    solids: list[Solid]
    radius: float
    rotation: Array
    position: Array
    backdrop: bool = False
    rotation2: Array | None = None
    position2: Array | None = None


class Camera(NamedTuple):
    """``rotation`` (3, 3) rows are right, down and forward in the world; ``eye`` (3,); ``focal`` in frame widths."""

    rotation: Array
    eye: Array
    focal: float

    def project(self, points: Array, resolution: int) -> tuple[Array, Array, Array]:
        """World points (3, N) to pixels x, y (pixel centres are integers) and depth z, each (N,)."""
        inside = self.rotation @ (points - self.eye[:, None])
        z = np.maximum(inside[2], np.float32(1e-3))
        scale = np.float32(self.focal * resolution) / z
        middle = np.float32((resolution - 1) / 2)
        return inside[0] * scale + middle, inside[1] * scale + middle, inside[2]

    def rays(self, x: Array, y: Array, resolution: int) -> Array:
        """World directions (3, N) of unit camera z through pixels ``x``, ``y`` (N,)."""
        scale = np.float32(1 / (self.focal * resolution))
        middle = np.float32((resolution - 1) / 2)
        inside = np.stack([(x - middle) * scale, (y - middle) * scale, np.ones_like(x)])
        return self.rotation.T @ inside


class Geometry(NamedTuple):
    """All solids of one frame. Solid 0 is the surroundings: a box seen from inside.

    kind, material (S,); matrix (S, 3, 3) world offset to unit coordinates; centre, half (S, 3); spans: first and last
    solid of each thing; spheres (T, 4) centre and radius of each thing; blocks (T,) casts shadows; owner (S,) thing of
    each solid, -1 for the surroundings.
    """

    kind: Array
    material: Array
    matrix: Array
    centre: Array
    half: Array
    spans: list[tuple[int, int]]
    spheres: Array
    blocks: list[bool]
    owner: Array


def rotation_about(axis: Array, angle: float) -> Array:
    """Rodrigues' formula: (3, 3) float32."""
    x, y, z = np.asarray(axis, np.float64) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return (np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross).astype(np.float32)


def yaw(angle: float) -> Array:
    """Rotation about z, (3, 3) float32."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], np.float32)


def make_thing(label: int, solids: list[Solid], position: Array, rotation: Array, backdrop: bool = False) -> Thing:
    """A thing whose frame's origin is moved to the middle of its solids; ``position`` is where the old origin lies."""
    low = np.min([np.subtract(s.centre, _reach(s)) for s in solids], axis=0)
    high = np.max([np.add(s.centre, _reach(s)) for s in solids], axis=0)
    middle = (low + high) / 2
    moved = [s._replace(centre=tuple(np.subtract(s.centre, middle))) for s in solids]
    radius = float(np.linalg.norm(high - low) / 2)
    position = np.asarray(position, np.float32) + rotation @ middle.astype(np.float32)
    return Thing(label, moved, radius, rotation, position, backdrop)


def _reach(solid: Solid) -> Array:
    """Half size of the axis-aligned box around a solid, in its thing's frame."""
    half = np.asarray(solid.half)
    return half if solid.rotation is None else np.abs(solid.rotation) @ half


def assemble(surroundings: Solid, things: list[Thing], frame: int = 1) -> Geometry:
    """The solids of frame 1 or 2."""
    eye = np.eye(3, dtype=np.float32)
    solids, owner, spans = [surroundings], [-1], []
    for number, thing in enumerate(things):
        spans.append((len(solids), len(solids) + len(thing.solids)))
        solids += thing.solids
        owner += [number] * len(thing.solids)
    second = frame == 2
    turns = [t.rotation2 if second and t.rotation2 is not None else t.rotation for t in things]
    places = [t.position2 if second and t.position2 is not None else t.position for t in things]
    turn = np.stack([eye, *turns])[np.array(owner) + 1]
    place = np.stack([np.zeros(3, np.float32), *places]).astype(np.float32)[np.array(owner) + 1]
    local = np.stack([eye if s.rotation is None else s.rotation for s in solids])
    offset = np.array([s.centre for s in solids], np.float32)
    half = np.array([s.half for s in solids], np.float32)
    world = turn @ local
    spheres = np.array([[*p, t.radius] for p, t in zip(places, things, strict=True)], np.float32).reshape(-1, 4)
    return Geometry(
        kind=np.array([s.kind for s in solids], np.int32),
        material=np.array([s.material for s in solids], np.int32),
        matrix=np.ascontiguousarray(world.transpose(0, 2, 1) / half[:, :, None], np.float32),
        centre=((turn @ offset[:, :, None])[:, :, 0] + place).astype(np.float32),
        half=half,
        spans=spans,
        spheres=spheres,
        blocks=[not t.backdrop for t in things],
        owner=np.array(owner, np.int32),
    )


def interval(kind: int, origin: Array, direction: Array) -> tuple[Array, Array]:
    """Where rays (3, 1 or N), (3, N) enter and leave a unit solid: (N,), (N,), the first above the second if missed."""
    if kind == BALL:
        length = np.einsum("ij,ij->j", direction, direction)
        middle = -(origin * direction).sum(axis=0) / length
        nearest = origin + middle * direction
        inside = np.float32(1) - np.einsum("ij,ij->j", nearest, nearest)
        reach = np.sqrt(np.maximum(inside, 0) / length)
        reach[inside <= 0] = -1
        return middle - reach, middle + reach
    inverse = np.float32(1) / direction
    centre = -origin * inverse
    size = np.abs(inverse)
    if kind == BOX:
        low, high = centre - size, centre + size
        return (
            np.maximum(np.maximum(low[0], low[1]), low[2]),
            np.minimum(np.minimum(high[0], high[1]), high[2]),
        )
    x, y = direction[0], direction[1]
    length = x * x + y * y
    middle = -(origin[0] * x + origin[1] * y) / length
    nx, ny = origin[0] + middle * x, origin[1] + middle * y
    inside = np.float32(1) - nx * nx - ny * ny
    reach = np.sqrt(np.maximum(inside, 0) / length)
    reach[inside <= 0] = -1e6
    return np.maximum(middle - reach, centre[2] - size[2]), np.minimum(middle + reach, centre[2] + size[2])


def _safe(direction: Array) -> Array:
    """No exact zeros, which would give 0 * inf; 1e-9 is far below float32's resolution of the other components."""
    direction[direction == 0] = 1e-9
    return direction


def screen_boxes(geometry: Geometry, camera: Camera, resolution: int) -> Array:
    """Pixel bounds (T, 4) x0, x1, y0, y1 of each thing, one pixel wide of it; everything for things across the eye."""
    if not geometry.spans:
        return np.zeros((0, 4), np.float32)
    size = geometry.half[1:]
    turn = geometry.matrix[1:] * size[:, :, None]  # rows are the solid's axes in the world
    corners = geometry.centre[1:, None] + np.einsum("ski,sck->sci", turn, _CORNERS[None] * size[:, None])
    x, y, z = (v.reshape(corners.shape[:2]) for v in camera.project(corners.reshape(-1, 3).T, resolution))
    starts = [first - 1 for first, _ in geometry.spans]
    near = np.minimum.reduceat(z.min(axis=1), starts) < 0.05
    bounds = [
        np.minimum.reduceat(x.min(axis=1), starts) - 1,
        np.maximum.reduceat(x.max(axis=1), starts) + 1,
        np.minimum.reduceat(y.min(axis=1), starts) - 1,
        np.maximum.reduceat(y.max(axis=1), starts) + 1,
    ]
    for bound, everything in zip(bounds, (-1e9, 1e9, -1e9, 1e9), strict=True):
        bound[near] = everything
    behind = np.maximum.reduceat(z.max(axis=1), starts) < 0.05
    bounds[1][behind] = -1e9
    return np.stack(bounds, axis=1)


def cast(
    geometry: Geometry,
    camera: Camera,
    x: Array,
    y: Array,
    resolution: int,
    rays: Array | None = None,
    things: list[int] | None = None,
) -> tuple[Array, Array, Array]:
    """First hits of the rays through pixels ``x``, ``y`` (N,).

    ``things`` restricts to those (and leaves the surroundings out: depth inf, solid -1 where nothing is hit).

    Returns:
        depth (N,) float32 metres, solid (N,) int32, rays (3, N) float32.
    """
    if rays is None:
        rays = camera.rays(x, y, resolution)
    origins = np.einsum("sij,sj->si", geometry.matrix, camera.eye - geometry.centre)[:, :, None]
    if things is None:
        _, depth = interval(BOX, origins[0], _safe(geometry.matrix[0] @ rays))
        solid = np.zeros(len(x), np.int32)
    else:
        depth = np.full(len(x), np.inf, np.float32)
        solid = np.full(len(x), -1, np.int32)
    boxes = screen_boxes(geometry, camera, resolution)
    for number in range(len(geometry.spans)) if things is None else things:
        x0, x1, y0, y1 = boxes[number]
        if x1 < x0:
            continue
        chosen = np.flatnonzero((x >= x0) & (x <= x1) & (y >= y0) & (y <= y1))
        if not chosen.size:
            continue
        sub = rays.take(chosen, axis=1)
        best, which = depth.take(chosen), solid.take(chosen)
        for index in range(*geometry.spans[number]):
            enter, leave = interval(geometry.kind[index], origins[index], _safe(geometry.matrix[index] @ sub))
            hit = (enter < leave) & (enter > NEAR) & (enter < best)
            np.copyto(best, enter, where=hit)
            which[hit] = index
        depth[chosen], solid[chosen] = best, which
    return depth, solid, rays


def blocked(geometry: Geometry, points: Array, steps: Array, shadows: bool = True, start: float = 0.0) -> Array:
    """Whether a thing lies between ``points`` (3, N) and ``points + steps``: (N,) bool.

    ``shadows`` leaves out the things that cast none. The first ``start`` of each step does not count.
    """
    found = np.zeros(points.shape[1], bool)
    square = np.einsum("ij,ij->j", steps, steps)
    # All spheres at once by |c - p|^2 and (c - p).d as matrix products: which rays pass near which thing.
    centres, reach = geometry.spheres[:, :3], geometry.spheres[:, 3:] + np.float32(0.01)
    along = centres @ steps - np.einsum("ij,ij->j", points, steps)
    away = (centres * centres).sum(axis=1, keepdims=True) - 2 * (centres @ points)
    away += np.einsum("ij,ij->j", points, points)
    share = np.clip(along / square, 0, 1)
    near = away - share * (2 * along - share * square) < reach * reach
    for number, (first, last) in enumerate(geometry.spans):
        if shadows and not geometry.blocks[number]:
            continue
        chosen = np.flatnonzero(near[number] & ~found)
        if not chosen.size:
            continue
        here, step = points.take(chosen, axis=1), steps.take(chosen, axis=1)
        some = np.zeros(len(chosen), bool)
        for index in range(first, last):
            matrix = geometry.matrix[index]
            origin = matrix @ (here - geometry.centre[index][:, None])
            enter, leave = interval(geometry.kind[index], origin, _safe(matrix @ step))
            some |= (np.maximum(enter, start) < np.minimum(leave, 1)) & (leave > start)
        found[chosen] = some
    return found
