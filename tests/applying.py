"""Networks applied as one compiled program: op by op each operation is compiled by itself, which takes far longer."""

import functools
import os

import jax

from scaling_perception.models import dit


@functools.partial(jax.jit, static_argnums=0)
def applied(module, params, *inputs):
    """What a module makes of inputs; one program for each module and shapes."""
    return module.apply({"params": params}, *inputs)


EMITTERS = "xla_cpu_use_fusion_emitters"
LIKE_PROGRAMS = {EMITTERS: True} if EMITTERS in os.environ["XLA_FLAGS"] else {}
"""Compiler options, XLA's own defaults: programs that have operations in common give the same bits."""

fresh = jax.jit(dit.init_params, static_argnums=0)
"""``fresh(config, key)``: the parameters of a new network."""
