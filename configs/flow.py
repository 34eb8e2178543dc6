"""Optical flow (paper section 3.2, Table 4): a specialist fine-tuned on FlyingChairs, 40 k steps of batch 1024.

    scaling-perception train --config configs/flow.py:root=DATA/FlyingChairs_release --workdir runs/flow
    scaling-perception train --config configs/flow.py:model=a3,res=256,cache=DATA/chairs256 --workdir runs/flow-a3

The two components are two diffusion passes (facts 2), told apart by two of the task labels; the prompt is the second
frame.

Arguments: ``model`` preset; ``res`` pixels; ``root`` folder of the dataset; ``source`` the dataset's name; ``cache``
folder of prepared latents, used in place of the dataset; ``vae`` autoencoder; ``init`` model folder to start from;
``diffusion`` preset; ``recipe``: ``final`` (1.2e-4 to 1.2e-6), ``ablation`` (batch 32, 3e-5 to 3e-7), or ``auto``.
"""

from ml_collections import ConfigDict

from . import common

ARGS = {**common.PAPER_ARGS, "source": ""}


def get_config(arg: str = "") -> ConfigDict:
    args = common.parse_arg(arg, ARGS)
    config = common.defaults()
    common.apply(config, args)
    config.model_changes = ConfigDict({"cond_channels": 8, "task_labels": 4})
    config.data.mixture = ConfigDict({"flow": common.entry(args, "flow", "flying_chairs")})
    config.train.steps = 40_000
    common.apply_recipe(config, args)
    return config
