"""The shipped generalist: all three tasks on the procedural scenes at 128 pixels, small enough for two CPU cores.

    scaling-perception prepare scenes --out runs/scenes128 --latents --vae tiny --resolution 128 --count 8000 \\
        --flips none
    scaling-perception train --config configs/mini.py --workdir runs/mini

No counterpart in the paper; v-prediction and the trailing grid because they are near their best at one step, latents
normalised by task and channel because they are far from unit variance.

Arguments: ``model`` preset; ``res`` pixels; ``cache`` folder of prepared latents, or empty to render and encode as it
goes (several times slower); ``count`` scenes (0: 8000, or all of the cache); ``steps``; ``batch``; ``init`` model
folder or shipped name to start from; ``vae`` autoencoder; ``diffusion`` preset.
"""

from ml_collections import ConfigDict

from . import common

ARGS = {
    "model": "mini",
    "res": 128,
    "cache": "runs/scenes128",
    "count": 0,
    "steps": 8000,
    "batch": 32,
    "vae": "tiny",
    "init": "",
    "diffusion": "fixed",
}


def get_config(arg: str = "") -> ConfigDict:
    args = common.parse_arg(arg, ARGS)
    config = common.defaults()
    common.apply(config, args)
    for task in ("depth", "flow", "amodal"):
        config.data.mixture[task] = common.entry(args, task, "scenes", count=args.count or 8000)
    config.data.mixture.flow.weight = 2.0  # two passes, each with the weight of depth's one
    config.data.flip = False  # fresh scenes cost about as much as mirrored ones
    config.latent_norm = "auto"
    config.timestep_sampling = "high_noise"  # what one to ten trailing steps visit most
    config.train.update({"steps": args.steps, "batch_size": args.batch, "log_every": 100, "export_dtype": "float16"})
    common.shipped_masks(config)
    # mean loss of steps 81 to 120 on the same batches: AdamW at 1e-3 0.778, Muon at 2e-3 0.720
    config.optim.update({"name": "muon", "lr": 2e-3, "lr_final": 1e-5, "warmup": 50, "schedule": "cosine"})
    config.optim.ema = 0.998
    config.optim.grad_clip = 1.0
    return config
