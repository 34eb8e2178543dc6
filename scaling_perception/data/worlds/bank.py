"""A bank of tileable procedural textures with their mipmaps, painted on demand and kept for the process.

Texture number ``n`` is a pure function of ``n``: worlds share the bank and give it their own colours, sizes and turns.
"""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Callable

import numpy as np
from scipy import ndimage

Array = np.ndarray
SIDE = 128
EACH = 28
"""Textures of a kind."""
_LEVELS = [SIDE >> level for level in range(8)]
_STARTS = np.concatenate([[0], np.cumsum([side * side for side in _LEVELS])])[:-1]
_TEXELS = sum(side * side for side in _LEVELS)


def colour(rng: np.random.Generator, low: float = 0.12, high: float = 0.95, vivid: float = 1.0) -> Array:
    """A display colour (3,), mostly muted and of the hues that rooms and streets have."""
    saturation = vivid * (rng.beta(1.2, 4.5) if rng.random() < 0.72 else rng.uniform(0.3, 0.95))
    usual = rng.random() < 0.65
    hue = rng.choice([0.07, 0.09, 0.11, 0.58, 0.3, 0.0]) + rng.normal(0, 0.03) if usual else rng.random()
    return np.array(colorsys.hsv_to_rgb(hue % 1, min(saturation, 0.97), rng.uniform(low, high)), np.float32)


@functools.cache
def _waves() -> tuple[Array, Array]:
    y, x = np.meshgrid(np.fft.fftfreq(SIDE) * SIDE, np.fft.fftfreq(SIDE) * SIDE, indexing="ij")
    return x, y


def noise(rng: np.random.Generator, steep: float = 1.2, along: float = 1.0, floor: float = 1.0) -> Array:
    """Tileable noise (SIDE, SIDE), mean 0, deviation 1, of power ``1 / frequency ** (2 steep)``."""
    x, y = _waves()
    power = (np.hypot(x * along, y / along) + floor) ** -steep
    field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((SIDE, SIDE))) * power).real
    field -= field.mean()
    return (field / field.std()).astype(np.float32)


def _ramp(rng: np.random.Generator, value: Array, near: float = 0.5) -> Array:
    """Colours along a ramp of two or three related colours."""
    first = colour(rng)
    others = [np.clip(first + rng.normal(0, near * 0.35) + rng.normal(0, near * 0.08, 3), 0.02, 1) for _ in range(2)]
    knots = np.stack([others[0], first, others[1]])
    at = np.linspace(-1.8, 1.8, 3)
    return np.stack([np.interp(value, at, knots[:, c]) for c in range(3)], axis=-1)


def _grid(rng: np.random.Generator, rows: int, columns: int, shift: float, gap: float) -> tuple[Array, Array]:
    """Number of the brick of each texel, and how much of it is joint."""
    line = (np.arange(SIDE) + 0.5) / SIDE
    row = np.floor(line * rows).astype(int)
    across = (line[None, :] * columns + (row[:, None] % 2) * shift) % columns
    number = row[:, None] * columns + np.floor(across).astype(int)
    fx, fy = across % 1, (line * rows % 1)[:, None] + 0 * across
    away = np.minimum(np.minimum(fx, 1 - fx) / columns, np.minimum(fy, 1 - fy) / rows) * SIDE
    return number, np.clip(1.5 - away / max(gap, 0.2), 0, 1)


def _plaster(rng: np.random.Generator) -> Array:
    return _ramp(rng, noise(rng, rng.uniform(0.7, 1.8)) * rng.uniform(0.2, 0.8), rng.uniform(0.1, 0.5))


def _rough(rng: np.random.Generator) -> Array:
    value = 0.6 * noise(rng, rng.uniform(0.3, 1.2)) + 0.6 * noise(rng, 1.6)
    return _ramp(rng, value, rng.uniform(0.5, 1.2))


def _wood(rng: np.random.Generator) -> Array:
    x, y = _waves()
    field = noise(rng, 1.3, along=rng.uniform(0.2, 0.45))
    rings = np.sin(field * rng.uniform(2, 9) + noise(rng, 2.2) * 2)
    value = rings * rng.uniform(0.2, 1) + noise(rng, 0.8, along=0.25) * 0.5
    tone = np.array(colorsys.hsv_to_rgb(rng.normal(0.075, 0.015) % 1, rng.uniform(0.2, 0.7), rng.uniform(0.25, 0.9)))
    return np.clip(tone * (1 + 0.16 * value[..., None] * np.array([0.8, 1, 1.2])), 0, 1)


def _planks(rng: np.random.Generator) -> Array:
    rows = int(rng.choice([4, 6, 8]))
    number, joint = _grid(rng, rows, int(rng.choice([1, 2])), rng.uniform(0.2, 0.8), 0.8)
    out = _wood(rng)
    tone = rng.normal(1, rng.uniform(0.03, 0.18), number.max() + 1)[number]
    rolled = out[(np.arange(SIDE)[:, None] + 0 * number), (np.arange(SIDE)[None] + number * 37) % SIDE]
    return np.clip(rolled * tone[..., None], 0, 1) * (1 - 0.6 * joint[..., None])


def _bricks(rng: np.random.Generator) -> Array:
    rows = int(rng.choice([6, 8, 10, 12]))
    number, joint = _grid(rng, rows, max(rows // 2, 2), 0.5, rng.uniform(0.8, 2))
    base = colour(rng) if rng.random() < 0.4 else np.array([0.62, 0.36, 0.27]) * rng.uniform(0.6, 1.3)
    tone = 1 + rng.normal(0, rng.uniform(0.04, 0.22), (number.max() + 1, 3)) * (1, 0.9, 0.9)
    value = base * tone[number] * (1 + 0.12 * noise(rng, 0.7)[..., None])
    return np.clip(value + joint[..., None] * (colour(rng, 0.4, 0.9, 0.3) - value), 0, 1)


def _tiles(rng: np.random.Generator) -> Array:
    rows = int(rng.choice([2, 3, 4, 6, 8]))
    number, joint = _grid(rng, rows, rows, 0.0 if rng.random() < 0.8 else 0.5, rng.uniform(0.5, 1.5))
    base = _ramp(rng, noise(rng, 1.5) * 0.5, 0.3)
    tone = 1 + rng.normal(0, rng.choice([0.01, 0.05, 0.15]), number.max() + 1)[number]
    if rng.random() < 0.3:  # two colours
        tone = tone * np.where((number // rows + number) % 2, 1, rng.uniform(0.3, 0.8))
    value = base * tone[..., None]
    return np.clip(value + joint[..., None] * (colour(rng, 0.2, 0.9, 0.3) - value) * 0.8, 0, 1)


def _cloth(rng: np.random.Generator) -> Array:
    line = np.arange(SIDE)
    turn = 2 * np.pi / SIDE
    waves = int(rng.choice([16, 32]))
    weave = np.sin(line * turn * waves)[:, None] * np.sin(line * turn * waves)[None]
    base = _ramp(rng, noise(rng, 1.4) * 0.4 + weave * rng.uniform(0.1, 0.5), 0.4)
    if rng.random() < 0.5:  # stripes or plaid
        bands = rng.integers(2, 9)
        stripe = (np.sin(line * turn * bands + rng.normal(0, 1)) > rng.uniform(-0.5, 0.7)).astype(np.float32)
        mask = stripe[:, None] + 0 * stripe[None] if rng.random() < 0.5 else 0.5 * (stripe[:, None] + stripe[None])
        base = base + (colour(rng) - base) * mask[..., None] * rng.uniform(0.4, 1)
    return np.clip(base, 0, 1)


def _ornament(rng: np.random.Generator) -> Array:
    """Repeated motifs: carpets, wallpapers, prints."""
    cells = int(rng.choice([2, 4, 8]))
    side = SIDE // cells
    y, x = np.meshgrid(*[np.linspace(-1, 1, side)] * 2, indexing="ij")
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    value = np.zeros((side, side))
    for _ in range(rng.integers(1, 4)):
        value += np.cos(radius * rng.uniform(2, 14) + rng.uniform(0, 6)) * np.cos(angle * rng.integers(0, 9))
    motif = np.where(value > rng.uniform(-0.3, 0.8), 1.0, 0.0) if rng.random() < 0.6 else np.clip(value, -1, 1)
    motif = np.tile(ndimage.gaussian_filter(motif, 0.6), (cells, cells))
    first, second = colour(rng), colour(rng)
    out = first + (second - first) * motif[..., None] * rng.uniform(0.3, 1)
    return np.clip(out * (1 + 0.08 * noise(rng, 0.9)[..., None]), 0, 1)


def _marble(rng: np.random.Generator) -> Array:
    value = np.sin(noise(rng, 1.7) * rng.uniform(2, 6) + noise(rng, 1.1))
    return _ramp(rng, -np.abs(value) * 2 + noise(rng, 1) * 0.3, rng.uniform(0.3, 0.9))


def _speckle(rng: np.random.Generator) -> Array:
    """Granite, gravel, asphalt, spots."""
    value = noise(rng, rng.uniform(0.0, 0.9), floor=rng.uniform(2, 14))
    cut = [np.where(value > level, 1.0, 0.0) for level in rng.normal(0, 1, 2)]
    out = colour(rng) + 0 * value[..., None]
    for part in cut:
        out = out + (colour(rng, vivid=0.6) - out) * ndimage.gaussian_filter(part, 0.6, mode="wrap")[..., None] * 0.6
    return np.clip(out * (1 + 0.1 * noise(rng, 0.4)[..., None]), 0, 1)


def _foliage(rng: np.random.Generator) -> Array:
    value = noise(rng, rng.uniform(0.4, 1.2)) * 0.8 + noise(rng, 1.8) * 0.5
    hue = rng.normal(0.26, 0.05) if rng.random() < 0.85 else rng.uniform(0.02, 0.15)
    tone = np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.25, 0.75), rng.uniform(0.25, 0.65)))
    return np.clip(tone * (1 + 0.4 * value[..., None]) + 0.05 * noise(rng, 0.8)[..., None] * (1, 0.4, 0), 0.01, 1)


def _dead_leaves(rng: np.random.Generator) -> Array:
    """Opaque shapes of all sizes over each other: the statistics of photographs."""
    out = _ramp(rng, noise(rng, 1.4), 0.8)
    sizes = np.sort(rng.uniform(0.12, 1, rng.integers(25, 70)) ** -1.3 * rng.uniform(2.0, 4.0))[::-1]
    shared = [colour(rng) for _ in range(6)]
    for size in sizes:
        at, turn, long = rng.uniform(0, SIDE, 2), rng.uniform(0, np.pi), rng.uniform(1, 2.5)
        reach = min(int(size * 1.5) + 2, SIDE // 2)  # the part of the texture that it can cover
        rows, columns = (np.arange(-reach, reach) + int(middle) for middle in at[::-1])
        dy, dx = np.meshgrid(rows - at[1], columns - at[0], indexing="ij")
        u, v = dx * np.cos(turn) + dy * np.sin(turn), (dy * np.cos(turn) - dx * np.sin(turn)) * long
        inside = np.hypot(u, v) < size if rng.random() < 0.5 else np.maximum(abs(u), abs(v)) < size
        tone = shared[rng.integers(6)] if rng.random() < 0.6 else colour(rng)
        shade = 1 + 0.3 * (u / max(size, 1)) * rng.normal()
        where = np.ix_(rows % SIDE, columns % SIDE)
        out[where] = np.where(inside[..., None], tone * shade[..., None], out[where])
    return np.clip(out * (1 + 0.08 * noise(rng, 0.8)[..., None]), 0, 1)


def _poster(rng: np.random.Generator) -> Array:
    """A picture: a gradient, shapes, and marks like letters."""
    y, x = np.meshgrid(np.linspace(0, 1, SIDE), np.linspace(0, 1, SIDE), indexing="ij")
    first, second = colour(rng), colour(rng)
    out = first + (second - first) * y[..., None]
    kind = rng.random()
    if kind < 0.35:  # land and sky
        ridge = 0.5 + 0.12 * noise(rng, 2.0)[0] + rng.normal(0, 0.08)
        out = np.where((y > ridge[None])[..., None], _ramp(rng, noise(rng, 1.1), 0.9), out)
    elif kind < 0.6:
        out = _dead_leaves(rng)
    for _ in range(rng.integers(0, 5)):
        at, size = rng.uniform(0.1, 0.9, 2), rng.uniform(0.05, 0.35)
        near = np.hypot(x - at[0], (y - at[1]) * rng.uniform(0.5, 2)) < size
        if rng.random() < 0.5:
            near = np.maximum(abs(x - at[0]), abs(y - at[1]) * rng.uniform(0.5, 2)) < size
        out = np.where(near[..., None], colour(rng), out)
    for _ in range(rng.integers(0, 4)):  # lines of writing
        top, size = rng.uniform(0.05, 0.85), int(rng.integers(3, 14))
        cells = rng.random((3, SIDE // 3)) > 0.45
        marks: Array = np.asarray(ndimage.zoom(cells, (size / 3, max(size / 6, 1)), order=0))
        left, row = int(rng.uniform(0, 40)), int(top * SIDE)
        marks = marks[: SIDE - row, : SIDE - left]
        out[row : row + marks.shape[0], left : left + marks.shape[1]][marks] = colour(rng, 0.02, 0.98)
    if rng.random() < 0.5:
        edge = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y)) < rng.uniform(0.02, 0.1)
        out = np.where(edge[..., None], colour(rng, 0.05, 0.98, 0.4), out)
    return np.clip(out, 0, 1)


def _facade(rng: np.random.Generator) -> Array:
    """Rows of windows on a wall."""
    rows, columns = int(rng.choice([2, 3, 4])), int(rng.choice([2, 3, 4]))
    out = rng.choice(np.array([_bricks, _plaster, _plaster, _tiles], object))(rng)
    line = (np.arange(SIDE) + 0.5) / SIDE
    y, x = np.meshgrid(line * rows, line * columns, indexing="ij")
    number = np.floor(y).astype(int) * columns + np.floor(x).astype(int)
    fx, fy = np.abs(x % 1 - 0.5), np.abs(y % 1 - rng.uniform(0.42, 0.55))
    wide, tall = rng.uniform(0.15, 0.42), rng.uniform(0.2, 0.42)
    frame = (fx < wide + 0.04) & (fy < tall + 0.04)
    glass = (fx < wide) & (fy < tall) & (fx > rng.choice([0, 0.02])) & (np.abs(fy - 0.1) > rng.choice([0, 0.015]))
    out = np.where(frame[..., None], colour(rng, 0.2, 0.95, 0.4), out)
    pane = np.array([0.25, 0.3, 0.36]) * rng.uniform(0.3, 1.8, number.max() + 1)[number][..., None]
    return np.clip(np.where(glass[..., None], pane * (1.2 - 0.5 * (y % 1))[..., None], out), 0, 1)


def _books(rng: np.random.Generator) -> Array:
    edges = np.unique(rng.integers(0, SIDE, rng.integers(14, 34)))
    number = np.searchsorted(edges, np.arange(SIDE))
    tones = np.stack([colour(rng, vivid=1.3) for _ in range(len(edges) + 1)])
    out = np.repeat(tones[number][None], SIDE, axis=0)
    for row in rng.integers(5, SIDE - 5, rng.integers(1, 4)):
        out[row : row + rng.integers(2, 14), rng.random(len(edges) + 1)[number] < 0.5] = colour(rng, 0.5, 1)
    top = rng.uniform(0.0, 0.3, len(edges) + 1)[number] * SIDE
    return np.where((np.arange(SIDE)[:, None] < top[None])[..., None], 0.06, out * (1 + 0.05 * noise(rng)[..., None]))


def _panel(rng: np.random.Generator) -> Array:
    """Doors, cupboards, shutters, machines: a few nested rectangles."""
    out = _wood(rng) if rng.random() < 0.5 else _plaster(rng)
    y, x = np.meshgrid(*[np.linspace(0, 1, SIDE)] * 2, indexing="ij")
    rows, columns = rng.integers(1, 5), rng.integers(1, 4)
    fx, fy = np.abs(x * columns % 1 - 0.5), np.abs(y * rows % 1 - 0.5)
    away = np.maximum(fx, fy)
    for edge in rng.uniform(0.3, 0.48, rng.integers(1, 3)):
        line = np.exp(-(((away - edge) / 0.012) ** 2))
        out = out * (1 - rng.uniform(0.2, 0.7) * line[..., None])
    knob = np.hypot(fx - 0.38, fy) < 0.035
    return np.clip(np.where(knob[..., None], colour(rng, 0.2, 0.9, 0.3), out), 0, 1)


def _vista(rng: np.random.Generator) -> Array:
    """A sky with hardly a mark, or an empty wall, above a strip of roofs or land."""
    y = np.linspace(0, 1, SIDE)[:, None, None]
    if rng.random() < 0.7:
        hue, pale = rng.normal(0.58, 0.03), rng.uniform(0, 0.5)
        tones = [colorsys.hsv_to_rgb(hue, s * (1 - pale), v) for s, v in ((0.65, rng.uniform(0.4, 0.95)), (0.25, 0.97))]
        first, second = (np.array(tone) for tone in tones)
    else:
        first = colour(rng, 0.2, 0.98, 0.6)
        second = np.clip(first + rng.normal(0, 0.12), 0.03, 1)
    out = first + (second - first) * y + 0 * y.transpose(1, 0, 2)
    if rng.random() < 0.4:  # thin clouds
        veil = np.clip(noise(rng, 1.9) * 0.5 + rng.uniform(-0.5, 0.3), 0, 1)[..., None]
        out = out + (0.97 - out) * veil * rng.uniform(0.05, 0.5)
    ground = rng.choice(np.array([_dead_leaves, _foliage, _facade, _rough, _speckle, _bricks], object))(rng)
    if rng.random() < 0.5:  # roofs
        edges = np.sort(rng.integers(0, SIDE, rng.integers(2, 9)))
        top = rng.uniform(0.45, 1.05, len(edges) + 1)[np.searchsorted(edges, np.arange(SIDE))]
    else:
        top = rng.uniform(0.5, 1.0) + 0.06 * noise(rng, 1.8)[0]
    return np.clip(np.where(y > top[None, :, None], ground, out), 0, 1)


KINDS: dict[str, Callable[[np.random.Generator], Array]] = {
    "plaster": _plaster, "rough": _rough, "wood": _wood, "planks": _planks, "bricks": _bricks, "tiles": _tiles,
    "cloth": _cloth, "ornament": _ornament, "marble": _marble, "speckle": _speckle, "foliage": _foliage,
    "leaves": _dead_leaves, "poster": _poster, "facade": _facade, "books": _books, "panel": _panel,
    "vista": _vista,
}  # fmt: skip
_FIRST = {name: EACH * number for number, name in enumerate(KINDS)}


class Bank:
    """Texels of gamma 2 in one array, level after level; textures not yet asked for are empty."""

    def __init__(self) -> None:
        self.texels = np.zeros((EACH * len(KINDS), _TEXELS, 3), np.uint8)
        self.mean = np.zeros((EACH * len(KINDS), 3), np.float32)
        self._painted = np.zeros(EACH * len(KINDS), bool)

    def pick(self, rng: np.random.Generator, names: tuple[str, ...]) -> int:
        """Number of a texture of one of the kinds."""
        return _FIRST[names[rng.integers(len(names))]] + int(rng.integers(EACH))

    def need(self, numbers: Array) -> None:
        """Paint those that are not yet there."""
        for number in np.unique(numbers):
            if not self._painted[number]:
                self._paint(int(number))

    def _paint(self, number: int) -> None:
        paint = list(KINDS.values())[number // EACH]
        image = np.clip(paint(np.random.default_rng([number, 0x7E87])), 0, 1).astype(np.float32) ** 2
        self.mean[number] = image.mean(axis=(0, 1))
        for level, side in enumerate(_LEVELS):
            flat = np.sqrt(image).reshape(-1, 3) * 255 + 0.5
            self.texels[number, _STARTS[level] : _STARTS[level] + side * side] = flat.astype(np.uint8)
            if side > 1:
                image = image.reshape(side // 2, 2, side // 2, 2, 3).mean(axis=(1, 3))
        self._painted[number] = True

    def sample(self, number: Array, u: Array, v: Array, level: Array) -> Array:
        """Linear colours (N, 3) at repeats ``u``, ``v`` (N,), bilinear within the nearest level."""
        level = np.clip(np.rint(level), 0, len(_LEVELS) - 1).astype(np.int64)
        side = np.int64(SIDE) >> level
        x, y = u * side - 0.5, v * side - 0.5
        x0, y0 = np.floor(x), np.floor(y)
        fx, fy = (x - x0)[:, None].astype(np.float32), (y - y0)[:, None].astype(np.float32)
        mask = side - 1
        ix, iy = x0.astype(np.int64), y0.astype(np.int64)
        start = number * _TEXELS + _STARTS[level]
        flat = self.texels.reshape(-1, 3)
        x0, x1 = ix & mask, (ix + 1) & mask
        y0, y1 = start + (iy & mask) * side, start + ((iy + 1) & mask) * side

        def texel(place: Array) -> Array:  # contiguous columns: see `build.rows`
            return np.asfortranarray(flat.take(place, axis=0))

        top = texel(y0 + x0) * (1 - fx) + texel(y0 + x1) * fx
        low = texel(y1 + x0) * (1 - fx) + texel(y1 + x1) * fx
        out = (top + (low - top) * fy) * np.float32(1 / 255)
        return out * out


@functools.cache
def bank() -> Bank:
    """The process's bank."""
    return Bank()
