"""Random materials, furniture and single solids of the procedural scenes."""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np

from scaling_perception.data.scenes.geometry import BALL, BOX, CYLINDER, Solid, rotation_about
from scaling_perception.data.scenes.shading import Material
from scaling_perception.data.scenes.textures import pattern_bank

Array = np.ndarray

CLASSES = (
    "box", "ball", "cylinder", "table", "chair", "shelf", "cabinet", "sofa", "lamp", "bed", "stool", "tree", "house",
    "snowman", "arch",
)  # fmt: skip
"""What ``label`` counts."""

_CALM = ("noise soft", "noise middle", "noise smooth", "noise rough", "noise fine", "noise streaks", "gradient")
_FINE = (*_CALM[:4], "noise fine", "weave")
_FLOORS = ("planks", "wood", "tiles", "tiles mixed", "noise middle", "noise fine", "checker", "marble", "pebbles",
           "weave", "collage", "bricks", "cells")  # fmt: skip
_WALLS = ("noise soft", "noise middle", "noise smooth", "stripes soft", "bricks", "blocks", "tiles", "panels",
          "gradient", "writing", "windows", "stripes uneven", "collage")  # fmt: skip
_GROUND = ("noise rough", "noise fine", "leaves", "pebbles", "islands", "blotches", "noise middle", "cracks", "tiles")
_WOODEN = ("wood", "planks", "noise streaks", "noise middle", "panels")


class Palette:
    """Collects materials; every method returns the number of a new one."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.materials: list[Material] = []
        self.names = pattern_bank().names
        self.brightness = rng.uniform(0.8, 1.1)

    def colour(self, low: float = 0.08, high: float = 0.75, vivid: float = 1.0) -> Array:
        """Linear RGB (3,), mostly muted."""
        rng = self.rng
        saturation = vivid * (rng.beta(1.4, 2.8) if rng.random() < 0.62 else rng.uniform(0.4, 0.95))
        value = np.exp(rng.uniform(np.log(low), np.log(high)))
        hue = rng.choice([0.08, 0.1, 0.6, 0.3, 0.0]) + rng.normal(0, 0.04) if rng.random() < 0.5 else rng.random()
        return np.array(colorsys.hsv_to_rgb(hue % 1, min(saturation, 0.97), value), np.float32)

    def add(
        self,
        names: tuple[str, ...] = (),
        calm: float = 0.5,
        size: float = 1.0,
        colour: Array | None = None,
        vivid: float = 1.0,
    ) -> int:
        """A material of one of ``names`` (else any), calm with that chance, its repeat about ``size`` metres."""
        rng = self.rng
        first = self.colour(vivid=vivid) if colour is None else colour
        quiet = rng.random() < calm
        pool = _CALM if quiet and rng.random() < 0.7 else names or self.names
        change = rng.choice([-1, 1]) * rng.uniform(0.03, 0.3) if quiet else rng.choice([-1, 1]) * rng.uniform(0.3, 0.9)
        second = first * np.exp(change * 1.6)
        if not quiet and rng.random() < 0.45:
            second = self.colour(vivid=vivid)
        second = np.minimum(second * np.exp(rng.normal(0, 0.08, 3)), 0.8)
        straight = rng.random() < 0.8
        self.materials.append(
            Material(
                self.names.index(pool[rng.integers(len(pool))]),
                size * np.exp(rng.normal(0, 0.45)),
                rng.choice([0, np.pi / 2]) if straight else rng.uniform(0, np.pi),
                np.minimum(first, 0.8).astype(np.float32),
                second.astype(np.float32),
                self.names.index(_FINE[rng.integers(len(_FINE))]),
                size * np.exp(rng.normal(-0.3, 0.5)),
                rng.uniform(0.02, 0.35) if rng.random() < 0.8 else rng.uniform(0.3, 0.8),
                rng.uniform(0.1, 0.6) if rng.random() < 0.3 else rng.uniform(0, 0.06),
            )
        )
        return len(self.materials) - 1

    def surroundings(self, indoor: bool) -> int:
        """Six materials in the order of a box's faces (-x, +x, -y, +y, floor, ceiling); the number of the first."""
        rng = self.rng
        first = len(self.materials)
        if indoor:
            wall = self.colour(0.25, 0.75, 0.6)
            names = (str(rng.choice(_WALLS)),)
            calm = rng.choice([1.0, 1.0, 0.0])
            for _ in range(4):
                own = self.colour(0.15, 0.75, 0.9) if rng.random() < 0.12 else wall
                self.add(names, calm, rng.uniform(1, 3), own)
            self.add(_FLOORS, 0.3, rng.uniform(0.8, 2.5), self.colour(0.1, 0.6, 0.9))
            self.add(("noise soft", "tiles", "noise fine"), 0.9, 2, self.colour(0.45, 0.8, 0.3))
        else:
            wall = self.colour(0.3, 0.8, 0.7)
            if rng.random() < 0.5:
                wall = np.array(colorsys.hsv_to_rgb(rng.uniform(0.53, 0.63), rng.uniform(0.1, 0.5), 0.8), np.float32)
            for _ in range(4):
                self.add(("noise soft", "noise smooth", "gradient", "windows", "blocks"), 0.8, 12, wall)
            self.add(_GROUND, 0.3, rng.uniform(1.5, 5), self.colour(0.1, 0.5, 1.0))
            self.add(("noise smooth", "noise soft"), 0.9, 15, wall)
        return first


Made = tuple[str, list[Solid]]
"""A class and solids standing on z = 0 about the origin, their front towards -y."""


def _box(material: int, x: float, y: float, z: float, hx: float, hy: float, hz: float) -> Solid:
    return Solid(BOX, (x, y, z), (hx, hy, hz), material)


def _single(rng: np.random.Generator, palette: Palette) -> Made:
    """One solid of about 0.2 to 1 metre."""
    kind = int(rng.integers(3))
    half = np.exp(rng.uniform(np.log(0.12), np.log(0.45), 3))
    if kind != BOX:
        half[1] = half[0]
    if kind == BALL and rng.random() < 0.5:
        half[:] = half[0]
    material = palette.add(calm=0.4, size=rng.uniform(0.4, 1.5))
    return CLASSES[kind], [Solid(kind, (0, 0, half[2]), tuple(half), material)]


def _table(rng: np.random.Generator, palette: Palette) -> Made:
    x, y, h = rng.uniform(0.35, 0.9), rng.uniform(0.3, 0.5), rng.uniform(0.4, 0.8)
    wood = palette.add(_WOODEN, 0.5, 0.8)
    solids = [_box(wood, 0, 0, h, x, y, rng.uniform(0.02, 0.04))]
    leg = rng.uniform(0.02, 0.045)
    kind = CYLINDER if rng.random() < 0.4 else BOX
    if rng.random() < 0.2:
        solids.append(Solid(CYLINDER, (0, 0, h / 2), (leg * 1.6, leg * 1.6, h / 2), wood))
        solids.append(Solid(CYLINDER, (0, 0, 0.02), (y * 0.6, y * 0.6, 0.02), wood))
    else:
        ends = [(a, b) for a in (-1, 1) for b in (-1, 1)]
        solids += [Solid(kind, (a * (x - 0.06), b * (y - 0.06), h / 2), (leg, leg, h / 2), wood) for a, b in ends]
    return "table", solids


def _seat(rng: np.random.Generator, palette: Palette, back: bool) -> Made:
    w, h = rng.uniform(0.19, 0.26), rng.uniform(0.38, 0.5)
    wood = palette.add(_WOODEN, 0.6, 0.6)
    cloth = palette.add(("weave", "stripes"), 0.6, 0.5) if rng.random() < 0.5 else wood
    leg = rng.uniform(0.015, 0.03)
    solids = [_box(cloth, 0, 0, h, w, w, 0.03)]
    ends = [(a, b) for a in (-1, 1) for b in (-1, 1)]
    solids += [_box(wood, a * (w - 0.03), b * (w - 0.03), h / 2, leg, leg, h / 2) for a, b in ends]
    if back:
        rise = rng.uniform(0.18, 0.3)
        solids.append(_box(cloth, 0, w - 0.02, h + rise, w, 0.02, rise))
    return ("chair" if back else "stool"), solids


def _shelf(rng: np.random.Generator, palette: Palette) -> Made:
    x, y, h = rng.uniform(0.35, 0.7), rng.uniform(0.13, 0.22), rng.uniform(0.8, 2.0)
    wood = palette.add(_WOODEN, 0.6, 1.0)
    books = palette.add(("books", "stripes uneven", "collage"), 0.1, 0.9)
    solids = [
        _box(wood, -x, 0, h / 2, 0.02, y, h / 2),
        _box(wood, x, 0, h / 2, 0.02, y, h / 2),
        _box(wood, 0, y - 0.01, h / 2, x, 0.01, h / 2),
    ]
    rows = int(rng.integers(2, 5))
    for row in range(rows + 1):
        z = 0.03 + (h - 0.06) * row / rows
        solids.append(_box(wood, 0, 0, z, x, y, 0.015))
        if row < rows and rng.random() < 0.75:
            fill, tall = rng.uniform(0.25, 0.95), (h / rows) * rng.uniform(0.25, 0.42)
            solids.append(_box(books, -x * (1 - fill), 0.03, z + tall, x * fill - 0.03, y * 0.7, tall))
    return "shelf", solids


def _cabinet(rng: np.random.Generator, palette: Palette) -> Made:
    x, y, h = rng.uniform(0.3, 0.8), rng.uniform(0.2, 0.35), rng.uniform(0.5, 2.1)
    body = palette.add(_WOODEN, 0.7, 1.0)
    door = palette.add(("panels", *_WOODEN), 0.5, 1.0) if rng.random() < 0.4 else body
    solids = [_box(body, 0, 0, h / 2, x, y, h / 2)]
    count = int(rng.integers(1, 4))
    for number in range(count):
        wide = x / count
        middle = -x + wide * (2 * number + 1)
        solids.append(_box(door, middle, -y, h / 2, wide - 0.02, 0.015, h / 2 - 0.05))
        solids.append(_box(body, middle + wide * 0.6, -y - 0.03, h / 2, 0.012, 0.015, 0.07))
    return "cabinet", solids


def _sofa(rng: np.random.Generator, palette: Palette) -> Made:
    x, y, h = rng.uniform(0.5, 1.1), rng.uniform(0.35, 0.48), rng.uniform(0.18, 0.24)
    cloth = palette.add(("weave", "noise fine", "stripes", "spots"), 0.75, 0.8)
    cushion = palette.add(("spots", "stripes", "checker"), 0.4, 0.5)
    solids = [
        _box(cloth, 0, 0, h, x, y, h),
        _box(cloth, 0, y - 0.1, h * 2 + 0.1, x, 0.1, rng.uniform(0.2, 0.35)),
        _box(cloth, -x, 0, h * 1.5, 0.09, y, h * 1.5),
        _box(cloth, x, 0, h * 1.5, 0.09, y, h * 1.5),
    ]
    for _ in range(int(rng.integers(0, 3))):
        tilt = rotation_about(np.array([1, 0, 0]), -0.4)
        at = (rng.uniform(-0.7, 0.7) * x, y - 0.27, h * 2 + 0.17)
        solids.append(Solid(BALL, at, (0.2, 0.08, 0.2), cushion, tilt))
    return "sofa", solids


def _bed(rng: np.random.Generator, palette: Palette) -> Made:
    x, y, h = rng.uniform(0.45, 0.8), rng.uniform(0.85, 1.0), rng.uniform(0.13, 0.2)
    wood = palette.add(_WOODEN, 0.6, 0.8)
    cloth = palette.add(("weave", "checker worn", "stripes", "leaves"), 0.6, 0.9)
    white = palette.add((), 1.0, 0.6, palette.colour(0.5, 0.8, 0.3))
    return "bed", [
        _box(wood, 0, 0, h, x, y, h),
        _box(cloth, 0, -0.1, h * 2 + 0.09, x * 0.98, y * 0.9, 0.09),
        _box(wood, 0, y, 0.45, x, 0.03, 0.45),
        Solid(BALL, (0, y - 0.25, h * 2 + 0.2), (x * 0.6, 0.2, 0.09), white),
    ]


def _lamp(rng: np.random.Generator, palette: Palette) -> Made:
    h, r = rng.uniform(0.7, 1.5), rng.uniform(0.12, 0.24)
    metal = palette.add((), 0.9, 0.5)
    shade_ = palette.add((), 0.7, 0.6, palette.colour(0.3, 0.8))
    kind = BALL if rng.random() < 0.4 else CYLINDER
    return "lamp", [
        Solid(CYLINDER, (0, 0, 0.02), (r * 0.8, r * 0.8, 0.02), metal),
        Solid(CYLINDER, (0, 0, h / 2), (0.02, 0.02, h / 2), metal),
        Solid(kind, (0, 0, h + r * 0.6), (r, r, r * rng.uniform(0.7, 1)), shade_),
    ]


def _tree(rng: np.random.Generator, palette: Palette) -> Made:
    h, r = rng.uniform(0.3, 1.2), rng.uniform(0.35, 0.7)
    bark = palette.add(("noise streaks", "noise rough"), 0.3, 0.5)
    leaf = palette.add(("leaves", "noise fine", "noise rough"), 0.2, 0.9)
    solids = [Solid(CYLINDER, (0, 0, h / 2 + 0.1), (0.08, 0.08, h / 2 + 0.1), bark)]
    for _ in range(int(rng.integers(1, 4))):
        at = (*rng.normal(0, 0.3 * r, 2), h + r * rng.uniform(0.5, 1.2))
        solids.append(Solid(BALL, at, (r * rng.uniform(0.6, 1), r * rng.uniform(0.6, 1), r * 0.8), leaf))
    return "tree", solids


def _house(rng: np.random.Generator, palette: Palette) -> Made:
    x, y, h = rng.uniform(0.8, 1.6), rng.uniform(0.7, 1.3), rng.uniform(0.6, 1.2)
    wall = palette.add(("bricks", "windows", "blocks", "planks"), 0.3, 2.0)
    roof = palette.add(("tiles", "stripes", "noise rough"), 0.3, 1.0)
    tilt = rotation_about(np.array([1, 0, 0]), np.pi / 4)
    side = y / np.sqrt(2) * 1.05
    # A square bar on its edge, sunk half into the walls, is a gable roof.
    return "house", [
        _box(wall, 0, 0, h, x, y, h),
        Solid(BOX, (0, 0, 2 * h), (x * 1.05, side, side), roof, tilt),
        _box(roof, 0, -y, h * 0.45, 0.18, 0.02, h * 0.45),
    ]


def _snowman(rng: np.random.Generator, palette: Palette) -> Made:
    r = rng.uniform(0.2, 0.4)
    body = palette.add((), 0.5, 0.8)
    hat = palette.add((), 0.5, 0.5)
    q = rng.uniform(0.6, 0.8)
    return "snowman", [
        Solid(BALL, (0, 0, r), (r, r, r), body),
        Solid(BALL, (0, 0, 2 * r + 0.7 * q * r), (q * r, q * r, q * r), body),
        Solid(CYLINDER, (0, 0, 2 * r + 1.7 * q * r), (0.6 * q * r, 0.6 * q * r, 0.3 * r), hat),
    ]


def _arch(rng: np.random.Generator, palette: Palette) -> Made:
    x, h, t = rng.uniform(0.3, 0.7), rng.uniform(0.4, 1.0), rng.uniform(0.07, 0.16)
    stone = palette.add(("bricks", "blocks", "noise rough", "marble"), 0.4, 1.0)
    kind = CYLINDER if rng.random() < 0.5 else BOX
    return "arch", [
        Solid(kind, (-x, 0, h / 2), (t, t, h / 2), stone),
        Solid(kind, (x, 0, h / 2), (t, t, h / 2), stone),
        _box(stone, 0, 0, h + t, x + 1.3 * t, 1.2 * t, t),
    ]


MAKERS: dict[str, Callable[[np.random.Generator, Palette], Made]] = {
    "single": _single,
    "table": _table,
    "chair": lambda rng, palette: _seat(rng, palette, True),
    "stool": lambda rng, palette: _seat(rng, palette, False),
    "shelf": _shelf,
    "cabinet": _cabinet,
    "sofa": _sofa,
    "lamp": _lamp,
    "bed": _bed,
    "tree": _tree,
    "house": _house,
    "snowman": _snowman,
    "arch": _arch,
}


def scaled(solids: list[Solid], factor: float) -> list[Solid]:
    """The same solids, ``factor`` times as large."""
    return [
        s._replace(centre=tuple(c * factor for c in s.centre), half=tuple(h * factor for h in s.half)) for s in solids
    ]
