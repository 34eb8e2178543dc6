"""Patterns of the procedural scenes: a fixed bank of tileable pictures with mip maps and a trilinear lookup.

The bank is a pure function of nothing (fixed seeds), built once a process; a scene's material picks patterns, scales
and colours from it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

Array = np.ndarray
SIZE = 256
LEVELS = 9
_SIZES = SIZE >> np.arange(LEVELS)
_WIDTHS = _SIZES.astype(np.float32)


class Bank(NamedTuple):
    """``texels`` flat float32 in [0, 1], level by level; ``offsets`` (LEVELS,) into it; ``names`` of the patterns."""

    texels: Array
    offsets: Array
    names: tuple[str, ...]


def sample(pattern: Array, u: Array, v: Array, level: Array) -> Array:
    """Trilinear lookup; all (N,): pattern number, coordinates in tiles, mip level (clipped). Returns (N,) float32."""
    bank = pattern_bank()
    level = np.clip(level, 0, LEVELS - 1.001)
    low = level.astype(np.intp)
    share = (level - low).astype(np.float32)
    near = _bilinear(bank, pattern, u, v, low)
    return near + (_bilinear(bank, pattern, u, v, low + 1) - near) * share


def _bilinear(bank: Bank, pattern: Array, u: Array, v: Array, level: Array) -> Array:
    size = _SIZES[level]
    mask = size - 1
    scale = _WIDTHS[level]
    x, y = u * scale - np.float32(0.5), v * scale - np.float32(0.5)
    x0, y0 = np.floor(x), np.floor(y)
    fx, fy = x - x0, y - y0
    x0, y0 = x0.astype(np.intp), y0.astype(np.intp)
    base = bank.offsets[level] + pattern * (size * size)
    left, right = x0 & mask, (x0 + 1) & mask
    top, bottom = base + (y0 & mask) * size, base + ((y0 + 1) & mask) * size
    texels = bank.texels
    a, b = texels.take(top + left), texels.take(bottom + left)
    a += (texels.take(top + right) - a) * fx
    b += (texels.take(bottom + right) - b) * fx
    b -= a
    b *= fy
    a += b
    return a


@functools.lru_cache(maxsize=1)
def pattern_bank() -> Bank:
    """All patterns: built on first use, in about a tenth of a second."""
    names, pictures = zip(*sorted(_patterns().items()), strict=True)
    stack = np.clip(np.stack(pictures), 0, 1).astype(np.float32)
    levels, offsets, total = [], [], 0
    for _ in range(LEVELS):
        offsets.append(total)
        levels.append(stack.reshape(-1))
        total += stack.size
        if stack.shape[1] > 1:
            stack = (stack[:, ::2, ::2] + stack[:, 1::2, ::2] + stack[:, ::2, 1::2] + stack[:, 1::2, 1::2]) / 4
    return Bank(np.concatenate(levels), np.array(offsets, np.intp), names)


def _noise(seed: int, exponent: float, stretch: tuple[float, float] = (1, 1), lowest: float = 1) -> Array:
    """Tileable noise whose amplitude falls as frequency**-exponent; mean 0.5, deviation about 0.2; (SIZE, SIZE)."""
    rng = np.random.default_rng((seed, 0x5CE7E))
    f = np.hypot(np.fft.fftfreq(SIZE)[:, None] * stretch[1], np.fft.rfftfreq(SIZE)[None] * stretch[0]) * SIZE
    gain = np.maximum(f, lowest) ** -exponent
    gain[0, 0] = 0
    field = np.fft.irfft2(gain * (rng.standard_normal(f.shape) + 1j * rng.standard_normal(f.shape)), s=(SIZE, SIZE))
    return np.clip(0.5 + 0.2 * field / field.std(), 0, 1)


def _bricks(rng: np.random.Generator, rows: int, columns: int, mortar: float, shift: float, spread: float) -> Array:
    line = (np.arange(SIZE) + 0.5) / SIZE
    y, x = line[:, None] * rows, line[None] * columns
    row = np.floor(y)
    x = x + shift * (row % 2)
    column = np.floor(x).astype(int) % columns
    tone = 1 - spread * rng.random((rows, columns))[row.astype(int), column]
    inside = (np.minimum(x % 1, 1 - x % 1) / columns > mortar) & (np.minimum(y % 1, 1 - y % 1) / rows > mortar)
    return np.where(inside, tone, 0.05)


def _discs(rng: np.random.Generator, count: int, low: float, high: float, tones: bool, stretch: float = 1) -> Array:
    out = np.zeros((SIZE, SIZE)) + (0.5 if tones else 0)
    line = (np.arange(SIZE) + 0.5) / SIZE
    for _ in range(count):
        dx = (line - rng.random() + 0.5) % 1 - 0.5
        dy = (line - rng.random() + 0.5) % 1 - 0.5
        columns, rows = np.flatnonzero(np.abs(dx) < high), np.flatnonzero(np.abs(dy) < high)
        dx, dy = dx[columns][None], dy[rows][:, None]
        c, s = np.cos(a := rng.uniform(0, np.pi)), np.sin(a)
        inside = (dx * c + dy * s) ** 2 + ((dy * c - dx * s) * stretch) ** 2 < rng.uniform(low, high) ** 2
        y, x = np.nonzero(inside)
        out[rows[y], columns[x]] = rng.random() if tones else 1
    return out


def _cells(rng: np.random.Generator, count: int, edges: bool) -> Array:
    points = rng.random((count, 2))
    line = (np.arange(SIZE) + 0.5) / SIZE
    best = np.full((SIZE, SIZE), 9.0)
    second, which = best.copy(), np.zeros((SIZE, SIZE), int)
    for number, (px, py) in enumerate(points):
        d = np.hypot((line[None] - px + 0.5) % 1 - 0.5, (line[:, None] - py + 0.5) % 1 - 0.5)
        closer = d < best
        second = np.where(closer, best, np.minimum(second, d))
        which[closer] = number
        best = np.minimum(best, d)
    return np.clip((second - best) * 40, 0, 1) if edges else rng.random(count)[which]


def _rectangles(rng: np.random.Generator, count: int, low: int, high: int, thin: bool) -> Array:
    out = np.full((SIZE, SIZE), 0.9 if thin else 0.5)
    for _ in range(count):
        h, w = (rng.integers(2, 5), rng.integers(low, high)) if thin else rng.integers(low, high, 2)
        rows = np.arange(y := rng.integers(SIZE), y + h) % SIZE
        columns = np.arange(x := rng.integers(SIZE), x + w) % SIZE
        out[np.ix_(rows, columns)] = rng.uniform(0, 0.3) if thin else rng.random()
    return out


def _patterns() -> dict[str, Array]:
    rng = np.random.default_rng(0xBA2C)
    line = (np.arange(SIZE) + 0.5) / SIZE
    x, y = np.broadcast_to(line[None], (SIZE, SIZE)), np.broadcast_to(line[:, None], (SIZE, SIZE))
    soft, mid, rough = _noise(1, 2.2), _noise(2, 1.6), _noise(3, 1.1)
    bars = np.repeat(rng.random(64), rng.multinomial(SIZE - 64, np.full(64, 1 / 64)) + 1)[:SIZE]
    grain = _noise(4, 1.4, (9, 1))
    plank = np.floor(y * 8)
    tone = rng.random(8)[plank.astype(int)]
    smooth = np.abs
    books = np.where((y * 4) % 1 < 0.12, 0.0, 0.15 + 0.85 * np.tile(bars, (SIZE, 1)))
    panel = np.maximum(smooth((x * 2) % 1 - 0.5), smooth(y - 0.5))
    window = (smooth((x * 4) % 1 - 0.5) < 0.28) & (smooth((y * 4) % 1 - 0.5) < 0.33)
    return {
        "noise soft": soft,
        "noise middle": mid,
        "noise rough": rough,
        "noise fine": _noise(5, 0.8),
        "noise smooth": _noise(6, 3),
        "noise streaks": _noise(7, 1.5, (6, 1)),
        "blotches": np.clip((_noise(8, 2) - 0.5) * 12 + 0.5, 0, 1),
        "islands": np.clip((_noise(9, 1.6, lowest=4) - 0.6) * 14 + 0.5, 0, 1),
        "checker": ((np.floor(x * 8) + np.floor(y * 8)) % 2) * 0.94 + 0.06 * mid,
        "checker worn": 0.7 * ((np.floor(x * 4) + np.floor(y * 4)) % 2) + 0.3 * rough,
        "stripes": (np.floor(x * 16) % 2) * 1.0,
        "stripes thin": ((x * 16) % 1 < 0.2) * 1.0,
        "stripes soft": 0.5 + 0.5 * np.sin(2 * np.pi * 8 * x),
        "stripes uneven": np.tile(bars, (SIZE, 1)),
        "bricks": _bricks(rng, 12, 6, 0.006, 0.5, 0.5) * (0.8 + 0.2 * rough),
        "blocks": _bricks(rng, 4, 2, 0.006, 0.5, 0.2) * (0.8 + 0.2 * mid),
        "tiles": _bricks(rng, 6, 6, 0.004, 0, 0.12),
        "tiles mixed": _bricks(rng, 8, 8, 0.004, 0, 0.8),
        "grid": 1 - ((smooth((x * 8) % 1 - 0.5) > 0.46) | (smooth((y * 8) % 1 - 0.5) > 0.46)),
        "wood": 0.55 * (0.5 + 0.5 * np.sin(2 * np.pi * (6 * y + 2.5 * _noise(10, 2.4, (5, 1))))) + 0.45 * grain,
        "planks": np.where((y * 8) % 1 < 0.03, 0.0, 0.5 * tone + 0.5 * grain),
        "marble": (0.5 + 0.5 * np.sin(2 * np.pi * (3 * x + 2 * y + 4 * mid))) ** 3,
        "spots": np.hypot((x * 8) % 1 - 0.5, (y * 8) % 1 - 0.5) < 0.3,
        "spots scattered": _discs(rng, 60, 0.015, 0.06, False),
        "leaves": _discs(rng, 700, 0.02, 0.05, True, 2.2),
        "pebbles": _discs(rng, 500, 0.01, 0.04, True),
        "cells": _cells(rng, 50, False),
        "cracks": _cells(rng, 40, True),
        "weave": 0.5 + 0.25 * np.sin(2 * np.pi * 32 * x) * np.sign(np.sin(2 * np.pi * 16 * y)) + 0.2 * (mid - 0.5),
        "collage": _rectangles(rng, 60, 15, 90, False),
        "writing": _rectangles(rng, 130, 4, 26, True),
        "books": books,
        "panels": np.where((panel > 0.4) & (panel < 0.43), 0.0, 0.85 + 0.15 * soft),
        "windows": np.where(window, 0.1 + 0.3 * rng.random((4, 4)).repeat(64, 0).repeat(64, 1), 0.95),
        "gradient": 1 - 2 * smooth(y - 0.5),
    }
