"""A model as a folder: config.json (what it is), README.md (its card), and its weights: model.safetensors, or several
files with an index."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scaling_perception.interop.find import CONFIG, find_model
from scaling_perception.interop.safetensors_io import dtype_of, flatten_tree
from scaling_perception.interop.sharded import (
    MAX_SHARD_BYTES,
    SINGLE,
    Progress,
    Slice,
    find_weights,
    load_sharded,
    open_sharded,
    save_sharded,
)
from scaling_perception.models.dit import abstract_params, config_from_dict, count_active_params, count_params
from scaling_perception.models.presets import at_resolution, preset_names
from scaling_perception.parallel.rules import tree_shardings
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import atomic_path, read_json

FORMAT = 1
CARD = "README.md"
LICENSE = "apache-2.0"
SOURCE_LICENSE = "other: the licence of the source weights applies"  # of converted weights

_REQUIRED = ("model", "resolution", "autoencoder", "diffusion", "tasks", "latent_norm")


def save_model(
    folder: str | os.PathLike[str],
    params: Mapping[str, Any],
    meta: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model folder. Nothing takes its place before everything is on disk, so a full disk leaves no half model.

    Args:
        params: parameter tree of the model that ``meta["model"]`` describes.
        meta: JSON-able; ``format`` (set here if absent), ``model`` (DiTConfig fields), ``resolution`` (pixels),
            ``autoencoder`` (name), ``diffusion``, ``tasks``, ``task_options``, ``latent_norm`` {"shift", "scale"},
            nested lists of shape (tasks, channels), ``training``. For the card alone: ``metrics`` (name -> value),
            ``fingerprint`` (of the training data), ``source`` (origin of converted weights: text, or name -> text),
            ``license`` (ours if absent).
        max_shard_bytes: weights beyond it are written as several files and an index (``interop/sharded.py``).

    Raises:
        UserError: ``meta`` lacks a field, the tensors do not fit the model, or the folder cannot be written.
    """
    flat = flatten_tree(params)
    specs = {name: jax.ShapeDtypeStruct(np.shape(leaf), dtype_of(leaf)) for name, leaf in flat.items()}
    save_streamed(folder, specs, ((name, (), leaf) for name, leaf in flat.items()), meta, max_shard_bytes)


def save_streamed(
    folder: str | os.PathLike[str],
    specs: Mapping[str, Any],
    slices: Iterable[Slice],
    meta: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """``save_model`` of weights that need not fit in memory: ``specs``, ``slices`` and ``progress`` are those of
    ``save_sharded`` (``torch_dit.leaf_specs`` and ``stream_from_torch`` make them).

    Raises:
        UserError: as ``save_model``.
    """
    folder = Path(folder)
    meta = {"format": FORMAT, **meta}
    _check_meta(meta, str(folder))
    _check_tensors(specs, meta["model"], str(folder))
    header = {"format": str(FORMAT), "model": str(meta["model"]["name"])}
    # nested, so that these two are renamed once the weights are in place
    with atomic_path(folder / CARD) as card, atomic_path(folder / CONFIG) as config:
        card.write_text(model_card(meta), encoding="utf-8")
        config.write_text(json.dumps(meta, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        save_sharded(folder, specs, slices, header, max_shard_bytes, progress)


def load_model(
    folder: str | os.PathLike[str], mesh: Any = None, dtype: Any = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a model folder, or a shipped model by name: (parameter tree, meta).

    Args:
        mesh: None = numpy arrays on the host; put the tree on the device once (``jax.device_put``) before calling a
            compiled function many times. With a mesh, each device reads its part of each leaf (``parallel/rules.py``)
            straight from the files, and no host holds the whole model.
        dtype: of the parameters; None = as stored.

    Raises:
        UserError: a file is missing or damaged, the format is another one, or a tensor is missing, unexpected or of
            another shape than the model's (named, with both shapes).
    """
    folder = Path(folder) if os.path.isdir(folder) else find_model(folder)
    meta = read_meta(folder)
    weights = find_weights(folder) or folder / SINGLE
    source = open_sharded(weights)
    specs = {name: jax.ShapeDtypeStruct(shape, source.dtypes[name]) for name, shape in source.shapes.items()}
    _check_tensors(specs, meta["model"], str(weights))
    shardings = None if mesh is None else tree_shardings(abstract_params(config_from_dict(meta["model"])), mesh)
    return load_sharded(weights, shardings, dtype), meta


def read_meta(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The description of a model folder, checked; its weights are not read.

    Raises:
        UserError: it is missing, damaged, or describes no model of ours.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} has no {CONFIG}: give the folder of an exported model (such as WORKDIR/model)")
    meta = read_json(path)
    _check_meta(meta, str(path))
    return meta


def _check_meta(meta: Any, where: str) -> None:
    if not isinstance(meta, Mapping) or "format" not in meta:
        raise UserError(f"{where} describes no model of ours (it has no 'format'): give an exported model folder")
    if meta["format"] != FORMAT:
        raise UserError(
            f"{where}: format {meta['format']!r} is not {FORMAT}, the one this version reads: use a matching version"
        )
    for field in _REQUIRED:
        if field not in meta:
            raise UserError(f"{where}: field '{field}' is missing: export the model again")
    if not isinstance(meta["model"], Mapping):
        raise UserError(f"{where}: 'model' should be the model's sizes, got {meta['model']!r}")
    try:
        config = config_from_dict(meta["model"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    for field, kind in (("resolution", int), ("autoencoder", str)):
        if type(meta[field]) is not kind:
            raise UserError(f"{where}: {field} is {meta[field]!r}: give a value of type {kind.__name__}")
    if at_resolution(config, int(meta["resolution"])).input_size != config.input_size:
        raise UserError(
            f"{where}: resolution {meta['resolution']} does not fit model input_size {config.input_size} "
            f"({config.input_size * 8} pixels)"
        )
    norm = meta["latent_norm"]
    for field in ("shift", "scale"):
        if not isinstance(norm, Mapping) or field not in norm:
            raise UserError(f"{where}: latent_norm has no '{field}': export the model again")
        try:
            values = np.asarray(norm[field], np.float64)
        except (TypeError, ValueError):
            values = np.zeros((0, 0))
        if values.ndim != 2 or values.shape[-1] != config.in_channels:
            raise UserError(f"{where}: latent_norm {field} should hold {config.in_channels} numbers for each task")
        if not np.isfinite(values).all() or (field == "scale" and not (values > 0).all()):
            what = "finite numbers above 0" if field == "scale" else "finite numbers"
            raise UserError(f"{where}: latent_norm {field} should hold {what}: export the model again")


def _check_tensors(tensors: Mapping[str, Any], model: Mapping[str, Any], where: str) -> None:
    config = config_from_dict(model)
    expected = flatten_tree(abstract_params(config))
    for name, leaf in expected.items():
        if name not in tensors:
            raise UserError(f"{where}: tensor {name} {leaf.shape} of model {config.name} is missing")
        if tuple(tensors[name].shape) != leaf.shape:
            raise UserError(
                f"{where}: tensor {name} has shape {tuple(tensors[name].shape)}, model {config.name} needs "
                f"{leaf.shape}: weights and config are of different models"
            )
    for name in tensors:
        if name not in expected:
            raise UserError(f"{where}: tensor {name} is unknown to model {config.name}")


def model_card(meta: Mapping[str, Any]) -> str:
    """The model card: front matter as model hubs read it, then what it is, how it was made, how to run it."""
    config = config_from_dict(meta["model"])
    tasks = list(meta["tasks"])
    license_ = str(meta.get("license", LICENSE))
    preset = config.name if config.name in preset_names() else None
    experts = f", {count_active_params(config):,} of them active for a token" if config.experts else ""
    lines = [
        "---",
        "library_name: scaling-perception",
        f"license: {license_ if license_ == LICENSE else 'other'}",
        f"tags: [{', '.join(['diffusion', *tasks])}]",
        "---",
        "",
        f"# {config.name}: {', '.join(tasks) or 'pre-trained, without a task'}",
        "",
        f"A diffusion transformer with {count_params(config):,} parameters{experts} ({config.depth} layers, width "
        f"{config.dim}, {config.heads} heads) for {meta['resolution']} x {meta['resolution']} pictures, in the latents "
        f"of the autoencoder `{meta['autoencoder']}`.",
        "",
        f"Diffusion: {', '.join(f'{name} {value}' for name, value in meta['diffusion'].items())}.",
        "",
    ]
    if tasks:
        way = "--steps 10 --ensemble 5"
        if "one_step" in meta:  # made by objective=one_step
            way = "--steps 1 --ensemble 1" if meta["one_step"]["noise"] == "zeros" else "--steps 1 --ensemble 5"
        command = f"predict --task {tasks[0]} --model . {way} --out predictions IMAGE"
        lines += ["```", f"scaling-perception {command}", "```", ""]
    else:
        lines += [
            f"It makes pictures of {config.num_classes} classes and predicts no depth, flow or mask: it is a starting "
            "point for fine-tuning on those.",
            "",
            "```",
            "scaling-perception train --config configs/from_dit.py:init=. --workdir WORKDIR",
            "```",
            "",
        ]
    sizes = dataclasses.asdict(config)
    rows = {"preset": preset or "none", **{name: value for name, value in sizes.items() if name != "name"}}
    lines += ["## Sizes", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
    for field, title in (("metrics", "Metrics"), ("training", "Training"), ("source", "Source")):
        told = meta.get(field) or {}
        items = [f"- {name}: {value}" for name, value in told.items()] if isinstance(told, Mapping) else [str(told)]
        if field == "training" and meta.get("fingerprint"):
            items.append(f"- data fingerprint: {meta['fingerprint']}")
        if items:
            lines += [f"## {title}", "", *items, ""]
    lines += ["## Licence", "", f"{license_}.", ""]
    return "\n".join(lines)
