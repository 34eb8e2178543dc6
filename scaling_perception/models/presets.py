"""Every model size in one table (paper table 1, facts 1.2; DiT table 1), and two small ones of ours."""

import dataclasses
from typing import Any

from scaling_perception.models.dit import DiTConfig, config_from_dict
from scaling_perception.support.errors import UserError, did_you_mean

LATENT_FACTOR = 8  # image pixels along one side of a latent pixel, for every autoencoder we read

# name: (dim, depth, heads)
_SIZES = {
    "a1": (256, 12, 16),
    "a2": (512, 16, 16),
    "a3": (768, 20, 16),
    "a4": (1024, 24, 16),
    "a5": (1536, 28, 16),
    "a6": (1792, 32, 16),
    "S/2": (384, 12, 6),
    "B/2": (768, 12, 12),
    "L/2": (1024, 24, 16),
    "XL/2": (1152, 28, 16),
}

# Ours: a generalist of 128 x 128 pictures for two CPU cores, and the smallest that still has every part, for tests.
_SMALL = {"mini": (128, 6, 4), "nano": (32, 2, 2)}
_GENERALIST = {
    "input_size": 16,
    "cond_channels": 8,
    "num_classes": 0,
    "task_labels": 4,
    "routed": True,
    "learn_sigma": False,
}

_TABLE = {
    **{name: DiTConfig(name, 32, *size) for name, size in _SIZES.items()},
    **{name: DiTConfig(name, dim=d, depth=n, heads=h, **_GENERALIST) for name, (d, n, h) in _SMALL.items()},
}


def preset_names() -> tuple[str, ...]:
    """Every preset's name, in the order of the table."""
    return tuple(_TABLE)


def get_preset(name: str, **changes: Any) -> DiTConfig:
    """The config of a preset, with some fields changed.

    The paper's sizes are those of pre-training: 256 x 256 pictures (input_size 32), no condition, 1000 classes, learned
    variance.

    Raises:
        UserError: unknown name or field, or a value that makes no model.
    """
    if name not in _TABLE:
        raise UserError(f"unknown model '{name}'{did_you_mean(name, _TABLE)}")
    return config_from_dict({**dataclasses.asdict(_TABLE[name]), **changes})


def at_resolution(config: DiTConfig, pixels: int) -> DiTConfig:
    """The same model for square pictures of ``pixels`` on a side; only the position table changes (facts 1.1).

    Raises:
        UserError: ``pixels`` is no whole number of patches.
    """
    step = LATENT_FACTOR * config.patch_size
    if pixels < step or pixels % step:
        near = max(step, round(pixels / step) * step)
        raise UserError(f"resolution {pixels} is not a multiple of {step} (8 x patch size): try {near}")
    return dataclasses.replace(config, input_size=pixels // LATENT_FACTOR)
