"""Published DiT checkpoints to our parameter tree and back: names, transposes, stacking, nothing else.

The layout is facts 1.3: Meta's DiT, and the routed patch embedding of the authors' generalist
(``x_embedder.proj.conv_in_<n>``). Arrays are numpy on the host; nothing here needs torch.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from scaling_perception.interop.safetensors_io import flatten_tree, unflatten_tree
from scaling_perception.models.dit import DiTConfig, abstract_params
from scaling_perception.support.errors import UserError

Array = np.ndarray

# our layer -> its name in the checkpoint
_ENDS = {
    "time_embed/fc1": "t_embedder.mlp.0",
    "time_embed/fc2": "t_embedder.mlp.2",
    "final/linear": "final_layer.linear",
    "final/modulation": "final_layer.adaLN_modulation.1",
}
_BLOCK = {
    "attn/qkv": "attn.qkv",
    "attn/proj": "attn.proj",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
}


def _same(array: Array) -> Array:
    return array


def _swap(array: Array) -> Array:
    return array.T


def _conv_in(array: Array) -> Array:  # (D, C, row, column) -> (row, column, C, D)
    return array.transpose(2, 3, 1, 0)


def _conv_out(array: Array) -> Array:
    return array.transpose(3, 2, 0, 1)


# (torch name, torch -> ours, ours -> torch) of one tensor; a leaf of ours is one of them, or several on a new axis
_Piece = tuple[str, Callable[[Array], Array], Callable[[Array], Array]]


def _pieces(config: DiTConfig) -> dict[str, list[_Piece] | _Piece]:
    """Our leaf name -> the checkpoint tensors it is made of; a list is stacked along a leading axis."""
    table: dict[str, list[_Piece] | _Piece] = {
        "pos_embed": ("pos_embed", lambda a: a[0], lambda a: a[None]),
        "label_embed": ("y_embedder.embedding_table.weight", _same, _same),
    }
    convs = [f"x_embedder.proj.conv_in_{i + 1}" for i in range(config.task_labels)]
    if config.routed:
        table["patch_embed/kernel"] = [(f"{conv}.weight", _conv_in, _conv_out) for conv in convs]
        table["patch_embed/bias"] = [(f"{conv}.bias", _same, _same) for conv in convs]
    else:
        table["patch_embed/kernel"] = ("x_embedder.proj.weight", _conv_in, _conv_out)
        table["patch_embed/bias"] = ("x_embedder.proj.bias", _same, _same)
    for ours, theirs in _ENDS.items():
        table[f"{ours}/kernel"] = (f"{theirs}.weight", _swap, _swap)
        table[f"{ours}/bias"] = (f"{theirs}.bias", _same, _same)
    for ours, theirs in _BLOCK.items():
        names = [f"blocks.{i}.{theirs}" for i in range(config.depth)]
        table[f"blocks/{ours}/kernel"] = [(f"{name}.weight", _swap, _swap) for name in names]
        table[f"blocks/{ours}/bias"] = [(f"{name}.bias", _same, _same) for name in names]
    return table


def config_from_torch(state: Mapping[str, Array], heads: int = 16, name: str = "converted") -> DiTConfig:
    """The sizes that a state dict has. The number of heads leaves no trace in the shapes and must be known (16 for
    every published DiT-XL and the paper's sizes).

    Classes and task labels cannot be told apart either: the routed form has one task label per patch convolution, the
    plain form none.

    Raises:
        UserError: a tensor that tells a size is missing or of the wrong rank.
    """

    def shape(tensor: str, rank: int) -> tuple[int, ...]:
        if tensor not in state:
            raise UserError(f"checkpoint has no tensor {tensor}: is it that of a dense DiT?")
        if np.ndim(state[tensor]) != rank:
            raise UserError(f"checkpoint tensor {tensor} has shape {np.shape(state[tensor])}, expected {rank} axes")
        return np.shape(state[tensor])

    convs = [key for key in state if re.fullmatch(r"x_embedder\.proj\.conv_in_\d+\.weight", key)]
    dim, channels, patch, _ = shape("x_embedder.proj.conv_in_1.weight" if convs else "x_embedder.proj.weight", 4)
    tokens = shape("pos_embed", 3)[1]
    grid = round(tokens**0.5)
    if grid * grid != tokens:
        raise UserError(f"checkpoint tensor pos_embed has {tokens} rows, which is no square grid of patches")
    layers = {int(found[1]) for key in state if (found := re.match(r"blocks\.(\d+)\.", key))}
    outputs = shape("final_layer.linear.weight", 2)[0] // patch**2
    return DiTConfig(
        name=name,
        input_size=grid * patch,
        dim=dim,
        depth=max(layers, default=-1) + 1,
        heads=heads,
        patch_size=patch,
        in_channels=4,
        cond_channels=channels - 4,
        mlp_ratio=shape("blocks.0.mlp.fc1.weight", 2)[0] / dim,
        num_classes=shape("y_embedder.embedding_table.weight", 2)[0] - len(convs) - 1,
        task_labels=len(convs),
        routed=bool(convs),
        learn_sigma=outputs == 8,
    )


def dit_from_torch(state: Mapping[str, Array], config: DiTConfig | None = None) -> dict[str, Any]:
    """Our parameter tree (numpy, float32) from a checkpoint's state dict of numpy arrays.

    Args:
        config: the model it must fit; None = whatever sizes the state dict has (``config_from_torch``).

    Raises:
        UserError: a tensor is missing, unexpected, or of another shape (named, with both shapes).
    """
    config = config or config_from_torch(state)
    shapes = flatten_tree(abstract_params(config))
    flat: dict[str, Array] = {}
    used: set[str] = set()

    def read(leaf: str, piece: _Piece, shape: tuple[int, ...]) -> Array:
        name, to_ours, to_torch = piece
        expected = to_torch(np.broadcast_to(np.float32(0), shape)).shape
        if name not in state:
            raise UserError(f"checkpoint has no tensor {name} {expected}, which {config.name} needs for {leaf}")
        if tuple(np.shape(state[name])) != expected:
            raise UserError(
                f"checkpoint tensor {name} has shape {tuple(np.shape(state[name]))}, model {config.name} needs "
                f"{expected}: choose the preset and resolution that it was made with"
            )
        used.add(name)
        return to_ours(np.asarray(state[name], np.float32))

    for leaf, pieces in _pieces(config).items():
        shape = shapes[leaf].shape
        if isinstance(pieces, list):
            flat[leaf] = np.stack([read(leaf, piece, shape[1:]) for piece in pieces])
        else:
            flat[leaf] = np.ascontiguousarray(read(leaf, pieces, shape))
    for name in state:
        if name not in used:
            raise UserError(f"checkpoint tensor {name} {tuple(np.shape(state[name]))} has no place in {config.name}")
    return unflatten_tree({leaf: flat[leaf] for leaf in shapes})


def dit_to_torch(params: Mapping[str, Any], config: DiTConfig) -> dict[str, Array]:
    """The inverse of ``dit_from_torch``: a state dict of contiguous numpy arrays under the published names.

    Raises:
        UserError: a leaf is missing, unexpected, or of another shape (named, with both shapes).
    """
    flat, shapes = flatten_tree(params), flatten_tree(abstract_params(config))
    for leaf in flat:
        if leaf not in shapes:
            raise UserError(f"parameter {leaf} has no place in {config.name}")
    state: dict[str, Array] = {}
    for leaf, pieces in _pieces(config).items():
        if leaf not in flat:
            raise UserError(f"parameter {leaf} {shapes[leaf].shape} of {config.name} is missing")
        array = np.asarray(flat[leaf])
        if array.shape != shapes[leaf].shape:
            raise UserError(f"parameter {leaf} has shape {array.shape}, {config.name} needs {shapes[leaf].shape}")
        parts = zip(pieces, array, strict=True) if isinstance(pieces, list) else [(pieces, array)]
        for (name, _, to_torch), part in parts:
            state[name] = np.ascontiguousarray(to_torch(part))
    return state
