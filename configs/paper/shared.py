"""What the configs of the paper's figures and tables share: where data, earlier runs and published weights lie.

``data`` holds a folder a dataset (imagenet, hypersim, flying_chairs, pix2gestalt); ``caches``, if given, prepared
latents in its place, a folder a dataset and resolution (imagenet256, hypersim512); ``runs`` the runs of the other
figures (runs/paper/fig2/a1); ``models`` imported weights (models/DiT-XL-2-512x512). ``init`` starts a run from
somewhere else; ``vae`` is the autoencoder; ``source`` names procedural pictures for a trial: textures where classes are
trained, else scenes. The steps of a trial are --config.train.steps, its batch --config.train.batch_size.

Each file has ``runs(arg)``, the list of its runs as (name, argument), for whoever wants them all:

    from scaling_perception.support.configs import config_runs
    for name, spec in config_runs("configs/paper/fig3.py:data=DATA"):
        print(f"scaling-perception train --config {spec} --workdir runs/paper/fig3/{name}")
"""

import os
from pathlib import Path
from typing import Any

from scaling_perception.support.configs import Config

from .. import common, from_dit, pretrain

ARGS = {
    "data": "data",
    "caches": "",
    "runs": "runs/paper",
    "models": "models",
    "source": "",
    "vae": "stabilityai/sd-vae-ft-ema",
    "init": "",
}
LADDER = ("a1", "a2", "a3", "a4", "a5", "a6")


def with_fields(arg: str, **fields: Any) -> str:
    """``arg`` with some of its fields set, as an argument again."""
    parts = {part.partition("=")[0]: part for part in arg.split(",") if part}
    parts |= {name: f"{name}={value}" for name, value in fields.items()}
    return ",".join(parts.values())


def plain(name: str) -> str:
    """A preset's name as one of a folder: XL/2 becomes XL-2."""
    return name.replace("/", "-")


def dit_folder(args: Config, pixels: int) -> str:
    """Where DiT's own XL/2 of these pixels lies, imported by ``convert``."""
    return str(Path(args.models) / f"DiT-XL-2-{pixels}x{pixels}")


def place(config: Config, args: Config) -> Config:
    """``config`` with every dataset of its mixture in its place."""
    sets = [entry.source for entry in config.data.mixture.values()]
    for entry in config.data.mixture.values():
        entry.root = "" if args.source or args.caches else str(Path(args.data) / entry.source)
    if args.caches:
        config.data.cache = os.pathsep.join(os.path.join(args.caches, f"{name}{config.resolution}") for name in sets)
    return config


def finetune(args: Config, task: str, init: str, recipe: str) -> Config:
    """A fine-tuning of ``args.model`` at ``args.res`` on ``task``, from ``init`` unless ``args.init`` says otherwise.

    Recipe ``ablation``: 30 k steps of batch 32, 3e-5 to 3e-7; ``final``: batch 1024 (amodal 4096), 1.2e-4 to 1.2e-6.
    """
    known = {"task": task, "init": args.init or init, "recipe": recipe, "diffusion": "paper"}
    known |= {name: args[name] for name in ("model", "res", "vae", "source")}
    config = from_dit.get_config(",".join(f"{name}={value}" for name, value in known.items()))
    return place(config, args)


def pretraining(args: Config) -> Config:
    """A pre-training of ``args.model`` at ``args.res``, as in configs/pretrain.py."""
    known = {name: args[name] for name in ("model", "res", "vae", "init")}
    known |= {"source": args.source} if args.source else {}
    return place(pretrain.get_config(",".join(f"{name}={value}" for name, value in known.items())), args)


def read(arg: str, args: dict[str, Any]) -> Config:
    """The values of ``arg``, among the arguments ``args``."""
    return common.parse_arg(arg, args)
