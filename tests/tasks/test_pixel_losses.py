"""Losses in pixels against closed forms and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_perception.tasks import TASKS, TaskOptions

SIDE = 16
LOSSES = {name: jax.jit(task.loss, static_argnums=3) for name, task in TASKS.items() if task.loss is not None}


def loss_of(task, prediction, truth, valid=None, **options):
    valid = np.ones((SIDE, SIDE), bool) if valid is None else valid
    return float(LOSSES[task](jnp.asarray(prediction), jnp.asarray(truth), jnp.asarray(valid), TaskOptions(**options)))


def pictures(seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (2, SIDE, SIDE, 3)).astype(np.float32)


def grey(values):
    return np.repeat(np.asarray(values, np.float32)[..., None], 3, axis=-1)


def test_every_task_that_predicts_has_a_loss():
    assert set(LOSSES) == {name for name, task in TASKS.items() if task.conditioned}


@pytest.mark.parametrize("scale, shift", [(3.0, -0.7), (0.2, 5.0), (-1.0, 0.0)])
def test_depth_is_known_up_to_scale_and_shift(scale, shift):
    prediction, truth = pictures()
    before = loss_of("depth", prediction, truth)
    assert loss_of("depth", scale * prediction + shift, truth) == pytest.approx(before, rel=1e-3)
    assert loss_of("depth", scale * truth + shift, truth) == pytest.approx(0, abs=1e-4)
    assert loss_of("depth", prediction, 2 * truth) == pytest.approx(2 * before, rel=1e-3)  # in units of the truth


def test_depth_of_a_step_that_is_missed():
    """d* = -1 | 1 in columns, d = -1 | 1 in rows: no correlation, so s = 0, t = 0 and e = -d*."""
    half = np.sign(np.arange(SIDE) - SIDE / 2 + 0.5)
    truth, prediction = grey(np.tile(half, (SIDE, 1))), grey(np.tile(half, (SIDE, 1)).T)
    # one of (side / 2^k - 1) differences in each row is 2
    edges = sum(2 / (SIDE / 2**k - 1) for k in range(4))
    assert loss_of("depth", prediction, truth) == pytest.approx(1 + 0.5 * edges, rel=1e-5)
    assert loss_of("depth", np.zeros_like(truth), truth) == pytest.approx(1 + 0.5 * edges, rel=1e-5)


def test_flow_is_the_mean_absolute_difference():
    prediction, truth = pictures()
    valid = np.random.default_rng(1).random((SIDE, SIDE)) < 0.5
    expected = np.abs(prediction.mean(-1) - truth.mean(-1))[valid].mean()
    assert loss_of("flow", prediction, truth, valid) == pytest.approx(expected, rel=1e-5)


def test_normals_are_an_angle_whatever_their_length():
    turned, wanted = np.radians(35.0), np.broadcast_to(np.float32([0, 0, -1]), (SIDE, SIDE, 3))
    found = np.broadcast_to(np.float32([np.sin(turned), 0, -np.cos(turned)]), (SIDE, SIDE, 3))
    assert loss_of("normals", 3 * found, 0.5 * wanted) == pytest.approx(turned, rel=1e-4)
    assert loss_of("normals", -wanted, wanted) == pytest.approx(np.pi, rel=1e-4)
    assert loss_of("normals", wanted, wanted) == pytest.approx(0, abs=1e-4)


def test_amodal_is_soft_iou_entropy_and_colour():
    truth, threshold = np.ones((SIDE, SIDE, 3), np.float32), 225.0
    truth[:, :4] = -1.0  # a quarter is the object
    logit = np.where(truth[..., 0] < 0, threshold / 7.5, (threshold - 255) / 7.5)
    share, inside = 1 / (1 + np.exp(-logit)), truth[..., 0] < 0
    iou = (share * inside).mean() / (share + inside - share * inside).mean()
    entropy = -np.where(inside, np.log(share), np.log1p(-share)).mean()
    assert loss_of("amodal", truth, truth, mask_threshold=threshold) == pytest.approx(1 - iou + entropy, rel=1e-3)
    white = np.ones_like(truth)
    assert loss_of("amodal", white, truth, mask_threshold=threshold) > 0.25 * 2 + 0.9  # colour, and nothing found


@pytest.mark.parametrize("task", LOSSES)
def test_gradients_are_those_of_finite_differences_and_of_valid_pixels_alone(task):
    prediction, truth = pictures(3)
    prediction, valid = prediction * 0.5, np.random.default_rng(2).random((SIDE, SIDE)) < 0.7
    with jax.enable_x64(True):
        place, wanted = jnp.asarray(prediction, jnp.float64), jnp.asarray(truth, jnp.float64)

        @jax.jit
        def both(place):
            return jax.value_and_grad(LOSSES[task])(place, wanted, jnp.asarray(valid), TaskOptions())

        gradient = np.asarray(both(place)[1])
        away = np.random.default_rng(5).normal(size=prediction.shape)
        step = 1e-6
        slope = (both(place + step * away)[0] - both(place - step * away)[0]) / (2 * step)
    assert np.vdot(gradient, away) == pytest.approx(float(slope), rel=2e-3)
    assert np.isfinite(gradient).all() and gradient[valid].any() and not gradient[~valid].any()


@pytest.mark.parametrize("task", LOSSES)
def test_without_a_valid_pixel_there_is_neither_loss_nor_gradient(task):
    prediction, truth = (jnp.asarray(one) for one in pictures())
    nowhere = jnp.zeros((SIDE, SIDE), bool)
    both = jax.jit(jax.value_and_grad(LOSSES[task]), static_argnums=3)
    value, gradient = both(prediction, truth, nowhere, TaskOptions())
    assert float(value) == 0 and not np.asarray(gradient).any()
    _, same = both(truth, truth, ~nowhere, TaskOptions())  # at the truth itself, where roots have kinks
    assert np.isfinite(np.asarray(same)).all()
