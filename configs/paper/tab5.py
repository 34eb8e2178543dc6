"""Table 5: the amodal specialist. XL/2 fine-tuned on pix2gestalt at 256 pixels from DiT's published weights.

    scaling-perception convert DiT-XL-2-256x256.pt models/DiT-XL-2-256x256
    scaling-perception train --config configs/paper/tab5.py:data=DATA --workdir runs/paper/tab5/amodal
    scaling-perception evaluate --task amodal --dataset coco_amodal --data DATA/coco_amodal \\
        --model runs/paper/tab5/amodal --steps 200 --ensemble 5 --json out/tab5-coco.json

One run: 6 k steps of batch 4096, 1.2e-4 to 1.2e-6 exponentially (paper section 6.3). Published mIoU: COCO-A 82.9, P2G
88.6, MP3D 63.9. Chosen, for the paper is silent: no embedding of the task by text (the CVPR text has one, the code does
not use it; ``--config.task_prompts.amodal`` adds it), 12 input channels, the last 1 % of the pairs held out.

Arguments: ``model`` preset; ``res`` pixels; the others are told in configs/paper/shared.py.
"""

from ml_collections import ConfigDict

from scaling_perception.scaling.study import Cell
from scaling_perception.scaling.study_figures import Comparison

from . import shared

ARGS = {**shared.ARGS, "model": "XL/2", "res": 256}


def get_config(arg: str = "") -> ConfigDict:
    args = shared.read(arg, ARGS)
    return shared.finetune(args, "amodal", shared.dit_folder(args, args.res), "final")


def runs(arg: str = "") -> list[tuple[str, str]]:
    return [("amodal", arg)]


SETS = {"coco_amodal": ("val", "cocoa"), "pix2gestalt": ("val", "pix2gestalt"), "mp3d_amodal": ("test", "mp3d")}


def study(arg: str = "") -> list[Cell]:
    args = shared.read(arg, ARGS)
    known = {"task": "amodal", "steps": (200,), "members": (5,)}
    return [
        *shared.trains("tab5", runs(arg)),
        *(
            shared.evaluates(args, f"eval/{name}", "{amodal}", dataset=name, split=split, **known, published=published)
            for name, (split, published) in SETS.items()
        ),
    ]


def figures(arg: str = "") -> list[Comparison]:
    return [Comparison("tab5")]
