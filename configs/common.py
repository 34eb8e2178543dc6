"""What all configs share: every field with its default, and the parser of the argument after the colon."""

from typing import Any

from ml_collections import ConfigDict

from scaling_perception.support.configs import Config, convert
from scaling_perception.support.errors import UserError, did_you_mean

# Arguments of the configs of the paper's fine-tuning; each adds where its data comes from.
PAPER_ARGS = {
    "model": "XL/2",
    "res": 512,
    "root": "",
    "cache": "",
    "vae": "tiny",
    "init": "",
    "diffusion": "fixed",
    "recipe": "auto",
}


def parse_arg(arg: str, defaults: dict[str, Any]) -> Config:
    """``model=a1,res=256`` to values of the types of ``defaults``; a bare name turns a switch on.

    Raises:
        UserError: an unknown argument, or a value of another type.
    """
    values: Config = ConfigDict(defaults)
    for part in filter(None, arg.split(",")):
        key, equals, text = part.partition("=")
        if key not in defaults:
            raise UserError(f"config argument '{key}' is unknown{did_you_mean(key, defaults)}")
        if not equals and not isinstance(defaults[key], bool):
            raise UserError(f"config argument '{key}' has no value: write {key}=VALUE")
        values[key] = convert(f"config argument '{key}'", defaults[key], text if equals else "true")
    return values


def defaults() -> Config:
    """Every field of a training config.

    Optimiser values are those of facts 8 (paper, and Marigold where the paper is silent): AdamW (0.9, 0.999),
    eps 1e-8, no weight decay, no clipping, 100 steps of warm-up, exponential decay by 100, running average 0.9999.
    """
    config: Config = ConfigDict()
    config.seed = 2024
    config.objective = "diffusion"  # or "autoencoder"

    config.model = "XL/2"  # a preset of models/presets.py
    config.model_changes = ConfigDict()  # fields of DiTConfig to change
    config.resolution = 512  # pixels
    config.autoencoder = "tiny"  # shipped name, folder or hub id
    config.init = ""  # model folder, training run or shipped name to start from; "" = from scratch
    config.init_surgery = "auto"  # fit it to this model and tell each step (models/surgery.py), or "none"
    config.init_gain = "exact"  # of an input that is widened on the way; or "released", the authors' 0.5 and 0.33
    config.upcycle = ConfigDict({"noise": 0.0, "drop": 0.0})  # how experts differ from the MLP they are copied from

    config.task_prompts = ConfigDict()  # task -> text, such as amodal="the whole object"; a fixed embedding of it
    config.text_encoder = ""  # CLIP text encoder of the prompts: folder or hub id

    config.diffusion = "fixed"  # cosine, v-prediction, trailing steps
    config.diffusion_changes = ConfigDict()
    config.timestep_sampling = "uniform"  # or "high_noise": half of the draws from the noisiest tenth
    config.noise = "gaussian"  # or "multires": annealed multi-resolution noise (Marigold)
    config.balance_loss = 0.01  # alpha, for models with experts
    config.label_dropout = 0.1  # of class labels, in pre-training
    config.samples = ConfigDict({"count": 8, "steps": 50, "guidance": 4.0})  # pictures of a finished pre-training
    config.latent_norm = "none"  # or "auto": per task and channel, measured once
    config.task_options = ConfigDict({"flow_divisor": 75.0, "depth_quantiles": (0.02, 0.98)})
    config.task_options.update({"mask_threshold": 250.0, "keep_visible": False})
    config.task_options.update({"image_resize": "bilinear", "depth_prompt": "ones", "clip_depth": True})

    # How many devices share what: data and fsdp split the batch, fsdp the weights too, expert the experts (and the
    # batch), tensor the wide matrices. -1 takes the devices that are left.
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "expert": 1, "tensor": 1})
    config.data = ConfigDict({"cache": "", "mixture": {}, "flip": True, "workers": 0})
    config.held_out = ConfigDict({"cache": "", "mixture": {}})  # as in data; what train.validate_every measures
    config.train = ConfigDict(
        {
            "steps": 30_000,
            "batch_size": 1024,
            "log_every": 50,
            "checkpoint_every": 1000,
            "keep": 2,  # newest checkpoints
            "keep_every": 0,  # and every one whose step is a multiple of this, for ever; 0 = none
            "keep_best": 0,  # and this many whose metric is smallest
            "best_metric": "",  # which: any that is logged; "" = held_out_loss where there is one, else loss
            "export_from": "last",  # the finished model is the average of the last step, or of the "best" kept one
            "validate_every": 0,  # steps between measuring the loss of held_out; 0 = never
            "validate_samples": 256,  # of held_out
            "dtype": "float32",  # of activations: float32 or bfloat16
            "accumulate": 1,  # parts that a batch is computed in; the update is that of the whole batch
            "on_nan": "raise",  # a loss or gradient that is not finite: raise, or skip (that step changes no weight)
            "on_spike": "none",  # a loss or gradient norm far above the last steps' median: none, skip or raise
            "spike_factor": 10.0,  # how far
            "spike_window": 128,  # steps of the median; the policy holds once half of them are known
            "check_replicas": 0,  # steps between comparing the copies of the state on all devices; 0 = never
            "wandb": "",  # project of Weights & Biases to tell, too
            "remat": False,  # recompute activations in the backward pass: slower, much less memory
            "export_dtype": "float32",  # of the exported weights: float32, bfloat16 or float16
        }
    )
    config.optim = ConfigDict(
        {
            "name": "adamw",  # adamw, adam or muon
            "lr": 1.2e-4,
            "lr_final": 1.2e-6,
            "warmup": 100,
            "schedule": "exponential",  # exponential, cosine or constant
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "grad_clip": 0.0,  # largest gradient norm; 0 = no clipping
            "ema": 0.9999,
            "ema_every": 1,  # steps; the decay is that of as many steps
            "ema_dtype": "float32",  # or bfloat16, rounded at random
            "ema_place": "device",  # or "host": no device memory; with ema_every of 10 or so
        }
    )
    return config


def shipped_masks(config: Config) -> None:
    """How the shipped model's painted objects become masks.

    225 was best on 40 training scenes, for what was white comes back a little grey; the visible part is known anyway.
    """
    config.task_options.update({"mask_threshold": 225.0, "keep_visible": True})


def source(name: str, task: str, root: str = "", count: int = 0, start: int = 0) -> ConfigDict:
    """One entry of ``data.mixture``: ``count`` samples (0 = all) from ``start`` on; ``weight`` is relative."""
    where = {"source": name, "root": root, "split": "train", "count": count, "start": start}
    return ConfigDict({**where, "task": task, "weight": 1.0})


def apply(config: Config, args: Config) -> None:
    """Set the fields that every config takes from its arguments."""
    config.model = args.model
    config.resolution = args.res
    config.autoencoder = args.vae
    config.init = args.init
    config.diffusion = args.diffusion
    config.data.cache = args.cache


def apply_recipe(config: Config, args: Config) -> None:
    """``ablation``: the values of the paper's Figs. 3, 4 and 6 (batch 32 is Marigold's: the paper gives none).

    Raises:
        UserError: no such recipe.
    """
    recipes = ("auto", "final", "ablation")
    if args.recipe not in recipes:
        raise UserError(f"config argument 'recipe' is '{args.recipe}'{did_you_mean(args.recipe, recipes)}")
    small = args.model in {"a1", "a2", "a3", "a4", "a5", "a6", "nano", "mini"}
    if args.recipe == "ablation" or (args.recipe == "auto" and small):
        config.train.update({"steps": 30_000, "batch_size": 32})
        config.optim.update({"lr": 3e-5, "lr_final": 3e-7})
