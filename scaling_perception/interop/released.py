"""What published diffusion checkpoints were made for: their files hold tensors and say nothing of it.

``RELEASED`` is the authors' released generalist, whole; ``describe`` makes the description (``config.json``) of a
checkpoint from the sizes that its tensors have. Everything here is plain JSON: the words are those of ``diffusion`` and
``tasks``, which read them.
"""

import dataclasses
from typing import Any

from scaling_perception.models.dit import DiTConfig
from scaling_perception.models.presets import LATENT_FACTOR, get_preset

TASK_LABELS = {"depth": (1000,), "amodal": (1001,), "flow": (1002, 1003)}
"""Rows of the label table by task; flow takes two passes, its horizontal part first (facts 2)."""

# DiT's training: facts 4.1, 4.2, 8. `leading` without offset is the grid that its code names "ddimN": every
# (1000 // N)-th timestep from 0. Its ancestral sampler takes N rounded points of 0..999 instead, here `linspace`.
_DIT_DIFFUSION = {
    "schedule": "linear",
    "prediction": "epsilon",
    "spacing": "leading",
    "steps_offset": 0,
    "final_alpha_one": True,
    "zero_snr": False,
}

# The scheduler file of Stable Diffusion 2: the released pipeline loads it whatever its config says (facts 10, row 1).
_RELEASED_DIFFUSION = {
    "schedule": "scaled_linear",
    "prediction": "v",
    "spacing": "leading",
    "steps_offset": 1,
    "final_alpha_one": False,
    "zero_snr": False,
}

# Facts 2, 5, 7.1 and 10 (rows 8, 11, 26). The numbers of flow, depth and mask are also the defaults of new models.
_RELEASED_OPTIONS = {
    "flow_divisor": 75.0,
    "depth_quantiles": [0.02, 0.98],
    "mask_threshold": 250.0,
    "keep_visible": False,
    "image_resize": "nearest_depth",
    "depth_prompt": "valid",
    "clip_depth": False,
}

DIT_AUTOENCODER = "stabilityai/sd-vae-ft-ema"
RELEASED_AUTOENCODER = "stabilityai/stable-diffusion-2"  # of that repository, the folder vae


def describe(config: DiTConfig, source: dict[str, Any] | None = None) -> dict[str, Any]:
    """The description that a model folder keeps (``config.json``) of a published checkpoint of these sizes.

    A model with task labels is taken for the released generalist: its tasks, diffusion, options and autoencoder.
    Anything else is a DiT that was trained on classes: no task (it needs fine-tuning first), DiT's own diffusion and
    autoencoder. Latents are as the autoencoder gives them (times 0.18215): shift 0, scale 1.

    Args:
        source: kept as ``source``: where the tensors came from.
    """
    generalist = config.task_labels > 0
    rows = max(config.task_labels, 1)
    return {
        "format": 1,
        "model": dataclasses.asdict(config),
        "resolution": config.input_size * LATENT_FACTOR,
        "autoencoder": RELEASED_AUTOENCODER if generalist else DIT_AUTOENCODER,
        "diffusion": dict(_RELEASED_DIFFUSION if generalist else _DIT_DIFFUSION),
        "tasks": list(TASK_LABELS) if generalist else [],
        "task_options": dict(_RELEASED_OPTIONS) if generalist else {},
        "latent_norm": {
            "shift": [[0.0] * config.in_channels for _ in range(rows)],
            "scale": [[1.0] * config.in_channels for _ in range(rows)],
        },
        "source": dict(source or {}),
    }


RELEASED = describe(get_preset("XL-8E2A"))
"""The authors' released generalist: 512 pixels, 8 experts of which 2 are active, tasks, sampler and autoencoder."""
