"""Pre-training on ImageNet-1K (paper section 3, Fig. 2, tables 1 and 2; facts 8): class-conditional, as DiT does it.

    scaling-perception prepare imagenet --raw DATA/imagenet --out DATA/imagenet256 --latents \\
        --vae stabilityai/sd-vae-ft-ema --resolution 256
    scaling-perception train --config configs/pretrain.py:model=a1,cache=DATA/imagenet256 --workdir runs/a1
    scaling-perception train --config configs/pretrain.py:model=L/2-8E2A,res=512,root=DATA/imagenet --workdir runs/moe512
    scaling-perception train --config configs/pretrain.py:model=nano,res=64,source=textures,vae=tiny,steps=200,batch=16 \\
        --workdir runs/toy

400 k steps of batch 256 at a constant 1e-4: AdamW without decay, warm-up or clipping, average 0.9999, linear schedule,
noise prediction and the variational bound of the learned variance, mirror images, one label in ten dropped, latents
drawn from the autoencoder's posterior, float32. The models with experts follow the same recipe with DiT-MoE's balance
loss. Latents are best prepared once: encoding a picture (136 GMAC) costs more than training a3 on it (115).

When a run is finished, ``model/samples.png`` shows eight classes drawn with guidance; `generate` draws more.

Arguments: ``model`` preset: a1 to a6, S/2 to XL/2, S/2-8E2A, S/2-16E2A, L/2-8E2A; ``res`` pixels; ``root`` folder of
ImageNet, as tensorflow-datasets has it or as class folders; ``source`` imagenet or textures (procedural pictures, for
trials); ``cache`` folder of prepared latents, used in place of the dataset; ``classes`` rows of the label table;
``steps``; ``batch``; ``vae`` autoencoder; ``init`` model folder to start from.
"""  # noqa: E501

from ml_collections import ConfigDict

from . import common

ARGS = {
    "model": "XL/2",
    "res": 256,
    "root": "",
    "source": "",
    "cache": "",
    "classes": 1000,
    "steps": 400_000,
    "batch": 256,
    "vae": "stabilityai/sd-vae-ft-ema",
    "init": "",
}
DIFFUSION = {"schedule": "linear", "prediction": "epsilon", "spacing": "leading"}


def get_config(arg: str = "") -> ConfigDict:
    args = common.parse_arg(arg, ARGS)
    config = common.defaults()
    common.apply(config, ConfigDict({**args, "diffusion": "paper"}))
    config.diffusion_changes = ConfigDict(DIFFUSION)
    # what every pre-trained network is, whatever the preset was made for
    config.model_changes = ConfigDict({"num_classes": args.classes, "cond_channels": 0, "learn_sigma": True})
    config.model_changes.update({"task_labels": 0, "routed": False})
    config.data.mixture = ConfigDict({"generation": common.entry(args, "generation", "imagenet")})
    config.train.update({"steps": args.steps, "batch_size": args.batch, "log_every": 100, "checkpoint_every": 5000})
    config.optim.update({"lr": 1e-4, "lr_final": 1e-4, "warmup": 0, "schedule": "constant", "ema": 0.9999})
    return config
