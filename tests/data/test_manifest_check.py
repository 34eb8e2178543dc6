"""What `prepare` says of value ranges that no scene has."""

import numpy as np
import pytest
from PIL import Image

from scaling_perception.data.formats import write_png16
from scaling_perception.support.verbs import run_verb


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
