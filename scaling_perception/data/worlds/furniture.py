"""Drafts of what stands in rooms; every function returns one, of random shape and materials."""

from __future__ import annotations

import numpy as np

from scaling_perception.data.worlds.build import Draft, World, turned

WOODEN = ("wood", "wood", "wood", "planks", "plaster", "marble")
SOFT = ("cloth", "cloth", "ornament", "rough", "plaster")
ANY = ("plaster", "rough", "wood", "cloth", "ornament", "marble", "speckle", "panel", "leaves", "poster")


def _legs(draft: Draft, wide: float, deep: float, high: float, thick: float, material: int) -> None:
    kind = "rod" if draft.world.rng.random() < 0.5 else "box"
    for x in (-1, 1):
        for y in (-1, 1):
            at = (x * (wide - thick) / 2, y * (deep - thick) / 2, high / 2)
            draft.part(kind, at, (thick, thick, high), material)


def table(world: World, low: bool = False) -> Draft:
    """A table or desk of four legs, of one foot, or of two sides."""
    rng, draft = world.rng, Draft(world, "table")
    wide, deep = rng.uniform(0.5, 2.0), rng.uniform(0.45, 1.0)
    high = rng.uniform(0.3, 0.5) if low else rng.uniform(0.6, 0.95)
    thick = rng.uniform(0.02, 0.07)
    top, foot = world.material(*WOODEN, size=0.8, gloss=rng.choice([0, 0, 0.3])), world.material(*WOODEN, size=0.6)
    style = rng.random()
    if style < 0.2:  # round, one foot
        wide = deep = rng.uniform(0.5, 1.2)
        draft.part("rod", (0, 0, high - thick / 2), (wide, wide, thick), top)
        draft.part("vase", (0, 0, (high - thick) / 2), (wide * 0.4, wide * 0.4, high - thick), foot)
    else:
        draft.part("box" if rng.random() < 0.7 else "soft", (0, 0, high - thick / 2), (wide, deep, thick), top, which=0)
        if style < 0.75:
            _legs(draft, wide * 0.95, deep * 0.95, high - thick, rng.uniform(0.03, 0.1), foot)
            if rng.random() < 0.4:
                draft.part("box", (0, 0, high * 0.25), (wide * 0.85, deep * 0.8, 0.02), foot)
                draft.tops.append((0, 0, wide * 0.7, deep * 0.6, high * 0.25 + 0.01))
        else:
            for x in (-1, 1):
                block = (0.04, deep, high - thick) if rng.random() < 0.5 else (wide * 0.28, deep * 0.9, high - thick)
                draft.part("box", (x * (wide - block[0]) / 2, 0, block[2] / 2), block, foot)
    draft.tops.append((0, 0, wide * 0.9, deep * 0.9, high))
    return draft


def chair(world: World) -> Draft:
    rng, draft = world.rng, Draft(world, "chair")
    wide, deep, high, back = (
        rng.uniform(0.38, 0.55),
        rng.uniform(0.38, 0.5),
        rng.uniform(0.4, 0.5),
        rng.uniform(0.75, 1.1),
    )
    frame, seat = world.material(*WOODEN, size=0.5), world.material(*SOFT, *WOODEN, size=0.5)
    thick = rng.uniform(0.03, 0.1)
    draft.part("soft" if thick > 0.06 else "box", (0, 0, high - thick / 2), (wide, deep, thick), seat)
    if rng.random() < 0.2:  # on wheels
        draft.part("rod", (0, 0, high / 2), (0.06, 0.06, high), frame)
        for turn in range(5):
            draft.part("box", (0, 0, 0.05), (wide * 1.15, 0.05, 0.05), frame, turned(turn * np.pi / 5))
    else:
        _legs(draft, wide, deep, high - thick, rng.uniform(0.02, 0.05), frame)
    at, tall = deep / 2 - 0.02, back - high
    if rng.random() < 0.5:
        draft.part("soft", (0, at, high + tall * 0.6), (wide, 0.05, tall * 0.8), seat, which=0)
    else:
        for x in np.linspace(-0.45, 0.45, rng.integers(2, 6)):
            draft.part("box", (x * wide, at, high + tall / 2), (0.03, 0.03, tall), frame)
        draft.part("box", (0, at, back - 0.04), (wide, 0.035, 0.09), frame)
    if rng.random() < 0.25:
        for x in (-1, 1):
            draft.part("box", (x * wide / 2, 0, high + 0.2), (0.04, deep, 0.04), frame)
            draft.part("box", (x * wide / 2, -deep * 0.4, high + 0.1), (0.04, 0.04, 0.2), frame)
    draft.tops.append((0, 0, wide * 0.6, deep * 0.5, high))
    return draft


def stool(world: World) -> Draft:
    rng, draft = world.rng, Draft(world, "stool")
    wide, high = rng.uniform(0.28, 0.6), rng.uniform(0.3, 0.75)
    top = world.material(*SOFT, *WOODEN, size=0.4)
    draft.part(str(rng.choice(["rod", "soft"])), (0, 0, high - 0.04), (wide, wide, 0.08), top)
    if rng.random() < 0.6:
        _legs(draft, wide * 0.8, wide * 0.8, high - 0.06, 0.035, world.material(*WOODEN, size=0.5))
    else:
        draft.part("soft", (0, 0, high / 2 - 0.03), (wide * 0.95, wide * 0.95, high - 0.06), top, which=1)
    draft.tops.append((0, 0, wide * 0.6, wide * 0.6, high))
    return draft


def shelf(world: World) -> Draft:
    """Boards between two sides, with rows of books and small things."""
    rng, draft = world.rng, Draft(world, "shelf")
    wide, deep, high = rng.uniform(0.6, 1.8), rng.uniform(0.22, 0.4), rng.uniform(0.7, 2.2)
    frame = world.material(*WOODEN, size=0.7)
    for x in (-1, 1):
        draft.part("box", (x * wide / 2, 0, high / 2), (0.03, deep, high), frame)
    if rng.random() < 0.6:
        draft.part("box", (0, deep / 2, high / 2), (wide, 0.015, high), world.material(*WOODEN, "plaster", size=0.7))
    levels = max(int(high / rng.uniform(0.26, 0.45)), 2)
    step = high / levels
    for level in range(levels + 1):
        z = level * step + 0.015
        draft.part("box", (0, 0, z), (wide, deep, 0.025), frame)
        if level == levels:
            continue
        if rng.random() < 0.45:
            _books(draft, wide * 0.9, deep, z + 0.012, step)
        elif rng.random() < 0.8:
            draft.tops.append((0, -0.02, wide * 0.85, deep * 0.6, z + 0.012))
    draft.tops.append((0, 0, wide * 0.85, deep * 0.7, high + 0.027))
    return draft


def _books(draft: Draft, wide: float, deep: float, z: float, step: float) -> None:
    rng, world = draft.world.rng, draft.world
    if rng.random() < 0.5:  # one block, painted
        part = rng.uniform(0.4, 1) * wide
        tall = step * rng.uniform(0.5, 0.85)
        skin = world.material("books", size=(max(part, 0.3), tall), fit=True)
        draft.part("box", ((part - wide) / 2, 0.02, z + tall / 2), (part, deep * 0.7, tall), skin)
        return
    x = -wide / 2
    skins = [world.material("plaster", "cloth", size=0.2, tint=0.5) for _ in range(4)]
    while x < wide / 2 - 0.08 and rng.random() < 0.97:
        thick, tall = rng.uniform(0.025, 0.07), step * rng.uniform(0.45, 0.85)
        lean = turned(0, 0, rng.uniform(0.1, 0.35)) if rng.random() < 0.1 else None
        draft.part(
            "box",
            (x + thick / 2, rng.uniform(-0.02, 0.03), z + tall / 2),
            (thick * 0.95, deep * 0.65, tall),
            skins[rng.integers(4)],
            lean,
        )
        x += thick + (rng.uniform(0, 0.2) if rng.random() < 0.15 else 0)


def cabinet(world: World) -> Draft:
    """A cupboard, chest of drawers, kitchen unit, wardrobe."""
    rng, draft = world.rng, Draft(world, "cabinet")
    wide, deep = rng.uniform(0.4, 1.8), rng.uniform(0.3, 0.65)
    high = rng.choice([rng.uniform(0.4, 1.0), rng.uniform(0.85, 0.95), rng.uniform(1.6, 2.2)])
    body = world.material(*WOODEN, size=0.8)
    feet = rng.choice([0.0, 0.08, 0.15])
    draft.part("box", (0, 0, feet + (high - feet) / 2), (wide, deep, high - feet), body)
    if feet:
        _legs(draft, wide * 0.95, deep * 0.9, feet, 0.05, body)
    columns, rows = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    front = world.material(*WOODEN, "panel", size=0.6) if rng.random() < 0.6 else body
    knob = world.material("plaster", "speckle", size=0.2)
    cell = (wide / columns, (high - feet) / rows)
    for i in range(columns):
        for j in range(rows):
            x, z = (i + 0.5) * cell[0] - wide / 2, feet + (j + 0.5) * cell[1]
            draft.part("box", (x, -deep / 2 - 0.008, z), (cell[0] - 0.02, 0.02, cell[1] - 0.02), front)
            draft.part("box", (x, -deep / 2 - 0.025, z + cell[1] * 0.3), (min(0.12, cell[0] * 0.4), 0.02, 0.015), knob)
    if rng.random() < 0.5:
        draft.part(
            "box", (0, -0.01, high + 0.015), (wide + 0.03, deep + 0.04, 0.03), world.material(*WOODEN, "speckle")
        )
    draft.tops.append((0, 0, wide * 0.9, deep * 0.8, high + 0.03))
    return draft


def sofa(world: World) -> Draft:
    rng, draft = world.rng, Draft(world, "sofa")
    wide, deep = rng.choice([rng.uniform(0.75, 1.0), rng.uniform(1.4, 2.4)]), rng.uniform(0.75, 1.0)
    seat, back, arm = rng.uniform(0.35, 0.48), rng.uniform(0.65, 1.0), rng.uniform(0.1, 0.25)
    skin, other = world.material(*SOFT, size=0.6), world.material(*SOFT, size=0.5)
    draft.part("soft", (0, 0, seat / 2), (wide, deep, seat), skin, which=0)
    draft.part("soft", (0, deep / 2 - 0.12, back / 2), (wide, 0.24, back), skin, which=1)
    for x in (-1, 1):
        draft.part("soft", (x * (wide - arm) / 2, 0, (seat + 0.2) / 2), (arm, deep, seat + 0.2), skin, which=1)
    places = max(round(wide / 0.7), 1)
    inner = (wide - 2 * arm) / places
    for i in range(places):
        x = (i + 0.5) * inner - (wide - 2 * arm) / 2
        draft.part("soft", (x, -0.06, seat + 0.04), (inner * 0.98, deep * 0.72, 0.16), skin, which=1)
        if rng.random() < 0.5:
            lean = turned(rng.normal(0, 0.2), rng.uniform(-0.4, 0.0), rng.normal(0, 0.3))
            draft.part("soft", (x, deep * 0.2, seat + 0.26), (0.4, 0.14, 0.36), other, lean, which=2)
    draft.tops.append((0, -0.1, wide * 0.6, deep * 0.4, seat + 0.12))
    return draft


def bed(world: World) -> Draft:
    rng, draft = world.rng, Draft(world, "bed")
    wide, deep, high = rng.uniform(0.8, 1.9), rng.uniform(1.8, 2.1), rng.uniform(0.35, 0.6)
    frame, cover, linen = (world.material(*WOODEN), world.material(*SOFT, size=0.8), world.material("cloth", "plaster"))
    draft.part("box", (0, 0, high * 0.35), (wide, deep, high * 0.4), frame)
    draft.part("soft", (0, 0, high * 0.75), (wide * 0.98, deep * 0.98, high * 0.5), linen, which=0)
    draft.part("soft", (0, -deep * 0.14, high * 0.85), (wide * 1.04, deep * 0.72, high * 0.5), cover, which=1)
    draft.part("box", (0, deep / 2 + 0.02, high), (wide, 0.06, high * rng.uniform(1.3, 2.4)), frame)
    for x in (-0.25, 0.25) if wide > 1.3 else (0.0,):
        tilt = turned(rng.normal(0, 0.15), rng.uniform(-0.3, 0.1))
        draft.part("soft", (x * wide, deep * 0.37, high + 0.12), (0.6, 0.4, 0.18), linen, tilt, which=2)
    draft.tops.append((0, -0.2, wide * 0.8, deep * 0.5, high * 1.1))
    return draft


def lamp(world: World) -> Draft:
    """A standing or table lamp."""
    rng, draft = world.rng, Draft(world, "lamp")
    high = rng.choice([rng.uniform(0.3, 0.6), rng.uniform(1.2, 1.8)])
    wide = rng.uniform(0.18, 0.45)
    metal = world.material("plaster", "speckle", "wood", size=0.3)
    warm = np.array([1.0, rng.uniform(0.7, 0.95), rng.uniform(0.4, 0.85)]) * rng.choice([0, rng.uniform(0.6, 2)])
    draft.part("rod", (0, 0, 0.01), (wide * 0.7, wide * 0.7, 0.02), metal)
    draft.part(
        *(
            ("rod", (0, 0, high * 0.4), (0.025, 0.025, high * 0.8))
            if high > 1 or rng.random() < 0.5
            else ("vase", (0, 0, high * 0.35), (wide * 0.6, wide * 0.6, high * 0.7))
        ),
        metal,
    )
    draft.part(
        "shade", (0, 0, high * 0.87), (wide, wide, high * 0.26 if high < 1 else 0.3), world.material("cloth", glow=warm)
    )
    return draft


def plant(world: World) -> Draft:
    rng, draft = world.rng, Draft(world, "plant")
    pot, high = rng.uniform(0.12, 0.4), rng.uniform(0.3, 1.4)
    draft.part("vase", (0, 0, pot / 2), (pot, pot, pot), world.material(*ANY, size=0.3))
    leaf = world.material("foliage", size=0.3)
    draft.part("rod", (0, 0, pot + high * 0.25), (0.02, 0.02, high * 0.5), world.material("wood"))
    for _ in range(rng.integers(1, 4)):
        at = (rng.normal(0, high * 0.12), rng.normal(0, high * 0.12), pot + high * rng.uniform(0.3, 0.7))
        size = high * rng.uniform(0.4, 0.8)
        draft.part(
            "blades" if rng.random() < 0.5 else "leaves",
            at,
            (size, size, size * rng.uniform(0.6, 1.3)),
            leaf,
            turned(rng.uniform(0, 6)),
        )
    return draft


def appliance(world: World) -> Draft:
    """A screen, a stove, a radio: a box with a face."""
    rng, draft = world.rng, Draft(world, "appliance")
    skin = world.material("plaster", "speckle", tint=0.4, dark=rng.choice([0.15, 0.5, 1.0]))
    if rng.random() < 0.5:
        wide = rng.uniform(0.3, 1.2)
        high = wide * rng.uniform(0.55, 0.75)
        glow = np.full(3, 0.15) * (rng.random() < 0.4)
        draft.part("box", (0, 0, high / 2 + 0.1), (wide, 0.04, high), skin)
        face = world.material("poster", size=(wide, high), fit=True, dark=rng.choice([0.06, 0.8]), gloss=0.3, glow=glow)
        draft.part("box", (0, -0.022, high / 2 + 0.1), (wide * 0.94, 0.004, high * 0.92), face)
        draft.part("box", (0, 0, 0.05), (wide * 0.1, 0.06, 0.1), skin)
        draft.part("box", (0, 0, 0.01), (wide * 0.4, 0.2, 0.02), skin)
    else:
        wide, deep, high = rng.uniform(0.2, 0.65), rng.uniform(0.2, 0.6), rng.uniform(0.15, 0.9)
        draft.part("soft", (0, 0, high / 2), (wide, deep, high), skin, which=0)
        face = world.material("panel", "poster", "plaster", size=(wide, high), fit=True, dark=0.5)
        draft.part("box", (0, -deep / 2, high * 0.5), (wide * 0.8, 0.02, high * 0.7), face)
        draft.tops.append((0, 0, wide * 0.7, deep * 0.6, high))
    return draft


def person(world: World) -> Draft:
    """A figure of rounded bodies, standing or sitting upright."""
    rng, draft = world.rng, Draft(world, "person")
    high = rng.uniform(1.5, 1.9)
    skin = world.material("plaster", size=0.5, dark=0.7)
    top, legs = world.material(*SOFT, size=0.5), world.material(*SOFT, size=0.5)
    stride = rng.normal(0, 0.25)
    for x in (-1, 1):
        draft.part(
            "soft",
            (x * 0.1, x * stride * 0.4, high * 0.25),
            (0.16, 0.18, high * 0.5),
            legs,
            turned(0, x * stride),
            which=2,
        )
        swing = turned(0, -x * stride + rng.normal(0, 0.2), -x * rng.uniform(0.0, 0.5))
        draft.part("soft", (x * 0.25, 0, high * 0.63), (0.1, 0.11, high * 0.36), top, swing, which=2)
    draft.part("soft", (0, 0, high * 0.64), (0.4, 0.24, high * 0.34), top, which=2)
    draft.part("ball", (0, -0.02, high * 0.91), (0.18, 0.21, high * 0.15), skin)
    draft.part(
        "ball", (0, 0.02, high * 0.94), (0.2, 0.22, high * 0.12), world.material("rough", dark=rng.uniform(0.1, 0.8))
    )
    return draft


def trinket(world: World, room: float = 0.3) -> Draft:
    """Any small thing, at most ``room`` metres wide."""
    rng = world.rng
    kind = rng.random()
    size = room * rng.uniform(0.3, 1.0)
    skin = world.material(*ANY, size=size)
    if kind < 0.28:
        draft = Draft(world, "vase")
        high = size * rng.uniform(0.7, 2.2)
        draft.part("vase", (0, 0, high / 2), (size, size, high), skin)
        if rng.random() < 0.15:
            leaf = world.material("foliage", "leaves", size=0.2)
            draft.part("blades", (0, 0, high * 1.3), (size * 1.3, size * 1.3, high), leaf)
    elif kind < 0.5:
        draft = Draft(world, "book")
        z = 0.0
        for _ in range(rng.integers(1, 5)):
            thick = rng.uniform(0.01, 0.05)
            skin = world.material(*ANY, size=(size, size * 0.7), fit=rng.random() < 0.5)
            draft.part("box", (0, 0, z + thick / 2), (size, size * 0.7, thick), skin, turned(rng.normal(0, 0.15)))
            z += thick
    elif kind < 0.7:
        draft = Draft(world, "box")
        deep, high = size * rng.uniform(0.4, 1), size * rng.uniform(0.3, 1.5)
        face = world.material("poster", "panel", "plaster", "speckle", size=(size, high), fit=True)
        draft.part("box" if rng.random() < 0.5 else "soft", (0, 0, high / 2), (size, deep, high), face, which=0)
        draft.tops.append((0, 0, size * 0.6, deep * 0.6, high))
    elif kind < 0.78:
        draft = Draft(world, "ball")
        draft.part("ball", (0, 0, size / 2), (size, size, size), skin)
    elif kind < 0.86:
        draft = Draft(world, "bag")
        high = size * rng.uniform(0.6, 1.2)
        draft.part("stone", (0, 0, high * 0.45), (size, size * 0.8, high), skin)
    else:
        draft = Draft(world, "toy")
        z = 0.0
        for _ in range(rng.integers(1, 5)):
            wide, high = size * rng.uniform(0.4, 1), size * rng.uniform(0.2, 0.7)
            kind_of = str(rng.choice(["shape", "soft", "rod", "cone", "vase", "stone", "wheel", "roof"]))
            draft.part(
                kind_of, (rng.normal(0, 0.1 * size), 0, z + high / 2), (wide, wide * rng.uniform(0.4, 1), high), skin
            )
            z += high * 0.9
            skin = world.material(*ANY, size=size)
    return draft


def rug(world: World) -> Draft:
    rng, draft = world.rng, Draft(world, "rug")
    wide, deep = rng.uniform(0.8, 2.6), rng.uniform(0.6, 1.8)
    skin = world.material("ornament", "cloth", "leaves", "rough", size=(wide, deep), fit=rng.random() < 0.5)
    draft.part("box" if rng.random() < 0.7 else "rod", (0, 0, 0.008), (wide, deep, 0.016), skin)
    return draft


STANDING = (cabinet, cabinet, shelf, shelf, sofa, bed, table, appliance, lamp, plant, chair)
FREE = (table, table, chair, chair, chair, stool, sofa, plant, cabinet, person, trinket)
