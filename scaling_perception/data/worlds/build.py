"""Putting a world together: materials, drafts of things, their places, and the triangles of both frames."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from scaling_perception.data.worlds.bank import bank
from scaling_perception.data.worlds.meshes import catalogue, shared_corners

Array = np.ndarray

CLASSES = (
    "box",
    "ball",
    "vase",
    "book",
    "toy",
    "table",
    "chair",
    "stool",
    "shelf",
    "cabinet",
    "bed",
    "sofa",
    "lamp",
    "plant",
    "appliance",
    "picture",
    "curtain",
    "bag",
    "person",
    "car",
    "tree",
    "bush",
    "rock",
    "house",
    "pole",
    "sign",
    "bin",
    "fence",
    "rug",
    "bicycle",
)
"""What ``label`` counts."""
PARTS = ("clutter", "textures", "shadows", "film")
"""What a world can be made without: small things on furniture; patterns, whose mean colour is left; whatever comes
between a surface and the light; colour casts, blur, noise and compression."""


def dot(a: Array, b: Array) -> Array:
    """Inner products (…,) of vectors (…, 3): faster than a reduction along a short axis."""
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def norm(a: Array) -> Array:
    """Lengths (…,) of vectors (…, 3)."""
    return np.sqrt(dot(a, a))


def rows(table: Array, index: Array) -> Array:
    """Rows ``index`` (N,) of a table (M, C): (N, C) with contiguous columns.

    In this order NumPy scales and adds rows of three several times as fast as with contiguous rows.
    """
    return table.T.take(index, axis=1).T


def either(where: Array, first: Array, second: Array) -> Array:
    """Rows (N, 3) of ``first`` where (N,), of ``second`` elsewhere: ``np.where`` is slow along a short axis."""
    return np.stack([np.where(where, first[:, c], second[:, c]) for c in range(3)]).T


class Material(NamedTuple):
    """One row of the table of materials; colours are linear."""

    texture: int
    size: tuple[float, float]
    shift: tuple[float, float]
    turn: float
    tint: tuple[float, float, float]
    flat: float
    vivid: float
    stain: int
    stained: float
    stain_size: float
    gloss: float
    glow: tuple[float, float, float]
    pane: bool


class Part(NamedTuple):
    body: int
    centre: tuple[float, float, float]
    size: tuple[float, float, float]
    turn: Array | None
    material: int


class Light(NamedTuple):
    """A sun (``edges`` None, ``place`` the way to it, ``spread`` its radius), or a rectangle facing ``normal``."""

    place: Array
    colour: Array
    edges: Array | None
    normal: Array | None
    spread: float


class Camera(NamedTuple):
    """Eye (3,), rows right, down, forward of ``axes`` (3, 3), focal length in picture widths."""

    eye: Array
    axes: Array
    focal: float

    def rays(self, x: Array, y: Array, resolution: int) -> Array:
        """Directions (N, 3) whose step of 1 is a metre along the optical axis."""
        scale = 1 / (self.focal * resolution)
        middle = (resolution - 1) / 2
        local = np.stack([(x - middle) * scale, (y - middle) * scale, np.ones_like(x)], axis=1)
        return np.asfortranarray((local @ self.axes).astype(np.float32))

    def project(self, points: Array, resolution: int) -> tuple[Array, Array, Array]:
        """Pixel places x, y and depth (N,) of points (N, 3)."""
        local = (points - self.eye) @ self.axes.T
        depth = local[:, 2]
        scale = self.focal * resolution / np.maximum(depth, 1e-6)
        middle = (resolution - 1) / 2
        return local[:, 0] * scale + middle, local[:, 1] * scale + middle, depth


def turned(yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0) -> Array:
    """A rotation (3, 3): roll about y, then pitch about x, then yaw about z."""
    (cy, sy), (cp, sp), (cr, sr) = ((np.cos(a), np.sin(a)) for a in (yaw, pitch, roll))
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_y = np.array([[cr, 0, sr], [0, 1, 0], [-sr, 0, cr]])
    return about_z @ about_x @ about_y


def look(eye: Array, target: Array, roll: float, fov: float) -> Camera:
    """A camera at ``eye`` towards ``target``, ``roll`` and horizontal ``fov`` in radians."""
    forward = np.asarray(target, float) - eye
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0, 0, 1.0])
    right /= max(np.linalg.norm(right), 1e-6)
    down = np.cross(forward, right)
    c, s = np.cos(roll), np.sin(roll)
    return Camera(
        np.asarray(eye, float), np.stack([c * right + s * down, c * down - s * right, forward]), 0.5 / np.tan(fov / 2)
    )


class Draft:
    """A thing about its own origin: x its width, y its depth (the front is at -y), z up from the floor."""

    def __init__(self, world: World, label: str) -> None:
        self.world, self.label = world, label
        self.parts: list[Part] = []
        self.tops: list[tuple[float, float, float, float, float]] = []
        """Where things can stand: centre x and y, width, depth, height."""

    def part(
        self, kind: str, centre: Any, size: Any, material: int, turn: Array | None = None, which: int | None = None
    ) -> None:
        """A body of a kind with full sizes, ``which`` of them or any."""
        row = self.world.kinds[kind]
        number = row[which % len(row)] if which is not None else row[int(self.world.rng.integers(len(row)))]
        self.parts.append(Part(number, tuple(centre), tuple(size), turn, material))

    def extent(self) -> Array:
        """Half the width and depth, and the height (3,)."""
        half = [np.abs(p.size if p.turn is None else np.abs(p.turn) @ np.array(p.size)) / 2 for p in self.parts]
        reach = np.max([np.abs(np.array(p.centre)) + h for p, h in zip(self.parts, half, strict=True)], axis=0)
        return reach


class Placed(NamedTuple):
    label: str
    at: Array
    extent: Array
    moves: bool


class World:
    """Everything of one scene; layouts fill it."""

    def __init__(self, rng: np.random.Generator, without: Collection[str] = ()) -> None:
        self.rng, self.bank, self.without = rng, bank(), frozenset(without)
        self.bodies, self.kinds = catalogue()
        self.materials: list[Material] = []
        self.things: list[Placed] = []
        self._rows: list[tuple[Part, Array, Array, int]] = []
        self.lights: list[Light] = []
        self.indoor = True
        self.sky = np.array([[0.5, 0.6, 0.8], [0.8, 0.85, 0.9], [0.3, 0.3, 0.3]])
        """Linear colours at the zenith, the horizon and below."""
        self.clouds = -1
        self.ambient = np.full(3, 0.5)
        self.haze = 0.0
        self.motion: dict[int, tuple[Array, Array]] = {}
        """Thing -> (3, 3) and (3,) of the affine motion to the second frame."""

    def material(
        self,
        *names: str,
        size: float | tuple[float, float] = 1.0,
        fit: bool = False,
        gloss: float = 0.0,
        tint: float = 0.15,
        dark: float = 1.0,
        vivid: float = 1.0,
        glow: Any = (0, 0, 0),
        pane: bool = False,
    ) -> int:
        """Number of a new material: a texture of one of the kinds, repeated each ``size`` metres, or drawn once.

        ``tint`` varies its colour, ``dark`` and ``vivid`` scale its brightness and saturation.
        """
        rng = self.rng
        wide, tall = (size, size) if isinstance(size, (int, float)) else size
        if not fit:
            wide, tall = wide * rng.uniform(0.7, 1.5), tall * rng.uniform(0.7, 1.5)
        shade = np.exp(rng.normal(0, tint, 3) * 0.5 + rng.normal(0, tint)) * dark
        shift = (0.5, 0.5) if fit else tuple(rng.uniform(0, 1, 2))
        turn = 0.0 if fit or rng.random() < 0.7 else rng.choice([np.pi / 2, rng.uniform(0, 6.3)])
        self.materials.append(
            Material(
                self.bank.pick(rng, names or ("plaster",)),
                (wide, tall),
                shift,
                turn,
                tuple(np.minimum(shade, 1.6)),
                0.0 if fit else max(rng.uniform(-0.5, 0.7), 0),
                min(vivid * rng.uniform(0.3, 1.4), 1.2),
                self.bank.pick(rng, ("rough", "plaster", "marble")),
                rng.uniform(0, 0.6) * (rng.random() < 0.6),
                rng.uniform(1.5, 5.0),
                gloss,
                tuple(glow),
                pane,
            )
        )
        return len(self.materials) - 1

    def put(self, draft: Draft, at: Any, yaw: float | Array = 0.0, moves: bool = True, solid: bool = True) -> int:
        """Place a draft; ``solid`` off makes it part of the surroundings. Returns its number, or -1."""
        turn = turned(yaw) if isinstance(yaw, (int, float)) else yaw
        at = np.asarray(at, float)
        owner = -1
        if solid:
            owner = len(self.things)
            self.things.append(Placed(draft.label, at, draft.extent(), moves))
        self._rows += [(part, turn, at, owner) for part in draft.parts]
        return owner

    def table(self) -> dict[str, Array]:
        """The materials as arrays, their textures painted."""
        columns = {
            name: np.array(value)
            for name, value in zip(Material._fields, zip(*self.materials, strict=True), strict=True)
        }
        self.bank.need(columns["texture"])
        self.bank.need(columns["stain"])
        out: dict[str, Any] = {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in columns.items()}
        mean = self.bank.mean[out["texture"]] * out["tint"]
        gray = mean.mean(axis=1, keepdims=True)
        mean = gray + (mean - gray) * out["vivid"][:, None]
        out["mean"] = np.minimum(mean, 0.9).astype(np.float32)
        out["about"] = np.stack([np.cos(out["turn"]), np.sin(out["turn"])], axis=1).astype(np.float32)
        out["glow"] = np.asarray(out["glow"], np.float32)
        return out

    def triangles(self) -> dict[str, Array]:
        """The first frame: corners, normals (F, 3, 3), texture places in metres (F, 3, 2), material, owner (F,).

        Also ``vertices`` (V,), one corner of those in each place, counted through the triangles, and ``index`` int32
        (F, 3), the vertices of each triangle.
        """
        groups: dict[int, list[int]] = {}
        for number, row in enumerate(self._rows):
            groups.setdefault(row[0].body, []).append(number)
        out: list[list[Array]] = [[] for _ in range(7)]
        corner = vertex = 0
        for number, members in groups.items():
            body, rows = self.bodies[number], [self._rows[m] for m in members]
            size = np.array([row[0].size for row in rows], np.float32)
            turn = np.array([row[1] if row[0].turn is None else row[1] @ row[0].turn for row in rows], np.float32)
            centre = np.array([row[1] @ row[0].centre + row[2] for row in rows], np.float32)
            count, faces = len(rows), len(body.corners)
            flat = body.corners.reshape(-1, 3) * size[:, None]
            corners = flat @ turn.transpose(0, 2, 1) + centre[:, None]
            smooth = body.normals.reshape(-1, 3) / size[:, None]
            smooth = smooth @ turn.transpose(0, 2, 1)
            smooth /= np.linalg.norm(smooth, axis=2, keepdims=True)
            texture = body.texture[None] * size[:, body.axes][:, :, None, :]
            out[0].append(corners.reshape(-1, 3, 3))
            out[1].append(smooth.reshape(-1, 3, 3))
            out[2].append(texture.reshape(-1, 3, 2))
            out[3].append(np.repeat([row[0].material for row in rows], faces))
            out[4].append(np.repeat([row[3] for row in rows], faces))
            vertices, index = shared_corners(number)
            each = np.arange(count)
            out[5].append((vertices + corner + 3 * faces * each[:, None]).reshape(-1))
            out[6].append((index + vertex + len(vertices) * each[:, None, None]).reshape(-1, 3).astype(np.int32))
            corner, vertex = corner + 3 * faces * count, vertex + len(vertices) * count
        names = ("corners", "normals", "texture", "material", "owner", "vertices", "index")
        return {name: np.ascontiguousarray(np.concatenate(some)) for name, some in zip(names, out, strict=True)}

    def moved(self, points: Array, owner: Array) -> Array:
        """Points (N, 3) of things (N,), -1 for the surroundings, in the second frame."""
        if not self.motion:
            return points
        matrices, shifts = self._motions()
        return np.einsum("nij,nj->ni", matrices[owner], points) + shifts[owner]

    def turned(self, normals: Array, owner: Array) -> Array:
        """Normals (N, 3) of things (N,) in the second frame."""
        inverse = np.linalg.inv(self._motions()[0]).transpose(0, 2, 1)
        out = np.einsum("nij,nj->ni", inverse[owner], normals)
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)

    def _motions(self) -> tuple[Array, Array]:
        matrices = np.tile(np.eye(3, dtype=np.float32), (len(self.things) + 1, 1, 1))
        shifts = np.zeros((len(self.things) + 1, 3), np.float32)
        for number, (matrix, shift) in self.motion.items():
            matrices[number], shifts[number] = matrix, shift
        return matrices, shifts
