"""Monocular depth (paper section 3.1, Figs. 3-4 and Table 3): a specialist fine-tuned on Hypersim.

    scaling-perception train --config configs/depth.py:root=DATA/hypersim --workdir runs/depth
    scaling-perception train --config configs/depth.py:model=a1,res=256,root=DATA/hypersim --workdir runs/depth-a1
    scaling-perception train --config configs/depth.py:model=nano,res=64,source=scenes --workdir runs/depth-toy

Arguments: ``model`` preset; ``res`` pixels; ``root`` folder of the dataset; ``source`` the dataset's name; ``cache``
folder of prepared latents, used in place of the dataset; ``vae`` autoencoder; ``init`` model folder to start from;
``diffusion`` preset; ``recipe``: ``final`` (batch 1024, 1.2e-4 to 1.2e-6, 30 k steps), ``ablation`` (batch 32, 3e-5 to
3e-7, Figs. 3, 4 and 6), or ``auto``: the ablation for the ladder a1 to a6, else the final one.
"""

from ml_collections import ConfigDict

from . import common

ARGS = {**common.PAPER_ARGS, "source": ""}


def get_config(arg: str = "") -> ConfigDict:
    args = common.parse_arg(arg, ARGS)
    config = common.defaults()
    common.apply(config, args)
    config.model_changes = ConfigDict({"cond_channels": 4})  # [image, noisy]; the class label is the null one
    config.data.mixture = ConfigDict({"depth": common.entry(args, "depth", "hypersim")})
    config.train.steps = 30_000
    common.apply_recipe(config, args)
    return config
