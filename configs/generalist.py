"""The generalist (paper section 4.3): one model for depth, flow and amodal segmentation on mixed data, 512 pixels.

    scaling-perception train --config configs/generalist.py:root=DATA --workdir runs/generalist
    scaling-perception train --config configs/generalist.py:model=a3,res=256,cache=DATA/mixed256 --workdir runs/gen-a3

One patch embedding for each pass (PatchEmbedRouter) and four task labels. The paper gives the learning rate (1.2e-4 to
1.2e-6) but neither steps, batch nor mixing ratios of this stage (facts 8): here the depth model's 30 k steps of batch
1024, and the three tasks in equal shares.

Arguments: ``model`` preset; ``res`` pixels; ``root`` folder that holds ``hypersim``, ``flying_chairs`` and
``pix2gestalt``; ``cache`` folder of prepared latents, used in place of the datasets; ``vae`` autoencoder; ``init``
model folder to start from; ``diffusion`` preset; ``recipe``: ``final``, ``ablation`` (batch 32, 3e-5 to 3e-7) or
``auto``: the ablation for small models.
"""

from pathlib import Path

from ml_collections import ConfigDict

from . import common

ARGS = common.PAPER_ARGS


def get_config(arg: str = "") -> ConfigDict:
    args = common.parse_arg(arg, ARGS)
    config = common.defaults()
    common.apply(config, args)
    config.model_changes = ConfigDict({"cond_channels": 8, "task_labels": 4, "routed": True})
    sets = {"depth": "hypersim", "flow": "flying_chairs", "amodal": "pix2gestalt"}
    config.data.mixture = ConfigDict(
        {task: common.entry(args, task, name, str(Path(args.root) / name)) for task, name in sets.items()}
    )
    config.train.steps = 30_000
    common.apply_recipe(config, args)
    return config
