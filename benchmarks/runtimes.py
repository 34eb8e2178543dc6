"""One forward pass of a network on a CPU: ours, PyTorch's and, where it is installed, OpenVINO's.

    pip install openvino torch && python -m benchmarks.runtimes --model a1 --batch 5

Random weights, the same for all; outputs are compared with ours. OpenVINO converts the PyTorch module; its bfloat16 is
an inference precision (float32 in and out). All ways take turns in one process.
"""

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.torch_peer import make_dit
from scaling_perception.models.dit import DiT
from scaling_perception.support.compiler_options import convolving
from scaling_perception.timing.rounds import in_rounds
from scaling_perception.timing.ways import draw_specialist


def ways(model: str, resolution: int, batch: int) -> dict[str, Callable[[], np.ndarray]]:
    rng = np.random.default_rng(0)
    config, params = draw_specialist(model, resolution, rng)
    x = rng.standard_normal((batch, config.input_size, config.input_size, config.input_channels), np.float32)
    t, label = np.full(batch, 300.0, np.float32), np.full(batch, config.null_label, np.int32)
    given = jax.tree.map(jnp.asarray, params), jnp.asarray(x), jnp.asarray(t), jnp.asarray(label)
    network: Any = DiT(config).apply
    lowered = jax.jit(lambda params, *rest: network({"params": params}, *rest)).lower(*given)
    ours = lowered.compile(convolving(jax.default_backend()))
    peer = make_dit(config, params, "sdpa")
    inputs = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(t), torch.from_numpy(label).long()
    compiled: Any = torch.compile(peer)

    def by_torch(function: Any) -> np.ndarray:
        with torch.no_grad():
            return function(*inputs).numpy().transpose(0, 2, 3, 1)

    found: dict[str, Callable[[], np.ndarray]] = {
        "ours": lambda: np.asarray(ours(*given)),
        "torch, sdpa": lambda: by_torch(peer),
        "torch.compile, sdpa": lambda: by_torch(compiled),
    }
    if importlib.util.find_spec("openvino") is not None:
        found |= _openvino(peer, inputs)
    return found


def _openvino(peer: Any, inputs: tuple[Any, ...]) -> dict[str, Callable[[], np.ndarray]]:
    import openvino as ov  # pyright: ignore[reportMissingImports]

    converted = ov.convert_model(peer, example_input=inputs)
    arrays = [value.numpy() for value in inputs]
    found = {}
    for kind, precision in (("float32", ov.Type.f32), ("bfloat16", ov.Type.bf16)):
        settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        program = ov.Core().compile_model(converted, "CPU", settings)
        found[f"OpenVINO, {kind}"] = lambda program=program: program(arrays)[0].transpose(0, 2, 3, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="a1")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    every = ways(args.model, args.resolution, args.batch)
    outputs = {name: way() for name, way in every.items()}
    timed = in_rounds(every, args.repeats)
    print("| runtime | ms, median | ours is faster by | largest difference, of the largest value |\n|---|---|---|---|")
    for name in every:
        ms, times = 1e3 * timed[name]["seconds"], timed[name]["seconds"] / timed["ours"]["seconds"]
        differs = float(np.abs(outputs[name] - outputs["ours"]).max() / np.abs(outputs["ours"]).max())
        print(f"| {name} | {ms:.1f} | {times:.2f} | {differs:.1e} |")


if __name__ == "__main__":
    main()
