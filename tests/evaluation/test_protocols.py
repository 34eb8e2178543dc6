"""Protocols against arithmetic by hand: ranges, crops, alignment, clipping, and what a fingerprint notices."""

import json

import numpy as np
import pytest

from scaling_perception.evaluation.protocols import (
    REDUCE,
    baseline_rows,
    crop_mask,
    fingerprint,
    get_protocol,
    measure,
    prepare_raw,
    reduce_mode,
    unmeasurable,
)
from scaling_perception.support.errors import UserError

pytest_plugins = ("nano",)


def _depth(depth, valid=None):
    depth = np.asarray(depth, np.float32)
    image = np.zeros((*depth.shape, 3), np.uint8)
    return {"key": "k", "image": image, "depth": depth, "valid": np.ones(depth.shape, bool) if valid is None else valid}


def test_range_is_strict_and_decides_what_is_measured():
    raw = _depth([[1e-3, 0.5, 9.999, 10.0, 0.0]])
    assert prepare_raw(raw, get_protocol("depth", "icl_nuim"))["valid"].tolist() == [[False, True, True, False, False]]
    assert prepare_raw(raw, get_protocol("depth", "unknown"))["valid"].tolist() == [[True, True, True, True, False]]
    assert raw["valid"].all(), "the given sample must not change"
    known = np.array([[True, False, True, True, True]])
    prepared = prepare_raw({**raw, "valid": known}, get_protocol("depth", "icl_nuim"))
    assert prepared["valid"].tolist() == [[False, False, True, False, False]]
    # Another data set decides validity by its own mask; the range only clips.
    assert prepare_raw(_depth([[0.5, 400.0]]), get_protocol("depth", "diode"))["valid"].all()


def test_eigen_crop_of_nyu_is_rows_45_to_471_and_columns_41_to_601():
    inside = crop_mask("eigen_nyu", (480, 640))
    rows, columns = np.nonzero(inside)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (45, 470, 41, 600)
    assert inside.sum() == 426 * 560
    prepared = prepare_raw(_depth(np.full((480, 640), 2.0)), get_protocol("depth", "nyuv2"))
    np.testing.assert_array_equal(prepared["valid"], inside)


def test_kitti_is_cropped_at_the_bottom_and_centre_then_by_eigen():
    raw = _depth(np.arange(375 * 1242, dtype=np.float32).reshape(375, 1242) / 1e4 + 1)
    prepared = prepare_raw(raw, get_protocol("depth", "kitti_depth"))
    assert prepared["image"].shape == (352, 1216, 3) and prepared["depth"].shape == (352, 1216)
    assert prepared["depth"][0, 0] == raw["depth"][23, 13] and prepared["depth"][-1, -1] == raw["depth"][374, 1228]
    rows, columns = np.nonzero(prepared["valid"])
    assert (rows.min(), rows.max()) == (int(0.3324324 * 352), int(0.91351351 * 352) - 1)
    assert (columns.min(), columns.max()) == (int(0.0359477 * 1216), int(0.96405229 * 1216) - 1)
    whole = prepare_raw(raw, get_protocol("depth", "kitti_depth", image_crop=None))
    assert whole["depth"].shape == (375, 1242)


def test_depth_is_aligned_then_clipped_then_measured():
    truth = np.array([[1.0, 2.0], [4.0, 60.0]], np.float32)
    protocol = get_protocol("depth", "icl_nuim")  # 60 m is out of range: it must not enter the fit
    raw = prepare_raw(_depth(truth), protocol)
    perfect = np.array([[0.1, 0.2], [0.4, 0.9]])
    found = measure(perfect, raw, protocol)
    assert found == pytest.approx({"abs_rel": 0.0, "delta1": 1.0}, abs=1e-12)
    # By hand: values 0, 1, 0 against 1, 2, 4: scale -0.5, shift 2.5 -> 2.5, 2, 2.5.
    found = measure(np.array([[0.0, 1.0], [0.0, 0.0]]), raw, protocol)
    assert found["abs_rel"] == pytest.approx((1.5 / 1 + 0 + 1.5 / 4) / 3)
    assert found["delta1"] == pytest.approx(1 / 3)


def test_clipping_brings_a_wild_fit_back_into_range():
    # The fit of 0, 1, 2, 3 to 1, 1, 1, 9 is -0.6, 1.8, 4.2, 6.6: the first becomes 1 mm, not -0.6 m.
    protocol = get_protocol("depth", "icl_nuim")
    raw = prepare_raw(_depth([[1.0, 1.0, 1.0, 9.0]]), protocol)
    found = measure(np.array([[0.0, 1.0, 2.0, 3.0]]), raw, protocol)
    assert found["abs_rel"] == pytest.approx(((1 - 1e-3) + 0.8 + 3.2 + 2.4 / 9) / 4)


def test_flow_is_measured_in_native_pixels_raw_and_fitted(make_raw):
    protocol = get_protocol("flow", "middlebury_flow")
    raw = make_raw(4, 5)
    raw["flow"][0, 0] = np.nan
    raw["valid"][:] = True
    prepared = prepare_raw(raw, protocol)
    assert not prepared["valid"][0, 0] and prepared["valid"].sum() == 19
    wrong = np.nan_to_num(raw["flow"]) * np.float32(2) + np.float32([3, 4])
    found = measure(wrong, prepared, protocol)
    keep = prepared["valid"]
    expected = np.linalg.norm(raw["flow"][keep] + np.float32([3, 4]), axis=-1).mean()
    assert found["epe"] == pytest.approx(expected, rel=1e-5)
    assert found["epe_fitted"] == pytest.approx(0, abs=1e-5)


def test_amodal_is_intersection_over_union(make_raw):
    protocol = get_protocol("amodal", "pix2gestalt")
    raw = prepare_raw(make_raw(), protocol)
    truth = raw["whole_mask"]
    assert measure(truth, raw, protocol) == {"iou": 1.0}
    assert measure(~truth, raw, protocol) == {"iou": 0.0}
    rows = baseline_rows(raw, protocol)
    assert rows == {"visible": {"iou": 15 * 22 / (25 * 32)}}


def test_baselines_are_fitted_once(make_raw):
    protocol = get_protocol("depth", "scenes")
    ramp = np.repeat(np.linspace(1, 9, 40, dtype=np.float32)[:, None], 56, axis=1)
    raw = prepare_raw(make_raw(depth=ramp), protocol)
    rows = baseline_rows(raw, protocol)
    assert list(rows) == ["constant", "row", "inverse_row"]
    assert rows["row"]["abs_rel"] == pytest.approx(0, abs=1e-6)
    depth = ramp[raw["valid"]].astype(np.float64)
    assert rows["constant"]["abs_rel"] == pytest.approx(np.mean(np.abs(depth.mean() - depth) / depth))
    flow = get_protocol("flow", "scenes")
    raw = prepare_raw(make_raw(), flow)
    lengths = np.linalg.norm(raw["flow"][raw["valid"]].astype(np.float64), axis=-1)
    assert baseline_rows(raw, flow)["zero"]["epe"] == pytest.approx(lengths.mean())


def test_what_cannot_be_measured_is_told_apart(make_raw):
    depth = get_protocol("depth", "nyuv2")
    assert unmeasurable(prepare_raw(make_raw(depth=np.full((40, 56), 50.0, np.float32)), depth), depth)
    assert not unmeasurable(prepare_raw(make_raw(), depth), depth)
    amodal = get_protocol("amodal", "x")
    assert unmeasurable(make_raw(whole_mask=np.zeros((40, 56), bool)), amodal) == "the true mask is empty"


def test_a_broken_prediction_is_no_figure(make_raw):
    for task, bad in (("depth", np.full((40, 56), np.nan)), ("flow", np.full((40, 56, 2), np.inf))):
        protocol = get_protocol(task, "scenes")
        with pytest.raises(ValueError, match="NaN or infinite"):
            measure(bad, prepare_raw(make_raw(), protocol), protocol)


def test_fingerprint_notices_every_change():
    seen = set()
    for task, dataset in (("depth", "nyuv2"), ("depth", "hypersim"), ("flow", "scenes"), ("amodal", "scenes")):
        protocol = get_protocol(task, dataset)
        assert protocol == json.loads(json.dumps(protocol)), "a protocol is stored as JSON"
        assert protocol["fingerprint"] == fingerprint(protocol)
        seen.add(protocol["fingerprint"])
    assert len(seen) == 4
    changed = get_protocol("depth", "nyuv2", maximum=80.0)
    assert changed["fingerprint"] not in seen and get_protocol("depth", "nyuv2")["fingerprint"] in seen


def test_merging_modes_have_defaults_and_names():
    assert [reduce_mode(task, None) for task in REDUCE] == ["lsq", "mean", "median"]
    with pytest.raises(UserError, match="did you mean 'minmax'"):
        reduce_mode("depth", "minmx")
