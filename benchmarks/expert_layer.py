"""What the experts of a layer, forward and backward, take on TPUs that are not here, by dispatcher: from the compiler.

    python benchmarks/expert_layer.py --topology v5p:2x2x2 --tokens 8192 --dim 1152 --experts 8 --active 2

All devices share the experts (mesh expert = devices). As in `scaling-perception compile`: one device's memory traffic
with an even load, bytes and time on the links, temporaries. Takes one to two minutes a dispatcher.
"""

import argparse
from typing import Any

from scaling_perception.scaling.topologies import get_topology, prepare_environment, transfer_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5p:2x2x2")
    parser.add_argument("--tokens", type=int, default=8192, help="of each device")
    parser.add_argument("--dim", type=int, default=1152, help="width; the hidden width is four times this")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--active", type=int, default=2)
    parser.add_argument("--kind", choices=("gelu", "swiglu"), default="gelu")
    parser.add_argument("--dispatch", nargs="+", default=["ring", "exchange"])
    args = parser.parse_args()
    prepare_environment(args.topology)  # before JAX starts
    topology = get_topology(args.topology)
    for dispatch in args.dispatch:
        row = measure(args, topology, dispatch)
        print(", ".join(f"{name} {value:.4g}" if name else value for name, value in row.items()), flush=True)


def measure(args: argparse.Namespace, topology: Any, dispatch: str) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from scaling_perception.models.dispatch import expert_mlp
    from scaling_perception.parallel.mesh import BATCH_AXES, make_mesh
    from scaling_perception.scaling import collectives, costs, hlo

    mesh = make_mesh(expert=-1, data=1, devices=topology.devices)
    own, tokens, wide = PartitionSpec(BATCH_AXES), args.tokens * mesh.size, 4 * args.dim

    def shape(spec: Any, dtype: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    def layer(inner: int, outer: int) -> dict[str, Any]:
        split = PartitionSpec("expert")
        made = {"kernel": shape(split, jnp.float32, args.experts, inner, outer)}
        return made | ({"bias": shape(split, jnp.float32, args.experts, outer)} if args.kind == "gelu" else {})

    names = ("fc1", "fc2") if args.kind == "gelu" else ("gate", "up", "down")
    experts = {name: layer(args.dim, wide) if name != names[-1] else layer(wide, args.dim) for name in names}
    x, target = (shape(own, jnp.bfloat16, tokens, args.dim) for _ in range(2))
    weight, index = (shape(own, dtype, tokens, args.active) for dtype in (jnp.float32, jnp.int32))

    def loss(x: Any, weight: Any, experts: Any, index: Any, target: Any) -> Any:
        out = expert_mlp(x, index, weight, experts, args.kind, dispatch, mesh)
        return jnp.sum(out.astype(jnp.float32) * target)

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, weight, experts, index, target)
    compiled = lowered.compile()
    module = hlo.parse(compiled.as_text())
    traffic = costs.traffic(module)
    products = {one.op_name: one.rows for one in costs.kernels(module) if "gmm" in one.op_name}
    for name, rows in products.items():  # a grouped product passes over the rows that are nobody's
        traffic[name] = round(traffic[name] * min(1.0, args.tokens * args.active / rows))
    sent = collectives.collectives(module)
    flat = list(mesh.devices.flat)
    seconds = [transfer_seconds(topology, one.kind, one.bytes, [flat[at] for at in one.groups[0]]) for one in sent]
    return {
        "": dispatch,
        "traffic GB": sum(traffic.values()) / 1e9,
        "links GB": sum(one.bytes for one in sent) / 1e9,
        "links ms": 1e3 * sum(seconds),
        "temporaries GiB": compiled.memory_analysis().temp_size_in_bytes / 2**30,
    }


if __name__ == "__main__":
    main()
