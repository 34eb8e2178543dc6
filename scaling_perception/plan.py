"""The best choice under a budget, by fitted laws: size, training, steps, members; what is sure of it; the commands.

A law is the JSON of `fit`. Which quantity a column is follows from its name (params, tokens, samples, train_macs,
steps, ensemble, …) or from --column. Several laws are combined by ratios: the first predicts the error, the others by
what factor steps, members or another column change it, 1 at --at. The budget pays for everything: 3 x the forward MACs
of the training, and images x passes x steps x members x forward MACs. What a law cannot answer is refused.

With --model alone the choice is made among what was measured of a shipped model, as `predict --budget` does.
"""

import argparse
import contextlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_perception.support.again import add_overwrite, check_output, replacing, settings_of
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.files import write_json
from scaling_perception.support.verbs import COUNT, POSITIVE, make_parser

if TYPE_CHECKING:
    from scaling_perception.inference.budgets import Choice
    from scaling_perception.scaling.plan_laws import Laws
    from scaling_perception.scaling.plan_sizes import Size, Speed

EXAMPLES = """
scaling-perception plan --law law.json --budget 1e15
scaling-perception plan --law chinchilla.json --budget 1e21 --unit flops --json plan.json
scaling-perception plan --law depth.json --budget 2e17 --sizes a1,a2,a3,a4 --images 10000 --steps 10 --members 5
scaling-perception plan --law training.json steps.json --at steps=10 members=1 --budget 200 --unit usd --chip v5e --sizes a2,a3,a4 --images 1e5
scaling-perception plan --law steps.json --budget 1e13 --sizes a4 --model runs/depth --chip h100 --seconds 0.5
scaling-perception plan --model mini --task depth --budget 5e10
scaling-perception plan --points study.csv --where metric=held_out_loss last=1 --x params samples --form kaplan --hold-out 2e12
"""  # noqa: E501
OUTPUTS = ("json",)

_PRETRAINING = "pretrain"  # named like a task: a config of its own, and nothing to predict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--law", nargs="+", default=[], metavar="LAW.json", help="of `fit --json`; the first predicts the error")
    add("--budget", type=POSITIVE, help="for everything, in --unit")
    add("--unit", default="macs", help="macs, flops, chip-hours or usd (default %(default)s)")
    add("--images", type=POSITIVE, help="to serve in all (needed where a law holds training and steps or members)")
    add("--sizes", metavar="NAMES", help="presets, what --config takes for {size}, or parameters: a1,a2 or 1e8,1e9")
    add("--resolution", default="256", metavar="PIXELS", help="of pictures, comma-separated (default %(default)s)")
    add("--steps", metavar="NUMBERS", help="denoising steps to choose among (default: within the law's data)")
    add("--members", metavar="NUMBERS", help="ensemble sizes to choose among (default: within the law's data)")
    add("--tokens", type=POSITIVE, help="tokens of a sample, for sizes that are numbers (default: of tokens: 1)")
    add("--item-macs", metavar="FIRST,SECOND", help="forward MACs of an item of each of two trainings (D1 x D2)")
    add("--column", nargs="+", default=[], metavar="NAME=QUANTITY", help="what a column of a law is")
    add("--fix", nargs="+", default=[], metavar="NAME=VALUE", help="hold a column of a law that no plan sets")
    add("--at", nargs="+", default=[], metavar="NAME=VALUE", help="where the first law's points were measured")
    add("--macs", type=POSITIVE, help="of one prediction, at most")
    add("--seconds", type=POSITIVE, help="of one prediction, at most")
    add("--samples", type=POSITIVE, help="of the training, at most")
    add("--chip", help="v4, v5e, v5p, v6e, a100, h100 or h200: for time, money and memory")
    add("--chips", type=COUNT, default=1, help="that share the training's memory (default 1)")
    add("--memory", type=POSITIVE, metavar="GB", help="of a chip (default: the chip's own)")
    add("--price", metavar="CHIP=USD", default="", help="of a chip-hour (default: those of `study`)")
    add("--mfu", type=POSITIVE, default=0.4, help="share of the peak that is assumed, at most the roofline's (0.4)")
    add("--search", metavar="JSON", help="of `compile --search`: its best bound at worst in place of --mfu")
    add("--measured-mfu", type=POSITIVE, metavar="SHARE", help="share of the peak that was measured, in place of both")
    add("--seconds-per-image", metavar="SECONDS:MACS", help="measured seconds of a prediction of so many MACs")
    add("--task", default="depth", help="depth, flow, amodal or pretrain: of the commands (default %(default)s)")
    add("--dataset", help="of the evaluation (default: the task's)")
    add("--config", metavar="SPEC", help="of the training, with {size}, {resolution}, {steps} (default: the task's)")
    add("--model", default="", help="what to run where nothing is trained; without --law: its measured budgets")
    add("--preset", default="", help="timestep grid of the evaluation (default: the model's own)")
    add("--batch", type=COUNT, help="samples of a training step (default: the config's)")
    add("--next-share", type=POSITIVE, default=0.1, help="of the budget, for the next run (default %(default)s)")
    add("--json", metavar="OUT", help="write the plan")
    add(
        "--points", nargs="+", default=[], metavar="POINTS", help="instead: how good a plan would have been, of a table"
    )
    add("--hold-out", nargs="+", type=POSITIVE, default=[], metavar="BUDGET", help="with --points: budgets in MACs")
    add("--seen", type=POSITIVE, default=0.4, help="share of the budget up to which cells are fitted (default 0.4)")
    for flag, what in (("x", "columns of the law"), ("y", "error"), ("group", "clusters"), ("where", "rows")):
        add(f"--{flag}", nargs="*", default=None if flag == "group" else [], help=f"with --points, as of `fit`: {what}")
    add("--form", default="auto", help="with --points, as of `fit` (default auto)")
    add_overwrite(parser, "a plan")


def _pairs(words: list[str], flag: str, kind: Callable[[str], Any]) -> dict[str, Any]:
    out = {}
    for word in words:
        name, _, value = word.rpartition("=")
        try:
            out[name] = kind(value)
            good = bool(name) and (kind is str or 0 < out[name] < float("inf"))
        except ValueError:
            good = False
        if not good:
            what = "NAME=QUANTITY" if kind is str else "NAME=VALUE with a number above zero"
            raise UserError(f"{flag} {word}: give {what}")
    return out


def _numbers(text: str | None, flag: str, kind: Callable[[str], Any], count: int = 0) -> list[Any]:
    if text is None:
        return []
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < v < float("inf") for v in values) or (count and len(values) != count):
        what = "whole numbers above zero, such as 1,2,5" if kind is int else "numbers above zero"
        raise UserError(f"{flag} {text}: give {f'{count} ' if count else ''}{what}")
    return sorted(set(values)) if not count else values


def run(args: argparse.Namespace) -> int:
    from scaling_perception.scaling.plan_sizes import UNITS
    from scaling_perception.tasks import TASKS

    if args.unit not in UNITS:
        raise UserError(f"--unit {args.unit}{did_you_mean(args.unit, UNITS)}")
    known = (*(name for name, task in TASKS.items() if task.conditioned), _PRETRAINING)
    if args.task not in known:
        raise UserError(f"--task {args.task}{did_you_mean(args.task, known)}")
    if args.next_share > 1:
        raise UserError(f"--next-share {args.next_share:g}: give a share of the budget, up to 1")
    check_output(args.json, _settings(args), args.overwrite)
    if args.points or args.hold_out:
        return _held_out(args)
    if args.budget is None:
        raise UserError("--budget is missing: give a number, such as 1e15, in --unit")
    if not args.law:
        return _measured(args)
    _refuse_others(args, "--law", _OF_POINTS)
    from scaling_perception.diffusion.schedules import PRESETS
    from scaling_perception.scaling.laws import finite
    from scaling_perception.scaling.plan_text import commands_of, plan_text
    from scaling_perception.scaling.planner import compare

    named = {name: path for name, mark, path in (word.partition("=") for word in args.law) if mark}
    shared = [word for word in args.law if "=" not in word]
    plans = {}
    for name, path in (named or {"": shared[0]}).items():
        try:
            plans[name] = _planned(args, [path, *(shared if named else shared[1:])])
        except UserError as error:
            raise UserError(f"{name}: {error}") if name else error from None
    name, others = compare({name: found[:2] for name, found in plans.items()})
    laws, answer, size = plans[name]
    if others:
        answer |= {"alternative": name, "alternatives": others}
    stages = _stages(answer["choice"], size, args)
    dataset = args.dataset or (TASKS[args.task].dataset if args.task in TASKS else "")
    preset = args.preset or (name if name in PRESETS else "")
    commands, because = commands_of(answer["choice"], stages, args.task, dataset, args.model, preset)
    print(plan_text(answer, laws, commands, because))
    if args.json:
        _write(args, finite({"kind": "plan", "version": 1, "laws": args.law, **answer, "commands": commands}))
    return 0


_ALWAYS = ("images", "json", "overwrite", "unit")
_OF_POINTS = ("points", "hold_out", "seen", "x", "y", "group", "where", "form")
_OF_MODEL = ("model", "budget", "task", "dataset", "steps", "members", "preset", "macs", "seconds")


def _refuse_others(args: argparse.Namespace, mode: str, others: Collection[str]) -> None:
    """UserError for a flag of ``others`` that is given, where ``mode`` has no use for it."""
    for action in make_parser("plan")._actions:
        if action.dest in others and getattr(args, action.dest) != action.default:
            raise UserError(f"{action.option_strings[-1]} is of no use with {mode}: leave it out")


def _all_but(*used: str) -> set[str]:
    """The flags of a plan but for these and those that every plan has."""
    return {action.dest for action in make_parser("plan")._actions} - {"help", *_ALWAYS, *used}


def _planned(args: argparse.Namespace, files: list[str]) -> "tuple[Laws, dict[str, Any], Size | None]":
    """The plan by these laws, and the size that it chose where that has a name."""
    from scaling_perception.scaling.laws import load_law
    from scaling_perception.scaling.plan_laws import TRAINING, read_laws
    from scaling_perception.scaling.planner import Question, plan
    from scaling_perception.tasks import TASKS

    fixed, at = (_pairs(getattr(args, name), f"--{name}", float) for name in ("fix", "at"))
    laws = read_laws([load_law(path) for path in files], files, _pairs(args.column, "--column", str), fixed, at)
    trains = any(name in laws.quantities for name in TRAINING)
    speed = _speed(args)
    template = args.config or (f"configs/{args.task}.py:model={{size}},res={{resolution}}" if trains else "")
    sizes = _sizes(args, laws, template)
    items = _numbers(args.item_macs, "--item-macs", float, 2)
    limits = {"macs": args.macs, "seconds": args.seconds}
    if args.seconds and speed.chip is None and speed.per_mac is None:
        raise UserError("--seconds needs a speed: give --chip, or --seconds-per-image SECONDS:MACS")
    question = Question(
        budget=args.budget,
        unit=args.unit,
        images=args.images,
        passes=len(TASKS[args.task].passes) if args.task in TASKS else 1,
        steps=tuple(_numbers(args.steps, "--steps", int)) or None,
        members=tuple(_numbers(args.members, "--members", int)) or None,
        sizes=sizes,
        batch=args.batch or _batch(sizes[0].config if sizes else ""),
        item_macs=(items[0], items[1]) if items else None,
        limits={name: most for name, most in limits.items() if most},
        samples=args.samples,
        speed=speed,
        next_share=args.next_share,
    )
    answer = plan(laws, question)
    choice = answer["choice"]
    known = (s for s in sizes or () if s.name == choice["size"] and s.resolution == choice.get("resolution"))
    return laws, answer, next(known, None)


def _stages(choice: dict[str, Any], size: "Size | None", args: argparse.Namespace) -> list[tuple[str, int]]:
    """The trainings of a choice: config and steps of each. Sets ``stage_steps`` where there are two."""
    if size is None or not size.config or choice["training_macs"] is None:
        return []
    if "stage_samples" not in choice:
        return [(size.config, choice["training_steps"])]
    pixels, dense = size.resolution, size.name
    if size.dit is not None and size.dit.experts:
        dense = size.name.rpartition("-")[0]
        split = f"experts={size.dit.experts},active={size.dit.active_experts}"
        specs = [f"configs/{args.task}.py:model={dense},res={pixels}",
                 f"configs/upcycle.py:task={args.task},model={dense},res={pixels},{split},init={{init}}"]  # fmt: skip
    else:
        own = f"configs/from_dit.py:task={args.task},model={dense},res={pixels}" if not args.config else size.config
        join = "," if ".py:" in own else ":"
        specs = [f"configs/pretrain.py:model={dense},res={pixels}", f"{own}{join}init={{init}}"]
    pairs = zip(specs, choice["stage_samples"], strict=True)
    stages = [(spec, max(int(count // _batch(spec)), 1)) for spec, count in pairs]
    choice["stage_steps"] = [steps for _, steps in stages]
    return stages


def _speed(args: argparse.Namespace) -> "Speed":
    from scaling_perception.scaling.plan_sizes import Speed, chip_named
    from scaling_perception.scaling.study_cost import assumptions

    for flag, share in (("--mfu", args.mfu), ("--measured-mfu", args.measured_mfu)):
        if share is not None and share > 1:
            raise UserError(f"{flag} {share:g}: give a share of the peak, up to 1")
    per_mac = None
    if args.seconds_per_image:
        seconds, macs = _numbers(args.seconds_per_image.replace(":", ","), "--seconds-per-image", float, 2)
        per_mac = seconds / macs
    chip = chip_named(args.chip) if args.chip else None
    price = float("nan")
    prices = assumptions(args.price)
    if chip is not None and chip.name in prices:
        price = prices[chip.name].price
    memory = args.memory * 1e9 if args.memory else chip.memory if chip is not None else float("inf")
    mfu = args.mfu
    if args.search:
        from scaling_perception.scaling.mesh_search import mfu_of

        mfu = mfu_of(args.search, args.chip or "")
    return Speed(chip, args.chips, mfu, args.measured_mfu, per_mac, price, memory)


def _sizes(args: argparse.Namespace, laws: "Laws", template: str) -> "list[Size] | None":
    from scaling_perception.scaling.plan_sizes import Size, named_sizes

    resolutions = _numbers(args.resolution, "--resolution", int)
    if not args.sizes:
        return None
    names = [name.strip() for name in args.sizes.split(",")]
    counts = []
    for name in names:
        with contextlib.suppress(ValueError):
            counts.append(float(name))
    if not counts:
        return named_sizes(names, resolutions, template, "params" in laws.quantities)
    if len(counts) < len(names):
        raise UserError(f"--sizes {args.sizes}: give names of presets, or numbers of parameters, not both")
    if not all(0 < count < float("inf") for count in counts):
        raise UserError(f"--sizes {args.sizes}: give numbers of parameters above zero, or names")
    each = args.tokens or 1.0
    if "tokens" not in laws.quantities and not args.tokens:
        raise UserError("--sizes that are numbers of parameters need --tokens, how many a sample has; or give presets")
    return [Size(f"{count:g}", count, count * each, tokens=each) for count in sorted(set(counts))]


def _batch(spec: str) -> int:
    """Samples of a training step of a config; those of pre-training where there is none."""
    from scaling_perception.support.configs import load_config

    if not spec:
        return 256
    return int(load_config(spec.replace("{steps}", "1000").replace("{init}", "")).train.batch_size)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return settings_of(args, ("json",), ("law", "points", "model"))


def _write(args: argparse.Namespace, content: dict[str, Any]) -> None:
    with replacing(args.json, _settings(args)) as file:
        write_json(file, content)
    print(f"{content['kind']}: {args.json}")


def _held_out(args: argparse.Namespace) -> int:
    """How good a plan would have been at budgets that its law has not seen."""
    from scaling_perception.scaling.law_fit import Options
    from scaling_perception.scaling.laws import finite
    from scaling_perception.scaling.plan_holdout import EXTRA, hold_out_budget, hold_out_text
    from scaling_perception.scaling.points import read_points

    if not args.points or not args.hold_out:
        raise UserError(
            "--points POINTS and --hold-out BUDGET go together: a table, and a budget within its cells' costs"
        )
    if args.law or args.budget is not None:
        raise UserError("--hold-out fits its own law and has its own budgets: leave --law and --budget out")
    if args.unit != "macs":
        raise UserError(f"--unit {args.unit}: --hold-out is in MACs")
    if args.seen >= 1:
        raise UserError(f"--seen {args.seen:g}: give a share of the budget below 1")
    _refuse_others(args, "--points", _all_but(*_OF_POINTS))
    points = read_points(args.points, args.x, args.y, args.group, None, args.form, args.where, extra=EXTRA)
    rows = []
    for budget in args.hold_out:
        found, law = hold_out_budget(points, budget, args.images, args.seen, args.form, Options())
        print(hold_out_text(found, law) + "\n")
        rows.append(found)
    if args.json:
        _write(args, finite({"kind": "hold-out", "version": 1, "points": args.points, "budgets": rows}))
    return 0


def _asked_for(args: argparse.Namespace, table: dict[str, Any] | None) -> "Callable[[Choice], None]":
    """Refuses a measured setting that has other steps, members or another grid than the flags allow."""
    from scaling_perception.inference.budgets import table_choices

    wanted = {
        "steps": (args.steps, _numbers(args.steps, "--steps", int)),
        "ensemble": (args.members, _numbers(args.members, "--members", int)),
        "preset": (args.preset, [args.preset] if args.preset else []),
    }
    flags = {"ensemble": "--members"}
    given = {name: one for name, one in wanted.items() if one[1]}
    text = " ".join(f"{flags.get(name, f'--{name}')} {words}" for name, (words, _) in given.items())

    def check(choice: "Choice") -> None:
        if table is None or all(getattr(choice, name) in values for name, (_, values) in given.items()):
            return
        measured = table_choices(table["tasks"][args.task])
        known = {name: sorted({str(getattr(one, name)) for one in measured}, key=lambda one: (len(one), one))
                 for name in wanted}  # fmt: skip
        raise UserError(
            f"{text}: {args.model} has no such measured setting for {args.task}: choose among steps "
            f"{', '.join(known['steps'])}, members {', '.join(known['ensemble'])}, preset {', '.join(known['preset'])}"
        )

    return check


def _measured(args: argparse.Namespace) -> int:
    """The choice among a model's measured budgets: `predict --macs` by another name."""
    from scaling_perception.inference.budgets import choose, fitting, load_budgets
    from scaling_perception.interop.find import find_model
    from scaling_perception.scaling.plan_text import commands_of

    if not args.model:
        raise UserError("give --law LAW.json, or --model for a model whose budgets were measured")
    if args.unit not in ("macs", "flops"):
        raise UserError(f"--unit {args.unit}: measured budgets are in macs or flops; seconds are --seconds")
    _refuse_others(args, "--model alone", _all_but(*_OF_MODEL))
    table = load_budgets(Path(find_model(args.model)))
    table = fitting(table, args.task, _asked_for(args, table))
    macs = args.budget / (2 if args.unit == "flops" else 1) / (args.images or 1)
    found = choose(table, args.task, macs=min(macs, args.macs or macs), seconds=args.seconds)
    entry: dict[str, Any] = {**found._asdict(), "training_macs": None, "members": found.ensemble}
    dataset = args.dataset or table["tasks"][args.task]["dataset"] if table else ""
    commands, _ = commands_of(entry, [], args.task, dataset, args.model, found.preset or "")
    print(
        f"choice    {found.steps} steps, {found.ensemble} members: error {found.error:.4g}, measured; "
        f"{found.macs:.4g} MACs and {found.seconds:.3g} s an image"
    )
    print("\n".join(f"command   {line}" for line in commands))
    if args.json:
        _write(args, {"kind": "plan", "version": 1, "model": args.model, "choice": entry, "commands": commands})
    return 0
