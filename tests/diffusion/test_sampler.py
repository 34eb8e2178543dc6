import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from scaling_perception.diffusion.sampler import ddim_sample, sampler_tables
from scaling_perception.diffusion.schedules import DiffusionPreset, get_diffusion, timestep_grid
from scaling_perception.support.errors import UserError

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
            np.testing.assert_array_equal(np.stack(tables), np.stack(sampler_tables(preset, int(steps))))
            own_grid += 1
        x, x0 = analytic_sample(tables, data["in/x_T"])
        got, wanted = (x0[-1], data[key]) if what == "pred_x0_last" else (x, data[key][-1:])
        np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-5 * max(1, np.abs(wanted).max()), err_msg=key)
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
        np.testing.assert_allclose(x, wanted, rtol=0, atol=3e-5 * max(1, np.abs(wanted).max()), err_msg=key)
        # The noise matters (so the agreement says something).
        assert np.abs(np.asarray(analytic_sample(tables, data["in/x_T"], 0 * noise)[0]) - wanted).max() > 0.1


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_network_that_knows_the_answer_is_followed_to_it(prediction, steps):
    """With the true output for one x0 every estimate is that x0, on any grid, cosine's last timestep included."""
    rng = np.random.default_rng(0)
    x0 = jnp.asarray(rng.standard_normal((2, 4, 4, 3)), jnp.float32)
    spacing = "leading" if prediction == "epsilon" else "trailing"
    preset = get_diffusion("fixed", prediction=prediction, spacing=spacing)
    alpha_bar = jnp.asarray(preset.alphas_cumprod(), jnp.float32)

    def denoise(x, t):
        signal, noise = jnp.sqrt(alpha_bar[t]), jnp.sqrt(1 - alpha_bar[t])
        eps = (x - signal * x0) / noise
        return {"epsilon": eps, "x0": x0, "v": signal * eps - noise * x0}[prediction]

    x, estimates = ddim_sample(denoise, sampler_tables(preset, steps), jnp.ones_like(x0), return_trajectory=True)
    assert estimates.shape == (steps, *x0.shape)
    np.testing.assert_allclose(estimates, np.broadcast_to(x0, estimates.shape), atol=2e-3)
    np.testing.assert_allclose(x, x0, atol=2e-3)


def test_any_batch_shape_and_members_are_independent():
    tables = sampler_tables(get_diffusion("fixed"), 4)
    x = jax.random.normal(jax.random.key(0), (3, 2, 4, 4, 1))
    together = ddim_sample(lambda x, t: jnp.sin(x), tables, x)
    np.testing.assert_allclose(together[1, 1], ddim_sample(lambda x, t: jnp.sin(x), tables, x[1, 1]), rtol=1e-6)


def test_new_keys_weights_images_and_presets_do_not_compile_again():
    compiled = 0

    @jax.jit
    def run(tables, weights, image, key):
        nonlocal compiled
        compiled += 1
        return ddim_sample(lambda x, t: weights * x + image, tables, jax.random.normal(key, image.shape))

    image = jnp.ones((1, 4, 4, 2))
    outs = []
    for i, name in enumerate(("fixed", "paper", "released", "fixed")):
        outs.append(run(sampler_tables(get_diffusion(name), 5), 0.1 * i, image + i, jax.random.key(i)))
    assert compiled == 1
    assert all(np.isfinite(out).all() for out in outs) and not np.allclose(outs[0], outs[3])


def test_the_gradient_flows_through_the_scan():
    """One v step from pure noise gives x = -v almost exactly, so d x / d weight is known."""
    tables = sampler_tables(get_diffusion("fixed"), 1)
    x = jnp.ones((1, 2, 2, 1))
    grad = jax.grad(lambda w: jnp.sum(ddim_sample(lambda x, t: w * jnp.ones_like(x), tables, x)))(0.3)
    np.testing.assert_allclose(grad, -4, rtol=1e-6)


def test_a_low_precision_network_is_stepped_in_float32():
    out = ddim_sample(lambda x, t: x.astype(jnp.bfloat16), sampler_tables(get_diffusion("fixed"), 2), jnp.ones((1, 2)))
    assert out.dtype == jnp.float32


def test_zero_snr_starts_from_no_signal_at_all():
    tables = sampler_tables(get_diffusion("fixed", schedule="scaled_linear", zero_snr=True), 2)
    assert all(np.isfinite(column).all() for column in tables)
    assert tables.x0_x[0] == 0 and tables.x0_out[0] == -1


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
