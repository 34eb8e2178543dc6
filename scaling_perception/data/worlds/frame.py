"""One frame: rays through pixels, their colours, and light shared by neighbours."""

from __future__ import annotations

import numpy as np

from scaling_perception.data.worlds.bank import SIDE
from scaling_perception.data.worlds.build import Camera, World, dot, either, norm, rows
from scaling_perception.data.worlds.light import dither_square, irradiance, sky, smooth
from scaling_perception.data.worlds.trace import Hits, Tracer

Array = np.ndarray
_QUARTERS = np.array([[-0.27, 0.23, -0.23, 0.27], [-0.23, -0.27, 0.27, 0.23]], np.float32)


class Surface:
    """What rays from a camera met: depth along its axis (0 where nothing), face, owner, and the surface there."""

    def __init__(self, frame: Frame, x: Array, y: Array, hits: Hits | None = None) -> None:
        camera, mesh = frame.camera, frame.mesh
        self.rays = camera.rays(x, y, frame.resolution)
        eye = np.broadcast_to(camera.eye.astype(np.float32), self.rays.shape)
        hits = frame.tracer.cast(eye, self.rays) if hits is None else hits
        self.face, self.met = np.maximum(hits.face, 0), hits.face >= 0
        self.depth = np.where(self.met, hits.far, 0).astype(np.float32)
        first, second, third = (hits.weights[:, i : i + 1] for i in range(3))

        def between(name: str) -> Array:
            at = rows(frame.corners[name], self.face)
            size = at.shape[1] // 3
            return first * at[:, :size] + second * at[:, size : 2 * size] + third * at[:, 2 * size :]

        self.owner = np.where(self.met, mesh["owner"].take(self.face), -2)
        self.material = mesh["material"].take(self.face)
        flat = rows(frame.faces, self.face)
        back = np.sign(-dot(flat, self.rays))[:, None]
        self.flat = flat * back  # of the triangle, towards the camera
        normals = between("normals") * back
        normals /= np.maximum(norm(normals)[:, None], 1e-6)
        # a smooth normal that looks away at a silhouette would be black
        away = dot(normals, self.flat) < 0.1
        self.normals = either(away, self.flat, normals).astype(np.float32)
        self.texture = between("texture")
        self.points = eye + self.rays * self.depth[:, None]


class Frame:
    """The world at one moment from one camera."""

    def __init__(
        self,
        world: World,
        mesh: dict[str, Array],
        table: dict[str, Array],
        camera: Camera,
        resolution: int,
        tracer: Tracer | None = None,
    ) -> None:
        self.world, self.mesh, self.table, self.camera, self.resolution = world, mesh, table, camera, resolution
        self.tracer = tracer or Tracer.of(mesh)
        corners = mesh["corners"]
        faces = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        self.faces = np.asfortranarray(faces / np.maximum(norm(faces)[:, None], 1e-12))
        named = ((name, mesh[name].reshape(len(corners), -1)) for name in ("normals", "texture"))
        self.corners = {name: np.asfortranarray(values) for name, values in named}
        line = np.arange(resolution, dtype=np.float32)
        self.x, self.y = (np.ascontiguousarray(v.reshape(-1)) for v in np.meshgrid(line, line))
        self.centre = Surface(self, self.x, self.y)

    def albedo(self, seen: Surface, finer: float = 1.0) -> Array:
        """Linear colours (N, 3) of the surfaces."""
        table, material = self.table, seen.material
        if "textures" in self.world.without:
            return np.clip(rows(table["mean"], material), 0.005, 0.92)
        cosine = np.abs(dot(seen.flat, seen.rays)) / norm(seen.rays)
        print_ = finer * seen.depth / (self.camera.focal * self.resolution) / np.sqrt(np.maximum(cosine, 0.02))
        size = rows(table["size"], material)
        about, u, v = rows(table["about"], material), seen.texture[:, 0], -seen.texture[:, 1]
        shift = rows(table["shift"], material)
        first = (u * about[:, 0] - v * about[:, 1]) / size[:, 0] + shift[:, 0]
        second = (u * about[:, 1] + v * about[:, 0]) / size[:, 1] + shift[:, 1]
        level = np.log2(np.maximum(print_ / size.min(axis=1) * SIDE, 1e-3))
        bank = self.world.bank
        out = bank.sample(table["texture"][material], first, second, level) * rows(table["tint"], material)
        mean, flat = rows(table["mean"], material), table["flat"][material][:, None]
        out = out + (mean - out) * flat
        gray = out.sum(axis=1, keepdims=True) * np.float32(1 / 3)
        out = gray + (out - gray) * table["vivid"][material][:, None]
        stained = np.flatnonzero(table["stained"][material] > 0)
        if stained.size:
            few = material[stained]
            wide, stain = table["stain_size"][few], table["stain"][few]
            veil = bank.sample(
                stain, u[stained] / wide, v[stained] / wide, np.log2(np.maximum(print_[stained] / wide * SIDE, 1e-3))
            )
            veil = veil.mean(axis=1) / np.maximum(bank.mean[stain].mean(axis=1), 0.02)
            out[stained] *= (1 + (np.clip(veil, 0.2, 1.6) - 1) * table["stained"][few])[:, None]
        return np.clip(out, 0.005, 0.92)

    def lighting(self) -> tuple[Array, Array]:
        """Light on the surfaces of the centre rays (N, 3), and mirrored light of the glossy ones (N, 3)."""
        seen, size = self.centre, self.resolution
        sharp, soft = (np.zeros(seen.points.shape, np.float32) for _ in range(2))
        where = np.flatnonzero(seen.met)
        chance = rows(dither_square(size), where)
        sharp[where], soft[where] = irradiance(
            self.world, self.tracer, self.mesh, self.table, rows(seen.points, where), rows(seen.normals, where), chance
        )
        shape = (size, size, 3)
        points, normals = seen.points.reshape(shape), seen.normals.reshape(shape)
        depth = np.where(seen.met, seen.depth, 1).reshape(size, size)
        step = max(size // 128, 1)
        light = smooth(soft.reshape(shape), points, normals, depth, (step, 3 * step))
        light = light + smooth(sharp.reshape(shape), points, normals, depth, ()) if sharp.any() else light
        return light.reshape(-1, 3), self._mirror(seen)

    def _mirror(self, seen: Surface) -> Array:
        out = np.zeros(seen.points.shape, np.float32)
        gloss = self.table["gloss"][seen.material] * seen.met
        where = np.flatnonzero(gloss > 0)
        if not where.size:
            return out
        rays = seen.rays[where] / norm(seen.rays[where])[:, None]
        normals = seen.normals[where]
        facing = -dot(rays, normals)
        ways = rays + 2 * facing[:, None] * normals
        hits = self.tracer.cast(seen.points[where] + normals * np.float32(2e-3), ways)
        material = self.mesh["material"][np.maximum(hits.face, 0)]
        colour = self.table["mean"][material] * self.world.ambient.astype(np.float32) + self.table["glow"][material]
        colour = np.where((hits.face >= 0)[:, None], colour, sky(self.world, ways))
        fresnel = 0.05 + 0.95 * (1 - np.clip(facing, 0, 1)) ** 5
        out[where] = colour * (fresnel * gloss[where])[:, None]
        return out

    def shade(self, seen: Surface, light: Array, mirror: Array, finer: float = 1.0) -> Array:
        """Light (N, 3) that reaches the camera."""
        colour = self.albedo(seen, finer) * light + mirror + rows(self.table["glow"], seen.material)
        length = norm(seen.rays)
        if self.world.haze > 0:
            clear = np.exp(-np.float32(self.world.haze) * seen.depth * length)[:, None]
            colour = colour * clear + np.asarray(self.world.sky[1], np.float32) * (1 - clear)
        none = np.flatnonzero(~seen.met)
        if none.size:
            colour[none] = sky(self.world, seen.rays[none], disc=True)
        return colour

    def picture(self) -> tuple[Array, Array, Array]:
        """Linear colours (R, R, 3) with 2x2 rays where surfaces meet, those of the centre rays, and their light."""
        size, seen = self.resolution, self.centre
        light, mirror = self.lighting()
        centre = self.shade(seen, light, mirror).reshape(size, size, 3)
        out = np.minimum(centre, 12)
        edge = self._edges(centre)
        chosen = np.flatnonzero(edge)
        if chosen.size:
            fine = Surface(
                self,
                (self.x[chosen, None] + _QUARTERS[0]).reshape(-1),
                (self.y[chosen, None] + _QUARTERS[1]).reshape(-1),
            )
            near = self._nearest(np.repeat(chosen, 4), fine)
            colour = self.shade(fine, light[near], mirror[near], 0.5)
            out.reshape(-1, 3)[chosen] = np.minimum(colour, 12).reshape(-1, 4, 3).mean(axis=1)
        return out, centre, light

    def _edges(self, colour: Array) -> Array:
        """Pixels (R, R) whose neighbours see another surface or a far other colour."""
        size, seen = self.resolution, self.centre
        key = (seen.owner * 4096 + seen.material).reshape(size, size)
        normals = seen.flat.reshape(size, size, 3)
        value = np.log(colour.mean(axis=2) + 0.02)
        edge = np.zeros((size, size), bool)
        for first, second in (
            ((slice(1, None), slice(None)), (slice(None, -1), slice(None))),
            ((slice(None), slice(1, None)), (slice(None), slice(None, -1))),
        ):
            differ = (key[first] != key[second]) | (dot(normals[first], normals[second]) < 0.9)
            differ |= np.abs(value[first] - value[second]) > 0.35
            edge[first] |= differ
            edge[second] |= differ
        return edge

    def _nearest(self, pixels: Array, fine: Surface) -> Array:
        """The pixel, of each one and its four neighbours, whose surface is most like that of the finer ray."""
        size, seen = self.resolution, self.centre
        best, number = np.full(len(pixels), np.inf, np.float32), pixels.copy()
        row, column = pixels // size, pixels % size
        for dy, dx in ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)):
            other = np.clip(row + dy, 0, size - 1) * size + np.clip(column + dx, 0, size - 1)
            off = np.abs(dot(rows(seen.points, other) - fine.points, fine.normals))
            cost = off / np.maximum(fine.depth, 0.05) * 20 + 1 - dot(rows(seen.normals, other), fine.normals)
            cost += 4.0 * (seen.material[other] != fine.material)
            better = cost < best
            best, number = np.where(better, cost, best), np.where(better, other, number)
        return number
