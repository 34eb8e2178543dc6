"""Dense matching of two pictures: where each pixel of the first lies in the second, without anything learned.

A pyramid of block matching: from coarse to fine, the second picture is moved by the flow so far, small displacements
are compared in windows of locally normalised colours (soft minimum of the cost, so that the flow is finer than a
pixel), and what is uncertain takes the flow of its neighbourhood (normalised averages, Knutsson and Westin 1993). The
same from the second picture to the first tells where both agree. Its constants were chosen on rendered worlds alone.

What a network is given are 32 channels on the grid of an autoencoder of factor 8: `CHANNELS` for each quarter of a
cell. They stand where a second frame's own features would (``autoencoders.with_features``).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_perception.ops.doubling import doubled
from scaling_perception.support.compiler_options import convolving
from scaling_perception.support.shapes import AnyArray, Array, Float

VERSION = 1
"""Of the features; bumped whenever a pair gives others, so that models and caches of the old ones are refused."""
CHANNELS = ("filled u", "filled v", "found u", "found v", "certainty", "disagreement", "cost", "contrast")
FACTOR = 8
FEATURES = 4 * len(CHANNELS)
_SMALLEST = 8  # pixels of the coarsest level, at least
_REACH = 2  # pixels a round
_ROUNDS = 2  # at each level
_WINDOW = 4  # radius within which costs are averaged
_NORMAL = 3  # radius of the local mean and contrast
_NOISE = 0.03  # contrast, of 1, below which nothing is amplified
_FARTHER = 0.01  # cost of a pixel of displacement
_TEMPERATURE = 0.02  # of the soft minimum
_DAMPING = 0.03  # of least squares, squared contrast a pixel
_VARIANCE, _COST, _APART = 0.25, 0.15, 0.7  # at which certainty falls to 1/e: pixels², cost, pixels
_OWN, _AROUND = 0.3, ((2, 2.0), (6, 1.0), (14, 0.2))  # weights of a pixel and of the windows (radius) around it
_OWN_LAST, _AROUND_LAST = 1.0, ((2, 0.3), (6, 0.1), (16, 0.02))
_AROUND_REFINED = ((2, 0.3), (6, 0.1))
_AGREED = 8  # radius in which a flow and its refinement are compared
_TRUSTED, _UNDECIDED = 0.1, 0.2  # cost by which a refinement must be better for half of it, and its softness
_FLOW_SCALE, _LONGEST = 4.0, 8.0  # pixels at which a channel is 1; largest value of a channel


@functools.lru_cache(maxsize=64)
def _window(length: int, radius: int) -> np.ndarray:
    """(length, length): row i averages the places within ``radius`` of i that exist."""
    near = np.abs(np.subtract.outer(np.arange(length), np.arange(length))) <= radius
    return (near / near.sum(axis=1, keepdims=True)).astype(np.float32)


def _blur(x: jax.Array, radius: int) -> jax.Array:
    """Mean of a window, (..., H, W, C): two products with constant matrices, which every device is good at."""
    height, width = x.shape[-3:-1]
    x = jnp.einsum("ih,...hwc->...iwc", _window(height, radius), x)
    return jnp.einsum("jw,...iwc->...ijc", _window(width, radius), x)


def _half(x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def warp(x: Float[AnyArray, "B H W C"], flow: Float[AnyArray, "B H W 2"]) -> Float[Array, "B H W C"]:
    """``x`` at the places that ``flow`` (pixels, u right and v down) points to; bilinear, edges repeated."""
    batch, height, width, channels = x.shape
    flat = jnp.asarray(x).reshape(batch, height * width, channels)
    column = jnp.clip(jnp.arange(width)[None, None] + flow[..., 0], 0, width - 1)
    row = jnp.clip(jnp.arange(height)[None, :, None] + flow[..., 1], 0, height - 1)
    left, top = (jnp.minimum(jnp.floor(at), most - 2) for at, most in ((column, width), (row, height)))
    right, down = (column - left)[..., None], (row - top)[..., None]
    corner = (top * width + left).astype(jnp.int32).reshape(batch, height * width, 1)

    def value(step: int) -> jax.Array:
        return jnp.take_along_axis(flat, corner + step, axis=1).reshape(x.shape)

    upper = value(0) * (1 - right) + value(1) * right
    return upper * (1 - down) + (value(width) * (1 - right) + value(width + 1) * right) * down


def _normalised(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Colours (B, H, W, 3) less their local mean, over the local contrast; and that contrast (B, H, W, 1)."""
    apart = x - _blur(x, _NORMAL)
    contrast = jnp.sqrt(_blur(jnp.mean(apart * apart, axis=-1, keepdims=True), _NORMAL) + _NOISE**2)
    return apart / contrast, contrast


def _filled(flow: jax.Array, sure: jax.Array, own: float, around: tuple[tuple[int, float], ...]) -> jax.Array:
    """Each pixel's flow mixed with its neighbours' by how sure they are."""
    both = jnp.concatenate([flow * sure, sure], axis=-1)
    mixed = own * both + functools.reduce(jnp.add, [weight * _blur(both, radius) for radius, weight in around])
    return mixed[..., :2] / (mixed[..., 2:] + 1e-9)


def _weighted(share: jax.Array, values: np.ndarray) -> jax.Array:
    """The sum of ``share`` (N, ...) times N values. Term by term: products with a constant are slower on a CPU."""
    return functools.reduce(jnp.add, [float(value) * part for value, part in zip(values, share, strict=True) if value])


def _round(first: jax.Array, second: jax.Array, flow: jax.Array) -> tuple[jax.Array, ...]:
    """One comparison around ``flow``: (filled, found, certainty, cost)."""
    height, width = first.shape[1:3]
    side = range(2 * _REACH + 1)
    steps = np.asarray([(x - _REACH, y - _REACH) for y in side for x in side], np.float32)
    moved = jnp.pad(warp(second, flow), ((0, 0), (_REACH, _REACH), (_REACH, _REACH), (0, 0)), mode="edge")
    # displacements come first (25, B, H, W), so that a row of pixels fills the vectors of a processor
    apart = [
        jnp.minimum(jnp.abs(first - moved[:, y : y + height, x : x + width]), 1.0).mean(axis=-1)
        for y in side
        for x in side
    ]
    cost = _blur(jnp.stack(apart)[..., None], _WINDOW)[..., 0]
    cost = cost + _FARTHER * np.linalg.norm(steps, axis=-1)[:, None, None, None]
    share, least = jax.nn.softmax(-cost / _TEMPERATURE, axis=0), cost.min(axis=0)[..., None]
    step = jnp.stack([_weighted(share, steps[:, axis]) for axis in (0, 1)], axis=-1)
    variance = _weighted(share, np.square(steps).sum(axis=-1))[..., None] - jnp.square(step).sum(axis=-1, keepdims=True)
    sure = jnp.exp(-variance / _VARIANCE - least / _COST) + 1e-3
    return _filled(flow + step, sure, _OWN, _AROUND), flow + step, sure, least


def _refined(first: jax.Array, second: jax.Array, flow: jax.Array) -> jax.Array:
    """``flow`` and a step of least squares (Lucas and Kanade 1981), which takes the pull towards no motion away."""
    moved = warp(second, flow)
    across, down = (jnp.asarray(jnp.gradient(moved, axis=axis)) for axis in (2, 1))
    left = first - moved
    sums = jnp.stack([(one * two).mean(-1) for one, two in ((across, across), (across, down), (down, down))], -1)
    sums = _blur(
        jnp.concatenate([sums, jnp.stack([(side * left).mean(-1) for side in (across, down)], -1)], -1), _WINDOW
    )
    xx, xy, yy, xt, yt = jnp.moveaxis(sums, -1, 0)
    xx, yy = xx + _DAMPING, yy + _DAMPING
    step = jnp.stack([yy * xt - xy * yt, xx * yt - xy * xt], axis=-1) / (xx * yy - xy * xy)[..., None]
    return flow + jnp.clip(step, -1, 1)


def _one_way(first: jax.Array, second: jax.Array) -> tuple[jax.Array, ...]:
    """(filled, found, certainty, cost, contrast of the first picture), at full size."""
    levels = [(first, second)]
    while min(levels[-1][0].shape[1:3]) >= 2 * _SMALLEST and not any(side % 2 for side in levels[-1][0].shape[1:3]):
        levels.append((_half(levels[-1][0]), _half(levels[-1][1])))
    batch, height, width, _ = levels[-1][0].shape
    flow = jnp.zeros((batch, height, width, 2))
    found: list[jax.Array] = []
    contrast = flow
    for number, (one, other) in enumerate(reversed(levels)):
        flow = 2 * doubled(flow) if number else flow
        (one, contrast), (other, _) = _normalised(one), _normalised(other)
        start = (flow, flow, *[jnp.zeros((*flow.shape[:3], 1))] * 2)
        compare = functools.partial(_round, one, other)
        flow, *found = jax.lax.fori_loop(0, _ROUNDS, lambda _, last, compare=compare: compare(last[0]), start)
    for _ in range(_ROUNDS):
        found[0] = _refined(one, other, flow)
        flow = _filled(found[0], found[1], _OWN, _AROUND)
    return flow, *found, contrast


def match(first: Float[AnyArray, "B H W 3"], second: Float[AnyArray, "B H W 3"]) -> dict[str, jax.Array]:
    """Match two batches of pictures in [-1, 1].

    Returns:
        float32 (B, H, W, .): ``filled`` and ``found`` (2), flow in pixels with and without what neighbours say;
        ``certainty`` (1) in 0..1; ``apart`` (1), pixels between a place and where the way there and back ends;
        ``cost`` (1) and ``contrast`` (1).
    """
    first, second = (jnp.asarray(picture, jnp.float32) / 2 for picture in (first, second))
    count = len(first)
    both_ways = _one_way(jnp.concatenate([first, second]), jnp.concatenate([second, first]))
    flow, found, sure, cost, contrast = (part[:count] for part in both_ways)
    apart = jnp.linalg.norm(flow + warp(both_ways[0][count:], flow), axis=-1, keepdims=True)
    sure = sure * jnp.exp(-jnp.square(apart / _APART)) + 1e-4
    filled = _filled(flow, sure, _OWN_LAST, _AROUND_LAST)
    return {"filled": filled, "found": found, "certainty": sure, "apart": apart, "cost": cost, "contrast": contrast}


def refined(
    first: Float[AnyArray, "B H W 3"], second: Float[AnyArray, "B H W 3"], flow: Float[AnyArray, "B H W 2"]
) -> Float[Array, "B H W 2"]:
    """``flow`` (pixels) of two batches of pictures in [-1, 1], with the detail that blocks around it show.

    Twice it is matched again from where it is, and mixed with what that finds by how much better each brings the second
    picture to the first (mean difference of normalised colours in a window).
    """
    (one, _), (other, _) = (_normalised(jnp.asarray(picture, jnp.float32) / 2) for picture in (first, second))

    def differs(flow: jax.Array) -> jax.Array:
        apart = jnp.minimum(jnp.abs(one - warp(other, flow)), 1.0).mean(axis=-1, keepdims=True)
        return _blur(apart, _AGREED)

    def again(number: Any, flow: jax.Array) -> jax.Array:
        new, sure = flow, flow[..., :1]
        for _ in range(_ROUNDS):
            new, _, sure, _ = _round(one, other, new)
        new = _filled(_refined(one, other, new), sure, 1.0, _AROUND_REFINED)
        share = jax.nn.sigmoid((differs(flow) - differs(new) - _TRUSTED) / _UNDECIDED)
        return flow + share * (new - flow)

    return jax.lax.fori_loop(0, 2, again, jnp.asarray(flow, jnp.float32))


@functools.cache
def jitted_refined() -> Callable[..., jax.Array]:
    """``refined``, compiled for each size."""
    return jax.jit(refined, compiler_options=convolving(jax.default_backend(), window_sums=True))


def features(first: Float[AnyArray, "B H W 3"], second: Float[AnyArray, "B H W 3"]) -> Float[Array, "B h w 32"]:
    """What a network is given of a match: `CHANNELS` for each quarter of a cell, about -8..8."""
    made = match(first, second)
    parts = [
        made["filled"] / _FLOW_SCALE,
        made["found"] / _FLOW_SCALE,
        1 + jnp.log10(made["certainty"]) / 2,  # 1e-4..1 to -1..1
        made["apart"],
        made["cost"] / _COST - 1,
        jnp.log10(made["contrast"] / _NOISE) * 2 - 1,
    ]
    x = jnp.clip(jnp.concatenate(parts, axis=-1), -_LONGEST, _LONGEST)
    batch, height, width, channels = x.shape
    side = FACTOR // 2
    x = x.reshape(batch, height // side, side, width // side, side, channels).mean((2, 4))
    x = x.reshape(batch, height // FACTOR, 2, width // FACTOR, 2, channels)
    return jnp.moveaxis(x, 2, 3).reshape(batch, height // FACTOR, width // FACTOR, 4 * channels)
