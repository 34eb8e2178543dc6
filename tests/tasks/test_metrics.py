import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from scaling_perception.data.formats import read_kitti_flow
from scaling_perception.tasks.metrics import (
    DEPTH_METRICS,
    FLOW_METRICS,
    depth_metrics,
    flow_metrics,
    mask_iou,
    mask_metrics,
    mean_iou,
)


def test_depth_metrics_agree_with_the_reference(golden):
    data = load_file(golden / "metrics" / "depth.safetensors")
    rows = [depth_metrics(*(data[f"in/{name}"][i] for name in ("pred", "gt", "mask"))) for i in range(3)]
    names = {
        "abs_rel": "abs_relative_difference",
        "sq_rel": "squared_relative_difference",
        "rmse": "rmse_linear",
        "i_rmse": "i_rmse",
        "rmse_log": "rmse_log",
        "delta1": "delta1_acc",
        "delta2": "delta2_acc",
        "delta3": "delta3_acc",
    }
    for ours, theirs in names.items():
        np.testing.assert_allclose(np.mean([row[ours] for row in rows]), data[f"out/depth/{theirs}"], rtol=1e-6)
    # The reference pools these two over the pixels, or the squares, of the batch.
    pixels = data["in/mask"].sum(axis=(1, 2))
    pooled = np.average([row["log10"] for row in rows], weights=pixels)
    np.testing.assert_allclose(pooled, data["out/depth/log10"], rtol=1e-6)
    pooled = np.sqrt(np.mean([row["silog"] ** 2 for row in rows]))
    np.testing.assert_allclose(pooled, data["out/depth/silog_rmse"], rtol=1e-6)


def test_only_what_is_asked_for_is_computed():
    gt = np.random.default_rng(0).uniform(1, 9, (5, 6))
    every = depth_metrics(gt**1.1, gt)
    assert tuple(every) == DEPTH_METRICS
    assert depth_metrics(gt**1.1, gt, names=["log10", "abs_rel"]) == {n: every[n] for n in ("log10", "abs_rel")}


def test_delta_is_strict_and_two_negatives_do_not_agree():
    gt = np.array([[4.0, 4.0, 4.0, 4.0]])
    row = depth_metrics(np.array([[5.0, np.nextafter(5.0, 0), 4.0, -4.0]]), gt)
    assert row["delta1"] == 0.5  # 5 / 4 is exactly 1.25: outside
    assert row["delta3"] == 0.75


def test_depth_metrics_of_known_errors():
    row = depth_metrics(np.array([2.0, 3.0]), np.array([1.0, 3.0]))
    assert (row["abs_rel"], row["sq_rel"], row["rmse"]) == (0.5, 0.5, np.sqrt(0.5))
    assert row["log10"] == pytest.approx(np.log10(2) / 2)
    assert depth_metrics(np.array([2.0, 4.0]), np.array([1.0, 2.0]))["silog"] == pytest.approx(0, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), factor=st.floats(1.01, 2))
def test_the_deltas_are_ordered_and_symmetric(seed, factor):
    rng = np.random.default_rng(seed)
    gt = rng.uniform(1, 10, (4, 4))
    pred = gt * factor ** rng.choice([-1, 1], gt.shape)
    row = depth_metrics(pred, gt)
    assert 0 <= row["delta1"] <= row["delta2"] <= row["delta3"] <= 1
    assert row["delta1"] in (0, 1) or factor == pytest.approx(1.25)
    assert depth_metrics(gt, pred)["delta1"] == row["delta1"]


def test_flow_metrics_agree_with_the_reference(golden):
    data = load_file(golden / "metrics" / "flow.safetensors")
    pred, gt = (np.stack([data[f"in/{name}_x"], data[f"in/{name}_y"]], -1) for name in ("pred", "gt"))
    every, valid = flow_metrics(pred, gt), flow_metrics(pred, gt, data["in/valid"])
    np.testing.assert_allclose(every["epe"], data["out/epe_no_fit"], rtol=1e-6)
    np.testing.assert_allclose(every["epe_fitted"], data["out/epe_with_fit"], rtol=1e-6)
    wanted = {"epe": "epe_valid", "f1_all": "f1_all"} | {f"within_{n}px": f"raft_{n}px" for n in (1, 3, 5)}
    for ours, theirs in wanted.items():
        np.testing.assert_allclose(valid[ours], data[f"out/{theirs}"], rtol=1e-6)
    assert valid["f1_all"] > 0
    for n in (1, 3, 5):
        assert valid[f"outlier_{n}px"] == pytest.approx(1 - valid[f"within_{n}px"])


def test_occluded_pixels_have_rows_of_their_own():
    gt = np.zeros((2, 3, 2))
    pred = gt.copy()
    pred[0, :, 0] = [1, 2, 10]
    valid = np.array([[True, True, True], [True, False, False]])
    hidden = np.array([[False, False, True], [False, True, True]])  # two of them have no truth
    row = flow_metrics(pred, gt, valid, hidden)
    assert row["epe"] == pytest.approx(13 / 4) and row["epe_noc"] == 1 and row["epe_occ"] == 10
    assert (row["f1_all"], row["f1_noc"], row["f1_occ"], row["outlier_1px"]) == (0.25, 0, 1, 0.5)
    assert set(row) == set(FLOW_METRICS)
    assert set(flow_metrics(pred, gt, valid, hidden & False)) == set(FLOW_METRICS) - {"epe_occ", "f1_occ"}
    assert not {"epe_noc", "epe_occ"} & set(flow_metrics(pred, gt, valid))


def test_the_fitted_error_forgives_scale_and_shift_of_each_component_only():
    rng = np.random.default_rng(0)
    gt = rng.standard_normal((5, 6, 2)) * 10
    row = flow_metrics(gt * [0.5, -2] + [3, 4], gt)
    assert row["epe_fitted"] < 1e-9 < 1 < row["epe"]
    swapped = flow_metrics(gt[..., ::-1], gt)
    assert swapped["epe_fitted"] > 1


def test_an_outlier_needs_three_pixels_and_five_per_cent():
    gt = np.zeros((1, 4, 2))
    gt[..., 0] = [0, 100, 100, 10]
    pred = gt + np.array([[[3.1, 0], [0, 4.9], [0, 5.1], [3.0, 0]]])
    assert flow_metrics(pred, gt)["f1_all"] == 0.5


def test_the_published_kitti_example(shared_dir):
    """The development kit's own pair: a truth, an estimate, and the figures its tool prints for them."""
    folder = shared_dir / "data" / "kitti_devkit"
    (pred, known), (gt, valid) = (read_kitti_flow(folder / f"flow_{name}.png") for name in ("est", "gt"))
    row = flow_metrics(pred, gt, valid & known)
    assert row["epe"] == pytest.approx(12.2007, abs=5e-5)
    assert row["f1_all"] == pytest.approx(0.20688, abs=5e-6)


def test_iou_agrees_with_the_reference(golden):
    data = load_file(golden / "metrics" / "iou.safetensors")
    pairs = list(zip(data["in/a"], data["in/b"], strict=True))
    for i, (a, b) in enumerate(pairs):
        row = mask_metrics(a, b)
        np.testing.assert_allclose(row["iou"], data["out/iou"][i], rtol=1e-6)
        np.testing.assert_allclose(row["dice"], data["out/dice"][i], rtol=1e-6)
        assert row["iou"] == mask_iou(a, b) == mask_iou(b, a)
    np.testing.assert_allclose(mean_iou(pairs), data["out/miou_nonempty"], rtol=1e-6)


def test_iou_conventions():
    none, some = np.zeros((2, 2), bool), np.eye(2, dtype=bool)
    assert mask_iou(none, none) == 0 and mask_iou(some, some) == 1 and mask_iou(none, some) == 0
    assert mask_iou(some, ~none) == 0.5
    assert mask_iou(some, ~none, valid=some) == 1
    assert mean_iou([(none, none), (some, some)]) == 1
    with pytest.raises(ValueError, match="empty"):
        mean_iou([(none, none)])
    with pytest.raises(ValueError, match="bool"):
        mask_iou(some.astype(np.float32), some)
    with pytest.raises(ValueError, match="shape"):
        mask_iou(some, some[:1])
    with pytest.raises(ValueError, match="no valid pixel"):
        mask_iou(some, some, valid=none)


@pytest.mark.parametrize("metrics, shape", [(depth_metrics, (3, 3)), (flow_metrics, (3, 3, 2))])
def test_broken_predictions_and_empty_images_are_loud(metrics, shape):
    gt, valid = np.ones(shape), np.ones((3, 3), bool)
    for value in (np.nan, np.inf):
        pred = np.ones(shape)
        pred[1, 1] = value
        with pytest.raises(ValueError, match="NaN"):
            metrics(pred, gt, valid)
    valid[1, 1] = False
    assert all(np.isfinite(value) for value in metrics(pred, gt, valid).values())
    with pytest.raises(ValueError, match="no valid pixel"):
        metrics(pred, gt, np.zeros((3, 3), bool))


def test_a_truth_of_zero_depth_under_a_valid_pixel_is_loud():
    with pytest.raises(ValueError, match="valid mask"):
        depth_metrics(np.ones((2, 2)), np.array([[1.0, 0.0], [1.0, 1.0]]))
