"""A checkpoint in either of two sets of names, ours and the published one, and the way between them.

A checkpoint is opened (nothing but names, shapes and types is read), checked against the model that its sizes make, and
then streamed tensor by tensor into the other names. What families of models differ in is one table each: our leaf and
the published tensors that it is made of (``torch_dit.LeafPlan``).
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from scaling_perception.interop import hf_clip
from scaling_perception.interop.layouts import Found, locate, recognise
from scaling_perception.interop.safetensors_io import TensorSource, flatten_tree
from scaling_perception.interop.torch_dit import (
    LeafPlan,
    Piece,
    attention_layout,
    config_from_shapes,
    leaf_pieces,
)
from scaling_perception.interop.torch_files import open_tensors
from scaling_perception.models import clip_text, tiny_vae, vae, vae_torch
from scaling_perception.models.dit import abstract_params, config_from_dict, init_params
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import read_json

FAMILIES = {"dit": "dit", "dit_moe": "dit", "generalist": "dit", "sd_vae": "kl", "taesd": "tiny", "clip": "clip"}
TINY_FORMAT = "scaling-perception tiny autoencoder 1"  # what ``models.autoencoders`` looks for in a file of ours
PARTS = ("encoder", "decoder")
_IGNORED = (".position_ids",)  # buffers that older files hold beside the weights

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        layout: of ``layouts.LAYOUTS``; for a folder of ours ``ours``.
        family: ``dit``, ``kl``, ``tiny`` or ``clip``.
        source: its tensors; those of an autoencoder in two files together, as ``encoder…`` and ``decoder…``.
        config: sizes: DiTConfig, VAEConfig, TinyVAEConfig or CLIPTextConfig.
        plans: our leaf -> the published tensors it is made of, by the names that the checkpoint has for them.
        names: our leaf -> the names that these tensors are written by.
        told: the description beside the weights, {} if there is none.
        files: every file that the tensors are in.
        opened: the file or files that were opened, by name; an index stands for its shards.
        guessed: words for people: sizes that nothing tells and that were assumed.
    """

    layout: str
    family: str
    source: TensorSource
    config: Any
    plans: dict[str, LeafPlan]
    names: dict[str, tuple[str, ...]]
    told: dict[str, Any]
    files: tuple[Path, ...]
    opened: str
    guessed: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        """Whether the tensors have our names."""
        return self.layout == "ours"


class Row(NamedTuple):
    """A tensor of the checkpoint and the parameter it becomes, or a part of one."""

    tensor: str
    parameter: str
    shape: tuple[int, ...]
    dtype: str


class Problems(NamedTuple):
    """What keeps a checkpoint from being the model of its sizes; each a line for people."""

    missing: dict[str, str]
    misshaped: dict[str, str]
    unexpected: dict[str, str]

    def lines(self) -> list[str]:
        """All of them."""
        return [*self.misshaped.values(), *self.missing.values(), *self.unexpected.values()]


def open_checkpoint(
    path: str | Path,
    layout: str = "auto",
    heads: int | None = None,
    active_experts: int | None = None,
    gating: str | None = None,
) -> Checkpoint:
    """Open a checkpoint of any known layout.

    Args:
        path: see ``layouts.locate``.
        layout: what it must be; ``auto`` = what its names say.
        heads, active_experts, gating: of a DiT, whose tensors do not tell them; None = as the description beside the
            weights has them, else as ``config_from_shapes`` assumes.

    Raises:
        UserError: nothing there, a damaged file, no known layout or another than ``layout``, or sizes of no model.
    """
    found = locate(path, layout)
    source = _joined(found)
    layout = _agreed(recognise(source.shapes, str(path)), layout, source, path)
    told = _description(found)
    files = _files(found)
    name, opened = _name(Path(path)), ", ".join(file.name for file in found.weights)
    config: Any = None
    guessed: tuple[str, ...] = ()
    if layout == "ours" and "patch_embed/kernel" not in source.shapes:
        family, config = "tiny", tiny_vae.TinyVAEConfig(**json.loads(source.metadata["config"]))
    else:
        family = "dit" if layout == "ours" else FAMILIES[layout]
    if family == "dit":
        config, guessed = _dit_config(layout, source, told, name, heads, active_experts, gating)
        if config.context_dim and layout == "ours":
            plans = _own_plans(config)
        else:
            plans = leaf_pieces(config, "auto" if layout == "ours" else attention_layout(source.shapes))
    elif family == "kl":
        config = vae_torch.vae_config_from_json(told, f"{path}: config.json") if told else vae.VAEConfig()
        guessed = () if told else ("no config.json beside the weights: sizes are Stable Diffusion's",)
        plans = _kl_plans(config, source)
    elif family == "tiny":
        config = config if layout == "ours" else _tiny_config(told, f"{path}: config.json")
        plans = _tiny_plans(config)
    else:
        if not told:
            raise UserError(f"{path} has no config.json, which tells a text encoder's heads and ids: put it beside")
        source, config = _text_part(source, told, f"{path}: config.json")
        plans = _clip_plans(config, source)
    names = {leaf: _names(family, config, leaf, plan) for leaf, plan in plans.items()}
    return Checkpoint(layout, family, source, config, plans, names, told, files, opened, guessed)


def _agreed(seen: str, wanted: str, source: TensorSource, path: str | Path) -> str:
    if wanted not in ("auto", seen):
        raise UserError(
            f"{path} has the layout {seen} (its first tensor is {next(iter(source.shapes))}), not layout '{wanted}'"
        )
    return seen


def _name(path: Path) -> str:
    return (path.name if path.is_dir() else path.stem.split(".")[0]) or "converted"


def _files(found: Found) -> tuple[Path, ...]:
    """The weight files, the shards of an index included."""
    files: list[Path] = []
    for path in found.weights:
        if path.suffix == ".json":
            files += [path.parent / name for name in sorted(set(read_json(path)["weight_map"].values()))]
        else:
            files.append(path)
    return tuple(files)


def _description(found: Found) -> dict[str, Any]:
    """The config.json of a folder of weights, or the JSON of a weight file's own name beside it; {} without."""
    first = found.weights[0]
    own = first.with_suffix(".json")
    path = own if own.is_file() and own != first else first.parent / "config.json"
    usual = ("model", "diffusion_pytorch_model", "pytorch_model")
    if not path.is_file() or (path != own and found.folder is None and first.name.split(".")[0] not in usual):
        return {}
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise UserError(f"{path} is no description of a model: restore it, or move it away")
    return fields


def _joined(found: Found) -> TensorSource:
    """The tensors of the file, or of an autoencoder's two files under diffusers' names (of ours: under our own)."""
    if len(found.weights) == 1:
        return open_tensors(found.weights[0])
    halves = {part: open_tensors(path) for part, path in zip(PARTS, found.weights, strict=True)}
    places = {_joined_name(part, name): (half, name) for part, half in halves.items() for name in half.shapes}
    return TensorSource(
        {name: half.shapes[own] for name, (half, own) in places.items()},
        {name: half.dtypes[own] for name, (half, own) in places.items()},
        lambda name: places[name][0].read(places[name][1]),
        " and ".join(half.origin for half in halves.values()),
        halves["encoder"].metadata,
    )


def _joined_name(part: str, name: str) -> str:
    position, dot, rest = name.partition(".")
    if not dot or not position.isdecimal():
        return name if name.startswith(part) else f"{part}/{name}"
    return f"{part}.layers.{int(position) - (part == 'decoder')}.{rest}"  # diffusers keeps the decoder's clamp outside


def half_name(part: str, name: str) -> str:
    """The name that a tensor of an autoencoder's one file or tree has in the file of its half alone."""
    if not name.startswith(f"{part}.layers."):
        return name.removeprefix(f"{part}/")
    position, _, rest = name.removeprefix(f"{part}.layers.").partition(".")
    return f"{int(position) + (part == 'decoder')}.{rest}"


def _dit_config(
    layout: str,
    source: TensorSource,
    told: Mapping[str, Any],
    name: str,
    heads: int | None,
    active: int | None,
    gating: str | None,
) -> tuple[Any, tuple[str, ...]]:
    """(DiTConfig, what of it was assumed)."""
    given = {"heads": heads, "active_experts": active, "gating": gating}
    changes = {field: value for field, value in given.items() if value is not None}
    if isinstance(told.get("model"), Mapping) and ("format" in told or "layout" in told):
        return dataclasses.replace(config_from_dict(told["model"]), **changes), ()
    if layout == "ours":
        raise UserError(f"{source.origin} has no config.json beside it: give the whole model folder")
    config = config_from_shapes(source.shapes, heads, name, active or 2, gating or "paper")
    guessed = []
    if heads is None and not config.qk_norm:
        guessed.append(f"{config.heads} attention heads are assumed: the tensors do not tell (--heads)")
    if config.experts and active is None:
        guessed.append(f"{config.active_experts} active experts are assumed (--active)")
    if config.experts and gating is None:
        guessed.append(f"gating '{config.gating}' is assumed (--gating)")
    return config, tuple(guessed)


_SAME = (lambda a: a, lambda a: a)
_CONV = (lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
_MATRIX = (lambda a: a.T, lambda a: a.T)
_POINT = (lambda a: a[:, :, 0, 0].T, lambda a: a.T)  # a matrix that older files keep as a 1x1 convolution


def _turn(shape: tuple[int, ...]) -> tuple[tuple[int, ...], Callable[[Array], Array], Callable[[Array], Array]]:
    """Our shape -> (torch's, torch -> ours, ours -> torch)."""
    if len(shape) == 4:
        return (shape[3], shape[2], *shape[:2]), *_CONV
    return (shape[::-1], *_MATRIX) if len(shape) == 2 else (shape, *_SAME)


def _own_plans(config: Any) -> dict[str, LeafPlan]:
    """For a model that no published layout holds: every leaf by its own name."""
    leaves = flatten_tree(abstract_params(config))
    return {n: LeafPlan(leaf.shape, (Piece(n, leaf.shape, (), *_SAME),)) for n, leaf in leaves.items()}


@functools.lru_cache(maxsize=8)
def _clip_names(config: Any) -> dict[str, tuple[str, ...]]:
    return hf_clip.torch_names(config)


@functools.lru_cache(maxsize=8)
def _kl_names(part: str, config: vae.VAEConfig) -> dict[str, tuple[str, ...]]:
    return vae_torch.torch_names(part, config)


def _kl_plans(config: vae.VAEConfig, source: TensorSource) -> dict[str, LeafPlan]:
    plans = {}
    for part in PARTS:
        names, shapes = _kl_names(part, config), vae.part_shapes(part, config)
        for leaf, shape in shapes.items():
            tensor = next((name for name in names[leaf] if name in source.shapes), names[leaf][0])
            expected, to_ours, to_torch = _turn(shape)
            if source.shapes.get(tensor) == (*expected, 1, 1):
                expected, to_ours = (*expected, 1, 1), _POINT[0]
            plans[f"{part}/{leaf}"] = LeafPlan(shape, (Piece(tensor, expected, (), to_ours, to_torch),))
    return plans


def _tiny_config(told: Mapping[str, Any], origin: str) -> tiny_vae.TinyVAEConfig:
    """The sizes of an AutoencoderTiny by diffusers' description, TAESD's without one."""
    fields = {
        "encoder_widths": "encoder_block_out_channels",
        "encoder_blocks": "num_encoder_blocks",
        "decoder_widths": "decoder_block_out_channels",
        "decoder_blocks": "num_decoder_blocks",
        "latent_channels": "latent_channels",
    }
    given: dict[str, Any] = {own: told[theirs] for own, theirs in fields.items() if theirs in told}
    try:
        values: dict[str, Any] = {own: tuple(v) if isinstance(v, list) else v for own, v in given.items()}
        return tiny_vae.TinyVAEConfig(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{origin} describes no AutoencoderTiny ({error}): restore it") from None


def _tiny_plans(config: tiny_vae.TinyVAEConfig) -> dict[str, LeafPlan]:
    plans = {}
    for part in PARTS:
        names, shapes = tiny_vae.torch_names(part, config), tiny_vae.part_shapes(part, config)
        for leaf, shape in shapes.items():
            expected, to_ours, to_torch = _turn(shape)
            piece = Piece(_joined_name(part, names[leaf]), expected, (), to_ours, to_torch)
            plans[f"{part}/{leaf}"] = LeafPlan(shape, (piece,))
    return plans


def _clip_plans(config: Any, source: TensorSource) -> dict[str, LeafPlan]:
    prefix = hf_clip.PREFIX if any(name.startswith(hf_clip.PREFIX) for name in source.shapes) else ""
    shapes, plans = flatten_tree(clip_text.abstract_params(config)), {}
    for leaf, names in hf_clip.torch_names(config).items():
        stacked, shape = leaf.startswith("blocks/"), shapes[leaf].shape
        expected, to_ours, to_torch = _turn(shape[1:] if stacked else shape)
        if not leaf.endswith("/kernel"):  # tables of embeddings have two axes too
            expected, (to_ours, to_torch) = (shape[1:] if stacked else shape), _SAME
        held = [name if name == hf_clip.PROJECTION else prefix + name.removeprefix(hf_clip.PREFIX) for name in names]
        pieces = [Piece(n, expected, (i,) if stacked else (), to_ours, to_torch) for i, n in enumerate(held)]
        plans[leaf] = LeafPlan(shape, tuple(pieces))
    return plans


def _text_part(source: TensorSource, told: Mapping[str, Any], origin: str) -> tuple[TensorSource, Any]:
    """(the tensors without the vision tower of a whole CLIP model, sizes)."""
    config = hf_clip.clip_config_from_json(told, origin)
    kept = source.shapes
    if "text_config" in told or "text_config_dict" in told:
        kept = {n: s for n, s in kept.items() if n.startswith(hf_clip.PREFIX) or n == hf_clip.PROJECTION}
    elif not told.get("architectures") and hf_clip.PROJECTION not in kept:
        config = dataclasses.replace(config, projection_dim=0)  # nothing else says whether there is one
    return dataclasses.replace(source, shapes=kept), config


def _names(family: str, config: Any, leaf: str, plan: LeafPlan) -> tuple[str, ...]:
    if family == "kl":
        part, _, rest = leaf.partition("/")
        return (_kl_names(part, config)[rest][0],)
    if family == "clip":
        return _clip_names(config)[leaf]
    return tuple(piece.tensor for piece in plan.pieces)


def rows(checkpoint: Checkpoint) -> list[Row]:
    """Every tensor that the model has, in the order of our leaves; ``parameter`` tells its place in the leaf."""
    table = []
    for leaf, plan in checkpoint.plans.items():
        for piece in plan.pieces:
            place = f"{leaf}[{', '.join(map(str, piece.index))}]" if piece.index else leaf
            held = leaf if checkpoint.ours else piece.tensor
            dtype = checkpoint.source.dtypes.get(held)
            table.append(Row(piece.tensor, place, piece.shape, str(dtype) if dtype is not None else "absent"))
    return table


def check(checkpoint: Checkpoint) -> Problems:
    """Compare names and shapes with the model's; no data is read."""
    shapes = checkpoint.source.shapes
    expected: dict[str, tuple[tuple[int, ...], str]] = {}
    for leaf, plan in checkpoint.plans.items():
        if checkpoint.ours:
            expected[leaf] = (plan.shape, "")
        else:
            expected |= {piece.tensor: (piece.shape, f" (for {leaf})") for piece in plan.pieces}
    missing = {n: f"missing: {n} {shape}{use}" for n, (shape, use) in expected.items() if n not in shapes}
    misshaped = {
        n: f"of another shape: {n} has {tuple(shapes[n])}, the model needs {shape}{use}"
        for n, (shape, use) in expected.items()
        if n in shapes and tuple(shapes[n]) != shape
    }
    unexpected = {
        n: f"unexpected: {n} {tuple(shape)}"
        for n, shape in shapes.items()
        if n not in expected and not n.endswith(_IGNORED)
    }
    return Problems(missing, misshaped, unexpected)


def mended(checkpoint: Checkpoint, problems: Problems) -> Checkpoint:
    """The checkpoint without its unexpected tensors; missing ones are those of a fresh model (key 0)."""
    source, missing = checkpoint.source, problems.missing
    fresh: dict[str, tuple[str, Piece | None]] = {}
    for leaf, plan in checkpoint.plans.items():
        if checkpoint.ours:
            fresh |= {leaf: (leaf, None)} if leaf in missing else {}
        else:
            fresh |= {piece.tensor: (leaf, piece) for piece in plan.pieces if piece.tensor in missing}
    made = _fresh_leaves(checkpoint, sorted({leaf for leaf, _ in fresh.values()})) if fresh else {}

    def read(name: str) -> Array:
        if name not in fresh:
            return source.read(name)
        leaf, piece = fresh[name]
        return made[leaf] if piece is None else np.ascontiguousarray(piece.to_torch(made[leaf][piece.index]))

    kept = {name: shape for name, shape in source.shapes.items() if name not in problems.unexpected}
    shapes = {name: made[leaf].shape if piece is None else piece.shape for name, (leaf, piece) in fresh.items()}
    dtypes = {name: source.dtypes[name] for name in kept} | {name: np.dtype(np.float32) for name in fresh}
    whole = TensorSource(kept | shapes, dtypes, read, source.origin, source.metadata)
    return dataclasses.replace(checkpoint, source=whole)


def _fresh_leaves(checkpoint: Checkpoint, leaves: list[str]) -> dict[str, Array]:
    config = checkpoint.config

    def make(key: jax.Array) -> dict[str, jax.Array]:
        if checkpoint.family == "dit":
            tree = flatten_tree(init_params(config, key))
        elif checkpoint.family == "clip":
            tree = flatten_tree(clip_text.init_params(config, key))
        else:
            family = {"kl": vae, "tiny": tiny_vae}[checkpoint.family]
            tree = flatten_tree({part: family.init_part(part, config, key) for part in PARTS})
        return {leaf: tree[leaf] for leaf in leaves}

    return jax.tree.map(np.asarray, jax.jit(make)(jax.random.key(0)))  # compiled: what is not asked for is not made


def our_specs(checkpoint: Checkpoint, dtype: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every leaf of ours; ``dtype`` None keeps the checkpoint's, the widest of a leaf's tensors."""
    dtypes, specs = checkpoint.source.dtypes, {}
    for leaf, plan in checkpoint.plans.items():
        held = [leaf] if checkpoint.ours else [piece.tensor for piece in plan.pieces]
        kept = dtype or np.result_type(*{dtypes[name] for name in held})
        specs[leaf] = jax.ShapeDtypeStruct(plan.shape, kept)
    return specs


def published_specs(checkpoint: Checkpoint, dtype: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every tensor under its published name (today's, where there are several)."""
    specs = {}
    for leaf, plan in checkpoint.plans.items():
        for piece, name in zip(plan.pieces, checkpoint.names[leaf], strict=True):
            held = checkpoint.source.dtypes[leaf if checkpoint.ours else piece.tensor]
            shape = piece.to_torch(np.broadcast_to(np.float32(0), plan.shape[len(piece.index) :])).shape
            specs[name] = jax.ShapeDtypeStruct(shape, dtype or held)
    return specs


def to_ours(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[int, ...], Array]]:
    """Yield (leaf, index, array) with ``leaf[index] = array``, one tensor at a time."""
    read = checkpoint.source.read
    for leaf, plan in checkpoint.plans.items():
        if checkpoint.ours:
            yield leaf, (), read(leaf)
            continue
        for piece in plan.pieces:
            yield leaf, piece.index, piece.to_ours(read(piece.tensor))


def to_published(checkpoint: Checkpoint) -> Iterator[tuple[str, Array]]:
    """Yield (published name, array), one tensor at a time."""
    read = checkpoint.source.read
    for leaf, plan in checkpoint.plans.items():
        whole = read(leaf) if checkpoint.ours else None
        for piece, name in zip(plan.pieces, checkpoint.names[leaf], strict=True):
            part = piece.to_ours(read(piece.tensor)) if whole is None else whole[piece.index]
            yield name, np.ascontiguousarray(piece.to_torch(part))
