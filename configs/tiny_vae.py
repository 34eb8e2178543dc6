"""The small autoencoder ``tiny``, distilled from TAESD on procedural pictures: first the encoder, then the decoder.

    scaling-perception train --config configs/tiny_vae.py:phase=encoder,teacher=DIR --workdir runs/vae_encoder
    scaling-perception train --config configs/tiny_vae.py:phase=decoder,teacher=DIR,init=runs/vae_encoder/model \\
        --workdir runs/vae_decoder

No counterpart in the paper, which uses Stable Diffusion's own autoencoder; see weights/tiny_vae/README.md.

Arguments: ``phase`` encoder or decoder; ``teacher`` folder with TAESD's files, or a hub id; ``init`` exported folder of
the encoder run (decoder phase); ``cache`` folder of the bank of pictures and teacher latents (made when missing);
``bank`` number of pictures; ``res`` pixels; ``steps`` and ``batch`` (0 steps = about what the shipped weights had).
"""

from ml_collections import ConfigDict

from scaling_perception.models.tiny_vae import SMALL
from scaling_perception.support.errors import UserError

from . import common

ARGS = {
    "phase": "encoder",
    "teacher": "madebyollin/taesd",
    "init": "",
    "cache": "runs/vae_bank",
    "bank": 3000,
    "res": 128,
    "steps": 0,
    "batch": 8,
}
STEPS = {"encoder": 2200, "decoder": 3800}


def get_config(arg: str = "") -> ConfigDict:
    args = common.parse_arg(arg, ARGS)
    if args.phase not in STEPS:
        raise UserError(f"config argument 'phase' is '{args.phase}': give encoder or decoder")
    config = common.defaults()
    config.objective = "autoencoder"
    config.phase = args.phase
    config.teacher = args.teacher
    config.vae = ConfigDict(SMALL.to_dict())
    config.bank = args.bank
    config.resolution = args.res
    config.init = args.init
    config.data.cache = args.cache
    config.train.update({"steps": args.steps or STEPS[args.phase], "batch_size": args.batch, "log_every": 100})
    config.optim.update({"lr": 2e-3, "lr_final": 1e-5, "warmup": 100, "schedule": "cosine", "ema": 0.995})
    config.optim.grad_clip = 1.0
    return config
