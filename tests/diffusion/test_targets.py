import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from scaling_perception.diffusion import targets
from scaling_perception.diffusion.schedules import DiffusionPreset
from scaling_perception.support.errors import UserError


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_noising_and_velocity_agree_with_the_reference(golden, name):
    data = load_file(golden / "ddim" / "tables.safetensors")
    x0, noise, t = jnp.asarray(data["in/x0"]), jnp.asarray(data["in/noise"]), data["in/t"]
    host = [level[t] for level in DiffusionPreset(name).levels()]
    for levels in (host, [jnp.asarray(level, jnp.float32) for level in host]):
        got = targets.add_noise(x0, noise, *levels)
        np.testing.assert_allclose(got, data[f"out/{name}/add_noise"], rtol=1e-5, atol=2e-5)
        got = targets.training_target("v", x0, noise, *levels)
        np.testing.assert_allclose(got, data[f"out/{name}/get_velocity"], rtol=1e-5, atol=2e-5)


@settings(max_examples=30, deadline=None)
@given(
    t=st.integers(0, 999),
    kind=st.sampled_from(
        [
            *(("cosine", name) for name in ("epsilon", "v", "x0", "velocity")),
            ("rectified", "x0"),
            ("rectified", "velocity"),
        ]
    ),
    seed=st.integers(0, 99),
)
def test_a_perfect_network_gives_back_x0_and_eps(t, kind, seed):
    rng, (schedule, prediction) = np.random.default_rng(seed), kind
    x0, eps = (jnp.asarray(rng.standard_normal((2, 3)), jnp.float32) for _ in range(2))
    alpha, sigma = (level[t] for level in DiffusionPreset(schedule, prediction).levels())
    x_t = targets.add_noise(x0, eps, alpha, sigma)
    out = targets.training_target(prediction, x0, eps, alpha, sigma)
    back_x0, back_eps = targets.to_x0_eps(prediction, out, x_t, alpha, sigma)
    # What float32 rounding of x_t and out can become, by the division each prediction type has.
    slack = 5e-7 * max(1, float(jnp.abs(x_t).max()))
    np.testing.assert_allclose(back_x0, x0, atol=slack * (1 / alpha + 3 if prediction == "epsilon" else 3))
    np.testing.assert_allclose(back_eps, eps, atol=slack * (1 / sigma + 3 if prediction == "x0" else 3))


def test_the_straight_path_by_hand():
    """A quarter of the way to noise: x = 3/4 x0 + 1/4 eps, and the velocity is eps - x0 wherever one stands."""
    alpha, sigma = (level[249] for level in DiffusionPreset("rectified", "velocity").levels())
    x0, eps = jnp.asarray([[4.0, -8.0]]), jnp.asarray([[1.0, 2.0]])
    x = targets.add_noise(x0, eps, alpha, sigma)
    velocity = targets.training_target("velocity", x0, eps, alpha, sigma)
    np.testing.assert_array_equal(x, [[3.25, -5.5]])
    np.testing.assert_array_equal(velocity, [[-3.0, 10.0]])
    slope = jax.grad(lambda s: targets.add_noise(x0, eps, 1 - s, s)[0, 1])(0.25)
    assert slope == velocity[0, 1]


def test_v_is_exact_where_epsilon_loses_its_digits():
    """At the end of the cosine schedule the v route still knows x0 to float32, the epsilon route to 1e-3 at best."""
    rng = np.random.default_rng(0)
    x0, eps = (jnp.asarray(rng.standard_normal((64,)), jnp.float32) for _ in range(2))
    last = [level[999] for level in DiffusionPreset("cosine").levels()]
    x_t = targets.add_noise(x0, eps, *last)
    error = {
        kind: float(
            jnp.abs(targets.to_x0_eps(kind, targets.training_target(kind, x0, eps, *last), x_t, *last)[0] - x0).max()
        )
        for kind in ("v", "epsilon")
    }
    assert error["v"] < 1e-6 and 1e-4 < error["epsilon"] < 2e-2


def test_unknown_prediction_is_a_user_error():
    one = jnp.ones((1, 2))
    for call in (
        lambda: targets.training_target("vv", one, one, 0.5, 0.5),
        lambda: targets.to_x0_eps("eps2", one, one, 0.5, 0.5),
    ):
        with pytest.raises(UserError, match="prediction"):
            call()


def masked_mse(pred, target, valid):
    return targets.mean_of_cells(*targets.masked_squares(pred, target, valid), pred.shape[-1])


def test_masked_mse_value_and_gradient_against_the_closed_form():
    rng = np.random.default_rng(1)
    pred, target = (rng.standard_normal((3, 4, 5, 2)).astype(np.float32) for _ in range(2))
    valid = rng.random((3, 4, 5)) < 0.4
    valid[0] = False
    target[~valid] = np.nan  # nothing under an invalid cell may reach the loss or its gradient
    value, grad = jax.value_and_grad(masked_mse)(jnp.asarray(pred), jnp.asarray(target), jnp.asarray(valid))
    difference = (pred - target)[valid]
    np.testing.assert_allclose(value, np.mean(difference**2), rtol=1e-6)
    expected = np.zeros_like(pred)
    expected[valid] = 2 * difference / difference.size
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-9)


def test_masked_mse_with_nothing_valid_is_zero_with_zero_gradient():
    pred = jnp.full((2, 3, 3, 4), jnp.nan)
    loss = jax.value_and_grad(masked_mse)
    value, grad = loss(jnp.ones_like(pred), pred, jnp.zeros((2, 3, 3), bool))
    assert value == 0 and not grad.any()


def test_masked_mse_refuses_variance_channels_and_wrong_masks():
    with pytest.raises(ValueError, match="shape"):
        masked_mse(jnp.ones((1, 2, 2, 8)), jnp.ones((1, 2, 2, 4)), jnp.ones((1, 2, 2), bool))
    with pytest.raises(ValueError, match="mask"):
        masked_mse(jnp.ones((1, 2, 2, 4)), jnp.ones((1, 2, 2, 4)), jnp.ones((1, 16, 16), bool))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), factor=st.sampled_from([1, 2, 4, 8]))
def test_latent_mask_drops_every_touched_cell(seed, factor):
    rng = np.random.default_rng(seed)
    valid = rng.random((2, 3 * factor, 2 * factor)) < 0.97
    got = targets.latent_mask(valid, factor)
    assert got.shape == (2, 3, 2) and got.dtype == bool and isinstance(got, np.ndarray)
    for b, i, j in np.ndindex(got.shape):
        assert got[b, i, j] == valid[b, i * factor : (i + 1) * factor, j * factor : (j + 1) * factor].all()
    np.testing.assert_array_equal(targets.latent_mask(jnp.asarray(valid), factor), got)
    np.testing.assert_array_equal(targets.latent_mask(valid[0], factor), got[0])


def test_latent_mask_refuses_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="8x8"):
        targets.latent_mask(np.ones((1, 12, 16), bool))
