import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from scaling_perception.tasks.alignment import align, fit_scale_shift, nearest_columns
from scaling_perception.tasks.metrics import depth_metrics


@pytest.mark.parametrize("i", range(3))
def test_fit_and_aligned_metrics_agree_with_the_reference(golden, i):
    data = load_file(golden / "metrics" / "depth.safetensors")
    pred, gt, mask = (data[f"in/{name}"][i] for name in ("affine_pred", "gt", "mask"))
    fit = fit_scale_shift(pred, gt, mask)
    np.testing.assert_allclose(fit.scale, data[f"out/lsq/{i}/scale"][0], rtol=1e-6)
    np.testing.assert_allclose(fit.shift, data[f"out/lsq/{i}/shift"][0], rtol=1e-6)
    aligned = align(pred, gt, mask)
    np.testing.assert_allclose(aligned, data[f"out/lsq/{i}/aligned"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(depth_metrics(aligned, gt, mask)["abs_rel"], data[f"out/lsq/{i}/abs_rel"], rtol=1e-6)
    clipped = align(pred, gt, mask, minimum=1e-3)
    np.testing.assert_allclose(depth_metrics(clipped, gt, mask)["delta1"], data[f"out/lsq/{i}/delta1"], rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    scale=st.floats(-20, 20).filter(lambda s: abs(s) > 1e-3),
    shift=st.floats(-1000, 1000),
    seed=st.integers(0, 999),
)
def test_an_affine_prediction_is_undone(scale, shift, seed):
    rng = np.random.default_rng(seed)
    gt = rng.uniform(0.5, 60, (6, 7))
    fit = fit_scale_shift((gt - shift) / scale, gt)
    np.testing.assert_allclose(fit, (scale, shift), rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999))
def test_the_fit_is_the_one_of_linear_algebra(seed):
    rng = np.random.default_rng(seed)
    pred, gt, valid = rng.standard_normal((5, 6)), rng.uniform(1, 9, (5, 6)), rng.random((5, 6)) < 0.7
    valid[0, :2] = True
    design = np.stack([pred[valid], np.ones(valid.sum())], axis=1)
    wanted, *_ = np.linalg.lstsq(design, gt[valid], rcond=None)
    gt[~valid] = np.nan  # what lies outside the mask has no say
    np.testing.assert_allclose(fit_scale_shift(pred, gt, valid), wanted, rtol=1e-8, atol=1e-10)


def test_a_float32_prediction_with_a_large_offset_keeps_its_digits():
    """Depth in 0..1 lifted by 1000: the uncentred normal equations in float32 would return noise."""
    gt = np.linspace(1, 10, 1000)
    pred = (1000 + np.linspace(0, 1, 1000)).astype(np.float32)
    aligned = align(pred, gt)
    assert np.abs(aligned - gt).max() < 1e-3


def test_degenerate_cases_have_the_documented_answers():
    gt = np.array([[1.0, 2.0, 6.0]])
    assert fit_scale_shift(np.full((1, 3), 0.3), gt) == (0.0, 3.0)
    assert fit_scale_shift(np.zeros((1, 3)), gt) == (0.0, 3.0)
    assert fit_scale_shift(np.array([[7.0, 8.0, 9.0]]), gt, np.array([[False, True, False]])) == (0.0, 2.0)
    assert fit_scale_shift(np.ones((1, 3)), gt, np.zeros((1, 3), bool)) == (1.0, 0.0)


def test_two_pixels_are_met_exactly_and_the_sign_is_free():
    fit = fit_scale_shift(np.array([0.0, 1.0]), np.array([5.0, 2.0]))
    np.testing.assert_allclose(fit, (-3, 5))


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_broken_predictions_are_loud(broken):
    pred, gt, valid = np.ones((2, 2)), np.ones((2, 2)), np.ones((2, 2), bool)
    pred[0, 0] = broken
    with pytest.raises(ValueError, match="1 of 4"):
        fit_scale_shift(pred, gt, valid)
    valid[0, 0] = False
    fit_scale_shift(pred, gt, valid)
    with pytest.raises(ValueError, match="shape"):
        fit_scale_shift(pred, gt[0], valid)


def test_clipping_to_the_range_of_the_data_set():
    gt = np.array([1.0, 2.0, 3.0, 100.0])
    valid = gt < 50
    np.testing.assert_allclose(align(gt, gt, valid, 1.5, 10), [1.5, 2, 3, 10])


def test_a_fit_of_large_maps_looks_at_some_columns_only(torch):
    """ETH3D's rule: 1024 on the long side, which its filter applies to the width alone."""
    for size, resolution in (((4032, 6048), 1024), ((40, 60), 25), ((75, 31), 20), ((37, 53), 7)):
        ramp = torch.arange(size[1], dtype=torch.float64).repeat(2, 1)[None]
        factor = min(resolution / size[0], resolution / size[1])
        theirs = torch.nn.Upsample(scale_factor=factor, mode="nearest")(ramp)[0, 0].numpy()
        np.testing.assert_array_equal(nearest_columns(size, resolution), theirs)


def test_the_fit_of_some_columns_is_applied_to_all():
    rng = np.random.default_rng(0)
    gt, pred = rng.uniform(1, 9, (6, 40)), rng.standard_normal((6, 40))
    some = nearest_columns((6, 40), 10)
    assert len(some) == 10 and (np.diff(some) == 4).all()
    scale, shift = fit_scale_shift(pred[:, some], gt[:, some])
    np.testing.assert_allclose(align(pred, gt, max_resolution=10), scale * pred + shift)
    np.testing.assert_array_equal(align(pred, gt, max_resolution=40), align(pred, gt))
    valid = np.ones((6, 40), bool)
    valid[:, some] = False
    with pytest.raises(ValueError, match="no valid pixel in the columns"):
        align(pred, gt, valid, max_resolution=10)
