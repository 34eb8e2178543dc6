import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from scipy.optimize import check_grad, minimize

from scaling_perception.support.errors import UserError
from scaling_perception.tasks import ensemble
from scaling_perception.tasks.alignment import align
from scaling_perception.tasks.ensemble import ensemble_amodal, ensemble_depth, ensemble_flow, opposed

CASES = [f"n{n}_{noise}" for n in (2, 5, 10) for noise in ("low", "high")]


@pytest.fixture(scope="module")
def reference(golden):
    return functools.lru_cache(lambda case: load_file(golden / "ensemble" / f"{case}.safetensors"))


jitted_depth = jax.jit(ensemble_depth, static_argnums=(1, 2))


def members_of(data):
    return data["in/depth"][:, 0]


def settings_of(key):
    """(reduction, shift_invariant, max_resolution, max_iterations) of a key such as out/who/mean/iter2_res50/param."""
    _, _, reduction, run, *_ = key.split("/")
    iterations, _, resolution = run.rpartition("res")
    return (
        reduction.removesuffix("_scaleonly"),
        not reduction.endswith("_scaleonly"),
        None if resolution == "None" else int(resolution),
        int(iterations.strip("iter_") or 2),
    )


def residual(prediction, truth):
    """RMS error after the best scale and shift."""
    return np.sqrt(np.mean((align(np.asarray(prediction), truth) - truth) ** 2))


@pytest.mark.parametrize("case", CASES)
def test_published_parameters_give_the_published_maps(reference, case):
    data = reference(case)
    found = [key for key in data if key.endswith("/param") and "/authors/" in key]
    assert found
    for key in found:
        reduction, shift_invariant, _, _ = settings_of(key)
        aligned = ensemble._apply(members_of(data), data[key])
        prediction, uncertainty = ensemble.compile_aligned(aligned, reduction, True, shift_invariant)
        np.testing.assert_allclose(prediction, np.squeeze(data[key.replace("param", "prediction")]), atol=2e-6)
        np.testing.assert_allclose(uncertainty, np.squeeze(data[key.replace("param", "uncertainty")]), atol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_published_objective_start_gradient_and_two_steps(reference, case):
    data = reference(case)
    for key in [key for key in data if key.endswith("grad_initial")]:
        reduction, shift_invariant, resolution, _ = settings_of(key)
        small = ensemble._shrink(members_of(data), resolution)
        objective = ensemble.marigold_objective(small, reduction)
        start = ensemble.marigold_start(small, shift_invariant)
        folder = key.removesuffix("grad_initial")
        np.testing.assert_allclose(start, data[folder + "param_initial"], rtol=1e-6)
        cost, grad = objective(start)
        np.testing.assert_allclose(cost, data[folder + "cost_initial"], rtol=1e-4)
        # At the start the extremes of the reduced map can sit exactly on 0 or 1, a corner of the regulariser.
        np.testing.assert_allclose(grad, data[key], rtol=1e-3, atol=0.0201 if case == "n5_low" else 1e-6)
        two = ensemble.marigold_align(members_of(data), reduction, True, resolution, shift_invariant=shift_invariant)
        np.testing.assert_allclose(two, data[folder + "bfgs2/param"], atol=1e-4)
        np.testing.assert_allclose(objective(two)[0], data[folder + "bfgs2/cost"], rtol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_two_exact_steps_end_at_or_below_the_published_cost(reference, case):
    data = reference(case)
    for key in [key for key in data if key.endswith("cost_final")]:
        reduction, shift_invariant, resolution, iterations = settings_of(key)
        small = ensemble._shrink(members_of(data), resolution)
        objective = ensemble.marigold_objective(small, reduction)
        found = ensemble.marigold_align(
            members_of(data), reduction, True, resolution, iterations, shift_invariant=shift_invariant
        )
        assert objective(found)[0] <= data[key] * 1.001, key
        started = objective(ensemble.marigold_start(small, shift_invariant))[0]
        np.testing.assert_allclose(started, data[key.replace("cost_final", "cost_initial")], rtol=1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if "low" in case])
def test_where_the_optimum_means_something_it_is_reached(reference, case):
    data = reference(case)
    found = ensemble.marigold_align(members_of(data), max_iterations=500, tolerance=1e-7)
    cost = ensemble.marigold_objective(ensemble._shrink(members_of(data), 50))(found)[0]
    assert cost <= data["out/float64/median/res50/converged/cost"] * 1.02
    prediction, _ = ensemble.compile_aligned(ensemble._apply(members_of(data), found), lower_median=True)
    wanted = np.squeeze(data["out/float64/median/res50/converged/prediction"])
    assert np.abs(np.asarray(prediction) - wanted).mean() < 2e-3


@pytest.mark.parametrize("lower, reduction", [(True, "median"), (False, "median"), (True, "mean")])
def test_the_gradient_of_the_objective_is_exact(lower, reduction):
    members = np.random.default_rng(0).random((4, 6, 5))
    objective = ensemble.marigold_objective(members, reduction, lower)
    params = np.random.default_rng(1).normal(1, 0.3, 8)
    assert check_grad(lambda p: objective(p)[0], lambda p: objective(p)[1], params) < 1e-5


@pytest.mark.parametrize("case", ["n5_high", "n10_high"])
def test_lsq_does_not_collapse_where_the_published_objective_does(reference, case):
    data = reference(case)
    members, clean = members_of(data), np.squeeze(data["in/clean"])
    small = ensemble._shrink(members, 50)
    collapsed = minimize(
        ensemble.marigold_objective(small), ensemble.marigold_start(small), jac=True, method="BFGS", tol=1e-7
    )
    # Converged, the objective is worth no more than its regulariser at zero, and every member has shrunk to nothing.
    assert (
        collapsed.fun < 0.022 and np.abs(collapsed.x[: len(members)]).max() < 0.05 * ensemble.marigold_start(small)[0]
    )
    prediction, uncertainty = ensemble_depth(members, "lsq")
    assert residual(prediction, clean) <= residual(ensemble_depth(members, "minmax")[0], clean)
    assert residual(prediction, clean) < 0.6 * residual(data["out/plain_median"].squeeze(), clean)
    assert float(uncertainty.mean()) < 0.1


@pytest.mark.parametrize("case", CASES)
def test_lsq_is_close_to_the_truth_for_every_count_and_noise(reference, case):
    data = reference(case)
    clean = np.squeeze(data["in/clean"])
    stretched, published, fitted = (
        residual(ensemble(members_of(data), mode)[0], clean)
        for ensemble, mode in ((jitted_depth, "minmax"), (ensemble_depth, "marigold"), (jitted_depth, "lsq"))
    )
    assert fitted <= 1.02 * min(stretched, published) + 1e-5


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_lsq_undoes_any_scale_and_shift_of_the_members(seed):
    rng = np.random.default_rng(seed)
    truth = rng.random((12, 9)).astype(np.float32)
    scale, shift = rng.uniform(0.2, 1, (5, 1, 1)), rng.uniform(-1, 1, (5, 1, 1))
    prediction, uncertainty = jitted_depth(scale * truth + shift, "lsq")
    np.testing.assert_allclose(prediction, (truth - truth.min()) / np.ptp(truth), atol=2e-5)
    assert uncertainty.max() < 2e-5


def test_lsq_forgives_one_broken_member_and_shows_where():
    rng = np.random.default_rng(0)
    truth = np.linspace(0, 1, 300).reshape(15, 20).astype(np.float32)
    members = np.repeat(truth[None], 5, 0) + rng.normal(0, 0.01, (5, 15, 20)).astype(np.float32)
    members[2] = 1 - members[2]  # inside out: held at scale 0, not turned over
    assert residual(ensemble_depth(members, "lsq")[0], truth) < 0.01
    members = np.repeat(truth[None], 5, 0).copy()
    members[:2, 3, 4] += 0.5
    uncertainty = ensemble_depth(members, "median")[1]
    assert uncertainty.max() == 0  # two of five do not move a median
    members[2, 3, 4] += 0.25
    assert np.unravel_index(np.argmax(ensemble_depth(members, "lsq")[1]), (15, 20)) == (3, 4)


def test_lsq_does_not_turn_a_member_over():
    target = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    kept, flattened = ensemble._fit_to(jnp.stack([0.3 * target + 2, 1 - target]), jnp.asarray(target))
    np.testing.assert_allclose(kept, target, atol=1e-6)
    np.testing.assert_allclose(flattened, 0.5, atol=1e-6)


def test_marigold_takes_the_lower_median_unless_told_otherwise(reference):
    members = members_of(reference("n2_high"))
    prediction, uncertainty = ensemble_depth(members, "marigold")
    found = ensemble._apply(members, ensemble.marigold_align(members))
    np.testing.assert_allclose(prediction, ensemble.compile_aligned(found, lower_median=True)[0], atol=1e-6)
    assert not uncertainty.any()  # the lower median of two absolute deviations, one of which is 0
    assert ensemble_depth(members, "marigold", lower_median=False)[1].max() > 0.01


def test_median_by_exchanges_is_the_median():
    """Sizes with a network and one beyond, ties among the values; NaN is never hidden."""
    rng, find = np.random.default_rng(0), jax.jit(ensemble.median, static_argnums=1)
    for count in (*range(1, 10), 20, 33, 65):
        values = rng.integers(0, 9, (count, 201)).astype(np.float32)
        np.testing.assert_array_equal(find(values), np.median(values, axis=0))
        np.testing.assert_array_equal(find(values, True), np.sort(values, axis=0)[(count - 1) // 2])
        values[rng.integers(0, count, 201), np.arange(201)] = np.nan
        assert jnp.isnan(find(values)).all()
    assert len(ensemble.exchanges(50, (24, 25))) < 340


def test_lower_median_is_torch_and_plain_median_is_numpy(reference):
    for case in ("n2_high", "n5_high", "n10_high"):
        data = reference(case)
        members = members_of(data)
        lower = ensemble_depth(members, "median", lower_median=True)[0]
        np.testing.assert_allclose(lower, data["out/plain_median"].squeeze(), atol=1e-6)
        np.testing.assert_allclose(ensemble_depth(members, "median")[0], np.median(members, axis=0), atol=1e-6)
        same = np.allclose(lower, np.median(members, axis=0), atol=1e-6)
        assert same == (len(members) % 2 == 1)


@pytest.mark.parametrize("mode", ensemble.DEPTH_MODES)
def test_every_mode_for_one_member_order_and_range(mode):
    members = np.random.default_rng(0).random((4, 10, 8)).astype(np.float32)
    prediction, uncertainty = ensemble_depth(members, mode)
    assert prediction.shape == uncertainty.shape == (10, 8) and prediction.dtype == jnp.float32
    assert (uncertainty >= 0).all()
    if mode != "median":
        assert prediction.min() == 0 and prediction.max() == pytest.approx(1, abs=1e-6)
    if mode != "marigold":  # its numerical path may depend on the order, the others' answer may not
        np.testing.assert_allclose(ensemble_depth(members[::-1], mode)[0], prediction, atol=1e-5)
    one, zero = ensemble_depth(members[:1], mode)
    wanted = members[0] if mode == "median" else (members[0] - members[0].min()) / np.ptp(members[0])
    np.testing.assert_allclose(one, wanted, atol=1e-5)
    assert not zero.any()


@pytest.mark.parametrize("mode", ensemble.DEPTH_MODES)
def test_constant_members_give_no_nan(mode):
    prediction, uncertainty = ensemble_depth(np.full((3, 4, 4), 0.25, np.float32), mode)
    assert np.isfinite(prediction).all() and not uncertainty.any()


@pytest.mark.parametrize("mode", ["median", "minmax", "lsq"])
@pytest.mark.parametrize("lower", [False, True])
def test_nan_shows_in_the_result(mode, lower):
    members = np.random.default_rng(0).random((3, 4, 4)).astype(np.float32)
    members[1, 2, 2] = np.nan
    assert np.isnan(ensemble_depth(members, mode, lower)[0][2, 2])


def test_depth_ensembling_runs_under_jit_and_gives_the_same():
    members = np.random.default_rng(0).random((5, 8, 8)).astype(np.float32)
    for mode in ("median", "minmax", "lsq"):
        for got, wanted in zip(jitted_depth(members, mode), ensemble_depth(members, mode), strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_flow_mean_and_median_with_their_spread():
    members = np.random.default_rng(0).normal(0, 5, (5, 4, 3, 2)).astype(np.float32)
    flow, spread = ensemble_flow(members)
    np.testing.assert_allclose(flow, members.mean(axis=0), atol=1e-5)
    distance = np.linalg.norm(members - members.mean(axis=0), axis=-1)
    np.testing.assert_allclose(spread, np.sqrt((distance**2).mean(axis=0)), rtol=1e-5)
    flow, spread = jax.jit(ensemble_flow, static_argnums=1)(members, "median")
    np.testing.assert_allclose(flow, np.median(members, axis=0), atol=1e-5)
    distance = np.linalg.norm(members - np.median(members, axis=0), axis=-1)
    np.testing.assert_allclose(spread, np.median(distance, axis=0), rtol=1e-5)
    assert not ensemble_flow(members[:1])[1].any()


def test_amodal_median_with_its_spread():
    members = np.random.default_rng(0).uniform(-1, 1, (4, 5, 6, 3)).astype(np.float32)
    picture, spread = jax.jit(ensemble_amodal)(members)
    middle = np.median(members, axis=0)
    np.testing.assert_allclose(picture, middle, atol=1e-6)
    np.testing.assert_allclose(spread, np.median(np.abs(members - middle), axis=0).mean(axis=-1), atol=1e-6)
    assert not ensemble_amodal(members[:1])[1].any()


def test_mistakes_are_named():
    good = np.zeros((2, 4, 4), np.float32)
    with pytest.raises(UserError, match="marigold"):
        ensemble_depth(good, "marigol")
    with pytest.raises(UserError, match="mean"):
        ensemble_flow(np.zeros((2, 4, 4, 2)), "meen")
    for call in (
        lambda: ensemble_depth(good[0]),
        lambda: ensemble_depth(good[:0]),
        lambda: ensemble_flow(np.zeros((2, 4, 4, 3))),
        lambda: ensemble_amodal(np.zeros((4, 4, 3))),
    ):
        with pytest.raises(ValueError, match="member"):
            call()
    with pytest.raises(TypeError, match="max_iterations"):
        ensemble_depth(good, "lsq", max_iterations=3)
    with pytest.raises(ValueError, match="NaN"):
        ensemble_depth(np.full((2, 4, 4), np.nan), "marigold")


@pytest.mark.parametrize("signs", [(1, -1), (1, 1, -1, -1), (1, 1, 1, -1)])
def test_members_that_are_inside_out_do_not_cancel(signs):
    rng = np.random.default_rng(0)
    truth = np.add.outer(np.linspace(0, 1, 20), np.linspace(0, 0.5, 24)) / 1.5
    members = np.stack([sign * truth + 0.05 * rng.normal(size=truth.shape) for sign in signs])
    depth, spread = map(np.asarray, jitted_depth(members, "lsq", None))
    assert abs(np.corrcoef(depth.ravel(), truth.ravel())[0, 1]) > 0.9
    half = 2 * signs.count(-1) >= len(signs)
    assert opposed(members) == half
    assert not half or spread.mean() > 0.1
    assert not opposed(members[:1]) and not opposed(rng.normal(size=(4, 20, 24)))
