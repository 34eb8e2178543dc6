"""Table 2: mixtures of experts pre-trained from scratch on ImageNet-1K; Fig. 5 fine-tunes two of them.

    scaling-perception train --config configs/paper/tab2.py:model=S/2-8E2A,data=DATA --workdir runs/paper/tab2/S-2-8E2A-256
    scaling-perception train --config configs/paper/tab2.py:model=L/2-8E2A,res=512,caches=CACHES \\
        --workdir runs/paper/tab2/L-2-8E2A-512

Four runs: S/2-8E2A, S/2-16E2A and L/2-8E2A at 256 pixels, L/2-8E2A at 512 (paper sections 3.2 and 4.3). "The same
training recipe as the dense DiT model": 400 k steps of batch 256, 1e-4; 2 of the experts for each token, one shared
expert, DiT-MoE's balance loss of 0.01 a layer. Chosen, for the paper is silent: the balance loss is over the whole
batch (DiT-MoE takes each device's own), 512 pixels are trained from scratch for as many steps.

Arguments: ``model`` preset; ``res`` pixels; the others are told in configs/paper/shared.py.
"""  # noqa: E501

from ml_collections import ConfigDict

from scaling_perception.scaling.study import Cell

from . import shared

ARGS = {**shared.ARGS, "model": "S/2-8E2A", "res": 256}
GRID = (("S/2-8E2A", 256), ("S/2-16E2A", 256), ("L/2-8E2A", 256), ("L/2-8E2A", 512))


def get_config(arg: str = "") -> ConfigDict:
    return shared.pretraining(shared.read(arg, ARGS))


def runs(arg: str = "") -> list[tuple[str, str]]:
    return [(f"{shared.plain(name)}-{res}", shared.with_fields(arg, model=name, res=res)) for name, res in GRID]


def study(arg: str = "") -> list[Cell]:
    return shared.trains("tab2", runs(arg))
