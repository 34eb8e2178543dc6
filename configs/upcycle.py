"""Upcycling (paper section 4.3 and Fig. 6): a fine-tuned dense model goes on as a mixture of experts.

    scaling-perception train --config configs/upcycle.py:init=runs/depth-a4,root=DATA/hypersim --workdir runs/a4-8E2A
    scaling-perception train --config configs/upcycle.py:task=generalist,model=XL/2,res=512,init=runs/generalist,root=DATA \\
        --workdir runs/generalist-8E2A
    scaling-perception train --config configs/upcycle.py:task=generalist,model=mini,init=mini,res=128,source=scenes \\
        --workdir runs/mini-8E2A

Every block's MLP is copied to each expert and a router is added (facts 3.2): 15 k more steps for a2, a3 and a4 on
Hypersim, 4 k for the generalist (facts 8). The rates start again, as the paper does not say: 3e-5 to 3e-7 for the
ladder, else 1.2e-4 to 1.2e-6. The weights of the chosen experts are renormalised, so that training goes on where the
dense model was; ``gating=paper`` leaves them as they are, which shrinks every MLP's output at first.

Equal experts part slowly; ``--config.upcycle.noise=0.01`` or ``--config.upcycle.drop=0.5`` (models/surgery.py) make
them differ from the start.

Arguments: ``init`` the dense run, its model folder or a shipped name; ``model`` its preset; ``task`` depth, flow,
amodal or generalist; ``res`` pixels; ``experts``; ``active`` experts for each token; ``gating``; ``steps`` (0: the
paper's); ``root`` folder of the dataset, of all three for the generalist; ``source`` a dataset's name, in place of the
task's own; ``cache`` folder of prepared latents, used in place of the dataset; ``vae`` autoencoder; ``diffusion``
preset, both those of the dense model.
"""  # noqa: E501

from ml_collections import ConfigDict

from . import common, from_dit

ARGS = {
    "init": "",
    "model": "a4",
    "task": "depth",
    "res": 256,
    "experts": 8,
    "active": 2,
    "gating": "renormalised",
    "steps": 0,
    "root": "",
    "source": "",
    "cache": "",
    "vae": "",
    "diffusion": "fixed",
}


def get_config(arg: str = "") -> ConfigDict:
    args = common.parse_arg(arg, ARGS)
    config = from_dit.of_task(args)
    config.model_changes.update({"experts": args.experts, "active_experts": args.active, "gating": args.gating})
    common.keep_start(config, args.init)
    if args.init.startswith("mini"):
        common.shipped_masks(config)
    config.train.steps = args.steps or (4_000 if args.task == "generalist" else 15_000)
    return config
