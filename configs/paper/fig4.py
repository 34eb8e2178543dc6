"""Fig. 4: a4 pre-trained for 60, 80, 100 and 120 k steps, each fine-tuned for depth; AbsRel and 1 - delta1.

    scaling-perception train --config configs/paper/fig4.py:stage=pretrain,pretrained=60000,data=DATA \\
        --workdir runs/paper/fig4/pretrain-60k
    scaling-perception train --config configs/paper/fig4.py:stage=finetune,pretrained=60000,data=DATA \\
        --workdir runs/paper/fig4/finetune-60k

Eight runs (paper section 4.2): four pre-trainings with all else as in Fig. 2, and from each 30 k steps on Hypersim as
in Fig. 3, whose choices hold here. The x-axis is the compute of pre-training.

Arguments: ``stage`` pretrain or finetune; ``pretrained`` steps of pre-training; ``model`` preset; ``res`` pixels; the
others are told in configs/paper/shared.py.
"""

from pathlib import Path

from ml_collections import ConfigDict

from scaling_perception.scaling.study import Cell
from scaling_perception.scaling.study_figures import Figure, Panel
from scaling_perception.support.errors import UserError, did_you_mean

from . import shared

ARGS = {**shared.ARGS, "stage": "pretrain", "pretrained": 60_000, "model": "a4", "res": 256}
STAGES = ("pretrain", "finetune")
STEPS = (60_000, 80_000, 100_000, 120_000)


def get_config(arg: str = "") -> ConfigDict:
    args = shared.read(arg, ARGS)
    if args.stage not in STAGES:
        raise UserError(f"config argument 'stage' is '{args.stage}'{did_you_mean(args.stage, STAGES)}")
    if args.stage == "finetune":
        return shared.finetune(
            args, "depth", str(Path(args.runs) / "fig4" / _name("pretrain", args.pretrained)), "ablation"
        )
    config = shared.pretraining(args)
    config.train.steps = args.pretrained // 20_000 if args.trial else args.pretrained
    return config


def runs(arg: str = "") -> list[tuple[str, str]]:
    grid = [(stage, steps) for stage in STAGES for steps in STEPS]
    return [(_name(*pair), shared.with_fields(arg, stage=pair[0], pretrained=pair[1])) for pair in grid]


def _name(stage: str, steps: int) -> str:
    return f"{stage}-{steps // 1000}k"


def study(arg: str = "") -> list[Cell]:
    args, found = shared.read(arg, ARGS), dict(runs(arg))
    cells = []
    for steps in STEPS:
        before, after = _name("pretrain", steps), _name("finetune", steps)
        started = shared.with_fields(found[after], init=f"{{{before}}}")
        cells += shared.trains("fig4", [(before, found[before]), (after, started)], pretrained=steps)
        cells.append(shared.evaluates(args, f"eval/{steps // 1000}k", f"{{{after}}}"))
    return cells


def figures(arg: str = "") -> list[Figure]:
    return [Figure("fig4", tuple(Panel("train_macs", name) for name in ("abs_rel", "1-delta1")))]
