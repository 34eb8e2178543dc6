"""Table 3: the depth specialist. XL/2 fine-tuned on Hypersim at 512 pixels from DiT's published weights.

    scaling-perception convert DiT-XL-2-512x512.pt models/DiT-XL-2-512x512
    scaling-perception train --config configs/paper/tab3.py:data=DATA --workdir runs/paper/tab3/depth
    scaling-perception evaluate --task depth --dataset nyuv2 --data DATA/nyuv2 --model runs/paper/tab3/depth \\
        --steps 200 --ensemble 5 --reduce marigold --json out/tab3-nyuv2.json

One run: 30 k steps of batch 1024, 1.2e-4 to 1.2e-6 exponentially (paper section 6.1), then 200 steps x 5 members,
cosine schedule, median compilation. Published AbsRel/delta1: Hypersim 13.6/87.6, ETH3D 4.8/97.8, NYUv2 6.8/95.0,
ScanNet 7.7/93.7, DIODE 31.0/77.2. Chosen, for the paper is silent: AdamW, 100 steps of warm-up, average 0.9999, no
clipping.

Arguments: ``model`` preset; ``res`` pixels; the others are told in configs/paper/shared.py.
"""

from ml_collections import ConfigDict

from scaling_perception.scaling.study import Cell
from scaling_perception.scaling.study_figures import Comparison

from . import shared

ARGS = {**shared.ARGS, "model": "XL/2", "res": 512}


def get_config(arg: str = "") -> ConfigDict:
    args = shared.read(arg, ARGS)
    return shared.finetune(args, "depth", shared.dit_folder(args, args.res), "final")


def runs(arg: str = "") -> list[tuple[str, str]]:
    return [("depth", arg)]


SETS = {"hypersim": "val", "eth3d": "all", "nyuv2": "test", "scannet": "val", "diode": "val"}  # name: split


def study(arg: str = "") -> list[Cell]:
    args = shared.read(arg, ARGS)
    known = {"steps": (200,), "members": (5,), "more": ("--reduce", "marigold")}
    return [
        *shared.trains("tab3", runs(arg)),
        *(
            shared.evaluates(args, f"eval/{name}", "{depth}", dataset=name, split=split, **known, published=name)
            for name, split in SETS.items()
        ),
    ]


def figures(arg: str = "") -> list[Comparison]:
    return [Comparison("tab3")]
