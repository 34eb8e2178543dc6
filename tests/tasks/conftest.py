"""A maker of raw samples, for every task at once."""

import numpy as np
import pytest


@pytest.fixture
def make_raw():
    from scaling_perception.tasks.normals import unit  # not before --shapes

    def make(height, width, seed=0, **changes):
        rng = np.random.default_rng(seed)
        raw = {
            "key": f"made/{height}x{width}",
            "image": rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
            "image2": rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
            "depth": rng.uniform(1, 9, (height, width)).astype(np.float32),
            "valid": np.ones((height, width), bool),
            "flow": rng.uniform(-90, 90, (height, width, 2)).astype(np.float32),
            "normals": unit(np.random.default_rng(seed).normal(size=(height, width, 3)) - [0, 0, 2]),
            "visible_mask": rng.random((height, width)) < 0.5,
            "whole_mask": rng.random((height, width)) < 0.6,
            "whole": rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        }
        return {**raw, **changes}

    return make
