"""Procedural pictures of nothing in particular, food for an autoencoder. Each is a pure function of an integer.

Two families. RGB kinds cover what photographs and rendered scenes contain (edges of all sizes, 1/f noise, lettering,
repetition, gradients). Target kinds look like what the tasks draw into an image: grey depth maps with sharp edges, grey
flow components near zero, binary masks, an object on white. No photograph and no file is read.
"""

from collections.abc import Callable

import numpy as np

Array = np.ndarray


def texture(index: int, resolution: int = 128, kind: str | None = None) -> Array:
    """Picture number ``index``: (resolution, resolution, 3) float32 in [-1, 1].

    ``kind`` is one of ``RGB_KINDS`` or ``TARGET_KINDS``; without it, the index chooses (RGB two times in three).
    The same arguments always give the same picture, on every machine with the same numpy.
    """
    rng = np.random.default_rng((int(index), 0x7E47))
    if kind is None:
        kinds = RGB_KINDS if rng.random() < 2 / 3 else TARGET_KINDS
        kind = str(rng.choice(sorted(kinds)))
    draw = {**RGB_KINDS, **TARGET_KINDS}[kind]
    picture = draw(rng, resolution)
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, axis=-1)
    return np.clip(picture, -1, 1).astype(np.float32)


def _grid(resolution: int) -> tuple[Array, Array]:
    """x and y of the pixel centres, in [-1, 1], each (R, R)."""
    line = (np.arange(resolution) + 0.5) / resolution * 2 - 1
    y, x = np.meshgrid(line, line, indexing="ij")
    return x, y


def _colour(rng: np.random.Generator) -> Array:
    """A colour (3,) in [-1, 1]: often grey-ish, sometimes saturated, sometimes black or white."""
    if rng.random() < 0.1:
        return np.full(3, rng.choice([-1.0, 1.0]))
    return np.clip(rng.uniform(-1, 1) + rng.uniform(0, 0.9) * rng.uniform(-1, 1, 3), -1, 1)


def _spectrum(rng: np.random.Generator, resolution: int, exponent: float, channels: int = 1) -> Array:
    """Noise whose amplitude falls as frequency**-exponent: (R, R, channels), zero mean, unit deviation."""
    f = np.hypot(np.fft.fftfreq(resolution)[:, None], np.fft.rfftfreq(resolution)[None]) * resolution
    gain = np.maximum(f, 1) ** -exponent
    gain[0, 0] = 0
    noise = rng.standard_normal((channels, *gain.shape)) + 1j * rng.standard_normal((channels, *gain.shape))
    field = np.fft.irfft2(noise * gain, s=(resolution, resolution))
    return np.moveaxis(field / (field.std(axis=(1, 2), keepdims=True) + 1e-9), 0, -1)


def _shape(
    rng: np.random.Generator, x: Array, y: Array, size: float, centre: tuple[float, float] | None = None
) -> Array:
    """A random solid (R, R) bool: ellipse, box, half-plane-cut polygon or wavy blob of about ``size``."""
    cx, cy = rng.uniform(-1.1, 1.1, 2) if centre is None else centre
    angle = rng.uniform(0, np.pi)
    u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
    v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
    aspect = np.exp(rng.uniform(-0.7, 0.7))
    kind = rng.integers(4)
    if kind == 0:
        return (u * aspect) ** 2 + (v / aspect) ** 2 < size**2
    if kind == 1:
        return (np.abs(u * aspect) < size) & (np.abs(v / aspect) < size)
    if kind == 2:
        inside = np.ones_like(u, bool)
        for corner in np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8))):
            inside &= u * np.cos(corner) + v * np.sin(corner) < size * rng.uniform(0.6, 1)
        return inside & (u**2 + v**2 < (2 * size) ** 2)
    theta, radius = np.arctan2(v, u), np.hypot(u * aspect, v / aspect)
    wave = sum(rng.uniform(0, 0.5) / k * np.cos(k * theta + rng.uniform(0, 6.3)) for k in range(1, 6))
    return radius < size * (1 + wave)


def _sizes(rng: np.random.Generator, count: int, small: float = 0.03, large: float = 0.8) -> Array:
    """Shape sizes, densest at the small end as in natural images (p(r) ~ r**-2), largest first."""
    u = rng.random(count)
    return np.sort(1 / (1 / large + u * (1 / small - 1 / large)))[::-1]


def _fill(rng: np.random.Generator, resolution: int) -> Array:
    """Something to paint a surface with: (R, R, 3) flat, shaded, noisy or striped."""
    x, y = _grid(resolution)
    base = np.broadcast_to(_colour(rng), (resolution, resolution, 3))
    choice = rng.random()
    if choice < 0.35:
        return base
    if choice < 0.65:
        slope = rng.uniform(-0.5, 0.5, 2)
        return base + (slope[0] * x + slope[1] * y)[..., None]
    if choice < 0.85:
        return base + rng.uniform(0.05, 0.4) * _spectrum(rng, resolution, rng.uniform(0.3, 1.5))
    return _stripes(rng, resolution)


def _stripes(rng: np.random.Generator, resolution: int) -> Array:
    """Checkers, stripes or sinusoids between two colours, turned and slightly in perspective."""
    x, y = _grid(resolution)
    angle, tilt = rng.uniform(0, np.pi), rng.uniform(-0.4, 0.4, 2)
    w = 1 / (1.05 + tilt[0] * x + tilt[1] * y)
    u = (x * np.cos(angle) + y * np.sin(angle)) * w
    v = (y * np.cos(angle) - x * np.sin(angle)) * w
    period = np.exp(rng.uniform(np.log(0.06), np.log(0.8)))
    kind = rng.integers(3)
    if kind == 0:
        level = (np.floor(u / period) + np.floor(v / period)) % 2
    elif kind == 1:
        level = ((u / period) % 1 < rng.uniform(0.15, 0.85)).astype(float)
    else:
        level = 0.5 + 0.5 * np.sin(2 * np.pi * u / period)
    a, b = _colour(rng), _colour(rng)
    return a + (b - a) * level[..., None]


def dead_leaves(rng: np.random.Generator, resolution: int) -> Array:
    """Shapes of all sizes that hide each other, filled flat or with a texture, sometimes blurred or grainy."""
    x, y = _grid(resolution)
    picture = np.array(_fill(rng, resolution))
    for size in _sizes(rng, int(rng.integers(10, 50))):
        inside = _shape(rng, x, y, size)
        picture[inside] = _fill(rng, resolution)[inside] if size > 0.12 else _colour(rng)
    if rng.random() < 0.3:
        picture = picture * np.clip(1 + 0.25 * _spectrum(rng, resolution, 2.0), 0.2, 2)  # uneven light
    if rng.random() < 0.3:
        picture = picture + rng.uniform(0, 0.08) * rng.standard_normal(picture.shape)
    return picture


def coloured_noise(rng: np.random.Generator, resolution: int) -> Array:
    """1/f noise with correlated channels: clouds, stone, grass, grain."""
    channels = _spectrum(rng, resolution, rng.uniform(0.2, 2.0), 3)
    mix = np.eye(3) * rng.uniform(0, 0.6) + rng.uniform(0.2, 1) / 3 + 0.2 * rng.standard_normal((3, 3))
    return _colour(rng) * 0.5 + rng.uniform(0.1, 0.6) * channels @ mix


def plasma(rng: np.random.Generator, resolution: int) -> Array:
    """Sinusoids of warped coordinates: smooth colours with folds."""
    x, y = _grid(resolution)
    warp = rng.uniform(0, 0.5) * _spectrum(rng, resolution, 2.0, 2)
    u, v = x + warp[..., 0], y + warp[..., 1]
    picture = np.zeros((resolution, resolution, 3))
    for _ in range(4):
        wave = rng.uniform(-8, 8, 2)
        picture += (np.sin(wave[0] * u + wave[1] * v + rng.uniform(0, 6.3)))[..., None] * rng.uniform(-0.5, 0.5, 3)
    return picture + _colour(rng) * 0.4


def gradients(rng: np.random.Generator, resolution: int) -> Array:
    """A linear or radial gradient with a few large flat or shaded shapes."""
    x, y = _grid(resolution)
    centre = rng.uniform(-1, 1, 2)
    ramp = np.hypot(x - centre[0], y - centre[1]) if rng.random() < 0.5 else x * centre[0] + y * centre[1]
    a, b = _colour(rng), _colour(rng)
    picture = a + (b - a) * np.clip(0.5 + 0.5 * ramp, 0, 1)[..., None]
    for _ in range(rng.integers(0, 6)):
        inside = _shape(rng, x, y, rng.uniform(0.1, 0.7))
        picture[inside] = picture[inside] * rng.uniform(0, 0.8) + _colour(rng) * rng.uniform(0.2, 1)
    return picture


def lettering(rng: np.random.Generator, resolution: int) -> Array:
    """Lines of random characters in PIL's own font over a filled background."""
    from PIL import Image, ImageDraw, ImageFont

    back = np.clip(_fill(rng, resolution), -1, 1)
    image = Image.fromarray(((back + 1) * 127.5).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    row = int(rng.integers(-4, 8))
    while row < resolution:
        size = int(np.exp(rng.uniform(np.log(8), np.log(max(resolution / 3, 9)))))
        text = "".join(chr(c) for c in rng.integers(33, 127, 2 + 2 * resolution // size))
        ink = tuple(int(c) for c in (_colour(rng) + 1) * 127.5)
        draw.text((int(rng.integers(-8, resolution // 3)), row), text, ink, font=ImageFont.load_default(size=size))
        row += int(size * rng.uniform(1.0, 1.8))
    return np.asarray(image) / 127.5 - 1.0


def _surface(rng: np.random.Generator, x: Array, y: Array) -> Array:
    """A plane, sometimes curved, sometimes bumpy: (R, R), about [-1, 1]."""
    a, b, c = rng.uniform(-1, 1), *rng.uniform(-0.8, 0.8, 2)
    surface = a + b * x + c * y
    if rng.random() < 0.4:
        cx, cy = rng.uniform(-1, 1, 2)
        surface = surface + rng.uniform(-0.6, 0.6) * ((x - cx) ** 2 + (y - cy) ** 2)
    if rng.random() < 0.3:
        surface = surface + rng.uniform(0.02, 0.2) * _spectrum(rng, len(x), rng.uniform(1.2, 2.2))[..., 0]
    return surface


def depth_like(rng: np.random.Generator, resolution: int) -> Array:
    """Grey surfaces that hide each other along sharp edges, over the whole range; unknown (+1) areas now and then."""
    x, y = _grid(resolution)
    depth = _surface(rng, x, y)
    for size in _sizes(rng, int(rng.integers(2, 20)), 0.05):
        inside = _shape(rng, x, y, size)
        depth = np.where(inside, _surface(rng, x, y) * rng.uniform(0.1, 1), depth)
    low, high = np.quantile(depth, (0.02, 0.98))
    depth = (depth - low) / max(high - low, 1e-3) * 2 - 1
    if rng.random() < 0.25:
        depth[_shape(rng, x, y, rng.uniform(0.05, 0.4))] = 1
    return depth


def flow_like(rng: np.random.Generator, resolution: int) -> Array:
    """A grey motion component: near zero, smooth inside each object, with jumps at the edges."""
    x, y = _grid(resolution)
    flow = _surface(rng, x, y) * 0.3
    for size in _sizes(rng, int(rng.integers(1, 12)), 0.08):
        flow = np.where(_shape(rng, x, y, size), rng.uniform(-1, 1) + 0.3 * _surface(rng, x, y), flow)
    return flow * np.exp(rng.uniform(np.log(0.05), np.log(1.0))) + rng.uniform(-0.2, 0.2)


def mask_like(rng: np.random.Generator, resolution: int) -> Array:
    """-1 outside, +1 inside one to five shapes, with holes."""
    x, y = _grid(resolution)
    inside = np.zeros((resolution, resolution), bool)
    for _ in range(rng.integers(1, 6)):
        inside |= _shape(rng, x, y, np.exp(rng.uniform(np.log(0.05), np.log(0.7))))
    for _ in range(rng.integers(0, 4)):
        inside &= ~_shape(rng, x, y, rng.uniform(0.03, 0.3))
    return np.where(inside, 1.0, -1.0)


def on_white(rng: np.random.Generator, resolution: int) -> Array:
    """One painted object on pure white."""
    x, y = _grid(resolution)
    inside = _shape(rng, x, y, rng.uniform(0.2, 0.8), tuple(rng.uniform(-0.5, 0.5, 2)))
    for _ in range(rng.integers(0, 3)):
        inside |= _shape(rng, x, y, rng.uniform(0.1, 0.5), tuple(rng.uniform(-0.5, 0.5, 2)))
    paint = dead_leaves(rng, resolution) if rng.random() < 0.5 else _fill(rng, resolution)
    return np.where(inside[..., None], np.clip(paint, -1, 0.97), 1.0)


Draw = Callable[[np.random.Generator, int], Array]
RGB_KINDS: dict[str, Draw] = {
    "dead_leaves": dead_leaves,
    "noise": coloured_noise,
    "plasma": plasma,
    "gradients": gradients,
    "stripes": _stripes,
    "lettering": lettering,
}
TARGET_KINDS: dict[str, Draw] = {"depth": depth_like, "flow": flow_like, "mask": mask_like, "on_white": on_white}
