"""Fig. 5: resolution. XL/2 and L/2-8E2A fine-tuned for depth at 256 and 512 pixels, four times the tokens; AbsRel.

    scaling-perception convert DiT-XL-2-512x512.pt models/DiT-XL-2-512x512
    scaling-perception train --config configs/paper/fig5.py:model=XL/2,res=512,data=DATA --workdir runs/paper/fig5/XL-2-512
    scaling-perception train --config configs/paper/fig5.py:model=L/2-8E2A,res=256,data=DATA \\
        --workdir runs/paper/fig5/L-2-8E2A-256

Four runs on Hypersim (paper section 4.3): XL/2 from DiT's published weights of either resolution, which ``convert``
imports, L/2-8E2A from the runs of Table 2. Chosen, for the paper gives neither steps nor rates here: those of Fig. 3,
30 k steps of batch 32, 3e-5 to 3e-7.

Arguments: ``model`` XL/2 or L/2-8E2A; ``res`` 256 or 512; the others are told in configs/paper/shared.py.
"""  # noqa: E501

from pathlib import Path

from ml_collections import ConfigDict

from scaling_perception.scaling.study import Cell
from scaling_perception.scaling.study_figures import Figure, Panel

from . import shared

ARGS = {**shared.ARGS, "model": "XL/2", "res": 256}
GRID = (("XL/2", 256), ("XL/2", 512), ("L/2-8E2A", 256), ("L/2-8E2A", 512))


def get_config(arg: str = "") -> ConfigDict:
    args = shared.read(arg, ARGS)
    if args.model == "XL/2":
        init = shared.dit_folder(args, args.res)
    else:
        init = str(Path(args.runs) / "tab2" / f"{shared.plain(args.model)}-{args.res}")
    return shared.finetune(args, "depth", init, "ablation")


def runs(arg: str = "") -> list[tuple[str, str]]:
    return [(f"{shared.plain(name)}-{res}", shared.with_fields(arg, model=name, res=res)) for name, res in GRID]


def study(arg: str = "") -> list[Cell]:
    args = shared.read(arg, ARGS)
    names = [name for name, _ in runs(arg)]
    return [
        *shared.trains("fig5", runs(arg)),
        *(shared.evaluates(args, f"eval/{name}", f"{{{name}}}") for name in names),
    ]


def figures(arg: str = "") -> list[Figure]:
    return [Figure("fig5", tuple(Panel("own_train_macs", name, group="run") for name in ("abs_rel", "1-delta1")))]
