"""Fig. 8e, f (10 in arXiv): the noise schedule. a4 fine-tuned for depth with three of them, looked at every 5 k steps.

    scaling-perception train --config configs/paper/fig8ef.py:schedule=linear,data=DATA --workdir runs/paper/fig8ef/linear
    scaling-perception train --config configs/paper/fig8ef.py:schedule=cosine,data=DATA --workdir runs/paper/fig8ef/cosine

Three runs of 30 k steps from a4 of Fig. 2, as in Fig. 3 but for the schedule, which is that of training and of
inference; the model of every 5,000th step is exported, for the x-axis is the compute of training. Published:
cosine is best. Chosen, for the paper does not give the numbers: linear from 1e-4 to 0.02 (DiT's), scaled_linear from
0.00085 to 0.012 (Stable Diffusion's).

Arguments: ``schedule`` linear, scaled_linear or cosine; ``model`` preset; ``res`` pixels; the others are told in
configs/paper/shared.py.
"""  # noqa: E501

from pathlib import Path

from ml_collections import ConfigDict

from scaling_perception.scaling.study import Cell
from scaling_perception.scaling.study_figures import Figure, Panel

from . import shared

ARGS = {**shared.ARGS, "schedule": "cosine", "model": "a4", "res": 256}
SCHEDULES = ("linear", "scaled_linear", "cosine")


def get_config(arg: str = "") -> ConfigDict:
    args = shared.read(arg, ARGS)
    config = shared.finetune(args, "depth", str(Path(args.runs) / "fig2" / args.model), "ablation")
    config.diffusion_changes = ConfigDict({"schedule": args.schedule})
    config.train.update({"keep_every": 1 if args.trial else 5_000, "export_kept": True})
    if args.trial:
        config.train.checkpoint_every = 1
    return config


def runs(arg: str = "") -> list[tuple[str, str]]:
    return [(schedule, shared.with_fields(arg, schedule=schedule)) for schedule in SCHEDULES]


def study(arg: str = "") -> list[Cell]:
    args = shared.read(arg, ARGS)
    every, last = (1, shared.TRIAL_STEPS) if args.trial else (5_000, 30_000)
    cells = shared.trains("fig8ef", runs(arg))
    for schedule in SCHEDULES:
        for step in range(every, last + 1, every):
            model = f"{{{schedule}}}/models/{step}"
            cells.append(shared.evaluates(args, f"eval/{schedule}-{step}", model))
    return cells


def figures(arg: str = "") -> list[Figure]:
    return [Figure("fig8ef", tuple(Panel("own_train_macs", name, group="run") for name in ("abs_rel", "1-delta1")))]
