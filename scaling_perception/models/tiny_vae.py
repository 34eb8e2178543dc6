"""A small convolutional autoencoder of the shape of TAESD: x8 smaller, four latent channels, no normalisation layers.

Source: TAESD by Ollin Boer Bohan ("madebyollin", MIT licence; ``AutoencoderTiny`` in diffusers). Its encoder gives
Stable Diffusion's latents, already times 0.18215, and its decoder turns them back into RGB. The defaults here are
TAESD's; narrower levels and a first level that works on 2x2 pixels at once (``patch=2``) give a much cheaper network
that speaks the same latents. Images are NHWC in [-1, 1] (the files' own convention of [0, 1] is handled inside).

Convolutions are XLA's. Writing a 3x3 convolution as nine shifted slices and one matrix product was measured on a CPU
core (batch 8, 16 to 64 pixels, 32 to 96 channels, float32): slower in every case, 1.1 to 2.5 times in the gradient.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from scaling_perception.ops.convolution import How, convolution
from scaling_perception.support.errors import UserError
from scaling_perception.support.shapes import AnyArray, Array, Float, RandomKey


@dataclasses.dataclass(frozen=True)
class TinyVAEConfig:
    """Widths and residual blocks per level; every level halves (encoder) or doubles (decoder) the sides.

    ``encoder_*`` run from pixels to latents, ``decoder_*`` from latents to pixels. ``patch`` pixels in each direction
    are folded into channels before the first level, so ``factor = patch * 2 ** (levels - 1)``.

    Raises:
        UserError: the lists disagree in length.
    """

    encoder_widths: tuple[int, ...] = (64, 64, 64, 64)
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_widths: tuple[int, ...] = (64, 64, 64, 64)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    patch: int = 1
    latent_channels: int = 4

    def __post_init__(self) -> None:
        for name in ("encoder_widths", "encoder_blocks", "decoder_widths", "decoder_blocks"):
            object.__setattr__(self, name, tuple(int(v) for v in getattr(self, name)))  # JSON gives lists
        lists = (self.encoder_widths, self.encoder_blocks, self.decoder_widths, self.decoder_blocks)
        if len({len(values) for values in lists}) != 1 or not self.encoder_widths:
            raise UserError(f"{self}: give one width and one block count for every level, in encoder and decoder")

    @property
    def factor(self) -> int:
        """How many image pixels one latent pixel stands for, in each direction."""
        return self.patch * 2 ** (len(self.encoder_widths) - 1)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold and that ``TinyVAEConfig(**d)`` reads back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


TAESD = TinyVAEConfig()
SMALL = TinyVAEConfig(
    encoder_widths=(32, 64, 64),
    encoder_blocks=(1, 3, 3),
    decoder_widths=(64, 64, 32),
    decoder_blocks=(3, 2, 2),
    patch=2,
)


def space_to_depth(x: Float[AnyArray, "B H W _"], patch: int) -> Float[AnyArray, "B _ _ _"]:
    """(B, H, W, C) -> (B, H/patch, W/patch, patch*patch*C): each patch becomes one pixel."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // patch, w // patch, patch * patch * c)


def depth_to_space(x: Float[AnyArray, "B _ _ _"], patch: int) -> Float[AnyArray, "B H W _"]:
    """The inverse of :func:`space_to_depth`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, patch, patch, c // (patch * patch))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * patch, w * patch, c // (patch * patch))


def upsample(x: Float[AnyArray, "B h w C"]) -> Float[Array, "B 2*h 2*w C"]:
    """Nearest-neighbour doubling, (B, H, W, C) -> (B, 2H, 2W, C)."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


class Conv(nn.Module):
    """A convolution by 3 by 3 with what follows it. Padding of one on both sides also at stride 2, as in torch; 'SAME'
    would pad right and bottom only. ``gain``: of the variance that the kernel starts with."""

    features: int
    stride: int = 1
    bias: bool = True
    gain: float = 2.0
    activation: str = "none"

    @nn.compact
    def __call__(
        self, x: Float[AnyArray, "B H W C"], residual: Float[AnyArray, "B h w _"] | None = None
    ) -> Float[Array, "B h w _"]:
        init = nn.initializers.variance_scaling(self.gain, "fan_in", "truncated_normal")
        kernel = self.param("kernel", init, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,)) if self.bias else None
        given = promote_dtype(x, kernel, bias, residual)
        return convolution(*given, how=How(self.stride, activation=self.activation))


class Block(nn.Module):
    """``relu(x + conv(relu(conv(relu(conv(x))))))``. The last conv starts small, as nothing normalises the sum."""

    width: int

    @nn.compact
    def __call__(self, x: Float[AnyArray, "B h w _"]) -> Float[Array, "B h w _"]:
        y = Conv(self.width, activation="relu", name="conv0")(x)
        y = Conv(self.width, activation="relu", name="conv1")(y)
        return Conv(self.width, gain=0.1, activation="relu", name="conv2")(y, x)


class Encoder(nn.Module):
    """Images (B, H, W, 3) in [-1, 1] -> scaled latents (B, H/8, W/8, 4), in the images' float type."""

    config: TinyVAEConfig

    @nn.compact
    def __call__(self, images: Float[AnyArray, "B H W 3"]) -> Float[Array, "B h w C"]:
        config = self.config
        x = space_to_depth((images + 1) / 2, config.patch)
        for level, (width, blocks) in enumerate(zip(config.encoder_widths, config.encoder_blocks, strict=True)):
            if level == 0:
                x = Conv(width, gain=1.0, name="stem")(x)
            else:
                x = Conv(width, stride=2, bias=False, gain=1.0, name=f"down{level}")(x)
            for block in range(blocks):
                x = Block(width, name=f"level{level}_block{block}")(x)
        return Conv(config.latent_channels, gain=1.0, name="head")(x)


class Decoder(nn.Module):
    """Scaled latents (B, h, w, 4) -> images (B, 8h, 8w, 3), about [-1, 1] and unclipped.

    The first operation is ``tanh(z / 3) * 3``: the latents of real images stay within about three, so anything beyond
    is squeezed instead of trusted.
    """

    config: TinyVAEConfig

    @nn.compact
    def __call__(self, latents: Float[AnyArray, "B h w C"]) -> Float[Array, "B H W 3"]:
        config = self.config
        x = jnp.tanh(latents / 3) * 3
        for level, (width, blocks) in enumerate(zip(config.decoder_widths, config.decoder_blocks, strict=True)):
            if level == 0:
                x = Conv(width, activation="relu", name="stem")(x)
            else:
                x = Conv(width, bias=False, gain=1.0, name=f"up{level}")(upsample(x))
            for block in range(blocks):
                x = Block(width, name=f"level{level}_block{block}")(x)
        x = Conv(3 * config.patch**2, gain=1.0, name="head")(x)
        return depth_to_space(x, config.patch) * 2 - 1


def init_part(part: str, config: TinyVAEConfig, key: RandomKey) -> dict[str, Any]:
    """Fresh float32 parameters of the ``"encoder"`` or the ``"decoder"``."""
    side = config.factor * 2
    if part == "encoder":
        return dict(Encoder(config).init(key, jnp.zeros((1, side, side, 3)))["params"])
    return dict(Decoder(config).init(key, jnp.zeros((1, 2, 2, config.latent_channels)))["params"])


def part_shapes(part: str, config: TinyVAEConfig) -> dict[str, tuple[int, ...]]:
    """Parameter name (joined by '/') -> shape, without tracing the network: every loading of weights asks for it."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, ins: int, outs: int, bias: bool = True) -> None:
        shapes.update({f"{name}/bias": (outs,)} if bias else {})
        shapes[f"{name}/kernel"] = (3, 3, ins, outs)

    pixels = 3 * config.patch**2
    if part == "encoder":
        widths, blocks, resize = config.encoder_widths, config.encoder_blocks, "down"
        ins, outs = pixels, config.latent_channels
    else:
        widths, blocks, resize = config.decoder_widths, config.decoder_blocks, "up"
        ins, outs = config.latent_channels, pixels
    for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        conv(f"{resize}{level}" if level else "stem", ins, width, bias=not level)
        for block in range(count):
            for index in range(3):
                conv(f"level{level}_block{block}/conv{index}", width, width)
        ins = width
    conv("head", ins, outs)
    return dict(sorted(shapes.items(), key=lambda named: named[0].split("/")))  # as trees are flattened


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries -> one dictionary with names joined by '/'."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out |= {f"{name}/{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            out[name] = value
    return out


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`flatten`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = value
    return tree


def torch_names(part: str, config: TinyVAEConfig) -> dict[str, str]:
    """Our parameter name -> the name in TAESD's own file (position in an ``nn.Sequential``, then ``weight``/``bias``).

    The decoder's position 0 is the clamp and 2 a ReLU; each upsampling is a position of its own. diffusers keeps the
    clamp outside, so its decoder's positions are one less, and prefixes ``encoder.layers.`` / ``decoder.layers.``.
    """
    names: dict[str, str] = {}

    def conv(ours: str, theirs: str, bias: bool = True) -> None:
        names[f"{ours}/kernel"] = f"{theirs}.weight"
        if bias:
            names[f"{ours}/bias"] = f"{theirs}.bias"

    encoder = part == "encoder"
    position = 0 if encoder else 1
    conv("stem", f"{position}")
    position += 1 if encoder else 2
    for level, blocks in enumerate(config.encoder_blocks if encoder else config.decoder_blocks):
        if level:
            position += 0 if encoder else 1
            conv(f"{'down' if encoder else 'up'}{level}", f"{position}", bias=False)
            position += 1
        for block in range(blocks):
            for index in range(3):
                conv(f"level{level}_block{block}/conv{index}", f"{position}.conv.{2 * index}")
            position += 1
    conv("head", f"{position}")
    return names


def from_torch(
    part: str, config: TinyVAEConfig, state: Mapping[str, Any], origin: str = "state dict"
) -> dict[str, Any]:
    """TAESD weights (numpy, torch layout [out, in, kh, kw], either naming) -> our parameters, float32 numpy.

    ``state`` may hold both parts (diffusers' single file) or one. ``origin`` names the file in errors.

    Raises:
        UserError: a tensor is missing, left over, or has another shape; both shapes are named.
    """
    prefix = f"{part}.layers."
    diffusers = any(name.startswith(prefix) for name in state)
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} if diffusers else dict(state)
    shapes = part_shapes(part, config)
    flat: dict[str, Any] = {}
    for ours, theirs in torch_names(part, config).items():
        if diffusers and part == "decoder":
            position, rest = theirs.split(".", 1)
            theirs = f"{int(position) - 1}.{rest}"
        if theirs not in state:
            raise UserError(f"{origin}: tensor '{theirs}' of the {part} is missing: give a whole TAESD {part} file")
        value = np.asarray(state.pop(theirs), np.float32)
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
        if value.shape != shapes[ours]:
            raise UserError(
                f"{origin}: tensor '{theirs}' gives {ours} the shape {value.shape} but {shapes[ours]} is expected: "
                "give the file of the matching model"
            )
        flat[ours] = value
    if state:
        raise UserError(f"{origin}: tensor '{min(state)}' is not of this {part}: give the file of the matching model")
    return unflatten(flat)


def macs(part: str, config: TinyVAEConfig, height: int, width: int) -> int:
    """Multiply-accumulates of one forward pass on one image of ``height`` x ``width`` pixels (convolutions only)."""
    pixels = height * width // config.patch**2
    total = 0
    for name, shape in part_shapes(part, config).items():
        if not name.endswith("/kernel"):
            continue
        head = name.split("/")[0]
        levels = len(config.encoder_widths)
        if part == "encoder":
            level = 0 if head == "stem" else levels - 1 if head == "head" else _level(head)
        else:
            level = levels - 1 - (0 if head == "stem" else levels - 1 if head == "head" else _level(head))
        total += int(np.prod(shape)) * pixels // 4**level
    return total


def _level(name: str) -> int:
    digits = name.split("_")[0].lstrip("abcdefghijklmnopqrstuvwxyz")
    return int(digits)
