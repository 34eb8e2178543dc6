"""EfficientNet-Lite0 without its head: features of a small network that was trained on the photographs of ImageNet.

Source: Tan and Le, "EfficientNet" (2019), in the "Lite" form for small devices: no squeeze-and-excitation, ReLU6, a
stem and a last layer of fixed width. The weights that are shipped were trained by others on ImageNet (Apache-2.0, see
``weights/lite0/README.md``); here they are frozen, their batch normalisation is folded into the convolutions, and the
outputs of three blocks, at strides 8, 16 and 32, are projected to a few channels of about unit variance.

A picture is enlarged to twice its size first, so that the features lie on the grid of an autoencoder of factor 8.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling_perception.models.weight_files import read_safetensors
from scaling_perception.ops.convolution import How, convolution, inverted_bottleneck, same_padding
from scaling_perception.ops.doubling import doubled
from scaling_perception.support.errors import UserError
from scaling_perception.support.shapes import AnyArray, Array, Float

FOLDER = Path(__file__).resolve().parent.parent / "weights" / "lite0"
TAKEN = (4, 10, 15)
"""Blocks whose outputs are used."""
WIDTH = 472
"""Their channels together."""
FEATURES = 32
"""F, channels that the shipped projection makes of them."""


class Block(NamedTuple):
    """One inverted bottleneck: channels in and out, factor of its inner width, side of its kernel, stride."""

    inner: int
    width: int
    kernel: int
    stride: int
    into: int


_STAGES = ((1, 16, 3, 1, 1), (6, 24, 3, 2, 2), (6, 40, 5, 2, 2), (6, 80, 3, 2, 3), (6, 112, 5, 1, 3), (6, 192, 5, 2, 4))
_LAST = (6, 320, 3, 1, 1)  # inner, width, kernel, stride, blocks
STEM = 32


def blocks() -> tuple[Block, ...]:
    """The 16 blocks in their order."""
    found, into = [], STEM
    for inner, width, kernel, stride, many in (*_STAGES, _LAST):
        for number in range(many):
            found.append(Block(inner * into, width, kernel, 1 if number else stride, into))
            into = width
    return tuple(found)


def shapes(features: int) -> dict[str, tuple[int, ...]]:
    """Name of each tensor -> its shape; kernels are (height, width, in, out), of depthwise ones (height, width, C)."""
    found: dict[str, tuple[int, ...]] = {"stem/kernel": (3, 3, 3, STEM), "stem/bias": (STEM,)}
    for number, block in enumerate(blocks()):
        name = f"block{number:02d}"
        if block.inner != block.into:
            found |= {f"{name}/expand/kernel": (block.into, block.inner), f"{name}/expand/bias": (block.inner,)}
        found |= {f"{name}/depth/kernel": (block.kernel, block.kernel, block.inner)}
        found |= {f"{name}/depth/bias": (block.inner,), f"{name}/project/kernel": (block.inner, block.width)}
        found |= {f"{name}/project/bias": (block.width,)}
    return {**found, "features/kernel": (WIDTH, features), "features/bias": (features,)}


def blocks_of(params: Mapping[str, Any], images: Float[AnyArray, "B H W 3"]) -> list[jax.Array]:
    """The outputs of all blocks for pictures in [-1, 1], at the size they have."""
    x = (jnp.asarray(images) * 127.5 + 0.5) / 128
    stem = params["stem"]
    kernel = jnp.asarray(stem["kernel"], x.dtype)
    x = convolution(x, kernel, jnp.asarray(stem["bias"]), how=How(2, same_padding(3, 2, x.shape[1:3]), "relu6"))
    found = []
    for number, block in enumerate(blocks()):
        x = inverted_bottleneck(
            x, params[f"block{number:02d}"], block.stride, block.stride == 1 and block.into == block.width
        )
        found.append(x)
    return found


def stacked(params: Mapping[str, Any], images: Float[AnyArray, "B H W 3"]) -> Float[Array, "B h w _"]:
    """The taken blocks' outputs on one grid, (B, H/8, W/8, 472): averaged where finer, interpolated where coarser.

    Raises:
        UserError: H or W is no multiple of 16.
    """
    batch, height, width, _ = images.shape
    if height % 16 or width % 16:
        raise UserError(
            f"image size {width}x{height} is no multiple of 16, which the features of lite0 need: resize the images"
        )
    found, grid, out = blocks_of(params, doubled(images)), (height // 8, width // 8), []
    for number in TAKEN:
        x = found[number]
        if x.shape[1] > grid[0]:
            x = x.reshape(batch, grid[0], 2, grid[1], 2, -1).mean(axis=(2, 4))
        elif x.shape[1] < grid[0]:
            x = jax.image.resize(x, (batch, *grid, x.shape[-1]), "linear")
        out.append(x)
    return jnp.concatenate(out, axis=-1)


def features(params: Mapping[str, Any], images: Float[AnyArray, "B H W 3"]) -> Float[Array, "B h w F"]:
    """Pictures (B, H, W, 3) in [-1, 1] to features (B, H/8, W/8, F) of about unit variance.

    Raises:
        UserError: H or W is no multiple of 16.
    """
    own = params["features"]
    return stacked(params, images) @ jnp.asarray(own["kernel"]) + jnp.asarray(own["bias"])[None, None, None]


def macs(channels: int, height: int, width: int) -> int:
    """Multiply-accumulates of ``features`` with ``channels`` channels for one picture."""
    side, total = height * width, height * width * 9 * 3 * STEM  # the stem's output has the picture's own size
    for block in blocks():
        total += side * block.into * block.inner * (block.inner != block.into)
        side //= block.stride**2
        total += side * (block.kernel**2 * block.inner + block.inner * block.width)
    return total + height * width // 64 * WIDTH * channels


def load(folder: Path = FOLDER) -> dict[str, Any]:
    """The shipped parameters, float32 (numpy): whole numbers of 8 bits times the scale of their output channel.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = folder / "lite0.safetensors"
    state, _ = read_safetensors(file)
    flat = {
        name: array * state[f"{name}/scale"] if f"{name}/scale" in state else array
        for name, array in state.items()
        if not name.endswith("/scale")
    }
    wanted = shapes(len(flat.get("features/bias", ())))
    for name in sorted(wanted.keys() | flat.keys()):
        if name not in flat or name not in wanted or flat[name].shape != wanted[name]:
            raise UserError(
                f"{file}: tensor '{name}' is missing, unknown or of another shape: install the package again"
            )
    return tree_of(flat)


def tree_of(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Names joined by slashes to a tree."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        at, *way = tree, *name.split("/")
        for step in way[:-1]:
            at = at.setdefault(step, {})
        at[way[-1]] = np.asarray(leaf, np.float32)
    return tree
