"""What a person may hand to the predictor: pictures as paths, PIL or arrays; models as names, folders or hub ids."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from scaling_perception.data.formats import read_image, read_mask
from scaling_perception.interop.model_folder import CONFIG, SHIPPED, WEIGHTS
from scaling_perception.support.errors import UserError, did_you_mean

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def to_rgb(image: Any) -> np.ndarray:
    """One picture as uint8 RGB (H, W, 3).

    Args:
        image: a path; a PIL picture of any mode; or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8,
            uint16 (its upper 8 bits are kept), bool, or float in [0, 1]. Transparency is laid on white.

    Raises:
        UserError: an unreadable file, or an array of another shape, type or range.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    if hasattr(image, "convert"):
        return _from_pil(image)
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise UserError(f"image array has shape {np.shape(image)}: give (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    array = _to_uint8(array)
    if array.shape[-1] == 4:
        alpha = array[..., 3:].astype(np.float32) / 255
        array = np.round(array[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return (array >> 8).astype(np.uint8)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"image array has type {array.dtype}: give uint8, uint16, or float in [0, 1]")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # also false for NaN
        raise UserError(f"image array of type {array.dtype} spans {low:g} to {high:g}: floats must be in [0, 1]")
    return np.round(array * 255).astype(np.uint8)


def _from_pil(image: Any) -> np.ndarray:
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise UserError(f"the picture has 32-bit pixels ({image.mode}): convert it to an 8-bit or 16-bit picture")
    if image.mode.startswith("I;16"):
        return to_rgb(np.asarray(image).astype(np.uint16))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return to_rgb(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def to_mask(mask: Any) -> np.ndarray:
    """One mask as bool (H, W): object where a picture or an array of bytes is at least half bright, or bool is True.

    Raises:
        UserError: an unreadable file, or an array of another shape.
    """
    if isinstance(mask, (str, os.PathLike)):
        return read_mask(mask)
    array = np.asarray(mask.convert("L") if hasattr(mask, "convert") else mask)
    if array.ndim == 3 and array.shape[-1] in (1, 3):
        array = array.max(axis=-1)
    if array.ndim != 2 or 0 in array.shape:
        raise UserError(f"mask array has shape {np.shape(mask)}: give (H, W)")
    if array.dtype == bool:
        return array
    top = array.max()
    return array > 0.5 if top <= 1 else array >= (32768 if top > 255 else 128)


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(f.parent.name for f in SHIPPED.glob(f"*/{CONFIG}") if (f.parent / WEIGHTS).is_file())


def find_model(name: str | os.PathLike[str]) -> Path:
    """The folder of a model: a model folder, a training run (its ``model/``), a shipped name, or a hub id.

    Raises:
        UserError: none of these; names the nearest shipped one.
    """
    path = Path(name)
    if path.is_dir():
        if (path / CONFIG).is_file() and (path / WEIGHTS).is_file():
            return path
        if (path / "model" / CONFIG).is_file():
            return path / "model"
        if (path / "checkpoints").is_dir():
            raise UserError(f"training run {path} has no model/ yet: let `train` finish (run the same command again)")
        raise UserError(f"folder {path} is no model ({CONFIG}, {WEIGHTS}) and no training run: check the path")
    if path.exists():
        raise UserError(f"{path} is a file: give the model's folder, a training run, or a name")
    known = shipped_models()
    if str(name) in known:
        return SHIPPED / str(name)
    if _HUB_ID.fullmatch(str(name)):
        return _download(str(name))
    near = did_you_mean(str(name), known) if known else ": check the name"
    raise UserError(f"model '{name}' is no folder, hub id (owner/name) or shipped model{near}")


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=[CONFIG, WEIGHTS, "README.md"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"model '{hub_id}' is no folder here and could not be fetched from the hub ({lines[0].rstrip('.')}): "
            "check the name and the network, or give a folder"
        ) from None
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"hub model '{hub_id}' has no {CONFIG} with {WEIGHTS}: it is no model of this package")
    return folder
