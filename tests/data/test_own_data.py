"""Depth of one's own in every format and unit, and a split by a hash of the names."""

import builtins
import hashlib

import numpy as np
import pytest
from pfm import write_pfm
from PIL import Image
from small_sets import H, W, check_raw, picture, refuse, write

from scaling_perception.data import formats
from scaling_perception.data.manifest import RawSamples, check_sample
from scaling_perception.data.sources import open_source
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import run_verb
from scaling_perception.tasks import TaskOptions

METRES = (np.random.default_rng(5).integers(500, 9000, (H, W)) / 1000).astype(np.float32)


def write_exr(path, **channels):
    library = pytest.importorskip("OpenEXR")
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"compression": library.ZIP_COMPRESSION, "type": library.scanlineimage}
    library.File(header, {name.replace("_", "."): np.ascontiguousarray(one) for name, one in channels.items()}).write(
        str(path)
    )


def tiff(array, **more):
    return lambda path: (path.parent.mkdir(parents=True), Image.fromarray(array).save(path, **more))


def made(function, array):
    return lambda path: (path.parent.mkdir(parents=True), function(path, array))


MILLIMETRES = np.round(METRES.astype(np.float64) * 1000).astype(np.uint16)


@pytest.mark.parametrize(
    ("name", "make", "options"),
    [
        ("a.png", made(formats.write_png16, MILLIMETRES), {}),
        ("a.png", made(formats.write_png16, MILLIMETRES * 2), {"depth_scale": 2000}),
        ("a.tif", tiff(MILLIMETRES), {}),
        ("a.tiff", tiff(MILLIMETRES, compression="tiff_lzw"), {"depth_scale": "1000"}),
        ("a.tiff", tiff(MILLIMETRES.astype(np.int32)), {}),
        ("a.tif", tiff(METRES), {}),
        ("a.npy", made(np.save, METRES), {}),
        ("a.npy", made(np.save, METRES.astype(np.float64)[..., None]), {}),
        ("a.pfm", made(write_pfm, METRES), {}),
        ("a.exr", lambda path: write_exr(path, Z=METRES), {}),
        ("a.exr", lambda path: write_exr(path, R=METRES, G=METRES, B=METRES), {}),
        ("a.exr", lambda path: write_exr(path, R=METRES * 0, ViewLayer_Depth_Z=METRES), {}),
        ("a.EXR", lambda path: write_exr(path, anything=METRES), {}),
        ("a.npy", made(np.save, 1 / METRES), {"depth_kind": "inverse"}),
        ("a.pfm", made(write_pfm, 96.5 / METRES), {"depth_kind": "disparity", "focal_baseline": "96.5"}),
    ],
)
def test_every_format_and_unit_gives_the_same_metres(tmp_path, name, make, options):
    root = tmp_path / "mit Leerzeichen, ä"
    write(root / "image" / "a.jpg", picture(0))
    make(root / "depth" / name)
    raw = open_source("folder", root, "all", "depth", **options)[0]
    check_raw(raw, "depth")
    np.testing.assert_allclose(raw["depth"], METRES, rtol=2e-6)
    assert raw["valid"].all() and "relative" not in raw


def test_disparity_without_a_baseline_is_relative_and_its_holes_are_unknown(tmp_path, capsys):
    write(tmp_path / "image" / "a.png", picture(0))
    stored = np.random.default_rng(1).integers(256, 40000, (H, W)).astype(np.uint16)
    stored[0] = 0
    (tmp_path / "depth").mkdir()
    formats.write_png16(tmp_path / "depth" / "a.png", stored)
    words = {"depth_kind": "disparity", "relative": "true", "depth_scale": 256}
    raw = open_source("folder", tmp_path, "all", "depth", **words)[0]
    np.testing.assert_allclose(raw["depth"][1:], 256 / stored[1:].astype(np.float64), rtol=1e-6)
    np.testing.assert_array_equal(raw["valid"], stored > 0)
    assert raw["relative"] and "relative_depth" in check_sample(raw, ["depth"], TaskOptions())
    given = [part for name, value in words.items() for part in ("--option", f"{name}={value}")]
    out = ["--out", f"{tmp_path}-out", "--workers", "0", "--check", "--tasks", "depth"]
    assert run_verb("prepare", ["folder", "--raw", str(tmp_path), *given, *out]) == 0
    text = capsys.readouterr()
    assert "\nrelative_depth: 0.00" in text.out and " m\n" not in text.out and "depth_scale is stored" not in text.err
    inverse = np.array([[np.nan, np.inf, -np.inf, -1, 0, 1e-40]] * 2 + [[0.5, 1, 2, 4, 8, 0.25]] * 2, np.float32)
    np.save(tmp_path / "depth" / "a.npy", inverse)
    (tmp_path / "depth" / "a.png").unlink()
    write(tmp_path / "image" / "a.png", picture(0, 4, 6))
    raw = open_source("folder", tmp_path, "all", "depth", depth_kind="inverse", max_depth=100)[0]
    assert not raw["valid"][:2].any() and raw["valid"][2:].all()
    np.testing.assert_allclose(raw["depth"][2], [2, 1, 0.5, 0.25, 0.125, 4])


def test_real_disparity_is_metres(shared_dir, tmp_path):
    folder = shared_dir / "data" / "kitti_devkit"
    (tmp_path / "manifest.csv").write_text(f"image,depth,depth_scale\n{folder}/image.png,{folder}/disp_gt.png,256\n")
    given = {"depth_kind": "disparity", "focal_baseline": 721.5377 * 0.54}
    raw = open_source("folder", tmp_path, "all", "depth", **given)[0]
    known = raw["depth"][raw["valid"]]
    assert 0.1 < raw["valid"].mean() < 0.5 and 3 < known.min() < 10 and 30 < known.max() < 120  # a street


def test_wrong_units_and_files_are_refused(tmp_path):
    write(tmp_path / "image" / "a.png", picture(0))
    (tmp_path / "depth").mkdir()
    depth = tmp_path / "depth" / "a.png"
    formats.write_png16(depth, MILLIMETRES)

    def no(words, **options):
        refuse(words, "folder", tmp_path, task="depth", **options)

    no("no depth_kind 'disparit'; did you mean 'disparity'", depth_kind="disparit")
    no("disparity needs focal_baseline .*or relative=true", depth_kind="disparity")
    no("disparity needs focal_baseline .*give one of them", depth_kind="disparity", relative=True, focal_baseline=3)
    no("focal_baseline is for depth_kind=disparity, not for inverse", depth_kind="inverse", focal_baseline=3)
    no("focal_baseline -1.0 must be above 0", depth_kind="disparity", focal_baseline="-1")
    no("val_share 1.5 must be in .0, 1.", val_share=1.5)
    no("a.png holds integers: give depth_scale, stored units of inverse", depth_kind="inverse", read=True)
    depth.unlink()
    depth = depth.with_suffix(".tif")
    for picture_of, more, words in (
        (picture(0), {}, "is a TIFF picture of RGB: give one channel of 16 bits"),
        (picture(0)[..., 0], {}, "is a TIFF picture of 8 bits: .*or depth_scale for 8 bits"),
        (METRES, {"save_all": True, "append_images": [Image.fromarray(METRES)]}, "a.tif has 2 pages"),
    ):
        Image.fromarray(picture_of).save(depth, **more)
        no(words, read=True)
    Image.fromarray(METRES).save(depth)
    depth.write_bytes(depth.read_bytes()[:-300])
    no("a.tif is cut short or damaged", read=True)
    depth.unlink()
    (tmp_path / "depth" / "a.hdr").write_bytes(b"#?RADIANCE")
    no("unknown depth format '.hdr': give a 16-bit .png, .tif, .pfm, .npy or .exr", read=True)


def test_exr_without_depth_damaged_or_without_the_library(tmp_path, monkeypatch):
    write(tmp_path / "image" / "a.png", picture(0))
    path = tmp_path / "depth" / "a.exr"
    write_exr(path, R=METRES, G=METRES, B=METRES + 1)
    refuse("a.exr has the channels .*, and none is called Z", "folder", tmp_path, task="depth", read=True)
    path.write_bytes(path.read_bytes()[:150])
    refuse("a.exr is cut short or no OpenEXR file", "folder", tmp_path, task="depth", read=True)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "OpenEXR":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    refuse(r"a.exr needs OpenEXR: pip install 'scaling-perception\[exr\]'", "folder", tmp_path, task="depth")


# A split by names


def names(root, split, **options):
    return {entry.key for entry in open_source("folder", root, split, "depth", **options).entries}


def make(root, count):
    for number in range(count):
        write(root / "image" / f"{number:03d}.png", picture(0))
    (root / "depth").mkdir(exist_ok=True)
    formats.write_png16(root / "depth" / "000.png", MILLIMETRES)
    for number in range(1, count):
        if not (root / "depth" / f"{number:03d}.png").exists():
            (root / "depth" / f"{number:03d}.png").hardlink_to(root / "depth" / "000.png")


def test_a_share_of_the_names_is_held_out_and_stays_so(tmp_path):
    make(tmp_path, 60)
    before = {split: names(tmp_path, split, val_share=0.25) for split in ("train", "val", "all")}
    assert before["train"] | before["val"] == before["all"] and not before["train"] & before["val"]
    shares = {name: int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) / 16**12 for name in before["all"]}
    assert before["val"] == {name for name, share in shares.items() if share < 0.25} and 8 < len(before["val"]) < 22
    make(tmp_path, 100)  # more data: no sample changes its split
    assert before["val"] <= names(tmp_path, "val", val_share=0.25)
    assert before["train"] <= names(tmp_path, "train", val_share=0.25)
    assert names(tmp_path, "val", val_share=0.1) < names(tmp_path, "val", val_share=0.25)
    samples = RawSamples("folder", str(tmp_path), "val", ["depth"], 0, 0, 64, {"val_share": 0.25})
    assert len(samples) == len(names(tmp_path, "val", val_share=0.25))  # prepare takes such a split
    with pytest.raises(UserError, match="has no splits"):
        RawSamples("folder", str(tmp_path), "val", ["depth"], 0, 0, 64)
    refuse("val_share makes the splits train and val", "folder", tmp_path, "test", "depth", val_share=0.2)
    refuse("puts none of the 100 samples .* into 'val'", "folder", tmp_path, "val", "depth", val_share=1e-6)
    rows = "image,depth,split\nimage/000.png,depth/000.png,train\n"
    (tmp_path / "manifest.csv").write_text(rows)
    refuse("has splits of its own: leave val_share out", "folder", tmp_path, "train", "depth", val_share=0.2)
    (tmp_path / "manifest.csv").write_text(rows.replace(",split", "").replace(",train", ""))
    assert len(names(tmp_path, "all", val_share=0.2)) == 1
