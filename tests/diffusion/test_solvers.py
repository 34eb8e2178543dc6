"""The solvers against closed forms on Gaussian data, and against diffusers where the conventions are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_perception.diffusion.sampler import sample, sampler_tables
from scaling_perception.diffusion.schedules import DiffusionPreset, get_diffusion, timestep_grid
from scaling_perception.diffusion.solvers import SOLVERS, evaluations
from scaling_perception.inference.settings import Settings
from scaling_perception.support.errors import UserError

# Data N(MEAN, SPREAD^2), each coordinate by itself.
MEAN, SPREAD = np.array([0.7, -0.3, 1.5]), np.array([0.5, 1.3, 0.2])
RECTIFIED = {"schedule": "rectified", "prediction": "velocity"}
COSINES = np.cos(np.arange(1000) / 1000.0).astype(np.float32)


def gaussian_tables(preset):
    """The exact denoiser of the Gaussian data, E[x0 | x], by timestep: its gain and offset, and the preset's output."""
    signal, noise = (level[:, None] for level in preset.levels())
    gain = signal * SPREAD**2 / (signal**2 * SPREAD**2 + noise**2)
    of_x0, of_eps = {"epsilon": (0, 1), "x0": (1, 0), "v": (-noise, signal), "velocity": (-1, 1)}[preset.prediction]
    # out = of_x0 x0 + of_eps (x - signal x0) / noise with x0 = gain x + (1 - gain signal) MEAN
    share = of_x0 - of_eps * signal / noise
    return of_eps / noise + share * gain, share * (1 - gain * signal) * MEAN


@jax.jit
def gaussian_run(tables, network, x, key=None):
    def draw(row):
        return jax.random.normal(jax.random.fold_in(key, row.index), x.shape, x.dtype)

    slope, offset = (jnp.asarray(part, x.dtype) for part in network)
    shape = (1,) * (x.ndim - 1) + (-1,)
    denoise = lambda x, row: slope[row.t].reshape(shape) * x + offset[row.t].reshape(shape)  # noqa: E731
    return sample(denoise, tables, x, None if key is None else draw)


def on_the_path(preset, t, z):
    """Where the probability-flow ODE is at timestep t: z, the deviations from the mean, stays."""
    signal, noise = (level[t] for level in preset.levels())
    return signal * MEAN + np.sqrt(signal**2 * SPREAD**2 + noise**2) * z


@pytest.mark.parametrize(
    "schedule, prediction",
    [("linear", "epsilon"), ("scaled_linear", "x0"), ("cosine", "v"), ("rectified", "velocity")],
)
def test_the_order_of_convergence_is_1_2_and_3(schedule, prediction):
    """From t = 900 to t = 100 in equal jumps, in float64. UniPC-2's corrector makes it third order."""
    preset = DiffusionPreset(schedule, prediction)
    begin, end = (on_the_path(preset, t, np.array([1.3, -0.8, 0.4])) for t in (900, 100))
    errors = {solver: [] for solver in ("ddim", "dpm++2m", "unipc")}
    with jax.enable_x64(True):
        for steps in (10, 40, 80, 160):
            t = np.arange(900, 100, -800 // steps)
            for solver, found in errors.items():
                tables = sampler_tables(preset, steps, grid=(t, t - 800 // steps), solver=solver, dtype=np.float64)
                found.append(np.abs(gaussian_run(tables, gaussian_tables(preset), jnp.asarray(begin)) - end).max())
    slopes = {solver: -np.polyfit([0, 1, 2], np.log2(found[1:]), 1)[0] for solver, found in errors.items()}
    assert 0.95 < slopes["ddim"] < 1.05, errors
    assert 1.85 < slopes["dpm++2m"] < 2.05, errors
    assert 2.7 < slopes["unipc"] < 3.05, errors
    assert all(third < second < first / 2 for first, second, third in zip(*errors.values(), strict=True)), errors


@pytest.mark.parametrize(
    "changes",
    [{}, {"zero_snr": True}, {"zero_snr": True, "schedule": "linear"}, {"prediction": "x0"}, RECTIFIED],
)
def test_whole_runs_end_at_the_data_and_higher_order_gets_there_sooner(changes):
    """In float32 from pure noise to alpha_bar = 1; with zero_snr lambda is infinite at both ends."""
    preset = get_diffusion("fixed", **changes)
    z = np.array([1.3, -0.8, 0.4])
    begin = jnp.asarray(on_the_path(preset, 999, z), jnp.float32)

    def error(solver, steps):
        x = gaussian_run(sampler_tables(preset, steps, solver=solver), gaussian_tables(preset), begin)
        return np.abs(x - (MEAN + SPREAD * z)).max()

    assert error("ddim", 50) < 0.05
    for solver in ("dpm++2m", "unipc"):
        assert error(solver, 2) <= 1.001 * error("ddim", 2)
        assert error(solver, 3) <= 1.001 * error("ddim", 3)
        assert error(solver, 50) < 0.15 * error("ddim", 50)


def test_euler_on_the_straight_path():
    """ddim's step is x + (sigma' - sigma) velocity there, and its other name is euler."""
    preset = get_diffusion("rectified")
    tables = sampler_tables(preset, 5, solver="euler", dtype=np.float64)
    jax.tree.map(np.testing.assert_array_equal, tables, sampler_tables(preset, 5, dtype=np.float64))
    x, velocity = 0.37, -1.9
    for i, sigma in enumerate((1.0, 0.8, 0.6, 0.4, 0.2)):
        x0 = tables.x0_x[i] * x + tables.x0_out[i] * velocity
        assert x0 == pytest.approx(x - sigma * velocity, rel=1e-12)
        assert tables.next_x[i] * x + tables.next_x0[i] * x0 == pytest.approx(x - 0.2 * velocity, rel=1e-12)


def heun_by_hand(preset, steps, network, x):
    """Heun's method in sigma on the straight path, as Karras et al. 2022 write it (algorithm 1), in float64."""
    slope, offset = network
    sigmas = np.append(np.arange(steps, 0, -1), 0) / steps

    def velocity(x, sigma):
        t = round(1000 * sigma) - 1
        return slope[t] * x + offset[t]

    for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        first = velocity(x, now)
        guess = x + (after - now) * first
        x = x + (after - now) * (first if after == 0 else (first + velocity(guess, after)) / 2)
    return x


def test_heun_is_heun_on_the_straight_path_and_of_second_order_on_any():
    preset, begin = get_diffusion("rectified"), np.array([1.3, -0.8, 0.4])
    with jax.enable_x64(True):
        for steps in (1, 2, 5, 20):
            tables = sampler_tables(preset, steps, solver="heun", dtype=np.float64)
            assert len(tables.t) == evaluations("heun", steps) == 2 * steps - 1
            got = gaussian_run(tables, gaussian_tables(preset), jnp.asarray(begin))
            np.testing.assert_allclose(got, heun_by_hand(preset, steps, gaussian_tables(preset), begin), rtol=1e-10)
        for preset in (get_diffusion("rectified"), get_diffusion("fixed"), get_diffusion("fixed", prediction="x0")):
            begin, end = (on_the_path(preset, t, np.array([1.3, -0.8, 0.4])) for t in (900, 100))
            errors = []
            for steps in (20, 40, 80, 160):
                t = np.arange(900, 100, -800 // steps)
                grid = (t, t - 800 // steps)
                tables = sampler_tables(preset, steps, grid=grid, solver="heun", dtype=np.float64)
                errors.append(np.abs(gaussian_run(tables, gaussian_tables(preset), jnp.asarray(begin)) - end).max())
            slope = -np.polyfit(range(3), np.log2(errors[1:]), 1)[0]
            # its last step is of first order, which costs an error of h^2 at most: one step of length h
            assert 1.85 < slope < 2.2, (preset, errors)


def test_both_solvers_of_second_order_predict_alike():
    """UniP-2 with B(h) = exp(h) - 1 is the step of DPM-Solver++(2M), so only the correction sets them apart."""
    first, second = (sampler_tables(get_diffusion("fixed"), 20, solver=solver) for solver in ("dpm++2m", "unipc"))
    for name in ("next_x", "next_x0"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    np.testing.assert_array_equal(first.history.next_last, second.history.next_last)
    assert (first.history.now_x == 1).all() and (second.history.now_x[1:] == 0).all()
    # A correction of estimates that do not change is none: the weights of the estimates add up to those of one.
    past = second.history
    total = past.now_x0[1:] + past.now_last[1:] + past.now_older[1:]
    np.testing.assert_allclose(total, sampler_tables(get_diffusion("fixed"), 20).next_x0[:-1], rtol=1e-5)


def test_the_ends_of_the_schedule():
    for solver in ("dpm++2m", "unipc"):
        tables = sampler_tables(get_diffusion("fixed"), 20, solver=solver)
        assert (tables.next_x[-1], tables.next_x0[-1], tables.history.next_last[-1]) == (0, 1, 0)  # x = x0 exactly
        assert tables.history.next_last[0] == 0 and (tables.history.next_last[1:-1] < 0).all()
        for steps, order in ((14, 0), (15, 1)):  # to alpha_bar_0: lambda is finite, and few steps end with first order
            preset = get_diffusion("fixed", final_alpha_one=False)
            assert np.count_nonzero(sampler_tables(preset, steps, solver=solver).history.next_last[-1]) == order
        for steps in (1, 2, 3, 20, 1000):  # alpha_bar_999 = 0: what came before it is infinitely far back
            tables = sampler_tables(get_diffusion("fixed", zero_snr=True), steps, solver=solver)
            assert all(np.isfinite(column).all() for column in [*tables[:5], *tables[6:9], *tables.history])
            assert tables.x0_x[0] == 0 and tables.x0_out[0] == -1
            assert steps < 3 or tables.history.next_last[1] == 0
        # The released grid ends with a step from t = 1 to alpha_bar_0; at offset 0 that step stands still.
        still = sampler_tables(get_diffusion("released", steps_offset=0), 50, solver=solver)
        assert (still.t[-1], still.next_x[-1], still.next_x0[-1], still.history.next_last[-1]) == (0, 1, 0, 0)


@pytest.mark.parametrize("name", ["fixed", "paper"])
def test_one_step_of_every_solver_is_the_same(name):
    preset, x = get_diffusion(name), jnp.linspace(-2, 2, 12).reshape(2, 6)
    run = jax.jit(lambda tables: sample(lambda x, row: jnp.tanh(x), tables, x, noise=lambda row: jnp.ones_like(x)))
    wanted = run(sampler_tables(preset, 1))
    for solver in ("ddpm", "dpm++2m", "unipc", "heun"):
        tables = sampler_tables(preset, 1, solver=solver)
        assert all(np.array_equal(a, b) for a, b in zip(tables[:9], sampler_tables(preset, 1)[:9], strict=True))
        np.testing.assert_allclose(run(tables), wanted, rtol=1e-6)


def test_single_is_one_call_at_the_noisy_end_on_any_grid():
    tables = sampler_tables(get_diffusion("released"), 1, solver="single")
    assert tables.t == [999] and tables.t_next == [-1]
    trailing = sampler_tables(get_diffusion("released", spacing="trailing"), 1)
    assert all(np.array_equal(one, other) for one, other in zip(tables[:-1], trailing[:-1], strict=True))


# A mixture of two normals in one dimension: its exact clean estimate, and the ODE that the solvers approximate.
SHARES, CENTRES, WIDTHS = np.array([0.3, 0.7]), np.array([-1.5, 0.8]), np.array([0.25, 0.4])


def mixture_x0(x, alpha_bar):
    """E[x0 | x], (N,), in closed form."""
    variance = alpha_bar * WIDTHS**2 + 1 - alpha_bar
    away = x[:, None] - np.sqrt(alpha_bar) * CENTRES
    log = np.log(SHARES) - 0.5 * np.log(variance) - 0.5 * away**2 / variance
    odds = np.exp(log - log.max(axis=1, keepdims=True))
    means = CENTRES + np.sqrt(alpha_bar) * WIDTHS**2 / variance * away
    return (odds * means).sum(axis=1) / odds.sum(axis=1)


def mixture_flow(x, alpha_bar, pieces=3000):
    """Where the probability-flow ODE takes x from ``alpha_bar`` to the data: midpoint rule in the log of the SNR."""
    edges = np.linspace(0.5 * np.log(alpha_bar / (1 - alpha_bar)), 9.0, pieces + 1)

    def step(x, begin, end, x0):
        noises = [1 / np.sqrt(1 + np.exp(2 * edge)) for edge in (begin, end)]
        return noises[1] / noises[0] * x - np.sqrt(1 - noises[1] ** 2) * np.expm1(begin - end) * x0

    def level(edge):
        return 1 / (1 + np.exp(-2 * edge))

    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        middle = (begin + end) / 2
        half = step(x, begin, middle, mixture_x0(x, level(begin)))
        x = step(x, begin, end, mixture_x0(half, level(middle)))
    return mixture_x0(x, level(edges[-1]))


def mixture_run(preset, tables, x):
    """The tables of a run on the mixture, as `SamplerTables` describes them, in float64."""
    levels, last, older, start = preset.alphas_cumprod()[tables.t], np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    for i, level in enumerate(levels):
        x0 = mixture_x0(x, level)
        if tables.history is None:
            x = tables.next_x[i] * x + tables.next_x0[i] * x0
            continue
        past = type(tables.history)(*(column[i] for column in tables.history))
        y = past.now_x * x + past.now_start * start + past.now_x0 * x0 + past.now_last * last + past.now_older * older
        x = tables.next_x[i] * y + tables.next_x0[i] * x0 + past.next_last * last
        last, older, start = x0, last, y
    return x


@pytest.mark.parametrize(
    ("name", "spacing", "steps"),
    [("paper", "leading", 5), ("paper", "leading", 10), ("released", "leading", 7), ("paper", "linspace", 10)],
)
def test_second_order_is_better_than_first_on_grids_that_come_to_zero(name, spacing, steps):
    """On the step to t = 0 it used to extrapolate three to five times as far as it could see."""
    preset = get_diffusion(name, spacing=spacing)
    begin = np.random.default_rng(0).standard_normal(64)
    first = timestep_grid(spacing, steps, preset.steps_offset)[0][0]
    exact = mixture_flow(begin, preset.alphas_cumprod()[first])

    def error(solver):
        tables = sampler_tables(preset, steps, solver=solver, dtype=np.float64)
        return np.sqrt(np.mean((mixture_run(preset, tables, begin) - exact) ** 2))

    errors = {solver: error(solver) for solver in ("ddim", "dpm++2m", "unipc")}
    assert errors["dpm++2m"] < 0.75 * errors["ddim"] and errors["unipc"] < 0.75 * errors["ddim"], errors


def test_trailing_grids_and_the_grids_of_other_samplers_keep_their_orders():
    for steps in (2, 3, 5, 10, 14, 15, 50, 667, 1000):
        for solver in ("dpm++2m", "unipc"):
            own = sampler_tables(get_diffusion("fixed"), steps, solver=solver)
            given = sampler_tables(get_diffusion("fixed"), steps, grid=timestep_grid("trailing", steps), solver=solver)
            jax.tree.map(np.testing.assert_array_equal, own, given)
    paper, grid = get_diffusion("paper"), timestep_grid("leading", 20)
    own, given = sampler_tables(paper, 20, solver="unipc"), sampler_tables(paper, 20, grid=grid, solver="unipc")
    differing = np.flatnonzero(own.history.next_last != given.history.next_last)
    assert differing.tolist() == [18] and own.history.next_last[18] == 0 and own.t_next[18] == 0


def test_one_step_that_returns_amplified_noise_is_refused():
    """An epsilon model at t = 999: its clean estimate is its error, times 2.0e4 with the cosine schedule."""
    with pytest.raises(UserError, match="single.*amplified noise"):
        sampler_tables(get_diffusion("paper"), 1, solver="single")
    with pytest.raises(UserError, match="t = 999 multiplies the error of an epsilon model by 20,") as caught:
        Settings(steps=1).tables(get_diffusion("paper", spacing="trailing"))
    assert "\n" not in str(caught.value)
    for preset in (get_diffusion("paper"), get_diffusion("fixed"), get_diffusion("released")):
        assert len(Settings(steps=1).tables(preset).t) == 1


# Noise


def test_ancestral_sampling_has_the_mean_and_variance_of_its_chain():
    """Gaussian data and an exact denoiser make every step Gaussian: mean and variance follow by recursion."""
    preset, steps, count = get_diffusion("fixed"), 10, 40_000
    alpha_bar = np.append(preset.alphas_cumprod(), 1.0)  # the last element is the end, as t_next = -1
    t, t_next = timestep_grid("trailing", steps)

    begin = jax.random.normal(jax.random.key(0), (count, len(MEAN)))

    for variance in ("small", "large"):
        tables = sampler_tables(preset, steps, solver="ddpm", variance=variance)
        mean, var = np.zeros(3), np.ones(3)
        for now, after in zip(alpha_bar[t], alpha_bar[t_next], strict=True):
            beta = 1 - now / after
            of_x, of_x0 = np.sqrt(now / after) * (1 - after) / (1 - now), np.sqrt(after) * beta / (1 - now)
            slope = np.sqrt(now) * SPREAD**2 / (now * SPREAD**2 + 1 - now)
            added = beta * (1 - after) / (1 - now) if variance == "small" else beta * (after < 1)
            mean = of_x * mean + of_x0 * (MEAN + slope * (mean - np.sqrt(now) * MEAN))
            var = (of_x + of_x0 * slope) ** 2 * var + added
        x = np.asarray(gaussian_run(tables, gaussian_tables(preset), begin, jax.random.key(1)), np.float64)
        assert (np.abs(x.mean(0) - mean) < 5 * np.sqrt(var / count)).all()
        assert (np.abs(x.var(0) / var - 1) < 5 * np.sqrt(2 / count)).all()
        same = sampler_tables(preset, steps, eta=1.0)
        assert all(np.array_equal(a, b) for a, b in zip(tables[:8], same[:8], strict=True))
        assert np.array_equal(tables.sigma, same.sigma) == (variance == "small")


def test_ancestral_variances_enclose_the_data_and_close_in_on_it():
    """The small variance is exact for data of one point, the large one for N(0, 1) (Ho et al. 2020, section 3.2)."""
    preset, spread = get_diffusion("fixed", prediction="x0"), 0.5
    widths = {}
    for steps in (50, 1000):
        for variance in ("small", "large"):
            tables = sampler_tables(preset, steps, solver="ddpm", variance=variance, dtype=np.float64)
            now, var = preset.alphas_cumprod()[tables.t], 1.0
            slopes = np.sqrt(now) * spread**2 / (now * spread**2 + 1 - now)
            for of_x, of_x0, slope, sigma in zip(tables.next_x, tables.next_x0, slopes, tables.sigma, strict=True):
                var = (of_x + of_x0 * slope) ** 2 * var + sigma**2
            widths[variance, steps] = np.sqrt(var)
    assert widths["small", 50] < widths["small", 1000] < spread < widths["large", 1000] < widths["large", 50]
    assert widths["large", 1000] - widths["small", 1000] < 0.02


# Diffusers


@pytest.fixture(scope="module")
def libraries(torch):
    return torch, pytest.importorskip("diffusers")


@jax.jit
def analytic_run(tables, x, noise):
    cosines = jnp.asarray(COSINES)
    return sample(lambda x, row: jnp.tanh(x) * cosines[row.t], tables, x, noise)


def reference_run(torch, scheduler, steps, x, noise=None, **options):
    """The reference loop with the same network; returns its timesteps and its result."""
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(x)
    for i, t in enumerate(scheduler.timesteps):
        extra = dict(options) if noise is None else {**options, "variance_noise": torch.from_numpy(noise[i])}
        x = scheduler.step(torch.tanh(x) * float(COSINES[int(t)]), t, x, **extra).prev_sample
    return scheduler.timesteps.numpy(), x.numpy()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in the reference's own code
@pytest.mark.parametrize("solver", ["dpm++2m", "sde", "unipc"])
def test_solvers_agree_with_diffusers_on_its_grids(libraries, solver):
    torch, diffusers = libraries
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 4, 4, 3)).astype(np.float32)
    cases = 0
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        for prediction, spacing in (("epsilon", "leading"), ("v_prediction", "trailing"), ("sample", "linspace")):
            for steps, end in ((1, "zero"), (2, "zero"), (5, "zero"), (20, "zero"), (20, "sigma_min")):
                first, last = (1e-4, 0.02) if schedule == "linear" else (0.00085, 0.012)
                common = {
                    "beta_schedule": schedule,
                    "beta_start": first,
                    "beta_end": last,
                    "prediction_type": prediction,
                    "timestep_spacing": spacing,
                    "final_sigmas_type": end,
                    "solver_order": 2,
                }
                if solver == "unipc":  # there it always ends with first order, unless told not to
                    common |= {"solver_type": "bh2", "lower_order_final": end == "zero"}
                    scheduler = diffusers.UniPCMultistepScheduler(**common)
                else:
                    kind = "sde-dpmsolver++" if solver == "sde" else "dpmsolver++"
                    scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type=kind, **common)
                preset = DiffusionPreset(schedule, prediction, spacing, final_alpha_one=end == "zero")
                scheduler.alphas_cumprod = torch.from_numpy(
                    preset.alphas_cumprod()
                )  # its own were cumulated in float32
                noise = rng.standard_normal((steps, *x.shape)).astype(np.float32)
                t, wanted = reference_run(torch, scheduler, steps, x, noise if solver == "sde" else None)
                ours, eta = ("dpm++2m", 1.0) if solver == "sde" else (solver, 0.0)
                tables = sampler_tables(preset, steps, eta, grid=(t, np.append(t[1:], -1)), solver=ours)
                got = analytic_run(tables, x, noise)
                scale = max(1, np.abs(wanted).max())
                np.testing.assert_allclose(got, wanted, rtol=0, atol=5e-6 * scale, err_msg=str((common, steps)))
                cases += 1
    assert cases == 45


def test_clipping_agrees_with_diffusers(libraries):
    """There the noise estimate is made again from the clipped x0 only with ``use_clipped_model_output``."""
    torch, diffusers = libraries
    x = 2 * np.random.default_rng(0).standard_normal((1, 4, 4, 3)).astype(np.float32)
    for prediction, eta in (("epsilon", 0.0), ("v_prediction", 0.0), ("v_prediction", 1.0)):
        scheduler = diffusers.DDIMScheduler(
            beta_schedule="linear",
            beta_start=1e-4,
            beta_end=0.02,
            prediction_type=prediction,
            timestep_spacing="trailing",
            clip_sample_range=0.3,
        )
        noise = np.random.default_rng(1).standard_normal((10, *x.shape)).astype(np.float32)
        options = {"use_clipped_model_output": True, "eta": eta}
        _, wanted = reference_run(torch, scheduler, 10, x, noise if eta else None, **options)
        preset = DiffusionPreset("linear", prediction, "trailing")
        got = analytic_run(sampler_tables(preset, 10, eta, clip=0.3), x, noise)
        np.testing.assert_allclose(got, wanted, atol=2e-5)
        assert np.abs(wanted - analytic_run(sampler_tables(preset, 10, eta), x, noise)).max() > 0.1


def test_mistakes_are_named():
    fixed = get_diffusion("fixed")
    for hint, options in (
        ("eta 1.5", {"eta": 1.5}),
        ("unipc", {"solver": "unipc", "eta": 0.5}),
        ("did you mean|unipc", {"solver": "unpic"}),
        ("variance", {"solver": "ddim", "variance": "large"}),
        ("small", {"solver": "ddpm", "variance": "smal"}),
        ("clip", {"clip": 0.0}),
        ("single", {"solver": "single"}),
        ("grid", {"grid": (np.array([999]), np.array([-1]))}),
        ("grid", {"grid": (np.array([1000, 500]), np.array([500, -1]))}),
        ("start where", {"solver": "dpm++2m", "grid": (np.array([999, 500]), np.array([600, -1]))}),
    ):
        with pytest.raises(UserError, match=hint) as caught:
            sampler_tables(fixed, 2, **options)
        assert "\n" not in str(caught.value)
    assert len(SOLVERS) == 6
