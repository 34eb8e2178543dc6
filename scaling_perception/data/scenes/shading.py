"""Light and colour of the procedural scenes: textured Lambert surfaces, one light with shadows, fills, haze."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from scaling_perception.data.scenes import geometry as geometry_of
from scaling_perception.data.scenes.geometry import BALL, BOX, CYLINDER, Camera, Geometry
from scaling_perception.data.scenes.textures import SIZE, sample

Array = np.ndarray


class Material(NamedTuple):
    """Two colours (linear RGB) mixed by a pattern, times a finer pattern.

    tile, detail_tile: metres a repeat; angle: of the pattern on flat faces; shine: strength of the highlight.
    """

    pattern: int
    tile: float
    angle: float
    first: Array
    second: Array
    detail: int
    detail_tile: float
    detail_strength: float
    shine: float


class Light(NamedTuple):
    """At ``position`` (3,) metres, or, where ``sun``, in that direction from everywhere; ``colour`` linear RGB."""

    position: Array
    colour: Array
    sun: bool
    shadows: bool


class Look(NamedTuple):
    """What holds for the whole picture. ``haze`` per metre, ``corner`` darkening at edges of a room in metres."""

    sky: Array
    ground: Array
    haze: float
    haze_colour: Array
    corner: float
    vignette: float
    gain: Array
    noise: float
    gamma: float


class Tables(NamedTuple):
    """Materials as arrays (K,) and (K, 3)."""

    pattern: Array
    tile: Array
    cosine: Array
    sine: Array
    first: Array
    change: Array
    detail: Array
    detail_tile: Array
    detail_strength: Array
    shine: Array


def material_tables(materials: list[Material]) -> Tables:
    """Columns of a list of materials."""

    def column(values: list, kind: type = np.float32) -> Array:
        return np.array(values, kind)

    return Tables(
        column([m.pattern for m in materials], np.int32),
        column([m.tile for m in materials]),
        column([math.cos(m.angle) for m in materials]),
        column([math.sin(m.angle) for m in materials]),
        column([m.first for m in materials]).T.copy(),
        column([m.second - m.first for m in materials]).T.copy(),
        column([m.detail for m in materials], np.int32),
        column([m.detail_tile for m in materials]),
        column([m.detail_strength for m in materials]),
        column([m.shine for m in materials]),
    )


class Surface(NamedTuple):
    """Hits of N rays: ``points`` and unit ``normals`` (3, N) towards the eye, ``unit`` (3, N) in the solid's own unit
    coordinates, ``face`` (N,) numbers the smooth parts of a solid."""

    points: Array
    normals: Array
    unit: Array
    face: Array


def _column(table: Array, chosen: Array) -> Array:
    """Columns of a table (C, K), (C, N)."""
    return np.ascontiguousarray(table).take(chosen, axis=1)


def _dot(first: Array, second: Array) -> Array:
    """Products of columns: (3, N), (3, N) to (N,)."""
    product = first * second
    product[0] += product[1]
    product[0] += product[2]
    return product[0]


def surface(geometry: Geometry, camera: Camera, rays: Array, depth: Array, solid: Array) -> Surface:
    """What the rays (3, N) hit at ``depth`` (N,) on ``solid`` (N,)."""
    points = camera.eye[:, None] + rays * depth
    offset = points - _column(geometry.centre.T, solid)
    matrix = _column(geometry.matrix.reshape(-1, 9).T, solid)
    unit = np.stack([_dot(matrix[3 * i : 3 * i + 3], offset) for i in range(3)])
    kind = geometry.kind.take(solid)
    size = np.abs(unit)
    axis = (size[1] > size[0]).astype(np.int32)
    axis[size[2] >= np.maximum(size[0], size[1])] = 2
    radial = size[2] <= np.sqrt(unit[0] * unit[0] + unit[1] * unit[1])
    box = kind == BOX
    turned = np.stack([np.where(box, np.sign(unit[i]) * (axis == i), unit[i]) for i in range(3)])
    cylinder = kind == CYLINDER
    turned[:2] *= ~(cylinder & ~radial)
    turned[2] *= ~(cylinder & radial)
    normals = np.stack([_dot(matrix[i::3], turned) for i in range(3)])
    facing = np.einsum("ij,ij->j", normals, rays)
    normals *= -np.sign(facing) / np.sqrt(np.maximum(np.einsum("ij,ij->j", normals, normals), 1e-20))
    positive = np.choose(axis, unit > 0)
    face = np.where(box, 2 * axis + positive, np.where(cylinder & ~radial, np.int32(4), np.int32(6)))
    return Surface(points, normals, unit, face)


def _coordinates(
    geometry: Geometry, hits: Surface, solid: Array, tables: Tables, material: Array
) -> tuple[Array, Array, Array]:
    """Texture coordinates in metres (N,), (N,) and metres to add a turn so that patterns close around a solid."""
    half = _column(geometry.half.T, solid)
    local = hits.unit * half
    face = hits.face
    u = np.where(face < 2, local[1], local[0])
    v = np.where(face < 4, local[2], local[1])
    cosine, sine = tables.cosine[material], tables.sine[material]
    u, v = u * cosine - v * sine, u * sine + v * cosine
    round_ = np.flatnonzero(face == 6)
    if round_.size:
        x, y, z = hits.unit[:, round_]
        turn = np.arctan2(y, x) * np.float32(0.5 / np.pi)
        girth = np.float32(2 * np.pi) * np.maximum(half[0, round_], half[1, round_])
        ball = geometry.kind[solid[round_]] == BALL
        u[round_] = turn * girth
        v[round_] = np.where(ball, np.arcsin(np.clip(z, -1, 1)), z) * half[2, round_]
    else:
        girth = np.zeros(0, np.float32)
    around = np.zeros(len(u), np.float32)
    around[round_] = girth
    return u, v, around


def shade(
    geometry: Geometry,
    camera: Camera,
    tables: Tables,
    lights: list[Light],
    look: Look,
    rays: Array,
    depth: Array,
    solid: Array,
    hits: Surface,
    pixel: float,
    room: float | None,
) -> tuple[Array, Array]:
    """Linear colours (3, N) of the hits before exposure, and which of them (N,) the shadows reach.

    ``pixel``: width of one at unit depth; ``room``: half the height of the surroundings if they shade their corners.
    """
    material = geometry.material[solid] + np.where(solid == 0, hits.face, 0)
    normals, points = hits.normals, hits.points
    length = np.sqrt(np.einsum("ij,ij->j", rays, rays))
    facing = -np.einsum("ij,ij->j", normals, rays) / length
    u, v, around = _coordinates(geometry, hits, solid, tables, material)
    footprint = depth * np.float32(pixel) / np.sqrt(np.maximum(facing, 0.03))
    tone = _lookup(tables.pattern, tables.tile, material, u, v, around, footprint)
    fine = _lookup(tables.detail, tables.detail_tile, material, u, v, around, footprint)
    albedo = _column(tables.first, material) + _column(tables.change, material) * tone
    albedo *= 1 + tables.detail_strength[material] * (fine - np.float32(0.5))

    up = (normals[2] + 1) / 2
    ambient = look.ground[:, None] + (look.sky - look.ground)[:, None] * up
    if room is not None:
        ambient *= _corners(geometry, points, normals, look.corner)
    total = ambient
    shadow = np.zeros(depth.shape, bool)
    shine = np.zeros(depth.shape, np.float32)
    for light in lights:
        if light.sun:
            steps = np.broadcast_to(light.position[:, None] * np.float32(60), points.shape)
        else:
            steps = light.position[:, None] - points
        square = np.einsum("ij,ij->j", steps, steps)
        towards = np.einsum("ij,ij->j", steps, normals) / np.sqrt(square)
        strength = np.maximum(towards, 0)
        if not light.sun:
            strength = strength * np.float32(6) / (square + np.float32(2))
        if light.shadows:
            lift = np.float32(1e-3) * np.maximum(depth, 1)
            seen = np.flatnonzero(towards > 0)
            dark = np.zeros(depth.shape, bool)
            start = points.take(seen, axis=1) + normals.take(seen, axis=1) * lift.take(seen)
            dark[seen] = geometry_of.blocked(geometry, start, steps.take(seen, axis=1))
            strength[dark] = 0
            shadow |= dark
            half = steps / np.sqrt(square) - rays / length
            half_length = np.sqrt(np.maximum(np.einsum("ij,ij->j", half, half), 1e-9))
            glance = np.maximum(np.einsum("ij,ij->j", half, normals) / half_length, 0) ** 2
            glance = glance * glance * glance * glance
            shine = glance * glance * glance * (strength > 0) * tables.shine[material]
        total = total + light.colour[:, None] * strength
    colour = np.maximum(albedo, 0) * total + shine
    if look.haze > 0:
        clear = np.exp(np.float32(-look.haze) * depth * length)
        colour = look.haze_colour[:, None] + (colour - look.haze_colour[:, None]) * clear
    return colour.astype(np.float32), shadow


def _lookup(
    patterns: Array, tiles: Array, material: Array, u: Array, v: Array, around: Array, footprint: Array
) -> Array:
    tile = tiles[material]
    turns = np.where(around > 0, np.maximum(np.rint(around / tile), 1) / np.maximum(around, 1e-6), 1 / tile)
    level = np.log2(np.maximum(footprint / tile * SIZE, 1e-3))
    return sample(patterns[material], (u * turns).astype(np.float32), (v / tile).astype(np.float32), level)


def _corners(geometry: Geometry, points: Array, normals: Array, reach: float) -> Array:
    """Less ambient light near the edges of the room: (N,), 1 far from them."""
    shade_ = np.ones(points.shape[1], np.float32)
    for axis in range(3):
        gap = geometry.half[0, axis] - np.abs(points[axis] - geometry.centre[0, axis])
        across = 1 - np.abs(normals[axis])
        shade_ *= 1 - np.float32(0.45) * across * np.exp(np.maximum(gap, 0) / np.float32(-reach))
    return shade_


def develop(colour: Array, look: Look, gain: float, x: Array, y: Array, resolution: int) -> Array:
    """Linear colours (3, N) at pixels ``x``, ``y`` to display values in [0, 1]: vignette, exposure, shoulder, gamma."""
    middle = np.float32((resolution - 1) / 2)
    away = ((x - middle) ** 2 + (y - middle) ** 2) / np.float32(resolution * resolution)
    value = colour * (look.gain[:, None] * np.float32(gain)) * (1 - np.float32(look.vignette) * away)
    value = np.maximum(value, 0)
    value = np.where(value < 0.6, value, 1 - np.float32(0.4) * np.exp(-(value - np.float32(0.6)) / np.float32(0.4)))
    return value ** np.float32(look.gamma)
