"""Fine-tune the shipped generalist, or another model folder, on one task of a person's own data.

    scaling-perception prepare folder --raw mydata --tasks depth --out runs/mydata --latents --vae tiny+lite0+match --resolution 128
    scaling-perception train --config configs/finetune.py:task=depth,cache=runs/mydata --workdir runs/mydepth
    scaling-perception train --config configs/finetune.py:task=flow,source=flying_chairs,root=DATA/chairs --workdir runs/myflow

No counterpart in the paper, whose fine-tuning starts from class-conditional models (configs/depth.py and its siblings).

Arguments: ``task`` depth, flow or amodal; ``cache`` folder of prepared latents, or ``source`` (dataset name,
else ``folder``) and ``root`` (its folder) to read and encode as it goes; ``flip`` also the mirror images (a cache must hold them: the default of
``prepare``); ``init`` model folder, training run or shipped name; ``model`` its preset; ``res`` pixels; ``steps``;
``batch``; ``vae`` autoencoder (that of ``init``); ``diffusion`` preset.
"""  # noqa: E501

from ml_collections import ConfigDict

from . import common

ARGS = {
    "task": "depth",
    "cache": "",
    "source": "",
    "root": "",
    "flip": True,
    "init": "mini",
    "model": "mini",
    "res": 128,
    "steps": 500,
    "batch": 16,
    "vae": "",
    "diffusion": "fixed",
}


def get_config(arg: str = "") -> ConfigDict:
    args = common.parse_arg(arg, ARGS)
    config = common.defaults()
    common.apply(config, args)
    config.data.mixture = ConfigDict({args.task: common.entry(args, args.task, "folder")})
    config.data.flip = args.flip
    common.keep_start(config, args.init)
    common.shipped_masks(config)
    config.latent_norm = "auto"  # the starting model's own
    config.train.update({"steps": args.steps, "batch_size": args.batch, "log_every": 10, "checkpoint_every": 100})
    config.optim.update({"lr": 2e-4, "lr_final": 1e-6, "warmup": 20, "schedule": "cosine", "ema": 0.99})
    config.optim.grad_clip = 1.0
    return config
