"""Small files in the formats of the data sets, and what every raw sample and every refusal must be like."""

import numpy as np
import pytest
from PIL import Image

from scaling_perception.data import formats
from scaling_perception.data.sources import SOURCES, open_source
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import TaskOptions, get_task

H, W = 12, 16


def picture(seed, height=H, width=W):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(path, array):
    """A picture in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)  # plain: the careful writer flushes every file to the disk


def write_flow(path, seed, height=H, width=W):
    path.parent.mkdir(parents=True, exist_ok=True)
    formats.write_flo(path, np.random.default_rng(seed).normal(size=(height, width, 2)))


def check_raw(raw, task):
    height, width = raw["image"].shape[:2]
    assert isinstance(raw["key"], str) and raw["image"].shape == (height, width, 3) and raw["image"].dtype == np.uint8
    if task == "depth":
        assert raw["depth"].shape == raw["valid"].shape == (height, width)
        assert raw["depth"].dtype == np.float32 and np.isfinite(raw["depth"]).all()
    if task == "flow":
        assert raw["image2"].shape == raw["image"].shape and raw["flow"].shape == (height, width, 2)
        assert raw["flow"].dtype == np.float32 and np.isfinite(raw["flow"]).all()
    if task == "amodal":
        assert raw["visible_mask"].dtype == raw["whole_mask"].dtype == bool
        assert raw["visible_mask"].shape == raw["whole_mask"].shape == (height, width)
        assert raw.get("whole") is None or (raw["whole"].shape == raw["image"].shape and raw["whole"].dtype == np.uint8)
    else:
        assert raw["valid"].dtype == bool and raw["valid"].any()
    if task == "amodal" and raw.get("whole") is None:  # to evaluate on only
        get_task(task).conditions(raw, 32, TaskOptions())
        return
    for sample in get_task(task).encode(raw, 32, TaskOptions()):
        assert np.isfinite(sample["target"]).all()


def refuse(words, name, root, split="all", task=None, read=False, **options):
    with pytest.raises(UserError, match=words) as error:
        source = open_source(name, root, split, task or SOURCES[name].tasks[0], **options)
        if read:
            source[0]
    assert "\n" not in str(error.value)
