"""Bounded memory for Stable Diffusion's autoencoder: few samples at once, and large pictures tile by tile.

Everything is chosen from shapes while tracing, so a call compiles to one program without branches.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_perception.models import vae
from scaling_perception.support.errors import UserError
from scaling_perception.support.shapes import AnyArray, Array, Float

Network = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class VAELimits:
    """What of a batch is inside the network at once. All sizes are in latent pixels (8 image pixels with SD's sizes).

    Attributes:
        decode_pixels: pixels of all samples decoded together; the rest waits its turn. The default is one picture of
            512 or four of 256. 0: the whole batch. Where a batch lies on N devices, give N times as many.
        encode_pixels: the same for encoding; 0 by default, because training encodes batches that lie on many devices.
        tile: side of a tile; pictures with a longer side are coded in overlapping tiles. 0: never, which is exact: a
            tile has norms and attention of its own, so that a tiled picture differs slightly from a whole one.
        overlap: least width that neighbouring tiles share, where one fades linearly into the other.

    Raises:
        UserError: a negative size, or an overlap that leaves a tile nothing of its own.
    """

    decode_pixels: int = 64**2
    encode_pixels: int = 0
    tile: int = 0
    overlap: int = 16

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 0:
                raise UserError(f"autoencoder limit {name}={value}: give 0 or more")
        if self.tile and self.overlap >= self.tile:
            raise UserError(
                f"autoencoder limit overlap={self.overlap} is no less than tile={self.tile}: give about a quarter of it"
            )


WHOLE = VAELimits(decode_pixels=0)
TILED = VAELimits(tile=64)  # pictures above 512 in tiles of 512, faded over at least 128


def tiled_decode(
    params: Mapping[str, Any],
    config: vae.VAEConfig,
    latents: Float[AnyArray, "B h w _"],
    limits: VAELimits = TILED,
    dtype: Any = jnp.float32,
) -> Float[Array, "B H W C"]:
    """:func:`vae.decode` within ``limits``: (B, h, w, 4) -> (B, 8h, 8w, 3) float32.

    At most ``max(limits.decode_pixels, one tile)`` latent pixels are in the network at once. Where no side is longer
    than the tile the result is that of the whole picture.
    """

    def network(x: Float[AnyArray, "B _ _ C"]) -> Float[Array, "B _ _ _"]:
        return sliced(lambda part: vae.decode(params, config, part, dtype), x, limits.decode_pixels, 1)

    return blended(network, latents, limits, 1, config.factor)


def tiled_encode(
    params: Mapping[str, Any],
    config: vae.VAEConfig,
    images: Float[AnyArray, "B H W _"],
    limits: VAELimits = TILED,
    dtype: Any = jnp.float32,
) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
    """:func:`vae.encode_moments` within ``limits``: (B, H, W, 3) -> mean and log-variance (B, H/8, W/8, 4) float32.

    Means and log-variances (before the clamp) are what fades from tile to tile.

    Raises:
        UserError: a side of the images is no multiple of the autoencoder's factor.
    """
    vae.check_sides(config, images)

    def network(x: Float[AnyArray, "B _ _ C"]) -> Float[Array, "B _ _ _"]:
        return sliced(lambda part: vae.moments(params, config, part, dtype), x, limits.encode_pixels, config.factor)

    return vae.split_moments(blended(network, images, limits, config.factor, 1))


def sliced(network: Network, x: Float[AnyArray, "B H W C"], pixels: int, side: int) -> Float[Array, "B _ _ _"]:
    """``network(x)``, few samples of x (B, H, W, C) at a time.

    Args:
        pixels: the most latent pixels at once (one sample always goes); 0 = all. side: pixels of x per latent pixel.
    """
    batch, height, width = x.shape[:3]
    most = max(1, pixels * side**2 // (height * width)) if pixels else batch
    count = max((n for n in range(1, min(most, batch) + 1) if batch % n == 0), default=batch)
    if count == batch:
        return network(x)
    # Each turn takes samples from all over the batch: where it is split between devices, all of them have work.
    turns = x.reshape(count, batch // count, *x.shape[1:]).swapaxes(0, 1)
    made = jax.lax.map(network, turns).swapaxes(0, 1)
    return made.reshape(batch, *made.shape[2:])


def blended(
    network: Network, x: Float[AnyArray, "B H W C"], limits: VAELimits, side_in: int, side_out: int
) -> Float[Array, "B _ _ _"]:
    """``network(x)`` as a weighted sum over tiles of x (B, H, W, C), one tile of the whole batch at a time.

    Args:
        side_in, side_out: pixels of x, and of what the network makes of it, per latent pixel.
    """
    height, width = x.shape[1] // side_in, x.shape[2] // side_in
    if not limits.tile or max(height, width) <= limits.tile:
        return network(x)
    tile = min(limits.tile, height), min(limits.tile, width)
    rows, columns = (tile_starts(length, limits.tile, limits.overlap) for length in (height, width))
    piece = (x.shape[0], tile[0] * side_in, tile[1] * side_in, x.shape[3])
    made = jax.eval_shape(network, jax.ShapeDtypeStruct(piece, x.dtype))
    fades = [fade(starts, length, side_out) for starts, length in ((rows, tile[0]), (columns, tile[1]))]
    row, column = (index.ravel() for index in np.indices((len(rows), len(columns))))
    places = (np.asarray(rows)[row], np.asarray(columns)[column], fades[0][row], fades[1][column])

    def add(canvas: jax.Array, place: Any) -> tuple[jax.Array, None]:
        top, left, vertical, horizontal = place
        part = jax.lax.dynamic_slice(x, (0, top * side_in, left * side_in, 0), piece)
        part = network(part) * vertical[None, :, None, None] * horizontal[None, None, :, None]
        corner = (0, top * side_out, left * side_out, 0)
        return jax.lax.dynamic_update_slice(
            canvas, jax.lax.dynamic_slice(canvas, corner, made.shape) + part, corner
        ), None

    canvas = jnp.zeros((x.shape[0], height * side_out, width * side_out, made.shape[3]), made.dtype)
    return jax.lax.scan(add, canvas, places)[0]


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles start along a side: as few as share ``overlap``, evenly spread, the last one ending at the end."""
    if length <= tile:
        return [0]
    steps = math.ceil((length - tile) / (tile - overlap))
    return [round(step * (length - tile) / steps) for step in range(steps + 1)]


def fade(starts: Sequence[int], tile: int, side: int) -> Float[np.ndarray, "tiles length"]:
    """Weights (tiles, tile * side) float32 along one axis; over the tiles they sum to 1 at every pixel.

    A tile rises linearly over what it shares with the one before it and falls over what it shares with the next.
    """
    weights = np.ones((len(starts), tile * side))
    position = np.arange(tile * side) + 0.5
    for index, (before, after) in enumerate(zip(starts, starts[1:], strict=False)):
        shared = (before + tile - after) * side
        if shared:
            weights[index] = np.minimum(weights[index], (tile * side - position) / shared)
            weights[index + 1] = np.minimum(weights[index + 1], position / shared)
    total = np.zeros((starts[-1] + tile) * side)
    for start, row in zip(starts, weights, strict=True):
        total[start * side : (start + tile) * side] += row
    return np.stack(
        [row / total[start * side : (start + tile) * side] for start, row in zip(starts, weights, strict=True)]
    ).astype(np.float32)
