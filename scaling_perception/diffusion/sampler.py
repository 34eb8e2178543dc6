"""DDIM as one table and one scan (Song et al. 2021, equation 12).

Every prediction type, schedule and grid is folded on the host, in float64, into coefficients of one linear update. The
traced code is therefore the same for all of them: it holds no schedule, takes no root and divides by nothing, so
float32 meets neither 1 - alpha_bar nor the 2.4e-9 at which the cosine schedule ends. The only large number left is
1 / sqrt(alpha_bar_999) = 2e4 of epsilon prediction on a trailing grid, which belongs to the method (see `schedules`).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np

from scaling_perception.diffusion.schedules import DiffusionPreset, timestep_grid
from scaling_perception.support.errors import UserError

Table = Any  # a numpy array on the host, a jax array inside jit


class SamplerTables(NamedTuple):
    """One row a step, (T,) each; int32 timesteps and float32 coefficients.

    With network output o at (x, t): x0 = x0_x x + x0_out o, eps = eps_x x + eps_out o, and
    x <- next_x0 x0 + next_eps eps + sigma noise. ``t_next`` is -1 at the end.
    """

    t: Table
    t_next: Table
    x0_x: Table
    x0_out: Table
    eps_x: Table
    eps_out: Table
    next_x0: Table
    next_eps: Table
    sigma: Table


def sampler_tables(
    preset: DiffusionPreset, steps: int, eta: float = 0.0, grid: tuple[np.ndarray, np.ndarray] | None = None
) -> SamplerTables:
    """The coefficients of a DDIM run of ``steps`` steps.

    Args:
        preset: schedule, prediction type and grid.
        steps: 1..1000.
        eta: 0 is deterministic, 1 has the variance of ancestral sampling.
        grid: (t, t_next) integer arrays to use in place of the preset's grid; a negative t_next is the end of the
            schedule. For reproducing another sampler's jumps.

    Returns:
        Host (numpy) arrays: closed over by a jitted function they are constants; passed as arguments they are not, and
        one compilation then serves every preset of the same length.

    Raises:
        UserError: bad steps or eta.
    """
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta {eta}: choose between 0 (deterministic) and 1 (ancestral)")
    t, t_next = timestep_grid(preset.spacing, steps, preset.steps_offset) if grid is None else map(np.asarray, grid)
    table = preset.alphas_cumprod()
    end = 1.0 if preset.final_alpha_one else table[0]
    t_next = np.maximum(t_next, -1)
    now = table[t]
    after = np.where(t_next < 0, end, table[t_next])  # table[-1] is read and dropped
    signal, noise = np.sqrt(now), np.sqrt(1 - now)
    zero, one = np.zeros_like(now), np.ones_like(now)
    if preset.prediction == "epsilon":
        x0_x, x0_out, eps_x, eps_out = 1 / signal, -noise / signal, zero, one
    elif preset.prediction == "x0":
        x0_x, x0_out, eps_x, eps_out = zero, one, 1 / noise, -signal / noise
    else:
        x0_x, x0_out, eps_x, eps_out = signal, -noise, noise, signal
    # A step that stays at its noise level (t = 0 to alpha_bar_0) has no variance; rounding must not make it negative.
    sigma = eta * np.sqrt(np.maximum((1 - after) / (1 - now) * (1 - now / after), 0.0))
    direction = np.sqrt(np.maximum(1 - after - sigma**2, 0.0))
    reals = (x0_x, x0_out, eps_x, eps_out, np.sqrt(after), direction, sigma)
    return SamplerTables(t.astype(np.int32), t_next.astype(np.int32), *(column.astype(np.float32) for column in reals))


Denoise = Callable[[jax.Array, jax.Array], jax.Array]


@overload
def ddim_sample(
    denoise: Denoise,
    tables: SamplerTables,
    x_T: jax.Array,
    noise: jax.Array | None = None,
    return_trajectory: Literal[False] = False,
) -> jax.Array: ...


@overload
def ddim_sample(
    denoise: Denoise,
    tables: SamplerTables,
    x_T: jax.Array,
    noise: jax.Array | None = None,
    *,
    return_trajectory: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


def ddim_sample(
    denoise: Denoise,
    tables: SamplerTables,
    x_T: jax.Array,
    noise: jax.Array | None = None,
    return_trajectory: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Sample with one ``lax.scan`` over the tables.

    Use it inside ``jax.jit`` with weights, images and keys as arguments (``denoise`` closing over the traced values):
    changing them never compiles again; only the shapes and the number of steps do.

    Args:
        denoise: (x float32 (...), t int32 ()) -> the network's output, of x's shape (any float dtype).
        tables: from `sampler_tables`.
        x_T: (...) starting noise, any batch shape (members and images may share the leading axes).
        noise: (T, ...) the noise of each step, needed when the tables were made with eta > 0.
        return_trajectory: also return the clean estimate of every step.

    Returns:
        x, float32 (...); or (x, x0 estimates float32 (T, ...)).

    Raises:
        ValueError: eta > 0 without noise (seen when the tables are host arrays), or a noise of another shape.
    """
    steps = tables.t.shape[0]
    if noise is None and isinstance(tables.sigma, np.ndarray) and tables.sigma.any():
        raise ValueError("the tables were made with eta > 0: give the noise of each step")
    if noise is not None and noise.shape != (steps, *x_T.shape):
        raise ValueError(f"noise has shape {noise.shape}; {steps} steps of {x_T.shape} need {(steps, *x_T.shape)}")

    def step(x: jax.Array, row: tuple[SamplerTables, jax.Array | None]) -> tuple[jax.Array, jax.Array | None]:
        at, fresh = row
        out = denoise(x, at.t)
        if out.shape != x.shape:
            raise ValueError(f"the network returned {out.shape} for an input of {x.shape}")
        out = out.astype(jnp.float32)
        x0 = at.x0_x * x + at.x0_out * out
        eps = at.eps_x * x + at.eps_out * out
        x = at.next_x0 * x0 + at.next_eps * eps
        if fresh is not None:
            x = x + at.sigma * fresh.astype(jnp.float32)
        return x, x0 if return_trajectory else None

    table = SamplerTables(*(jnp.asarray(column) for column in tables))
    x, trajectory = jax.lax.scan(step, jnp.asarray(x_T, jnp.float32), (table, noise))
    return x if trajectory is None else (x, trajectory)
