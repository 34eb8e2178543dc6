"""The random composition of a procedural scene: room or open ground, things, target, camera and motion."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy.spatial.transform import Rotation

from scaling_perception.data.scenes.geometry import (
    BALL,
    BOX,
    CYLINDER,
    Camera,
    Geometry,
    Solid,
    Thing,
    assemble,
    cast,
    make_thing,
    rotation_about,
    yaw,
)
from scaling_perception.data.scenes.objects import CLASSES, MAKERS, Palette, scaled
from scaling_perception.data.scenes.shading import Light, Look, Tables, material_tables

Array = np.ndarray
GRID = 36
"""Rays a side of the coarse picture that decisions are taken on, whatever the resolution."""

_INDOOR = ("table", "chair", "stool", "shelf", "cabinet", "sofa", "lamp", "bed", "single", "single", "arch")
_OUTDOOR = ("tree", "tree", "house", "single", "single", "snowman", "arch", "lamp", "stool", "table")
_WALL_SIDE = ("shelf", "cabinet", "sofa", "bed", "table", "cabinet")


@dataclasses.dataclass
class Scene:
    """All that a renderer needs; ``size`` is the half size (3,) of the surroundings, ``target`` numbers a thing."""

    surroundings: Solid
    size: Array
    indoor: bool
    things: list[Thing]
    target: int
    tables: Tables
    lights: list[Light]
    look: Look
    camera: Camera
    camera2: Camera


class _Coarse:
    """The coarse grid of rays."""

    def __init__(self, camera: Camera) -> None:
        line = np.arange(GRID, dtype=np.float32)
        self.camera = camera
        self.x, self.y = (v.reshape(-1) for v in np.meshgrid(line, line))
        self.rays = camera.rays(self.x, self.y, GRID)

    def cast(self, geometry: Geometry, things: list[int] | None = None) -> tuple[Array, Array]:
        return cast(geometry, self.camera, self.x, self.y, GRID, self.rays, things)[:2]


def compose(rng: np.random.Generator) -> Scene:
    """NoiseKeys a scene; layouts whose target is lost (behind a wall, off the frame) are drawn again."""
    scene, good = _draw(rng)
    for _ in range(8):
        if good:
            break
        scene, good = _draw(rng)
    return scene


def _draw(rng: np.random.Generator) -> tuple[Scene, bool]:
    palette = Palette(rng)
    indoor = bool(rng.random() < 0.68)
    if indoor:
        size = np.array([rng.uniform(1.6, 4.2), rng.uniform(1.6, 4.2), rng.uniform(1.1, 1.9)], np.float32)
    else:
        size = np.array([rng.uniform(3.5, 8.5), rng.uniform(3.5, 8.5), rng.uniform(2, 5)], np.float32)
    surroundings = Solid(BOX, (0.0, 0.0, float(size[2])), tuple(size.tolist()), palette.surroundings(indoor))
    camera = _camera(rng, size, indoor)
    coarse = _Coarse(camera)
    things: list[Thing] = []
    if not indoor:
        _hills(rng, palette, things, size, camera)
    target = _target(rng, palette, surroundings, coarse, size, indoor)
    things.append(target)
    _furnish(rng, palette, things, camera, size, indoor)
    things = _uncover(rng, palette, things, target, surroundings, coarse)
    geometry = assemble(surroundings, things)
    depth, solid = coarse.cast(geometry)
    number = next(i for i, t in enumerate(things) if t is target)
    whole = coarse.cast(geometry, [number])[1] > 0
    area, seen = float(whole.mean()), float((geometry.owner[solid] == number).mean())
    # A wall or a thing in the face of the camera leaves nothing to perceive.
    good = 0.035 < area < 0.45 and seen > 0.28 * area and float(np.median(depth)) > 1.0 and float(depth.min()) > 0.5
    lights, look = _light(rng, size, indoor, camera)
    scene = Scene(
        surroundings, size, indoor, things, number, material_tables(palette.materials), lights, look, camera, camera
    )
    _move(rng, scene, geometry, coarse, depth, solid)
    return scene, good


def _look_at(heading: float, pitch: float, roll: float) -> Array:
    forward = np.array([math.cos(pitch) * math.cos(heading), math.cos(pitch) * math.sin(heading), math.sin(pitch)])
    right = np.cross(forward, [0, 0, 1.0])
    right /= np.linalg.norm(right)
    frame = np.stack([right, np.cross(forward, right), forward])
    c, s = math.cos(roll), math.sin(roll)
    return (np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) @ frame).astype(np.float32)


def _camera(rng: np.random.Generator, size: Array, indoor: bool) -> Camera:
    heading = rng.uniform(0, 2 * np.pi)
    forward = np.array([math.cos(heading), math.sin(heading)])
    back = rng.uniform(0.35, 0.85) if indoor else rng.uniform(0.0, 0.6)
    side = rng.uniform(-0.4, 0.4)
    place = -forward * back * size[:2] + np.array([-forward[1], forward[0]]) * side * size[:2]
    place = np.clip(place, -size[:2] + 0.35, size[:2] - 0.35)
    tall = 2 * float(size[2])
    height = min(rng.uniform(0.5, 2.0) if rng.random() < 0.75 else rng.uniform(0.25, 2.6), tall - 0.3)
    pitch = np.clip(rng.normal(-0.14, 0.2) - 0.12 * (height - 1.2), -0.75, 0.4)
    roll = np.clip(rng.normal(0, 0.05), -0.15, 0.15)
    focal = 0.5 / math.tan(math.radians(rng.uniform(38, 88)) / 2)
    heading += rng.normal(0, 0.25)
    return Camera(_look_at(heading, float(pitch), float(roll)), np.array([*place, height], np.float32), float(focal))


def _hills(rng: np.random.Generator, palette: Palette, things: list[Thing], size: Array, camera: Camera) -> None:
    for _ in range(int(rng.integers(0, 4))):
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.75, 1.0)
        place = np.array([math.cos(angle) * size[0], math.sin(angle) * size[1], rng.uniform(-1, 0)]) * reach
        half: tuple[float, float, float] = (rng.uniform(1.5, 5), rng.uniform(1.5, 5), rng.uniform(0.8, 3))
        if np.linalg.norm((place[:2] - camera.eye[:2]) / np.array(half[:2])) < 1.3:
            continue
        if rng.random() < 0.6:
            material = palette.add(("noise rough", "leaves", "noise middle", "blotches"), 0.5, 6)
            solid = Solid(BALL, (0, 0, 0), half, material)
        else:
            material = palette.add(("windows", "bricks", "blocks", "planks"), 0.4, 4)
            solid = Solid(BOX, (0, 0, 0), (half[0] / 2, half[1] / 2, half[2]), material)
        things.append(make_thing(CLASSES.index("house"), [solid], place, yaw(rng.uniform(0, np.pi)), backdrop=True))


def _spin(rng: np.random.Generator) -> Array:
    return rotation_about(rng.normal(size=3), rng.uniform(0, np.pi))


def _inside(size: Array, place: Array, radius: float) -> bool:
    low = place[2] > radius * 0.8 and place[2] < 2 * size[2] - radius * 0.8
    return bool(low and (np.abs(place[:2]) < size[:2] - radius * 0.7).all())


def _target(
    rng: np.random.Generator,
    palette: Palette,
    surroundings: Solid,
    coarse: _Coarse,
    size: Array,
    indoor: bool,
) -> Thing:
    """A thing whose whole covers a wished share of the frame and mostly lies inside it; the best of a few tries."""
    camera = coarse.camera
    best, best_score = None, np.inf
    name = str(rng.choice(_INDOOR if indoor else _OUTDOOR))
    kind, solids = MAKERS[name](rng, palette)
    label = CLASSES.index(kind)
    standing = rng.random() < (0.55 if name == "single" else 0.85)
    wanted = math.exp(rng.uniform(math.log(0.07), math.log(0.32)))
    factor = 1.0
    angle = rng.uniform(0, 2 * np.pi)
    for attempt in range(9):
        spread = 0.5 * (1 - attempt / 12)
        across, down = rng.uniform(-spread, spread, 2) * 0.6
        distance = rng.uniform(1.5, 4.5) if indoor else rng.uniform(1.8, 6.0)
        ray = camera.rotation.T @ np.array([across / camera.focal, down / camera.focal, 1.0])
        place = camera.eye + ray * distance
        scaled_solids = scaled(solids, factor)
        if standing:
            place[2] = 0
            thing = make_thing(label, scaled_solids, place, yaw(angle))
        else:
            thing = make_thing(label, scaled_solids, place, _spin(rng) if name == "single" else yaw(angle))
            thing.position = place.astype(np.float32)
        if np.linalg.norm(thing.position - camera.eye) < thing.radius + 0.55:
            factor *= 0.8
            continue
        hit = coarse.cast(assemble(surroundings, [thing]), [0])[1] > 0
        area = float(hit.mean())
        rim = hit.reshape(GRID, GRID)
        cut = float((rim[0].sum() + rim[-1].sum() + rim[:, 0].sum() + rim[:, -1].sum()) / max(hit.sum(), 1) * 2)
        out = 0.0 if _inside(size, thing.position, thing.radius) or (standing and indoor) else 0.7
        walls = np.abs(thing.position[:2]) + thing.radius * 0.6 > size[:2]
        out += 0.8 * float(walls.any())
        score = abs(math.log(max(area, 1e-4) / wanted)) + 2.0 * cut + out
        if score < best_score:
            best, best_score = thing, score
        if score < 0.35:
            break
        if area > 0.002:
            factor *= float(np.clip(math.sqrt(wanted / area), 0.6, 1.6))
            factor = float(np.clip(factor, 0.35, 2.2))
    if best is None:
        radius = 0.3
        place = camera.eye + camera.rotation[2] * 1.5
        best = make_thing(1, [Solid(BALL, (0, 0, 0), (radius, radius, radius), palette.add())], place, yaw(0))
    return best


def _furnish(
    rng: np.random.Generator, palette: Palette, things: list[Thing], camera: Camera, size: Array, indoor: bool
) -> None:
    """Furniture along walls, things about the floor and on tables, and things in the air."""
    wanted = int(rng.integers(5, 14))
    if indoor:
        for _ in range(int(rng.integers(1, 5))):
            kind, solids = MAKERS[str(rng.choice(_WALL_SIDE))](rng, palette)
            side = int(rng.integers(4))
            thing = make_thing(CLASSES.index(kind), solids, np.zeros(3), yaw(side * np.pi / 2))
            # A quarter turn counter-clockwise each: the back (+y) looks to +y, -x, -y, +x.
            axis, sign = ((1, 1), (0, -1), (1, -1), (0, 1))[side]
            depth = max(s.centre[1] + s.half[1] for s in thing.solids)
            thing.position[axis] += sign * (size[axis] - depth - 0.02)
            thing.position[1 - axis] += rng.uniform(-1, 1) * max(size[1 - axis] - thing.radius * 0.7, 0)
            _keep(things, thing, camera, 0.6)
            wanted -= 1
    reach = float(min(6.5, size[:2].max()))
    flying = int(rng.integers(1, 4))
    for number in range(max(wanted, 5)):
        distance = math.exp(rng.uniform(math.log(1.1), math.log(reach)))
        across = rng.uniform(-0.6, 0.6) / camera.focal
        if number < flying:
            ray = camera.rotation.T @ np.array([across, rng.uniform(-0.6, 0.6) / camera.focal, 1.0])
            place = camera.eye + ray * distance
            kind, solids = MAKERS["single" if rng.random() < 0.8 else "snowman"](rng, palette)
            solids = scaled(solids, float(np.clip(distance / 3, 0.3, 1.2)))
            thing = make_thing(CLASSES.index(kind), solids, place, _spin(rng))
            if not _inside(size, thing.position, thing.radius):
                continue
            _keep(things, thing, camera, 0.9)
            continue
        forward = camera.rotation[2] * [1, 1, 0]
        forward /= np.linalg.norm(forward)
        place = camera.eye + distance * forward + distance * across * camera.rotation[0]
        place[:2] = np.clip(place[:2], -size[:2] + 0.4, size[:2] - 0.4)
        place[2] = 0
        name = "single" if rng.random() < 0.5 else str(rng.choice(_INDOOR if indoor else _OUTDOOR))
        kind, solids = MAKERS[name](rng, palette)
        if name == "single" and rng.random() < 0.5:
            table = [t for t in things if CLASSES[t.label] in ("table", "cabinet", "stool") and not t.backdrop]
            if table:
                below = table[int(rng.integers(len(table)))]
                solids = scaled(solids, 0.5)
                place = below.position + rng.uniform(-0.15, 0.15, 3).astype(np.float32)
                place[2] = below.position[2] + max(s.centre[2] + s.half[2] for s in below.solids)
                thing = make_thing(CLASSES.index(kind), solids, place, yaw(rng.uniform(0, 2 * np.pi)))
                if np.linalg.norm(thing.position - camera.eye) > thing.radius + 0.35:
                    things.append(thing)
                continue
        _keep(things, make_thing(CLASSES.index(kind), solids, place, yaw(rng.uniform(0, 2 * np.pi))), camera, 0.55)


def _keep(things: list[Thing], thing: Thing, camera: Camera, gap: float) -> bool:
    """Add a thing if it clears the camera and the others (spheres shrunk by ``gap``)."""
    if np.linalg.norm(thing.position - camera.eye) < thing.radius + 0.5:
        return False
    for other in things:
        if not other.backdrop:
            apart = np.linalg.norm((thing.position - other.position)[: 2 if gap < 0.8 else 3])
            if apart < gap * (thing.radius + other.radius):
                return False
    things.append(thing)
    return True


def _uncover(
    rng: np.random.Generator,
    palette: Palette,
    things: list[Thing],
    target: Thing,
    surroundings: Solid,
    coarse: _Coarse,
) -> list[Thing]:
    """Take away or put in front what makes the visible share of the target about as wished."""
    wanted = 1.0 if rng.random() < 0.1 else rng.uniform(0.4, 0.93)
    number = next(i for i, t in enumerate(things) if t is target)
    geometry = assemble(surroundings, things)
    alone, _ = coarse.cast(geometry, [number])
    whole = np.isfinite(alone)
    count = max(int(whole.sum()), 1)
    while True:
        depth, solid = coarse.cast(geometry)
        owner = geometry.owner[solid]
        seen = int((owner == number).sum()) / count
        hiding = owner[whole & (owner != number) & (depth < alone)]
        hiding = hiding[hiding >= 0]
        if seen > wanted - 0.12 or not hiding.size or len(things) <= 4:
            break
        worst = int(np.bincount(hiding).argmax())
        things = [t for i, t in enumerate(things) if i != worst]
        number = next(i for i, t in enumerate(things) if t is target)
        geometry = assemble(surroundings, things)
    if seen < wanted + 0.08 or not whole.any():
        return things
    visible = owner == number
    best, best_gap = None, abs(seen - wanted)
    camera = coarse.camera
    inside = np.flatnonzero(visible)
    for _ in range(14):
        pixel = int(rng.choice(inside))
        distance = float(alone[pixel]) * rng.uniform(0.5, 0.88)
        if distance < 0.75:
            continue
        width = math.sqrt(count) / GRID / camera.focal * distance
        place = camera.eye + coarse.rays[:, pixel] * distance
        thing = _cover(rng, palette, place, width * rng.uniform(0.3, 0.9))
        if np.linalg.norm(thing.position - camera.eye) < thing.radius * 0.8 + 0.5:
            continue
        hidden = coarse.cast(assemble(surroundings, [thing]), [0])[0] < depth
        share = int((visible & ~hidden).sum()) / count
        if share >= 0.28 and abs(share - wanted) < best_gap and hidden.mean() < 0.45:
            best, best_gap = thing, abs(share - wanted)
            if best_gap < 0.07:
                break
    return things if best is None else [*things, best]


def _cover(rng: np.random.Generator, palette: Palette, place: Array, half: float) -> Thing:
    """A single solid around ``place``, in the air or reaching down to the floor."""
    kind = int(rng.choice([BOX, BALL, CYLINDER], p=[0.45, 0.25, 0.3]))
    size = half * np.exp(rng.uniform(-0.5, 0.35, 3))
    if kind != BOX:
        size[1] = size[0]
    material = palette.add(calm=0.4, size=rng.uniform(0.4, 1.5))
    if kind != BALL and rng.random() < 0.6 and place[2] > 0.1:
        top = place[2] + size[2]
        return make_thing(kind, [Solid(kind, (0, 0, top / 2), (size[0], size[1], top / 2), material)],
                          np.array([place[0], place[1], 0]), yaw(rng.uniform(0, np.pi)))  # fmt: skip
    thing = make_thing(kind, [Solid(kind, (0, 0, 0), tuple(size), material)], place, _spin(rng))
    thing.position[2] = max(thing.position[2], float(size.min()))
    return thing


def _light(rng: np.random.Generator, size: Array, indoor: bool, camera: Camera) -> tuple[list[Light], Look]:
    def tint(strength: float, spread: float = 0.12) -> Array:
        warm = rng.normal(0, spread)
        return (strength * np.array([1 + warm, 1.0, 1 - warm])).clip(0.02).astype(np.float32)

    contrast = rng.uniform(0.6, 1.8)
    if indoor and rng.random() < 0.75:
        place = np.array([*(rng.uniform(-0.7, 0.7, 2) * size[:2]), 2 * size[2] - rng.uniform(0.05, 0.35)], np.float32)
        lights = [Light(place, tint(contrast), False, True)]
    else:
        direction = np.array([rng.normal(), rng.normal(), rng.uniform(0.5, 2.2)])
        if direction @ camera.rotation[2] > 0.2 and rng.random() < 0.6:
            direction[:2] *= -1  # mostly not against the light
        lights = [Light((direction / np.linalg.norm(direction)).astype(np.float32), tint(contrast), True, True)]
    for _ in range(int(rng.integers(0, 3))):
        place = np.array([*(rng.uniform(-0.8, 0.8, 2) * size[:2]), rng.uniform(0.5, 2) * size[2]], np.float32)
        lights.append(Light(place, tint(rng.uniform(0.1, 0.6), 0.2), False, False))
    ambient = rng.uniform(0.12, 0.5)
    haze = 0.0
    if rng.random() < 0.5:
        haze = rng.uniform(0, 0.05) if indoor else rng.uniform(0.005, 0.04)
    look = Look(
        sky=tint(ambient),
        ground=tint(ambient * rng.uniform(0.4, 0.9)),
        haze=float(haze),
        haze_colour=tint(rng.uniform(0.15, 0.5), 0.05),
        corner=float(rng.uniform(0.1, 0.5)),
        vignette=float(rng.uniform(0, 0.8)) if rng.random() < 0.5 else 0.0,
        gain=np.clip(rng.normal(1, 0.05, 3), 0.85, 1.15).astype(np.float32),
        noise=float(rng.uniform(0, 0.014)) if rng.random() < 0.7 else 0.0,
        gamma=1 / rng.uniform(1.9, 2.4),
    )
    return lights, look


def _move(
    rng: np.random.Generator, scene: Scene, geometry: Geometry, coarse: _Coarse, depth: Array, solid: Array
) -> None:
    """Second poses of camera and things, scaled until the coarse flow has the wished size (pixels of a 128 frame)."""
    camera = scene.camera
    pixel = 1 / (128 * camera.focal)
    middle = float(np.median(depth))
    wanted = float(np.clip(math.exp(rng.normal(math.log(3.8), 0.65)), 0.5, 13))
    shift = rng.normal(size=3) * [1, 0.5, 0.9] * middle * pixel * 4
    turn = rng.normal(size=3) * [0.6, 1, 0.5] * pixel * 3 * rng.choice([0.3, 1.0])
    moves: list[tuple[Array, Array]] = []
    for thing in scene.things:
        moving = not thing.backdrop and rng.random() < 0.45
        speed = min(math.exp(rng.normal(math.log(4), 0.6)), 16) * moving
        z = max(float(camera.rotation[2] @ (thing.position - camera.eye)), 0.4)
        step = rng.normal(size=3) * speed * pixel * z
        spin = rng.normal(size=3) * rng.choice([0.02, 0.12]) * moving
        if thing.position[2] - thing.radius < 0.1:
            step[2] = 0
            spin[:2] = 0
        moves.append((step.clip(-0.3 * z, 0.3 * z), spin))
    points = camera.eye[:, None] + coarse.rays * depth
    nearest = float(depth.min())
    factor = 1.0
    owner = geometry.owner[solid]
    scale = 1.0
    for _ in range(3):
        size = np.linalg.norm(shift) * factor
        factor *= min(1.0, 0.45 * nearest / max(size, 1e-6))
        scene.camera2 = Camera(
            (_turn(turn * factor) @ camera.rotation).astype(np.float32),
            (camera.eye + camera.rotation.T @ (shift * factor)).astype(np.float32),
            camera.focal,
        )
        still = scene.camera2.project(points, 128)
        before = camera.project(points, 128)
        mean = float(np.hypot(still[0] - before[0], still[1] - before[1]).mean())
        if abs(math.log(max(mean, 1e-3) / wanted)) < 0.1:
            break
        factor *= float(np.clip(wanted / max(mean, 1e-3), 0.1, 8))
    for _ in range(4):
        moved = points.copy()
        for number, (thing, (step, spin)) in enumerate(zip(scene.things, moves, strict=True)):
            thing.rotation2 = (_turn(spin * scale) @ thing.rotation).astype(np.float32)
            thing.position2 = (thing.position + step * scale).astype(np.float32)
            mine = np.flatnonzero(owner == number)
            if mine.size and np.any(step):
                moved[:, mine] = move(thing, points[:, mine])
        after = scene.camera2.project(moved, 128)
        before = camera.project(points, 128)
        lengths = np.hypot(after[0] - before[0], after[1] - before[1])
        longest = float(np.quantile(lengths, 0.99))
        if longest <= 26 and float(after[2].min()) > 0.15:
            break
        shrink = 0.6
        scale *= shrink
        factor *= shrink
        scene.camera2 = Camera(
            (_turn(turn * factor) @ camera.rotation).astype(np.float32),
            (camera.eye + camera.rotation.T @ (shift * factor)).astype(np.float32),
            camera.focal,
        )


def move(thing: Thing, points: Array) -> Array:
    """World points (3, N) of a thing in frame 1 to where they are in frame 2."""
    if thing.rotation2 is None or thing.position2 is None:
        return points
    local = thing.rotation.T @ (points - thing.position[:, None])
    return thing.rotation2 @ local + thing.position2[:, None]


def _turn(vector: Array) -> Array:
    angle = float(np.linalg.norm(vector))
    return np.eye(3, dtype=np.float32) if angle < 1e-9 else rotation_about(vector, angle)


def between(scene: Scene, first: float, second: float) -> Scene:
    """The scene at two times, where 0 is its first frame and 1 its second: things and camera move evenly."""

    def turned(one: Array, other: Array, share: float) -> Array:
        turn = Rotation.from_matrix(np.asarray(other, np.float64) @ np.asarray(one, np.float64).T).as_rotvec()
        return (Rotation.from_rotvec(share * turn).as_matrix() @ one).astype(np.float32)

    def moved(one: Array, other: Array, share: float) -> Array:
        return (one + share * (other - one)).astype(np.float32)

    def camera(share: float) -> Camera:
        one, other = scene.camera, scene.camera2
        return Camera(turned(one.rotation, other.rotation, share), moved(one.eye, other.eye, share), scene.camera.focal)

    things = []
    for thing in scene.things:
        if thing.rotation2 is None or thing.position2 is None:
            things.append(thing)
            continue
        turns = [turned(thing.rotation, thing.rotation2, share) for share in (first, second)]
        places = [moved(thing.position, thing.position2, share) for share in (first, second)]
        poses = {"rotation": turns[0], "position": places[0], "rotation2": turns[1], "position2": places[1]}
        things.append(dataclasses.replace(thing, **poses))
    return dataclasses.replace(scene, things=things, camera=camera(first), camera2=camera(second))
