"""The running average apart from the step: every few steps, in bfloat16, or in the memory of the host.

With decay d, an average that takes in the weights every k steps alone moves by d^k:

    e <- e + (1 - d^k) (p - e)                                                                      (1)

which forgets as fast as the one of every step, and sees every k-th of its weights. Of the last 1 / (1 - d) steps, which
are what it averages, that is enough while k is far below their number (10 of 10,000 at 0.9999).

bfloat16 keeps 8 bits: neighbours lie u apart, 2^-8 to 2^-7 of a value. At d = 0.9999 equation (1) moves e by less than
u/2 as soon as p is within 5,000 u of it (500 u for k = 10), which is always: rounded to the nearest, e never moves.
So the result is rounded up or down at random, with odds that make its mean exact. The error is then a random walk that
(1) itself pulls back: with a gap |p - e| of g, one rounding adds at most u (1 - d^k) g to its variance and one update
takes 2 (1 - d^k) of it away, so that it tends to u g / 2, whatever d and k are. For weights that rest, whose gap is the
error itself, that is an error of about u / 2: what rounding once costs. The random bits come from the run's key and
the step, so that a resumed run draws the same, on any mesh.

A step that is skipped leaves the weights, and the average takes them in as they are.

An average in host memory takes none of the devices' between updates: leaf by leaf it travels there, is updated and
travels back, so that the largest leaf alone takes room. That moves the average twice over the bus, which is why it pays
every few steps.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from scaling_perception.support.configs import Config
from scaling_perception.training.state import path_name
from scaling_perception.training.step import is_frozen

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_AVERAGE = 0x0A7E  # sets these draws apart from those of the steps
HOST = "pinned_host"  # the kind of memory that TPU, GPU and CPU backends all know


class Apart(NamedTuple):
    """How an average that is not the step's own is kept; see the fields ``optim.ema*``."""

    decay: float
    every: int
    dtype: Any
    host: bool


def kept_apart(optim: Config) -> Apart | None:
    """What ``config.optim`` says of the average; None: float32, on the devices, at every step, as in ``step.py``."""
    if (optim.ema_every, optim.ema_dtype, optim.ema_place) == (1, "float32", "device"):
        return None
    return Apart(float(optim.ema), int(optim.ema_every), DTYPES[optim.ema_dtype], optim.ema_place == "host")


def first_average(params: Any, apart: Apart | None, frozen: tuple[str, ...] = ()) -> Any:
    """The average before the first step: a copy of the weights, of the kept dtype; frozen leaves stay as they are."""

    def copy(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        dtype = apart.dtype if apart is not None and not is_frozen(path_name(path), frozen) else leaf.dtype
        return jnp.array(leaf, dtype=dtype, copy=True)  # the state gives its buffers away

    return jax.tree_util.tree_map_with_path(copy, params)


def placed(places: Any, apart: Apart | None) -> Any:
    """Shardings of the state (a TrainState) with the average where it is kept."""
    if apart is None or not apart.host:
        return places
    return places._replace(ema=jax.tree.map(lambda place: place.with_memory_kind(HOST), places.ema))


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to one of the two nearest bfloat16 numbers, with odds by which their mean is x. inf and NaN stay so."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    up = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    drawn = jax.lax.bitcast_convert_type((up >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), drawn, x.astype(jnp.bfloat16))


@functools.cache
def leaf_program(apart: Apart, place: NamedSharding, decay: float) -> Any:
    """(old average, weights, key) -> new average of one leaf, compiled; ``place`` is where the average is kept."""
    device = place.with_memory_kind(next(iter(place.device_set)).default_memory().kind)

    def one(old: jax.Array, new: jax.Array, key: jax.Array) -> jax.Array:
        before = (jax.device_put(old, device) if apart.host else old).astype(jnp.float32)
        after = before + (1.0 - decay) * (new.astype(jnp.float32) - before)
        return round_at_random(after, key) if old.dtype == jnp.bfloat16 else after.astype(old.dtype)

    return jax.jit(one, donate_argnums=() if apart.host else 0, out_shardings=place)


def make_update(apart: Apart, total: int, places: Any) -> Callable[[Any, Any, jax.Array, jax.Array, int], Any]:
    """update(ema, params, key, step, number) -> ema after ``number`` finished steps; the old one is given away.

    It changes nothing but at multiples of ``apart.every`` and at the last step ``total``, so that what is exported is
    no older than the weights. ``step`` is ``number`` as it is in the state. Nothing waits for the host.

    Args:
        places: shardings of ``ema``, NamedShardings of one mesh.
    """
    spread = jax.tree.leaves(places)

    @jax.jit
    def keys_of(key: jax.Array, step: jax.Array) -> list[jax.Array]:
        own = jax.random.fold_in(jax.random.fold_in(key, _AVERAGE), step)
        return list(jax.random.split(own, len(spread)))

    def update(ema: Any, params: Any, key: jax.Array, step: jax.Array, number: int) -> Any:
        if number % apart.every and number != total:
            return ema
        decay = apart.decay ** ((number - 1) % apart.every + 1)
        leaves, tree = jax.tree.flatten(ema)
        several = zip(spread, leaves, jax.tree.leaves(params), keys_of(key, step), strict=True)
        return jax.tree.unflatten(
            tree, [leaf_program(apart, place, decay)(old, new, own) for place, old, new, own in several]
        )

    return update


def around(step: Callable[..., Any], apart: Apart | None, total: int, places: Any) -> Callable[..., Any]:
    """``step(state, batch, key, constants)`` as advance(number, …), which keeps the average after that many steps, too.

    Args:
        step: compiled for a state whose average is (), unless ``apart`` is None. places: as for ``make_update``.
    """
    if apart is None:
        return lambda number, *given: step(*given)
    update = make_update(apart, total, places)

    def advance(number: int, state: Any, batch: Any, key: jax.Array, constants: Any) -> tuple[Any, Any]:
        new, metrics = step(state._replace(ema=()), batch, key, constants)
        return new._replace(ema=update(state.ema, new.params, key, new.step, number)), metrics

    return advance
