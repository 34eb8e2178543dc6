"""Published AutoencoderKL files: which tensor is which parameter, and which ``config.json`` is of that network.

Two generations of names are read: the mid attention's matrices are ``to_q, to_k, to_v, to_out.0`` today and
``query, key, value, proj_attn`` in the Stable Diffusion files, as [out, in] or, older still, as 1x1 convolutions
[out, in, 1, 1]. Today's are written. Arrays are numpy on the host; nothing here needs torch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling_perception.models.tiny_vae import flatten, unflatten
from scaling_perception.models.vae import PARTS, VAEConfig, part_shapes
from scaling_perception.support.errors import UserError, did_you_mean

CLASS = "AutoencoderKL"

# our layer -> the file's, of a residual block and of an attention (today's name first)
_BLOCK = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "shortcut": "conv_shortcut"}
_ATTENTION = {
    "norm": ("group_norm",),
    "query": ("to_q", "query"),
    "key": ("to_k", "key"),
    "value": ("to_v", "value"),
    "out": ("to_out.0", "proj_attn"),
}
_OUTSIDE = ("quant_conv", "post_quant_conv")
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# what the file may say without changing the network, and what it may say only in this way
_IGNORED = ("sample_size", "force_upcast")
_FIXED = {
    "act_fn": ("silu", "swish"),
    "mid_block_add_attention": (True,),
    "shift_factor": (None, 0, 0.0),
    "latents_mean": (None,),
    "latents_std": (None,),
}
_NEEDED = ("block_out_channels", "layers_per_block")
_KINDS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


def torch_names(part: str, config: VAEConfig) -> dict[str, tuple[str, ...]]:
    """Our parameter (joined by '/', within the part) -> the names it may have in a file, today's first."""
    names: dict[str, tuple[str, ...]] = {}
    for leaf in part_shapes(part, config):
        *layers, end = leaf.split("/")
        names[leaf] = tuple(f"{layer}.{_LEAVES[end]}" for layer in _torch_layers(part, layers))
    return names


def _torch_layers(part: str, layers: list[str]) -> tuple[str, ...]:
    head = layers[0]
    if head in _OUTSIDE:
        return (head,)
    if head == "mid_attention":
        return tuple(f"{part}.mid_block.attentions.0.{name}" for name in _ATTENTION[layers[1]])
    if head.startswith("mid_block"):
        return (f"{part}.mid_block.resnets.{head.removeprefix('mid_block')}.{_BLOCK[layers[1]]}",)
    if head.startswith("level"):
        level, what = head.removeprefix("level").split("_")
        blocks = f"{part}.{'down' if part == 'encoder' else 'up'}_blocks.{level}"
        if what in ("down", "up"):
            return (f"{blocks}.{what}samplers.0.conv",)
        return (f"{blocks}.resnets.{what.removeprefix('block')}.{_BLOCK[layers[1]]}",)
    return (f"{part}.conv_norm_out" if head == "norm_out" else f"{part}.{head}",)


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def vae_from_torch(
    state: Mapping[str, np.ndarray], config: VAEConfig, origin: str = "autoencoder"
) -> dict[str, dict[str, Any]]:
    """``{"encoder": tree, "decoder": tree}``, float32 numpy, from a state dict of numpy arrays of any float type.

    Args:
        origin: names the file in errors.

    Raises:
        UserError: a tensor is missing, unexpected, or of another shape, by its name.
    """
    left = set(state)
    params: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        shapes, flat = part_shapes(part, config), {}
        for leaf, names in torch_names(part, config).items():
            expected = _torch_shape(shapes[leaf])
            name = next((name for name in names if name in state), None)
            if name is None:
                raise UserError(f"{origin}: tensor '{names[0]}' {expected} is missing: copy or download the file again")
            value = np.asarray(state[name], np.float32)
            if len(expected) == 2 and value.shape == (*expected, 1, 1):
                value = value[:, :, 0, 0]
            if value.shape != expected:
                raise UserError(
                    f"{origin}: tensor '{name}' has shape {value.shape} but {expected} is expected: give the "
                    "config.json that belongs to the file"
                )
            left.discard(name)
            flat[leaf] = np.ascontiguousarray(value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T)
        params[part] = unflatten(flat)
    if left:
        raise UserError(
            f"{origin}: tensor '{min(left)}' has no place in the {CLASS} of its config.json: give the one that belongs "
            "to the file"
        )
    return params


def vae_to_torch(params: Mapping[str, Any], config: VAEConfig) -> dict[str, np.ndarray]:
    """The inverse of :func:`vae_from_torch`: contiguous arrays under today's names.

    Raises:
        UserError: a parameter is missing, unexpected, or of another shape, by its name.
    """
    state: dict[str, np.ndarray] = {}
    for part in PARTS:
        shapes, flat = part_shapes(part, config), flatten(params.get(part, {}))
        for leaf in sorted(set(shapes) | set(flat)):
            if leaf not in shapes or leaf not in flat:
                what = "is missing" if leaf in shapes else f"has no place in this {CLASS}"
                raise UserError(f"parameter {part}/{leaf} {what}: give the parameters of the config's model")
            if np.shape(flat[leaf]) != shapes[leaf]:
                raise UserError(f"parameter {part}/{leaf} has shape {np.shape(flat[leaf])}, not {shapes[leaf]}")
        for leaf, names in torch_names(part, config).items():
            value = np.asarray(flat[leaf])
            state[names[0]] = np.ascontiguousarray(value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T)
    return state


def vae_config_from_json(fields: Mapping[str, Any], origin: str = "autoencoder config.json") -> VAEConfig:
    """The sizes that a published ``config.json`` describes. Keys that older files lack have the defaults of
    diffusers, which are ours.

    Args:
        origin: names the file in errors.

    Raises:
        UserError: another class of network, a block, activation or latent normalisation that this package has not, an
            unknown or missing field, or a size that is none, by the name of the field.
    """
    if fields.get("_class_name", CLASS) != CLASS:
        raise UserError(f"{origin}: _class_name is {fields['_class_name']!r}, not {CLASS}: give such an autoencoder")
    for name in _NEEDED:
        if name not in fields:
            raise UserError(f"{origin}: field '{name}' is missing: copy or download the file again")
    known = {field.name: field.default for field in dataclasses.fields(VAEConfig)}
    given: dict[str, Any] = {}
    # the sizes first: the lists of blocks are held against them
    for name, value in sorted(fields.items(), key=lambda field: field[0] not in known):
        if name in known:
            kind: Any = (list, tuple) if name == "block_out_channels" else type(known[name])
            accepted = (int, float) if kind is float else kind
            if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
                raise UserError(f"{origin}: {name} is {value!r}: restore the published file")
            given[name] = value
        elif name in _FIXED:
            if value not in _FIXED[name]:
                raise UserError(f"{origin}: {name} is {value!r}, which is not supported: only {_FIXED[name][0]!r} is")
        elif name in _KINDS:
            if value != [_KINDS[name]] * len(fields["block_out_channels"]):
                raise UserError(f"{origin}: {name} is {value!r}, which is not supported: only {_KINDS[name]} is")
        elif not name.startswith("_") and name not in _IGNORED and value is not None:
            options = [*known, *_FIXED, *_KINDS, *_IGNORED]
            raise UserError(f"{origin}: field '{name}' is unknown{did_you_mean(name, options)}")
    try:
        return VAEConfig(**given)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def vae_config_to_json(config: VAEConfig) -> dict[str, Any]:
    """A ``config.json`` that diffusers and :func:`vae_config_from_json` read."""
    kinds = {name: [kind] * len(config.block_out_channels) for name, kind in _KINDS.items()}
    return {"_class_name": CLASS, "act_fn": "silu", **kinds, **config.to_dict()}
