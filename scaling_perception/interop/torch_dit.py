"""Published DiT checkpoints to our parameter tree and back: names, transposes, stacking, nothing else.

The layouts are facts 1.3: Meta's DiT, DiT-MoE with either of its attention layouts, and the authors' generalist. Arrays
are numpy on the host; nothing here needs torch.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from scaling_perception.interop.safetensors_io import TensorSource, flatten_tree, source_of, unflatten_tree
from scaling_perception.models import lite0
from scaling_perception.models.dit import DiTConfig, abstract_params
from scaling_perception.models.presets import get_preset, preset_names
from scaling_perception.support.errors import UserError, did_you_mean

Array = np.ndarray
Shapes = Mapping[str, tuple[int, ...]]

# our layer -> its name in the checkpoint; what is in braces is an axis of our leaf, in this order
_AXES = ("layer", "task", "expert")
_LINEAR = {
    "time_embed/fc1": "t_embedder.mlp.0",
    "time_embed/fc2": "t_embedder.mlp.2",
    "final/linear": "final_layer.linear",
    "final/modulation": "final_layer.adaLN_modulation.1",
    "blocks/modulation": "blocks.{layer}.adaLN_modulation.1",
}
_ATTENTION = {
    "timm": {"blocks/attn/qkv": "blocks.{layer}.attn.qkv", "blocks/attn/proj": "blocks.{layer}.attn.proj"},
    "flash": {"blocks/attn/qkv": "blocks.{layer}.attn.Wqkv", "blocks/attn/proj": "blocks.{layer}.attn.out_proj"},
}
_MLP = {"blocks/mlp/fc1": "blocks.{layer}.mlp.fc1", "blocks/mlp/fc2": "blocks.{layer}.mlp.fc2"}
_GELU = {
    "blocks/moe/experts/fc1": "blocks.{layer}.moe.experts.{expert}.fc1",
    "blocks/moe/experts/fc2": "blocks.{layer}.moe.experts.{expert}.fc2",
}
# without biases
_SWIGLU = {
    f"blocks/moe/experts/{n}": f"blocks.{{layer}}.moe.experts.{{expert}}.{n}_proj" for n in ("gate", "up", "down")
}
_SHARED = {f"blocks/moe/shared/{n}": f"blocks.{{layer}}.moe.shared_experts.{n}_proj" for n in ("gate", "up", "down")}
_ROUTER = {"blocks/moe/router": "blocks.{layer}.moe.gate"}

# kind of tensor -> (torch -> ours, ours -> torch), both without a copy
_TURNS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "same": (lambda a: a, lambda a: a),
    "linear": (lambda a: a.T, lambda a: a.T),
    "conv": (lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)),  # (D, C, row, column)
    "position": (lambda a: a[0], lambda a: a[None]),
}


class Piece(NamedTuple):
    """One tensor of a checkpoint and its place in a leaf of ours.

    ``leaf[index] = to_ours(tensor)`` and ``tensor = to_torch(leaf[index])``; both give views, not copies.

    Attributes:
        tensor: its name in the checkpoint.
        shape: its shape there.
        index: (), (layer,), (task,) or (layer, expert).
    """

    tensor: str
    shape: tuple[int, ...]
    index: tuple[int, ...]
    to_ours: Callable[[Array], Array]
    to_torch: Callable[[Array], Array]


class LeafPlan(NamedTuple):
    """A leaf of ours: its shape, and the tensors that it is made of."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def _table(config: DiTConfig, attention: str) -> dict[str, tuple[str, str]]:
    """Our leaf -> (name of its tensors in the checkpoint, kind of turn)."""
    table = {"pos_embed": ("pos_embed", "position"), "label_embed": ("y_embedder.embedding_table.weight", "same")}
    patch = "x_embedder.proj.conv_in_{task}" if config.routed else "x_embedder.proj"
    table["patch_embed/kernel"] = (f"{patch}.weight", "conv")
    table["patch_embed/bias"] = (f"{patch}.bias", "same")
    biased, plain = {**_LINEAR, **_ATTENTION[attention]}, {}
    if not config.experts:
        biased |= _MLP
    else:
        plain |= _ROUTER
        if config.expert_mlp == "gelu":
            biased |= _GELU
        else:
            plain |= _SWIGLU
        if config.shared_experts:
            plain |= _SHARED
    for ours, theirs in {**biased, **plain}.items():
        table[f"{ours}/kernel"] = (f"{theirs}.weight", "linear")
    for ours, theirs in biased.items():
        table[f"{ours}/bias"] = (f"{theirs}.bias", "same")
    if config.qk_norm:
        for norm in ("q_norm", "k_norm"):
            for ours, theirs in (("scale", "weight"), ("bias", "bias")):
                table[f"blocks/attn/{norm}/{ours}"] = (f"blocks.{{layer}}.attn.{norm}.{theirs}", "same")
    return table


def leaf_pieces(config: DiTConfig, attention: str = "auto") -> dict[str, LeafPlan]:
    """Every leaf of ours and the checkpoint tensors it is made of, so that either side can be filled piece by piece.

    Args:
        attention: names of the attention layers: ``timm`` (qkv, proj), ``flash`` (Wqkv, out_proj; facts 1.3), or
            ``auto``: flash for a model with QK-norm, as DiT-MoE has it, else timm.

    Raises:
        UserError: the model has a part that no published layout holds.
    """
    if attention == "auto":
        attention = "flash" if config.qk_norm else "timm"
    if attention not in _ATTENTION:
        raise UserError(f"attention layout {attention!r}{did_you_mean(attention, ('auto', *_ATTENTION))}")
    if config.context_dim:
        raise UserError(
            f"model {config.name} has a task context (context_dim={config.context_dim}), for which published "
            "checkpoints have no place: keep it as one of our folders"
        )
    table, plans = _table(config, attention), {}
    sizes = {"layer": config.depth, "task": config.task_labels, "expert": config.experts}
    for leaf, expected in flatten_tree(abstract_params(config)).items():
        pattern, kind = table[leaf]
        to_ours, to_torch = _TURNS[kind]
        axes = [axis for axis in _AXES if f"{{{axis}}}" in pattern]
        shape = to_torch(np.broadcast_to(np.float32(0), expected.shape[len(axes) :])).shape
        pieces = []
        for index in itertools.product(*(range(sizes[axis]) for axis in axes)):
            numbers = dict(zip(axes, index, strict=True))
            if "task" in numbers:
                numbers["task"] += 1  # the released names count from 1
            pieces.append(Piece(pattern.format(**numbers), shape, index, to_ours, to_torch))
        plans[leaf] = LeafPlan(expected.shape, tuple(pieces))
    return plans


def attention_layout(names: Any) -> str:
    """``flash`` or ``timm``: which of the two attention layouts the tensor ``names`` of a checkpoint follow."""
    return "flash" if any(name.endswith(".attn.Wqkv.weight") for name in names) else "timm"


def check_tensors(shapes: Shapes, config: DiTConfig) -> list[str]:
    """What keeps a checkpoint with tensors of these names and shapes from being the model ``config``: one line for each
    tensor that is missing, of another shape, or unexpected; [] if it fits. No data is read.
    """
    problems, known = [], set()
    for leaf, plan in leaf_pieces(config, attention_layout(shapes)).items():
        for piece in plan.pieces:
            known.add(piece.tensor)
            if piece.tensor not in shapes:
                problems.append(
                    f"checkpoint has no tensor {piece.tensor} {piece.shape}, which {config.name} needs for {leaf}"
                )
            elif tuple(shapes[piece.tensor]) != piece.shape:
                problems.append(
                    f"checkpoint tensor {piece.tensor} has shape {tuple(shapes[piece.tensor])}, model {config.name} "
                    f"needs {piece.shape}: choose the preset and resolution that it was made with"
                )
    for name, shape in shapes.items():
        if name not in known:
            problems.append(f"checkpoint tensor {name} {tuple(shape)} has no place in {config.name}")
    return problems


def require_tensors(shapes: Shapes, config: DiTConfig) -> None:
    """Refuse a checkpoint that does not fit.

    Raises:
        UserError: the first problem of ``check_tensors``, and how many more there are.
    """
    problems = check_tensors(shapes, config)
    if problems:
        more = f" (and {len(problems) - 1} more such tensors)" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)


def config_from_shapes(
    shapes: Shapes,
    heads: int | None = None,
    name: str = "converted",
    active_experts: int = 2,
    gating: str = "paper",
) -> DiTConfig:
    """The sizes of the model that tensors of these names and shapes make up (facts 1.3).

    Args:
        heads: None = as the norms of queries and keys tell; without those, as the preset of this width and depth has
            them, else 16. Nothing else in a checkpoint tells them.
        active_experts, gating: leave no trace either; the defaults are those of every published checkpoint.

    Classes and task labels cannot be told apart: the routed form has one task label per patch convolution, the plain
    form none.

    Raises:
        UserError: a tensor that tells a size is missing or of the wrong rank, or the sizes make no model.
    """

    def shape(tensor: str, rank: int) -> tuple[int, ...]:
        if tensor not in shapes:
            raise UserError(f"checkpoint has no tensor {tensor}: is it that of a DiT?")
        if len(shapes[tensor]) != rank:
            raise UserError(f"checkpoint tensor {tensor} has shape {tuple(shapes[tensor])}, expected {rank} axes")
        return tuple(shapes[tensor])

    def count(pattern: str) -> int:
        return max((int(found[1]) for key in shapes if (found := re.match(pattern, key))), default=-1) + 1

    convs = sum(re.fullmatch(r"x_embedder\.proj\.conv_in_\d+\.weight", key) is not None for key in shapes)
    dim, channels, patch, _ = shape("x_embedder.proj.conv_in_1.weight" if convs else "x_embedder.proj.weight", 4)
    tokens = shape("pos_embed", 3)[1]
    grid = round(tokens**0.5)
    if grid * grid != tokens:
        raise UserError(f"checkpoint tensor pos_embed has {tokens} rows, which is no square grid of patches")
    depth, moe = count(r"blocks\.(\d+)\."), "blocks.0.moe."
    fields: dict[str, Any] = {}
    if f"{moe}gate.weight" in shapes:
        swiglu = f"{moe}experts.0.gate_proj.weight" in shapes
        first = f"{moe}experts.0.{'gate_proj' if swiglu else 'fc1'}.weight"
        fields = {"experts": shape(f"{moe}gate.weight", 2)[0], "active_experts": active_experts, "gating": gating}
        fields["expert_mlp"] = "swiglu" if swiglu else "gelu"
        if f"{moe}shared_experts.gate_proj.weight" in shapes:
            fields["shared_experts"] = max(1, shape(f"{moe}shared_experts.gate_proj.weight", 2)[0] // dim)
    else:
        first = "blocks.0.mlp.fc1.weight"
    qk_norm = "blocks.0.attn.q_norm.weight" in shapes
    if qk_norm:
        head_dim = shape("blocks.0.attn.q_norm.weight", 1)[0]
        if heads is not None and heads * head_dim != dim:
            raise UserError(f"{heads} heads do not fit: the checkpoint's are {head_dim} wide, and the model {dim}")
        heads = dim // head_dim
    return DiTConfig(
        name=name,
        input_size=grid * patch,
        dim=dim,
        depth=depth,
        heads=_fitting_heads(dim, depth, heads),
        patch_size=patch,
        in_channels=4,
        cond_channels=channels - 4,
        features=lite0.FEATURES if channels > 4 and (channels - 4) % (4 + lite0.FEATURES) == 0 else 0,
        mlp_ratio=shape(first, 2)[0] / dim,
        num_classes=shape("y_embedder.embedding_table.weight", 2)[0] - convs - 1,
        task_labels=convs,
        routed=bool(convs),
        learn_sigma=shape("final_layer.linear.weight", 2)[0] // patch**2 == 8,
        qk_norm=qk_norm,
        **fields,
    )


def _fitting_heads(dim: int, depth: int, heads: int | None) -> int:
    chosen = heads or _usual_heads(dim, depth)
    if dim % chosen:
        divisors = [n for n in range(1, dim + 1) if dim % n == 0]
        likely = [n for n in divisors if 32 <= dim // n <= 128] or [n for n in divisors if dim // n >= 4]
        raise UserError(
            f"{chosen} attention heads do not fit a width of {dim}, and the tensors do not tell them: give --heads, "
            f"likely {', '.join(map(str, likely or divisors))}"
        )
    return chosen


def _usual_heads(dim: int, depth: int) -> int:
    sizes = (get_preset(name) for name in preset_names())
    return next((preset.heads for preset in sizes if (preset.dim, preset.depth) == (dim, depth)), 16)


def config_from_torch(
    state: Mapping[str, Array],
    heads: int | None = None,
    name: str = "converted",
    active_experts: int = 2,
    gating: str = "paper",
) -> DiTConfig:
    """``config_from_shapes`` of a state dict of arrays."""
    shapes = {tensor: tuple(np.shape(array)) for tensor, array in state.items()}
    return config_from_shapes(shapes, heads, name, active_experts, gating)


def leaf_specs(source: TensorSource, config: DiTConfig, dtype: Any = np.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every leaf of ours that ``stream_from_torch`` with the same arguments fills.

    Raises:
        UserError: a tensor is missing, unexpected, or of another shape (named, with both shapes).
    """
    require_tensors(source.shapes, config)
    specs = {}
    for leaf, plan in leaf_pieces(config, attention_layout(source.shapes)).items():
        kept = dtype or np.result_type(*{source.dtypes[piece.tensor] for piece in plan.pieces})
        specs[leaf] = jax.ShapeDtypeStruct(plan.shape, kept)
    return specs


def stream_from_torch(
    source: TensorSource, config: DiTConfig, dtype: Any = np.float32
) -> Iterator[tuple[str, tuple[int, ...], Array]]:
    """Read a checkpoint tensor by tensor: yields (leaf, index, array) with ``leaf[index] = array``, leaf after leaf,
    inside a leaf in the order of its memory. One tensor is held at a time.

    Args:
        dtype: None = that of the source.

    Raises:
        UserError: a tensor is missing, unexpected, or of another shape (named, with both shapes), before any is read.
    """
    specs = leaf_specs(source, config, dtype)
    for leaf, plan in leaf_pieces(config, attention_layout(source.shapes)).items():
        for piece in plan.pieces:
            array = piece.to_ours(source.read(piece.tensor))
            yield leaf, piece.index, np.ascontiguousarray(array, specs[leaf].dtype)


def stream_to_torch(
    source: TensorSource, config: DiTConfig, dtype: Any = None, attention: str = "auto"
) -> Iterator[tuple[str, Array]]:
    """Read parameters of ours tensor by tensor of the published layout: yields (name, contiguous array).

    Args:
        source: leaves of ours by their joined names (``blocks/attn/qkv/kernel``).
        dtype: None = that of the source.
        attention: see ``leaf_pieces``.

    Raises:
        UserError: a leaf is missing, unexpected, or of another shape (named, with both shapes), before any is read.
    """
    plans = leaf_pieces(config, attention)
    for leaf in source.shapes:
        if leaf not in plans:
            raise UserError(f"parameter {leaf} has no place in {config.name}")
    for leaf, plan in plans.items():
        if leaf not in source.shapes:
            raise UserError(f"parameter {leaf} {plan.shape} of {config.name} is missing")
        if source.shapes[leaf] != plan.shape:
            raise UserError(f"parameter {leaf} has shape {source.shapes[leaf]}, {config.name} needs {plan.shape}")
    for leaf, plan in plans.items():
        for piece in plan.pieces:
            part = source.read(leaf)[piece.index]  # asked for anew each time, so that a mapped file is let go of
            yield piece.tensor, np.ascontiguousarray(piece.to_torch(part), dtype or part.dtype)


def dit_from_torch(
    state: Mapping[str, Array], config: DiTConfig | None = None, dtype: Any = np.float32
) -> dict[str, Any]:
    """Our parameter tree (numpy) from a checkpoint's state dict of numpy arrays.

    Args:
        config: the model it must fit; None = whatever sizes the state dict has (``config_from_torch``).
        dtype: None = that of the state dict, leaf by leaf.

    Raises:
        UserError: a tensor is missing, unexpected, or of another shape (named, with both shapes).
    """
    source = source_of(state, "state dict")
    config = config or config_from_shapes(source.shapes)
    specs = leaf_specs(source, config, dtype)
    flat = {leaf: np.empty(spec.shape, spec.dtype) for leaf, spec in specs.items()}
    for leaf, index, array in stream_from_torch(source, config, dtype):
        flat[leaf][index] = array
    return unflatten_tree(flat)


def dit_to_torch(params: Mapping[str, Any], config: DiTConfig, attention: str = "auto") -> dict[str, Array]:
    """The inverse of ``dit_from_torch``: a state dict of contiguous numpy arrays under the published names.

    Raises:
        UserError: a leaf is missing, unexpected, or of another shape (named, with both shapes).
    """
    return dict(stream_to_torch(source_of(flatten_tree(params), "parameters"), config, attention=attention))
