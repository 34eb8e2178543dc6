"""A short fine-tuning of the shipped generalist on scenes it has not seen; what `scaling-perception quickstart` runs.

    scaling-perception prepare scenes --out runs/new --latents --vae tiny --resolution 128 --count 192 --start 500000000
    scaling-perception train --config configs/quickstart.py:cache=runs/new --workdir runs/quickstart

Arguments: ``cache`` folder of prepared latents, or empty to render and encode as it goes; ``count`` scenes (0: 192,
or all of the cache); ``steps``; ``batch``; ``res`` pixels; ``vae`` autoencoder; ``init`` what to start from; ``model``
its preset; ``diffusion`` preset.
"""

from ml_collections import ConfigDict

from . import common

ARGS = {
    "cache": "",
    "count": 0,
    "steps": 120,
    "batch": 16,
    "res": 128,
    "vae": "tiny",
    "init": "mini-scenes",
    "model": "mini",
    "diffusion": "fixed",
}
NEW = 500_000_000  # the shipped weights were trained on lower scenes


def get_config(arg: str = "") -> ConfigDict:
    args = common.parse_arg(arg, ARGS)
    config = common.defaults()
    common.apply(config, args)
    for task in ("depth", "flow", "amodal"):
        config.data.mixture[task] = common.entry(args, task, "scenes", count=args.count or 192, start=NEW)
    common.shipped_masks(config)
    config.latent_norm = "auto"  # the starting model's own, when there is one
    config.train.update({"steps": args.steps, "batch_size": args.batch, "log_every": 10, "checkpoint_every": 100})
    config.train.export_dtype = "float16"
    config.optim.update({"lr": 1e-4, "lr_final": 1e-6, "warmup": 10, "schedule": "cosine", "ema": 0.98})
    config.optim.grad_clip = 1.0
    return config
