"""Amodal segmentation (paper section 3.3, Table 5): a specialist on pix2gestalt, 6 k steps of batch 4096 at 256 pixels.

    scaling-perception train --config configs/amodal.py:root=DATA/pix2gestalt --workdir runs/amodal
    scaling-perception train --config configs/amodal.py:model=a2,cache=DATA/gestalt256 --workdir runs/amodal-a2

The prompt is the visible part's mask; the target is the whole object in RGB on white (facts 5.3).

Arguments: ``model`` preset; ``res`` pixels; ``root`` folder of the dataset; ``source`` the dataset's name; ``cache``
folder of prepared latents, used in place of the dataset; ``vae`` autoencoder; ``init`` model folder to start from;
``diffusion`` preset; ``recipe``: ``final`` (1.2e-4 to 1.2e-6), ``ablation`` (batch 32, 3e-5 to 3e-7), or ``auto``.
"""

from ml_collections import ConfigDict

from . import common

ARGS = {**common.PAPER_ARGS, "res": 256, "source": ""}


def get_config(arg: str = "") -> ConfigDict:
    args = common.parse_arg(arg, ARGS)
    config = common.defaults()
    common.apply(config, args)
    config.model_changes = ConfigDict({"cond_channels": 8})
    config.data.mixture = ConfigDict({"amodal": common.entry(args, "amodal", "pix2gestalt")})
    config.train.steps = 6_000
    config.train.batch_size = 4096
    common.apply_recipe(config, args)
    return config
