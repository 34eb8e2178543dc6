"""Inputs of predict: files, folders, globs, lists and pairs in order, and names that do not collide."""

import io
import os
import sys
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from scaling_perception.inference.find import Picture, Search, find_inputs, name_results, read_list
from scaling_perception.support.errors import UserError


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("frame_1.png", "frame_2.jpg", "frame_10.png"):
        Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(folder / name)
    return folder


def names(found):
    return [files[0].path.name for files in found]


def test_globs_folders_and_order(pictures):
    found = find_inputs([f"{pictures}/*.png", str(pictures), f"{pictures}/../in/frame_1.png"], "depth")
    assert names(found) == ["frame_1.png", "frame_10.png", "frame_2.jpg"]
    frames = find_inputs([str(pictures / "frame_1.png"), str(pictures / "frame_10.png")], "flow")
    assert [[f.path.name for f in pair] for pair in frames] == [["frame_1.png", "frame_10.png"]]
    with pytest.raises(UserError, match="one frame"):
        find_inputs([f"{pictures}/*.jpg"], "flow")


def test_every_start_and_end_count_in_each_sequence(pictures):
    (pictures / "b").mkdir()
    for i in range(5):
        (pictures / "b" / f"{i}.png").touch()
    words = [str(pictures), f"{pictures}/b/*"]
    assert names(find_inputs(words, "depth", search=Search(every=2))) == [
        "frame_1.png",
        "frame_10.png",
        *("0.png", "2.png", "4.png"),
    ]
    assert names(find_inputs(words, "depth", search=Search(start=1, end=2))) == ["frame_2.jpg", "1.png"]
    pairs = find_inputs([f"{pictures}/b"], "flow", search=Search(every=2))
    assert [tuple(f.path.stem for f in pair) for pair in pairs] == [("0", "2"), ("2", "4")]
    for search, message in ((Search(every=0), "--every 0"), (Search(start=3, end=3), "START < END")):
        with pytest.raises(UserError, match=message):
            find_inputs(words, "depth", search=search)
    with pytest.raises(UserError, match="--start 9 leaves nothing"):
        find_inputs([str(pictures)], "depth", search=Search(start=9))


def test_recursive_keeps_the_folders_and_leaves_the_results_out(pictures, tmp_path):
    for place in ("s1/rgb", "s2/rgb", "s2/.cache", "out"):
        (pictures / place).mkdir(parents=True)
        (pictures / place / "0.png").touch()
    (pictures / "s2/rgb/1.png").touch()
    search = Search(recursive=True, out=pictures / "out")
    found = name_results(find_inputs([str(pictures)], "depth", search=search), "depth")
    assert [item.name for item in found] == [
        *("frame_1", "frame_2", "frame_10"),
        *("s1/rgb/0", "s2/rgb/0", "s2/rgb/1"),
    ]
    pairs = find_inputs([str(pictures / "s2")], "flow", search=search)
    assert [pair[1].path.name for pair in pairs] == ["1.png"]
    with pytest.raises(UserError, match="is an input folder"):
        find_inputs([str(pictures)], "depth", search=Search(out=pictures))
    assert names(find_inputs([f"{pictures}/**/0.png"], "depth", search=search)) == ["0.png"] * 2
    with pytest.raises(UserError, match="holds what"):
        find_inputs([f"{pictures}/out/*"], "depth", search=search)
    with pytest.raises(UserError, match="give --recursive"):
        find_inputs([str(pictures / "s1")], "depth")


def test_masks_are_found_by_name_and_folder(pictures, tmp_path):
    image, mask = tmp_path / "7_occlusion.png", pictures / "7_visible_mask.png"
    for path in (image, mask):
        path.touch()
    assert find_inputs([str(image)], "amodal", str(pictures)) == [(Picture(image), Picture(mask))]
    (tmp_path / "all" / "a").mkdir(parents=True)
    (tmp_path / "masks" / "a").mkdir(parents=True)
    (tmp_path / "all" / "a" / "x.jpg").touch()
    (tmp_path / "masks" / "a" / "x.png").touch()
    ((_, found),) = find_inputs([str(tmp_path / "all")], "amodal", str(tmp_path / "masks"), Search(recursive=True))
    assert found.path == tmp_path / "masks" / "a" / "x.png"


def test_names_are_short_until_they_collide(tmp_path):
    paths = ["a/x.png", "a/y.png", "b/x.png", "b/x.jpg", "c/a.b/z.png", "d/a.b/z.png"]
    inputs = [(Picture(tmp_path / path),) for path in paths]
    found = [item.name for item in name_results(inputs, "depth")]
    assert found[:4] == ["a_x", "y", "b_x_png", "b_x_jpg"] and len(set(found)) == 6
    again = [item.name for item in name_results(inputs[::-1], "depth")]
    assert again[::-1] == found


@pytest.mark.parametrize(
    "paths",
    [
        ("Cat.png", "cat.png", "CAT.jpg"),
        ("é.png", "e\u0301.png"),
        ("x" * 250 + ".png", "x" * 249 + "y.png"),
        ("深" * 80 + "a.png", "深" * 80 + "b.png", "深" * 80 + "B.png"),
    ],
)
def test_names_of_results_fit_and_differ_on_every_file_system(tmp_path, paths):
    inputs = [(Picture(tmp_path / path),) for path in paths]
    found = [item.name for item in name_results(inputs, "depth")]
    assert len({unicodedata.normalize("NFC", name).lower() for name in found}) == len(paths)
    assert all(len(os.fsencode(name)) <= 190 for name in found)
    assert found == [item.name for item in name_results(inputs, "depth")]


def test_names_of_results_are_taken_by_windows_too(tmp_path):
    paths = ["a:b.png", "a?b.png", 'q"<r>|*.png', "con.png", "con.x.png", "end..png"]
    inputs = [(Picture(tmp_path / path),) for path in paths] + [(Picture(tmp_path / "x.png", folder="aux/b. /c:"),)]
    found = [item.name for item in name_results(inputs, "depth")]
    assert len(set(found)) == 7 and not any(set(name) & set('<>:"|?*\\') for name in found)
    assert found[2:] == ["q__r___", "con", "_con.x", "end.", os.path.join("_aux", "b_", "c_", "x")]


ODD = ["two words.png", " leading.png", "für 深度.png", "[1]*.png", "~.png", "a,b.png", os.fsdecode(b"\xff\xfe.png")]


def test_lists_take_names_as_they_are(tmp_path, monkeypatch):
    for name in (*ODD, "line\nbreak.png", "#7.png"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    lines = ["# a comment", "", *ODD, "  "]
    (tmp_path / "list.txt").write_bytes(os.fsencode("\r\n".join(lines)))
    listed = read_list("list.txt")
    assert listed == ODD
    assert names(find_inputs([], "depth", listed=listed)) == ODD
    odd = [*ODD, "line\nbreak.png", "#7.png"]
    data = b"\0".join(os.fsencode(name) for name in odd) + b"\0"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert names(find_inputs([], "depth", listed=read_list("-", null=True))) == odd
    pairs = find_inputs([], "flow", listed=["a,b.png", "#7.png", "two words.png,[1]*.png"])
    assert [[f.path.name for f in p] for p in pairs] == [["two words.png", "[1]*.png"], ["a,b.png", "#7.png"]]
    (tmp_path / "empty").write_text("# nothing\n\n")
    with pytest.raises(UserError, match="empty names no path"):
        read_list("empty")
    with pytest.raises(UserError, match="cannot be read"):
        read_list("none")
    assert names(find_inputs([], "depth", listed=["*.png"])) == ["*.png"], "told among the failures"


def touch(folder, *names):
    for name in names:
        (folder / name).write_bytes(name.encode())


def test_masks_beside_pictures_are_masks(tmp_path):
    touch(
        tmp_path, "cat.jpg", "cat_mask.png", "cat_mask001.png", "dog.JPEG", "dog_mask7.TIF", "owl_mask.png", "notes.txt"
    )
    lines = []
    found = find_inputs([str(tmp_path)], "amodal", str(tmp_path), note=lines.append)
    assert [[f.path.name for f in pair] for pair in found] == [
        ["cat.jpg", "cat_mask.png"],
        ["dog.JPEG", "dog_mask7.TIF"],
        ["owl_mask.png", "owl_mask_mask.png"],  # a picture, and its mask is missing: it fails when it is read
    ]
    assert lines == [f"{tmp_path}: 3 picture(s) taken, left out 3 mask(s) beside their picture, 1 .txt"]
    assert names(find_inputs([f"{tmp_path}/*_mask.png"], "depth")) == ["cat_mask.png", "owl_mask.png"]


@pytest.mark.parametrize(
    "mask",
    ["cat-mask.png", "cat.mask.png", "cat_MASK.PNG", "Cat_Mask.png", "mask_cat.png", "cat_seg.tif", "cat_masks_1.png"],
)
def test_other_names_of_masks(tmp_path, mask):
    touch(tmp_path, "cat.jpg", mask, "cat_whole_mask.png")
    lines = []
    found = find_inputs([str(tmp_path)], "amodal", str(tmp_path), note=lines.append)
    assert [[f.path.name for f in pair] for pair in found] == [["cat.jpg", mask]]
    assert lines == [f"{tmp_path}: 1 picture(s) taken, left out 2 mask(s) beside their picture"]


def test_another_picture_is_no_mask_and_of_several_none_is_taken(tmp_path):
    touch(tmp_path, "a.jpg", "a.png", "b.jpg", "b_mask_0.png", "b_mask_1.png", "c.jpg", "c_whole_mask.png")
    found = find_inputs([str(tmp_path)], "amodal", str(tmp_path))
    faults = {image.path.name: mask.fault for image, mask in found}
    assert list(faults) == ["a.jpg", "a.png", "b.jpg", "c.jpg"] and "b_mask_0.png, b_mask_1.png" in faults["b.jpg"]
    assert all("a.png does not exist, nor a_mask.png" in faults[name] for name in ("a.jpg", "a.png"))
    assert "c_mask.png" in faults["c.jpg"]
    ((_, mask),) = find_inputs([f"{tmp_path}/a.jpg"], "amodal", str(tmp_path))
    assert mask == Picture(tmp_path / "a.png")  # alone, it may be the mask that is called as its picture


def test_a_prompt_is_another_file(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(UserError, match="its own mask"):
        find_inputs([f"{tmp_path}/a.png"], "amodal", f"{tmp_path}/link.png")
    with pytest.raises(UserError, match="its own second frame"):
        find_inputs([f"{tmp_path}/a.png,{tmp_path}/a.png"], "flow")
    ((_, mask),) = find_inputs([f"{tmp_path}/b.png"], "amodal", str(tmp_path))
    assert mask.path == tmp_path / "b_mask.png"


def test_every_suffix_of_pictures_and_videos_counts(tmp_path):
    touch(tmp_path, "a.jfif", "b.JPE", "c.AVIF", "d.heic", "e.MTS", "f.m2ts", "g.3GP", "h.csv", "noname")
    lines = []
    assert names(find_inputs([str(tmp_path)], "depth", note=lines.append)) == ["a.jfif", "b.JPE", "c.AVIF", "d.heic"]
    assert "left out 1 (no suffix), 1 .3gp, 1 .csv, 1 .m2ts, 1 .mts; name a video itself" in lines[0]
