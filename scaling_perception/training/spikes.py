"""Loss spikes: a step whose loss or gradient is finite, but far above what the last steps had.

The median of the last finite values is what a step is measured by: unlike a running mean, one outlier does not move it,
and unlike a statistic of accepted steps alone, it gives in where values stay high (after ``window / 2`` steps), so that
a run can never pass over everything for ever. Loss and gradient norm are global, and looked at inside the compiled
step: every process decides the same, and none waits for the host. What is remembered is part of the saved state.
"""

from typing import Any

import jax
import jax.numpy as jnp

from scaling_perception.support.configs import Config


def spike_window(train: Config) -> int:
    """Number of steps that the policy of ``config.train`` remembers; 0 where it has none."""
    return 0 if train.on_spike == "none" else int(train.spike_window)


def new_guard(window: int) -> Any:
    """Memory of ``window`` steps, none of them seen: {"loss", "grad_norm"} of NaN (window,) float32; () without one."""
    return {name: jnp.full(window, jnp.nan, jnp.float32) for name in ("loss", "grad_norm")} if window else ()


def detect_spike(history: Any, loss: jax.Array, norm: jax.Array, factor: float) -> tuple[jax.Array, Any]:
    """Whether this step is a spike, and the memory with this step in it.

    A spike: loss or gradient norm above ``factor`` times the median of what is remembered. Nothing is one before
    ``window / 2`` finite steps are remembered, nor against a median that is not positive. Steps that are not finite are
    no spikes, and are not remembered; spikes are.

    Args:
        history: of ``new_guard``. loss, norm: float32 scalars.
    """
    now = {"loss": loss.astype(jnp.float32), "grad_norm": norm.astype(jnp.float32)}
    finite = jnp.isfinite(now["loss"]) & jnp.isfinite(now["grad_norm"])
    spike = jnp.zeros((), jnp.bool_)
    for name, value in now.items():
        known, middle = jnp.sum(jnp.isfinite(history[name])), jnp.nanmedian(history[name])
        spike |= (2 * known >= history[name].size) & (middle > 0) & (value > factor * middle)
    later = {name: jnp.concatenate([history[name][1:], now[name][None]]) for name in now}
    return spike & finite, jax.tree.map(lambda new, old: jnp.where(finite, new, old), later, history)
