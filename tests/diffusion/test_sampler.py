import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from applying import LIKE_PROGRAMS
from safetensors.numpy import load_file

from scaling_perception.diffusion.guidance import guided
from scaling_perception.diffusion.sampler import advance, ddim_sample, sample, sampler_tables, start_state
from scaling_perception.diffusion.schedules import DiffusionPreset, get_diffusion, timestep_grid
from scaling_perception.models.dit import guide
from scaling_perception.support.errors import UserError

FINITE = ("x0_x", "x0_out", "next_x", "next_x0", "sigma")
COSINES = np.cos(np.arange(1000) / 1000.0).astype(np.float32)


@jax.jit
def analytic_sample(tables, x, noise=None):
    """The network of the reference files: tanh(x) cos(t / 1000)."""
    cosines = jnp.asarray(COSINES)
    return ddim_sample(lambda x, t: jnp.tanh(x) * cosines[t], tables, x, noise, return_trajectory=True)


def reference_grid(spacing, steps, offset):
    """The reference goes to t - 1000 // steps in every spacing; ours to the next grid point (see `timestep_grid`)."""
    t, _ = timestep_grid(spacing, steps, offset)
    return t, t - 1000 // steps


def test_deterministic_trajectories_agree_with_the_reference(golden):
    data = load_file(golden / "ddim" / "trajectories.safetensors")
    cases = [key for key in data if key.startswith("out/")]
    assert len(cases) > 150
    own_grid = 0
    for key in cases:
        _, schedule, grid, one, prediction, steps, what = key.split("/")
        spacing, offset = grid.split("_off")
        preset = DiffusionPreset(schedule, prediction, spacing, int(offset), one == "one_True")
        tables = sampler_tables(preset, int(steps), grid=reference_grid(spacing, int(steps), int(offset)))
        if spacing != "linspace":  # on these our own table is the same table
            for column, own in zip(tables[:-1], sampler_tables(preset, int(steps))[:-1], strict=True):
                np.testing.assert_array_equal(column, own)
            own_grid += 1
        x, x0 = analytic_sample(tables, data["in/x_T"])
        got, wanted = (x0[-1], data[key]) if what == "pred_x0_last" else (x, data[key][-1:])
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()), err_msg=key)
    assert own_grid > 100


def test_stochastic_trajectories_agree_with_the_reference(golden):
    data = load_file(golden / "ddim" / "eta.safetensors")
    for key in [key for key in data if key.startswith("out/")]:
        _, schedule, grid, prediction, steps, eta, _ = key.split("/")
        spacing, offset = grid.split("_off")
        preset = DiffusionPreset(schedule, prediction, spacing, int(offset), final_alpha_one=False)
        tables = sampler_tables(preset, int(steps), float(eta.removeprefix("eta")))
        noise = data[key.replace("out/", "in/").replace("/trajectory", "/noise")]
        x, _ = analytic_sample(tables, data["in/x_T"], noise)
        wanted = data[key][-1:]
        np.testing.assert_allclose(x, wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()), err_msg=key)
        # The noise matters (so the agreement says something).
        assert np.abs(np.asarray(analytic_sample(tables, data["in/x_T"], 0 * noise)[0]) - wanted).max() > 0.1


@pytest.mark.parametrize(
    "schedule, prediction", [*(("cosine", p) for p in ("epsilon", "v", "x0")), ("rectified", "velocity")]
)
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_network_that_knows_the_answer_is_followed_to_it(schedule, prediction, steps):
    """With the true output for one x0 every estimate is that x0, on any grid, cosine's last timestep included."""
    rng = np.random.default_rng(0)
    x0 = jnp.asarray(rng.standard_normal((2, 4, 4, 3)), jnp.float32)
    spacing = "leading" if prediction == "epsilon" else "trailing"
    preset = get_diffusion("fixed", schedule=schedule, prediction=prediction, spacing=spacing)
    alpha, sigma = (jnp.asarray(level, jnp.float32) for level in preset.levels())

    def denoise(x, t):
        signal, noise = alpha[t], sigma[t]
        eps = (x - signal * x0) / noise
        return {"epsilon": eps, "x0": x0, "v": signal * eps - noise * x0, "velocity": eps - x0}[prediction]

    x, estimates = ddim_sample(denoise, sampler_tables(preset, steps), jnp.ones_like(x0), return_trajectory=True)
    assert estimates.shape == (steps, *x0.shape)
    np.testing.assert_allclose(estimates, np.broadcast_to(x0, estimates.shape), atol=2e-3)
    np.testing.assert_allclose(x, x0, atol=2e-3)


def test_any_batch_shape_and_members_are_independent():
    tables = sampler_tables(get_diffusion("fixed"), 4)
    x = jax.random.normal(jax.random.key(0), (3, 2, 4, 4, 1))
    together = ddim_sample(lambda x, t: jnp.sin(x), tables, x)
    np.testing.assert_allclose(together[1, 1], ddim_sample(lambda x, t: jnp.sin(x), tables, x[1, 1]), rtol=1e-6)


def test_new_keys_weights_images_presets_and_solvers_do_not_compile_again():
    compiled = 0

    @jax.jit
    def run(tables, weights, image, key):
        nonlocal compiled
        compiled += 1
        draw = lambda row: jax.random.normal(jax.random.fold_in(key, row.index), image.shape)  # noqa: E731
        return sample(lambda x, row: weights * x + image, tables, jax.random.normal(key, image.shape), draw)

    image = jnp.ones((1, 4, 4, 2))
    first_order = (
        {},
        {"eta": 0.5},
        {"clip": 5.0},
        {"solver": "ddpm"},
        {"solver": "ddpm", "variance": "large"},
    )
    history = ({"solver": "dpm++2m"}, {"solver": "unipc"}, {"solver": "dpm++2m", "eta": 1.0, "clip": 5.0})
    for programs, options in enumerate((first_order, history), start=1):
        outs = []
        for i, choice in enumerate(options):
            for name in ("fixed", "paper", "released"):
                tables = sampler_tables(get_diffusion(name), 5, **choice)
                outs.append(np.asarray(run(tables, 0.1 * i, image + i, jax.random.key(i))))
        assert compiled == programs  # one for all that look back, one for the others
        assert np.isfinite(outs).all() and len({out.tobytes() for out in outs}) == len(outs)


# Looking in on the way

WEIGHTS = 0.1 * jax.random.normal(jax.random.key(5), (16, 16))
START = jax.random.normal(jax.random.key(6), (6, 3, 16))
pieces = 0  # programs compiled by advance_jit


def small_network(x, row):
    return jnp.tanh(x @ WEIGHTS + jnp.cos(row.t / 1000)) @ WEIGHTS.T


def small_noise(row):
    return jnp.broadcast_to(jnp.cos((row.index + 1.0) * jnp.arange(16.0)), START.shape)


@partial(jax.jit, static_argnums=1, compiler_options=LIKE_PROGRAMS)
def sample_jit(tables, keep):
    return sample(small_network, tables, START, small_noise, keep=keep)


@partial(jax.jit, static_argnums=3, compiler_options=LIKE_PROGRAMS)
def advance_jit(tables, state, first, count):
    global pieces
    pieces += 1
    return advance(small_network, tables, state, first, count, small_noise)


@pytest.mark.parametrize("solver, eta", [("ddim", 1.0), ("dpm++2m", 1.0), ("unipc", 0.0)])
def test_steps_in_pieces_are_the_same_bit_for_bit_and_so_is_what_is_kept(solver, eta):
    tables = sampler_tables(get_diffusion("fixed"), 9, eta, solver=solver)
    x, every = sample_jit(tables, tuple(range(9)))
    again, kept = sample_jit(tables, (4, -1, 0))
    np.testing.assert_array_equal(again, x)
    np.testing.assert_array_equal(kept, every[np.array([4, 8, 0])])
    for sizes in ((1,) * 9, (4, 1, 4)):
        state, first = start_state(tables, START), 0
        for count in sizes:
            state = advance_jit(tables, state, first, count)
            first += count
            np.testing.assert_array_equal(state.x0, every[first - 1])
        np.testing.assert_array_equal(state.x, x)
    assert pieces <= 4  # 2 lengths, with and without history: where a piece begins is not compiled in


def test_samples_can_leave_between_pieces():
    tables = sampler_tables(get_diffusion("fixed"), 6, solver="unipc")
    whole = sample(small_network, tables, START)
    state = advance(small_network, tables, start_state(tables, START), 0, 3)
    rest = advance(small_network, tables, jax.tree.map(lambda leaf: leaf[jnp.array([1, 4])], state), 3, 3)
    np.testing.assert_allclose(rest.x, whole[jnp.array([1, 4])], rtol=1e-5, atol=1e-6)


def test_only_what_is_kept_takes_memory():
    tables = sampler_tables(get_diffusion("fixed"), 200)
    x = jnp.ones((64, 64))

    def bytes_for(keep):
        whole = jax.jit(lambda tables, x: sample(lambda x, row: jnp.sin(x), tables, x, keep=keep)).lower(tables, x)
        memory = whole.compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    assert bytes_for([3, 199]) < 20 * x.nbytes < 200 * x.nbytes < bytes_for(range(200))


def test_a_network_sees_the_row_and_can_look_up_what_was_made_for_each_step():
    tables = sampler_tables(get_diffusion("fixed"), 4)
    ahead = jnp.asarray(np.cos(tables.t), jnp.float32)
    looked_up = sample(lambda x, row: ahead[row.index] * x, tables, START)
    computed = sample(lambda x, row: jnp.cos(row.t.astype(jnp.float32)) * x, tables, START)
    np.testing.assert_allclose(looked_up, computed, rtol=1e-5)


def test_clipping_bounds_every_estimate():
    tables = sampler_tables(get_diffusion("fixed"), 6, clip=0.5)
    x, kept = sample(small_network, tables, 3 * START, keep=range(6))
    assert np.abs(kept).max() == 0.5 and np.abs(x).max() == 0.5
    free, estimates = sample(small_network, sampler_tables(get_diffusion("fixed"), 6, clip=1e6), START, keep=range(6))
    unclipped = sample(small_network, sampler_tables(get_diffusion("fixed"), 6), START)
    np.testing.assert_array_equal(free, unclipped)
    assert np.abs(estimates).max() > 0.5


def test_guidance_mixes_two_halves_of_one_batch():
    scale, x, calls = 1.5, jax.random.normal(jax.random.key(0), (2, 4, 4, 4)), []
    label = jnp.array([1.0, 2.0, 0.0, 0.0]).reshape(4, 1, 1, 1)  # two conditions, then the null label twice

    def pair(x, row):
        calls.append(x.shape)
        return jnp.tanh(x + label) * jnp.cos(row.t / 1000)

    def apart(x, row):
        halves = [jnp.tanh(x + part) * jnp.cos(row.t / 1000) for part in (label[:2], label[2:])]
        return guide(*halves, scale, channels=3)

    tables = sampler_tables(get_diffusion("fixed"), 3)
    np.testing.assert_allclose(sample(guided(pair, scale), tables, x), sample(apart, tables, x), rtol=1e-5, atol=1e-6)
    assert calls == [(4, 4, 4, 4)]
    whole = sample(guided(pair, 1.0, channels=4), tables, x)  # scale 1: the condition alone
    alone = sample(lambda x, row: jnp.tanh(x + label[:2]) * jnp.cos(row.t / 1000), tables, x)
    np.testing.assert_allclose(whole, alone, rtol=1e-5, atol=1e-6)


def test_the_gradient_flows_through_the_scan():
    """One v step from pure noise gives x = -v almost exactly, so d x / d weight is known."""
    tables = sampler_tables(get_diffusion("fixed"), 1)
    x = jnp.ones((1, 2, 2, 1))
    grad = jax.grad(lambda w: jnp.sum(ddim_sample(lambda x, t: w * jnp.ones_like(x), tables, x)))(0.3)
    np.testing.assert_allclose(grad, -4, rtol=1e-6)


def test_a_low_precision_network_is_stepped_in_float32():
    out = ddim_sample(lambda x, t: x.astype(jnp.bfloat16), sampler_tables(get_diffusion("fixed"), 2), jnp.ones((1, 2)))
    assert out.dtype == jnp.float32


def test_a_float64_start_is_stepped_in_float64():
    with jax.enable_x64(True):
        tables = sampler_tables(get_diffusion("fixed"), 2, dtype=np.float64)
        assert sample(lambda x, row: jnp.sin(x), tables, jnp.ones((1, 2))).dtype == jnp.float64
    assert sample(lambda x, row: jnp.sin(x), tables, np.ones((1, 2))).dtype == jnp.float32


def test_zero_snr_starts_from_no_signal_at_all():
    preset = get_diffusion("fixed", schedule="scaled_linear", zero_snr=True)
    for prediction, start in (("v", (0, -1)), ("x0", (0, 1))):
        tables = sampler_tables(dataclasses.replace(preset, prediction=prediction), 2, eta=1.0)
        assert all(np.isfinite(column).all() for name, column in tables._asdict().items() if name in FINITE)
        assert (tables.x0_x[0], tables.x0_out[0]) == start
    with pytest.raises(UserError, match="zero_snr"):
        dataclasses.replace(preset, prediction="epsilon")


def test_mistakes_are_named():
    with pytest.raises(UserError, match="eta"):
        sampler_tables(get_diffusion("fixed"), 2, eta=1.5)
    noisy = sampler_tables(get_diffusion("fixed"), 2, eta=1.0)
    with pytest.raises(ValueError, match="noise"):
        ddim_sample(lambda x, t: x, noisy, jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="shape"):
        ddim_sample(lambda x, t: x, noisy, jnp.ones((1, 2)), noise=jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="network"):
        ddim_sample(lambda x, t: x[..., :1], noisy, jnp.ones((1, 2)), noise=jnp.ones((2, 1, 2)))
    with pytest.raises(ValueError, match="noise"):
        advance(lambda x, row: x, noisy, start_state(noisy, jnp.ones((1, 2))), 0, 1)
    tables = sampler_tables(get_diffusion("fixed"), 4)
    for keep in ([4], [-5], [1, 1], [3, -1]):
        with pytest.raises(ValueError, match="keep"):
            sample(lambda x, row: x, tables, jnp.ones((1, 2)), keep=keep)
    state = start_state(tables, jnp.ones((1, 2)))
    for first, count in ((3, 2), (-1, 2), (5, 0)):
        with pytest.raises(ValueError, match="table of 4"):
            advance(lambda x, row: x, tables, state, first, count)
    with pytest.raises(ValueError, match="another kind"):
        advance(lambda x, row: x, sampler_tables(get_diffusion("fixed"), 4, solver="unipc"), state, 0, 1)
