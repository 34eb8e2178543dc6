"""Bodies of unit size, made once in each process: boxes, revolved and extruded profiles, stones, leaves, cloth, land.

A body fills the cube [-0.5, 0.5]^3 (z up) and is placed by a rotation, three scales and a shift.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Body(NamedTuple):
    """Triangles of one body.

    corners, normals: float32 (F, 3, 3), normals of the smooth surface at each corner; texture: float32 (F, 3, 2) place
    on the surface in units of the two scales that ``axes``, int (F, 2), names.
    """

    corners: Array
    normals: Array
    texture: Array
    axes: Array


def _flat(corners: Array, crease: Array | None = None) -> Body:
    """Triangles with textures projected along the nearest axis; ``crease`` gives smooth normals."""
    corners = np.asarray(corners, np.float32)
    face = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = np.linalg.norm(face, axis=1)
    kept = length > 1e-9
    corners, face = corners[kept], face[kept] / length[kept, None]
    normals = np.repeat(face[:, None], 3, axis=1) if crease is None else np.asarray(crease)[kept]
    axes = np.array([[1, 2], [0, 2], [0, 1]])[np.abs(face).argmax(axis=1)]
    texture = np.take_along_axis(corners, axes[:, None, :].repeat(3, axis=1), axis=2)
    return Body(corners, normals.astype(np.float32), texture.astype(np.float32), axes.astype(np.int64))


def _lattice(points: Array, normals: Array | None = None, closed: bool = True) -> tuple[Array, Array | None]:
    """Two triangles a cell of a (A, B, 3) lattice, closed along the first axis if asked."""
    a = np.arange(points.shape[0] - (0 if closed else 1))
    b = np.arange(points.shape[1] - 1)
    i, j = (value.reshape(-1) for value in np.meshgrid(a, b, indexing="ij"))
    k = (i + 1) % points.shape[0]
    index = np.concatenate([np.stack([(i, j), (k, j), (k, j + 1)]), np.stack([(i, j), (k, j + 1), (i, j + 1)])], axis=2)
    pick = (index[:, 0].T, index[:, 1].T)
    return points[pick], None if normals is None else normals[pick]


def box() -> Body:
    """A box of twelve triangles."""
    return _flat(_boxes(np.full(3, 0.5)))


def _boxes(half: Array) -> Array:
    out = []
    for axis in range(3):
        for side in (-1, 1):
            u, v = (axis + 1) % 3, (axis + 2) % 3
            quad = np.zeros((4, 3))
            quad[:, axis] = side * half[axis]
            quad[:, u] = np.array([-1, 1, 1, -1]) * half[u]
            quad[:, v] = np.array([-1, -1, 1, 1]) * half[v]
            quad = quad if side > 0 else quad[::-1]
            out += [quad[[0, 1, 2]], quad[[0, 2, 3]]]
    return np.array(out)


def soft_box(cut: float) -> Body:
    """A box with rounded edges ``cut`` of its half sizes wide."""
    line = np.array([-1.0, -1 + cut, 1 - cut, 1.0])
    out, smooth = [], []
    for axis in range(3):
        for side in (-1, 1):
            u, v = np.meshgrid(line, line, indexing="ij")
            cube = np.zeros((4, 4, 3))
            cube[..., axis] = side
            cube[..., (axis + 1) % 3] = u if side > 0 else u[::-1]
            cube[..., (axis + 2) % 3] = v
            inner = np.clip(cube, -1 + cut, 1 - cut)
            away = cube - inner
            away /= np.maximum(np.linalg.norm(away, axis=2, keepdims=True), 1e-9)
            corners, normals = _lattice((inner + cut * away) / 2, away, closed=False)
            out.append(corners)
            smooth.append(normals)
    return _flat(np.concatenate(out), np.concatenate(smooth))


def revolve(profile: Array, around: int = 14) -> Body:
    """A (K, 2) profile of radii (0 to 0.5) and heights (-0.5 to 0.5), lowest first, turned about z."""
    profile = np.asarray(profile, np.float64)
    angle = np.arange(around) * 2 * np.pi / around
    radius, height = profile.T
    points = np.stack([np.outer(np.cos(angle), radius), np.outer(np.sin(angle), radius),
                       np.outer(np.ones(around), height)], axis=2)  # fmt: skip
    step = np.diff(profile, axis=0)
    step /= np.maximum(np.linalg.norm(step, axis=1, keepdims=True), 1e-9)
    out = np.stack([step[:, 1], -step[:, 0]], axis=1)  # outward in the plane of the profile
    corners, smooth = [], []
    for k in range(len(profile) - 1):  # each band's normals, blended with its neighbours' where they bend little
        ends = []
        for row, other in ((k, k - 1), (k + 1, k + 1)):
            known = 0 <= other < len(out) and out[k] @ out[other] > 0.7
            ends.append(out[k] + out[other] if known and row not in (0, len(profile) - 1) else out[k])
        band = np.stack(
            [np.stack([np.cos(angle) * e[0], np.sin(angle) * e[0], np.full(around, e[1])], 1) for e in ends], 1
        )
        band /= np.maximum(np.linalg.norm(band, axis=2, keepdims=True), 1e-9)
        some, normals = _lattice(points[:, k : k + 2], band)
        corners.append(some)
        smooth.append(normals)
    corners, smooth = np.concatenate(corners), np.concatenate(smooth)
    body = _flat(corners, smooth)
    turn = np.arctan2(body.corners[..., 1], body.corners[..., 0])
    turn = np.where(np.ptp(turn, axis=1, keepdims=True) > np.pi, turn % (2 * np.pi), turn)  # across the seam
    side = np.abs(body.normals[:, :, 2].mean(axis=1)) < 0.9
    texture, axes = body.texture.copy(), body.axes.copy()
    texture[side] = np.stack([turn[side] * 0.5, body.corners[side][..., 2]], axis=2)
    axes[side] = (0, 2)
    return Body(body.corners, body.normals, texture, axes)


def extrude(outline: Array) -> Body:
    """A star-shaped (K, 2) outline in x and z, counter-clockwise, drawn out along y."""
    outline = np.asarray(outline, np.float64)
    after = np.roll(outline, -1, axis=0)
    middle = outline.mean(axis=0)

    def at(points: Array, y: float) -> Array:
        return np.stack([points[..., 0], np.full(points.shape[:-1], y), points[..., 1]], axis=-1)

    a0, a1, b0, b1 = at(outline, -0.5), at(after, -0.5), at(outline, 0.5), at(after, 0.5)
    hub = np.broadcast_to(middle, outline.shape)
    front = np.stack([at(hub, -0.5), a0, a1], axis=1)
    back = np.stack([at(hub, 0.5), b1, b0], axis=1)
    return _flat(np.concatenate([front, back, np.stack([a0, b0, b1], 1), np.stack([a0, b1, a1], 1)]))


def stone(rng: np.random.Generator, rough: float, around: int = 12) -> Body:
    """A ball with bumps."""
    theta = np.linspace(0, np.pi, around // 2 + 2)[None, :]
    phi = np.arange(around)[:, None] * 2 * np.pi / around
    unit = np.stack([np.cos(phi) * np.sin(theta), np.sin(phi) * np.sin(theta), np.cos(theta) + 0 * phi], axis=2)
    radius = np.ones(unit.shape[:2])
    for size in (1.3, 2.3, 4.1):
        way, phase = rng.normal(0, size, (3, 3)), rng.uniform(0, 6.3, 3)
        radius += rough / size * np.sin(unit @ way.T + phase).sum(axis=2)
    points = unit * radius[..., None]
    points /= 2 * np.abs(points).max(axis=(0, 1))
    corners, normals = _lattice(points[:, ::-1], unit[:, ::-1])
    return _flat(corners, normals)


def leaves(rng: np.random.Generator, number: int, size: float, flat: float = 1.0) -> Body:
    """Small triangles about a ball, lit as a ball of leaves."""
    way = rng.normal(size=(number, 3))
    way /= np.linalg.norm(way, axis=1, keepdims=True)
    middle = way * (0.5 * rng.uniform(0.25, 1, (number, 1)) ** 0.5)
    middle[:, 2] *= flat
    spread = rng.normal(0, size, (number, 3, 3))
    corners = middle[:, None] + spread
    normals = way[:, None] + rng.normal(0, 0.45, (number, 1, 3))
    normals = np.repeat(normals / np.linalg.norm(normals, axis=2, keepdims=True), 3, axis=1)
    return _flat(corners, normals)


def sheet(height: Array) -> Body:
    """A (A, B) field of heights over x and y."""
    a, b = height.shape
    x, y = np.meshgrid(np.linspace(-0.5, 0.5, a), np.linspace(-0.5, 0.5, b), indexing="ij")
    dx, dy = np.gradient(height, 1 / (a - 1), 1 / (b - 1))
    normals = np.stack([-dx, -dy, np.ones_like(dx)], axis=2)
    normals /= np.linalg.norm(normals, axis=2, keepdims=True)
    corners, smooth = _lattice(np.stack([x, y, height], axis=2), normals, closed=False)
    body = _flat(corners, smooth)
    return Body(body.corners, body.normals, body.corners[..., :2].copy(), np.tile([0, 1], (len(body.corners), 1)))


def _profile(rng: np.random.Generator) -> Array:
    """A vase, bottle, bowl, cup or lamp foot."""
    knots = rng.integers(3, 6)
    radius = rng.uniform(0.12, 0.5, knots)
    line = np.linspace(0, 1, 6)
    smooth = np.interp(line, np.linspace(0, 1, knots), radius)
    smooth *= 0.5 / smooth.max()
    points = [(0.0, -0.5), (smooth[0] * 0.9, -0.5), *zip(smooth, -0.46 + 0.92 * line, strict=True)]
    points += [(smooth[-1] * 0.85, 0.5), (smooth[-1] * 0.7, 0.4), (0.0, 0.38)] if rng.random() < 0.6 else [(0.0, 0.5)]
    return np.array(points)


def _outline(rng: np.random.Generator) -> Array:
    corners = int(rng.integers(5, 15))
    angle = (
        np.sort(rng.uniform(0, 2 * np.pi, corners)) if rng.random() < 0.4 else np.arange(corners) * 2 * np.pi / corners
    )
    radius = rng.uniform(0.35, 1, corners) if rng.random() < 0.7 else np.where(np.arange(corners) % 2, 0.5, 1.0)
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - low) / np.maximum(high - low, 1e-6) - 0.5


_ROUND = [(0.0, -0.5), *[(0.5 * np.sin(a), -0.5 * np.cos(a)) for a in np.linspace(0, np.pi, 9)[1:-1]], (0.0, 0.5)]
_CAR = np.array([(-0.5, -0.2), (-0.46, -0.5), (0.46, -0.5), (0.5, -0.25), (0.47, 0.0), (0.24, 0.08), (0.1, 0.48),
                 (-0.22, 0.5), (-0.38, 0.1), (-0.49, 0.06)])  # fmt: skip


@functools.cache
def bodies() -> dict[str, list[Body]]:
    """All bodies by kind."""
    rng = np.random.default_rng(0xB0D1E5)
    wave = np.linspace(0, 1, 13)

    def cloth() -> Array:
        folds = np.sin(wave * rng.uniform(12, 34) + rng.uniform(0, 6))[:, None] * rng.uniform(0.3, 0.5)
        return folds * np.linspace(0.6, 1, 3)[None, :]

    def land(side: int = 20) -> Array:
        fx, fy = np.meshgrid(np.fft.fftfreq(side * 2), np.fft.fftfreq(side * 2))
        power = (np.hypot(fx, fy) + 0.02) ** -rng.uniform(1.6, 2.6)
        field = np.fft.ifft2(np.fft.fft2(rng.normal(size=(side * 2,) * 2)) * power).real[:side, :side]
        return 0.5 * (field - field.mean()) / np.abs(field - field.mean()).max()

    return {
        "box": [box()],
        "soft": [soft_box(cut) for cut in (0.12, 0.3, 0.55)],
        "rod": [revolve(np.array([(0, -0.5), (0.5, -0.5), (0.5, 0.5), (0, 0.5)]), 10)],
        "ball": [revolve(np.array(_ROUND))],
        "cone": [revolve(np.array([(0, -0.5), (0.5, -0.5), (r, 0.5), (0, 0.5)]), 14) for r in (0.02, 0.25, 0.38)],
        "shade": [revolve(np.array([(0.5, -0.5), (r, 0.5)]), 14) for r in (0.2, 0.3, 0.45)],
        "vase": [revolve(_profile(rng)) for _ in range(24)],
        "wheel": [revolve(np.array([(0, -0.5), (0.3, -0.5), (0.32, -0.4), (0.46, -0.5), (0.5, -0.3), (0.5, 0.3),
                                    (0.46, 0.5), (0.32, 0.4), (0.3, 0.5), (0, 0.5)]), 16)],  # fmt: skip
        "roof": [extrude(np.array([(-0.5, -0.5), (0.5, -0.5), (x, 0.5)])) for x in (0.0, -0.2, 0.4)],
        "shape": [extrude(_outline(rng)) for _ in range(24)],
        "car": [extrude(_CAR * (1, s) + (0, 0)) for s in (1.0, 0.92)],
        "stone": [stone(rng, rough) for rough in np.linspace(0.02, 0.28, 16)],
        "leaves": [leaves(rng, *how) for how in ((110, 0.05, 1), (160, 0.04, 1), (80, 0.08, 0.7), (140, 0.03, 0.8))],
        "blades": [leaves(rng, 50, 0.12, 0.6)],
        "cloth": [sheet(cloth()) for _ in range(8)],
        "land": [sheet(land()) for _ in range(12)],
    }  # fmt: skip


@functools.cache
def catalogue() -> tuple[tuple[Body, ...], dict[str, range]]:
    """The bodies in one row, and the numbers of each kind."""
    row: list[Body] = []
    kinds: dict[str, range] = {}
    for name, some in bodies().items():
        kinds[name] = range(len(row), len(row) + len(some))
        row += some
    return tuple(row), kinds


@functools.cache
def shared_corners(number: int) -> tuple[Array, Array]:
    """Of body ``number`` of the catalogue: the first corner (V,) at each vertex, counted through the triangles, and the
    vertices of each triangle int32 (F, 3)."""
    corners = catalogue()[0][number].corners.reshape(-1, 3)
    _, first, vertex = np.unique(corners, axis=0, return_index=True, return_inverse=True)
    return first, vertex.reshape(-1, 3).astype(np.int32)
