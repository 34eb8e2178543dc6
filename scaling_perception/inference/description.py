"""What a model folder's description says of how it is to be used, checked."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from scaling_perception.diffusion.schedules import DiffusionPreset
from scaling_perception.models.autoencoders import Autoencoder, load_autoencoder
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.tasks import ALL_PASSES, TASKS, TaskOptions

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


def check_description(meta: Mapping[str, Any], where: str) -> None:
    """UserError, which names the file ``where`` and the field, for a value that no model of ours has."""
    try:
        own_tasks(meta)
        one_step_noise(dict(meta))
        own_diffusion(meta["diffusion"])
        TaskOptions.from_dict(meta.get("task_options", {}))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def own_tasks(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """The tasks of a model, and UserError where they or its passes are none that there are."""
    for field, known in (("tasks", tuple(TASKS)), ("passes", tuple(one.name for one in ALL_PASSES))):
        found = meta.get(field, [])
        if not isinstance(found, (list, tuple)):
            raise UserError(f"{field} of the model is {found!r}: give a list of {', '.join(known)}")
        for name in found:
            if name not in known:
                raise UserError(f"{field} of the model has {name!r}{did_you_mean(str(name), known)}")
    return tuple(meta["tasks"])


def own_diffusion(fields: Any) -> DiffusionPreset:
    """The diffusion of a model's description.

    Raises:
        UserError: it is no table, or has a field that is unknown or of another type.
    """
    if not isinstance(fields, Mapping):
        raise UserError(f"diffusion of the model is {fields!r}: give a table such as {{'schedule': 'cosine'}}")
    known = [field.name for field in dataclasses.fields(DiffusionPreset)]
    for name in fields:
        if name not in known:
            raise UserError(f"unknown diffusion setting '{name}' of the model{did_you_mean(name, known)}")
        kind = type(getattr(DiffusionPreset, name))
        if type(fields[name]) is not kind:
            raise UserError(f"diffusion {name} of the model is {fields[name]!r}: give a value of type {kind.__name__}")
    return DiffusionPreset(**fields)
