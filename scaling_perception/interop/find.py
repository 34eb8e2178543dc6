"""Finding a model: a folder, a training run, the name of a shipped one, or a hub id. Every verb uses this one."""

import os
import re
from pathlib import Path

from scaling_perception.interop.layouts import INDEX_END, SUFFIXES, locate
from scaling_perception.interop.sharded import INDEX, SINGLE
from scaling_perception.models.presets import preset_names
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.files import read_json
from scaling_perception.support.hub import fetch
from scaling_perception.support.remote import local

CONFIG, WEIGHTS = "config.json", SINGLE
SHIPPED = Path(__file__).parent.parent / "weights"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = [CONFIG, "README.md", "model*.safetensors", INDEX]


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(f.parent.name for f in SHIPPED.glob(f"*/{CONFIG}") if (f.parent / WEIGHTS).is_file())


def find_model(name: str | os.PathLike[str]) -> Path:
    """The folder of a model: a model folder, a training run (its ``model/``), a shipped name, a hub id, or
    an address in a bucket.

    Raises:
        UserError: none of these. A published checkpoint is told the command that converts it, a preset that it is a
            size without weights, another name the nearest shipped one.
    """
    name = local(name)
    path = Path(name)
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        if path.name.endswith((*SUFFIXES, INDEX_END)):
            raise _foreign(path)
        raise UserError(f"{path} is a file: give the model's folder, a training run, or a name")
    known = shipped_models()
    if str(name) in known:
        return SHIPPED / str(name)
    if str(name) in preset_names():
        raise UserError(
            f"'{name}' is a size and comes without weights: train it (scaling-perception train --config "
            f"configs/depth.py:model={name} …), convert a published checkpoint (scaling-perception convert FILE DIR), "
            f"or give one of {', '.join(known) or 'your model folders'}"
        )
    if _HUB_ID.fullmatch(str(name)):
        return _from_hub(str(name))
    near = did_you_mean(str(name), known) if known else ": check the name"
    raise UserError(f"model '{name}' is no folder, hub id (owner/name) or shipped model{near}")


def _in_folder(path: Path) -> Path:
    if _is_model(path):
        return path
    if _is_model(path / "model"):
        return path / "model"
    if (path / "checkpoints").is_dir():
        raise UserError(f"training run {path} has no model/ yet: let `train` finish (run the same command again)")
    if not (path / CONFIG).is_file() and any((path / file).is_file() for file in (WEIGHTS, INDEX)):
        raise UserError(
            f"{path} has weights and no {CONFIG}: copy the model's {CONFIG} there; a checkpoint in another layout than "
            f"ours is converted first (scaling-perception convert {path} DIR)"
        )
    try:
        locate(path)
    except UserError:
        raise UserError(
            f"folder {path} is no model ({CONFIG}, {WEIGHTS}) and no training run: check the path"
        ) from None
    raise _foreign(path)


def _is_model(folder: Path) -> bool:
    """Whether this package wrote it: others name the same two files alike."""
    if not (folder / CONFIG).is_file() or not any((folder / file).is_file() for file in (WEIGHTS, INDEX)):
        return False
    try:
        return "format" in read_json(folder / CONFIG)
    except (UserError, TypeError):
        return True  # damaged: loading it says how


def _foreign(path: Path) -> UserError:
    return UserError(
        f"{path} is a checkpoint in another layout than ours: convert it first (scaling-perception convert {path} DIR) "
        "and give DIR"
    )


def _from_hub(hub_id: str) -> Path:
    folder = fetch(hub_id, _HUB_FILES, "model")
    if not _is_model(folder):
        raise UserError(
            f"hub model '{hub_id}' has no {CONFIG} and {WEIGHTS} of this package: download it, convert it "
            "(scaling-perception convert FILE DIR) and give DIR"
        )
    return folder
