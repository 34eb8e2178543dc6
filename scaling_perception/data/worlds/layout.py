"""Where things stand in rooms, corridors, on table tops and in heaps, and the lights there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from scaling_perception.data.worlds import furniture
from scaling_perception.data.worlds.bank import colour
from scaling_perception.data.worlds.build import Draft, Light, World, turned

Array = np.ndarray
FLOORS = ("planks", "planks", "wood", "tiles", "tiles", "rough", "cloth", "speckle", "marble", "ornament")
WALLS = ("plaster", "plaster", "plaster", "plaster", "rough", "bricks", "tiles", "ornament", "cloth", "panel", "wood")


class Ground:
    """Which parts of the floor are taken: rectangles of centre and half sizes."""

    def __init__(self, half: Array) -> None:
        self.half = half
        self.taken: list[tuple[float, float, float, float]] = []

    def free(self, x: float, y: float, wide: float, deep: float, gap: float = 0.05) -> bool:
        if abs(x) + wide > self.half[0] + 0.02 or abs(y) + deep > self.half[1] + 0.02:
            return False
        return all(abs(x - a) > wide + c + gap or abs(y - b) > deep + d + gap for a, b, c, d in self.taken)

    def take(self, x: float, y: float, wide: float, deep: float) -> None:
        self.taken.append((x, y, wide, deep))


def clutter(world: World, draft: Draft, at: Array, yaw: float, many: float) -> None:
    """Small things on the tops of a placed draft."""
    rng, turn = world.rng, turned(yaw)
    for x, y, wide, deep, z in draft.tops:
        for _ in range(rng.poisson(many * min(wide * 3.0, 4))):
            small = furniture.trinket(world, min(0.35, max(wide, 0.1), max(deep, 0.1)) * rng.uniform(0.5, 1))
            if rng.random() < 0.06 and wide > 0.6:
                small = furniture.appliance(world) if rng.random() < 0.5 else furniture.lamp(world)
                if small.extent()[2] > 0.9:
                    continue
            spot = np.array([x + rng.uniform(-0.5, 0.5) * wide, y + rng.uniform(-0.5, 0.5) * deep, z])
            way = yaw + rng.normal(0, 0.5) + rng.choice([0, 0, 1.57, 3.14])
            if "clutter" not in world.without:
                world.put(small, at + turn @ spot, way)


def _wall(world: World, half: Array, high: float, side: int, skin: int, trim: int, sunny: list[Light]) -> None:
    """One wall with openings; ``side`` 0 to 3 is +y, -x, -y, +x."""
    rng = world.rng
    long, away = (half[0], half[1]) if side % 2 == 0 else (half[1], half[0])
    yaw = side * np.pi / 2
    wall = Draft(world, "wall")
    holes: list[tuple[float, float, float, float]] = []
    if rng.random() < 0.55:
        count = int(rng.integers(1, 3)) if long > 1.5 else 1
        low = rng.choice([0.05, rng.uniform(0.6, 1.1)])
        top = min(high - 0.15, rng.uniform(1.9, 2.4))
        for i in range(count):
            wide = min(rng.uniform(0.6, 2.2), 2 * long / count - 0.3)
            x = (i + 0.5) * 2 * long / count - long + rng.normal(0, 0.1)
            if wide > 0.4:
                holes.append((x, wide, low, top))
    edges = [-long]
    for x, wide, low, top in holes:  # a wall in pieces around its windows
        left, right = x - wide / 2, x + wide / 2
        wall.part("box", ((edges[-1] + left) / 2, away + 0.1, high / 2), (max(left - edges[-1], 0.01), 0.2, high), skin)
        wall.part("box", (x, away + 0.1, low / 2), (wide, 0.2, max(low, 0.01)), skin)
        wall.part("box", (x, away + 0.1, (high + top) / 2), (wide, 0.2, high - top), skin)
        edges.append(right)
        _window(world, wall, x, wide, low, top, away, trim, yaw, sunny)
    wall.part("box", ((edges[-1] + long) / 2, away + 0.1, high / 2), (max(long - edges[-1], 0.01), 0.2, high), skin)
    if rng.random() < 0.8:
        wall.part("box", (0, away - 0.01, 0.05), (2 * long, 0.02, rng.uniform(0.06, 0.14)), trim)
    if rng.random() < 0.2:
        wall.part("box", (0, away - 0.03, high - 0.05), (2 * long, 0.06, 0.1), trim)
    if not holes or rng.random() < 0.3:
        x = rng.uniform(-0.7, 0.7) * long
        if all(abs(x - a) > b / 2 + 0.55 for a, b, _, _ in holes):
            door = world.material("panel", "wood", "plaster", size=(0.9, 2.0), fit=True)
            wall.part("box", (x, away - 0.01, 1.0), (0.86, 0.04, 2.0), door)
            for dx in (-0.47, 0.47):
                wall.part("box", (x + dx, away - 0.02, 1.02), (0.08, 0.06, 2.04), trim)
            wall.part("box", (x, away - 0.02, 2.06), (1.02, 0.06, 0.08), trim)
            wall.part("ball", (x + 0.36, away - 0.06, 1.0), (0.06, 0.06, 0.06), trim)
            holes.append((x, 0.9, 0, 2.0))
    world.put(wall, (0, 0, 0), yaw, solid=False)
    for _ in range(rng.poisson(1.3)):
        wide, tall = rng.uniform(0.2, 1.2), rng.uniform(0.2, 0.9)
        x, z = rng.uniform(-0.85, 0.85) * long, rng.uniform(1.2, 1.9)
        if any(abs(x - a) < (b + wide) / 2 + 0.05 for a, b, _, _ in holes) or z + tall / 2 > high:
            continue
        holes.append((x, wide, 0, 0))
        _hang(world, x, wide, z, tall, away, yaw)


def _window(
    world: World,
    wall: Draft,
    x: float,
    wide: float,
    low: float,
    top: float,
    away: float,
    trim: int,
    yaw: float,
    lights: list[Light],
) -> None:
    rng, tall = world.rng, top - low
    glow = np.array([0.9, 0.97, 1.0]) * rng.uniform(1.5, 7)
    if rng.random() < 0.15:  # at night
        glow *= 0.01
    view = world.material(
        "foliage",
        "facade",
        "poster",
        "plaster",
        "rough",
        size=(wide * 1.2, tall * 1.2),
        fit=True,
        glow=glow * rng.uniform(0.3, 0.8),
        pane=True,
    )
    wall.part("box", (x, away + 0.14, (low + top) / 2), (wide, 0.01, tall), view)
    bar = rng.uniform(0.03, 0.07)
    for dx in np.linspace(-0.5, 0.5, rng.integers(2, 5)):
        wall.part("box", (x + dx * wide, away + 0.1, (low + top) / 2), (bar, 0.05, tall), trim)
    for z in np.linspace(low, top, rng.integers(2, 4)):
        wall.part("box", (x, away + 0.1, z), (wide, 0.05, bar), trim)
    if low > 0.3:
        wall.part("box", (x, away - 0.04, low - 0.02), (wide + 0.1, 0.16, 0.04), trim)
    if rng.random() < 0.5:
        cloth = world.material("cloth", "ornament", "plaster", size=0.6)
        span = rng.uniform(0.15, 0.45) * wide
        for side in (-1, 1):
            drape = Draft(world, "curtain")
            drape.part(
                "cloth",
                (x + side * (wide - span * 0.6) / 2, away - 0.1, (top + 0.1) / 2),
                (span, top + 0.1, 0.12),
                cloth,
                turned(0, np.pi / 2),
            )
            world.put(drape, (0, 0, 0), yaw, moves=False)
    turn = turned(yaw)
    edges = np.stack([turn @ (wide, 0, 0), turn @ (0, 0, tall)])
    lights.append(Light(turn @ (x, away + 0.02, (low + top) / 2), glow * 0.8, edges, turn @ (0, -1.0, 0), 0))


def _hang(world: World, x: float, wide: float, z: float, tall: float, away: float, yaw: float) -> None:
    """A picture, a clock, a board with things on it, or a wall cupboard."""
    rng = world.rng
    kind = rng.random()
    draft = Draft(world, "picture")
    if kind < 0.6:
        face = world.material(
            "poster", "poster", "leaves", "ornament", size=(wide, tall), fit=True, gloss=rng.choice([0, 0.3])
        )
        draft.part("box", (x, away - 0.012, z), (wide, 0.02, tall), face)
        if rng.random() < 0.7:
            frame, bar = world.material("wood", "plaster"), rng.uniform(0.015, 0.06)
            for side in (-1, 1):
                draft.part("box", (x + side * wide / 2, away - 0.02, z), (bar, 0.04, tall + bar), frame)
                draft.part("box", (x, away - 0.02, z + side * tall / 2), (wide, 0.04, bar), frame)
    elif kind < 0.8:
        draft.label = "shelf"
        deep = rng.uniform(0.15, 0.3)
        draft.part("box", (x, away - deep / 2, z), (wide, deep, 0.03), world.material("wood", "plaster"))
        draft.tops.append((x, away - deep / 2, wide * 0.9, deep * 0.5, z + 0.015))
        clutter(world, draft, np.zeros(3), yaw, 1.5)
    elif kind < 0.92:
        draft.label = "cabinet"
        draft.part("box", (x, away - 0.16, z), (wide, 0.32, tall), world.material("panel", size=(wide, tall), fit=True))
    else:
        draft.label = "sign"
        draft.part(
            "rod",
            (x, away - 0.02, z),
            (tall, tall, 0.04),
            world.material("ornament", "poster", size=tall, fit=True),
            turned(0, np.pi / 2),
        )
    world.put(draft, (0, 0, 0), yaw, moves=False)


def room(world: World, half: Array | None = None, furnished: float = 1.0) -> Array:
    """A furnished room; returns half its width and depth, and its height."""
    rng = world.rng
    if half is None:
        half = rng.uniform(1.2, 3.6, 2)
    high = rng.uniform(2.2, 3.3)
    floor = world.material(
        *FLOORS, size=rng.uniform(0.6, 1.6), vivid=0.6, gloss=rng.choice([0, 0, rng.uniform(0.2, 1)])
    )
    skin = [world.material(*WALLS, size=rng.uniform(0.6, 2.0), vivid=rng.choice([0.2, 0.5, 0.9]))] * 4
    if rng.random() < 0.3:
        skin[int(rng.integers(4))] = world.material(*WALLS, size=1.0, vivid=0.6)
    trim = world.material("plaster", "wood", size=0.8)
    lid = world.material("plaster", "plaster", "plaster", "tiles", "planks", size=1.2, tint=0.08, vivid=0.25)
    shell = Draft(world, "room")
    shell.part("box", (0, 0, -0.1), (2 * half[0] + 0.4, 2 * half[1] + 0.4, 0.2), floor)
    shell.part("box", (0, 0, high + 0.1), (2 * half[0] + 0.4, 2 * half[1] + 0.4, 0.2), lid)
    if rng.random() < 0.2:
        for x in np.linspace(-half[0], half[0], rng.integers(3, 7)):
            shell.part("box", (x, 0, high - 0.08), (0.14, 2 * half[1], 0.16), trim)
    world.put(shell, (0, 0, 0), solid=False)
    lights: list[Light] = []
    for side in range(4):
        _wall(world, half, high, side, skin[side], trim, lights)
    _lamps(world, half, high, lights)
    _furnish(world, half, furnished)
    return np.array([*half, high])


def _lamps(world: World, half: Array, high: float, lights: list[Light]) -> None:
    """Ceiling lamps, the brightest windows, perhaps the sun, and the even light that all of them leave."""
    rng = world.rng
    warm = np.array([1.0, rng.uniform(0.75, 1.0), rng.uniform(0.5, 1.0)])
    day = sum(float(light.colour.mean()) for light in lights) > 0.5
    rows = int(rng.integers(1, 3)) if not day or rng.random() < 0.5 else 0
    for i in range(rows):
        at = np.array([rng.uniform(-0.5, 0.5) * half[0], ((i + 0.5) / rows * 2 - 1) * half[1] * 0.7, high])
        power = warm * rng.uniform(6, 25)
        lamp = Draft(world, "lamp")
        style = rng.random()
        drop = rng.uniform(0.2, 0.9) if style < 0.5 else 0.03
        skin = world.material("plaster", glow=warm * rng.uniform(1, 4))
        wide = rng.uniform(0.2, 0.6)
        if style < 0.5:
            lamp.part("rod", (0, 0, -drop / 2), (0.015, 0.015, drop), world.material("plaster", dark=0.2))
            lamp.part("shade" if rng.random() < 0.5 else "ball", (0, 0, -drop - 0.1), (wide, wide, wide * 0.6), skin)
        else:
            lamp.part("box", (0, 0, -0.02), (wide, wide * rng.uniform(1, 3), 0.04), skin)
        world.put(lamp, at, moves=False)
        lights.append(
            Light(
                at - (0, 0, drop + 0.15),
                power,
                np.array([[0.35, 0, 0], [0, 0.35, 0]]),
                np.array([0, 0, -1.0]) if style >= 0.5 else None,
                0,
            )
        )
    lights.sort(key=lambda light: -float(light.colour.mean()))
    world.lights = lights[:4]
    level = 0.0
    for light in world.lights:
        edges = np.asarray(light.edges)
        area = float(np.linalg.norm(np.cross(edges[0], edges[1]))) if light.normal is not None else 0.06
        level += float(light.colour.mean()) * area
    level = max(level, 0.3) / (half[0] * half[1] * 4 + high * 4 * half.sum()) * rng.uniform(1.0, 3.5)
    world.ambient = warm * level
    if day and rng.random() < 0.4:
        tilt, around = rng.uniform(0.25, 1.0), rng.uniform(0, 2 * np.pi)
        way = np.array([np.cos(around) * np.cos(tilt), np.sin(around) * np.cos(tilt), np.sin(tilt)])
        world.lights.append(
            Light(way, np.array([1.0, 0.92, 0.8]) * rng.uniform(1, 6) * max(level * 4, 0.5), None, None, 0.006)
        )


def _furnish(world: World, half: Array, furnished: float) -> None:
    rng = world.rng
    ground = Ground(half)
    many = rng.uniform(0.3, 1.6)
    area = 4 * half[0] * half[1]
    for _ in range(rng.poisson(furnished * (2 + 0.7 * half.sum()))):  # along the walls
        draft = furniture.STANDING[rng.integers(len(furniture.STANDING))](world)
        extent, side = draft.extent(), int(rng.integers(4))
        yaw = side * np.pi / 2
        long, away = (half[0], half[1]) if side % 2 == 0 else (half[1], half[0])
        for _ in range(5):
            spot = turned(yaw) @ ((rng.uniform(-1, 1) * max(long - extent[0], 0)), away - extent[1] - 0.03, 0)
            wide, deep = (extent[0], extent[1]) if side % 2 == 0 else (extent[1], extent[0])
            if ground.free(spot[0], spot[1], wide, deep):
                ground.take(spot[0], spot[1], wide, deep)
                world.put(draft, spot, yaw, moves=rng.random() < 0.3)
                clutter(world, draft, spot, yaw, many)
                break
    if rng.random() < 0.5:
        world.put(furniture.rug(world), (rng.normal(0, 0.4), rng.normal(0, 0.4), 0), rng.normal(0, 0.3), moves=False)
    for _ in range(rng.poisson(furnished * area * 0.16 + 0.5)):  # in the open
        draft = furniture.FREE[rng.integers(len(furniture.FREE))](world)
        extent = draft.extent()
        reach = float(np.hypot(*extent[:2]))
        for _ in range(4):
            x, y = rng.uniform(-1, 1, 2) * np.maximum(half - extent[:2], 0)
            if ground.free(x, y, reach * 0.8, reach * 0.8, 0.0):
                yaw = (
                    rng.uniform(0, 2 * np.pi)
                    if rng.random() < 0.4
                    else rng.integers(4) * np.pi / 2 + rng.normal(0, 0.1)
                )
                ground.take(x, y, reach * 0.8, reach * 0.8)
                world.put(draft, (x, y, 0), float(yaw))
                clutter(world, draft, np.array([x, y, 0]), float(yaw), many)
                if draft.label == "table" and rng.random() < 0.7:
                    _seats(world, x, y, extent, float(yaw))
                break
    for _ in range(rng.poisson(many * area * 0.15)):  # left on the floor
        small = furniture.trinket(world, rng.uniform(0.15, 0.6))
        x, y = rng.uniform(-0.95, 0.95, 2) * half
        wide, deep, _ = small.extent()
        if ground.free(x, y, wide, deep, 0.0):
            world.put(small, (x, y, 0.02), rng.uniform(0, 6.3))


def _seats(world: World, x: float, y: float, extent: Array, yaw: float) -> None:
    rng, turn = world.rng, turned(yaw)
    style = world.rng.bit_generator.state
    for side in (0, 1, 2, 3):
        if rng.random() < 0.35:
            continue
        reach = (extent[1] if side % 2 == 0 else extent[0]) + rng.uniform(-0.1, 0.3)
        around = yaw + side * np.pi / 2
        spot = np.array([x, y, 0]) + turned(around) @ (rng.normal(0, 0.1), reach, 0)
        world.put(furniture.chair(world), spot, around + rng.normal(0, 0.25))
    del turn, style


def corridor(world: World) -> Array:
    """Long and narrow."""
    rng = world.rng
    half = np.array([rng.uniform(0.7, 1.4), rng.uniform(3.5, 10)])
    return room(world, half, furnished=0.45)


def heap(world: World) -> Array:
    """A room full of things that lie and float at every angle."""
    rng = world.rng
    size = room(world, furnished=rng.uniform(0, 0.5))
    makers: tuple[Callable[..., Any], ...] = (*furniture.FREE, furniture.trinket, furniture.lamp, furniture.appliance)
    for _ in range(rng.integers(8, 28)):
        draft = makers[rng.integers(len(makers))](world)
        at = rng.uniform(-0.9, 0.9, 3) * (size[0], size[1], size[2] / 2) + (0, 0, size[2] / 2)
        turn = turned(*rng.uniform(-3, 3, 3)) if rng.random() < 0.6 else turned(rng.uniform(0, 6.3))
        world.put(draft, at, turn)
    return size


def table_top(world: World) -> tuple[Array, Array]:
    """A room whose cluttered table is what the camera looks at; returns its size and the middle of the table top."""
    rng = world.rng
    size = room(world, rng.uniform(1.5, 3.0, 2), furnished=0.7)
    draft = furniture.table(world)
    at = np.array([rng.normal(0, 0.2), rng.normal(0, 0.2), 0])
    yaw = rng.uniform(0, 6.3)
    world.put(draft, at, yaw)
    clutter(world, draft, at, yaw, rng.uniform(2, 5))
    return size, at + (0, 0, draft.tops[-1][4])


def pattern(world: World) -> int:
    """A material with marks everywhere, for the picture behind flying things."""
    names = ("leaves", "leaves", "poster", "facade", "foliage", "rough", "bricks", "ornament", "panel", "speckle")
    return world.material(*names, size=world.rng.uniform(3, 14))


def vista(world: World, wide: float) -> int:
    """A material most of which is empty, drawn once across ``wide`` metres or little more."""
    wide = wide * world.rng.uniform(1.0, 1.6)
    number = world.material("vista", size=wide, fit=True)
    world.materials[number] = world.materials[number]._replace(stained=0.0)
    return number


def wallpaper(world: World, skin: int, far: float) -> None:
    """A flat picture at ``far`` metres, things in the air before it (as in FlyingChairs)."""
    rng = world.rng
    back = Draft(world, "wall")
    back.part("box", (0, far, 0), (8 * far, 0.1, 8 * far), skin)
    world.put(back, (0, 0, 0), moves=True)
    makers: tuple[Callable[..., Any], ...] = (
        *furniture.FREE,
        furniture.trinket,
        furniture.lamp,
        furniture.shelf,
        furniture.plant,
    )
    for _ in range(rng.integers(3, 22)):
        draft = makers[rng.integers(len(makers))](world)
        size = float(draft.extent().max())
        depth = rng.uniform(1.5, 9)
        # apparent size like that of FlyingChairs' chairs, from a twentieth of the picture to a half
        scale = depth * np.exp(rng.uniform(np.log(0.06), np.log(0.45))) / max(size, 0.05)
        draft.parts = [
            p._replace(centre=tuple(scale * c for c in p.centre), size=tuple(scale * s for s in p.size))
            for p in draft.parts
        ]
        at = np.array([rng.uniform(-0.6, 0.6) * depth, depth, rng.uniform(-0.6, 0.6) * depth])
        turn = (
            turned(rng.uniform(0, 6.3), rng.normal(0, 0.5), rng.normal(0, 0.5))
            if rng.random() < 0.5
            else turned(rng.uniform(0, 6.3), -0.3)
        )
        world.put(draft, at, turn)
    world.indoor = False
    tone = colour(rng, 0.5, 1.0, 0.5) ** 2
    world.sky = np.stack([tone, tone, tone * 0.6])
    world.ambient = tone * 0.6
    way = np.array([rng.normal(0, 0.7), -1, rng.uniform(-0.2, 1.5)])
    world.lights.append(Light(way / np.linalg.norm(way), np.ones(3) * rng.uniform(0, 1.5), None, None, 0.03))
