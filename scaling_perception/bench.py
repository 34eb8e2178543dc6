"""Measure speed: ratios of several ways to compute the same, taken in turns in one run on this machine.

Seconds depend on the machine and on what else it does; the ratios are what to compare.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

from scaling_perception import bench_sample, bench_train
from scaling_perception.support.again import add_overwrite, check_output, replacing, settings_of

EXAMPLES = """
scaling-perception bench moe
scaling-perception bench moe --tokens 4096 --dim 384 --experts 8 --active 2 --json out/moe.json
scaling-perception bench moe --kind swiglu --dtype bfloat16 --repeats 15
scaling-perception bench sample --model a1 --against torch --levers --json out/sample.json
scaling-perception bench train --model a1 --batch 32 --against torch --json out/train.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    moe = kinds.add_parser("moe", help="the dispatchers of a mixture of experts", allow_abbrev=False)
    moe.add_argument("--tokens", type=int, default=4096)
    moe.add_argument("--dim", type=int, default=384, help="width; the hidden width is four times this")
    moe.add_argument("--experts", type=int, default=8)
    moe.add_argument("--active", type=int, default=2, help="experts that each token meets")
    moe.add_argument("--kind", choices=("gelu", "swiglu"), default="gelu", help="what an expert is")
    moe.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    sample = kinds.add_parser("sample", help="a whole prediction, and its way from a plain loop", allow_abbrev=False)
    bench_sample.add_arguments(sample)
    train = kinds.add_parser("train", help="a training step", allow_abbrev=False)
    bench_train.add_arguments(train)
    for kind in (moe, sample, train):
        kind.add_argument("--repeats", type=int, default=7, help="rounds; the median is told")
        kind.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
        add_overwrite(kind)


def in_turns(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, round by round, so that what else the machine does meets all of them alike.

    Each timed call follows an untimed one of the same function, which pays for its compilation and for the memory and
    caches that the function before it left behind.
    """
    import jax

    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            jax.block_until_ready(function())
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _positive(args: argparse.Namespace, *names: str) -> None:
    from scaling_perception.support.errors import UserError

    for name in names:
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give 1 or more")


def _difference(one: Any, other: Any) -> float:
    """Largest difference of two trees of arrays, each array's over its largest value in ``other``."""
    import jax
    import numpy as np

    def relative(a: Any, b: Any) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), np.finfo(np.float64).tiny))

    return max(jax.tree.leaves(jax.tree.map(relative, one, other)))


def _draw_experts(args: argparse.Namespace, key: Any) -> dict[str, dict[str, Any]]:
    import jax

    wide, narrow = (args.dim, 4 * args.dim), (4 * args.dim, args.dim)
    sizes = {"gate": wide, "up": wide, "down": narrow} if args.kind == "swiglu" else {"fc1": wide, "fc2": narrow}
    experts: dict[str, dict[str, Any]] = {}
    for number, (name, (inner, outer)) in enumerate(sizes.items()):
        kernel, bias = jax.random.split(jax.random.fold_in(key, number))
        experts[name] = {"kernel": jax.random.normal(kernel, (args.experts, inner, outer)) * inner**-0.5}
        if args.kind == "gelu":
            experts[name]["bias"] = 0.1 * jax.random.normal(bias, (args.experts, outer))
    return experts


def bench_moe(args: argparse.Namespace) -> dict[str, Any]:
    """Forward pass and gradient (of tokens, weights and every parameter) of each dispatcher that this machine can run.

    Returns:
        ``dispatchers``: for each its median seconds, how many times faster than dense (median over the rounds), and
        the largest difference of its result and of its gradients from dense.
    """
    import math
    from functools import partial
    from statistics import median

    import jax
    import jax.numpy as jnp

    from scaling_perception.models.dispatch import expert_mlp
    from scaling_perception.parallel.mesh import batch_sharding, make_mesh
    from scaling_perception.support.errors import UserError

    _positive(args, "tokens", "dim", "experts", "active", "repeats")
    if args.active > args.experts:
        raise UserError(f"--active {args.active}: a token cannot meet more than the {args.experts} experts there are")
    devices, mesh = jax.device_count(), None
    names = ["dense", "ragged"]
    if devices > 1:
        if args.tokens % devices:
            raise UserError(f"--tokens {args.tokens} cannot be split over {devices} devices: give a multiple")
        mesh = make_mesh(data=-1, expert=math.gcd(devices, args.experts))
        names += ["ring"] if mesh.shape["expert"] > 1 else []

    keys = iter(jax.random.split(jax.random.key(0), 4))
    x = jax.random.normal(next(keys), (args.tokens, args.dim)).astype(args.dtype)
    weight, index = jax.lax.top_k(
        jax.nn.softmax(jax.random.normal(next(keys), (args.tokens, args.experts))), args.active
    )
    experts = _draw_experts(args, next(keys))
    target = jax.random.normal(next(keys), x.shape)
    if mesh is not None:
        x, weight, index, target = jax.device_put((x, weight, index, target), batch_sharding(mesh))

    def forward(name: str, x: jax.Array, weight: jax.Array, experts: Any) -> jax.Array:
        return expert_mlp(x, index, weight, experts, args.kind, name, mesh)

    def loss(name: str, *arrays: Any) -> jax.Array:
        return jnp.sum(forward(name, *arrays).astype(jnp.float32) * target)

    arrays = (x, weight, experts)
    passes: dict[str, dict[str, Callable[[], Any]]] = {"forward": {}, "gradient": {}}
    for name in names:
        passes["forward"][name] = partial(jax.jit(partial(forward, name)), *arrays)
        passes["gradient"][name] = partial(jax.jit(jax.value_and_grad(partial(loss, name), argnums=(0, 1, 2))), *arrays)

    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for what, functions in passes.items():
        results = {name: function() for name, function in functions.items()}
        seconds = in_turns(functions, args.repeats)
        for name in names:
            rounds = [dense / own for dense, own in zip(seconds["dense"], seconds[name], strict=True)]
            found[name][f"{what}_seconds"] = median(seconds[name])
            found[name][f"{what}_ratio"] = median(rounds)
            found[name][f"{what}_difference"] = _difference(results[name], results["dense"])
    sizes = {name: getattr(args, name) for name in ("tokens", "dim", "experts", "active", "kind", "dtype", "repeats")}
    return {"what": "moe", **sizes, "mesh": dict(mesh.shape) if mesh is not None else {}, "dispatchers": found}


def _moe_table(result: dict[str, Any]) -> str:
    lines = ["dispatcher  forward s  x dense  gradient s  x dense  difference: forward, gradient"]
    for name, row in result["dispatchers"].items():
        times = f"{row['forward_seconds']:9.4f}  {row['forward_ratio']:7.2f}  {row['gradient_seconds']:10.4f}"
        differences = f"{row['forward_difference']:.1e}, {row['gradient_difference']:.1e}"
        lines.append(f"{name:<10}  {times}  {row['gradient_ratio']:7.2f}  {differences}")
    return "\n".join(lines)


_KINDS: dict[str, tuple[Callable[..., dict[str, Any]], Callable[..., str]]] = {
    "moe": (bench_moe, _moe_table),
    "sample": (bench_sample.bench_sample, bench_sample.sample_table),
    "train": (bench_train.bench_train, bench_train.train_table),
}


def run(args: argparse.Namespace) -> None:
    import jax

    from scaling_perception.support.files import write_json

    settings = settings_of(args, ("json",), ("model",))
    check_output(args.json, settings, args.overwrite)
    measure, table = _KINDS[args.what]
    result = measure(args)
    device = jax.devices()[0]
    result["machine"] = {"devices": jax.device_count(), "device": device.device_kind, "jax": jax.__version__}
    print(table(result))
    if args.json:
        with replacing(args.json, settings) as file:
            write_json(file, result)
