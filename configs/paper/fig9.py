"""Fig. 1 and 9 (11 in arXiv), and the supplement's: the generalist, dense and then with eight experts.

    scaling-perception convert DiT-XL-2-512x512.pt models/DiT-XL-2-512x512
    scaling-perception train --config configs/paper/fig9.py:stage=dense,data=DATA --workdir runs/paper/fig9/dense
    scaling-perception train --config configs/paper/fig9.py:stage=upcycled,data=DATA --workdir runs/paper/fig9/upcycled

Two runs (paper section 6.4): XL/2 from DiT's weights on the three tasks mixed, 512 pixels, 1.2e-4 to 1.2e-6; then 4 k
steps more as 8E2A. Chosen, for the paper is silent: 30 k steps of batch 1024 for the first, the three tasks in equal
shares, rates that start again for the second, and renormalised weights of the chosen experts (``gating=paper`` leaves
them as they are, as the released weights want it).

Arguments: ``stage`` dense or upcycled; ``gating`` of the experts; ``model`` preset; ``res`` pixels; the others are told
in configs/paper/shared.py.
"""

from pathlib import Path

from ml_collections import ConfigDict

from scaling_perception.scaling.study import Cell
from scaling_perception.scaling.study_figures import Pictures
from scaling_perception.support.errors import UserError, did_you_mean

from . import shared

ARGS = {**shared.ARGS, "stage": "dense", "gating": "renormalised", "model": "XL/2", "res": 512}
STAGES = ("dense", "upcycled")


def get_config(arg: str = "") -> ConfigDict:
    args = shared.read(arg, ARGS)
    if args.stage not in STAGES:
        raise UserError(f"config argument 'stage' is '{args.stage}'{did_you_mean(args.stage, STAGES)}")
    if args.stage == "dense":
        return shared.finetune(args, "generalist", shared.dit_folder(args, args.res), "final")
    config = shared.finetune(args, "generalist", str(Path(args.runs) / "fig9" / "dense"), "final")
    config.model_changes.update({"experts": 8, "active_experts": 2, "gating": args.gating})
    config.train.steps = shared.TRIAL_STEPS // 2 if args.trial else 4_000
    return config


def runs(arg: str = "") -> list[tuple[str, str]]:
    return [(stage, shared.with_fields(arg, stage=stage)) for stage in STAGES]


DATASETS = {"depth": "hypersim", "flow": "flying_chairs", "amodal": "pix2gestalt"}
SHOWN, TIMES = "8", "1000,800,600,400,200,0"


def study(arg: str = "") -> list[Cell]:
    args, (dense, upcycled) = shared.read(arg, ARGS), runs(arg)
    started = shared.with_fields(upcycled[1], init="{dense}")
    cells = shared.trains("fig9", [dense, (upcycled[0], started)])
    count = () if args.trial else ("--count", SHOWN)
    for task, dataset in DATASETS.items():
        panels = (*count, "--panels", SHOWN, *(("--intermediates", TIMES) if task == "depth" else ()))
        given = {"task": task, "dataset": dataset, "steps": (200,), "members": (5,), "more": panels}
        cells.append(shared.evaluates(args, f"eval/{task}", "{upcycled}", **given))
    return cells


def figures(arg: str = "") -> list[Pictures]:
    cells = tuple(f"eval/{task}" for task in DATASETS)
    kinds = ("image", "prompt", "truth", "prediction")
    times = tuple(f"t{time}" for time in TIMES.split(","))
    return [
        Pictures("fig9", cells, kinds, rows=2),
        Pictures("suppl_fig2", cells, kinds, rows=8),
        Pictures("suppl_fig1", cells[:1], ("image", *times, "truth"), rows=4),
    ]
