"""What a converted checkpoint becomes on disk: a model folder of ours, a published folder, or one PyTorch file.

Everything is made in a hidden folder beside the target and renamed into place at the end, so that a conversion that was
stopped leaves nothing that looks complete.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from scaling_perception.interop import checkpoint as reading
from scaling_perception.interop import hf_clip, torch_files
from scaling_perception.interop.checkpoint import Checkpoint
from scaling_perception.interop.find import CONFIG
from scaling_perception.interop.model_folder import CARD, SOURCE_LICENSE, model_card, save_streamed
from scaling_perception.interop.released import describe
from scaling_perception.interop.safetensors_io import cast, is_floating
from scaling_perception.interop.sharded import SINGLE, save_sharded
from scaling_perception.interop.torch_dit import leaf_pieces
from scaling_perception.models import tiny_vae, vae_torch
from scaling_perception.models.dit import count_active_params, count_params
from scaling_perception.models.presets import LATENT_FACTOR, get_preset, preset_names
from scaling_perception.support.again import (
    keep_folder_settings,
    keep_settings,
    refuse_other,
    restore_folder,
    settings_there,
    swap_folder,
)
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import write_json, write_text
from scaling_perception.support.locks import hold
from scaling_perception.support.progress import progress
from scaling_perception.support.stopping import finished_first, removed_when_stopped

TORCH_SUFFIXES = torch_files.SUFFIXES
_KL_FILE = "diffusion_pytorch_model.safetensors"
_MARK = "library_name: scaling-perception"  # in the card of every folder that this package writes
_OURS = re.compile(
    r"config\.json|README\.md|.*\.safetensors|.*\.safetensors\.index\.json|tokenizer|text_encoder|\.settings|(budgets|grids)\.json"
)
_TOKENIZER = (
    "vocab.json",
    "tokenizer.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_FLOAT32 = ("blocks/moe/router/kernel", ".moe.gate.weight")  # a rounded router picks other experts


class ExportPlan(NamedTuple):
    """What will be written.

    Attributes:
        to: ours, torch or safetensors.
        form: the same in words.
        dtype: of the tensors, None = as they are.
        meta: the description that goes with the weights; a DiT's becomes config.json.
        facts: (name, text) lines about the model.
        bytes: of all tensors.
    """

    to: str
    form: str
    dtype: Any
    meta: dict[str, Any]
    facts: list[tuple[str, str]]
    bytes: int


def plan(checkpoint: Checkpoint, to: str, dtype: str, partial: dict[str, list[str]]) -> ExportPlan:
    """What writing the checkpoint in the form ``to`` (ours, torch, safetensors) means.

    Args:
        dtype: ``keep`` or a name of numpy's.
        partial: names that were left out and made up, for the description.

    Raises:
        UserError: no published layout holds such a model, or a tensor holds no floating-point numbers.
    """
    kept = None if dtype == "keep" else np.dtype(dtype)
    if to != "ours" and checkpoint.family == "tiny" and checkpoint.config != tiny_vae.TAESD:
        raise UserError(
            f"{checkpoint.source.origin}: no published layout holds an autoencoder of these sizes "
            f"(TAESD's are fixed): keep it as a folder of ours"
        )
    if to != "ours" and checkpoint.family == "dit":
        leaf_pieces(checkpoint.config)  # refuses what no layout holds
    for name in (name for item in checkpoint.plans.items() for name in _tensors_of(checkpoint, *item)):
        if not is_floating(held := checkpoint.source.dtypes[name]):
            raise UserError(
                f"{checkpoint.source.origin}: tensor {name} holds {held}: weights are floating-point numbers"
            )
    specs = _specs(checkpoint, to, kept)
    size = sum(prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in specs.values())
    source = {"file": checkpoint.opened, "layout": checkpoint.layout}
    abouts = {"dit": _about_dit, "kl": _about_kl, "tiny": _about_tiny, "clip": _about_clip}
    about, facts = abouts[checkpoint.family](checkpoint)
    meta = {**about, "source": source, **({"partial": partial} if partial else {})}
    if partial:
        facts.append(("made up", ", ".join(partial["made_up"]) or "nothing"))
        facts.append(("left out", ", ".join(partial["left_out"]) or "nothing"))
    words = {"ours": "folder of ours", "torch": "one PyTorch file", "safetensors": "published names, safetensors"}
    if checkpoint.family in ("kl", "clip"):
        words["ours"] = "published folder, which is what this package reads"
    return ExportPlan(to, words[to], kept, meta, facts, size)


def _tensors_of(checkpoint: Checkpoint, leaf: str, item: Any) -> list[str]:
    """The tensors of the source of which a leaf is made."""
    return [leaf] if checkpoint.ours else [piece.tensor for piece in item.pieces]


def _specs(checkpoint: Checkpoint, to: str, dtype: Any) -> dict[str, Any]:
    ours = to == "ours" and checkpoint.family in ("dit", "tiny")
    specs = (reading.our_specs if ours else reading.published_specs)(checkpoint, dtype)
    if dtype is None:
        return specs
    return {n: jax.ShapeDtypeStruct(s.shape, np.float32) if n.endswith(_FLOAT32) else s for n, s in specs.items()}


def _about_dit(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    config, told = checkpoint.config, checkpoint.told
    preset = _preset(config)
    if preset and "diffusion" not in told:
        config = dataclasses.replace(config, name=preset)
    meta = describe(config)
    if "diffusion" in told:  # a description of ours came with the tensors
        meta = {**meta, **{name: value for name, value in told.items() if name != "layout"}}
        meta["model"] = dataclasses.asdict(config)
    else:
        meta["license"] = SOURCE_LICENSE
    moe = ""
    if config.experts:
        shared = f", shared expert {config.shared_experts} x width" if config.shared_experts else ""
        moe = (
            f", {config.experts} {config.expert_mlp} experts ({config.active_experts} active, {config.gating}){shared}"
        )
    facts = [
        ("model", preset or "no preset has these sizes"),
        ("sizes", f"{config.depth} layers, width {config.dim}, {config.heads} heads{moe}"),
        ("input", f"{config.input_channels} channels, {config.label_rows} labels"),
        ("parameters", f"{count_params(config):,} in all, {count_active_params(config):,} active"),
        ("resolution", f"{config.input_size * LATENT_FACTOR} pixels"),
        ("tasks", ", ".join(meta["tasks"]) or "none: made for classes, fine-tune it first"),
        ("diffusion", ", ".join(f"{name} {value}" for name, value in meta["diffusion"].items())),
        ("autoencoder", str(meta["autoencoder"])),
    ]
    return meta, facts


def _preset(config: Any) -> str | None:
    """The preset of these sizes, whatever its resolution and gating."""
    for name in preset_names():
        preset = get_preset(name)
        if dataclasses.replace(preset, name="", input_size=config.input_size, gating=config.gating) == (
            dataclasses.replace(config, name="")
        ):
            return name
    return None


def _about_kl(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    config = checkpoint.config
    widths = ", ".join(map(str, config.block_out_channels))
    facts = [("model", "AutoencoderKL"), ("sizes", f"widths {widths}, {config.layers_per_block} blocks a level")]
    facts += [("parameters", f"{_count(checkpoint):,}"), ("latents", f"times {config.scaling_factor}")]
    return {"config": {**vae_torch.vae_config_to_json(config)}}, facts


def _about_tiny(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    known = "TAESD" if checkpoint.config == tiny_vae.TAESD else "small autoencoder of ours"
    return {"config": {"_class_name": "AutoencoderTiny"}}, [("model", known), ("parameters", f"{_count(checkpoint):,}")]


def _about_clip(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    config, folder = checkpoint.config, _tokenizer_of(checkpoint)
    facts = [("model", "CLIP text encoder"), ("sizes", f"{config.layers} layers, width {config.width}")]
    facts += [("parameters", f"{_count(checkpoint):,}"), ("projection", str(config.projection_dim or "none"))]
    facts.append(("tokenizer", str(folder) if folder else "none beside the weights: put one into DST/tokenizer"))
    return {"config": hf_clip.clip_config_to_json(config)}, facts


def _tokenizer_of(checkpoint: Checkpoint) -> Path | None:
    """Where the tokenizer is: with the weights, in ``tokenizer`` there, or beside the folder."""
    weights = checkpoint.files[0].absolute().parent
    places = (weights, weights / "tokenizer", weights.parent / weights.name.replace("text_encoder", "tokenizer"))
    return next((place for place in places if any((place / name).is_file() for name in _TOKENIZER[:2])), None)


def _count(checkpoint: Checkpoint) -> int:
    return sum(prod(item.shape) for item in checkpoint.plans.values())


def check_target(source: Path, target: Path, to: str, settings: Mapping[str, Any], overwrite: bool = False) -> None:
    """Refuse a target that cannot be written or would destroy something.

    Args:
        settings: of this conversion. overwrite: also where a model is that was made with other ones.

    Raises:
        UserError: it is the source, another file, a folder that this package did not write, of the wrong kind, or holds
            another model.
    """
    if target.resolve() == source.resolve():
        raise UserError(f"{target} is the source itself: give another name to write to")
    if source.resolve() in target.resolve().parents and source.is_dir() and to != "torch":
        raise UserError(f"{target} lies in the source {source}: give a place outside it")
    if target.resolve() in source.resolve().parents:
        raise UserError(f"{target} holds the source {source}: give another name to write to")
    if to == "torch":
        if target.suffix not in TORCH_SUFFIXES:
            raise UserError(f"{target}: --to torch writes one file: give a name that ends in .pt")
        for path in (target, target.with_suffix(".json")):
            if path.is_dir():
                raise UserError(f"{path} is a folder: give another name")
            _refuse_other(path, settings, overwrite)
    elif target.suffix in (*TORCH_SUFFIXES, ".safetensors"):
        raise UserError(f"{target}: --to {to} writes a folder: give a name without {target.suffix}")
    elif target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: give the name of a folder to write")
    elif target.is_dir() and not _replaceable(target):
        raise UserError(f"{target} holds other files than a model that this package wrote: give another name")
    else:
        _refuse_other(target, settings, overwrite)


def _refuse_other(target: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """The source's digest counts where ``settings`` has it: it is known when all is read."""
    if overwrite or not (any(target.iterdir()) if target.is_dir() else target.exists()):
        return
    there = settings_there(target)
    if there is not None and "sha256" not in settings:
        there = {name: value for name, value in there.items() if name != "sha256"}
    refuse_other(target, there, settings, flags=True)


def _replaceable(folder: Path) -> bool:
    names = [path.name for path in folder.iterdir()]
    if not names:
        return True
    card = folder / CARD
    marked = card.is_file() and _MARK in card.read_text(encoding="utf-8", errors="replace")
    return marked and all(_OURS.fullmatch(name) for name in names)


def write(
    checkpoint: Checkpoint,
    plan: ExportPlan,
    target: Path,
    shard_bytes: int,
    settings: Mapping[str, Any],
    overwrite: bool,
) -> int:
    """Write the checkpoint; returns the bytes of its tensors. ``settings`` and ``overwrite`` as for ``check_target``.

    Raises:
        UserError: the disk is too small or full, the folder cannot be written, or it holds what an equal command made
            of other weights.
    """
    digests = _Digests(checkpoint.files)
    with _stage(target, plan.bytes * (2 if plan.to == "torch" else 1)) as stage:
        if plan.to == "torch":
            _write_torch(checkpoint, plan, stage / target.name, digests)
            settings = {**settings, "sha256": digests.result()}
            for path in (target.with_suffix(".json"), target):
                _refuse_other(path, settings, overwrite)
            with finished_first():
                for path in (target.with_suffix(".json"), target):
                    keep_settings(path, stage / path.name, settings)
                    os.replace(stage / path.name, path)
            return plan.bytes
        writers = {"dit": _write_dit, "kl": _write_kl, "tiny": _write_tiny, "clip": _write_clip}
        writers[checkpoint.family](checkpoint, plan, stage, shard_bytes, digests)
        settings = {**settings, "sha256": digests.result()}
        _refuse_other(target, settings, overwrite)
        keep_folder_settings(stage, settings)
        swap_folder(stage, target)
    return plan.bytes


class _Digests(threading.Thread):
    """SHA-256 of files, computed beside the conversion, which reads the same pages."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        super().__init__(daemon=True)
        self._files, self._found, self._failed = files, {}, None
        self.start()

    def run(self) -> None:
        try:
            for path in self._files:
                with open(path, "rb") as file:
                    self._found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            self._failed = error

    def result(self) -> str | dict[str, str]:
        """The digest of the one file, or name -> digest."""
        self.join()
        if self._failed:
            raise UserError(f"cannot read the source: {self._failed}") from self._failed
        return next(iter(self._found.values())) if len(self._found) == 1 else dict(self._found)


@contextlib.contextmanager
def _stage(target: Path, needed: int) -> Iterator[Path]:
    """A fresh hidden folder beside ``target``, removed again whatever happens; only one conversion may have it."""
    parent = target.absolute().parent
    stage = parent / f".{target.name}.partial"
    mend = "wait for it or give another name"
    with hold(parent / f".{target.name}.lock", f"another convert is writing {target}", mend):
        free = shutil.disk_usage(parent).free
        try:
            shutil.rmtree(stage, ignore_errors=True)  # of one that was killed
            restore_folder(target)
            if free < needed:
                raise UserError(
                    f"cannot write {target}: it takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} are free; free space "
                    "or choose another place"
                )
            with removed_when_stopped(stage):
                stage.mkdir()
                yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _described(plan: ExportPlan, digests: _Digests) -> dict[str, Any]:
    return {**plan.meta, "source": {**plan.meta["source"], "sha256": digests.result()}}


def _write_torch(checkpoint: Checkpoint, plan: ExportPlan, path: Path, digests: _Digests) -> None:
    """One plain state dict, and beside it as JSON what its tensors do not tell."""
    specs = _specs(checkpoint, "torch", plan.dtype)
    pairs = ((name, cast(name, array, specs[name].dtype)) for name, array in reading.to_published(checkpoint))
    torch_files.write_torch(path, progress(pairs, len(specs), "convert"))
    write_json(path.with_suffix(".json"), _published_meta(checkpoint, _described(plan, digests)))


def _published_meta(checkpoint: Checkpoint, meta: dict[str, Any]) -> dict[str, Any]:
    """The description for published names: without the mark that our own folders have."""
    if checkpoint.family != "dit":  # what begins with an underscore is no setting of the network
        return {**meta["config"], **({"_partial": meta["partial"]} if "partial" in meta else {})}
    return {"layout": _dit_layout(checkpoint.config), **{n: value for n, value in meta.items() if n != "format"}}


def _dit_layout(config: Any) -> str:
    return "generalist" if config.routed else "dit_moe" if config.experts else "dit"


def _write_dit(checkpoint: Checkpoint, plan: ExportPlan, stage: Path, shard_bytes: int, digests: _Digests) -> None:
    specs = _specs(checkpoint, plan.to, plan.dtype)
    if plan.to == "ours":
        pieces = sum(1 if checkpoint.ours else len(leaf.pieces) for leaf in checkpoint.plans.values())
        slices = progress(reading.to_ours(checkpoint), pieces, "convert")
        save_streamed(stage, specs, slices, plan.meta, shard_bytes)
    else:
        slices = ((name, (), array) for name, array in reading.to_published(checkpoint))
        save_sharded(stage, specs, progress(slices, len(specs), "convert"), {"format": "pt"}, shard_bytes)
    meta = _described(plan, digests)
    if plan.to == "ours":
        write_json(stage / CONFIG, meta)
        write_text(stage / CARD, model_card(meta))
    else:
        write_json(stage / CONFIG, _published_meta(checkpoint, meta))
        write_text(stage / CARD, _plain_card(f"{checkpoint.config.name}, published names", "convert . DIR", meta))


def _write_kl(checkpoint: Checkpoint, plan: ExportPlan, stage: Path, shard_bytes: int, digests: _Digests) -> None:
    """diffusers' folder, which is also what ``load_autoencoder`` reads."""
    specs = _specs(checkpoint, plan.to, plan.dtype)
    slices = ((name, (), array) for name, array in reading.to_published(checkpoint))
    save_sharded(stage, specs, progress(slices, len(specs), "convert"), {"format": "pt"}, plan.bytes + 1)
    os.replace(stage / SINGLE, stage / _KL_FILE)
    meta = _described(plan, digests)
    write_json(stage / CONFIG, _published_meta(checkpoint, meta))
    write_text(stage / CARD, _plain_card("Autoencoder (AutoencoderKL)", "prepare … --latents --vae .", meta))


def _write_tiny(checkpoint: Checkpoint, plan: ExportPlan, stage: Path, shard_bytes: int, digests: _Digests) -> None:
    """Two files: ours (``encoder.safetensors``) or TAESD's own (``taesd_encoder.safetensors``)."""
    specs = _specs(checkpoint, plan.to, plan.dtype)
    ours = plan.to == "ours"
    whole = reading.to_ours(checkpoint) if ours else ((n, (), array) for n, array in reading.to_published(checkpoint))
    tensors = {name: array for name, _, array in progress(whole, len(specs), "convert")}  # a few MB
    for part in reading.PARTS:
        names = {reading.half_name(part, n): n for n in tensors if n.startswith(part)}
        held = {short: specs[name] for short, name in names.items()}
        header = {"format": "pt"}
        if ours:
            header = {"format": reading.TINY_FORMAT, "part": part, "config": json.dumps(checkpoint.config.to_dict())}
        save_sharded(stage / part, held, [(short, (), tensors[name]) for short, name in names.items()], header, 2**40)
        os.replace(stage / part / SINGLE, stage / f"{'' if ours else 'taesd_'}{part}.safetensors")
        (stage / part).rmdir()
    meta = _described(plan, digests)
    write_text(stage / CARD, _plain_card("Autoencoder (TAESD's family)", "prepare … --latents --vae .", meta))


def _write_clip(checkpoint: Checkpoint, plan: ExportPlan, stage: Path, shard_bytes: int, digests: _Digests) -> None:
    """``text_encoder`` and ``tokenizer``, as in a Stable Diffusion repository; ``hf_clip.load_clip`` reads it."""
    specs = _specs(checkpoint, plan.to, plan.dtype)
    slices = ((name, (), array) for name, array in reading.to_published(checkpoint))
    save_sharded(stage / "text_encoder", specs, progress(slices, len(specs), "convert"), {"format": "pt"}, 2**40)
    write_json(stage / "text_encoder" / CONFIG, _published_meta(checkpoint, plan.meta))
    found = _tokenizer_of(checkpoint)
    for name in _TOKENIZER:
        if found and (found / name).is_file():
            (stage / "tokenizer").mkdir(exist_ok=True)
            shutil.copyfile(found / name, stage / "tokenizer" / name)
    write_text(stage / CARD, _plain_card("Text encoder (CLIP)", "train … (task context)", _described(plan, digests)))


def _plain_card(title: str, command: str, meta: dict[str, Any]) -> str:
    """A card for what is no diffusion model."""
    told = [f"- {name}: {value}" for name, value in meta["source"].items()]
    partial = [f"- {name}: {', '.join(names) or 'nothing'}" for name, names in meta.get("partial", {}).items()]
    return "\n".join(
        [
            "---",
            _MARK,
            "license: other",
            "---",
            "",
            f"# {title}",
            "",
            "```",
            f"scaling-perception {command}",
            "```",
            "",
            "## Source",
            "",
            *told,
            *partial,
            "",
            "## Licence",
            "",
            f"{SOURCE_LICENSE}.",
            "",
        ]
    )
