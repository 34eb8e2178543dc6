"""The predict verb: every output read back, finished work kept, bad files named, mistakes told in one line."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from scaling_perception.cli import main
from scaling_perception.data.formats import read_flo, read_image, read_kitti_flow, read_mask, read_png16
from scaling_perception.predict import find_inputs, name_results
from scaling_perception.support.errors import UserError

pytest_plugins = ("nano",)


@pytest.fixture
def pictures(tmp_path, make_image):
    """A folder of three frames of one size, and one of another."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i, name in enumerate(("frame_1.png", "frame_2.jpg", "frame_10.png")):
        Image.fromarray(make_image(40, 56, i)).save(folder / name)
    Image.fromarray(make_image(24, 30, 9)).save(tmp_path / "small.png")
    return folder


@pytest.fixture
def predict(nano_folder, tmp_path, capsys):
    def run(task, *words, code=0, out="out", ensemble=2):
        options = ["--task", task, "--model", str(nano_folder), "--steps", "2", "--ensemble", str(ensemble)]
        done = main(["predict", *options, "--batch-size", "4", "--out", str(tmp_path / out), *map(str, words)])
        text = capsys.readouterr()
        assert done == code, text.err
        return text

    return run


def test_depth_files_agree_and_tell_how_to_repeat(predict, pictures, tmp_path):
    predict("depth", pictures, tmp_path / "small.png")
    out = tmp_path / "out"
    assert len(list(out.iterdir())) == 4 * 6
    depth = np.load(out / "frame_1_depth.npy")
    assert depth.dtype == np.float32 and depth.shape == (40, 56) and depth.min() >= 0 and depth.max() <= 1
    np.testing.assert_array_equal(read_png16(out / "frame_1_depth_16bit.png"), np.round(depth * 65535))
    assert np.load(out / "small_depth_uncertainty.npy").shape == (24, 30)
    for name in ("depth_color", "depth_uncertainty"):
        assert read_image(out / f"small_{name}.png").shape == (24, 30, 3)
    record = json.loads((out / "frame_1_depth.json").read_text())
    assert record["inputs"]["files"] == [str((pictures / "frame_1.png").resolve())]
    assert record["settings"]["steps"] == 2 and record["settings"]["reduce"] == "lsq" and record["macs"] > 0
    assert all((out / file).is_file() for file in record["outputs"].values())
    predict("depth", pictures / "frame_1.png", out="again")
    np.testing.assert_allclose(np.load(tmp_path / "again" / "frame_1_depth.npy"), depth, atol=2e-5)


def test_one_member_has_no_uncertainty_to_write(predict, tmp_path, pictures):
    predict("depth", tmp_path / "small.png", ensemble=1)
    assert not list((tmp_path / "out").glob("*uncertainty*"))


def test_flow_of_pairs_and_of_frames(predict, pictures, tmp_path):
    predict("flow", pictures, f"{pictures}/frame_1.png,{pictures}/frame_10.png", "--kitti")
    out = tmp_path / "out"
    records = sorted(json.loads(path.read_text())["inputs"]["files"] for path in out.glob("*_flow.json"))
    names = [[file.rsplit("/", 1)[1] for file in pair] for pair in records]
    assert names == [["frame_1.png", "frame_10.png"], ["frame_1.png", "frame_2.jpg"], ["frame_2.jpg", "frame_10.png"]]
    flow = read_flo(out / "frame_2_flow.flo")
    kitti, valid = read_kitti_flow(out / "frame_2_flow_kitti.png")
    assert flow.shape == (40, 56, 2) and valid.all()
    np.testing.assert_allclose(kitti, flow, atol=1 / 128 + 1e-5)
    assert read_image(out / "frame_2_flow_color.png").shape == (40, 56, 3)


def test_amodal_with_a_folder_of_masks(predict, pictures, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    mask = np.zeros((40, 56), np.uint8)
    mask[10:30, 10:30] = 255
    Image.fromarray(mask).save(masks / "frame_1.png")
    Image.fromarray(mask).save(masks / "frame_2_mask.png")
    Image.fromarray(mask[:20]).save(masks / "frame_10.png")
    text = predict("amodal", pictures, tmp_path / "small.png", "--mask", masks, code=1)
    out = tmp_path / "out"
    assert {path.name for path in out.glob("*_amodal.json")} == {"frame_1_amodal.json", "frame_2_amodal.json"}
    assert "2 written" in text.out and "2 failed" in text.out
    assert "56x20" in text.err and "small.png does not exist" in text.err
    stored = read_image(out / "frame_1_amodal_mask.png")[..., 0]
    assert stored.shape == (40, 56) and set(np.unique(stored)) <= {0, 255} and stored.mean() > 0
    whole = read_image(out / "frame_1_amodal_whole.png").astype(np.float64)
    grey = whole @ (0.114, 0.587, 0.299)
    clear = np.abs(grey - 250) > 1  # rounding to 8 bits may move the rest over the threshold
    np.testing.assert_array_equal(read_mask(out / "frame_1_amodal_mask.png")[clear], (grey <= 250)[clear])
    predict("amodal", pictures / "frame_1.png", "--mask", masks / "frame_1.png", out="one")


def test_a_bad_file_does_not_stop_the_rest_and_finished_work_is_kept(predict, pictures, tmp_path):
    good = (pictures / "frame_2.jpg").read_bytes()
    (pictures / "frame_2.jpg").write_bytes(good[: len(good) // 2])
    text = predict("depth", pictures, tmp_path / "small.png", code=1)
    out = tmp_path / "out"
    assert text.err.count("failed: ") == 1 and "frame_2.jpg is cut short" in text.err
    assert not list(out.glob("frame_2*")) and not list(out.glob(".*")), "nothing partial"
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (pictures / "frame_2.jpg").write_bytes(good)
    text = predict("depth", pictures, tmp_path / "small.png")
    assert "1 written" in text.out and "3 already there" in text.out
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert all(after[name] == stamp for name, stamp in before.items()) and "frame_2_depth.json" in after
    (out / "frame_1_depth.npy").unlink()  # an unfinished one is made again
    shutil.copy(pictures / "frame_10.png", tmp_path / "small.png")  # and one whose input changed
    text = predict("depth", pictures, tmp_path / "small.png")
    assert "2 written" in text.out and np.load(out / "small_depth.npy").shape == (40, 56)


def test_other_settings_neither_keep_nor_replace_silently(predict, pictures, tmp_path):
    predict("depth", pictures / "frame_1.png")
    text = predict("depth", pictures / "frame_1.png", "--seed", "1", code=2)
    assert "seed 0, not 1" in text.err and text.err.count("\n") == 1
    old = np.load(tmp_path / "out" / "frame_1_depth.npy")
    predict("depth", pictures / "frame_1.png", "--seed", "1", "--overwrite")
    assert np.abs(np.load(tmp_path / "out" / "frame_1_depth.npy") - old).max() > 1e-3


def test_mistakes_are_one_line(predict, pictures, tmp_path):
    image = pictures / "frame_1.png"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for words, message in (
        (("dept", image), "did you mean 'depth'"),
        (("depth", tmp_path / "none.png"), "none.png does not exist"),
        (("depth", f"{tmp_path}/*.tga"), "matches no file"),
        (("depth", tmp_path / "empty"), "holds no picture"),
        (("depth", image, "--mask", image), "--mask belongs to amodal"),
        (("depth", image, "--kitti"), "--kitti belongs to flow"),
        (("depth", image, "--preset", "fixd"), "did you mean 'fixed'"),
        (("depth", image, "--ensemble", "0"), "ensemble 0"),
        (("depth", image, "--steps", "0"), "0 sampling steps"),
        (("depth", image, "--model", "mni"), "no folder, hub id"),
        (("flow", image), "is one frame"),
        (("flow", f"{image},"), "is no pair"),
        (("amodal", image), "amodal needs --mask"),
        (("amodal", pictures, "--mask", image), "is one file but there are 3 images"),
        (("amodal", image, "--mask", tmp_path / "nomask"), "nomask does not exist"),
    ):
        text = predict(*words, code=2)
        assert message in text.err and text.err.count("\n") == 1, text.err
    assert not (tmp_path / "out").exists()
    text = predict("depth", image, code=2, out="file")
    assert "cannot write" in text.err
    text = predict("depth", pictures, code=2, out="in")
    assert "is an input folder" in text.err


def test_globs_folders_and_order(pictures, tmp_path):
    found = find_inputs([f"{pictures}/*.png", str(pictures)], "depth")
    assert [files[0].name for files in found] == ["frame_1.png", "frame_10.png", "frame_2.jpg"]
    frames = find_inputs([str(pictures / "frame_1.png"), str(pictures / "frame_10.png")], "flow")
    assert [[f.name for f in pair] for pair in frames] == [["frame_1.png", "frame_10.png"]]
    with pytest.raises(UserError, match="one frame"):
        find_inputs([f"{pictures}/*.jpg"], "flow")


def test_masks_of_pix2gestalt_are_found(pictures, tmp_path):
    image, mask = tmp_path / "7_occlusion.png", pictures / "7_visible_mask.png"
    for path in (image, mask):
        shutil.copy(pictures / "frame_1.png", path)
    assert find_inputs([str(image)], "amodal", str(pictures)) == [(image, mask)]


def test_names_are_short_until_they_collide(tmp_path):
    paths = ["a/x.png", "a/y.png", "b/x.png", "b/x.jpg", "c/a.b/z.png", "d/a.b/z.png"]
    names = [item.name for item in name_results([(tmp_path / path,) for path in paths], "depth")]
    assert names[:4] == ["a_x", "y", "b_x_png", "b_x_jpg"] and len(set(names)) == 6
    again = [item.name for item in name_results([(tmp_path / path,) for path in paths[::-1]], "depth")]
    assert again[::-1] == names
