"""Attention on an accelerator: milliseconds of the fused program, of the same padded to 128, and of the oracle.

    python benchmarks/attention.py --json out/attention.json

Forward pass alone, and with the gradient of q, k and v; bfloat16; 16 heads of every size of the presets. All ways take
turns in one process. A way that the device cannot run is reported with its reason.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from scaling_perception.ops.attention import attention, attention_einsum
from scaling_perception.timing.rounds import in_rounds

HEAD_SIZES = (16, 32, 48, 64, 72, 96, 112, 128)
HEADS, CALLS = 16, 10


def padded(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """The fused program on heads that are filled up with zeros to 128."""
    size = query.shape[-1]
    wide = [jnp.pad(array, ((0, 0),) * 3 + ((0, 128 - size),)) for array in (query, key, value)]
    scale = jnp.asarray((128 / size) ** 0.5, query.dtype)  # the program divides by the square root of 128
    return attention(wide[0] * scale, wide[1], wide[2])[..., :size]


WAYS: dict[str, Callable[..., jax.Array]] = {"fused": attention, "padded": padded, "oracle": attention_einsum}


def with_gradient(way: Callable[..., jax.Array]) -> Callable[..., Any]:
    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.sum(way(query, key, value).astype(jnp.float32) ** 2)

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def measure(batch: int, tokens: int, size: int, repeats: int) -> dict[str, dict[str, float] | str]:
    """Median milliseconds of one call, by way: ``forward`` and ``both``; or why it does not run."""
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (batch, tokens, HEADS, size), jnp.bfloat16) for key in keys]
    found: dict[str, dict[str, float] | str] = {}
    programs: dict[tuple[str, str], Any] = {}
    for name, way in WAYS.items():
        try:
            for kind, function in (("forward", way), ("both", with_gradient(way))):
                programs[name, kind] = jax.jit(function).lower(*arrays).compile()
                jax.block_until_ready(programs[name, kind](*arrays))
            found[name] = {}
        except Exception as error:
            programs = {at: program for at, program in programs.items() if at[0] != name}
            found[name] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

    def calls(program: Any) -> Callable[[], Any]:
        return lambda: [program(*arrays) for _ in range(CALLS)][-1]  # the device works them off in order

    timed = in_rounds({f"{name} {kind}": calls(program) for (name, kind), program in programs.items()}, repeats)
    for name, kind in programs:
        row = found[name]
        assert isinstance(row, dict)
        row[kind] = 1e3 * timed[f"{name} {kind}"]["seconds"] / CALLS
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--sizes", default=",".join(map(str, HEAD_SIZES)), help="head sizes, comma-separated")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    sizes = [int(word) for word in args.sizes.split(",")]
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}: ({args.batch}, {args.tokens}, {HEADS}, size) bfloat16, ms a call")
    print(f"{'size':>4} " + " ".join(f"{name:>8} {'+grad':>8}" for name in WAYS), flush=True)
    result: dict[str, Any] = {"device": device, "jax": jax.__version__, "batch": args.batch, "tokens": args.tokens}
    result["sizes"] = {}
    for size in sizes:
        rows = result["sizes"][size] = measure(args.batch, args.tokens, size, args.repeats)
        cells = [row if isinstance(row, dict) else {} for row in rows.values()]
        cell = [f"{row[kind]:8.3f}" if kind in row else f"{'-':>8}" for row in cells for kind in ("forward", "both")]
        print(f"{size:>4} " + " ".join(cell), flush=True)
        for name, row in rows.items():
            if isinstance(row, str):
                print(f"     {name}: {row}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
