"""Fig. 2 and Table 1: the ladder a1 to a6 pre-trained on ImageNet-1K at 256 pixels; training loss against MACs.

    scaling-perception train --config configs/paper/fig2.py:model=a1,data=DATA --workdir runs/paper/fig2/a1
    scaling-perception train --config configs/paper/fig2.py:model=a6,caches=CACHES --workdir runs/paper/fig2/a6

Six runs of 400 k steps of batch 256 at a constant 1e-4 (paper section 3.1); the rest is DiT's (configs/pretrain.py).
Published: L(C) = 0.23 C^-0.0098. The y-axis is the training loss, which the paper defines as the error of the predicted
noise (its equation 2): ``mse`` of metrics.jsonl; ``loss`` has the variational bound besides. The x-axis is ``macs``,
forward alone: the paper does not say whether it counts the backward pass, which triples it.

Arguments: ``model`` a1 to a6; ``res`` pixels; the others are told in configs/paper/shared.py.
"""

from ml_collections import ConfigDict

from scaling_perception.scaling.study import Cell
from scaling_perception.scaling.study_figures import Figure, Panel

from . import shared

ARGS = {**shared.ARGS, "model": "a1", "res": 256}


def get_config(arg: str = "") -> ConfigDict:
    return shared.pretraining(shared.read(arg, ARGS))


def runs(arg: str = "") -> list[tuple[str, str]]:
    return [(model, shared.with_fields(arg, model=model)) for model in shared.LADDER]


def study(arg: str = "") -> list[Cell]:
    return shared.trains("fig2", runs(arg))


def figures(arg: str = "") -> list[Figure]:
    return [Figure("fig2", (Panel("own_train_macs", "mse", law="fig2", kind="train"),))]
