"""Training and evaluation sets in the very files that their publishers ship: values, splits, and what is refused."""

import builtins
import contextlib
import math
import os
import pickle

import numpy as np
import pytest
from PIL import Image
from raw_sets import make_hypersim, make_nyu, make_sens, make_vkitti, sens_bytes, write_frame, write_hdf5
from small_sets import H, W, check_raw, refuse, write

from scaling_perception.data.sources import open_source
from scaling_perception.data.sources.base import LeftOut
from scaling_perception.data.sources.hypersim_raw import planar_depth, tone_map
from scaling_perception.data.sources.mat5 import read_arrays
from scaling_perception.support.errors import UserError


def keys(source):
    return [entry.key for entry in source.entries]


# Hypersim's arithmetic, against derivations of its own


@pytest.mark.parametrize("size", [(768, 1024), (H, W)])
def test_ray_distance_becomes_planar_depth(size):
    """A wall at right angles to the axis, 3 m away, and the ray of a corner by Pythagoras."""
    height, width = size
    focal = 886.81 * width / 1024
    rays = np.empty((height, width, 3))
    rays[..., 0], rays[..., 1], rays[..., 2] = np.arange(width) + 0.5 - width / 2, 0, focal
    rays[..., 1] = (np.arange(height) + 0.5 - height / 2)[:, None]
    wall = 3 * np.linalg.norm(rays, axis=-1) / focal  # the distance to where each ray meets the plane z = 3
    np.testing.assert_allclose(planar_depth(wall), 3, rtol=1e-12)
    if size == (768, 1024):
        corner = 7.0 / math.sqrt(1 + (511.5 / 886.81) ** 2 + (383.5 / 886.81) ** 2)
        assert planar_depth(np.full(size, 7.0))[0, 0] == pytest.approx(corner, rel=1e-12)


def test_tone_mapping_as_published():
    draw = np.random.default_rng(3)
    colour = draw.gamma(2.0, 0.5, (20, 30, 3))
    valid = draw.random((20, 30)) < 0.8
    bright = sorted(0.3 * r + 0.59 * g + 0.11 * b for r, g, b in colour[valid])
    place = 0.9 * (len(bright) - 1)  # between two of them, by straight lines
    low = bright[math.floor(place)]
    percentile = low + (place - math.floor(place)) * (bright[math.ceil(place)] - low)
    scale = 0.8**2.2 / percentile
    wanted = [min(max(scale * value, 0.0) ** (1 / 2.2), 1.0) * 255 for value in colour.ravel()]
    np.testing.assert_allclose(tone_map(colour, valid).ravel(), np.floor(wanted), atol=0)
    half = colour.astype(np.float16)  # as the files are: the same numbers by another way
    half[0, 0] = -0.5, np.inf, 0
    np.testing.assert_array_equal(tone_map(half, valid), tone_map(half.astype(np.float64), valid))
    grey = np.full((4, 5, 3), 0.37)
    assert (tone_map(grey, np.ones((4, 5), bool)) == 204).all() or (tone_map(grey, np.ones((4, 5), bool)) == 203).all()
    assert not tone_map(grey * 1e-4, np.ones((4, 5), bool)).any()  # darker than 1e-4: black
    assert (tone_map(grey, np.zeros((4, 5), bool)) == int(255 * 0.37 ** (1 / 2.2))).all()  # nothing valid: not scaled
    grey[0, 0] = np.inf  # a lamp
    assert (tone_map(grey, np.ones((4, 5), bool))[0, 0] == 255).all()
    grey[:2] = np.inf
    with pytest.raises(LeftOut, match="90th percentile of its brightness is infinite"):
        tone_map(grey, np.ones((4, 5), bool))


# Hypersim's files


def test_hypersim_as_published(tmp_path):
    pytest.importorskip("h5py")
    root = tmp_path / "hyper sim ü"
    colour, distance, entity = make_hypersim(root)
    source = open_source("hypersim", root, "train", "depth")
    assert keys(source) == ["ai_001_001/rgb_cam_00_fr0000", "ai_001_001/rgb_cam_00_fr0001"]
    assert source.notes == ["1 of 3 frames are not in the public release and are left out"]
    raw = pickle.loads(pickle.dumps(source))[0]
    check_raw(raw, "depth")
    np.testing.assert_allclose(
        raw["depth"][entity > 0], planar_depth(distance)[entity > 0].astype(np.float32), rtol=1e-6
    )
    np.testing.assert_array_equal(raw["valid"], entity > 0)
    np.testing.assert_array_equal(raw["image"], tone_map(colour, entity > 0))
    assert len(open_source("hypersim", root, "val", "depth")) == 1
    assert len(open_source("hypersim", root, "all", "depth")) == 4
    _, paths = source.file_paths([1])
    assert [path.rpartition("/")[2] for path in paths] == [
        f"frame.0001.{kind}.hdf5" for kind in ("color", "depth_meters", "render_entity_id")
    ]
    # Marigold's list chooses frames of the published files as well
    (root / "filename_list_val_filtered.txt").write_text(
        "ai_003_010/rgb_cam_00_fr0003.png ai_003_010/depth_plane_cam_00_fr0003.png\n"
    )
    assert keys(open_source("hypersim", root, "val", "depth")) == ["ai_003_010/rgb_cam_00_fr0003"]


def test_hypersim_frames_without_use_are_left_out_and_damage_is_refused(tmp_path):
    pytest.importorskip("h5py")
    colour, distance, entity = make_hypersim(tmp_path)

    def frame(colour=colour, distance=distance, entity=entity):
        return write_frame(tmp_path, "ai_001_001", "cam_00", 0, colour, distance, entity)

    def read():
        return open_source("hypersim", tmp_path, "train", "depth")[0]

    frame(entity=np.full_like(entity, -1))
    with pytest.raises(LeftOut, match="frame.0000.depth_meters.hdf5: no pixel has a depth"):
        read()
    frame(distance=np.full_like(distance, 80))
    with pytest.raises(LeftOut, match="no pixel has a depth of 1e-05 to 65 m"):
        read()
    black = colour.copy()
    black[3, 4] = np.nan
    frame(colour=black)
    with pytest.raises(LeftOut, match="color.hdf5: its colour is not a number in 3 places"):
        read()
    image, depth, _ = frame(distance=np.where(np.arange(W) % 2, -distance, np.inf).astype(np.float16))
    with pytest.raises(LeftOut):
        read()
    image, depth, _ = frame()
    for damage, words in (
        (lambda path: path.write_bytes(path.read_bytes()[:900]), "is cut short or no HDF5 file"),
        (lambda path: path.write_bytes(b"not HDF5 at all" * 60), "is cut short or no HDF5 file"),
        (lambda path: write_hdf5(path, data=distance), "has no array 'dataset', it holds data"),
        (lambda path: write_hdf5(path, dataset=distance[None]), r"holds \(1, 12, 16\): it needs \(H, W\)"),
        (lambda path: write_hdf5(path, dataset=distance[:, :5]), "is 5x12 but .*color.hdf5 is 16x12"),
        (lambda path: write_hdf5(path, dataset=entity), "holds int32: it needs real numbers"),
    ):
        damage(depth)
        refuse(f"depth_meters.hdf5 {words}", "hypersim", tmp_path, "train", read=True)
        with pytest.raises(UserError) as caught:
            read()
        assert not isinstance(caught.value, LeftOut)  # damage is no reason to leave a frame out
    depth.unlink()
    refuse("frame.0000.depth_meters.hdf5 is missing", "hypersim", tmp_path, "train")
    csv = tmp_path / "metadata_images_split_scene_v1.csv"
    csv.write_text(csv.read_text().replace("ai_003_010", "ai_009_001"))
    refuse("holds none of the 1 scenes of 'val'", "hypersim", tmp_path, "val")
    csv.write_text(csv.read_text().replace("True", "maybe"))
    refuse("csv line 2 has .* included_in_public_release 'maybe'", "hypersim", tmp_path, "train")
    csv.write_text(csv.read_text().replace("scene_name", "scene"))
    refuse("has no column 'scene_name'", "hypersim", tmp_path, "train")
    csv.unlink()
    refuse("metadata_images_split_scene_v1.csv is missing: take it from", "hypersim", tmp_path, "train")


def test_without_h5py_one_line_says_what_to_install(tmp_path, monkeypatch):
    pytest.importorskip("h5py")
    make_hypersim(tmp_path / "h")
    make_nyu(tmp_path / "n")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "h5py":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    words = r"needs h5py: pip install 'scaling-perception\[hdf5\]'"
    refuse(words, "hypersim", tmp_path / "h", "train")  # when it is opened: not once for every frame
    refuse(words, "nyuv2", tmp_path / "n", "test")


# Virtual KITTI 2


@pytest.mark.parametrize("apart", [False, True])
def test_virtual_kitti_2(tmp_path, apart):
    stored = make_vkitti(tmp_path, apart=apart)
    source = open_source("vkitti2", tmp_path, "train", "depth")
    assert len(source) == 4 and keys(source)[0].endswith("Scene01/clone/frames/rgb/Camera_0/rgb_00000")
    raw = source[0]
    check_raw(raw, "depth")
    np.testing.assert_array_equal(raw["depth"], stored / np.float32(100))
    np.testing.assert_array_equal(raw["valid"], (stored > 0) & (stored < 8000))
    assert not raw["valid"][0].any() and not raw["valid"][1, :2].any()
    folder = "rgb/" if apart else ""
    line = f"{folder}Scene20/clone/frames/rgb/Camera_0/rgb_00001.jpg "
    (tmp_path / "l.txt").write_text(line + line.replace("rgb", "depth").replace("jpg", "png"))
    assert len(open_source("vkitti2", tmp_path, "val", "depth", list="l.txt")) == 1
    refuse("is 16x12, less than the crop of 1216x352", "vkitti2", tmp_path, read=True, crop="true")


def test_virtual_kitti_2_is_cut_as_marigold_cuts_it(tmp_path):
    stored = make_vkitti(tmp_path, ("Scene01",), (375, 1242))
    raw = open_source("vkitti2", tmp_path, "all", "depth", crop=True)[0]
    np.testing.assert_array_equal(raw["depth"], stored[23:, 13:1229] / np.float32(100))
    assert raw["image"].shape == (352, 1216, 3) and raw["valid"].shape == (352, 1216)


# NYU depth v2


def test_nyu_as_published(tmp_path):
    pytest.importorskip("h5py")
    images, known, filled = make_nyu(tmp_path)
    source = open_source("nyuv2", tmp_path, "test", "depth")
    assert keys(source) == ["nyu_depth_v2_labeled/0002", "nyu_depth_v2_labeled/0004"]
    for at, index in enumerate((1, 3)):
        raw = source[at]
        check_raw(raw, "depth")
        np.testing.assert_array_equal(raw["image"], images[index])
        np.testing.assert_array_equal(raw["depth"], known[index])
        np.testing.assert_array_equal(raw["valid"], known[index] > 0)
    assert len(open_source("nyuv2", tmp_path / "nyu_depth_v2_labeled.mat", "all", "depth")) == 5
    np.testing.assert_array_equal(open_source("nyuv2", tmp_path, "val", "depth", truth="filled")[0]["depth"], filled[1])
    (tmp_path / "l.txt").write_text("a.png b.png\n")
    refuse("truth 'filled' is of .*mat without a list", "nyuv2", tmp_path, list="l.txt", truth="filled")
    refuse("no truth 'fill'; did you mean 'filled'", "nyuv2", tmp_path, truth="fill")
    splits, mat = tmp_path / "splits.mat", tmp_path / "nyu_depth_v2_labeled.mat"
    whole, data = splits.read_bytes(), mat.read_bytes()
    splits.write_bytes(whole[:150])
    refuse("splits.mat is cut short or damaged .* bytes are missing", "nyuv2", tmp_path, "test")
    splits.write_bytes(whole[:100])
    refuse("splits.mat is cut short or no MATLAB file", "nyuv2", tmp_path, "test")
    splits.unlink()
    refuse("splits.mat does not exist", "nyuv2", tmp_path, "test")
    make_nyu(tmp_path, test=(2, 6))
    refuse("testNdxs names image 6, and there are 5", "nyuv2", tmp_path, "test")
    mat.write_bytes(data[: len(data) // 2])
    refuse("nyu_depth_v2_labeled.mat is cut short or no HDF5 file", "nyuv2", tmp_path, "all")
    write_hdf5(mat, images=images.transpose(0, 3, 2, 1), depths=filled.transpose(0, 2, 1))
    refuse("has no array 'rawDepths', it holds depths, images", "nyuv2", tmp_path, "all")
    write_hdf5(mat, images=images.transpose(0, 3, 2, 1), rawDepths=known.transpose(0, 2, 1)[:3])
    refuse(r"rawDepths has the shape \(3, 16, 12\), and images", "nyuv2", tmp_path, "all")
    write_hdf5(mat, images=images)
    refuse(r"images has the shape \(5, 12, 16, 3\)", "nyuv2", tmp_path, "all")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", "f4", "f8"])
def test_matlab_files_are_read_as_scipy_writes_them(tmp_path, packed, dtype):
    from scipy.io import savemat

    wanted = {"testNdxs": np.arange(1, 13).reshape(6, 2).astype(dtype), "one": np.array([[3]], dtype)}
    savemat(tmp_path / "a.mat", {**wanted, "text": "abc", "cell": np.array([1, "x"], object)}, do_compression=packed)
    found = read_arrays(tmp_path / "a.mat")
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
    data, draw = bytearray((tmp_path / "a.mat").read_bytes()), np.random.default_rng(0)
    for place in draw.integers(0, len(data), 300):  # damage is refused or reads as other numbers, and ends nothing
        data[place] ^= 1 << (place % 8)
        (tmp_path / "b.mat").write_bytes(data)
        data[place] ^= 1 << (place % 8)
        with contextlib.suppress(UserError):
            read_arrays(tmp_path / "b.mat")


# ScanNet


def test_scannet_recordings(tmp_path):
    frames = make_sens(tmp_path)
    make_sens(tmp_path, "scene0011_00", 5)
    source = open_source("scannet", tmp_path, "val", "depth")
    assert len(source) == 8 and keys(source)[5] == "scene0406_02/color/000000"
    for number, (image, stored) in enumerate(frames):
        raw = pickle.loads(pickle.dumps(source))[5 + number]
        check_raw(raw, "depth")
        np.testing.assert_array_equal(raw["depth"], stored / np.float32(1000))
        assert raw["image"].shape == (H, W, 3)  # brought to the size of depth
        assert np.abs(raw["image"].astype(int) - image[::2, ::2]).mean() < 40
    assert keys(open_source("scannet", tmp_path, "val", "depth", every="2"))[-1] == "scene0406_02/color/000002"
    line = "scene0406_02/color/00000{}.jpg scene0406_02/depth/00000{}.png\n"
    (tmp_path / "l.txt").write_text(line.format(2, 2) + line.format(7, 7))
    source = open_source("scannet", tmp_path, "val", "depth", list="l.txt")
    np.testing.assert_array_equal(source[0]["depth"], frames[2][1] / np.float32(1000))
    with pytest.raises(UserError, match="scene0406_02.sens has 3 frames, and no frame 7"):
        source[1]
    (tmp_path / "l.txt").write_text("scene9/color/0.jpg scene9/depth/0.png\n")
    refuse("scene9.sens is missing", "scannet", tmp_path, list="l.txt")


def test_damaged_recordings_are_refused(tmp_path):
    frames = make_sens(tmp_path)
    path = tmp_path / "scans" / "scene0406_02" / "scene0406_02.sens"
    whole = path.read_bytes()
    for damage, words in (
        (whole[:500], "is cut short .before the end of frame 0 of 3"),
        (whole[:304] + b"\xff" * 7 + whole[311:], "is cut short .it says 16777215 frames"),
        (whole[:100], "is cut short .within the header"),
        (b"\x09" + whole[1:], "is no .sens recording of version 4 .it says 9"),
        (whole[:280] + b"\x00" + whole[281:], "is compressed in a way that is not read .colour 0, depth 1"),
        (sens_bytes(frames, depth=(H + 1, W)), "holds 384 bytes of depth for 16x13"),
        (sens_bytes(frames, colour=(H, W)), "holds colour of 32x24 where its header says 16x12"),
        (sens_bytes(frames, shift=0.0), "says 0 depth units a metre"),
    ):
        path.write_bytes(damage)
        refuse(f"scene0406_02.sens {words}", "scannet", tmp_path, read=True)
    path.write_bytes(whole[:-200])  # the frames before are whole
    source = open_source("scannet", tmp_path, "val", "depth")
    check_raw(source[1], "depth")
    with pytest.raises(UserError, match="is cut short .before the end of frame 2 of 3"):
        source[2]
    start = whole.index(b"\x78\x9c", 300)
    path.write_bytes(whole[: start + 9] + bytes(40) + whole[start + 49 :])
    refuse("scene0406_02.sens is damaged .the depth at byte", "scannet", tmp_path, read=True)


# ETH3D's masks


def test_eth3d_masks_count_where_they_are_asked_for(tmp_path):
    folder = tmp_path / "pipes" / "images" / "dslr_images"
    write(folder / "DSC_1.JPG", np.zeros((H, W, 3), np.uint8))
    truth = tmp_path / "pipes" / "ground_truth_depth" / "dslr_images" / "DSC_1.JPG"
    truth.parent.mkdir(parents=True)
    truth.write_bytes(np.full((H, W), 2.5, "<f4").tobytes())
    refuse("has no SCENE/masks_for_images", "eth3d", tmp_path, masks=True)
    mask = np.zeros((H, W), np.uint8)
    mask[2], mask[3] = 1, 2
    place = tmp_path / "pipes" / "masks_for_images" / "dslr_images" / "DSC_1.png"
    place.parent.mkdir(parents=True)
    Image.fromarray(mask).save(place)
    assert open_source("eth3d", tmp_path, "val", "depth")[0]["valid"].all()
    raw = open_source("eth3d", tmp_path, "val", "depth", masks="true")[0]
    np.testing.assert_array_equal(raw["valid"], mask == 0)


# Names and links


def test_links_in_circles_end(tmp_path):
    make_vkitti(tmp_path)
    (tmp_path / "Scene01" / "again").symlink_to(tmp_path)
    (tmp_path / "Scene01" / "loop").symlink_to(tmp_path / "Scene01" / "loop")
    assert len(open_source("vkitti2", tmp_path, "train", "depth")) == 4
    own = tmp_path / "Scene01" / "clone" / "frames" / "depth" / "Camera_0" / "depth_00000.png"
    own.unlink()
    own.symlink_to(own)
    refuse("depth_00000.png is missing", "vkitti2", tmp_path, "train")


def test_class_folders_with_links_to_nothing(tmp_path):
    write(tmp_path / "train" / "n1" / "a.png", np.zeros((H, W, 3), np.uint8))
    (tmp_path / "train" / "n2").symlink_to("n2")
    assert len(open_source("imagenet", tmp_path, "train", "generation")) == 1
    (tmp_path / "train" / "n1" / "b.png").symlink_to("b.png")
    refuse("n1/b.png is a link to nothing", "imagenet", tmp_path, "train", task="generation")


def test_lists_with_tabs_may_have_spaces_in_their_names(tmp_path):
    make_vkitti(tmp_path / "my data")
    frame = "my data/Scene01/clone/frames/{0}/Camera_0/{0}_00001.{1}"
    image, depth = frame.format("rgb", "jpg"), frame.format("depth", "png")
    (tmp_path / "l.txt").write_text(f"{image}\t{depth}\n")
    assert len(open_source("vkitti2", tmp_path, "train", "depth", list="l.txt")) == 1
    (tmp_path / "l.txt").write_text(f"{image} {depth}\n")
    refuse("is missing .and 1 more files: my", "vkitti2", tmp_path, "train", list="l.txt")


@pytest.mark.parametrize(
    ("colour", "depth", "shift"), [((0, 0), (H, W), 1e3), ((24, 32), (0, 4), 1e3), ((24, 32), (H, W), 1e-38)]
)
def test_recordings_of_no_size_or_unit_are_refused(tmp_path, colour, depth, shift):
    stored = np.ones(depth, np.uint16)
    data = sens_bytes([(np.zeros((24, 32, 3), np.uint8), stored)], colour, depth, shift)
    (tmp_path / "a.sens").write_bytes(data)
    refuse("a.sens says .*: copy or download it again", "scannet", tmp_path, "val")


@pytest.mark.parametrize("number", ["²", "-1", "1e1", "9" * 5000])
def test_frames_of_the_split_csv_are_plain_numbers(tmp_path, number):
    make_hypersim(tmp_path)
    path = tmp_path / "metadata_images_split_scene_v1.csv"
    text = path.read_text()
    path.write_text(text.replace(",", " , "))
    assert len(open_source("hypersim", tmp_path, "train", "depth")) == 2
    path.write_text(text.replace("cam_00,1,", f"cam_00,{number},"))
    refuse(f"line 3 has frame_id '{number[:20]}", "hypersim", tmp_path, "train")


def test_depth_beyond_float32_is_unknown(tmp_path):
    make_hypersim(tmp_path)
    distance = np.full((H, W), 2.0)
    distance[:2] = 1e300
    write_frame(tmp_path, "ai_001_001", "cam_00", 0, np.ones((H, W, 3), "f4"), distance, np.ones((H, W), "i4"))
    valid = open_source("hypersim", tmp_path, "train", "depth")[0]["valid"]
    assert not valid[:2].any() and valid[2:].all()


def test_depth_in_8_bits_is_refused_where_16_are_published(tmp_path):
    make_vkitti(tmp_path)
    for path in tmp_path.rglob("depth_*.png"):
        Image.fromarray(np.full((H, W), 200, np.uint8)).save(path)
    refuse("depth_00000.png is a PNG picture of 8 bits", "vkitti2", tmp_path, "train", read=True)
    assert open_source("vkitti2", tmp_path, "train", "depth", depth_scale=10)[0]["depth"][0, 0] == 20


@pytest.mark.parametrize(
    ("name", "options"), [("scannet", {"every": 2.5}), ("scannet", {"every": None}), ("folder", {"val_share": [1]})]
)
def test_options_of_another_type_are_refused(tmp_path, name, options):
    refuse("option '.*' of .* is .*: give a (whole )?number", name, tmp_path, "all", **options)


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_names_that_are_no_text_are_refused(tmp_path, name):
    task, split, top = {"folder": ("depth", "all", ""), "imagenet": ("generation", "train", "n01440764")}[name]
    for folder in ("image", "depth") if name == "folder" else (top,):
        (tmp_path / folder).mkdir()
        try:
            (tmp_path / folder / os.fsdecode(b"a\xff.png")).write_bytes(b"x")
        except OSError:
            pytest.skip("this file system refuses such names")
    refuse(r"a file called .*a\\xff.png, which is not UTF-8", name, tmp_path, split, task=task)
