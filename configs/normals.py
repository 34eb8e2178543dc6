"""Surface normals (no counterpart in the paper): a specialist with the depth model's recipe, on the procedural scenes.

    scaling-perception train --config configs/normals.py:model=a1,res=256 --workdir runs/normals
    scaling-perception train --config configs/normals.py:model=nano,res=64 --workdir runs/normals-toy

Arguments: ``model`` preset; ``res`` pixels; ``source`` and ``root``, another data set and its folder; ``count`` samples
(0: 8000, or all of the cache); ``cache`` folder of prepared latents, used in place of the data set; ``vae``
autoencoder; ``init`` model folder to start from; ``diffusion`` preset; ``recipe``: ``final``, ``ablation`` or ``auto``,
see ``configs/depth.py``.
"""

from ml_collections import ConfigDict

from . import common

ARGS = {**common.PAPER_ARGS, "source": "", "count": 0}


def get_config(arg: str = "") -> ConfigDict:
    args = common.parse_arg(arg, ARGS)
    config = common.defaults()
    common.apply(config, args)
    # [image, noisy]; one task, so the class label is the null one, also of sizes that have labels of tasks
    config.model_changes = ConfigDict({"cond_channels": 4, "task_labels": 0, "routed": False})
    count = args.count or (0 if args.source else 8000)
    config.data.mixture = ConfigDict({"normals": common.entry(args, "normals", "scenes", count=count)})
    config.train.steps = 30_000
    common.apply_recipe(config, args)
    return config
