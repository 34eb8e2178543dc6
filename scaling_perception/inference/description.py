"""What a model folder's description says of how it is to be used, checked."""

import dataclasses
from typing import Any

from scaling_perception.diffusion.schedules import DiffusionPreset
from scaling_perception.models.autoencoders import Autoencoder, load_autoencoder
from scaling_perception.support.errors import UserError, did_you_mean

NO_TASK = (
    "this model knows no task: it was made for classes of pictures (an imported DiT); fine-tune it first "
    "(scaling-perception train --config configs/from_dit.py:init=FOLDER …)"
)


def own_autoencoder(meta: dict[str, Any]) -> Autoencoder:
    """The autoencoder that a model names. One without tasks needs none, and may name one that is not here."""
    if meta["tasks"]:
        return load_autoencoder(meta["autoencoder"])

    def refuse(*_: Any) -> Any:
        raise UserError(NO_TASK)

    return Autoencoder(meta["autoencoder"], "", {}, refuse, refuse)


def one_step_noise(meta: dict[str, Any]) -> str:
    """What a model of one step starts from: ``zeros`` or ``gaussian`` noise; '' for any other model."""
    if "one_step" not in meta:
        return ""
    noise = meta["one_step"].get("noise") if isinstance(meta["one_step"], dict) else meta["one_step"]
    if noise not in ("zeros", "gaussian"):
        raise UserError(f"one_step of the model has the noise {noise!r}: give zeros or gaussian, or export it again")
    return noise


def own_diffusion(fields: dict[str, Any]) -> DiffusionPreset:
    known = [field.name for field in dataclasses.fields(DiffusionPreset)]
    for name in fields:
        if name not in known:
            raise UserError(f"unknown diffusion setting '{name}' of the model{did_you_mean(name, known)}")
    return DiffusionPreset(**fields)
