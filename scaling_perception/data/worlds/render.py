"""A world by its number: what kind it is, from where it is seen, what moves, and every array that is known of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from scaling_perception.data.worlds import camera as film_of
from scaling_perception.data.worlds import layout, outdoors
from scaling_perception.data.worlds.build import CLASSES, PARTS, Camera, World, look, turned
from scaling_perception.data.worlds.frame import Frame, Surface
from scaling_perception.data.worlds.light import dither, irradiance, smooth
from scaling_perception.data.worlds.trace import Hits, Tracer
from scaling_perception.support.errors import UserError, did_you_mean

Array = np.ndarray
_SALT = 0x30A1D5
_WHITEST = 0.94  # of things in `whole`: darker than the threshold that tells the white ground
KINDS = {
    "room": 0.42, "corridor": 0.06, "table": 0.1, "heap": 0.08,
    "street": 0.12, "open": 0.1, "wallpaper": 0.12, "sky": 0.0,
}  # fmt: skip
"""Kind of world -> its share; ``sky`` only where it is asked for."""
_FLYING = ("wallpaper", "sky")
_ATTEMPTS = 6


def render_world(
    index: int, resolution: int = 128, frames: int = 2, kind: str = "", without: str = ""
) -> dict[str, Any]:
    """World number ``index`` with everything that is known about it. Pixel centres are integers.

    Args:
        index: 0 or more. resolution: pixels a side, 16 to 2048. frames: 2, or 1 without a second frame and flow.
        kind: one of ``KINDS``, or '' for any by their shares. without: some of ``PARTS``, joined by +, for ablations:
        the same world otherwise.

    Returns:
        key str; image uint8 (R, R, 3); depth float32 (R, R) metres along the optical axis, 0 where there is sky;
        normals float32 (R, R, 3) of the triangle seen, unit, x right, y down, z away from the camera (so z < 0), 0 in
        the sky; valid bool (R, R) not sky; visible_mask, whole_mask bool (R, R) seen part and whole silhouette of the
        target; whole uint8 (R, R, 3) the target alone, lit as in the world, on white; label int number of
        ``CLASSES``; intrinsics float32 (3, 3). With two frames also image2 uint8 (R, R, 3), depth2 float32 (R, R), flow
        float32 (R, R, 2) pixels, u right and v down, of the point seen in ``image`` to ``image2``, also of the sky;
        occluded bool (R, R) that point is hidden or outside the frame in ``image2``.

    Raises:
        UserError: a number out of range or no integer, an unknown kind or part, or ``embreex`` is not installed.
    """
    for name, value, least, most in (
        ("index", index, 0, None),
        ("resolution", resolution, 16, 2048),
        ("frames", frames, 1, 2),
    ):
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or value < least or (most is not None and value > most):
            span = f"from {least} to {most}" if most else f"of {least} or more"
            raise UserError(f"{name} {value!r} of a world: give an integer {span}")
    if kind and kind not in KINDS:
        raise UserError(f"unknown kind of world '{kind}': choose from {', '.join(KINDS)}")
    parts = parts_of(without)
    index, resolution = int(index), int(resolution)
    for attempt in range(100):
        plan, motion, grain = (
            np.random.default_rng(s) for s in np.random.SeedSequence([index, attempt, _SALT]).spawn(3)
        )
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            out = _render(f"world-{index:010d}", World(plan, parts), motion, grain, resolution, frames, kind)
        if out is not None:
            return out
    raise AssertionError(f"world {index} shows nothing in 100 attempts")


def parts_of(without: str) -> tuple[str, ...]:
    """The parts of ``PARTS`` that a text names, joined by +, each once and in their order.

    Raises:
        UserError: another name.
    """
    parts = tuple(sorted(set(without.split("+")))) if without else ()
    for part in parts:
        if part not in PARTS:
            raise UserError(f"worlds cannot be without '{part}'{did_you_mean(part, PARTS)}")
    return parts


def _render(
    key: str,
    world: World,
    motion: np.random.Generator,
    grain: np.random.Generator,
    resolution: int,
    frames: int,
    kind: str,
) -> dict[str, Any] | None:
    plan = world.rng
    kind = kind or str(plan.choice(list(KINDS), p=list(KINDS.values())))
    view = _compose(world, kind)
    mesh, table = world.triangles(), world.table()
    tracer = Tracer.of(mesh)
    camera = view(tracer, mesh)
    film = film_of.choose(plan)
    film = film_of.plain(film) if "film" in world.without else film
    if camera is None:
        return None
    target = _target(world, mesh, tracer, camera, plan)
    if target is None:
        return None
    first = Frame(world, mesh, table, camera, resolution, tracer)
    light, centre, lit = first.picture()
    gain = film.key / max(float(np.quantile(light.mean(axis=2), 0.6)), 0.01)
    seen, shape = first.centre, (resolution, resolution)
    focal, middle = camera.focal * resolution, (resolution - 1) / 2
    whole_mask, whole = _whole(first, target, centre, lit, film, gain)
    normals = (seen.flat @ camera.axes.T.astype(np.float32)) * seen.met[:, None]
    out = {
        "key": key,
        "image": film_of.expose(film, light, gain, grain),
        "depth": seen.depth.reshape(shape),
        "normals": normals.astype(np.float32).reshape(*shape, 3),
        "valid": seen.met.reshape(shape),
        "visible_mask": (seen.owner == target).reshape(shape),
        "whole_mask": whole_mask,
        "whole": whole,
        "label": CLASSES.index(world.things[target].label) if world.things[target].label in CLASSES else 0,
        "intrinsics": np.array([[focal, 0, middle], [0, focal, middle], [0, 0, 1]], np.float32),
    }
    if frames == 2:
        camera2 = _calm(world, first, _move(world, camera, kind, seen, motion))
        mesh2 = mesh
        if world.motion:
            corners = world.moved(mesh["corners"].reshape(-1, 3), np.repeat(mesh["owner"], 3))
            normals2 = world.turned(mesh["normals"].reshape(-1, 3), np.repeat(mesh["owner"], 3))
            mesh2 = {**mesh, "corners": corners.reshape(-1, 3, 3), "normals": normals2.reshape(-1, 3, 3)}
        second = Frame(world, mesh2, table, camera2, resolution, None if world.motion else tracer)
        out["image2"] = film_of.expose(film, second.picture()[0], gain, grain)
        out["depth2"] = second.centre.depth.reshape(shape)
        flow, occluded = _flow(world, first, second)
        out["flow"], out["occluded"] = flow.reshape(*shape, 2), occluded.reshape(shape)
    return out


def _compose(world: World, kind: str) -> Any:
    """Fill the world; returns what chooses a camera, given its triangles."""
    rng = world.rng
    fov = rng.uniform(35, 90) * np.pi / 180
    roll = rng.normal(0, 0.06) if rng.random() < 0.85 else rng.uniform(-0.6, 0.6)
    if kind in _FLYING:
        far = 10.0 if kind == "wallpaper" else 100.0  # where shadows on the sky are too small to be seen
        wide = 2 * far * np.tan(fov / 2)
        layout.wallpaper(world, layout.pattern(world) if kind == "wallpaper" else layout.vista(world, wide), far)
        return lambda tracer, mesh: look(np.zeros(3), np.array([0, 1.0, 0]), roll * 3, fov)
    if kind in ("street", "open"):
        size = outdoors.street(world) if kind == "street" else outdoors.open_ground(world)

        def place() -> tuple[Array, Array]:
            if kind == "street":
                eye = np.array(
                    [
                        rng.uniform(-1, 1) * (size + 1),
                        rng.uniform(-4, 12),
                        rng.choice([rng.uniform(0.5, 2.2), rng.uniform(2, 9)], p=[0.75, 0.25]),
                    ]
                )
                yaw = rng.normal(0, 0.35) if rng.random() < 0.7 else rng.uniform(-1.6, 1.6)
            else:
                eye = np.array(
                    [
                        rng.normal(0, 3),
                        rng.uniform(-3, 4),
                        rng.choice([rng.uniform(0.4, 2.2), rng.uniform(2, 12)], p=[0.75, 0.25]),
                    ]
                )
                yaw = rng.normal(0, 0.5)
            tilt = rng.normal(-0.08, 0.16) - 0.04 * eye[2]
            return eye, eye + np.array([np.sin(yaw) * np.cos(tilt), np.cos(yaw) * np.cos(tilt), np.sin(tilt)])

        return lambda tracer, mesh: _best(rng, tracer, mesh, place, roll, fov, 0.6, 2.0)
    if kind == "table":
        size, middle = layout.table_top(world)

        def near() -> tuple[Array, Array]:
            around, away, up = rng.uniform(0, 6.3), rng.uniform(0.45, 1.7), rng.uniform(0.08, 1.0)
            eye = middle + (np.cos(around) * away, np.sin(around) * away, up)
            eye[:2] = np.clip(eye[:2], -size[:2] + 0.1, size[:2] - 0.1)
            return eye, middle + rng.normal(0, 0.15, 3)

        return lambda tracer, mesh: _best(rng, tracer, mesh, near, roll, fov, 0.12, 0.4)
    size = {"room": layout.room, "corridor": layout.corridor, "heap": layout.heap}[kind](world)

    def within() -> tuple[Array, Array]:
        high = rng.uniform(0.3, size[2] - 0.25) if rng.random() < 0.4 else rng.uniform(1.0, min(1.8, size[2] - 0.25))
        eye = np.array([*rng.uniform(-0.9, 0.9, 2) * size[:2], high])
        target = np.array([*rng.uniform(-0.9, 0.9, 2) * size[:2], rng.uniform(0.0, 0.75) * size[2]])
        if kind == "corridor" and rng.random() < 0.7:
            target[1] = -np.sign(eye[1]) * size[1]
        flat = np.linalg.norm(target[:2] - eye[:2])
        reach = 0.62 * max(flat, 0.3)  # at most 32 degrees up or down
        target[2] = np.clip(target[2], eye[2] - reach, eye[2] + reach)
        return eye, target

    return lambda tracer, mesh: _best(rng, tracer, mesh, within, roll, fov, 0.25, 0.8)


def _coarse(tracer: Tracer, camera: Camera, side: int = 20) -> tuple[Array, Hits]:
    line = np.arange(side, dtype=np.float32)
    x, y = (v.reshape(-1) for v in np.meshgrid(line, line))
    rays = camera.rays(x, y, side)
    return rays, tracer.cast(np.broadcast_to(camera.eye.astype(np.float32), rays.shape), rays)


def _best(
    rng: np.random.Generator,
    tracer: Tracer,
    mesh: dict[str, Array],
    place: Any,
    roll: float,
    fov: float,
    least: float,
    middle: float,
) -> Camera | None:
    """Of a few cameras the one that sees most things, none too near."""
    best, score = None, -1.0
    for _ in range(_ATTEMPTS):
        eye, target = place()
        camera = look(eye, target, roll, fov)
        _, hits = _coarse(tracer, camera, 16)
        far = hits.far[hits.face >= 0]
        if far.size < 80 or np.quantile(far, 0.02) < least or np.median(far) < middle:
            continue
        owner = mesh["owner"][hits.face[hits.face >= 0]]
        seen = len(np.unique(owner[owner >= 0])) * rng.uniform(0.5, 1) + 4 * np.ptp(
            np.quantile(np.log(far), (0.1, 0.9))
        )
        if seen > score:
            best, score = camera, seen
    return best


def _target(
    world: World, mesh: dict[str, Array], tracer: Tracer, camera: Camera, rng: np.random.Generator
) -> int | None:
    """A thing that is seen, rather one that is partly hidden; None if nothing is seen well."""
    side = 48
    rays, hits = _coarse(tracer, camera, side)
    owner = np.where(hits.face >= 0, mesh["owner"][np.maximum(hits.face, 0)], -1)
    numbers, counts = np.unique(owner[owner >= 0], return_counts=True)
    large = numbers[(counts >= 0.012 * side * side)]
    large = large[[world.things[n].label != "wall" for n in large]] if large.size else large
    if not large.size:
        return None
    best, score = int(large[0]), -1.0
    for number in rng.permutation(large)[:4]:
        alone = Tracer(mesh["corners"][mesh["owner"] == number])
        whole = int((alone.cast(np.broadcast_to(camera.eye.astype(np.float32), rays.shape), rays).face >= 0).sum())
        hidden = 1 - counts[numbers == number][0] / max(whole, 1)
        value = rng.uniform(0.5, 1) * (hidden > 0.08) * (whole < 0.8 * side * side) + 0.2 * rng.random()
        if value > score:
            best, score = int(number), value
    return best


def _move(world: World, camera: Camera, kind: str, seen: Surface, rng: np.random.Generator) -> Camera:
    """Choose what moves, and the second camera."""
    if kind in _FLYING:
        _fly(world, camera, rng)
        return camera
    depth = float(np.median(seen.depth[seen.met]))
    size = np.exp(rng.uniform(np.log(0.004), np.log(0.12))) * depth
    step = rng.normal(0, 1, 3) * (1, 0.6, 1) * size
    turn = rng.normal(0, 1, 3) * np.exp(rng.uniform(np.log(0.002), np.log(0.07)))
    if rng.random() < 0.25:
        turn = turn * 0
    axes = turned(turn[2], turn[0], turn[1]) @ camera.axes
    centre = seen.points[seen.met]
    for number in np.unique(seen.owner[seen.owner >= 0]):
        thing = world.things[number]
        if not thing.moves or rng.random() < 0.72:
            continue
        away = float(np.linalg.norm(thing.at - camera.eye))
        matrix = turned(rng.normal(0, 0.25), *(rng.normal(0, 0.1, 2) * (rng.random() < 0.3)))
        shift = (
            rng.normal(0, 1, 3)
            * (1, 1, 0.15 if kind != "heap" else 1)
            * away
            * np.exp(rng.uniform(np.log(0.01), np.log(0.15)))
        )
        world.motion[int(number)] = (matrix, thing.at - matrix @ thing.at + shift)
    del centre
    return Camera(camera.eye + step @ camera.axes, axes, camera.focal)


def _calm(world: World, first: Frame, camera: Camera) -> Camera:
    """Halve all motion until no point leaves by more than the picture's size, or gets behind the second camera."""
    still, most = first.camera, 0.9 * first.resolution
    for _ in range(12):
        points = _destinations(world, first)
        x, y, depth = camera.project(points, first.resolution)
        if depth.min() > 0.02 and np.hypot(x - first.x, y - first.y).max() < most:
            return camera
        one = np.eye(3)
        world.motion = {k: (one + (matrix - one) / 2, shift / 2) for k, (matrix, shift) in world.motion.items()}
        left, _, right = np.linalg.svd(still.axes + camera.axes)
        camera = Camera((still.eye + camera.eye) / 2, left @ right, still.focal)
    world.motion = {}
    return still


def _destinations(world: World, first: Frame) -> Array:
    """Where the points seen in the first frame are in the second, float32 (N, 3); of the sky, far away."""
    seen = first.centre
    far = np.where(seen.met[:, None], seen.points, first.camera.eye + seen.rays * np.float32(1e5))
    return world.moved(far.astype(np.float32), np.maximum(seen.owner, -1))


def _fly(world: World, camera: Camera, rng: np.random.Generator) -> None:
    """Affine motions parallel to the picture, as large and as varied as in FlyingChairs."""

    def affine(middle: Array, reach: float, turn: float, zoom: float) -> tuple[Array, Array]:
        angle, grow = rng.normal(0, turn), np.exp(rng.normal(0, zoom))
        about = turned(0, 0, angle) * grow
        about[1] = (0, 1, 0)  # the depth stays
        away = reach * rng.gamma(0.6) * middle[1] / camera.focal
        way = rng.uniform(0, 2 * np.pi)
        shift = np.array([np.cos(way) * away, 0, np.sin(way) * away])
        return about, middle - about @ middle + shift

    back = affine(np.array([0, world.things[0].extent[1], 0]), 0.02, 0.04, 0.04)
    world.motion[0] = back
    for number, thing in enumerate(world.things[1:], 1):
        own = affine(thing.at, 0.035, 0.12, 0.08)
        scale = thing.at[1] / world.things[0].extent[1]  # a shift of the background looks the same at this depth
        matrix = own[0] @ back[0]
        world.motion[number] = (matrix, own[0] @ (back[1] * (scale, 1, scale)) + own[1])


def _flow(world: World, first: Frame, second: Frame) -> tuple[Array, Array]:
    """Flow (N, 2) of the points seen in the first frame, and whether they are hidden or outside in the second."""
    camera, size = second.camera, first.resolution
    points = _destinations(world, first)
    x, y, depth = camera.project(points, size)
    flow = np.stack([x - first.x, y - first.y], axis=1).astype(np.float32)
    edge = size - 0.5
    hidden = (depth < 0.02) | (x < -0.5) | (y < -0.5) | (x > edge) | (y > edge)
    inside = np.flatnonzero(~hidden)
    way = (points[inside] - camera.eye).astype(np.float32)
    hits = second.tracer.cast(np.broadcast_to(camera.eye.astype(np.float32), way.shape), way)
    hidden[inside] = hits.far < 0.995
    return flow, hidden


def _whole(
    first: Frame, target: int, centre: Array, lit: Array, film: film_of.Film, gain: float
) -> tuple[Array, Array]:
    """The target's silhouette (R, R) and its picture uint8 (R, R, 3) on white."""
    size, seen = first.resolution, first.centre
    mine = first.mesh["owner"] == target
    number = np.flatnonzero(mine)
    alone = Tracer(first.mesh["corners"][mine])
    eye = np.broadcast_to(first.camera.eye.astype(np.float32), seen.rays.shape)
    hits = alone.cast(eye, seen.rays)
    mask = (hits.face >= 0) | (seen.owner == target)
    colour = centre.reshape(-1, 3).copy()
    hidden = np.flatnonzero(mask & (seen.owner != target))
    if hidden.size:
        few = Hits(
            np.where(hits.face[hidden] >= 0, number[hits.face[hidden]], -1), hits.far[hidden], hits.weights[hidden]
        )
        surface = Surface(first, first.x[hidden], first.y[hidden], few)
        chance = dither(first.x[hidden], first.y[hidden], 5)
        sharp, soft = irradiance(
            first.world, first.tracer, first.mesh, first.table, surface.points, surface.normals, chance
        )
        light, points, normals, depth = lit.copy(), seen.points.copy(), seen.normals.copy(), seen.depth.copy()
        light[hidden], points[hidden], normals[hidden], depth[hidden] = (
            soft,
            surface.points,
            surface.normals,
            surface.depth,
        )
        shape = (size, size, 3)
        depth = np.where(depth > 0, depth, 1).reshape(size, size)
        light = smooth(light.reshape(shape), points.reshape(shape), normals.reshape(shape), depth, (1, 3)).reshape(
            -1, 3
        )
        colour[hidden] = first.shade(surface, light[hidden] + sharp, np.zeros_like(sharp))
    picture = np.minimum(film_of.develop(film, colour.reshape(size, size, 3), gain), _WHITEST)
    mask = mask.reshape(size, size)
    picture = np.where(mask[..., None], picture, 1)
    return mask, np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)
