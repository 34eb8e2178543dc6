"""Stable Diffusion's autoencoder (``AutoencoderKL``): x8 smaller, four latent channels, a Gaussian for every picture.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022); the network is that of
diffusers' ``AutoencoderKL`` with the published sizes as defaults (facts 2), held against its outputs by the tests.
Arrays are NHWC. Weights are float32; ``dtype`` is what convolutions and matmuls run in, while statistics of the norms,
the softmax and the 1x1 convolutions around the latent are float32 always.

Latents here are *unscaled*; what everything else in this package calls a latent is :func:`scale_moments` of them.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from scaling_perception.models.tiny_vae import flatten, upsample
from scaling_perception.ops.attention import attention
from scaling_perception.ops.convolution import conv_general_dilated
from scaling_perception.support.errors import UserError
from scaling_perception.support.shapes import AnyArray, Array, Float, RandomKey, Shaped

PARTS = ("encoder", "decoder")
NORM_EPSILON = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)
ATTENTION_LOGITS = 4096**2  # of one picture at once: 64 MiB in float32; more tokens go in blocks of queries


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of an AutoencoderKL; the defaults are Stable Diffusion's. Names are those of the published ``config.json``.

    Attributes:
        block_out_channels: width of every level, pixels first; each but the last halves the sides.
        layers_per_block: residual blocks of an encoder level; a decoder level has one more.
        latent_channels, in_channels, out_channels: of latent, picture in, picture out.
        norm_num_groups: groups of every GroupNorm.
        scaling_factor: a latent times this has about unit deviation.
        use_quant_conv, use_post_quant_conv: the 1x1 convolutions after the encoder and before the decoder.

    Raises:
        UserError: a size is no whole number of 1 or more, or a width is no multiple of the groups.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    in_channels: int = 3
    out_channels: int = 3
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))  # JSON gives a list
        if not self.block_out_channels:
            raise UserError("autoencoder block_out_channels is empty: give one width for every level")
        names = ("layers_per_block", "latent_channels", "norm_num_groups", "in_channels", "out_channels")
        sizes = [("block_out_channels", width) for width in self.block_out_channels]
        for name, value in sizes + [(name, getattr(self, name)) for name in names]:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"autoencoder {name} has {value!r}: give whole numbers of 1 or more")
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise UserError(
                    f"autoencoder block_out_channels has {width}, which is no multiple of norm_num_groups="
                    f"{self.norm_num_groups}: change one of them"
                )
        if not self.scaling_factor > 0:
            raise UserError(f"autoencoder scaling_factor={self.scaling_factor!r}: give a number above 0")

    @property
    def factor(self) -> int:
        """Image pixels along one side of a latent pixel."""
        return 2 ** (len(self.block_out_channels) - 1)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold and that ``VAEConfig(**d)`` reads back."""
        return {**dataclasses.asdict(self), "block_out_channels": list(self.block_out_channels)}


class GroupNorm(nn.Module):
    """Normalise each sample over all pixels and the channels of a group; statistics in float32, result in ``dtype``."""

    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[AnyArray, "B h w C"]) -> Float[Array, "B h w C"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (channels,))
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,))

        def pooled(
            wide: Float[AnyArray, "B h w C"],
        ) -> Float[AnyArray, "B 1 1 C"]:  # channels stay the last axis throughout: no relayout of the picture
            means = wide.mean(axis=2).mean(axis=1).reshape(-1, self.groups, channels // self.groups).mean(axis=-1)
            return jnp.repeat(means, channels // self.groups, axis=-1)[:, None, None, :]

        centred = x.astype(jnp.float32) - pooled(x.astype(jnp.float32))
        gain = jax.lax.rsqrt(pooled(jnp.square(centred)) + NORM_EPSILON) * scale.reshape(1, 1, 1, -1)
        return (centred * gain + bias.reshape(1, 1, 1, -1)).astype(self.dtype)


def _conv(features: int, name: str, dtype: Any, side: int = 3) -> nn.Conv:
    edge = side // 2
    edges = ((edge, edge), (edge, edge))
    return nn.Conv(
        features, (side, side), padding=edges, dtype=dtype, name=name, conv_general_dilated=conv_general_dilated
    )


class Block(nn.Module):
    """``x + conv(silu(norm(conv(silu(norm(x))))))``, x through a 1x1 convolution where the width changes."""

    width: int
    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[AnyArray, "B h w _"]) -> Float[Array, "B h w _"]:
        y = _conv(self.width, "conv1", self.dtype)(nn.silu(GroupNorm(self.groups, self.dtype, name="norm1")(x)))
        y = _conv(self.width, "conv2", self.dtype)(nn.silu(GroupNorm(self.groups, self.dtype, name="norm2")(y)))
        return y + (x if x.shape[-1] == self.width else _conv(self.width, "shortcut", self.dtype, side=1)(x))


class Attention(nn.Module):
    """Single-head attention of every pixel to every pixel, added to its input."""

    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[AnyArray, "B h w C"]) -> Float[Array, "B h w C"]:
        batch, height, width, channels = x.shape
        tokens = GroupNorm(self.groups, self.dtype, name="norm")(x).reshape(batch, height * width, channels)
        names = ("query", "key", "value")
        query, key, value = (nn.Dense(channels, dtype=self.dtype, name=name)(tokens) for name in names)
        mixed = blockwise_attention(query, key, value)
        return x + nn.Dense(channels, dtype=self.dtype, name="out")(mixed).reshape(x.shape)


def blockwise_attention(
    query: Float[AnyArray, "B T C"],
    key: Float[AnyArray, "B T C"],
    value: Float[AnyArray, "B T C"],
    logits: int = ATTENTION_LOGITS,
) -> Float[Array, "B T C"]:
    """Single-head attention, all (B, T, C), of which at most ``logits`` logits a picture exist at once."""
    tokens = query.shape[1]
    if tokens**2 <= logits:
        return attention(query[:, :, None], key[:, :, None], value[:, :, None])[:, :, 0]

    def one(row: jax.Array) -> jax.Array:  # (B, C), one query of each picture
        return attention(row[:, None, None], key[:, :, None], value[:, :, None])[:, 0, 0]

    mixed = jax.lax.map(one, query.swapaxes(0, 1), batch_size=max(1, logits // tokens))
    return mixed.swapaxes(0, 1)


def _middle(x: jax.Array, groups: int, dtype: Any) -> jax.Array:
    x = Block(x.shape[-1], groups, dtype, name="mid_block0")(x)
    x = Attention(groups, dtype, name="mid_attention")(x)
    return Block(x.shape[-1], groups, dtype, name="mid_block1")(x)


class Encoder(nn.Module):
    """Images (B, H, W, 3) in [-1, 1] -> moments (B, H/8, W/8, 8), float32: mean, then unclamped log-variance."""

    config: VAEConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[AnyArray, "B H W C"]) -> Float[Array, "B h w _"]:
        config, groups = self.config, self.config.norm_num_groups
        x = _conv(config.block_out_channels[0], "conv_in", self.dtype)(images)
        for level, width in enumerate(config.block_out_channels):
            for block in range(config.layers_per_block):
                x = Block(width, groups, self.dtype, name=f"level{level}_block{block}")(x)
            if level < len(config.block_out_channels) - 1:
                # Padding right and bottom only, as the original has it; 'SAME' would do the same for even sides alone.
                down = nn.Conv(
                    width, (3, 3), (2, 2), padding=((0, 1), (0, 1)), dtype=self.dtype, name=f"level{level}_down"
                )
                x = down(x)
        x = nn.silu(GroupNorm(groups, self.dtype, name="norm_out")(_middle(x, groups, self.dtype)))
        x = _conv(2 * config.latent_channels, "conv_out", self.dtype)(x).astype(jnp.float32)
        return _conv(x.shape[-1], "quant_conv", jnp.float32, side=1)(x) if config.use_quant_conv else x


class Decoder(nn.Module):
    """Unscaled latents (B, h, w, 4) -> images (B, 8h, 8w, 3) float32, about [-1, 1], not clipped.

    Levels are numbered as they run: level 0 is the smallest.
    """

    config: VAEConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, latents: Float[AnyArray, "B h w _"]) -> Float[Array, "B H W C"]:
        config, groups = self.config, self.config.norm_num_groups
        x = latents
        if config.use_post_quant_conv:
            x = _conv(config.latent_channels, "post_quant_conv", jnp.float32, side=1)(x)
        widths = config.block_out_channels[::-1]
        x = _middle(_conv(widths[0], "conv_in", self.dtype)(x), groups, self.dtype)
        for level, width in enumerate(widths):
            for block in range(config.layers_per_block + 1):
                x = Block(width, groups, self.dtype, name=f"level{level}_block{block}")(x)
            if level < len(widths) - 1:
                x = _conv(width, f"level{level}_up", self.dtype)(upsample(x))
        x = nn.silu(GroupNorm(groups, self.dtype, name="norm_out")(x))
        return _conv(config.out_channels, "conv_out", self.dtype)(x).astype(jnp.float32)


def check_sides(config: VAEConfig, images: Shaped[AnyArray, "B H W C"]) -> None:
    """Refuse images (B, H, W, C) whose sides are no multiples of the factor."""
    height, width = images.shape[1:3]
    if height % config.factor or width % config.factor:
        raise UserError(
            f"image size {width}x{height} is no multiple of {config.factor}, which the autoencoder needs: resize or "
            "pad the images"
        )


def moments(
    params: Mapping[str, Any], config: VAEConfig, images: Float[AnyArray, "B H W C"], dtype: Any = jnp.float32
) -> Float[Array, "B h w _"]:
    """Images (B, H, W, 3) in [-1, 1] -> (B, h, w, 2 * 4) float32: mean and log-variance as the network gives them.

    Raises:
        UserError: a side of the images is no multiple of the autoencoder's factor.
    """
    check_sides(config, images)
    return Encoder(config, dtype).apply({"params": params["encoder"]}, images)  # type: ignore[return-value]


def split_moments(both: Float[AnyArray, "*B _"]) -> tuple[Float[Array, "*B C"], Float[Array, "*B C"]]:
    """(..., 2 * 4) -> (mean, log-variance clamped to [-30, 20])."""
    mean, logvar = jnp.split(both, 2, axis=-1)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)


def encode_moments(
    params: Mapping[str, Any], config: VAEConfig, images: Float[AnyArray, "B H W _"], dtype: Any = jnp.float32
) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
    """The Gaussian of each picture's unscaled latent: (mean, log-variance), both (B, h, w, 4) float32.

    Args:
        params: ``{"encoder": tree, "decoder": tree}``. images: (B, H, W, 3) in [-1, 1]. dtype: of the computation.

    Raises:
        UserError: a side of the images is no multiple of the autoencoder's factor.
    """
    return split_moments(moments(params, config, images, dtype))


def sample(
    mean: Float[AnyArray, "*shape"], logvar: Float[AnyArray, "*shape"], key: RandomKey
) -> Float[Array, "*shape"]:
    """A draw from the Gaussian, in the units of ``mean``; scaled or not, as long as both are."""
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, mean.dtype)


def scale_moments(
    config: VAEConfig, mean: Float[AnyArray, "*shape"], logvar: Float[AnyArray, "*shape"]
) -> tuple[Float[AnyArray, "*shape"], Float[AnyArray, "*shape"]]:
    """Mean and log-variance of ``scaling_factor * z``, of which :func:`sample` draws scaled latents."""
    return mean * config.scaling_factor, logvar + 2 * math.log(config.scaling_factor)


def decode(
    params: Mapping[str, Any], config: VAEConfig, latents: Float[AnyArray, "B h w _"], dtype: Any = jnp.float32
) -> Float[Array, "B H W C"]:
    """Unscaled latents (B, h, w, 4) -> images (B, 8h, 8w, 3) float32, about [-1, 1], not clipped."""
    return Decoder(config, dtype).apply({"params": params["decoder"]}, latents)  # type: ignore[return-value]


def init_part(part: str, config: VAEConfig, key: RandomKey) -> dict[str, Any]:
    """Fresh float32 parameters of the ``"encoder"`` or the ``"decoder"``."""
    if part == "encoder":
        picture = jnp.zeros((1, 2 * config.factor, 2 * config.factor, config.in_channels))
        return dict(Encoder(config).init(key, picture)["params"])
    return dict(Decoder(config).init(key, jnp.zeros((1, 2, 2, config.latent_channels)))["params"])


def part_shapes(part: str, config: VAEConfig) -> dict[str, tuple[int, ...]]:
    """Parameter name (joined by '/') -> shape, without building an array."""
    return dict(_shapes(part, config))


@functools.lru_cache(16)  # tracing the network takes a good part of a second, and reading a file asks several times
def _shapes(part: str, config: VAEConfig) -> dict[str, tuple[int, ...]]:
    tree = jax.eval_shape(lambda: init_part(part, config, jax.random.key(0)))
    return {name: leaf.shape for name, leaf in flatten(tree).items()}


def macs(part: str, config: VAEConfig, height: int, width: int) -> int:
    """Multiply-accumulates of one pass over one picture of ``height`` x ``width`` image pixels (facts 1.4).

    Convolutions, and of the attention its four projections and two products; norms, biases and softmax are left out.
    """
    levels = len(config.block_out_channels)
    latent = height * width // config.factor**2
    total = 2 * latent**2 * config.block_out_channels[-1]
    for name, shape in part_shapes(part, config).items():
        layer, leaf = name.split("/")[0], name.split("/")[-1]
        if leaf != "kernel":
            continue
        halvings = levels - 1  # of the image's sides, where this layer's output lies
        if layer.startswith("level"):
            level = int(layer[len("level") : layer.index("_")]) + layer.endswith(("_down", "_up"))
            halvings = level if part == "encoder" else levels - 1 - level
        elif layer == ("conv_in" if part == "encoder" else "conv_out"):
            halvings = 0
        total += int(np.prod(shape)) * (height * width // 4**halvings)
    return total
