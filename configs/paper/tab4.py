"""Table 4: the optical flow specialist. XL/2 fine-tuned on FlyingChairs at 512 pixels from DiT's published weights.

    scaling-perception convert DiT-XL-2-512x512.pt models/DiT-XL-2-512x512
    scaling-perception train --config configs/paper/tab4.py:data=DATA --workdir runs/paper/tab4/flow
    scaling-perception evaluate --task flow --dataset flying_chairs --data DATA/flying_chairs \\
        --model runs/paper/tab4/flow --steps 200 --ensemble 5 --json out/tab4.json

One run: 40 k steps of batch 1024, 1.2e-4 to 1.2e-6 exponentially (paper section 6.2). Published end-point error: 3.45
with one member, 3.08 with an ensemble. Chosen, for the paper is silent: the two components are two passes with a label
each, as in the authors' generalist; a batch holds either; the input is widened to 12 channels.

Arguments: ``model`` preset; ``res`` pixels; the others are told in configs/paper/shared.py.
"""

from ml_collections import ConfigDict

from scaling_perception.scaling.study import Cell
from scaling_perception.scaling.study_figures import Comparison

from . import shared

ARGS = {**shared.ARGS, "model": "XL/2", "res": 512}


def get_config(arg: str = "") -> ConfigDict:
    args = shared.read(arg, ARGS)
    return shared.finetune(args, "flow", shared.dit_folder(args, args.res), "final")


def runs(arg: str = "") -> list[tuple[str, str]]:
    return [("flow", arg)]


def study(arg: str = "") -> list[Cell]:
    known = {"task": "flow", "dataset": "flying_chairs", "steps": (200,), "members": (1, 5)}
    return [
        *shared.trains("tab4", runs(arg)),
        shared.evaluates(shared.read(arg, ARGS), "eval/flying_chairs", "{flow}", **known, published="flying_chairs"),
    ]


def figures(arg: str = "") -> list[Comparison]:
    return [Comparison("tab4")]
