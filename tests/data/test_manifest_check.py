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
    words = ["folder", "--raw", str(tmp_path), "--tasks", "depth", "--out", str(tmp_path / "out"), "--workers", "0"]
    assert run_verb("prepare", words) == 0
    text = capsys.readouterr()
    assert text.out.startswith("1 samples of folder (train)\n") and " m\n" in text.out
    assert ("outside 1 mm to 10 km: depth_scale" in text.err) == warned
