"""Light on surfaces: suns and bright rectangles with soft shadows, the sky, and one bounce."""

from __future__ import annotations

import functools

import numpy as np

from scaling_perception.data.worlds.build import World, dot, norm, rows
from scaling_perception.data.worlds.trace import Tracer

Array = np.ndarray
_USUAL = 0.4
"""Of even light indoors, what a surface receives from others in the mean."""
_GRAY = np.array([0.3, 0.5, 0.2], np.float32)


def dither(x: Array, y: Array, number: int) -> Array:
    """Numbers (N, number) in [0, 1) that cover the unit interval evenly within each neighbourhood of pixels."""
    base = x * 0.7548776662 + y * 0.5698402910
    steps = np.arange(1, number + 1) * 0.6180339887 * (1 + 0.37 * np.arange(number))
    return np.stack([((base + step) % 1).astype(np.float32) for step in steps]).T


@functools.lru_cache(2)
def dither_square(size: int) -> Array:
    """Five such numbers for each pixel of a square (size², 5), row by row."""
    line = np.arange(size, dtype=np.float32)
    x, y = np.meshgrid(line, line)
    return dither(x.reshape(-1), y.reshape(-1), 5)


def sky(world: World, ways: Array, disc: bool = False) -> Array:
    """Colours (N, 3) of the sky along directions (N, 3); ``disc`` with clouds and the sun itself."""
    length = norm(ways)
    up = ways[:, 2] / length
    zenith, horizon, below = (np.asarray(row, np.float32) for row in world.sky)
    rise = np.clip(up, 0, 1)[:, None] ** 0.5
    out = horizon + (zenith - horizon) * rise
    out = np.where((up < 0)[:, None], below + (horizon - below) * np.exp(np.minimum(up, 0) * 12)[:, None], out)
    if disc:
        if world.clouds >= 0:
            scale = 0.35 / np.maximum(up + 0.08, 0.03)
            flat = ways[:, :2] / length[:, None] * scale[:, None]
            veil = world.bank.sample(np.full(len(ways), world.clouds), flat[:, 0], flat[:, 1], np.zeros(len(ways)))
            veil = (veil @ _GRAY)[:, None]
            veil = np.clip(veil / world.bank.mean[world.clouds].mean() - 0.7, 0, 1) * np.clip(up * 6, 0, 1)[:, None]
            out = out + (np.float32(1.1) * horizon.max() - out) * np.minimum(veil * 1.2, 0.9)
        for light in world.lights:
            if light.edges is None:
                near = ways @ light.place.astype(np.float32) / length
                out = out + light.colour * (0.25 * np.maximum(near, 0) ** 60 + 2.0 * (near > 0.9995))[:, None]
    return out.astype(np.float32)


def irradiance(
    world: World,
    tracer: Tracer,
    mesh: dict[str, Array],
    table: dict[str, Array],
    points: Array,
    normals: Array,
    chance: Array,
) -> tuple[Array, Array]:
    """What falls on points (N, 3) of surfaces with normals (N, 3).

    Args:
        chance: (N, 5) in [0, 1).

    Returns:
        sharp, soft: (N, 3) of the suns, and of all else by one ray for the rectangles and one for the surroundings.
    """
    sharp, soft = (np.zeros(points.shape, np.float32) for _ in range(2))
    lifted = points + normals * np.float32(2e-3)
    clear = table["pane"] | (table["glow"].max(axis=1) > 0)

    def free(where: Array, ways: Array, length: float) -> Array:
        if "shadows" in world.without:
            return np.ones(len(where), bool)
        hits = tracer.cast(rows(lifted, where), ways)
        material = mesh["material"][np.maximum(hits.face, 0)]
        return (hits.face < 0) | (hits.far > length) | clear[material]

    areas = [light for light in world.lights if light.edges is not None]
    for light in world.lights:
        if light.edges is None:
            way = light.place.astype(np.float32) + light.spread * (chance[:, :3] - 0.5) * 2
            cosine = np.maximum(dot(normals, way), 0)
            where = np.flatnonzero(cosine > 0)
            cosine[where] *= free(where, way[where], np.inf)
            sharp += cosine[:, None] * light.colour.astype(np.float32)
    if areas:
        ways, given, tones = [], [], []
        for light in areas:
            edges = np.asarray(light.edges, np.float32)
            place, u, v = light.place.astype(np.float32), chance[:, 0] - 0.5, chance[:, 1] - 0.5
            at = np.stack([place[c] + u * edges[0, c] + v * edges[1, c] for c in range(3)]).T
            way = at - lifted
            square = np.maximum(dot(way, way), 0.04)
            facing = dot(normals, way)
            if light.normal is not None:
                facing = (
                    np.where(way @ light.normal.astype(np.float32) < 0, facing, 0)
                    * -(way @ light.normal.astype(np.float32))
                    / np.sqrt(square)
                )
                size = np.linalg.norm(np.cross(edges[0], edges[1]))
            else:
                size = np.float32(0.06)
            ways.append(way)
            given.append(np.maximum(facing, 0) / (square * np.sqrt(square)) * size)
            tones.append(light.colour.astype(np.float32))
        shine = np.stack(given, axis=1)
        strength = shine * [float(tone @ _GRAY) for tone in tones]
        total = strength.sum(axis=1)
        edge = np.cumsum(strength, axis=1)
        chosen = np.minimum((edge < chance[:, 2:3] * total[:, None]).sum(axis=1), len(areas) - 1)
        where = np.flatnonzero(total > 1e-5)
        way = np.zeros((len(where), 3), np.float32, order="F")
        for number, some in enumerate(ways):
            mine = np.flatnonzero(chosen[where] == number)
            way[mine] = rows(some, where[mine])
        seen = free(where, way, 0.98)
        soft[where] += (shine[where] @ np.stack(tones)) * seen[:, None]
    soft += _surroundings(world, tracer, mesh, table, lifted, normals, chance[:, 3:5])
    return sharp, soft


def _surroundings(
    world: World,
    tracer: Tracer,
    mesh: dict[str, Array],
    table: dict[str, Array],
    lifted: Array,
    normals: Array,
    chance: Array,
) -> Array:
    """One cosine-distributed ray: the sky, or the surface that it meets under even light."""
    height = 2 * chance[:, 0] - 1
    around = 2 * np.pi * chance[:, 1]
    wide = np.sqrt(np.maximum(1 - height * height, 0))
    ball = np.stack([wide * np.cos(around), wide * np.sin(around), height], axis=1).astype(np.float32)
    ways = normals + ball * np.float32(0.999)
    ways /= np.maximum(norm(ways)[:, None], 1e-6)
    out = sky(world, ways) if not world.indoor else np.zeros_like(ways)
    if "shadows" in world.without:
        return out if not world.indoor else out + np.float32(_USUAL) * world.ambient.astype(np.float32)
    hits = tracer.cast(lifted, ways)
    met = np.flatnonzero(hits.face >= 0)
    reach = np.float32(0.5 if world.indoor else 2.0)
    near = hits.far[met] / (hits.far[met] + reach)
    mean = table["mean"][mesh["material"][hits.face[met]]]
    out[met] = (0.25 + mean) * world.ambient.astype(np.float32) * (0.1 + 0.9 * near)[:, None]
    return out


def smooth(value: Array, points: Array, normals: Array, depth: Array, steps: tuple[int, ...]) -> Array:
    """Average (H, W, 3) over neighbours on the same plane, near ones first."""
    high, wide = depth.shape
    value, points, normals = (np.ascontiguousarray(a.transpose(2, 0, 1)) for a in (value, points, normals))
    for step in steps:
        padded = [np.pad(a, [(0, 0), (step, step), (step, step)], mode="edge") for a in (value, points, normals)]
        total, weight = value.copy(), np.ones((high, wide), np.float32)
        for dy in (-step, 0, step):
            for dx in (-step, 0, step):
                if not dx and not dy:
                    continue
                there = (slice(None), slice(step + dy, step + dy + high), slice(step + dx, step + dx + wide))
                other, at, way = (a[there] for a in padded)
                bend = dot(way.transpose(1, 2, 0), normals.transpose(1, 2, 0))
                off = np.abs(dot((at - points).transpose(1, 2, 0), normals.transpose(1, 2, 0))) / depth
                part = ((bend > 0.85) & (off < 0.01 * step)).astype(np.float32)
                total += part * other
                weight += part
        value = total / weight
    return value.transpose(1, 2, 0)
