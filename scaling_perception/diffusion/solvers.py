"""Samplers as tables: every solver, schedule, prediction type and grid folded into coefficients of one linear update.

With (alpha, sigma) of the schedule, lambda = log(alpha / sigma) and h the step's rise in lambda,
every solver here starts from the step that holds the clean estimate x0 constant,

    x <- (sigma' / sigma) x + alpha' (1 - exp(-h)) x0        (primes: after the step)

which is DDIM without noise (Song et al. 2021, equation 12, with eps written as (x - alpha x0) / sigma) and the first
order of DPM-Solver++ (Lu et al. 2022, proposition 4.1 with x0 constant). It is computed without lambda, which is
infinite at both ends: at sigma = 0 (the step is then x <- x0 exactly) and, with zero_snr or ``rectified``, at
alpha = 0.

* ``ddim``: this step; for eta > 0 equation 16 of Song et al. gives the variance, and x counts less. On the straight
  path of ``rectified`` it is Euler's method, hence its second name ``euler``.
* ``heun``: Heun's method (`heun_rows`), two evaluations of the network a step but for the last.
* ``ddpm``: draws from the exact posterior q(x' | x, x0) of a step of any length (Ho et al. 2020, equations 6 and 7,
  with beta of the jump, sigma^2 - (alpha / alpha' sigma')^2, in place of beta_t). Mean and ``small`` variance are those
  of ddim with eta = 1; ``large`` takes beta of the jump itself (Ho et al., section 3.2), and nothing where the schedule
  ends.
* ``dpm++2m``: DPM-Solver++(2M), algorithm 2 of Lu et al. 2022: x0 + h / (2 h_last) (x0 - x0_last) takes the place of
  x0. With eta = 1 it is their SDE-DPM-Solver++(2M): the same in the step of ddim with eta.
* ``unipc``: UniPC-2 with B(h) = exp(h) - 1, data prediction (Zhao et al. 2023). The predictor UniP-2 (algorithm 2) is
  then the step of dpm++2m. The corrector UniC (algorithm 1) redoes the last step with the network's output at its end,
  which the next step needs anyhow, and raises the order by one (theorem 3.1): no further call.
* ``single``: one call at t = 999, whatever the preset's grid. An epsilon network is refused: its clean estimate there
  is its error times sigma / alpha, 2e4 with the cosine schedule.

The solvers that look back begin with a step of first order. They end with one where the last step goes to
sigma = 0 (lambda is infinite), and where there are fewer than 15 steps, as the authors of DPM-Solver++ advise.
A leading or linspace grid comes to t = 0 (or 1) before its last step, and it is the step to there, not the last one,
that extrapolates the farthest: it is of first order too where its rise in lambda is above 1.75 times the one before.
On a trailing grid, whose noise falls by 3:2 and 2:1 at its end, that ratio is log 2 / log 1.5 = 1.71.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from scaling_perception.diffusion.caching import CacheRows
from scaling_perception.diffusion.schedules import TRAIN_STEPS, DiffusionPreset, choose_name, timestep_grid
from scaling_perception.support.errors import UserError

if TYPE_CHECKING:
    import jax

VARIANCES = ("small", "large")

_ALIASES = {"euler": "ddim", "ancestral": "ddpm", "dpmpp_2m": "dpm++2m", "dpm++": "dpm++2m", "dpmsolver++": "dpm++2m"}
_FEW_STEPS = 15  # below it, a last step of second order does harm
_TOO_FAR = 1.75  # rise over the one before it, above which the step to t = 0 stays of first order
_AMPLIFIED = 10.0  # a clean estimate that is the network's error times more than this is noise

Column: TypeAlias = "np.ndarray | jax.Array"  # on the host, or inside jit, where one of a row is a scalar


class History(NamedTuple):
    """Coefficients (T,) float32 of a step that looks back; see `SamplerTables`."""

    now_x: Column
    now_start: Column
    now_x0: Column
    now_last: Column
    now_older: Column
    next_last: Column


class SamplerTables(NamedTuple):
    """One row an evaluation of the network, (T,) each; int32 indices and timesteps, float32 coefficients.

    Evaluations are as many as steps but for ``heun`` (`evaluations`).

    With network output o at (x, t):

        x0 = x0_x x + x0_out o, clipped to [-limit, limit]
        x <- next_x x + next_x0 x0 + sigma noise

    and with ``history``, where last and older are x0 of the step before and of the one before that, and start is what
    the step before started from, corrected:

        y = now_x x + now_start start + now_x0 x0 + now_last last + now_older older
        x <- next_x y + next_x0 x0 + next_last last + sigma noise

    ``t_next`` is -1 at the end. ``limit`` is infinite without clipping; the noise estimate is that of the clipped x0,
    because it appears in no other way. ``cache`` says which steps compute the network's blocks
    (`caching`; the denoising function looks at it). One row of a table (this tuple, of scalars) is what
    `sampler.sample` calls the denoising function with.
    """

    index: Column
    t: Column
    t_next: Column
    x0_x: Column
    x0_out: Column
    limit: Column
    next_x: Column
    next_x0: Column
    sigma: Column
    history: History | None = None
    cache: CacheRows | None = None


def sampler_tables(
    preset: DiffusionPreset,
    steps: int,
    eta: float = 0.0,
    grid: tuple[np.ndarray, np.ndarray] | None = None,
    solver: str = "ddim",
    clip: float | None = None,
    variance: str = "small",
    dtype: Any = np.float32,
) -> SamplerTables:
    """The coefficients of a run of ``steps`` steps.

    Tables of the same length, with or without history (``dpm++2m``, ``unipc`` and ``heun`` have it), run in one
    compiled program.

    Args:
        preset: schedule, prediction type and grid.
        steps: 1..1000.
        eta: noise of ddim and dpm++2m: 0 is deterministic, 1 has the variance of ancestral sampling.
        grid: (t, t_next) integer arrays to use in place of the preset's grid; a negative t_next is the end of the
            schedule. For reproducing another sampler's jumps, and with them its orders: only the last step is then
            held at first order, as in diffusers. A solver with history needs each step to start where the last one
            ended.
        solver: a name of `SOLVERS`, described at the top of this module.
        clip: bound of the clean estimate, None for none.
        variance: of ddpm: ``small`` or ``large``.
        dtype: of the coefficients; float64 is for measuring the solvers themselves.

    Returns:
        Host (numpy) arrays: closed over by a jitted function they are constants; passed as arguments they are not, and
        one compilation then serves every preset of the same length.

    Raises:
        UserError: an unknown name, bad steps, eta, clip or grid, or options that do not go together.
    """
    solver = solver_name(solver)
    how = SOLVERS[solver]
    _check(solver, how, steps, eta, grid, clip, choose_name("variance", variance, VARIANCES, {}))
    if how.at_once and preset.prediction == "epsilon":
        raise UserError(
            f"solver '{solver}' asks for the clean picture at t = {TRAIN_STEPS - 1}, where an epsilon model's output "
            "is amplified noise: use another solver with more steps, or a model of v or x0"
        )
    comes_to_zero = grid is None and preset.spacing != "trailing"
    if grid is None:
        spacing = "trailing" if how.at_once else preset.spacing
        grid = timestep_grid(spacing, steps, preset.steps_offset)
    path = _path(preset, np.asarray(grid[0], np.int64), np.maximum(grid[1], -1))
    t, t_next, next_x, next_x0, sigma, history = how.rows(path, Options(eta, variance, comes_to_zero))
    x0_x, x0_out = _estimate(preset.prediction, *(level[t] for level in preset.levels()))
    real, whole = partial(np.asarray, dtype=dtype), partial(np.asarray, dtype=np.int32)
    return SamplerTables(
        index=whole(np.arange(len(t))),
        t=whole(t),
        t_next=whole(t_next),
        x0_x=real(x0_x),
        x0_out=real(x0_out),
        limit=real(np.full(len(t), np.inf if clip is None else clip)),
        next_x=real(next_x),
        next_x0=real(next_x0),
        sigma=real(sigma),
        history=None if history is None else History._make(map(real, history)),
    )


class Path(NamedTuple):
    """A grid's steps: timesteps before and after each, and (alpha, sigma) there, float64 (T,)."""

    t: Int[np.ndarray, " S"]
    t_next: Int[np.ndarray, " S"]
    signal: Float[np.ndarray, " S"]
    noise: Float[np.ndarray, " S"]
    signal_next: Float[np.ndarray, " S"]
    noise_next: Float[np.ndarray, " S"]


class Rows(NamedTuple):
    """Columns of `SamplerTables` that depend on the solver, one row an evaluation."""

    t: Int[np.ndarray, " R"]
    t_next: Int[np.ndarray, " R"]
    next_x: Float[np.ndarray, " R"]
    next_x0: Float[np.ndarray, " R"]
    sigma: Float[np.ndarray, " R"]
    history: History | None


def _path(preset: DiffusionPreset, t: np.ndarray, t_next: np.ndarray) -> Path:
    now, after = [], []
    for level, clean in zip(preset.levels(), (1.0, 0.0), strict=True):
        end = clean if preset.final_alpha_one else level[0]
        now.append(level[t])
        after.append(np.where(t_next < 0, end, level[t_next]))  # level[-1] is read and dropped
    return Path(t, t_next, *now, *after)


def _estimate(prediction: str, signal: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) with x0 = a x + b o for the network's output o at noise level (signal, noise)."""
    zero, one = np.zeros_like(signal), np.ones_like(signal)
    if prediction == "epsilon":
        return 1 / signal, -noise / signal
    if prediction == "velocity":
        return one / (signal + noise), -noise / (signal + noise)
    return (zero, one) if prediction == "x0" else (signal, -noise)


class Options(NamedTuple):
    """What some solvers take: see `sampler_tables`.

    ``comes_to_zero``: the step before the last one ends at t near 0.
    """

    eta: float
    variance: str
    comes_to_zero: bool


def _jump(path: Path) -> np.ndarray:
    """sigma^2 - (alpha / alpha' sigma')^2, the noise that the forward process adds in each step; 0 where it stays."""
    return np.maximum(path.noise**2 - (path.signal / path.signal_next * path.noise_next) ** 2, 0.0)


def ddim_rows(path: Path, options: Options) -> Rows:
    """The step that holds x0 constant; ``eta`` times the posterior's deviation is added as noise."""
    sigma = options.eta * path.noise_next / path.noise * np.sqrt(_jump(path))
    next_x = np.sqrt(np.maximum(path.noise_next**2 - sigma**2, 0.0)) / path.noise
    return Rows(path.t, path.t_next, next_x, path.signal_next - next_x * path.signal, sigma, None)


def ddpm_rows(path: Path, options: Options) -> Rows:
    """A draw from the posterior: ddim's step with eta = 1, whose noise ``large`` replaces by that of the jump."""
    rows = ddim_rows(path, options._replace(eta=1.0))
    if options.variance == "large":
        rows = rows._replace(sigma=np.where(path.t_next < 0, 0.0, np.sqrt(_jump(path))))
    return rows


def multistep_rows(path: Path, options: Options) -> Rows:
    """DPM-Solver++(2M), the step of UniP-2 as well: x0 + h / (2 h_last) (x0 - x0_last) in place of x0."""
    rows, rise = ddim_rows(path, options), _rises(path)
    zero, one = np.zeros_like(rise), np.ones_like(rise)
    more = rows.next_x0 * _second_order(rise, options.comes_to_zero)
    return rows._replace(next_x0=rows.next_x0 + more, history=History(one, zero, zero, zero, zero, -more))


def unipc_rows(path: Path, options: Options) -> Rows:
    """UniP-2's step after UniC's correction of the last one."""
    first, rows = ddim_rows(path, options), multistep_rows(path, options)
    assert rows.history is not None
    corrected = _corrector(first.next_x, first.next_x0, _rises(path))
    return rows._replace(history=corrected._replace(next_last=rows.history.next_last))


def heun_rows(path: Path, options: Options) -> Rows:
    """Two rows a step but for the last, which is of first order: there the schedule ends, and nothing is evaluated.

    Along the path dx = x0 d alpha + eps d sigma. The first row goes with x0 and eps at the step's start, which is
    ddim's step; the second evaluates the network where that led to, and goes again from the start with both's mean:

        x <- x + (x0 + x0') / 2 (alpha' - alpha) + (eps + eps') / 2 (sigma' - sigma)

    On the straight path this is Heun's method in sigma (Karras et al. 2022, algorithm 1), and of second order on any.
    """
    t, t_next, signal, noise, signal_next, noise_next = path
    count, steps = 2 * len(t) - 1, len(t)
    first, second = slice(0, count, 2), slice(1, count, 2)
    rise, fall = (signal_next - signal) / 2, (noise_next - noise) / 2

    def columns(of_first: np.ndarray | float, of_second: np.ndarray | float) -> np.ndarray:
        column = np.zeros(count, np.result_type(of_first, of_second))
        column[first], column[second] = of_first, of_second
        return column

    inner = slice(0, steps - 1)
    with np.errstate(divide="ignore", invalid="ignore"):  # the last step has no second row
        back, ahead = fall / noise, fall / noise_next
        history = History(
            now_x=columns(1.0, ahead[inner]),
            now_start=columns(0.0, 1 + back[inner]),
            now_x0=columns(0.0, (rise - ahead * signal_next)[inner]),
            now_last=columns(0.0, (rise - back * signal)[inner]),
            now_older=np.zeros(count),
            next_last=np.zeros(count),
        )
    next_x = columns(noise_next / noise, 1.0)
    next_x0 = columns(signal_next - noise_next / noise * signal, 0.0)
    return Rows(columns(t, t_next[inner]), columns(t_next, t_next[inner]), next_x, next_x0, np.zeros(count), history)


class Solver(NamedTuple):
    """An entry of `SOLVERS`.

    Attributes:
        rows: the columns of a table for a path, one row an evaluation of the network.
        evaluations: of a run, by its number of steps.
        takes: options other than their defaults that go with it: eta, variance.
        looks_back: each step must start where the last one ended, on a falling grid.
        at_once: one step from t = 999, whatever the grid.
        draws: it adds noise whatever eta is.
    """

    rows: Callable[[Path, Options], Rows]
    evaluations: Callable[[int], int] = int
    takes: tuple[str, ...] = ()
    looks_back: bool = False
    at_once: bool = False
    draws: bool = False


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(ddim_rows, takes=("eta",)),
    "ddpm": Solver(ddpm_rows, takes=("variance",), draws=True),
    "dpm++2m": Solver(multistep_rows, takes=("eta",), looks_back=True),
    "unipc": Solver(unipc_rows, looks_back=True),
    "heun": Solver(heun_rows, evaluations=lambda steps: 2 * steps - 1, looks_back=True),
    "single": Solver(ddim_rows, at_once=True),
}


def solver_name(word: str) -> str:
    """The name in `SOLVERS` that ``word`` is, or is an alias of.

    Raises:
        UserError: it is none.
    """
    return choose_name("solver", word, SOLVERS, _ALIASES)


def evaluations(solver: str, steps: int) -> int:
    """Network evaluations of ``steps`` steps, one for each row of their table: with heun two a step but at the end."""
    return SOLVERS[solver_name(solver)].evaluations(steps)


def _check(solver: str, how: Solver, steps: int, eta: float, grid: Any, clip: float | None, variance: str) -> None:
    def taking(option: str) -> str:
        return " or ".join(name for name, one in SOLVERS.items() if option in one.takes)

    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta {eta}: choose between 0 (deterministic) and 1 (ancestral)")
    if eta and "eta" not in how.takes:
        raise UserError(f"eta {eta} does not go with solver '{solver}': leave it at 0, or choose {taking('eta')}")
    if variance != "small" and "variance" not in how.takes:
        raise UserError(
            f"variance '{variance}' does not go with solver '{solver}': leave it out, or choose {taking('variance')}"
        )
    if clip is not None and not clip > 0:
        raise UserError(f"clip {clip}: give a bound above 0, or None")
    if how.at_once and (steps != 1 or grid is not None):
        raise UserError(f"solver '{solver}' is one step at t = {TRAIN_STEPS - 1}: give 1 step and no grid, not {steps}")
    if grid is None:
        return
    t, t_next = (np.asarray(part) for part in grid)
    fits = t.shape == t_next.shape == (steps,) and steps > 0
    if not (fits and t.min() >= 0 and t.max() < TRAIN_STEPS and (t_next < t).all()):
        raise UserError(f"the grid must be {steps} timesteps t in 0..{TRAIN_STEPS - 1}, and for each t_next below it")
    if how.looks_back and not ((t_next[:-1] == t[1:]).all() and (np.diff(t) < 0).all()):
        raise UserError(f"solver '{solver}' needs a falling grid whose steps start where the last one ended")


def _rises(path: Path) -> np.ndarray:
    """h of each step: the rise in lambda, infinite where there is no signal before it or no noise after it."""
    with np.errstate(divide="ignore"):
        return np.log(path.signal_next / path.signal) + np.log(path.noise / path.noise_next)


def _second_order(rise: np.ndarray, comes_to_zero: bool) -> np.ndarray:
    """h / (2 h_last), the weight of x0 - x0_last; 0 on the steps that stay of first order.

    (Lu et al. 2022, algorithm 2, where r = h_last / h; Zhao et al. 2023, UniP-2 with B(h) = exp(h) - 1 and a = 1 / 2.)
    ``comes_to_zero``: the step before the last one ends at t near 0.
    """
    weight = np.zeros_like(rise)
    last = len(rise) - (len(rise) < _FEW_STEPS or np.isinf(rise[-1]))
    weight[1:last] = rise[1:last] / (2 * rise[: last - 1])
    if comes_to_zero and len(rise) > 2 and rise[-2] > _TOO_FAR * rise[-3]:
        weight[-2] = 0.0
    return weight


def refuse_amplified(tables: SamplerTables) -> SamplerTables:
    """``tables`` (host arrays), unless they are one step whose clean estimate is amplified noise.

    Raises:
        UserError: an epsilon network is asked for the clean picture at once where hardly any of it is left.
    """
    if len(tables.t) == 1 and abs(float(tables.x0_out[0])) > _AMPLIFIED:
        raise UserError(
            f"one step at t = {int(tables.t[0])} multiplies the error of an epsilon model by "
            f"{abs(float(tables.x0_out[0])):,.0f}: take more steps, or a model of v or x0"
        )
    return tables


def _corrector(next_x: np.ndarray, next_x0: np.ndarray, rise: np.ndarray) -> History:
    """UniC-1 in the second row, UniC-2 after it (Zhao et al. 2023, algorithm 1); the first row has nothing to correct.

    With the step of first order y = a start + b last from the row before, and m the new estimate, it is

        y = a start + b (last + rho (older - last) / r + rho_m (m - last)),  r = -h_older / h

    where rho and rho_m solve the two equations of theorem 3.1 (rho_m = 1/2, rho = 0 for UniC-1). The estimates may lie
    infinitely far back (zero_snr): what they contribute is then 0.
    """
    a, b, h = next_x[:-1], next_x0[:-1], rise[:-1]
    rho_m, rho_r = np.full_like(h, 0.5), np.zeros_like(h)  # rho_r = rho / r
    z = -h[1:]
    growth = np.expm1(z)
    first = growth / z - 1  # z phi_2(z) and z phi_3(z), where z phi_1(z) = exp(z) - 1 = B
    second = first / z - 1 / 2
    conditions = first / growth, 2 * second / growth
    r = h[:-1] / z
    rho = (conditions[0] - conditions[1]) / (1 - r)
    rho_m[1:], rho_r[1:] = conditions[0] - rho, rho / r
    zero, one = np.zeros(1), np.ones(1)
    return History(
        now_x=np.concatenate([one, np.zeros_like(h)]),
        now_start=np.concatenate([zero, a]),
        now_x0=np.concatenate([zero, b * rho_m]),
        now_last=np.concatenate([zero, b * (1 - rho_r - rho_m)]),
        now_older=np.concatenate([zero, b * rho_r]),
        next_last=np.zeros_like(rise),
    )
