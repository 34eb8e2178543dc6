"""Fig. 3: the ladder fine-tuned for depth on Hypersim; loss, AbsRel and 1 - delta1 against MACs. Also for Fig. 8, 9.

    scaling-perception train --config configs/paper/fig3.py:model=a1,data=DATA --workdir runs/paper/fig3/a1
    scaling-perception train --config configs/paper/fig3.py:model=a4,caches=CACHES --workdir runs/paper/fig3/a4

Six runs of 30 k steps from the models of Fig. 2, 3e-5 to 3e-7 exponentially (paper section 4.1). Chosen, for the paper
is silent: batch 32, 100 steps of warm-up (Marigold's), 256 pixels (which the axes of Fig. 8 agree with), the paper's
cosine schedule and noise prediction, average 0.9999. Test-time compute (Fig. 8a to d; 8 and 9 in arXiv) is measured on
the runs of a2, a4 and a6:

    scaling-perception evaluate --task depth --dataset hypersim --data DATA/hypersim --model runs/paper/fig3/a4 \\
        --steps 1,2,5,10,20,50,100,200 --ensemble 1 --json out/fig8ab-a4.json

Arguments: ``model`` a1 to a6; ``res`` pixels; the others are told in configs/paper/shared.py.
"""

from pathlib import Path

from ml_collections import ConfigDict

from scaling_perception.scaling.study import Cell
from scaling_perception.scaling.study_figures import Figure, Panel

from . import shared

ARGS = {**shared.ARGS, "model": "a1", "res": 256}


def get_config(arg: str = "") -> ConfigDict:
    args = shared.read(arg, ARGS)
    return shared.finetune(args, "depth", str(Path(args.runs) / "fig2" / args.model), "ablation")


def runs(arg: str = "") -> list[tuple[str, str]]:
    return [(model, shared.with_fields(arg, model=model)) for model in shared.LADDER]


STEPS, MEMBERS, MEASURED = (1, 2, 5, 10, 20, 50, 100, 200), (1, 2, 5, 10, 15, 20, 50), ("a2", "a4", "a6")


def study(arg: str = "") -> list[Cell]:
    args = shared.read(arg, ARGS)
    return [
        *shared.trains("fig3", runs(arg)),
        *(shared.evaluates(args, f"eval/{model}", f"{{{model}}}") for model in shared.LADDER),
        *(shared.evaluates(args, f"steps/{model}", f"{{{model}}}", steps=STEPS) for model in MEASURED),
        *(shared.evaluates(args, f"members/{model}", f"{{{model}}}", members=MEMBERS) for model in MEASURED),
    ]


def figures(arg: str = "") -> list[Figure]:
    train = tuple(Panel("own_train_macs", name, "eval/*") for name in ("abs_rel", "1-delta1"))
    sweeps = [("fig8ab", "steps/*", "fig8a", "fig8b"), ("fig8cd", "members/*", "fig8c", "fig8d")]
    return [
        Figure("fig3", (Panel("own_train_macs", "loss", "a?", kind="train"), *train)),
        *(
            Figure(name, (Panel("macs", "1-delta1", cells, law=first), Panel("macs", "abs_rel", cells, law=second)))
            for name, cells, first, second in sweeps
        ),
    ]
