"""A generalist that works on photographs: every task of the furnished worlds at 128 pixels, for one accelerator.

    scaling-perception prepare worlds --tasks depth,flow,amodal,normals --count 20000 --out runs/worlds --latents \\
        --skip-bad --vae tiny+lite0+match --resolution 128
    scaling-perception train --config configs/worlds.py --workdir runs/worlds-mini

`BUDGET=500 benchmarks/on_gpu.sh OUT model` does both within a time, on all cores and one GPU.

No counterpart in the paper. Depth, flow, amodal and normals; otherwise as configs/mini.py, with larger batches and as
many steps as there is time for.

Arguments: ``dim`` and ``depth`` of the network: 128 and 6 are `mini` (1.9 M parameters), 256 and 8 `small` (9.8 M);
``res`` pixels; ``cache`` folder of prepared latents (several joined by colons), or empty to render and encode as it
goes; ``count`` worlds (0: all of the cache); ``steps``; ``batch``; ``lr``; ``init`` model folder or shipped name to
start from; ``vae`` autoencoder, with or without the features of an ImageNet network (``tiny+lite0``, ``tiny``), and
those with the second frame matched with the first or not (``tiny+lite0+match``); ``diffusion`` preset.
"""

from ml_collections import ConfigDict

from . import common

ARGS = {
    "dim": 128,
    "depth": 6,
    "res": 128,
    "cache": "runs/worlds",
    "count": 0,
    "steps": 20_000,
    "batch": 256,
    "lr": 2e-3,
    "vae": "tiny+lite0+match",
    "init": "",
    "diffusion": "fixed",
}


def get_config(arg: str = "") -> ConfigDict:
    args = common.parse_arg(arg, ARGS)
    args.model = "mini"  # its tasks and latents
    config = common.defaults()
    common.apply(config, args)
    config.model_changes.update(
        {"task_labels": 5, "dim": args.dim, "depth": args.depth, "heads": max(args.dim // 32, 1)}
    )
    if "+lite0" in args.vae:
        config.model_changes.update({"features": 32, "cond_channels": 72})  # image and prompt, 4 + 32 each
    for task in ("depth", "flow", "amodal", "normals"):
        config.data.mixture[task] = common.entry(
            args, task, "worlds", count=args.count or (0 if args.cache else 20_000)
        )
    config.data.mixture.flow.weight = 2.0  # two passes, each with the weight of depth's one
    config.data.flip = True
    config.data.workers = 4  # one thread settles and gathers some 20,000 samples a second: too few for a small model
    config.latent_norm = "auto"
    config.timestep_sampling = "high_noise"  # what one to ten trailing steps visit most
    config.train.update({"steps": args.steps, "batch_size": args.batch, "log_every": 50, "export_dtype": "float16"})
    common.shipped_masks(config)
    config.optim.update({"name": "muon", "lr": args.lr, "lr_final": args.lr / 200, "warmup": 100, "schedule": "cosine"})
    config.optim.ema = 0.998
    config.optim.grad_clip = 1.0
    return config
