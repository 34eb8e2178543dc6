"""A person's own data: both layouts, every format, and a precise refusal for every mistake."""

import json

import numpy as np
import pytest
from pfm import write_pfm
from PIL import Image

from scaling_perception.data import formats
from scaling_perception.data.images import turned
from scaling_perception.data.sources import open_source
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import TaskOptions, get_task

H, W = 10, 14


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), dtype=np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def depth_of(seed):
    return np.random.default_rng(seed).uniform(1, 8, (H, W)).astype(np.float32)


def mask_of(seed):
    return (np.random.default_rng(seed).random((H, W)) < 0.5).astype(np.uint8) * 255


@pytest.fixture
def data(tmp_path):
    """Files of every kind in one folder, two samples 'a' and 'b', and a way to write a manifest of them."""
    for i, name in enumerate("ab"):
        save(tmp_path / f"{name}.png", picture(i))
        save(tmp_path / f"{name}_next.jpg", picture(10 + i))
        save(tmp_path / f"{name}_mask.png", mask_of(i))
        whole = np.full((H, W, 3), 255, np.uint8)
        whole[2:6, 2:9] = 30
        save(tmp_path / f"{name}_whole.png", whole)
        formats.write_png16(tmp_path / f"{name}_mm.png", np.round(depth_of(i) * 1000).astype(np.uint16))
        write_pfm(tmp_path / f"{name}.pfm", depth_of(i))
        formats.write_flo(tmp_path / f"{name}.flo", np.full((H, W, 2), (i + 1.0, -2.0)))
    return tmp_path


def manifest(folder, text, name="manifest.csv"):
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def refuse(words, root, task="depth", split="all", read=False, **options):
    with pytest.raises(UserError, match=words) as error:
        source = open_source("folder", root, split, task, **options)
        if read:
            source[0]
    assert "\n" not in str(error.value)


# Manifests


def test_depth_manifest(data):
    text = "image,depth,depth_scale,label,key\na.png,a_mm.png,,7,first\nb.png,b.pfm,2,,\n"
    source = open_source("folder", manifest(data, text), "train", "depth")
    assert len(source) == 2
    first, second = source[0], source[1]
    assert first["key"] == "first" and first["label"] == 7
    assert second["key"] == "b" and "label" not in second
    np.testing.assert_allclose(first["depth"], depth_of(0), atol=6e-4)  # PNG: millimetres unless told otherwise
    np.testing.assert_allclose(second["depth"], depth_of(1) / 2, rtol=1e-6)
    np.testing.assert_array_equal(first["image"], picture(0))
    assert get_task("depth").encode(first, 16, TaskOptions())[0]["label"] == 7


def test_json_lines_and_absolute_paths(data, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("list")
    rows = [{"image": str(data / "a.png"), "depth": str(data / "a.pfm"), "key": "one", "label": 3}]
    path = elsewhere / "mine.jsonl"
    path.write_text("\n" + "\n".join(json.dumps(row) for row in rows) + "\n\n")
    raw = open_source("folder", path, "all", "depth")[0]
    assert raw["label"] == 3 and raw["key"] == "one"
    np.testing.assert_array_equal(raw["depth"], depth_of(0))


def test_flow_and_amodal_manifests(data):
    text = (
        "image,image2,flow,visible_mask,whole,whole_mask,valid_mask\n"
        "a.png,a_next.jpg,a.flo,a_mask.png,a_whole.png,,b_mask.png\n"
        "b.png,b_next.jpg,b.flo,b_mask.png,,a_mask.png,\n"
    )
    root = manifest(data, "\ufeff" + text)  # with the mark that spreadsheets write
    flow = open_source("folder", root, "val", "flow")
    raw = flow[0]
    assert raw["image2"].shape == (H, W, 3) and (raw["flow"] == (1, -2)).all()
    np.testing.assert_array_equal(raw["valid"], mask_of(1) > 0)
    assert flow[1]["valid"].all()
    amodal = open_source("folder", root, "val", "amodal")
    raw = amodal[0]
    assert raw["whole_mask"].sum() == 4 * 7 and raw["whole_mask"][3, 4]  # made from the picture on white
    np.testing.assert_array_equal(raw["visible_mask"], mask_of(0) > 0)
    assert "whole" not in amodal[1]  # enough to evaluate
    with pytest.raises(UserError, match="sample 'b' has no whole"):
        get_task("amodal").encode(amodal[1], 8, TaskOptions())


def test_split_column(data):
    root = manifest(data, "image,depth,split\na.png,a.pfm,train\nb.png,b.pfm,val\n")
    assert [open_source("folder", root, split, "depth")[0]["key"] for split in ("train", "val")] == ["a", "b"]
    assert len(open_source("folder", root, "all", "depth")) == 2
    refuse("no row of split 'test': choose of train, val", root, split="test")


def test_fingerprint_holds_values_and_options(data):
    def fingerprint(text, **options):
        return open_source("folder", manifest(data, text), "all", "depth", **options).fingerprint()

    text = "image,depth,depth_scale\na.png,a_mm.png,1000\n"
    plain = fingerprint(text)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain == fingerprint(text)
    others = [
        fingerprint(text.replace("1000", "500")),
        fingerprint(text.replace("a.png", "b.png")),
        fingerprint(text, max_depth=5.0),
        fingerprint(text, depth_scale=256.0),
    ]
    assert all(other != plain for other in others)


def test_depth_range_and_bad_depths(data):
    depth = depth_of(0)
    depth[0, 0], depth[0, 1], depth[0, 2], depth[0, 3] = np.nan, np.inf, 0, 99
    write_pfm(data / "odd.pfm", depth)
    root = manifest(data, "image,depth\na.png,odd.pfm\n")
    raw = open_source("folder", root, "all", "depth", max_depth=50.0)[0]
    assert (~raw["valid"]).sum() == 4 and not raw["valid"][0, :4].any()
    assert np.isfinite(raw["depth"]).all()
    assert open_source("folder", root, "all", "depth")[0]["valid"][0, 3]  # no upper limit unless given
    for value in (np.nan, 0.0):
        write_pfm(data / "odd.pfm", np.full((H, W), value, np.float32))
        refuse("odd.pfm has no valid pixel .*check depth_scale", root, read=True)
    refuse("a.pfm has no valid pixel", manifest(data, "image,depth\na.png,a.pfm\n"), read=True, min_depth=20.0)
    refuse("depth_scale -1", root, depth_scale=-1)
    refuse("must rise", root, min_depth=5.0, max_depth=2.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "manifest.csv is empty: its first line must name the columns"),
        ("image,depth\n", "manifest.csv names columns and has no rows"),
        ("image,deph\na.png,a.pfm\n", "manifest.csv line 2: unknown column 'deph'; did you mean 'depth'"),
        ("image\na.png\n", "line 2 has no depth, which depth needs"),
        ("image,depth\na.png,a.pfm\n\nb.png,c.pfm\n", "not exist: .*line 4: depth c.pfm"),
        ("image,depth\na.png,a.pfm\nb.png\n", "line 3 has 1 field where the first line names 2"),
        ("image,depth\na.png,\n", "line 2 has no depth"),
        ("image,image\na.png,a.png\n", "the first line names 'image' twice"),
        ("image,depth,depth_scale\na.png,a.pfm,0\n", "line 2: depth_scale '0' must be above 0"),
        ("image,depth,depth_scale\na.png,a.pfm,mm\n", "line 2: depth_scale 'mm' must be above 0"),
        ("image,depth,label\na.png,a.pfm,cat\n", "line 2: label 'cat' is no class"),
        ("image,depth,label\na.png,a.pfm,1.5\n", "line 2: label '1.5' is no class"),
        ("image,depth,label\na.png,a.pfm,-1\n", "line 2: label '-1' is no class"),
        ("image,depth\na.png,a.pfm\na.png,b.pfm\n", "two samples are called 'a'"),
        ('image,depth\n"a.png,a.pfm\n', "is no CSV"),
    ],
)
def test_manifest_mistakes_name_the_line(data, text, words):
    refuse(words, manifest(data, text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"image": "a.png", "depth": "a.pfm"}\n{"image"\n', "manifest.jsonl line 2 is no JSON"),
        ("[1]\n", "line 1 is no JSON object"),
        ('{"image": 3, "depth": "a.pfm"}\n', "line 1: image is 3: give the name of a file"),
        ("\n", "has no rows"),
    ],
)
def test_json_mistakes_name_the_line(data, text, words):
    refuse(words, manifest(data, text, "manifest.jsonl"))


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_manifest_in_any_encoding(data, codec, delimiter):
    (data / "a.png").rename(data / "größe, groß.png")
    rows = [("image", "depth", "depth_scale"), ('"größe, groß.png"', "a.pfm", "0,5")]
    text = "".join(delimiter.join(row) + "\n" for row in rows)
    (data / "manifest.csv").write_bytes(text.encode(codec))
    (entry,) = open_source("folder", data, "all", "depth").entries
    assert entry.files["image"] == "größe, groß.png" and entry.values["depth_scale"] == 0.5


def test_all_missing_files_are_counted(data):
    text = "image,depth\na.png,a.pfm\n" + "".join(f"a.png,no{at}.pfm\n" for at in range(12))
    refuse("12 files do not exist: line 3: depth no0.pfm; .*no9.pfm; …: restore", manifest(data, text))


def test_other_manifest_mistakes(data):
    root = manifest(data, "image,visible_mask\na.png,a_mask.png\n")
    refuse("line 2 has neither whole nor whole_mask", root, "amodal")
    (data / "manifest.csv").write_bytes(b"image,depth\n\0\1,a\n")
    refuse("is no text file", data)
    manifest(data, "{}", "manifest.jsonl")
    refuse("holds both manifest.csv and manifest.jsonl", data)
    refuse("a.png is no manifest", data / "a.png")


def test_a_mask_of_another_size_is_refused(data):
    save(data / "big.png", np.zeros((H + 2, W), np.uint8))
    root = manifest(data, "image,visible_mask,whole\na.png,big.png,a_whole.png\n")
    refuse("big.png is 14x12 but .*a.png is 14x10: give both the same size", root, "amodal", read=True)
    root = manifest(data, "image,depth,valid_mask\na.png,a.pfm,big.png\n")
    refuse("big.png is 14x12 but .*a.png is 14x10", root, read=True)


def test_odd_pictures_are_read(data):
    Image.fromarray(picture(0)[..., 0]).save(data / "grey.png")
    rgba = np.dstack([picture(0), np.zeros((H, W), np.uint8)])
    Image.fromarray(rgba).save(data / "clear.png")
    formats.write_png16(data / "deep.png", picture(0)[..., 0].astype(np.uint16) * 257)
    lines = "".join(f"{name}.png,a.pfm\n" for name in ("grey", "clear", "deep"))
    grey, clear, deep = open_source("folder", manifest(data, "image,depth\n" + lines), "all", "depth")
    np.testing.assert_array_equal(grey["image"], np.repeat(picture(0)[..., :1], 3, axis=-1))
    np.testing.assert_array_equal(deep["image"], grey["image"])
    assert (clear["image"] == 255).all()


# Folders


def make_folders(root, names=("a", "sub/b", "c")):
    for i, name in enumerate(names):
        save(root / "image" / f"{name}.jpg", picture(i))
        save(root / "image2" / f"{name}.png", picture(20 + i))
        (root / "depth" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "flow" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / "depth" / f"{name}.npy", depth_of(i))
        formats.write_kitti_flow(root / "flow" / f"{name}.png", np.full((H, W, 2), i), mask_of(i) > 0)
        save(root / "visible_mask" / f"{name}.png", mask_of(i))
        save(root / "whole_mask" / f"{name}.png", mask_of(i + 5))
    return root


def test_folders_match_by_name(tmp_path):
    root = make_folders(tmp_path)
    (root / "image" / ".DS_Store").write_text("x")
    depth = open_source("folder", root, "train", "depth")
    assert [raw["key"] for raw in depth] == ["a", "c", "sub/b"]
    np.testing.assert_array_equal(depth[2]["depth"], depth_of(1))
    flow = open_source("folder", root, "train", "flow")[1]
    np.testing.assert_array_equal(flow["valid"], mask_of(2) > 0)
    assert (flow["flow"][flow["valid"]] == 2).all()
    amodal = open_source("folder", root, "train", "amodal")[0]
    np.testing.assert_array_equal(amodal["whole_mask"], mask_of(5) > 0)
    assert "whole" not in amodal


def test_split_folders(tmp_path):
    make_folders(tmp_path / "train")
    make_folders(tmp_path / "val", ("d",))
    assert len(open_source("folder", tmp_path, "train", "depth")) == 3
    assert open_source("folder", tmp_path, "val", "depth")[0]["key"] == "d"
    assert {e.key for e in open_source("folder", tmp_path, "all", "depth").entries} >= {"train/c", "val/d"}
    refuse("image is missing: choose of the splits train, val", tmp_path, split="test")


def test_folders_that_do_not_match(tmp_path):
    root = make_folders(tmp_path)
    (root / "depth" / "c.npy").unlink()
    refuse("depth has no file 'c', 1 are missing .image 3, depth 2", root)
    save(root / "image" / "a.png", picture(0))
    refuse("image/a.jpg and .*image/a.png share a name|image/a.png and .*image/a.jpg share a name", root)
    empty = tmp_path / "empty"
    (empty / "image").mkdir(parents=True)
    refuse("depth is missing: depth needs it", empty)
    (empty / "depth").mkdir()
    refuse("holds no samples of folder", empty)
    (empty / "visible_mask").mkdir()
    refuse("has neither whole nor whole_mask", empty, "amodal")


def turned_sample(root, turn, upright_truth):
    """A photo whose camera was turned, and its depth: on the stored pixels, or made for the upright picture."""
    exif = Image.Exif()
    exif[0x0112] = turn
    ramp = np.arange(8 * 12, dtype=np.uint8).reshape(8, 12)
    for field in ("image", "depth", "valid_mask"):
        (root / field).mkdir(exist_ok=True)
    Image.fromarray(ramp).save(root / "image" / "a.png", exif=exif)
    Image.fromarray((ramp > 40).astype(np.uint8)).save(root / "valid_mask" / "a.png", exif=exif)
    depth = turned(ramp, turn) if upright_truth else ramp
    np.save(root / "depth" / "a.npy", depth.astype(np.float32) + 1)


@pytest.mark.parametrize("turn", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("upright_truth", [False, True])
def test_exif_turns_all_of_a_sample_or_nothing(tmp_path, turn, upright_truth):
    if upright_truth and turn < 5:
        return  # the sizes do not tell: truth lies on the stored pixels
    turned_sample(tmp_path, turn, upright_truth)
    raw = open_source("folder", tmp_path, "all", "depth")[0]
    assert raw["image"].shape[:2] == ((12, 8) if upright_truth else (8, 12))
    np.testing.assert_array_equal(raw["image"][..., 0] + 1, raw["depth"])
    np.testing.assert_array_equal(raw["valid"], raw["image"][..., 0] > 40)


def test_sizes_that_no_turn_explains_are_refused_with_the_tag(tmp_path):
    turned_sample(tmp_path, 6, True)
    np.save(tmp_path / "depth" / "a.npy", np.ones((12, 9), np.float32))
    with pytest.raises(UserError, match="EXIF orientation is 6"):
        _ = open_source("folder", tmp_path, "all", "depth")[0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"image": "x" * 5000 + ".png"}, "1 file does not exist"),
        ({"image": "x" * 5000 + "/a.png"}, "1 file does not exist"),
        ({"key": "\ud800"}, "line 1: the key .*, which is not UTF-8"),
        ({"depth_scale": True}, "depth_scale 'True' must be above 0"),
        ({"depth_scale": 10**400}, "must be above 0"),
        ({"depth_scale": 1e-320}, "has no valid pixel"),
        ({"label": 1e300}, "is no class"),
    ],
)
def test_values_that_are_none_in_a_manifest(tmp_path, row, words):
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    formats.write_depth_png(tmp_path / "d.png", np.full((H, W), 2.0))
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"image": "a.png", "depth": "d.png"} | row))
    refuse(words, tmp_path, read=True)
    (tmp_path / "manifest.jsonl").write_text("[" * 100000)
    refuse("line 1 is no JSON", tmp_path)
