"""One scan over the rows of a sampler's table (see `solvers` for what the rows hold).

The traced code is the same for every schedule, prediction type, grid and noise level: it holds no schedule, takes no
root and divides by nothing, so float32 meets neither 1 - alpha_bar nor the 2.4e-9 at which the cosine schedule ends.
The only large number left is 1 / sqrt(alpha_bar_999) = 2e4 of epsilon prediction on a trailing grid, which belongs to
the method (see `schedules`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np

from scaling_perception.diffusion.solvers import SamplerTables, sampler_tables
from scaling_perception.support.shapes import AnyArray, Array, Float, Int

__all__ = ["SamplerTables", "State", "advance", "ddim_sample", "final_memory", "sample", "sampler_tables"]
__all__ += ["start_state"]

Denoise = Callable[..., Any]  # (x, row) -> output, or with memory (x, row, memory) -> (output, memory)
Noise = Float[AnyArray, "S ..."] | Callable[[SamplerTables], Array] | None


class State(NamedTuple):
    """What travels from step to step. Every array has the shape of x, so rows of a batch may be taken out of all alike.

    Attributes:
        x: the noisy sample; after the last step the result.
        x0: the clean estimate of the last step; before the first one, and so for the two below, x.
        older, start: x0 of the step before, and what the last step started from; None for tables without history.
    """

    x: Float[Array, "*shape"]
    x0: Float[Array, "*shape"]
    older: Float[Array, "*shape"] | None = None
    start: Float[Array, "*shape"] | None = None


@overload
def sample(
    denoise: Denoise,
    tables: SamplerTables,
    x_T: Float[AnyArray, "*shape"],
    noise: Noise = None,
    keep: None = None,
    memory: Any = None,
) -> Float[Array, "*shape"]: ...


@overload
def sample(
    denoise: Denoise,
    tables: SamplerTables,
    x_T: Float[AnyArray, "*shape"],
    noise: Noise = None,
    *,
    keep: Sequence[int],
    memory: Any = None,
) -> tuple[Float[Array, "*shape"], Float[Array, " K *shape"]]: ...


def sample(
    denoise: Denoise,
    tables: SamplerTables,
    x_T: Float[AnyArray, "*shape"],
    noise: Noise = None,
    keep: Sequence[int] | None = None,
    memory: Any = None,
) -> Float[Array, "*shape"] | tuple[Float[Array, "*shape"], Float[Array, " K *shape"]]:
    """Sample with one ``lax.scan`` over the tables.

    Use it inside ``jax.jit`` with tables, weights, images and keys as arguments (``denoise`` closing over the traced
    values): changing them never compiles again; only the shapes, the number of steps, ``keep`` and whether the tables
    have history do.

    Args:
        denoise: (x (...), row) -> the network's output, of x's shape (any float dtype). ``row`` is a `SamplerTables` of
            scalars: ``row.t`` is the timestep, ``row.index`` the number of the step, for looking up what was computed
            for each step ahead of the scan.
        tables: from `sampler_tables`.
        x_T: (...) starting noise, any batch shape (members and images may share the leading axes). The sampler computes
            in float32, or in float64 if x_T is.
        noise: (T, ...) the noise of each step, or row -> (...) to draw it step by step; needed when the tables add
            noise.
        keep: the numbers of some steps, all different (-1 is the last one): their clean estimates are returned, too.
            They alone take memory.
        memory: arrays that ``denoise`` carries from step to step: it is then called as (x, row, memory) and returns
            (output, memory).

    Returns:
        x, (...); or (x, clean estimates (K, ...) in the order of ``keep``).

    Raises:
        ValueError: tables that add noise and none given (seen when they are host arrays), noise or network output of
            another shape than x_T asks for, or steps to keep that are not there.
    """
    state = start_state(tables, x_T)
    if keep is None:
        return _scan(denoise, tables, state, noise, memory=memory)[0].x
    steps = len(tables.t)
    wanted = [step + steps if step < 0 else step for step in map(int, keep)]
    if len(set(wanted)) < len(wanted) or not set(wanted) <= set(range(steps)):
        raise ValueError(f"cannot keep the estimates of steps {list(keep)}: give different steps in 0..{steps - 1}")
    slots = np.full(steps, len(wanted), np.int32)  # one past the end: not kept
    slots[wanted] = np.arange(len(wanted))
    room = jnp.broadcast_to(state.x, (len(wanted), *state.x.shape))
    state, kept, _ = _scan(denoise, tables, state, noise, slots, room, memory)
    assert kept is not None
    return state.x, kept


def final_memory(
    denoise: Denoise, tables: SamplerTables, x_T: Float[AnyArray, "*shape"], noise: Noise, memory: Any
) -> Any:
    """What ``denoise`` carries after the last step of `sample`."""
    return _scan(denoise, tables, start_state(tables, x_T), noise, memory=memory)[2]


def start_state(tables: SamplerTables, x_T: Float[AnyArray, "*shape"]) -> State:
    """The state before the first step, from noise (...); ``tables`` only decide whether it has a history."""
    x = jnp.asarray(x_T, jnp.result_type(x_T, jnp.float32))
    return State(x, x) if tables.history is None else State(x, x, x, x)


def advance(
    denoise: Denoise,
    tables: SamplerTables,
    state: State,
    first: int | Int[AnyArray, ""],
    count: int,
    noise: Noise = None,
) -> State:
    """Run steps ``first`` to ``first + count - 1``, so that a caller can look at the clean estimates in between.

    A step's arithmetic does not depend on the piece it is in: pieces give what one run gives, bit for bit where the
    compiler treats both alike (as it does on CPUs). ``denoise`` and ``tables`` as in `sample`.

    Args:
        state: from `start_state` or an earlier call; samples that need no more steps may have been dropped from it.
        first: may be traced: one compilation serves every piece of ``count`` steps.
        count: static.
        noise: (count, ...) of these steps, or row -> (...).

    Raises:
        ValueError: as `sample`, or a host ``first`` and ``count`` outside the table.
    """
    steps = len(tables.t)
    if isinstance(first, (int, np.integer)) and not 0 <= first <= first + count <= steps:
        raise ValueError(f"steps {first}..{first + count - 1} are not in a table of {steps}")
    _needs_noise(tables, noise)
    rows = jax.tree.map(lambda column: jax.lax.dynamic_slice_in_dim(jnp.asarray(column), first, count), tables)
    return _scan(denoise, rows, state, noise)[0]


def ddim_sample(
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
    tables: SamplerTables,
    x_T: Float[AnyArray, "*shape"],
    noise: Noise = None,
    return_trajectory: bool = False,
) -> Float[Array, "*shape"] | tuple[Float[Array, "*shape"], Float[Array, " S *shape"]]:
    """`sample` for a network that wants the timestep alone: denoise (x, t int32 ()).

    Returns:
        x; with ``return_trajectory`` (x, clean estimates of all steps (T, ...)).
    """
    keep = range(len(tables.t)) if return_trajectory else None
    whole: Any = sample  # its two forms
    return whole(lambda x, row: denoise(x, row.t), tables, x_T, noise, keep=keep)


def _needs_noise(tables: SamplerTables, noise: Noise) -> None:
    if noise is None and isinstance(tables.sigma, np.ndarray) and tables.sigma.any():
        raise ValueError("the tables add noise (eta > 0, or ddpm): give the noise of each step")


def _scan(
    denoise: Denoise,
    tables: SamplerTables,
    state: State,
    noise: Noise,
    slots: np.ndarray | None = None,
    kept: jax.Array | None = None,
    memory: Any = None,
) -> tuple[State, jax.Array | None, Any]:
    """All rows of the tables; ``kept[slots[i]]`` becomes the clean estimate of row i, where there is such a slot.
    ``memory`` is what ``denoise`` carries."""
    steps, shape, dtype = len(tables.t), state.x.shape, state.x.dtype
    _needs_noise(tables, noise)
    if (state.older is None) != (tables.history is None):
        raise ValueError("the state was started for another kind of solver than the tables are for")
    array = None if callable(noise) else noise
    if array is not None and array.shape != (steps, *shape):
        raise ValueError(f"noise has shape {array.shape}; {steps} steps of {shape} need {(steps, *shape)}")

    def step(carry: Any, row: Any) -> tuple[Any, None]:
        (state, kept, memory), (at, fresh, slot) = carry, row
        if memory is None:
            out = denoise(state.x, at)
        else:
            out, memory = denoise(state.x, at, memory)
        if out.shape != shape:
            raise ValueError(f"the network returned {out.shape} for an input of {shape}")
        x0 = jnp.clip(at.x0_x * state.x + at.x0_out * out.astype(dtype), -at.limit, at.limit)
        if at.history is None:
            state = State(at.next_x * state.x + at.next_x0 * x0, x0)
        else:
            past, last = at.history, state.x0
            y = past.now_x * state.x + past.now_start * state.start
            y = y + past.now_x0 * x0 + past.now_last * last + past.now_older * state.older
            state = State(at.next_x * y + at.next_x0 * x0 + past.next_last * last, x0, last, y)
        fresh = noise(at) if callable(noise) else fresh
        if fresh is not None:
            state = state._replace(x=state.x + at.sigma * fresh.astype(dtype))
        if kept is not None:
            kept = kept.at[slot].set(x0, mode="drop")
        return (state, kept, memory), None

    def column(values: Any) -> jax.Array:
        return jnp.asarray(values, dtype if jnp.issubdtype(values.dtype, jnp.floating) else jnp.int32)

    rows = (jax.tree.map(column, tables), array, slots)
    return jax.lax.scan(step, (state, kept, memory), rows)[0]
