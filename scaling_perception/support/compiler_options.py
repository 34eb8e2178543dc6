"""Options of XLA for graphs that may convolve pictures: prediction, encoding, matching, training steps."""

import os
from functools import lru_cache

import jax

_LIBRARY = "xla_cpu_experimental_ynn_fusion_type"


@lru_cache
def convolving(platform: str) -> dict[str, str | bool]:
    """For ``compile(compiler_options=...)`` of a graph that runs on ``platform``.

    XLA for CPUs leaves convolutions and window sums to a library that runs each on one thread; its own use all
    (docs/speed.md). Products of matrices are as fast either way. Nothing is changed where XLA_FLAGS sets the option, or
    where the compiler does not know it.
    """
    if platform != "cpu" or _LIBRARY in os.environ.get("XLA_FLAGS", ""):
        return {}
    options: dict[str, str | bool] = {_LIBRARY: ""}
    try:
        jax.jit(lambda x: x).lower(0.0).compile(options)
    except jax.errors.JaxRuntimeError:  # experimental: another version may have renamed it
        return {}
    return options
