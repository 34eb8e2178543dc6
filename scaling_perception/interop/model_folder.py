"""A model as a folder: config.json (what it is), model.safetensors (its weights), README.md (its card)."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scaling_perception.interop.safetensors_io import flatten_tree, load_tree, write_tensors
from scaling_perception.models.dit import abstract_params, config_from_dict, count_params
from scaling_perception.models.presets import at_resolution
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import atomic_path, read_json

FORMAT = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
SHIPPED = Path(__file__).parent.parent / "weights"

_REQUIRED = ("model", "resolution", "autoencoder", "diffusion", "tasks", "latent_norm")
_LICENSE = "apache-2.0"


def find_model(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder of a model: a path, or the name of one that ships with the package (such as 'mini').

    Raises:
        UserError: neither.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    shipped = SHIPPED / str(name_or_path)
    if str(name_or_path) and path.name == str(name_or_path) and (shipped / CONFIG).is_file():
        return shipped
    names = sorted(folder.parent.name for folder in SHIPPED.glob(f"*/{CONFIG}"))
    raise UserError(
        f"no model folder {name_or_path}: give a folder with {CONFIG} and {WEIGHTS}"
        + (f", or one of: {', '.join(names)}" if names else "")
    )


def save_model(folder: str | os.PathLike[str], params: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write a model folder. Nothing takes its place before everything is on disk, so a full disk leaves no half model.

    Args:
        params: parameter tree of the model that ``meta["model"]`` describes.
        meta: JSON-able; ``format`` (set here if absent), ``model`` (DiTConfig fields), ``resolution`` (pixels),
            ``autoencoder`` (name), ``diffusion``, ``tasks``, ``task_options``, ``latent_norm`` {"shift", "scale"} as
            [tasks][channels] numbers, ``training``.

    Raises:
        UserError: ``meta`` lacks a field, the tensors do not fit the model, or the folder cannot be written.
    """
    folder = Path(folder)
    meta = {"format": FORMAT, **meta}
    _check_meta(meta, str(folder))
    _check_tensors(flatten_tree(params), meta["model"], str(folder))
    # nested, so that the three renames happen together after the three files are written
    with contextlib.ExitStack() as stack:
        config = stack.enter_context(atomic_path(folder / CONFIG))
        card = stack.enter_context(atomic_path(folder / CARD))
        weights = stack.enter_context(atomic_path(folder / WEIGHTS))
        write_tensors(weights, params, {"format": str(FORMAT), "model": str(meta["model"]["name"])})
        card.write_text(_card(meta), encoding="utf-8")
        config.write_text(json.dumps(meta, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def load_model(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a model folder, or a shipped model by name: (parameter tree of numpy arrays on the host, meta).

    Put the tree on the device once (``jax.device_put``) before calling a compiled function many times.

    Raises:
        UserError: a file is missing or damaged, the format is another one, or a tensor is missing, unexpected or of
            another shape than the model's (named, with both shapes).
    """
    folder = find_model(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no {CONFIG}: give the folder of an exported model (such as WORKDIR/model)")
    meta = read_json(folder / CONFIG)
    _check_meta(meta, str(folder / CONFIG))
    params, _ = load_tree(folder / WEIGHTS)
    _check_tensors(flatten_tree(params), meta["model"], str(folder / WEIGHTS))
    return params, meta


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
    config = config_from_dict(meta["model"])
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
            shape = np.asarray(norm[field], np.float64).shape
        except (TypeError, ValueError):
            shape = None
        if shape is None or len(shape) != 2 or shape[1] != config.in_channels:
            raise UserError(f"{where}: latent_norm {field} should hold {config.in_channels} numbers for each task")


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


def _card(meta: Mapping[str, Any]) -> str:
    """The model card: front matter as model hubs read it, then what it is, how it was made, how to run it."""
    config = config_from_dict(meta["model"])
    diffusion = ", ".join(f"{name} {value}" for name, value in meta["diffusion"].items())
    training = [f"- {name}: {value}" for name, value in meta.get("training", {}).items()]
    task = meta["tasks"][0] if meta["tasks"] else "depth"
    lines = [
        "---",
        "library_name: scaling-perception",
        f"license: {_LICENSE}",
        f"tags: [diffusion, {', '.join(meta['tasks'])}]",
        "---",
        "",
        f"# {config.name}: {', '.join(meta['tasks'])}",
        "",
        f"A diffusion transformer with {count_params(config):,} parameters ({config.depth} layers, width {config.dim}, "
        f"{config.heads} heads) for {meta['resolution']} x {meta['resolution']} pictures, in the latents of the "
        f"autoencoder `{meta['autoencoder']}`.",
        "",
        f"Diffusion: {diffusion}.",
        "",
        "```",
        f"scaling-perception predict --task {task} --model . --steps 10 --ensemble 5 --out predictions IMAGE",
        "```",
        "",
    ]
    if training:
        lines += ["## Training", "", *training, ""]
    return "\n".join(lines)
