"""Folders of diffusers' ``AutoencoderKL`` (Stable Diffusion's autoencoder), in and out, and their names and configs.

The table of names lies with the model (``models/vae_torch.py``), because ``load_autoencoder`` needs it too.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling_perception.interop.safetensors_io import save_tree
from scaling_perception.models.autoencoders import load_kl
from scaling_perception.models.vae import VAEConfig
from scaling_perception.models.vae_torch import (
    torch_names,
    vae_config_from_json,
    vae_config_to_json,
    vae_from_torch,
    vae_to_torch,
)
from scaling_perception.support.files import write_json

__all__ = [
    "load_vae_folder",
    "save_vae_folder",
    "torch_names",
    "vae_config_from_json",
    "vae_config_to_json",
    "vae_from_torch",
    "vae_to_torch",
]


def load_vae_folder(folder: str | os.PathLike[str]) -> tuple[VAEConfig, dict[str, Any]]:
    """(config, ``{"encoder": tree, "decoder": tree}`` of float32 numpy arrays) of a published folder.

    Raises:
        UserError: a file is missing, damaged or of another network; a tensor is missing, left over, or misshapen.
    """
    return load_kl(Path(folder))


def save_vae_folder(folder: str | os.PathLike[str], params: Mapping[str, Any], config: VAEConfig) -> Path:
    """Write ``config.json`` and ``diffusion_pytorch_model.safetensors``, float32, as diffusers reads them.

    Raises:
        UserError: a parameter does not fit the config, by its name; the folder cannot be written.
    """
    folder = Path(folder)
    state = vae_to_torch(params, config)
    save_tree(folder / "diffusion_pytorch_model.safetensors", state, {"format": "pt"})
    write_json(folder / "config.json", vae_config_to_json(config))
    return folder
