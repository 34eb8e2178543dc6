"""A scaling study small enough for two CPU cores: depth on procedural scenes of 64 pixels, 16 tokens a picture.

    scaling-perception study configs/scenes_study.py --out runs/scenes_study --dry-run
    scaling-perception study configs/scenes_study.py --out runs/scenes_study

One run of it, by itself:

    scaling-perception train --config configs/scenes_study.py:size=s3,steps=1000,cache=CACHE --workdir runs/s3

Dense models of five sizes (``SIZES``), width 32 to 128, heads of 16 channels. Batch 32, AdamW, 50 steps of warm-up and
a cosine to a hundredth of the rate, running average with a horizon of a fifteenth of the run (0.98 at 750 steps),
latents normalised by channel, timesteps drawn uniformly.

Arguments: ``size`` s1 to s5; ``steps``; ``seed`` of weights, order and noise; ``lr`` peak rate; ``diffusion`` preset
(fixed: v-prediction and the trailing grid; paper: noise prediction and the leading grid; rectified: the straight path);
``schedule`` of the noise, in place of the preset's; ``experts`` (0: dense), ``active`` of them and their ``gating``;
``init`` model to start from; ``res`` pixels; ``cache`` latents to train on; ``held`` latents whose loss is logged ten
times.

The study, in the order in which it runs; docs/scaling_study.md has what came of it:

- ``ladder``: five sizes at two lengths; the longer with three seeds for s2 and s3.
- ``noise``: s3 trained to predict noise, for the leading grid, three seeds; ``steps`` evaluates it and s3 of the ladder
  (v-prediction, trailing) on both grids at 1 to 200 steps and 1 to 10 members, ``wide`` at 1 to 50 members.
- ``members``: the shipped model, three tasks, 1 to 50 members.
- ``schedule``: s3 with two other noise schedules, and as a rectified flow, in training and inference, three seeds.
- ``pretrain``: s3 trained on the classes of procedural textures for 0, 250, 1000 and 4000 steps, then for depth.
- ``pixels``: s3 at 32 pixels for the compute of its shorter run at 64.
- ``upcycle``: s2, s3 and s4 go on as four experts of which two are active, with both gates, and as dense twins for the
  same compute.
"""

from ml_collections import ConfigDict

from scaling_perception.models.compute import forward_macs
from scaling_perception.scaling.study import Cell
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.training.diffusion import network_of

from . import common

SIZES = {"s1": (32, 2), "s2": (48, 3), "s3": (64, 4), "s4": (96, 5), "s5": (128, 6)}  # width, layers
ARGS = {
    "size": "s3",
    "steps": 1000,
    "seed": 0,
    "lr": 2e-3,
    "diffusion": "fixed",
    "schedule": "",
    "experts": 0,
    "active": 2,
    "gating": "renormalised",
    "init": "",
    "res": 64,
    "cache": "",
    "held": "",
}


def get_config(arg: str = "") -> ConfigDict:
    args = common.parse_arg(arg, ARGS)
    if args.size not in SIZES:
        raise UserError(f"config argument 'size' is '{args.size}'{did_you_mean(args.size, SIZES)}")
    width, layers = SIZES[args.size]
    config = common.defaults()
    common.apply(config, ConfigDict({**args, "model": "nano", "vae": "tiny"}))
    config.seed = args.seed
    config.model_changes = ConfigDict({"dim": width, "depth": layers, "heads": width // 16})
    if args.experts:
        config.model_changes.update({"experts": args.experts, "active_experts": args.active, "gating": args.gating})
    if args.schedule:
        config.diffusion_changes = ConfigDict({"schedule": args.schedule})
    config.data.mixture = ConfigDict({"depth": common.source("scenes", "depth", count=3072)})
    config.data.flip = True
    config.latent_norm = "auto"
    every = max(args.steps // 10, 1)
    config.train.update({"steps": args.steps, "batch_size": 32, "log_every": every, "checkpoint_every": 1000})
    if args.held:
        config.held_out.cache = args.held
        config.train.update({"validate_every": every, "validate_samples": 256})
    config.optim.update({"lr": args.lr, "lr_final": args.lr / 100, "warmup": 50, "schedule": "cosine"})
    config.optim.update({"ema": round(1 - 15 / max(args.steps, 150), 4), "grad_clip": 1.0})
    return config


LENGTHS = (500, 2000)  # steps of the ladder
SEEDS = (0, 1, 2)  # of s2 and s3 at the longer length; elsewhere one
EXPERTS, MORE = 4, 500  # of upcycled models, and for how many steps they go on
PRETRAINED = (0, 250, 1000, 4000)  # steps
STEPS, MEMBERS = (1, 2, 5, 10, 20, 50, 100, 200), (1, 2, 5, 10, 20, 50)


def study(arg: str = "") -> list[Cell]:
    """The cells of the study; ``arg`` as above, for all of its runs."""
    scenes = ("scenes", "--tasks", "depth", "--latents", "--vae", "tiny", "--resolution", "64")
    cells = [
        Cell("data/held", "prepare", (*scenes, "--split", "val", "--count", "256", "--flips", "none")),
        Cell("data/train", "prepare", (*scenes, "--count", "3072", "--flips", "both")),
    ]
    short, longest = LENGTHS

    def ladder(size: str, steps: int, seed: int) -> list[Cell]:
        return _measured(_train(arg, f"ladder/{size}-{steps}-seed{seed}", "ladder", size=size, steps=steps, seed=seed))

    def noise(seed: int, members: tuple[int, ...], count: int) -> list[Cell]:
        """Noise prediction beside v, on both grids; one trailing step of the former is amplified noise, and refused."""
        name, v = f"noise/s3-{longest}-seed{seed}", f"ladder/s3-{longest}-seed{seed}"
        grids = [
            ("v", v, "fixed,paper", STEPS),
            ("noise", name, "paper", STEPS),
            ("noise-trailing", name, "fixed", STEPS[1:]),
        ]
        return [
            _train(arg, name, "noise", size="s3", steps=longest, seed=seed, diffusion="paper"),
            *(
                _evaluate(f"steps/{kind}-seed{seed}", run, grid, steps, members, count)
                for kind, run, grid, steps in grids
            ),
        ]

    # what says most comes first, for who stops before the end
    for size, steps in [*((size, longest) for size in tuple(SIZES)[:-1]), *((size, short) for size in SIZES)]:
        cells += ladder(size, steps, 0)
    cells += noise(0, MEMBERS[:4], 16)
    cells += ladder(tuple(SIZES)[-1], longest, 0)
    for task in ("depth", "flow", "amodal"):
        words = ("--task", task, "--dataset", "scenes", "--count", "16", "--model", "mini-scenes", "--preset", "fixed")
        words += ("--steps", "5", "--ensemble", _listed(MEMBERS))
        cells.append(Cell(f"members/{task}", "evaluate", words, labels={"arm": "members"}))
    for seed in SEEDS[1:]:
        cells += ladder("s3", longest, seed) + noise(seed, MEMBERS[:3], 32)
    for seed in SEEDS[1:]:
        cells += ladder("s2", longest, seed)
    for seed in SEEDS:
        for schedule in ("linear", "scaled_linear"):
            name = f"schedule/{schedule}-seed{seed}"
            cells += _measured(_train(arg, name, "schedule", size="s3", steps=longest, seed=seed, schedule=schedule))
        straight = {"size": "s3", "steps": longest, "seed": seed, "diffusion": "rectified"}
        cells += _measured(_train(arg, f"schedule/rectified-seed{seed}", "schedule", **straight))
    for size in ("s2", "s3", "s4"):
        start = f"{{ladder/{size}-{longest}-seed0}}"
        for gating in ("renormalised", "paper"):
            known = {"size": size, "experts": EXPERTS, "gating": gating, "init": start, "steps": MORE, "lr": 5e-4}
            cells += _measured(_train(arg, f"upcycle/{size}-{gating}", "upcycle", **known))
        known = {"size": size, "init": start, "steps": _as_much(size), "lr": 5e-4}
        cells += _measured(_train(arg, f"upcycle/{size}-dense", "upcycle", **known))
    cells += _pretrained(arg, short) + _coarser(arg, scenes, short)
    wide = [("v", f"ladder/s3-{longest}-seed0"), ("noise", f"noise/s3-{longest}-seed0")]
    cells += [_evaluate(f"wide/{kind}", run, "fixed,paper", (10, 50), MEMBERS, 16) for kind, run in wide]
    return cells


def _pretrained(arg: str, steps: int) -> list[Cell]:
    """Four lengths of class-conditional pre-training of s3, each fine-tuned for depth; the first of them is none."""
    words = ("textures", "--latents", "--vae", "tiny", "--resolution", "64", "--count", "3072")
    cells = [Cell("data/textures", "prepare", (*words, "--flips", "both"))]
    width, layers = SIZES["s3"]
    sizes = (
        f"--config.model_changes.{name}={value}" for name, value in (("dim", width), ("depth", layers), ("heads", 4))
    )
    more = (*sizes, "--config.optim.ema=0.99", "--config.optim.lr=1e-3", "--config.optim.lr_final=1e-3")
    for length in PRETRAINED:
        init = {}
        if length:
            spec = "configs/pretrain.py:model=nano,res=64,source=textures,vae=tiny,batch=32,cache={data/textures}"
            name = f"pretrain/s3-{length}"
            cells.append(Cell(name, "train", ("--config", f"{spec},steps={length}", *more), labels={"arm": "pretrain"}))
            init = {"init": f"{{{name}}}"}
        cells += _measured(_train(arg, f"finetune/s3-{length}", "finetune", size="s3", steps=steps, lr=1e-3, **init))
    return cells


def _coarser(arg: str, scenes: tuple[str, ...], steps: int) -> list[Cell]:
    """s3 at 32 pixels, 4 tokens, for as much compute as ``steps`` at 64; measured at 64 as the others are."""
    words = tuple("32" if word == "64" else word for word in scenes)
    both = [forward_macs(network_of(get_config(f"size=s3,res={res}"))) for res in (64, 32)]
    known = {"cache": "{data/train32}", "held": "{data/held32}", "steps": round(steps * both[0] / both[1])}
    return [
        Cell("data/held32", "prepare", (*words, "--split", "val", "--count", "256", "--flips", "none")),
        Cell("data/train32", "prepare", (*words, "--count", "3072", "--flips", "both")),
        *_measured(_train(arg, "pixels/s3-32", "pixels", size="s3", res=32, **known)),
    ]


def _train(arg: str, name: str, arm: str, **fields: object) -> Cell:
    known = {"cache": "{data/train}", "held": "{data/held}", **fields}
    text = ",".join(filter(None, [arg, *(f"{field}={value}" for field, value in known.items())]))
    labels = {"arm": arm, **{field: fields[field] for field in ("size", "gating") if field in fields}}
    return Cell(name, "train", ("--config", f"configs/scenes_study.py:{text}"), labels=labels)


def _measured(run: Cell) -> list[Cell]:
    return [run, _evaluate(f"eval/{run.name}", run.name, "fixed", (1, 10), (1, 5), 96)]


def _evaluate(name: str, run: str, presets: str, steps: tuple[int, ...], members: tuple[int, ...], count: int) -> Cell:
    words = ("--task", "depth", "--dataset", "scenes", "--option", "resolution=64", "--count", str(count))
    words += ("--model", f"{{{run}}}", "--preset", presets, "--steps", _listed(steps), "--ensemble", _listed(members))
    return Cell(
        name, "evaluate", words, labels={"arm": name.partition("/")[0]} if name.startswith(("steps", "wide")) else {}
    )


def _listed(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))


def _as_much(size: str) -> int:
    """Steps of the dense model that take the compute of ``MORE`` steps with experts."""
    both = [forward_macs(network_of(get_config(f"size={size},experts={experts}"))) for experts in (0, EXPERTS)]
    return round(MORE * both[1] / both[0])
