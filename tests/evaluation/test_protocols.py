"""Protocols against arithmetic by hand: ranges, crops, alignment, clipping, and what a fingerprint notices."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from scaling_perception.data.sources import SOURCES
from scaling_perception.evaluation.intervals import summarise
from scaling_perception.evaluation.protocols import (
    DEPTH_SETS,
    RECORDS,
    baseline_rows,
    count_note,
    fingerprint,
    get_protocol,
    measure,
    prepare_raw,
    unmeasurable,
)
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import TASKS
from scaling_perception.tasks.depth import crop_mask

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


def test_marigolds_evaluation_on_the_reference_arrays(golden):
    """Least squares in depth, clipping, strict thresholds, image means then their mean: equal to 1e-6."""
    data = load_file(golden / "metrics" / "depth.safetensors")
    protocol = get_protocol("depth", "unknown", minimum=1e-3)
    for i in range(3):
        pred, gt, mask = (data[f"in/{name}"][i] for name in ("affine_pred", "gt", "mask"))
        raw = prepare_raw(_depth(gt, mask & (gt > 1e-3)), protocol)
        np.testing.assert_array_equal(raw["valid"], mask)
        found = measure(pred, raw, protocol)
        assert found["delta1"] == pytest.approx(data[f"out/lsq/{i}/delta1"].item(), rel=1e-6)
        free = measure(pred, raw, get_protocol("depth", "unknown", minimum=1e-3) | {"clip": [None, None]})
        assert free["abs_rel"] == pytest.approx(data[f"out/lsq/{i}/abs_rel"].item(), rel=1e-6)


@pytest.mark.parametrize("dataset", ["hypersim", "nyuv2", "kitti_depth", "eth3d", "scannet", "diode"])
def test_published_sets_step_by_step(dataset):
    """The steps of the published evaluation written out once more, in float64."""
    size = {"kitti_depth": (375, 1242), "nyuv2": (480, 640), "eth3d": (1200, 1300)}.get(dataset, (48, 64))
    rng = np.random.default_rng(1)
    low, high = {"hypersim": (1e-5, 65), "kitti_depth": (1e-5, 80), "eth3d": (1e-5, np.inf), "diode": (0.6, 350)}.get(
        dataset, (1e-3, 10)
    )
    truth = np.where(rng.random(size) < 0.2, 0, rng.gamma(2, 5, size)).astype(np.float32)
    mask = rng.random(size) < 0.7
    pred = (0.1 * truth + 0.3 * rng.standard_normal(size)).astype(np.float32)
    raw = {**_depth(truth), "valid": (truth > 0) & mask}
    protocol = get_protocol("depth", dataset, metrics="all")
    prepared = prepare_raw(raw, protocol)
    if dataset == "kitti_depth":
        window = np.s_[375 - 352 :, 13 : 13 + 1216]
        truth, mask, pred = truth[window], mask[window], pred[window]
    valid = (truth > 0) & mask if dataset == "diode" else (truth > low) & (truth < high) & mask
    crop = np.ones_like(valid)
    if dataset == "nyuv2":
        crop[:] = False
        crop[45:471, 41:601] = True
    if dataset == "kitti_depth":
        crop[:] = False
        crop[int(0.3324324 * 352) : int(0.91351351 * 352), int(0.0359477 * 1216) : int(0.96405229 * 1216)] = True
    valid &= crop
    np.testing.assert_array_equal(prepared["valid"], valid)
    some = np.s_[:, np.floor(np.arange(1024) * np.float32(1300 / 1024)).astype(int)] if dataset == "eth3d" else np.s_[:]
    x, y = pred[some][valid[some]].astype(np.float64), truth[some][valid[some]].astype(np.float64)
    (scale, shift), *_ = np.linalg.lstsq(np.stack([x, np.ones_like(x)], -1), y, rcond=None)
    metres = np.clip(np.clip(pred.astype(np.float64) * scale + shift, low, high), 1e-6, None)[valid]
    d = truth[valid].astype(np.float64)
    found = measure(pred, prepared, protocol)
    assert list(found) == list(TASKS["depth"].metrics)
    assert found["abs_rel"] == pytest.approx(np.mean(np.abs(metres - d) / d), rel=1e-9)
    assert found["delta1"] == pytest.approx(np.mean(np.maximum(metres / d, d / metres) < 1.25), abs=1e-12)
    assert found["rmse_log"] == pytest.approx(np.sqrt(np.mean((np.log(metres) - np.log(d)) ** 2)), rel=1e-9)


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


def test_occlusion_rows_are_measured_where_the_set_has_them(make_raw):
    protocol = get_protocol("flow", "sintel", metrics=["epe", "epe_noc", "epe_occ"])
    raw = prepare_raw(make_raw(4, 5), protocol)
    assert unmeasurable(raw, protocol) == "it has no mask of occlusions, which epe_noc needs"
    hidden = np.zeros((4, 5), bool)
    raw = {**raw, "valid": np.ones((4, 5), bool), "occluded": hidden}
    assert not unmeasurable(raw, protocol)
    wrong = raw["flow"] + np.float32([3, 4])
    assert measure(wrong, raw, protocol) == pytest.approx({"epe": 5, "epe_noc": 5}, rel=1e-5)
    hidden[0] = True
    assert list(measure(wrong, raw, protocol)) == ["epe", "epe_noc", "epe_occ"]
    assert list(baseline_rows(raw, protocol)["zero"]) == ["epe", "epe_noc", "epe_occ"]


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
    raw = prepare_raw(make_raw(), depth)
    raw["valid"][:, ::4] = False  # the columns that a fit at most 14 wide looks at
    assert unmeasurable(raw, {**depth, "alignment_resolution": 14}).startswith("no valid pixel in the columns")
    assert not unmeasurable(raw, {**depth, "alignment_resolution": 20})
    assert unmeasurable(prepare_raw(make_raw(depth=np.full((40, 56), 50.0, np.float32)), depth), depth)
    assert not unmeasurable(prepare_raw(make_raw(), depth), depth)
    few = np.zeros((40, 56), bool)
    few.reshape(-1)[:2200:250] = True
    for task in ("depth", "flow"):
        protocol = get_protocol(task, "scenes")
        assert unmeasurable(prepare_raw(make_raw(valid=few), protocol), protocol).startswith("9 valid pixel(s)")
        enough = few.copy()
        enough[30, 30:40] = True
        assert not unmeasurable(prepare_raw(make_raw(valid=enough), protocol), protocol)
    flat = prepare_raw(make_raw(depth=np.full((40, 56), 2.5, np.float32)), depth)
    assert unmeasurable(flat, depth).startswith("the true depth is 2.5 m at all")
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
    assert changed["clip"] == [1e-3, 80.0]
    more = get_protocol("depth", "nyuv2", metrics="all")
    assert more["metrics"] == list(TASKS["depth"].metrics) and more["fingerprint"] in seen, (
        "showing more changes no figure"
    )
    with pytest.raises(UserError, match="depth has no metric 'absrel'; did you mean 'abs_rel'"):
        get_protocol("depth", "nyuv2", metrics=["absrel"])
    with pytest.raises(UserError, match="no field 'maximun'; did you mean 'maximum'"):
        get_protocol("depth", "nyuv2", maximun=80.0)


def test_every_published_set_has_a_source_and_a_record():
    for dataset, record in RECORDS.items():
        task = SOURCES[dataset].tasks[0]
        protocol = get_protocol(task, dataset)
        assert protocol["rule"].startswith("facts") and protocol["decode"] and protocol["resolution"]
        assert set(record) <= set(protocol)
        assert task != "depth" or dataset in DEPTH_SETS
    table = {
        "hypersim": (1e-5, 65.0, 0, 7370),
        "nyuv2": (1e-3, 10.0, 0, 654),
        "kitti_depth": (1e-5, 80.0, 0, 652),
        "eth3d": (1e-5, None, 756, 454),
        "scannet": (1e-3, 10.0, 0, 800),
        "diode": (0.6, 350.0, 640, 771),
    }  # facts 6.1
    for dataset, (low, high, side, samples) in table.items():
        protocol = get_protocol("depth", dataset)
        assert protocol["clip"] == [low, high] and protocol["published_resolution"] == side
        assert protocol["samples"]["val"] == samples
    assert get_protocol("depth", "eth3d")["alignment_resolution"] == 1024
    assert get_protocol("amodal", "coco_amodal")["threshold"] == 250


def test_a_set_of_another_size_is_told():
    kitti, flow = get_protocol("depth", "kitti_depth"), get_protocol("flow", "kitti_flow")
    assert count_note(kitti, "val", 652) == ""
    assert count_note(kitti, "val", 651) == "kitti_depth val: 652 samples expected, 651 found"
    assert count_note(flow, "val", 194) == count_note(flow, "val", 200) == count_note(flow, "all", 3) == ""
    assert count_note(flow, "val", 1) == "kitti_flow val: 200 or 194 samples expected, 1 found"
    assert count_note(get_protocol("depth", "folder"), "val", 5) == ""


def test_merging_modes_have_defaults_and_names():
    assert [TASKS[name].reduce_mode(None) for name in ("depth", "flow", "amodal")] == ["lsq", "mean", "median"]
    with pytest.raises(UserError, match="did you mean 'minmax'"):
        TASKS["depth"].reduce_mode("minmx")


def test_the_published_outliers_of_kitti_are_over_all_pixels(make_raw):
    protocol = get_protocol("flow", "kitti_flow", ["fl_all"])
    rows, outliers, pixels = [], 0, 0
    for seed, share in ((0, 1.0), (1, 0.1)):
        valid = np.random.default_rng(seed).random((40, 56)) < share
        raw = prepare_raw(make_raw(seed=seed, valid=valid), protocol)
        rng = np.random.default_rng(9 + seed)
        flow = raw["flow"] + rng.normal(0, 3, raw["flow"].shape).astype(np.float32)
        rows.append({"key": str(seed), **measure(flow, raw, protocol)})
        error = np.linalg.norm(flow - raw["flow"], axis=-1)
        bad = (error > 3) & (error > 0.05 * np.linalg.norm(raw["flow"], axis=-1)) & raw["valid"]
        outliers, pixels = outliers + bad.sum(), pixels + raw["valid"].sum()
    assert summarise(rows)["fl_all"]["mean"] == pytest.approx(100 * outliers / pixels)
