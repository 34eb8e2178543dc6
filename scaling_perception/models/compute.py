"""Compute, counted: forward multiply-accumulates (MACs) of a DiT, the source of truth for every compute axis.

MACs and FLOPs are different words: one MAC is two FLOPs. DiT's published "Gflops" are MACs, and so are the paper's
(facts 1.4). Biases, norms, softmax and modulation are left out, and so is the autoencoder, which `graph_macs` counts:
M members cost M decodes, or one where they are merged as latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from scaling_perception.models.config import TIME_FREQUENCIES, DiTConfig
from scaling_perception.models.presets import at_resolution

TRAINING_FACTOR = 3  # one forward and one backward pass; the paper does not say whether it counts the backward


def forward_macs(config: DiTConfig, resolution: int | None = None) -> int:
    """MACs of one forward pass over one sample (facts 1.4), every layer and the condition path included.

    L [T (4 D^2 + M) + 2 T^2 D] + 6 L D^2 + 3 D^2 + 256 D + T p^2 D (C_in + C_out), with p the patch side and M the MLP:
    2 D F dense; with experts n K D F + E D + 3 D S, where n is 2 (GELU) or 3 (SwiGLU), E D the router and S the
    shared expert's hidden width. Choosing a routed model's patch kernel is not counted: it is a look-up.

    Args:
        resolution: side of the picture in pixels; None = the config's own.

    Raises:
        UserError: ``resolution`` is no whole number of patches.
    """
    if resolution is not None:
        config = at_resolution(config, resolution)
    width, tokens = config.dim, config.tokens
    condition = 2 * TIME_FREQUENCIES * width + width**2 + config.context_dim * width
    ends = tokens * config.patch_size**2 * width * (config.input_channels + config.out_channels) + 2 * width**2
    return config.depth * _block_macs(config) + condition + ends


def _block_macs(config: DiTConfig) -> int:
    """MACs of one block over one sample, its modulation (6 D^2) included."""
    width, tokens = config.dim, config.tokens
    mlp = 2 * width * config.hidden
    if config.experts:
        matrices = 3 if config.expert_mlp == "swiglu" else 2
        routed = matrices * width * config.hidden * config.active_experts + config.experts * width
        mlp = routed + 3 * width * config.shared_experts * width
    return tokens * (4 * width**2 + mlp) + 2 * tokens**2 * width + 6 * width**2


def cached_macs(config: DiTConfig, features: str) -> int:
    """MACs of a denoising step whose blocks come from a cache (``diffusion/caching.py``), over one sample.

    All but the blocks' own products, L [T (4 D^2 + M) + 2 T^2 D] of `forward_macs`: the condition path with the
    modulation of all blocks, and both ends; and 2 T D for the weighted sum of the trunk's features, or 4 L T D for that
    of attention and MLP and 2 L T D for their gates.
    """
    width, tokens = config.dim, config.tokens
    kept = forward_macs(config) - config.depth * (_block_macs(config) - 6 * width**2)
    return kept + (2 if features == "trunk" else 6 * config.depth) * tokens * width


def inference_macs(config: DiTConfig, steps: int, members: int, passes: int = 1, resolution: int | None = None) -> int:
    """MACs of one prediction: forward MACs x denoising steps x ensemble members x passes (flow has two, facts 1.4)."""
    return forward_macs(config, resolution) * steps * members * passes


def graph_macs(function: Callable[..., Any], *arguments: Any) -> int:
    """MACs of the products and convolutions of a JAX function on arguments of these shapes; nothing is computed.

    A branch counts as its dearest one, a loop of unknown length once.
    """
    import jax

    return _macs_of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _macs_of(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, given = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = given["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, out = equation.invars[1].aval.shape, given["dimension_numbers"].rhs_spec[0]
            total += equation.outvars[0].aval.size * math.prod(kernel) // kernel[out]
        else:
            inner = [_macs_of(one) for one in _inside(given)]
            total += max(inner, default=0) if name == "cond" else sum(inner) * given.get("length", 1)
    return total


def _inside(given: dict[str, Any]) -> Iterator[Any]:
    """The programs that an equation holds."""
    for value in given.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            found = getattr(one, "jaxpr", one)
            if hasattr(found, "eqns"):
                yield found
