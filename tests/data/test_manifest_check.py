"""What `prepare` says of value ranges that no scene has, and of truth that says nothing."""

import re

import numpy as np
import pytest
from PIL import Image

from scaling_perception.data.formats import write_png16
from scaling_perception.data.manifest import check_sample, ranges_of
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import run_verb
from scaling_perception.tasks import TaskOptions
from scaling_perception.tasks.normals import unit


@pytest.mark.parametrize(
    ("depth", "reason"),
    [
        ([1.5] * 9, "9 depth pixel(s) are valid: give at least 10"),
        ([2.0] * 30, "depth is 2 m in every valid pixel"),
        ([1.5] * 29 + [np.inf], "1 valid pixels that are not finite"),
    ],
)
def test_truth_that_says_nothing_is_a_bad_sample(depth, reason):
    raw = {"key": "a/b", "image": np.zeros((6, 10, 3), np.uint8), "depth": np.zeros((6, 10), np.float32)}
    raw["depth"].flat[: len(depth)] = depth
    raw["valid"] = raw["depth"] > 0
    for check in (lambda: ranges_of(raw, ["depth"]), lambda: check_sample(raw, ["depth"], TaskOptions())):
        with pytest.raises(UserError, match=re.escape(reason)) as error:
            check()
        assert "'a/b'" in str(error.value)


@pytest.mark.parametrize(("scale", "warned"), [("1000", False), ("0.001", True), ("2e7", True)])
def test_depth_scale_the_wrong_way_round_is_noticed(tmp_path, capsys, scale, warned):
    for folder in ("image", "depth"):
        (tmp_path / folder).mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).save(tmp_path / "image" / "a.png")
    write_png16(tmp_path / "depth" / "a.png", rng.integers(1200, 2700, (12, 16)).astype(np.uint16))
    rows = f"image,depth,depth_scale\nimage/a.png,depth/a.png,{scale}\n"
    (tmp_path / "manifest.csv").write_text(rows)
    words = ["folder", "--raw", str(tmp_path), "--tasks", "depth", "--out", f"{tmp_path}-out", "--workers", "0"]
    assert run_verb("prepare", words) == 0
    text = capsys.readouterr()
    assert text.out.startswith("1 samples of folder (train)\n") and " m\n" in text.out
    assert ("outside 1 mm to 10 km: depth_scale" in text.err) == warned


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_the_unit_of_depth_without_a_scale_is_said(tmp_path, capsys, dtype):
    for folder in ("image", "depth"):
        (tmp_path / folder).mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).save(tmp_path / "image" / "a.png")
    metres = np.linspace(1.5, 3, 12 * 16).reshape(12, 16)
    np.save(tmp_path / "depth" / "a.npy", (metres * 1000 if dtype == np.uint16 else metres).astype(dtype))
    words = ["folder", "--raw", str(tmp_path), "--tasks", "depth", "--out", f"{tmp_path}-out", "--workers", "0"]
    note = "note: depth without depth_scale: integers are read as millimetres, floats as metres\n"
    assert run_verb("prepare", [*words, "--check"]) == 0
    text = capsys.readouterr().out
    assert note in text and "depth: 1.5 .. 3 m\n" in text
    words[6] += "2"
    assert run_verb("prepare", [*words, "--check", "--option", "depth_scale=1000"]) == 0
    assert note not in capsys.readouterr().out


@pytest.mark.parametrize(("z", "warned"), [(1, False), (-1, True)])
def test_normals_that_point_away_are_noticed(tmp_path, capsys, z, warned):
    for folder in ("image", "normals"):
        (tmp_path / folder).mkdir()
    normals = unit(np.random.default_rng(0).normal(size=(12, 16, 3)) - [0, 0, 4])
    for name, sign in (("a", 1), ("b", z)):
        Image.fromarray(np.zeros((12, 16, 3), np.uint8)).save(tmp_path / "image" / f"{name}.png")
        np.save(tmp_path / "normals" / f"{name}.npy", normals * [1, 1, sign])
    words = ["folder", "--raw", str(tmp_path), "--tasks", "normals", "--out", f"{tmp_path}-out", "--workers", "0"]
    assert run_verb("prepare", [*words, "--check"]) == 0
    text = capsys.readouterr()
    assert ("of the normals face the camera," in text.err) == warned
    assert re.search(r"^normals_facing: [\d.]+ .. (1|0\.99\d*)$", text.out, re.M)
