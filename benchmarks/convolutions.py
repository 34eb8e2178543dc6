"""Graphs that convolve pictures on a CPU: as XLA compiles them by default, with the options that this package gives the
compiler, and with its kernels in C++ where they are.

    python benchmarks/convolutions.py --rounds 15

The shipped autoencoder at 128 pixels, Stable Diffusion's at 256, `mini`'s features and matching, the gradient of the
autoencoder, and that of a transformer's MLP, which is products of matrices and should take as long in any way; the
programs take turns in one process. Nothing is printed but a table: median milliseconds and the median ratio of the
first and the last.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from scaling_perception.models import matching, vae
from scaling_perception.models.autoencoders import load_autoencoder
from scaling_perception.ops import convolution
from scaling_perception.support.compiler_options import convolving
from scaling_perception.timing.rounds import in_rounds, ratio


def graphs() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    keys = jax.random.split(jax.random.key(0), 3)
    tiny, featured = load_autoencoder("tiny"), load_autoencoder("tiny+lite0")
    pictures, others = (jax.random.uniform(key, (1, 128, 128, 3), minval=-1) for key in keys[:2])
    latents, batch = jax.random.normal(keys[2], (5, 16, 16, 4)), jnp.tile(pictures[:, :64, :64], (8, 1, 1, 1))

    def loss(params: Any, pictures: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(tiny.decode(params, tiny.encode(params, pictures)[0]) - pictures))

    def products(weights: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(jax.nn.gelu(x @ weights[0]) @ weights[1]))

    config = vae.VAEConfig()
    large = {part: vae.init_part(part, config, keys[0]) for part in ("encoder", "decoder")}
    picture = jnp.tile(pictures, (1, 2, 2, 1))
    weights = (jnp.full((256, 1024), 0.01), jnp.full((1024, 256), 0.01))
    return {
        "encode one picture": (lambda params, x: tiny.encode(params, x)[0], (tiny.params, pictures)),
        "encode one with features": (lambda params, x: featured.encode(params, x)[0], (featured.params, pictures)),
        "decode one": (tiny.decode, (tiny.params, latents[:1])),
        "decode five": (tiny.decode, (tiny.params, latents)),
        "encode one of 256 pixels by Stable Diffusion's": (
            lambda params, x: vae.moments(params, config, x),
            (large, picture),
        ),
        "decode one by it": (
            lambda params, z: vae.decode(params, config, z),
            (large, jnp.tile(latents[:1], (1, 2, 2, 1))),
        ),
        "match two pictures": (matching.match, (pictures, others)),
        "gradient of the autoencoder, 8 of 64 pixels": (jax.grad(loss), (tiny.params, batch)),
        "gradient of an MLP, 2048 rows of 256": (jax.grad(products), (weights, jnp.ones((2048, 256)))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    if not convolving(jax.default_backend()):
        parser.error("there is nothing to compare: not a CPU, XLA_FLAGS sets the option, or the compiler lacks it")
    kernels = convolution.native_convolves()
    print(
        "| graph | XLA's default, ms | with the options, ms | and the kernels, ms | times faster | by processor time |"
    )
    print("|---|---|---|---|---|---|")
    for name, (function, arguments) in graphs().items():
        options = convolving(jax.default_backend(), window_sums=function is matching.match)
        with mock.patch.object(convolution, "native_convolves", lambda *_: False):
            lowered = jax.jit(lambda *given, function=function: function(*given)).lower(*arguments)
        compiled = {"default": lowered.compile(), "options": lowered.compile(options)}
        compiled["kernels"] = jax.jit(function).lower(*arguments).compile(options) if kernels else compiled["options"]
        found = in_rounds({way: partial(run, *arguments) for way, run in compiled.items()}, rounds)
        times = ratio(found, "default", "kernels")
        spent = " | ".join(f"{1e3 * found[way]['seconds']:.1f}" for way in compiled)
        print(f"| {name} | {spent} | {times['ratio']:.2f} | {times['ratio_of_processor_seconds']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
