"""What the configs of the paper's figures and tables share: where data, earlier runs and published weights lie.

``data`` holds a folder a dataset (imagenet, hypersim, flying_chairs, pix2gestalt); ``caches``, if given, prepared
latents in its place, a folder a dataset and resolution (imagenet256, hypersim512); ``runs`` the runs of the other
figures (runs/paper/fig2/a1); ``models`` imported weights (models/DiT-XL-2-512x512). ``init`` starts a run from
somewhere else; ``vae`` is the autoencoder; ``source`` names procedural pictures for a trial: textures where classes are
trained, else scenes. ``trial`` is the whole on procedural pictures of 64 pixels: networks of the same layout and a few
layers, a few steps of batch 8, two pictures evaluated; it shows that a line runs, and its figures say nothing.

Each file has ``runs(arg)``, the list of its runs as (name, argument), and ``study(arg)``, those runs with the
evaluations of the figure: ``scaling-perception study --config configs/paper/fig3.py:data=DATA --out runs/paper/fig3``.
docs/reproduce.md has a line for each figure and table, and its cost.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaling_perception.models.presets import get_preset
from scaling_perception.scaling.study import Cell
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
    "trial": False,
}
TRIAL_STEPS, _TRIAL_PIXELS = 6, 64
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
    if args.trial:
        known |= {"res": _TRIAL_PIXELS, "vae": "tiny", "source": "scenes"}
        if not args.init and Path(init).parent == Path(args.models):
            known["init"] = ""  # published weights are of another size
    config = place(from_dit.get_config(",".join(f"{name}={value}" for name, value in known.items())), args)
    return shrink(config, args.model) if args.trial else config


def pretraining(args: Config) -> Config:
    """A pre-training of ``args.model`` at ``args.res``, as in configs/pretrain.py."""
    known = {name: args[name] for name in ("model", "res", "vae", "init")}
    known |= {"source": args.source} if args.source else {}
    if args.trial:
        known |= {"res": _TRIAL_PIXELS, "vae": "tiny", "source": "textures"}
    config = place(pretrain.get_config(",".join(f"{name}={value}" for name, value in known.items())), args)
    return shrink(config, args.model) if args.trial else config


def shrink(config: Config, model: str) -> Config:
    """``config`` at trial size: a sixteenth of the width and an eighth of the layers of ``model``, a few steps."""
    preset = get_preset(model)
    config.model_changes.update({"dim": preset.dim // 16, "depth": max(preset.depth // 8, 1), "heads": 2})
    config.latent_norm = "none"
    config.samples.count = 0  # pictures of classes take longer than the training
    for entry in config.data.mixture.values():
        entry.root, entry.count = "", 16
    config.train.update({"steps": TRIAL_STEPS, "batch_size": 8, "log_every": 1})
    return config


def trains(file: str, runs: Sequence[tuple[str, str]], **labels: Any) -> list[Cell]:
    """The cells of a study that train the ``runs`` of ``file``."""
    return [Cell(name, "train", ("--config", f"configs/paper/{file}.py:{arg}"), labels=labels) for name, arg in runs]


def evaluates(
    args: Config,
    name: str,
    model: str,
    task: str = "depth",
    dataset: str = "hypersim",
    steps: Sequence[int] = (50,),
    members: Sequence[int] = (1,),
    split: str = "val",
    more: Sequence[str] = (),
    **labels: Any,
) -> Cell:
    """The cell of a study that evaluates ``model``: ``{NAME}`` of another cell, or a folder.

    Of the paper's test-time curves 50 steps and one member are what fits its other figures (Fig. 8e, f); it gives
    neither for Fig. 3 to 6.

    Labels are columns of the table; ``made_by``, the spec of the run behind a folder, also lets the cost be counted
    before the folder is there.
    """
    words = ["--task", task]
    if args.trial:
        words += ["--dataset", "scenes", "--option", f"resolution={_TRIAL_PIXELS}", "--count", "2", "--controls", "0"]
        steps, members = sorted({min(one, 2) for one in steps}), sorted({min(one, 2) for one in members})
    elif args.source:
        words += ["--dataset", args.source]
    else:
        words += ["--dataset", dataset, "--data", str(Path(args.data) / dataset), "--split", split]
    words += ["--model", model, "--steps", ",".join(map(str, steps)), "--ensemble", ",".join(map(str, members)), *more]
    return Cell(name, "evaluate", tuple(words), labels=labels)


def read(arg: str, args: dict[str, Any]) -> Config:
    """The values of ``arg``, among the arguments ``args``."""
    return common.parse_arg(arg, args)
