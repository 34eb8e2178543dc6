"""COCO's masks against COCO's own tool and by hand; COCO-A and MP3D-Amodal as they are published."""

import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_sets import check_raw, picture, refuse, write

from scaling_perception.data.sources import open_source
from scaling_perception.data.sources.coco_masks import polygon_mask, read_counts, rle_mask, segmentation_mask
from scaling_perception.evaluation.protocols import get_protocol, measure, prepare_raw, unmeasurable
from scaling_perception.support.errors import UserError

H, W = 12, 16


def write_counts(counts):
    """The compressed string of counts."""
    text = []
    for index, count in enumerate(counts):
        value = int(count) - (int(counts[index - 2]) if index > 2 else 0)
        more = True
        while more:
            code = value & 31
            value >>= 5
            more = value != (-1 if code & 16 else 0)
            text.append(chr(48 + code + (32 if more else 0)))
    return "".join(text)


def mask_rle(mask):
    """The compressed run lengths of a bool (H, W)."""
    flat = np.asarray(mask, bool).T.ravel()
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    counts = np.diff(np.concatenate([[0], changes, [flat.size]]))
    return {"size": [int(length) for length in np.shape(mask)], "counts": write_counts(counts.tolist())}


def mask_of(rows, columns):
    mask = np.zeros((H, W), bool)
    mask[rows, columns] = True
    return mask


# Masks

# What pycocotools 2.0.11 makes of these polygons: (points, size, counts).
POLYGONS = [
    ([2.0, 1.0, 9.0, 1.0, 9.0, 6.0, 2.0, 6.0], (8, 12), "a05300000000000g0"),
    ([1.3, 0.2, 10.7, 4.9, 3.1, 7.6], (8, 12), "8183L2OO001N101O0O="),
    ([-3.5, 2.5, 6.0, -2.0, 15.5, 5.5, 5.5, 11.0], (8, 12), "1522Oa10_N1O00"),
    ([5, 5, 5, 5, 9, 2, 1, 2], (8, 12), "b0171O1O00O1Oo0"),
    ([0.5, 0.5, 11.5, 7.5, 11.5, 0.5, 0.5, 7.5], (8, 12), "963N101Na00@1N1O2O0O"),
    ([6.0, 0.0, 6.2, 8.0, 6.4, 0.0], (8, 12), "P3"),
    (
        [17.32, 17.39, 10.37, 4.86, -0.71, 7.2, 7.8, -0.91, -0.83, 21.98, 13.66, 3.63, 8.44, 21.38],
        (20, 20),
        "61<0I141L012ON030NM34MK45KM49O2O1OJNL1130KN81IL:9M3N2M3N\\1",
    ),
]


@pytest.mark.parametrize(("points", "size", "counts"), POLYGONS)
def test_polygons_are_filled_as_by_the_tool(points, size, counts):
    mask = polygon_mask(points, size)
    assert mask_rle(mask) == {"size": list(size), "counts": counts}
    np.testing.assert_array_equal(mask, rle_mask({"size": list(size), "counts": counts.encode()}))


def test_run_lengths_by_hand():
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:4] = True
    plain = {"size": [4, 5], "counts": [5, 2, 2, 2, 2, 2, 5]}  # down the columns, outside first
    np.testing.assert_array_equal(rle_mask(plain), mask)
    assert mask_rle(mask)["counts"] == "5220003"  # from the fourth count on, the difference to the one before the last
    assert read_counts("5220003") == plain["counts"]
    whole = np.ones((3, 2), bool)
    assert mask_rle(whole)["counts"] == "06" and mask_rle(~whole)["counts"] == "6"
    holes = np.zeros((100, 50), bool)
    holes[30:90, 10:45] = True
    holes[50:60, 20:30] = False
    counts = "VP1l1X1000000000000000000hNRO:n0FRO:n0FRO:n0FRO:n0FRO:n0FRO:n0FRO:n0FRO:n0FRO:n0FRO:n0n0"
    assert mask_rle(holes)["counts"] == counts + "0000000000000000000000000000f>"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), height=st.integers(1, 40), width=st.integers(1, 40), share=st.floats(0, 1))
def test_run_lengths_round_trip(seed, height, width, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    np.testing.assert_array_equal(rle_mask(mask_rle(mask)), mask)


def test_damaged_masks_say_how():
    good = mask_rle(mask_of(slice(2, 8), slice(3, 9)))
    for bad, words in (
        ({**good, "counts": good["counts"][:-2]}, "counts cover|ends within"),
        ({**good, "counts": "\x7f"}, "a character outside"),
        ({**good, "counts": "P"}, "ends within a number"),
        ({**good, "counts": [1, -1, H * W]}, "counts cover"),
        ({**good, "counts": ["1"]}, "neither a string nor numbers"),
        ({"counts": good["counts"]}, "need a size"),
        ({**good, "size": [10**9, 10**9]}, "its mask is 1000000000x1000000000, the image 16x12"),
        ([1, 2, 3, 4], "three points"),
        ([1, 2, 3, 4, 5, float("nan")], "three points"),
        ([], "run lengths or polygons"),
        (None, "run lengths or polygons"),
    ):
        with pytest.raises(ValueError, match=words):
            segmentation_mask(bad, (H, W))
    both = segmentation_mask([[1, 1, 4, 1, 4, 4, 1, 4], [8, 1, 11, 1, 11, 4, 8, 4]], (H, W))
    assert both.sum() == 18 and both[:, :6].sum() == 9


# COCO-A


def write_cocoa(root, split="val", change=lambda content: None):
    """One image with an occluded and a free region, one with a region that nothing shows of."""
    box = [3.0, 2.0, 9.0, 2.0, 9.0, 8.0, 3.0, 8.0]  # rows 2-7, columns 3-8
    seen = mask_rle(mask_of(slice(2, 8), slice(3, 6)))
    hidden = mask_rle(mask_of(slice(2, 8), slice(6, 9)))
    occluded = {"segmentation": box, "visible_mask": seen, "invisible_mask": hidden, "occlude_rate": 0.5, "order": 2}
    free = {"segmentation": [0.0, 0.0, 4.0, 0.0, 4.0, 4.0, 0.0, 4.0], "occlude_rate": 0, "order": 1}
    nothing = {"segmentation": box, "visible_mask": mask_rle(np.zeros((H, W), bool)), "occlude_rate": 1, "order": 1}
    names = [f"COCO_{split}2014_{number:012d}.jpg" for number in (377, 704)]
    for index, name in enumerate(names):
        write(root / f"{split}2014" / name, picture(index))
    content = {
        "images": [
            {"id": number, "file_name": name, "height": H, "width": W}
            for number, name in zip((377, 704), names, strict=True)
        ],
        "annotations": [
            {"id": 1, "image_id": 704, "regions": [nothing], "depth_constraint": "", "size": 1},
            {"id": 2, "image_id": 377, "regions": [free, occluded], "depth_constraint": "1-2", "size": 2},
        ],
    }
    change(content)
    path = root / "annotations" / f"COCO_amodal_{split}2014.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_every_region_is_a_sample(tmp_path):
    write_cocoa(tmp_path)
    write_cocoa(tmp_path, "train")
    source = open_source("coco_amodal", tmp_path, "val", "amodal")
    assert len(source) == 3 and len(open_source("coco_amodal", tmp_path, "all", "amodal")) == 6
    raws = {raw["key"]: raw for raw in (source[i] for i in range(3))}
    free, occluded = (raws[f"COCO_val2014_000000000377/{i}"] for i in (0, 1))
    for raw in (free, occluded):
        check_raw(raw, "amodal")
    np.testing.assert_array_equal(free["visible_mask"], free["whole_mask"])
    np.testing.assert_array_equal(occluded["whole_mask"], mask_of(slice(2, 8), slice(3, 9)))
    np.testing.assert_array_equal(occluded["visible_mask"], mask_of(slice(2, 8), slice(3, 6)))
    assert "whole" not in occluded
    some = open_source("coco_amodal", tmp_path, "val", "amodal", regions="occluded")
    assert [entry.key.split("/")[1] for entry in some.entries] == ["0", "1"]
    assert some.fingerprint() != source.fingerprint()
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint() and copy[1]["key"] == source[1]["key"]


def test_a_sample_without_a_whole_picture_is_measured(tmp_path):
    write_cocoa(tmp_path)
    source = open_source("coco_amodal", tmp_path, "val", "amodal")
    protocol = get_protocol("amodal", "coco_amodal")
    raws = [prepare_raw(source[i], protocol) for i in range(3)]
    reasons = [unmeasurable(raw, protocol) for raw in raws]
    assert reasons == ["no part of the object is visible: nothing asks for it", "", ""]
    assert measure(raws[2]["visible_mask"], raws[2], protocol) == {"iou": 0.5}
    painted = raws[2]["whole"]  # for the autoencoder's floor
    assert (painted[~raws[2]["whole_mask"]] == 255).all()
    np.testing.assert_array_equal(painted[raws[2]["whole_mask"]], raws[2]["image"][raws[2]["whole_mask"]])


def test_cocoa_refuses_what_does_not_fit(tmp_path):
    def region(content):
        return content["annotations"][1]["regions"][1]

    path = write_cocoa(tmp_path, change=lambda c: region(c)["visible_mask"].update(size=[H, W + 1]))
    source = open_source("coco_amodal", tmp_path, "val", "amodal")
    with pytest.raises(
        UserError, match="val2014.json: COCO_val2014_0{9}377.jpg, region 1: the visible mask cannot"
    ) as e:
        source[2]
    assert "its mask is 17x12, the image 16x12" in str(e.value)
    write_cocoa(tmp_path, change=lambda c: region(c).pop("segmentation"))
    refuse("val2014.json is no file of amodal annotations .KeyError.'segmentation'", "coco_amodal", tmp_path, "val")
    write_cocoa(tmp_path, change=lambda c: c.pop("images"))
    refuse("is no file of amodal annotations", "coco_amodal", tmp_path, "val")
    path.write_text(path.read_text()[:200])
    refuse("val2014.json is no whole JSON file", "coco_amodal", tmp_path, "val")
    path.write_text("[]")
    refuse("is no file of amodal annotations", "coco_amodal", tmp_path, "val")
    write_cocoa(tmp_path)
    (tmp_path / "val2014" / "COCO_val2014_000000000704.jpg").unlink()
    refuse("COCO_val2014_000000000704.jpg is missing", "coco_amodal", tmp_path, "val")
    refuse("no regions 'occluder'; did you mean 'occluded'", "coco_amodal", tmp_path, regions="occluder")
    refuse("mine.json cannot be read", "coco_amodal", tmp_path, annotations="mine.json")


def test_real_cocoa_annotations(shared_dir):
    """Three images as single files; an occluded region's visible and hidden parts make up its polygon to 0.92 to 1."""
    root = shared_dir / "data" / "coco_amodal"
    source = open_source("coco_amodal", root, "val", "amodal")
    assert len(source) == 2 + 11 + 19
    some = open_source("coco_amodal", root, "val", "amodal", regions="occluded")
    content = {name: json.loads((root / name).read_text())["regions"] for name in ("1.json", "2.json", "3.json")}
    for i in range(len(some)):
        raw = some[i]
        check_raw(raw, "amodal")
        name, number = raw["key"].split("/")
        hidden = rle_mask(content[f"{name}.json"][int(number)]["invisible_mask"])
        together = raw["visible_mask"] | hidden
        overlap = (together & raw["whole_mask"]).sum() / (together | raw["whole_mask"]).sum()
        assert 0.9 < overlap <= 1
        rate = content[f"{name}.json"][int(number)]["occlude_rate"]
        assert hidden.sum() / (hidden.sum() + raw["visible_mask"].sum()) == pytest.approx(rate, abs=0.02)
    assert len(some) > 5


# MP3D-Amodal


def write_mp3d(root, protocol=4, **more):
    """A pickle as the released one: run lengths in bytes, numbers as numpy scalars."""
    whole, visible = mask_of(slice(2, 8), slice(3, 9)), mask_of(slice(2, 8), slice(3, 6))

    def rle(mask):
        packed = mask_rle(mask)
        return {"size": packed["size"], "counts": packed["counts"].encode()}

    region = {
        "segmentation": rle(whole),
        "visible_mask": rle(visible),
        "area": np.uint32(whole.sum()),
        "occlusion_rate": np.float64(0.5),
        "category_id": "chair",
        **more,
    }
    write(root / "mp3d_eval" / "17DRP5sb8fy" / "a1.jpg", picture(0))
    images = [{"id": 5, "file_name": "17DRP5sb8fy/a1.jpg", "height": H, "width": W}]
    content = {"images": images, "annotations": [{"image_id": 5, "regions": [region]}]}
    path = root / "MP3D_seleted_eval_10.29.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 4])
def test_mp3d_reads_the_released_pickle(tmp_path, protocol):
    write_mp3d(tmp_path, protocol)
    for split in ("val", "test", "all"):
        source = open_source("mp3d_amodal", tmp_path, split, "amodal")
        assert len(source) == 1
    raw = source[0]
    check_raw(raw, "amodal")
    assert raw["key"] == "17DRP5sb8fy/a1/0" and raw["whole_mask"].sum() == 36 and raw["visible_mask"].sum() == 18


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("/nowhere/harm",)


def test_nothing_in_a_pickle_is_run(tmp_path):
    path = write_mp3d(tmp_path, extra=Harmful())
    refuse("10.29.pkl: it asks for posix.mkdir, which could do harm", "mp3d_amodal", tmp_path, "val")
    path.write_bytes(path.read_bytes()[:90])
    refuse("10.29.pkl is no whole pickle", "mp3d_amodal", tmp_path, "val")


@pytest.mark.parametrize(("turn", "declared"), [(6, (40, 60)), (6, (60, 40)), (3, (40, 60))])
def test_polygons_lie_on_the_frame_that_the_file_declares(tmp_path, turn, declared):
    exif = Image.Exif()
    exif[0x0112] = turn
    for folder in ("annotations", "val2014"):
        (tmp_path / folder).mkdir()
    picture = np.zeros((40, 60, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "val2014" / "x.jpg", exif=exif)
    region = {"segmentation": [10, 5, 30, 5, 30, 15, 10, 15]}
    content = {
        "images": [{"id": 1, "file_name": "x.jpg", "height": declared[0], "width": declared[1]}],
        "annotations": [{"id": 1, "image_id": 1, "regions": [region]}],
    }
    path = tmp_path / "annotations" / "COCO_amodal_val2014.json"
    path.write_text(json.dumps(content))
    raw = open_source("coco_amodal", tmp_path, "val", "amodal")[0]
    assert (
        raw["image"].shape[:2] == declared and raw["whole_mask"].sum() == 200 and raw["whole_mask"][5:15, 10:30].all()
    )
    content["images"][0]["width"] = 61
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="declares 61x40|declares 61x60"):
        _ = open_source("coco_amodal", tmp_path, "val", "amodal")[0]
