"""Streets and open ground: what stands there, the sky, and the weather."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from scaling_perception.data.worlds import furniture
from scaling_perception.data.worlds.build import Draft, Light, World, turned
from scaling_perception.data.worlds.trace import Tracer

Array = np.ndarray
GROUNDS = ("foliage", "foliage", "rough", "speckle", "rough", "plaster")


def weather(world: World) -> None:
    """Sun or clouds, the colours of the sky, haze."""
    rng = world.rng
    world.indoor = False
    tilt, around = rng.uniform(0.12, 1.4), rng.uniform(0, 2 * np.pi)
    way = np.array([np.cos(around) * np.cos(tilt), np.sin(around) * np.cos(tilt), np.sin(tilt)])
    low = np.exp(-tilt * 3)
    tone = np.array([1, 0.95 - 0.3 * low, 0.88 - 0.5 * low])
    overcast = rng.random() < 0.35
    blue = np.array([0.25, 0.45, 0.9]) * rng.uniform(0.5, 1.1)
    gray = np.ones(3) * rng.uniform(0.5, 1.0)
    zenith = gray * rng.uniform(0.8, 1.2) if overcast else blue + (gray - blue) * rng.uniform(0, 0.3)
    horizon = gray if overcast else np.array([0.75, 0.85, 0.95]) + (tone - 0.8) * rng.uniform(0, 1.0)
    world.sky = np.clip(np.stack([zenith, horizon, horizon * 0.35]), 0.03, 2)
    world.ambient = world.sky[:2].mean(axis=0) * 0.6
    if not overcast or rng.random() < 0.3:
        world.lights.append(
            Light(
                way, tone * rng.uniform(1.0, 3.5) * (0.4 if overcast else 1), None, None, 0.005 if not overcast else 0.1
            )
        )
        world.ambient = world.ambient + tone * 0.35
    if rng.random() < 0.7:
        world.clouds = world.bank.pick(rng, ("rough", "plaster", "marble"))
    world.haze = float(rng.choice([0.0, 0.0, rng.uniform(0.001, 0.01), rng.uniform(0.01, 0.04)]))


def tree(world: World) -> Draft:
    rng, draft = world.rng, Draft(world, "tree")
    high = rng.uniform(2.5, 11)
    trunk = rng.uniform(0.25, 0.5) * high
    thick = high * rng.uniform(0.02, 0.05)
    bark, leaf = world.material("wood", "rough", size=0.6, dark=0.6), world.material("foliage", size=1.2)
    draft.part("rod", (0, 0, trunk * 0.6), (thick, thick, trunk * 1.2), bark)
    style = rng.random()
    if style < 0.2:  # a fir
        for level in np.linspace(0.25, 0.9, 4):
            wide = high * 0.45 * (1.1 - level)
            draft.part("leaves", (0, 0, level * high), (wide, wide, high * 0.35), leaf, turned(rng.uniform(0, 6)))
    elif style < 0.3:  # bare
        for _ in range(9):
            lean = turned(rng.uniform(0, 6.3), rng.uniform(0.3, 1.1))
            long = high * rng.uniform(0.25, 0.5)
            at = lean @ (0, 0, long / 2) + (0, 0, trunk * rng.uniform(0.7, 1.1))
            draft.part("rod", at, (thick * 0.4, thick * 0.4, long), bark, lean)
    else:
        for _ in range(rng.integers(2, 6)):
            size = (high - trunk) * rng.uniform(0.5, 0.9)
            at = (rng.normal(0, high * 0.1), rng.normal(0, high * 0.1), trunk + (high - trunk) * rng.uniform(0.2, 0.7))
            draft.part("leaves", at, (size, size, size * rng.uniform(0.7, 1.1)), leaf, turned(rng.uniform(0, 6)))
    return draft


def bush(world: World) -> Draft:
    rng, draft = world.rng, Draft(world, "bush")
    leaf = world.material("foliage", size=0.6)
    for _ in range(rng.integers(1, 4)):
        size = rng.uniform(0.4, 1.5)
        draft.part(
            str(rng.choice(["leaves", "blades", "stone"])),
            (rng.normal(0, 0.3), rng.normal(0, 0.3), size * 0.35),
            (size, size, size * rng.uniform(0.6, 1)),
            leaf,
            turned(rng.uniform(0, 6)),
        )
    return draft


def rock(world: World) -> Draft:
    rng, draft = world.rng, Draft(world, "rock")
    size = rng.uniform(0.2, 1.6)
    draft.part(
        "stone",
        (0, 0, size * 0.2),
        (size, size * rng.uniform(0.6, 1), size * rng.uniform(0.4, 0.9)),
        world.material("rough", "speckle", "marble", size=0.8),
    )
    return draft


def car(world: World) -> Draft:
    """A body of panels, a glasshouse, four wheels and lamps; its length is along x."""
    rng, draft = world.rng, Draft(world, "car")
    long, wide, high = rng.uniform(3.5, 5), rng.uniform(1.6, 1.9), rng.uniform(1.3, 1.6)
    paint = world.material("plaster", size=3, gloss=0.8, tint=0.5)
    glass = world.material("plaster", size=3, dark=0.08, gloss=1.0)
    black, lamp = world.material("plaster", dark=0.06), world.material("plaster", glow=np.array([0.4, 0.3, 0.25]))
    style = rng.random()
    if style < 0.25:  # a van or bus
        high, long = rng.uniform(1.9, 3.0), rng.uniform(4.5, 8)
        draft.part("soft", (0, 0, high / 2 + 0.15), (long, wide, high - 0.3), paint, which=0)
        draft.part("box", (0, 0, high * 0.7), (long * 0.9, wide + 0.02, high * 0.25), glass)
        draft.part("box", (-long / 2, 0, high * 0.65), (0.04, wide * 0.85, high * 0.35), glass)
        draft.part("box", (long / 2, 0, high * 0.65), (0.04, wide * 0.85, high * 0.35), glass)
    else:
        draft.part("soft", (0, 0, 0.55), (long, wide, 0.62), paint, which=1)
        x, cab = rng.uniform(-0.2, 0.3), long * rng.uniform(0.45, 0.65)
        draft.part("car", (x, 0, high * 0.55 + 0.15), (cab * 1.3, wide * 0.86, high * 0.85), glass)
        draft.part("soft", (x, 0, high - 0.03), (cab * 0.5, wide * 0.8, 0.07), paint, which=0)
        for side in (-1, 1):
            draft.part("box", (x, side * wide * 0.43, high * 0.75), (0.08, 0.03, high * 0.35), paint)
    for dx in (-0.32, 0.32):
        for side in (-1, 1):
            draft.part(
                "wheel", (dx * long, side * (wide / 2 - 0.08), 0.32), (0.64, 0.64, 0.2), black, turned(0, np.pi / 2)
            )
    for dx in (-1, 1):
        for side in (-1, 1):
            draft.part("soft", (dx * long * 0.495, side * wide * 0.36, 0.65), (0.06, 0.3, 0.14), lamp, which=1)
        draft.part("box", (dx * long * 0.5, 0, 0.4), (0.05, wide * 0.9, 0.14), black)
        draft.part(
            "box",
            (dx * (long * 0.5 + 0.02), 0, 0.5),
            (0.02, 0.5, 0.11),
            world.material("poster", size=(0.5, 0.11), fit=True),
        )
    return draft


def pole(world: World) -> Draft:
    """A lamp post, a traffic sign, a bollard, a traffic light."""
    rng, draft = world.rng, Draft(world, "pole")
    metal = world.material("plaster", "speckle", size=1, dark=rng.uniform(0.2, 1))
    high, style = rng.uniform(2.2, 7), rng.random()
    if style < 0.25:
        high = rng.uniform(0.5, 1.1)
        draft.part("rod", (0, 0, high / 2), (0.14, 0.14, high), metal)
        return draft
    draft.part("rod", (0, 0, high / 2), (0.1, 0.1, high), metal)
    if style < 0.55:
        draft.label, size = "sign", rng.uniform(0.5, 1.0)
        face = world.material("poster", "ornament", "plaster", size=size, fit=True, tint=0.4)
        draft.part(str(rng.choice(["box", "shape", "rod"])), (0, -0.07, high - size / 2), (size, 0.03, size), face)
    else:
        draft.part("box", (0, -0.6, high), (0.09, 1.3, 0.09), metal)
        draft.part("soft", (0, -1.1, high - 0.05), (0.2, 0.5, 0.14), metal)
    return draft


def bin_(world: World) -> Draft:
    rng, draft = world.rng, Draft(world, "bin")
    wide, high = rng.uniform(0.4, 1.0), rng.uniform(0.6, 1.3)
    kind = str(rng.choice(["soft", "rod", "vase", "box"]))
    draft.part(kind, (0, 0, high / 2), (wide, wide * 0.8, high), world.material("plaster", "panel", "rough", size=0.5))
    draft.part("box", (0, 0, high + 0.02), (wide * 1.05, wide * 0.85, 0.06), world.material("plaster"))
    return draft


def house(world: World, wide: float | None = None, high: float | None = None) -> Draft:
    """A building whose front, at -y, has windows, doors, sills, balconies or a shop."""
    rng, draft = world.rng, Draft(world, "house")
    wide = wide or rng.uniform(6, 14)
    high, deep = high or rng.uniform(3, 14), rng.uniform(6, 10)
    storey = rng.uniform(2.7, 3.5)
    storeys, columns = max(round(high / storey), 1), max(round(wide / rng.uniform(1.8, 3.2)), 1)
    high = storeys * storey
    plain = rng.random() < 0.3
    skin = (
        world.material("facade", size=(wide / columns * 3, storey * 3))
        if plain
        else world.material(
            "plaster", "plaster", "bricks", "rough", "tiles", "planks", size=rng.uniform(1.2, 3), vivid=0.6
        )
    )
    draft.part("box", (0, deep / 2, high / 2), (wide, deep, high), skin)
    trim, glass = world.material("plaster", "wood"), world.material("plaster", dark=rng.uniform(0.05, 0.3), gloss=0.9)
    if not plain:
        w, h = wide / columns * rng.uniform(0.35, 0.65), storey * rng.uniform(0.4, 0.65)
        sill, balcony = rng.random() < 0.6, rng.random() < 0.25
        for i in range(columns):
            x = (i + 0.5) * wide / columns - wide / 2
            for j in range(storeys):
                z = (j + 0.55) * storey
                if j == 0 and rng.random() < 0.25:
                    door = world.material("panel", "wood", size=(w, 2.2), fit=True)
                    draft.part("box", (x, 0, 1.1), (max(w, 0.9), 0.1, 2.2), door)
                    continue
                draft.part("box", (x, 0, z), (w + 0.16, 0.08, h + 0.16), trim)
                draft.part("box", (x, -0.02, z), (w, 0.08, h), glass)
                if sill:
                    draft.part("box", (x, -0.1, z - h / 2 - 0.06), (w + 0.25, 0.22, 0.08), trim)
                if balcony and j:
                    draft.part("box", (x, -0.5, z - h / 2 - 0.1), (w + 0.6, 1.0, 0.12), trim)
                    draft.part("box", (x, -0.98, z - h / 2 + 0.4), (w + 0.6, 0.05, 0.9), trim)
        if rng.random() < 0.35:
            awning = world.material("cloth", size=1.0)
            draft.part("box", (0, -0.7, storey * 0.92), (wide * 0.8, 1.5, 0.06), awning, turned(0, 0.3))
            draft.part(
                "box", (0, -0.06, storey * 1.02), (wide * 0.8, 0.1, 0.5), world.material("poster", size=(wide / 2, 0.6))
            )
    if rng.random() < 0.5:
        roof = world.material("tiles", "bricks", "rough", size=1.5, dark=0.6)
        tall = rng.uniform(1, 4)
        draft.part(
            "roof", (0, deep / 2, high + tall / 2), (deep + 1, wide + 0.6, tall), roof, turned(np.pi / 2), which=0
        )
    else:
        draft.part("box", (0, deep / 2, high + 0.15), (wide + 0.4, deep + 0.4, 0.3), trim)
    return draft


def fence(world: World, long: float = 0.0) -> Draft:
    """Boards or posts, ``long`` metres or 1 to 6."""
    rng, draft = world.rng, Draft(world, "fence")
    long = long or rng.uniform(1, 6)
    high, skin = rng.uniform(0.6, 1.8), world.material("wood", "plaster", "planks", "foliage", "bricks", size=1.0)
    if rng.random() < 0.5:
        draft.part("box", (0, 0, high / 2), (long, 0.15, high), skin)
        return draft
    for x in np.linspace(-0.5, 0.5, max(int(long / rng.uniform(0.3, 1.5)), 2)):
        draft.part("box", (x * long, 0, high / 2), (0.08, 0.06, high), skin)
    for z in (0.35, 0.85):
        draft.part("box", (0, 0.03, z * high), (long, 0.04, 0.09), skin)
    return draft


def street(world: World) -> float:
    """A street along +y with houses on both sides; returns half the width of its road."""
    rng = world.rng
    weather(world)
    half, walk = rng.uniform(2.5, 6), rng.uniform(1.2, 4)
    road = world.material(
        "speckle",
        "speckle",
        "rough",
        "bricks",
        size=rng.uniform(1.5, 4),
        dark=rng.uniform(0.3, 0.9),
        tint=0.05,
        vivid=0.25,
        gloss=rng.choice([0, 0, 0.3, 0.8]),
    )
    pave = world.material("tiles", "bricks", "speckle", "plaster", size=1.5, vivid=0.4)
    mark = world.material("plaster", tint=0.05, size=3, vivid=0.2)
    base = Draft(world, "ground")
    base.part("box", (0, 90, -0.1), (400, 400, 0.2), road)
    for side in (-1, 1):
        base.part("box", (side * (half + 20), 90, 0.0), (40, 300, 0.26), pave)
        base.part("box", (side * (half + 0.06), 90, 0.01), (0.16, 300, 0.27), mark)
    if rng.random() < 0.7:
        for y in np.arange(-8, 60, rng.uniform(3, 7)):
            base.part("box", (0, y, 0.002), (0.14, 1.8, 0.006), mark)
    if rng.random() < 0.3:
        at = rng.uniform(4, 20)
        for x in np.arange(-half + 0.4, half, 0.9):
            base.part("box", (x, at, 0.003), (0.45, 3, 0.007), mark)
    world.put(base, (0, 0, 0), solid=False)
    set_back = rng.choice([0.0, rng.uniform(1, 8)])
    for side in (-1, 1):
        y, tall = -12.0, rng.uniform(4, 16)
        open_side = rng.random() < 0.2
        while y < 75:
            wide = rng.uniform(6, 16)
            if rng.random() < (0.75 if open_side else 0.1):  # a gap with trees
                for _ in range(rng.integers(1, 4)):
                    at = (side * (half + walk + rng.uniform(1, 10)), y + rng.uniform(0, wide), 0.1)
                    world.put(tree(world) if rng.random() < 0.7 else bush(world), at, rng.uniform(0, 6))
            else:
                draft = house(world, wide, tall * rng.uniform(0.6, 1.4))
                at = (side * (half + walk + set_back), y + wide / 2, 0.1)
                world.put(draft, at, -side * np.pi / 2, moves=False)
            y += wide + rng.choice([0.0, 0.0, rng.uniform(0.5, 5)])
    for side in (-1, 1):
        y = rng.uniform(-3, 8)
        parked = rng.random()
        while y < 55:
            if rng.random() < parked:
                world.put(car(world), (side * (half - 1.1), y, 0), np.pi / 2 * side + rng.normal(0, 0.03))
            y += rng.uniform(5, 8)
        for _ in range(rng.poisson(6)):
            makers: tuple[Callable[..., Draft], ...] = (pole, pole, furniture.person, bin_, tree, bush, fence)
            makers += (furniture.trinket,)
            maker = makers[rng.integers(len(makers))]
            draft = maker(world)
            at = (side * (half + rng.uniform(0.4, max(walk, 0.5))), rng.uniform(1, 40) ** 1.0, 0.13)
            world.put(
                draft, at, -side * np.pi / 2 + (rng.uniform(0, 6) if maker is not fence and rng.random() < 0.4 else 0)
            )
    for _ in range(rng.poisson(1.5)):
        world.put(
            car(world), (rng.choice([-1, 1]) * half * 0.35, rng.uniform(6, 50), 0), np.pi / 2 * rng.choice([-1, 1])
        )
    for _ in range(rng.poisson(1.0)):
        world.put(furniture.person(world), (rng.uniform(-half, half), rng.uniform(3, 25), 0), rng.uniform(0, 6))
    return half


def open_ground(world: World) -> float:
    """Land with trees, rocks and houses under the sky; returns how high the land rises."""
    rng = world.rng
    weather(world)
    skin = world.material(*GROUNDS, size=rng.uniform(1.5, 5), tint=0.1, dark=0.8, vivid=0.6)
    rise = rng.choice([0.0, rng.uniform(0.3, 2.5)])
    base = Draft(world, "ground")
    base.part("land", (0, 40, -rise / 2 - 0.05), (140, 140, rise + 0.01), skin)
    base.part("box", (0, 100, -rise - 0.3), (600, 600, 0.2), world.material(*GROUNDS, size=5))
    if rng.random() < 0.35:  # a path or a road
        base.part(
            "box",
            (rng.normal(0, 3), 40, -0.02),
            (rng.uniform(1.2, 5), 140, 0.06),
            world.material("rough", "speckle", "tiles", size=1.5),
            turned(rng.normal(0, 0.4)),
        )
    for _ in range(rng.integers(0, 4)):  # hills behind
        wide, high = rng.uniform(60, 160), rng.uniform(6, 40)
        base.part(
            "stone",
            (rng.uniform(-90, 90), rng.uniform(90, 150), 0),
            (wide, wide * 0.6, high * 2),
            world.material("foliage", "rough", size=8),
        )
    world.put(base, (0, 0, 0), solid=False)
    land = Tracer.of(world.triangles())
    makers = (
        tree,
        tree,
        bush,
        bush,
        rock,
        rock,
        furniture.person,
        house,
        pole,
        car,
        furniture.trinket,
        furniture.chair,
        bin_,
        furniture.table,
    )
    weights = rng.dirichlet(np.full(len(makers), 0.5))
    for _ in range(rng.integers(8, 45)):
        draft = makers[rng.choice(len(makers), p=weights)](world)
        y = np.exp(rng.uniform(np.log(2), np.log(70)))
        x = rng.uniform(-1, 1) * (y * 0.8 + 2)
        drop = land.cast(np.array([[x, y, 50.0]]), np.array([[0, 0, -1.0]])).far[0]
        world.put(draft, (x, y, 50 - min(float(drop), 55.0) - 0.03), rng.uniform(0, 6.3), moves=draft.label != "house")
    if rng.random() < 0.3:
        world.put(
            fence(world, rng.uniform(5, 40)), (rng.normal(0, 5), rng.uniform(4, 25), 0), rng.normal(0, 0.5), moves=False
        )
    return float(rise)
