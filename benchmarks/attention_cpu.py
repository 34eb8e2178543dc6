"""Attention on a CPU: milliseconds of the kernel in C++, of one head after the other, and of PyTorch where it is.

    python benchmarks/attention_cpu.py --repeats 15

Forward pass, and gradient of the projection (with PyTorch, whose backward pass needs a forward pass: both together);
float32. All ways take turns in one process.
"""

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_perception.ops.attention import split_heads
from scaling_perception.ops.by_head import attention_by_head
from scaling_perception.ops.native import native_is_for, native_projection
from scaling_perception.timing.rounds import in_rounds

# (B, T, heads, head size): a1's training step and its five members, mini, B/2, a4, XL/2 at 512 pixels
SHAPES = ((8, 256, 16, 16), (5, 256, 16, 16), (32, 64, 4, 32), (4, 256, 12, 64), (2, 256, 16, 64), (1, 1024, 16, 72))
CALLS = 4


def by_head(qkv: jax.Array, heads: int) -> jax.Array:
    mixed: Any = attention_by_head(*split_heads(qkv, heads))
    return mixed.reshape(*qkv.shape[:2], -1)


def programs(shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    batch, tokens, heads, size = shape
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((batch, tokens, 3 * heads * size), np.float32)
    gradient = rng.standard_normal((batch, tokens, heads * size), np.float32)
    found: dict[str, Callable[[], Any]] = {}
    given = jnp.asarray(qkv), jnp.asarray(gradient)
    for name, way in (("kernel", native_projection), ("by head", by_head)):
        forward = jax.jit(lambda qkv, way=way: way(qkv, heads))
        pull = jax.jit(lambda qkv, g, way=way: jax.vjp(lambda qkv: way(qkv, heads), qkv)[1](g)[0])
        found[name] = lambda forward=forward: jax.block_until_ready(forward(given[0]))
        found[f"{name}, gradient"] = lambda pull=pull: jax.block_until_ready(pull(*given))
    if importlib.util.find_spec("torch") is not None:
        found |= _torch(qkv, gradient, shape)
    return found


def _torch(qkv: np.ndarray, gradient: np.ndarray, shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    import torch  # pyright: ignore[reportMissingImports]

    batch, tokens, heads, size = shape
    projection, pulled = torch.from_numpy(qkv).requires_grad_(True), torch.from_numpy(gradient)

    def mixed() -> Any:
        query, key, value = projection.reshape(batch, tokens, 3, heads, size).permute(2, 0, 3, 1, 4)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return out.transpose(1, 2).reshape(batch, tokens, heads * size)

    def forward() -> Any:
        with torch.no_grad():
            return mixed()

    return {"torch": forward, "torch, both": lambda: torch.autograd.grad(mixed(), projection, pulled)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    if not native_is_for(16, jnp.float32, None):
        parser.error("there is no kernel here: see `scaling-perception doctor`")
    for number, shape in enumerate(SHAPES):
        ways = programs(shape)
        if not number:
            print("| (B, T, heads, head size) |", *(f"{name} |" for name in ways))
            print("|---|" + "---|" * len(ways))
        for way in ways.values():
            way()
        timed = in_rounds({name: lambda way=way: [way() for _ in range(CALLS)] for name, way in ways.items()}, repeats)
        print(f"| {shape} |", *(f"{1e3 * timed[name]['seconds'] / CALLS:.2f} |" for name in ways), flush=True)


if __name__ == "__main__":
    main()
