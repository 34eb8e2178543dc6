"""Every example of docs/extending.md runs as it stands there."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scaling_perception.diffusion.solvers import SOLVERS
from scaling_perception.tasks import TASKS

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
PARTS = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
EXAMPLES = {part.split("\n")[0]: re.findall(r"```python\n(.*?)```", part, re.S) for part in PARTS}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for table in (TASKS, SOLVERS):  # what the example registers is taken out again
        for key, value in dict(table).items():
            monkeypatch.setitem(table, key, value)
    monkeypatch.setitem(SOLVERS, "half_noise", SOLVERS["ddim"])
    (tmp_path / "photos").mkdir()
    for stem in "ab":
        Image.new("RGB", (6, 4)).save(tmp_path / "photos" / f"{stem}.png")
        np.save(tmp_path / "photos" / f"{stem}.npy", np.full((4, 6), 2.5, np.float32))
    (example,) = EXAMPLES[name]
    assert "assert" in example
    exec(compile(example, f"{PAGE.name}: {name}", "exec"), {"__name__": "example"})


def test_every_kind_has_a_part():
    assert list(EXAMPLES) == ["A task", "A data set", "A solver", "A model size", "A backbone block", "A metric"]
