"""Every model size in one table (paper tables 1 and 2, facts 1.2; DiT table 1), and two small ones of ours."""

import dataclasses
from typing import Any

from scaling_perception.models.config import DiTConfig, config_from_dict
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

# From scratch (DiT-MoE, facts 1.2): SwiGLU experts and a shared one. 8E2A: 8 experts, of which 2 are active.
_DIT_MOE = {"expert_mlp": "swiglu", "shared_experts": 2, "gating": "paper"}
_SCRATCH = {"S/2-8E2A": ("S/2", 8), "S/2-16E2A": ("S/2", 16), "L/2-8E2A": ("L/2", 8)}

# Upcycled from a dense model: its MLP copied (facts 3.2). The weights of the chosen experts are renormalised, which
# keeps the dense model's function; the paper's own gating does not.
_UPCYCLED = ("a2", "a3", "a4")
_SPLITS = ((4, 2), (8, 1), (8, 2), (8, 4), (16, 2))  # experts, active

# The authors' released generalist at 512 pixels, and the dense model it was upcycled from (facts 1.2, 2).
_TASKS = {"input_size": 64, "cond_channels": 8, "task_labels": 4, "routed": True}


def _all() -> dict[str, DiTConfig]:
    table = {name: DiTConfig(name, 32, *size) for name, size in _SIZES.items()}
    for name, (base, experts) in _SCRATCH.items():
        table[name] = dataclasses.replace(table[base], name=name, experts=experts, **_DIT_MOE)
    for base in _UPCYCLED:
        for experts, active in _SPLITS:
            split = {"experts": experts, "active_experts": active, "gating": "renormalised"}
            name = f"{base}-{experts}E{active}A"
            table[name] = dataclasses.replace(table[base], name=name, **split)
    table["XL-generalist"] = dataclasses.replace(table["XL/2"], name="XL-generalist", **_TASKS)
    table["XL-8E2A"] = dataclasses.replace(table["XL-generalist"], name="XL-8E2A", experts=8)
    for name, (dim, depth, heads) in _SMALL.items():
        table[name] = DiTConfig(name, dim=dim, depth=depth, heads=heads, **_GENERALIST)
    return table


_TABLE = _all()


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
