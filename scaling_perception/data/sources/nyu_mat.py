"""NYU depth v2's labelled images as they are published: a MATLAB file of version 7.3 (HDF5), and its splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scaling_perception.data.formats import float32
from scaling_perception.data.images import AGAIN
from scaling_perception.data.sources.base import Entry
from scaling_perception.data.sources.hdf5 import array_shape, read_array
from scaling_perception.data.sources.mat5 import read_arrays
from scaling_perception.support.errors import UserError

NAME = "nyu_depth_v2_labeled.mat"
TRUTHS = {"raw": "rawDepths", "filled": "depths"}
"""Which depth is the truth -> its array, metres, 0 where unknown."""


def find(root: Path, name: str, split: str, truth: str = "raw") -> list[Entry]:
    """The images of the test part of ``splits.mat``, or all of them.

    Raises:
        UserError: a file is missing, damaged or lacks an array, or the split names images that are not there.
    """
    shape = array_shape(root / name, "images")
    if len(shape) != 4 or shape[1] != 3:
        raise UserError(f"{root / name}: images has the shape {shape} where (N, 3, width, height) is needed: {AGAIN}")
    if (held := array_shape(root / name, TRUTHS[truth])) != (shape[0], *shape[2:]):
        raise UserError(f"{root / name}: {TRUTHS[truth]} has the shape {held}, and images {shape}: {AGAIN}")
    chosen = np.arange(shape[0]) if split == "all" else _test_part(root / "splits.mat", shape[0])
    return [
        Entry(f"{Path(name).stem}/{index + 1:04d}", {"image": name, "depth": name}, {"index": int(index)})
        for index in chosen
    ]


def read(path: Path, name: str, index: int) -> np.ndarray:
    """One image uint8 (H, W, 3), or its depth float32 (H, W) metres: MATLAB's axes come in reversed order."""
    array = read_array(path, name, index)
    if array.ndim not in (2, 3) or array.dtype.kind not in "uf" or (array.ndim == 3 and array.dtype != np.uint8):
        raise UserError(f"{path}: {name} holds {array.dtype} {array.shape} for an image: {AGAIN}")
    return np.ascontiguousarray(array.T if array.ndim == 3 else float32(array.T))


def _test_part(path: Path, count: int) -> np.ndarray:
    found = read_arrays(path)
    if "testNdxs" not in found:
        held = ", ".join(sorted(found)) or "nothing"
        raise UserError(f"{path} has no array 'testNdxs', it holds {held}: {AGAIN}")
    stored = np.nan_to_num(found["testNdxs"].ravel().astype(np.float64)).clip(0, 1e9)
    numbers = np.where(stored == stored.round(), stored, 0).astype(np.int64)  # from 1
    if not numbers.size or numbers.min() < 1 or numbers.max() > count:
        raise UserError(f"{path}: testNdxs names image {numbers.max(initial=0)}, and there are {count}: {AGAIN}")
    return numbers - 1
