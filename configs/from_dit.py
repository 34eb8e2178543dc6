"""From a class-conditional DiT to a specialist or the generalist: the paper's fine-tuning as it starts (section 3).

    scaling-perception train --config configs/from_dit.py:init=runs/dit512,root=DATA/hypersim --workdir runs/depth
    scaling-perception train --config configs/from_dit.py:task=generalist,init=runs/dit512,root=DATA --workdir runs/gen
    scaling-perception train --config configs/from_dit.py:model=nano,res=64,source=scenes,vae=tiny --workdir runs/toy

The input kernel is repeated for the conditions, four task labels are added for flow and the generalist, the generalist
gets a patch embedding for each pass, and the position table is made for the resolution (models/surgery.py, facts 2).
The 1,001 label rows stay: specialists are told the null one. Steps, batch and rates are those of configs/depth.py,
flow.py, amodal.py and generalist.py. Diffusion is the paper's, whose network predicts noise as a DiT does.

Arguments: ``task`` depth, flow, amodal or generalist; ``init`` folder of the imported DiT (empty: from scratch);
``model`` its preset; ``res`` pixels (the paper's amodal model: 256); ``root`` folder of the dataset, of all three for
the generalist; ``source`` a dataset's name, in place of the task's own; ``cache`` folder of prepared latents, used in
place of the dataset; ``vae`` autoencoder, which should be the DiT's; ``gain`` of the repeated kernel: ``exact`` or
``released``; ``diffusion`` preset; ``recipe`` as in configs/depth.py.
"""

from ml_collections import ConfigDict

from scaling_perception.support.configs import Config
from scaling_perception.support.errors import UserError, did_you_mean

from . import amodal, common, depth, flow, generalist

ARGS = {
    "task": "depth",
    "init": "",
    "model": "XL/2",
    "res": 512,
    "root": "",
    "source": "",
    "cache": "",
    "vae": "stabilityai/sd-vae-ft-ema",
    "gain": "exact",
    "diffusion": "paper",
    "recipe": "auto",
}
TASKS = {"depth": depth, "flow": flow, "amodal": amodal, "generalist": generalist}


def of_task(args: Config) -> Config:
    """The config of ``args.task``, with the arguments that it knows and the mixture of ``args.source``.

    Raises:
        UserError: no such task.
    """
    if args.task not in TASKS:
        raise UserError(f"config argument 'task' is '{args.task}'{did_you_mean(args.task, TASKS)}")
    known = {name: value for name, value in args.items() if name in common.PAPER_ARGS}
    config = TASKS[args.task].get_config(",".join(f"{name}={value}" for name, value in known.items()))
    if args.source:
        for task in config.data.mixture:
            config.data.mixture[task] = common.entry(args, task, args.source)
    return config


def get_config(arg: str = "") -> ConfigDict:
    args = common.parse_arg(arg, ARGS)
    config = of_task(args)
    config.init_gain = args.gain
    return config
