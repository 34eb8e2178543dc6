"""A config held against the table of fields: names, types, ranges, choices, and fields that contradict each other."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.fields import ARGUMENTS, FIELDS, Field, resolve
from scaling_perception.support.places import split_places
from scaling_perception.support.remote import is_remote

_TABLES = (ConfigDict, Mapping)
_KINDS = {bool: "true or false", str: "a text", dict: "a table such as {'depth': 4}"}


def check_config(config: Any) -> None:
    """Refuse a config with a field that is unknown, missing, of another type, out of range, or in contradiction.

    Args:
        config: a ConfigDict as ``fields.defaults`` makes it.

    Raises:
        UserError: naming the field, its value and what to give.
    """
    _check_table(config, "", "")
    _check_together(config)


def check_argument(name: str, value: Any, default: Any) -> None:
    """Refuse an argument of a config file that is out of range. A value that the file itself has as default is allowed.

    Raises:
        UserError: naming the argument, its value and what to give.
    """
    if value == default:
        return
    where = f"config argument '{name}'"
    if name in ARGUMENTS:
        _check_value(ARGUMENTS[name], where, value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} is {value!r}: give a finite number")


def _check_table(table: Any, path: str, pattern: str) -> None:
    """``path`` and ``pattern`` are the table's own name with its dot, as written and as in FIELDS."""
    known = [name.removeprefix(pattern) for name in FIELDS if name.startswith(pattern)]
    known = [name for name in known if "." not in name]
    for key in table:
        row = pattern + (key if key in known or "NAME" not in known else "NAME")
        if row not in FIELDS:
            if row == "model_changes.input_size":
                raise UserError("model_changes.input_size follows from the resolution: set that")
            raise UserError(f"unknown field '{path}{key}'{did_you_mean(str(key), known)}")
        field, value = FIELDS[row], table[key]
        if field.kind is not dict:
            _check_value(field, path + key, value)
            continue
        if not isinstance(value, _TABLES):
            raise UserError(f"{path}{key} is {value!r}: give {_KINDS[dict]}")
        _check_table(value, f"{path}{key}.", f"{row}.")
    for key in known:
        if key != "NAME" and key not in table and not FIELDS[pattern + key].optional:
            raise UserError(
                f"the config has no field '{path}{key}': begin with common.defaults(), as those in configs/ do"
            )


def _check_value(field: Field, where: str, value: Any) -> None:
    if field.kind is tuple:
        if not isinstance(value, (tuple, list)) or not value:
            raise UserError(
                f"{where} is {value!r}: give numbers such as {field.default if not field.optional else (1, 3)}"
            )
        number = float if not field.optional and isinstance(field.default[0], float) else int
        for one in value:
            _check_number(field, where, one, number, value)
    elif field.kind in (int, float):
        _check_number(field, where, value, field.kind, value)
    elif where.endswith(".cache") and isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
        return  # several folders
    elif not isinstance(value, field.kind):
        options = field.options()
        raise UserError(f"{where} is {value!r}: give {' or '.join(map(str, options)) or _KINDS[field.kind]}")
    elif field.choices:
        options = field.options()
        if value in field.refused:
            raise UserError(f"{where} is '{value}': {field.refused[value]}")
        if value not in options and value not in field.also:
            raise UserError(f"{where} is '{value}'{did_you_mean(str(value), options)}")


def _check_number(field: Field, where: str, value: Any, kind: type, shown: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    right = whole or (kind is float and isinstance(value, float) and math.isfinite(value))
    if right and (value in field.also or (value in field.options() if field.choices else inside(field.range, value))):
        return
    finite = not isinstance(value, float) or math.isfinite(value)
    raise UserError(f"{where} is {shown!r}: give {wanted(field, kind)}{'' if finite else ', and a finite one'}")


def _ends(interval: str) -> tuple[float, float, bool, bool]:
    """(low, high, whether low is allowed, whether high is) of ``[0, 1)``."""
    low, _, high = interval[1:-1].partition(",")
    return float(low), float(high), interval[0] == "[", interval[-1] == "]"


def inside(interval: str, value: float) -> bool:
    """Whether the number lies in ``interval``, such as ``[0, 1)``; NaN lies in none."""
    low, high, with_low, with_high = _ends(interval)
    return (value >= low if with_low else value > low) and (value <= high if with_high else value < high)


def wanted(field: Field, kind: type | None = None) -> str:
    """What a number of the field may be, in words: ``a whole number of at least 1``."""
    kind = kind or field.kind
    if field.choices:
        return " or ".join(map(str, field.options()))
    low, high, with_low, with_high = _ends(field.range)
    number = "a whole number" if kind is int else "a number"
    if field.kind is tuple:
        number = f"{number.removeprefix('a ')}s"
    if high == math.inf:
        text = f"{number} {'of at least' if with_low else 'above'} {low:g}"
    else:
        text = f"{number} from {'' if with_low else 'above '}{low:.10g} to {'' if with_high else 'below '}{high:.10g}"
    return ", or ".join([text, *map(str, field.also)])


# ---- Fields together ----


def _check_together(config: Any) -> None:
    optim, train, low_high = config.optim, config.train, tuple(config.task_options.depth_quantiles)
    if optim.schedule != "constant" and optim.lr_final > optim.lr:
        raise UserError(
            f"optim.lr_final is {optim.lr_final!r}, above optim.lr, {optim.lr!r}: the rate would climb; set both"
        )
    if optim.schedule == "exponential" and not optim.lr_final:
        raise UserError(
            f"optim.lr_final is {optim.lr_final!r}: exponential decay ends above zero; or set schedule=cosine"
        )
    if optim.name == "adam" and optim.weight_decay:
        raise UserError("optim.weight_decay is set, but adam has none: use optim.name=adamw")
    if len(low_high) != 2 or not low_high[0] < low_high[1]:
        raise UserError(f"task_options.depth_quantiles is {low_high}: give two numbers that rise, such as (0.02, 0.98)")
    if list(config.mesh.values()).count(-1) > 1:
        raise UserError(f"mesh is {config.mesh.to_dict()}: give -1 (what is left) at most once")
    if train.batch_size % train.accumulate:
        raise UserError(
            f"train.batch_size is {train.batch_size}: give a multiple of train.accumulate, {train.accumulate}"
        )
    for table in ("data", "held_out"):
        _check_caches(f"{table}.cache", config[table].get("cache", ""))
    _check_kept(train)
    if config.objective != "autoencoder":
        _check_network(config)
    if config.noise == "zeros" and config.objective != "one_step":
        raise UserError(f"noise is 'zeros', which objective={config.objective} cannot learn from: give gaussian")
    if config.objective == "one_step":
        resolve("training.one_step:check_one_step")(config)
    for name in ("phase", "teacher", "bank", "vae"):
        if (name in config) != (config.objective == "autoencoder"):
            what = (
                "is for objective=autoencoder alone" if name in config else "is missing: objective=autoencoder needs it"
            )
            raise UserError(f"{name} {what}")


def _check_caches(where: str, caches: str | Sequence[str]) -> None:
    """Refuse a cache that is named twice, whose records would be drawn twice as often as those of the others."""
    places = split_places(caches) if isinstance(caches, str) else caches
    seen: dict[str, str] = {}
    for place in places:
        real = place if is_remote(place) else os.path.realpath(place)
        if real in seen:
            other = "" if seen[real] == place else f", also as {seen[real]}"
            raise UserError(f"{where} has {place} twice{other}: give each cache once")
        seen[real] = place


def _check_kept(train: Any) -> None:
    """The checkpoints that are kept for a metric."""
    if train.export_from == "best" and not train.keep_best:
        raise UserError("train.export_from is 'best' and none is kept: set train.keep_best to at least 1")
    metric = best_metric(train)
    if train.keep_best and metric.startswith(HELD_OUT):
        if not train.validate_every:
            raise UserError(f"train.best_metric is {metric}: set train.validate_every and held_out as well")
        if train.checkpoint_every % train.validate_every:
            raise UserError(
                f"train.checkpoint_every is {train.checkpoint_every}: give a multiple of train.validate_every, "
                f"{train.validate_every}, for every checkpoint needs its {metric}"
            )


HELD_OUT = "held_out_"  # begins the names of what is measured on held-out samples


def best_metric(train: Any) -> str:
    """The name of the metric that ``train.keep_best`` compares: the smaller, the better."""
    return train.best_metric or (HELD_OUT + "loss" if train.validate_every else "loss")


def _check_network(config: Any) -> None:
    """The preset with its changes, its size at the resolution, and the diffusion preset with its own."""
    changes = config.model_changes.to_dict()
    try:
        dit = resolve("models.presets:get_preset")(config.model, **changes)
    except UserError as error:
        raise UserError(f"model_changes of {config.model}: {error}") from None
    unused = [name for name in ("active_experts", "expert_mlp", "gating") if name in changes and not dit.experts]
    if unused:
        raise UserError(
            f"model_changes.{unused[0]} is set, but {config.model} has no experts: set model_changes.experts as well"
        )
    resolve("models.presets:at_resolution")(dit, config.resolution)
    resolve("diffusion.schedules:get_diffusion")(config.diffusion, **config.diffusion_changes.to_dict())


def notes(config: Any) -> list[str]:
    """Lines about fields that have no effect as they are set, or another one than they say."""
    train, lines = config.train, []
    if config.optim.warmup > train.steps // 2:
        lines.append(f"optim.warmup is {config.optim.warmup}: shortened to {train.steps // 2} steps, half of the run")
    if not train.validate_every and (config.held_out.cache or config.held_out.mixture):
        lines.append("held_out is set, but train.validate_every is 0: nothing is measured on it")
    if train.validate_every > train.steps:
        lines.append(f"train.validate_every is {train.validate_every}, more than the run's {train.steps} steps")
    if train.best_metric and not train.keep_best:
        lines.append("train.best_metric is set, but train.keep_best is 0: no checkpoint is kept for it")
    return lines


# ---- The table for readers ----


def as_rows() -> list[tuple[str, str, str, str]]:
    """(name, default, values, sentence) of every field that is no table; entries of held_out are those of data."""
    rows = []
    for name, field in FIELDS.items():
        if field.kind is dict or name.startswith("held_out.mixture."):
            continue
        if field.choices:
            options = list(map(str, field.options()))
            allowed = ", ".join(options) if len(options) <= 6 else f"{options[0]}, {options[1]}, … ({len(options)})"
        elif field.range:
            kind = float if field.kind is tuple and not field.optional else int if field.kind is tuple else None
            allowed = wanted(field, kind).removeprefix("a ")
        else:
            allowed = {bool: "true, false", str: "text"}[field.kind]
        default = "" if field.optional else str(field.default) if field.default != "" else "''"
        unit = f" [{field.unit}]" if field.unit else ""
        rows.append((name, default, allowed + unit, field.text + ("; may change on resuming" if field.free else "")))
    return rows


def as_text() -> str:
    """The table for a terminal."""
    lines = [
        "Fields of a config: --config.FIELD=VALUE. Those without a default are absent unless a config sets them.",
        "",
    ]
    for name, default, allowed, text in as_rows():
        lines += [f"{name}{f' = {default}' if default else ''}", f"    {text} ({allowed})"]
    return "\n".join(lines)


def as_markdown() -> str:
    """The table for docs/reference.md."""
    lines = ["| field | default | values | what it is |", "|---|---|---|---|"]
    for name, default, allowed, text in as_rows():
        lines.append(f"| `{name}` | {f'`{default}`' if default else ''} | {allowed} | {text} |")
    return "\n".join(lines)
