"""A source and an autoencoder that cost nothing, in place of scenes and of trained weights."""

import sys
import time

import jax.numpy as jnp
import numpy as np

from scaling_perception.data import sources
from scaling_perception.models import autoencoders
from scaling_perception.models.autoencoders import Autoencoder
from scaling_perception.support.verbs import run_verb

SIZE = 32


class StandIn:
    """Raw samples of all tasks, from the index alone; indices in ``bad`` have no valid depth."""

    def __init__(self, count=8, start=0, resolution=SIZE, bad=(), seconds=0.0):
        self.count, self.start, self.size = count, start, resolution
        self.bad, self.seconds = bad, seconds

    def __len__(self):
        return self.count

    def fingerprint(self):
        return {"name": "scenes", "start": self.start, "count": self.count, "resolution": self.size}

    def __getitem__(self, index):
        time.sleep(self.seconds)
        rng = np.random.default_rng(self.start + index)
        size = (self.size, self.size)
        x = np.linspace(0, 1, self.size, dtype=np.float32)
        valid = np.ones(size, bool)
        valid[:3, : self.size // 2] = False  # not symmetric, so that a forgotten flip shows
        if index in self.bad:
            valid[:] = False
        visible = np.zeros(size, bool)
        visible[4:20, 2 : 10 + index % 8] = True
        return {
            "key": f"stand-in/{self.start + index}",
            "image": rng.integers(0, 256, (*size, 3), dtype=np.uint8),
            "image2": rng.integers(0, 256, (*size, 3), dtype=np.uint8),
            "depth": 1 + rng.random() * x + x[:, None] * rng.random(size, np.float32),
            "valid": valid,
            "flow": np.stack([20 * x + 5 * x[:, None], 9 * x[:, None] - 3 * x], -1) + rng.normal(size=2).astype("f4"),
            "visible_mask": visible,
            "whole_mask": visible,
            "whole": np.where(visible[..., None], rng.integers(0, 256, (*size, 3), dtype=np.uint8), np.uint8(255)),
            "label": 7 + index,
        }


def _encode(params, images):
    b, height, width, _ = images.shape
    blocks = images.reshape(b, height // 8, 8, width // 8, 8, 3).transpose(0, 1, 3, 2, 4, 5)
    return jnp.tanh(blocks.reshape(b, height // 8, width // 8, 192) @ params["kernel"]), None


def _encode_with_logvar(params, images):
    mean = _encode(params, images)[0]
    return mean, mean * 2 - 5


def _encode_matching(params, images, first=None):
    return _encode(params, images if first is None else images - first / 2)


def make_autoencoder(logvar=False, name="tiny"):
    # unequal weights, so that mirroring latents is not the same as mirroring pixels
    kernel = np.random.default_rng(3).normal(size=(192, 4)).astype(np.float32) / 6
    encode = _encode_with_logvar if logvar else _encode
    matches = name == "match"
    encode = _encode_matching if matches else encode
    return Autoencoder(name, f"{name}-{int(logvar)}", {"kernel": kernel}, encode, lambda params, z: z, matches=matches)


def install(patch=setattr, **source):
    """Let ``open_source('scenes')`` and ``load_autoencoder`` give stand-ins; ``patch`` as ``monkeypatch.setattr``."""
    real = sources.open_source

    def open_source(name, root, split, task, **options):
        return StandIn(**{**options, **source}) if name == "scenes" else real(name, root, split, task, **options)

    patch(sources, "open_source", open_source)
    patch(autoencoders, "load_autoencoder", lambda name: make_autoencoder("logvar" in name, name))


def prepare(out, *words, count=8):
    """Run the verb on the stand-ins."""
    fixed = ["--latents", "--resolution", str(SIZE), "--shard-size", "3", "--batch", "16", "--workers", "0"]
    return run_verb("prepare", ["scenes", "--out", str(out), "--count", str(count), *fixed, *words])


if __name__ == "__main__":  # python stand_ins.py SECONDS OUT WORDS...: a process that a test can kill
    install(seconds=float(sys.argv[1]))
    sys.exit(prepare(sys.argv[2], *sys.argv[3:]))
