"""Speed of the dispatchers of a mixture of experts: forward pass and gradient; `bench moe`."""

import argparse
from collections.abc import Callable
from typing import Any

from scaling_perception.support.errors import UserError
from scaling_perception.timing.rounds import in_rounds, ratio
from scaling_perception.timing.ways import difference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=384, help="width; the hidden width is four times this")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--active", type=int, default=2, help="experts that each token meets")
    parser.add_argument("--kind", choices=("gelu", "swiglu"), default="gelu", help="what an expert is")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")


def _difference(one: Any, other: Any) -> float:
    """The largest of the differences of two trees of arrays."""
    import jax

    return max(jax.tree.leaves(jax.tree.map(difference, one, other)))


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


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Forward pass and gradient (of tokens, weights and every parameter) of each dispatcher that this machine can run.

    Returns:
        ``dispatchers``: for each its median seconds, how many times faster than dense (median over the rounds), and
        the largest difference of its result and of its gradients from dense.
    """
    import math
    from functools import partial

    import jax
    import jax.numpy as jnp

    from scaling_perception.models.dispatch import expert_mlp
    from scaling_perception.parallel.mesh import batch_sharding, make_mesh

    for name in ("tokens", "dim", "experts", "active", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give 1 or more")
    if args.active > args.experts:
        raise UserError(f"--active {args.active}: a token cannot meet more than the {args.experts} experts there are")
    devices, mesh = jax.device_count(), None
    names = ["dense", "ragged"]
    if devices > 1:
        if args.tokens % devices:
            raise UserError(f"--tokens {args.tokens} cannot be split over {devices} devices: give a multiple")
        mesh = make_mesh(data=-1, expert=math.gcd(devices, args.experts))
        over_axis = ["ring"] if jax.default_backend() == "cpu" else ["ring", "exchange"]  # which CPUs lack
        names += over_axis if mesh.shape["expert"] > 1 else []

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
        seconds = in_rounds(functions, args.repeats, warm=True)
        for name in names:
            found[name][f"{what}_seconds"] = seconds[name]["seconds"]
            found[name][f"{what}_ratio"] = ratio(seconds, "dense", name)["ratio"]
            found[name][f"{what}_difference"] = _difference(results[name], results["dense"])
    sizes = {name: getattr(args, name) for name in ("tokens", "dim", "experts", "active", "kind", "dtype", "repeats")}
    return {"what": "moe", **sizes, "mesh": dict(mesh.shape) if mesh is not None else {}, "dispatchers": found}


def table(result: dict[str, Any]) -> str:
    """The result as lines of text."""
    lines = ["dispatcher  forward s  x dense  gradient s  x dense  difference: forward, gradient"]
    for name, row in result["dispatchers"].items():
        times = f"{row['forward_seconds']:9.4f}  {row['forward_ratio']:7.2f}  {row['gradient_seconds']:10.4f}"
        differences = f"{row['forward_difference']:.1e}, {row['gradient_difference']:.1e}"
        lines.append(f"{name:<10}  {times}  {row['gradient_ratio']:7.2f}  {differences}")
    return "\n".join(lines)
