"""Measure speed: ratios of several ways to compute the same, taken in turns in one run on this machine.

Seconds depend on the machine and on what else it does; the ratios are what to compare.
"""

import argparse
from typing import Any

from scaling_perception.support.again import add_overwrite, check_output, replacing, settings_of
from scaling_perception.timing import data, front, moe, sample, train

EXAMPLES = """
scaling-perception bench data
scaling-perception bench data --cache runs/latents --batch 64 --workers 2 --json out/data.json
scaling-perception bench front --model mini-scenes --count 16 --figure out/front.png --json out/front.json
scaling-perception bench moe
scaling-perception bench moe --tokens 4096 --dim 384 --experts 8 --active 2 --json out/moe.json
scaling-perception bench moe --kind swiglu --dtype bfloat16 --repeats 15
scaling-perception bench sample --model a1 --against torch --levers --json out/sample.json
scaling-perception bench train --model a1 --batch 32 --against torch --json out/train.json
"""
OUTPUTS = ("json",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, (module, text) in _KINDS.items():
        kind = kinds.add_parser(name, help=text, allow_abbrev=False)
        module.add_arguments(kind)
        kind.add_argument("--repeats", type=int, default=7, help="rounds; the median is reported")
        kind.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
        add_overwrite(kind)


_KINDS: dict[str, tuple[Any, str]] = {
    "data": (data, "reading latents and pictures, and waiting for them"),
    "front": (front, "error against seconds: a model's budgets beside the released loop in PyTorch"),
    "moe": (moe, "the dispatchers of a mixture of experts"),
    "sample": (sample, "a whole prediction, and its way from a plain loop"),
    "train": (train, "a training step"),
}
"""Each module has ``add_arguments(parser)``, ``measure(args) -> JSON values`` and ``table(result) -> text``."""


def run(args: argparse.Namespace) -> None:
    import jax

    from scaling_perception.support.files import write_json

    settings = settings_of(args, ("json",), ("model",))
    check_output(args.json, settings, args.overwrite)
    kind = _KINDS[args.what][0]
    result = kind.measure(args)
    device = jax.devices()[0]
    result["machine"] = {"devices": jax.device_count(), "device": device.device_kind, "jax": jax.__version__}
    print(kind.table(result))
    if args.json:
        with replacing(args.json, settings) as file:
            write_json(file, result)
