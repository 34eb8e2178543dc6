"""The running average: how fast it forgets, and how it is kept apart from the step: every few steps, in bfloat16, or in
the memory of the host.

**Warm-up.** With a constant decay d the exported average holds d^N of the weights that a run of N steps started from:
of 0.9999, 67 % after 4,000 steps, 55 % after 6,000, 22 % after 15,000. With ``optim.ema_warmup`` step t (from 0) has

    d_t = min(d, (1 + t) / (10 + t))                                                                (0)

of which N!9!/(N+9)! of the start are left (1e-27 after 4,000 steps), until it reaches d (0.9999 at step 89,990). Below
that it is the power-function average of Karras et al. 2024 (EDM2) with gamma = 8: the weights of step t count as t^8,
a relative width of 0.09 of the run, whatever its length, within the 0.05 to 0.15 that they found best. A decay by the
number of steps needs no second setting for each stage; beyond 90,000 steps (0) is the constant decay that long
pre-training publishes. The fine-tuning recipes have it; ``configs/pretrain.py`` keeps DiT's constant 0.9999.

**Apart from the step.**

With decay d, an average that takes in the weights every k steps alone moves by d^k:

    e <- e + (1 - d^k) (p - e)                                                                      (1)

which forgets as fast as the one of every step, and sees every k-th of its weights. Of the last 1 / (1 - d) steps, which
are what it averages, that is enough while k is far below their number (10 of 10,000 at 0.9999).

bfloat16 keeps 8 bits: neighbours lie u ema, 2^-8 to 2^-7 of a value. At d = 0.9999 equation (1) moves e by less than
u/2 as soon as p is within 5,000 u of it (500 u for k = 10), which is always: rounded to the nearest, e never moves.
So the result is rounded up or down at random, with odds that make its mean exact. The error is then a random walk that
(1) itself pulls back: with a gap |p - e| of g, one rounding adds at most u (1 - d^k) g to its variance and one update
takes 2 (1 - d^k) of it away, so that it tends to u g / 2, whatever d and k are. For weights that rest, whose gap is the
error itself, that is an error of about u / 2: what rounding once costs. The random bits come from the run's key and
the step, so that a resumed run draws the same, on any mesh.

A step that is skipped leaves the weights, and this average takes them in as they are; that of the step stays as well.

An average in host memory takes none of the devices' between updates: leaf by leaf it travels there, is updated and
travels back, so that the largest leaf alone takes room. That moves the average twice over the bus, which is why it pays
every few steps.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from scaling_perception.support.configs import Config
from scaling_perception.training.state import path_name
from scaling_perception.training.step import average_rate, is_frozen
from scaling_perception.training.streams import stream_key

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
MOST_LEFT = 0.05  # of the starting weights in what is exported, before a warning
HOST = "pinned_host"  # the kind of memory that TPU, GPU and CPU backends all know


class EmaConfig(NamedTuple):
    """How an average that is not the step's own is kept; see the fields ``optim.ema*``."""

    decay: float
    every: int
    dtype: Any
    host: bool
    warmup: bool = False


def ema_config(optim: Config) -> EmaConfig | None:
    """What ``config.optim`` says of the average; None: float32, on the devices, at every step, as in ``step.py``."""
    if (optim.ema_every, optim.ema_dtype, optim.ema_place) == (1, "float32", "device"):
        return None
    return EmaConfig(
        float(optim.ema),
        int(optim.ema_every),
        DTYPES[optim.ema_dtype],
        optim.ema_place == "host",
        bool(optim.ema_warmup),
    )


def left_of_start(optim: Config, steps: int) -> float:
    """Share of the starting weights in the average after ``steps`` steps: the product of all decays, in closed form."""
    if optim.ema == 0:
        return 0.0
    # of (0) as long as it is below the cap: (1 + t) / (10 + t) < ema
    growing = min(steps, math.ceil((10 * optim.ema - 1) / (1 - optim.ema))) if optim.ema_warmup else 0
    growing = max(growing, 0)
    log = math.lgamma(growing + 1) + math.lgamma(10) - math.lgamma(growing + 10)
    return math.exp(log + (steps - growing) * math.log(optim.ema))


def start_warning(optim: Config, steps: int) -> str:
    """A line where the exported average would hold more than `MOST_LEFT` of the starting weights, else ""."""
    left = left_of_start(optim, steps)
    if left <= MOST_LEFT:
        return ""
    smaller = math.floor((1 - 3 / steps) * 1e4) / 1e4 if steps > 3 else 0.0  # which leaves e^-3, just below 5 %
    return (
        f"optim.ema {optim.ema:g}: after {steps:,} steps {left:.0%} of the starting weights are left in the exported "
        f"average: set optim.ema_warmup=true, or optim.ema={smaller:g} or less"
    )


def first_average(params: Any, ema: EmaConfig | None, frozen: tuple[str, ...] = ()) -> Any:
    """The average before the first step: a copy of the weights, of the kept dtype; frozen leaves stay as they are."""

    def copy(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        dtype = ema.dtype if ema is not None and not is_frozen(path_name(path), frozen) else leaf.dtype
        return jnp.array(leaf, dtype=dtype, copy=True)  # the state gives its buffers away

    return jax.tree_util.tree_map_with_path(copy, params)


def placed(places: Any, ema: EmaConfig | None) -> Any:
    """Shardings of the state (a TrainState) with the average where it is kept."""
    if ema is None or not ema.host:
        return places
    return places._replace(ema=jax.tree.map(lambda place: place.with_memory_kind(HOST), places.ema))


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to one of the two nearest bfloat16 numbers, with odds by which their mean is x. inf and NaN stay so."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    up = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    drawn = jax.lax.bitcast_convert_type((up >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), drawn, x.astype(jnp.bfloat16))


@functools.cache
def leaf_program(ema: EmaConfig, place: NamedSharding) -> Any:
    """(old average, weights, key, rate) -> new average of one leaf, compiled; ``place``: where the average is kept."""
    device = place.with_memory_kind(next(iter(place.device_set)).default_memory().kind)

    def one(old: jax.Array, new: jax.Array, key: jax.Array, rate: jax.Array) -> jax.Array:
        before = (jax.device_put(old, device) if ema.host else old).astype(jnp.float32)
        after = before + rate * (new.astype(jnp.float32) - before)
        return round_at_random(after, key) if old.dtype == jnp.bfloat16 else after.astype(old.dtype)

    return jax.jit(one, donate_argnums=() if ema.host else 0, out_shardings=place)


def _rate_of(ema: EmaConfig, step: jax.Array, since: int) -> jax.Array:
    """1 - the product of the decays of the ``since`` steps before ``step`` (finished steps), without cancellation."""
    if not ema.warmup:
        return jnp.float32(1.0 - ema.decay**since)
    rates = average_rate(ema.decay, True, step - since + jnp.arange(since))
    return rates[0] if since == 1 else -jnp.expm1(jnp.sum(jnp.log1p(-rates)))


def make_update(kept: EmaConfig, total: int, places: Any) -> Callable[[Any, Any, jax.Array, jax.Array, int], Any]:
    """update(ema, params, key, step, number) -> ema after ``number`` finished steps; the old one is given away.

    It changes nothing but at multiples of ``kept.every`` and at the last step ``total``, so that what is exported is
    no older than the weights. ``step`` is ``number`` as it is in the state. Nothing waits for the host.

    Args:
        places: shardings of ``ema``, NamedShardings of one mesh.
    """
    spread = jax.tree.leaves(places)

    @functools.partial(jax.jit, static_argnums=2)
    def draws(key: jax.Array, step: jax.Array, since: int) -> tuple[list[jax.Array], jax.Array]:
        """A key for each leaf, and the rate of the last ``since`` steps together, float32 ()."""
        own = stream_key(key, "average", step)
        return list(jax.random.split(own, len(spread))), _rate_of(kept, step, since)

    def update(ema: Any, params: Any, key: jax.Array, step: jax.Array, number: int) -> Any:
        if number % kept.every and number != total:
            return ema
        leaves, tree = jax.tree.flatten(ema)
        keys, rate = draws(key, step, (number - 1) % kept.every + 1)
        several = zip(spread, leaves, jax.tree.leaves(params), keys, strict=True)
        return jax.tree.unflatten(
            tree, [leaf_program(kept, place)(old, new, own, rate) for place, old, new, own in several]
        )

    return update


def with_ema_update(step: Callable[..., Any], ema: EmaConfig | None, total: int, places: Any) -> Callable[..., Any]:
    """``step(state, batch, key, constants)`` as advance(number, …), which keeps the average after that many steps, too.

    Args:
        step: compiled for a state whose average is (), unless ``ema`` is None. places: as for ``make_update``.
    """
    if ema is None:
        return lambda number, *given: step(*given)
    update = make_update(ema, total, places)

    def advance(number: int, state: Any, batch: Any, key: jax.Array, constants: Any) -> tuple[Any, Any]:
        new, metrics = step(state._replace(ema=()), batch, key, constants)
        return new._replace(ema=update(state.ema, new.params, key, new.step, number)), metrics

    return advance
