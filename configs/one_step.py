"""One step, end to end: fine-tune a trained model by its tasks' own losses on the picture of a single step (E2E-FT).

    scaling-perception prepare scenes --out runs/scenes128 --latents --vae tiny --resolution 128 --count 8000
    scaling-perception train --config configs/one_step.py:cache=runs/scenes128,init=mini-scenes --workdir runs/one
    scaling-perception predict --task depth --model runs/one --steps 1 --ensemble 1 --out out picture.png

Not of the paper: Garcia et al. 2025. Losses are taken in pixels, through the frozen autoencoder: depth up to scale and
shift, with gradients; flow |u - u*|; amodal soft IoU and cross-entropy of the mask; normals the angle
(tasks/pixel_losses.py). Without ``cache`` the truth is exact; a cache has latents alone, which are decoded.

Arguments: ``task`` depth, flow, amodal, normals, or several joined by +; ``init`` model folder, training run or shipped
name; ``model`` its preset; ``cache`` folder of prepared latents, or ``source`` (dataset name, else ``folder``) and
``root`` (its folder) to read as it goes; ``count`` samples (0 = all); ``flip`` also the mirror images; ``noise``:
``zeros`` gives one answer a picture, ``gaussian`` keeps members of an ensemble apart; ``res`` pixels; ``steps``;
``batch``; ``lr``; ``vae`` autoencoder; ``diffusion`` preset of ``init``.
"""

from ml_collections import ConfigDict

from scaling_perception.models.presets import get_preset
from scaling_perception.tasks import model_passes, pass_names

from . import common

ARGS = {
    "task": "depth+flow+amodal",
    "init": "mini-scenes",
    "model": "mini",
    "cache": "",
    "source": "",
    "root": "",
    "count": 0,
    "flip": True,
    "noise": "zeros",
    "res": 128,
    "steps": 500,
    "batch": 32,
    "lr": 1e-4,
    "vae": "",
    "diffusion": "fixed",
}


def get_config(arg: str = "") -> ConfigDict:
    args = common.parse_arg(arg, ARGS)
    config = common.defaults()
    common.apply(config, args)
    config.objective, config.noise = "one_step", args.noise
    config.diffusion_changes.spacing = "trailing"  # whatever grid the model was trained for: its one step is the last
    tasks = args.task.split("+")
    for task in tasks:
        config.data.mixture[task] = common.entry(args, task, "folder", count=args.count)
        config.data.mixture[task].weight = float(len(pass_names([task])))  # every pass weighs the same
    preset, passes = get_preset(args.model), model_passes(tasks)
    if not preset.cond_channels:  # the paper's sizes, fine-tuned as configs/depth.py and its siblings do
        config.model_changes.cond_channels = 4 if tasks == ["depth"] else 8
        if len(pass_names(tasks)) > 1:
            config.model_changes.update({"task_labels": len(passes), "routed": len(tasks) > 1})
    elif len(passes) > preset.task_labels > 0:
        config.model_changes.task_labels = len(passes)
    common.keep_start(config, args.init)
    config.data.flip = args.flip
    common.shipped_masks(config)
    config.latent_norm = "auto"  # the starting model's own
    config.train.update({"steps": args.steps, "batch_size": args.batch, "log_every": 10, "checkpoint_every": 100})
    config.optim.update({"lr": args.lr, "lr_final": args.lr / 100, "warmup": 20, "schedule": "cosine", "ema": 0.99})
    config.optim.grad_clip = 1.0
    return config
