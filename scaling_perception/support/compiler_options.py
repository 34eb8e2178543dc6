"""Options of XLA for graphs that may convolve pictures: prediction, encoding, matching, training steps."""

import os
from functools import lru_cache

import jax

_LIBRARY = "xla_cpu_experimental_ynn_fusion_type"


@lru_cache
def convolving(platform: str, window_sums: bool = False) -> dict[str, str | bool]:
    """For ``compile(compiler_options=...)`` of a graph that runs on ``platform``.

    XLA for CPUs leaves products, reductions, convolutions and window sums to a library, which runs each of the last
    two on one thread; XLA's own use all. Reductions are much faster by the library (docs/speed.md): a graph that is
    mostly ``window_sums`` does without it. Nothing is changed where XLA_FLAGS sets the option, or where the compiler
    does not know it.
    """
    if platform != "cpu" or _LIBRARY in os.environ.get("XLA_FLAGS", ""):
        return {}
    kept = "" if window_sums else "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    options: dict[str, str | bool] = {_LIBRARY: kept}
    try:
        jax.jit(lambda x: x).lower(0.0).compile(options)
    except jax.errors.JaxRuntimeError:  # experimental: another version may have renamed it
        return {}
    return options
