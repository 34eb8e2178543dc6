"""What all configs share: their defaults, and the parser of the argument after the colon."""

import contextlib
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from scaling_perception.support import fields
from scaling_perception.support.configs import Config, convert
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.field_checks import check_argument
from scaling_perception.support.files import read_json

# Arguments of the configs of the paper's fine-tuning; each adds where its data comes from.
PAPER_ARGS = {
    "model": "XL/2",
    "res": 512,
    "root": "",
    "cache": "",
    "vae": "tiny",
    "init": "",
    "diffusion": "fixed",
    "recipe": "auto",
}


# What ``recipe=auto`` is: the ablation for the ladder, the final one for these families (name before the experts).
_LADDER = ("a1", "a2", "a3", "a4", "a5", "a6", "nano", "mini")
_FINAL = ("S/2", "B/2", "L/2", "XL/2", "XL", "a2", "a3", "a4")


def parse_arg(arg: str, defaults: dict[str, Any]) -> Config:
    """``model=a1,res=256`` to values of the types of ``defaults``; a bare name turns a switch on.

    Raises:
        UserError: an unknown argument, or a value of another type or out of range (``support/fields.py``).
    """
    values: Config = ConfigDict(defaults)
    for part in filter(None, arg.split(",")):
        key, equals, text = part.partition("=")
        if key not in defaults:
            raise UserError(f"config argument '{key}' is unknown{did_you_mean(key, defaults)}")
        if not equals and not isinstance(defaults[key], bool):
            raise UserError(f"config argument '{key}' has no value: write {key}=VALUE")
        values[key] = convert(f"config argument '{key}'", defaults[key], text if equals else "true")
        check_argument(key, values[key], defaults[key])
    return values


def defaults() -> Config:
    """Every field of a training config: the defaults of ``support/fields.py``, which ``train --help-config`` prints.

    Optimiser values are those of facts 8 (paper, and Marigold where the paper is silent): AdamW (0.9, 0.999),
    eps 1e-8, no weight decay, no clipping, 100 steps of warm-up, exponential decay by 100, running average 0.9999.
    """
    return fields.defaults()


def shipped_masks(config: Config) -> None:
    """How the shipped model's painted objects become masks.

    225 was best on 40 training scenes, for what was white comes back a little grey; the visible part is known anyway,
    and what is painted around it as a rim of a pixel or two is the autoencoder's.
    """
    config.task_options.update({"mask_threshold": 225.0, "keep_visible": True, "mask_opening": 1})


def source(name: str, task: str, root: str = "", count: int = 0, start: int = 0) -> ConfigDict:
    """One entry of ``data.mixture``: ``count`` samples (0 = all) from ``start`` on; ``weight`` is relative."""
    where = {"source": name, "root": root, "split": "train", "count": count, "start": start}
    return ConfigDict({**where, "task": task, "weight": 1.0})


def entry(args: Config, task: str, usual: str, root: str = "", count: int = 0, start: int = 0) -> ConfigDict:
    """The entry of ``task`` by a config's arguments: of the dataset ``usual`` unless ``args.source`` names another.

    With ``args.cache``, which holds what it holds, the entry asks for what was given alone.
    """
    given = args.get("source", "")
    if args.cache:
        return ConfigDict({**source(given, task, args.get("root", ""), args.get("count", 0)), "split": ""})
    return source(given or usual, task, root or args.get("root", ""), count, start)


def keep_start(config: Config, init: str) -> None:
    """What a start of a shipped name, a local folder or run decides: it keeps its rows where it has more passes than
    the preset, its features, and its autoencoder where the config names none (else ``tiny``)."""
    named, config.autoencoder = config.autoencoder, config.autoencoder or "tiny"
    if not init:
        return
    from scaling_perception.interop.find import find_model, shipped_models  # imports JAX
    from scaling_perception.models.presets import get_preset

    with contextlib.suppress(UserError):  # training says what is wrong with it, and fetches what lies elsewhere
        if init in shipped_models() or Path(init).is_dir():
            start = read_json(find_model(init) / "config.json")
            known, preset = start["model"].get("task_labels", 0), get_preset(config.model)
            if known > max(preset.task_labels, config.model_changes.get("task_labels", 0)):
                config.model_changes.task_labels = known
            config.autoencoder = named or start.get("autoencoder", "tiny")
            options = start.get("task_options", {})
            config.task_options.flow_frame = options.get("flow_frame", "native")
            config.task_options.flow_refine = options.get("flow_refine", 0)
            if features := start["model"].get("features", 0):
                pictures = config.model_changes.get("cond_channels", preset.cond_channels) // preset.in_channels
                each = preset.in_channels + features
                config.model_changes.update({"features": features, "cond_channels": pictures * each})


def apply(config: Config, args: Config) -> None:
    """Set the fields that every config takes from its arguments."""
    config.model = args.model
    config.resolution = args.res
    config.autoencoder = args.vae
    if args.vae.endswith("+match"):  # it measures motion in the square
        config.task_options.flow_frame = "square"
    config.init = args.init
    config.diffusion = args.diffusion
    config.data.cache = args.cache


def apply_recipe(config: Config, args: Config) -> None:
    """What all fine-tuning of the paper has in common, and the values of ``args.recipe``.

    ``ablation``: the values of the paper's Figs. 3, 4 and 6 (batch 32 is Marigold's: the paper gives none); ``final``:
    those of its final models, as the config has them.

    Raises:
        UserError: ``auto`` for a model of which the paper says nothing.
    """
    config.optim.ema_warmup = True  # 4,000 to 30,000 steps leave 67 to 5 % of the start in a constant 0.9999
    recipe = args.recipe
    if recipe == "auto":
        recipe = "ablation" if args.model in _LADDER else "final"
        if recipe == "final" and args.model.partition("-")[0] not in _FINAL:
            raise UserError(f"recipe=auto knows none for model '{args.model}': add recipe=ablation or recipe=final")
    if recipe == "ablation":
        config.train.update({"steps": 30_000, "batch_size": 32})
        config.optim.update({"lr": 3e-5, "lr_final": 3e-7})
