"""The predict verb: every output read back, finished work kept, bad files named, mistakes told in one line."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from scaling_perception.data.formats import read_flo, read_image, read_kitti_flow, read_png16
from scaling_perception.data.masks import read_mask

pytest_plugins = ("nano", "predicting")


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


@pytest.mark.usefixtures("loaded_once")
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


@pytest.mark.usefixtures("loaded_once")
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


@pytest.mark.usefixtures("loaded_once")
def test_damaged_results_are_made_again(predict, pictures, tmp_path):
    image, out = pictures / "frame_1.png", tmp_path / "out"
    predict("depth", image)
    record, npy, colour = out / "frame_1_depth.json", out / "frame_1_depth.npy", out / "frame_1_depth_color.png"
    whole, found = npy.read_bytes(), json.loads(record.read_text())
    assert found["bytes"] == {kind: (out / file).stat().st_size for kind, file in found["outputs"].items()}
    for file, content in ((npy, whole[:-1]), (npy, b""), (npy, whole + b"0"), (colour, b"")):
        file.write_bytes(content)
        assert "1 written" in predict("depth", image).out and npy.read_bytes() == whole
    del found["bytes"]  # a record of an earlier version
    record.write_text(json.dumps(found))
    assert "1 already there" in predict("depth", image).out
    npy.write_bytes(b"")
    assert "1 written" in predict("depth", image).out and npy.read_bytes() == whole
    colour.write_bytes(b"x")  # a file of another format than is asked for leaves the record
    assert "1 written" in predict("depth", image, "--formats", "npy,uncertainty", "--overwrite").out
    assert not colour.exists() and "color" not in json.loads(record.read_text())["bytes"]
    record.write_text(json.dumps({**found, "format": 3}))
    text = predict("depth", image, code=2)
    assert "frame_1_depth.json has format 3, this version reads up to 2" in text.err and text.err.count("\n") == 1
    assert "1 written" in predict("depth", image, "--overwrite").out


@pytest.mark.usefixtures("loaded_once")
def test_other_settings_make_a_result_anew_and_say_so(predict, pictures, tmp_path):
    out = tmp_path / "out"
    predict("depth", pictures / "frame_1.png")
    old, record = np.load(out / "frame_1_depth.npy"), (out / "frame_1_depth.json").read_text()
    text = predict("depth", pictures, "--seed", "1", "--resume", code=2)
    assert "--resume: 1 of 3 in" in text.err and "--seed 0, now 1" in text.err and text.err.count("\n") == 1
    assert (out / "frame_1_depth.json").read_text() == record and not list(out.glob("frame_2*")), "nothing was made"
    assert "leave out one" in predict("depth", pictures, "--resume", "--overwrite", code=2).err
    text = predict("depth", pictures, "--seed", "1", "--formats", "npy", "--json")
    notes = [line for line in text.err.splitlines() if line.startswith("note: ")]
    assert notes == [f"note: made anew: 1 of 3 in {out} had been made with other settings (--seed 0, now 1)"]
    assert np.abs(np.load(out / "frame_1_depth.npy") - old).max() > 1e-3
    assert sorted(path.name for path in out.glob("*frame_1_*")) == ["frame_1_depth.json", "frame_1_depth.npy"]
    assert json.loads((out / "frame_1_depth.json").read_text())["settings"]["seed"] == 1
    changed = {file["name"]: file.get("changed") for file in json.loads(text.out)["files"]}
    assert changed == {"frame_1": ["--seed 0, now 1"], "frame_2": None, "frame_10": None}
    text = predict("depth", pictures, "--seed", "1", "--formats", "npy", "--resume")
    assert "3 already there" in text.out and "anew" not in text.err


@pytest.mark.usefixtures("loaded_once")
def test_another_picture_of_the_same_name_does_not_take_its_place(predict, pictures, tmp_path):
    predict("depth", pictures / "frame_1.png")
    moved = tmp_path / "moved"
    shutil.copytree(pictures, moved)
    assert "1 already there" in predict("depth", moved / "frame_1.png").out, "the same content is the same picture"
    shutil.copy(pictures / "frame_10.png", moved / "frame_1.png")
    text = predict("depth", moved / "frame_1.png", code=2)
    assert "is the result of" in text.err and "--overwrite" in text.err and text.err.count("\n") == 1
    text = predict("depth", moved / "frame_1.png", pictures / "frame_2.jpg", "--seed", 1, code=1)
    assert "1 written" in text.out and "1 failed" in text.out and "is the result of" in text.err
    predict("depth", moved / "frame_1.png", "--overwrite")


@pytest.mark.usefixtures("loaded_once")
def test_one_results_fault_is_not_the_jobs(predict, pictures, tmp_path):
    out, deep = tmp_path / "out", pictures / "a"
    (out / "frame_2_depth.npy").mkdir(parents=True)  # a folder where a file should be
    (out / "frame_10_depth.json").write_text("[1]")  # no record of ours
    (out / "a").write_text("a file where a folder should be")
    deep.mkdir()
    shutil.copy(pictures / "frame_1.png", deep / "frame_1.png")
    long = [pictures / f"{'é' * 120}{i}.png" for i in range(2)]
    for path in (*long, pictures / "FRAME_1.png"):
        shutil.copy(pictures / "frame_1.png", path)
    listed = tmp_path / "list"
    listed.write_text(f"{pictures}/{'x' * 300}.png\n")
    words = (pictures, "--recursive", "--formats", "npy", "--list", listed, "--json")
    text = predict("depth", *words, code=1)
    found = {file["inputs"][0].rsplit("/", 1)[1]: file for file in json.loads(text.out)["files"]}
    failed = {name for name, file in found.items() if file["status"] == "failed" and name != "frame_1.png"}
    assert failed == {"frame_2.jpg", "frame_10.png", "x" * 300 + ".png"}, text.err
    for line in ("is no regular file", "is no record of predict", "File name too long", "/out/a/"):
        assert sum(line in error for error in text.err.splitlines()) == 1, text.err
    assert (out / "frame_10_depth.json").read_text() == "[1]"
    names = [path.name.lower() for path in out.glob("*.npy") if path.is_file()]
    assert len(set(names)) == 4 and not list(out.glob(".*")), "names that differ by more than case"
    text = predict("depth", *words, code=1)
    assert json.loads(text.out)["kept"] == 4, "the same names again"


@pytest.mark.usefixtures("loaded_once")
def test_formats_are_added_to_what_is_there_and_stale_ones_go(predict, pictures, tmp_path):
    image, out = pictures / "frame_1.png", tmp_path / "out"
    predict("depth", image, "--formats", "npy,uncertainty")
    assert {p.name.removeprefix("frame_1_depth") for p in out.iterdir()} == {
        *(".json", ".npy", "_uncertainty.npy", "_uncertainty.png"),
    }
    assert "1 written" in predict("depth", image, "--formats", "color").out
    assert (out / "frame_1_depth.npy").is_file() and (out / "frame_1_depth_color.png").is_file()
    for formats in ("npy", "color", "color,uncertainty"):
        assert "1 already there" in predict("depth", image, "--formats", formats).out
    predict("depth", image, "--formats", "npy", "--seed", 3)
    assert {p.name for p in out.iterdir()} == {"frame_1_depth.json", "frame_1_depth.npy"}, "nothing of the other seed"


def test_mistakes_are_one_line(predict, pictures, tmp_path):
    image = pictures / "frame_1.png"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for words, message in (
        (("dept", image), "did you mean 'depth'"),
        (("generation", image), "use `scaling-perception generate`"),
        (("depth", tmp_path / "none.png"), "none.png does not exist"),
        (("depth", f"{tmp_path}/*.tga"), "matches no file"),
        (("depth", tmp_path / "empty"), "holds no picture"),
        (("depth", image, "--mask", image), "--mask belongs to amodal"),
        (("depth", image, "--kitti"), "--kitti belongs to flow"),
        (("depth", image, "--preset", "fixd"), "did you mean 'fixed'"),
        (("depth", image, "--ensemble", "-1"), "argument --ensemble: '-1': give a whole number"),
        (("depth", image, "--steps", "0"), "argument --steps: '0': give a whole number"),
        (("depth", image, "--model", "mni"), "no folder, hub id"),
        (("flow", image), "is one frame"),
        (("flow", f"{image},"), "is no pair"),
        (("flow", f"{image},{tmp_path / 'none.png'}"), "none.png does not exist"),
        (("flow", f"{tmp_path / 'gone.png'},{image}"), "gone.png does not exist"),
        (("amodal", image), "amodal needs --mask"),
        (("amodal", pictures, "--mask", image), "is one file but there are 3 images"),
        (("amodal", image, "--mask", tmp_path / "nomask"), "nomask does not exist"),
        (("depth", image, "--formats", "pgn"), "known: color"),
        (("depth", image, "--formats", "metric"), "give --align"),
        (("depth", image, "--ply"), "give one of --intrinsics"),
        (("depth", image, "--ply", "--fov", 60, "--intrinsics", "1,1,1,1"), "give one of --intrinsics"),
        (("depth", image, "--ply", "--fov", 190), "--fov 190"),
        (("depth", image, "--fov", 60), "give --ply"),
        (("depth", image, "--ply", "--fov", 60, "--range", "2,1"), "NEAR < FAR"),
        (("depth", image, "--ply", "--fov", 60, "--range", "1,2", "--align", image), "--align gives metres: leave out"),
        (
            ("depth", image, "--ensemble", 10**8),
            "--ensemble: '100000000': give a whole number from 1 to 10000",
        ),
        (("flow", pictures, "--ply"), "--ply belongs to depth"),
        (("depth", image, "--align-fit", "robust"), "goes with --align"),
        (("depth", image, "--align", tmp_path / "none.csv"), "none.csv does not exist"),
        (("depth", image, "--budget", "fast"), "leave out --budget or --steps"),
        (("depth", image, "--solver", "dim"), "did you mean 'ddim'"),
        (("depth", image, "--aspect", "tiles"), "did you mean 'tile'"),
        (("depth", image, "--workers=-1"), "--workers -1"),
        (("depth", image, "-0"), "goes with a list"),
        (("depth",), "no input was given"),
    ):
        text = predict(*words, code=2)
        assert message in text.err and text.err.count("\n") == 1, text.err
    assert not (tmp_path / "out").exists()
    text = predict("depth", image, code=2, out="file")
    assert "cannot write" in text.err
    text = predict("depth", pictures, code=2, out="in")
    assert "is an input folder" in text.err


def test_weights_split_over_devices_predict_the_same(predict, pictures, tmp_path):
    """XL-8E2A's way into small memories, at nano size, and what no mesh is."""
    one = pictures / "frame_1.png"
    predict("depth", one, out="whole")
    predict("depth", one, "--mesh", "fsdp=4,tensor=2", out="split")
    whole, split = (np.load(tmp_path / name / "frame_1_depth.npy") for name in ("whole", "split"))
    np.testing.assert_allclose(split, whole, atol=2e-5)
    for words, told in (
        ("fsdp=3", "does not fit 8 devices"),
        ("fdsp=2", "--mesh: unknown axis 'fdsp'; did you mean 'fsdp'"),
        ("fsdp", "--mesh fsdp: give a whole number"),
        ("fsdp=-1", "and -1 (what is left) at most once"),
    ):
        assert told in predict("depth", one, "--mesh", words, code=2, out="wrong").err
