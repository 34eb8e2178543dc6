"""Fig. 6: a2, a3 and a4, fine-tuned for depth, upcycled to experts and trained on; AbsRel and 1 - delta1.

    scaling-perception train --config configs/paper/fig6.py:model=a2,experts=8,active=2,data=DATA \\
        --workdir runs/paper/fig6/a2-8E2A
    scaling-perception train --config configs/paper/fig6.py:model=a4,experts=16,active=2,gating=paper,data=DATA \\
        --workdir runs/paper/fig6/a4-16E2A-paper

15 k more steps on Hypersim from the runs of Fig. 3, for "a varying number of total/active model experts" (paper section
4.4; average gain 5.3 % AbsRel, 8.6 % delta1). Chosen, for the paper is silent: the grid 4E2A, 8E1A, 8E2A, 8E4A, 16E2A,
rates that start again at 3e-5, batch 32, and weights of the chosen experts that are renormalised, so that training goes
on where the dense model was. ``gating=paper`` leaves them as they are, which is what the authors' code does.

Arguments: ``model`` a2, a3 or a4; ``experts``; ``active`` experts for each token; ``gating`` renormalised or paper;
``res`` pixels; the others are told in configs/paper/shared.py.
"""

from pathlib import Path

from ml_collections import ConfigDict

from scaling_perception.scaling.study import Cell
from scaling_perception.scaling.study_figures import Figure, Gain, Panel

from . import shared

ARGS = {**shared.ARGS, "model": "a2", "res": 256, "experts": 8, "active": 2, "gating": "renormalised"}
GRID = ((4, 2), (8, 1), (8, 2), (8, 4), (16, 2))


def get_config(arg: str = "") -> ConfigDict:
    args = shared.read(arg, ARGS)
    config = shared.finetune(args, "depth", str(Path(args.runs) / "fig3" / args.model), "ablation")
    config.model_changes.update({"experts": args.experts, "active_experts": args.active, "gating": args.gating})
    config.train.steps = shared.TRIAL_STEPS // 2 if args.trial else 15_000
    return config


def runs(arg: str = "") -> list[tuple[str, str]]:
    grid = [(model, experts, active) for model in ("a2", "a3", "a4") for experts, active in GRID]
    return [
        (f"{model}-{experts}E{active}A", shared.with_fields(arg, model=model, experts=experts, active=active))
        for model, experts, active in grid
    ]


def study(arg: str = "") -> list[Cell]:
    args = shared.read(arg, ARGS)
    cells = []
    for model in ("a2", "a3", "a4"):  # the models of Fig. 3 that the others go on from
        start = ",".join(part for part in arg.split(",") if part.partition("=")[0] in {*shared.ARGS, "res"})
        spec = f"configs/paper/fig3.py:{shared.with_fields(start, model=model)}"
        known = {"model": model, "resolution": args.res, "experts": "dense", "made_by": spec}
        folder = str(Path(args.runs) / "fig3" / model)
        dense = shared.evaluates(args, f"eval/{model}-dense", folder)
        cells.append(dense._replace(labels=known))
    for name, own in runs(arg):
        cells += shared.trains("fig6", [(name, own)], experts=name.partition("-")[2])
        cells.append(shared.evaluates(args, f"eval/{name}", f"{{{name}}}"))
    return cells


def figures(arg: str = "") -> list[Figure]:
    metrics = ("abs_rel", "1-delta1")
    gains = tuple(Gain(name, "experts", "dense", "fig6") for name in metrics)
    return [Figure("fig6", tuple(Panel("macs_per_forward", name) for name in metrics), gains)]
