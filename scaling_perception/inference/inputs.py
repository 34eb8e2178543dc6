"""What a person may hand to the predictor: pictures as paths, PIL or arrays; models as names, folders or hub ids."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaling_perception.data.images import from_array, from_pil, orientation, read_image
from scaling_perception.data.masks import to_mask
from scaling_perception.interop.layouts import INDEX_END, SUFFIXES, locate
from scaling_perception.interop.model_folder import CONFIG, SHIPPED, WEIGHTS
from scaling_perception.models.presets import preset_names
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.files import read_json
from scaling_perception.support.hub import fetch
from scaling_perception.tasks import TASKS, get_task
from scaling_perception.tasks.samples import require

INDEX = "model" + INDEX_END  # of weights in several files
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = [CONFIG, "README.md", "model*.safetensors", INDEX]


def to_rgb(image: Any) -> np.ndarray:
    """One picture as uint8 RGB (H, W, 3).

    Args:
        image: a path; a PIL picture of any mode; or an array, see ``images.from_array``. Transparency is laid on white.

    Raises:
        UserError: an unreadable file, or an array of another shape, type or range.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    return from_pil(image) if hasattr(image, "convert") else from_array(np.asarray(image))


def raw_samples(images: Sequence[Any], task: str, prompt: Any = None) -> list[dict[str, Any]]:
    """Pictures and prompts as raw samples (the fields that ``tasks.conditions`` reads).

    Raises:
        UserError: no or an unreadable picture, a missing, superfluous or misshapen prompt.
    """
    if not images:
        raise UserError("no image was given: give one picture or more")
    what = get_task(task)
    asks = what.prompt
    if asks is None:
        if prompt is not None and any(p is not None for p in prompt):
            prompted = " or ".join(one.name for one in TASKS.values() if one.prompt is not None)
            raise UserError(f"{task} takes no prompt: leave it out, or choose the task {prompted}")
        return [{"key": _name(image, i), "image": to_rgb(image)} for i, image in enumerate(images)]
    prompts = [] if prompt is None else list(prompt)
    if len(prompts) != len(images) or any(p is None for p in prompts):
        given = sum(p is not None for p in prompts)
        raise UserError(f"{task} needs a prompt for each image ({asks.words}): got {given} for {len(images)} image(s)")
    field, read = asks.field, to_rgb if asks.frame else to_mask
    raws = [
        {"key": _name(image, i), "image": to_rgb(image), field: read(one)}
        for i, (image, one) in enumerate(zip(images, prompts, strict=True))
    ]
    for raw, image, one in zip(raws, images, prompts, strict=True):
        _same_way_up(raw, field, image, one)
        require(raw, field, like="image")  # an error now, and not in the middle of a batch
        what.check(raw)
    return raws


def _same_way_up(raw: dict[str, Any], field: str, image: Any, prompt: Any) -> None:
    """UserError where EXIF turned one of two files and their sizes differ because of it."""
    high, wide = raw["image"].shape[:2]
    if raw[field].shape[:2] == (high, wide) or raw[field].shape[:2] != (wide, high):
        return
    turns = [orientation(one) if isinstance(one, (str, os.PathLike)) else 1 for one in (image, prompt)]
    if max(turns) > 1:
        raise UserError(
            f"{raw['key']} is {wide}x{high} upright (EXIF orientation {turns[0]}) but {field} is {high}x{wide} "
            f"(EXIF orientation {turns[1]}): turn both upright"
        )


def _name(image: Any, index: int) -> str:
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"image {index}"


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(f.parent.name for f in SHIPPED.glob(f"*/{CONFIG}") if (f.parent / WEIGHTS).is_file())


def find_model(name: str | os.PathLike[str]) -> Path:
    """The folder of a model: a model folder, a training run (its ``model/``), a shipped name, or a hub id.

    Raises:
        UserError: none of these. A published checkpoint is told the command that converts it, a preset that it is a
            size without weights, another name the nearest shipped one.
    """
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
