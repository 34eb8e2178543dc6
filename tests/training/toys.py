"""Small problems that compile in no time: a linear regression with noise, and latents for the nano DiT."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from scaling_perception.parallel.rules import WHOLE_RULES
from scaling_perception.support.configs import load_config
from scaling_perception.training.objective import Objective

BATCH = 8  # one sample for each of the eight devices that conftest makes


class LinearBatches:
    """x (8, 3) and y = x W + b, a pure function of the step."""

    def __init__(
        self, signal_at: int = -1, number: int = signal.SIGINT, nan_at: int = -1, name: str = "linear"
    ) -> None:
        self.signal_at, self.number, self.nan_at = signal_at, number, nan_at
        self.fingerprint: dict[str, Any] = {"name": name, "length": 64}

    def at(self, step: int) -> dict[str, Any]:
        x = np.random.default_rng(step).normal(size=(BATCH, 3)).astype(np.float32)
        y = x @ np.array([[1.0, -2.0], [0.5, 0.0], [2.0, 1.0]], np.float32) + np.array([0.3, -0.7], np.float32)
        if step == self.nan_at:
            y[0, 0] = np.nan
        return {"x": x, "y": y, "key": [f"sample{step}-{i}" for i in range(BATCH)]}

    def iterate(self, start: int) -> Iterator[dict[str, Any]]:
        step = start
        while True:
            if step == self.signal_at:
                os.kill(os.getpid(), self.number)
            yield self.at(step)
            step += 1


def linear_objective(batches: LinearBatches | None = None, jitter: float = 0.01, **fields: Any) -> Objective:
    """Mean squared error of x W + b + table, with noise on x so that the random key matters; ``table`` is frozen."""

    def init(key: jax.Array) -> dict[str, Any]:
        kernel = 0.1 * jax.random.normal(key, (3, 2))
        return {"layer": {"kernel": kernel, "bias": jnp.zeros(2)}, "table": jnp.full(2, 0.25)}

    def loss(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = batch["x"] + jitter * jax.random.normal(key, batch["x"].shape)
        got = x @ params["layer"]["kernel"] + (params["layer"]["bias"] + params["table"])[None, :]
        return jnp.mean(jnp.square(got - batch["y"])), {"largest": jnp.max(jnp.abs(got))}

    def export(params: Any, path: str, info: Any) -> None:
        os.makedirs(path)
        np.savez(os.path.join(path, "model.npz"), **params["layer"], table=params["table"])

    known = {"frozen": ("table",), "rules": WHOLE_RULES, **fields}
    return Objective(init, loss, batches or LinearBatches(), export, BATCH, **known)


def config_of(*overrides: str, spec: str = "configs/mini.py:model=nano,res=64,cache=,batch=8,steps=12") -> ConfigDict:
    """A short run of the shipped recipe with the nano model, and AdamW."""
    short = ["train.log_every=4", "train.checkpoint_every=4", "optim.warmup=2", "optim.ema=0.9"]
    short += ["optim.name=adamw", "optim.lr=1e-3"]
    return load_config(spec, [*short, *overrides])


class LatentBatches:
    """Latents (8, 8, 8, 4) of 64-pixel pictures: the target is a fixed map of the image, so it can be learned."""

    def __init__(self, side: int = 8) -> None:
        self.side = side
        self.fingerprint: dict[str, Any] = {"name": "latents", "length": 32}
        self.autoencoders: set[str] = set()
        self.class_count = 0

    def at(self, step: int) -> dict[str, Any]:
        rng = np.random.default_rng(step % 4)
        shape = (BATCH, self.side, self.side, 4)
        image, prompt = (rng.normal(size=shape).astype(np.float16) for _ in range(2))
        task = np.arange(BATCH, dtype=np.int32) % 4
        target = (2.0 * image + task[:, None, None, None]).astype(np.float16)
        keys = [f"latent{step}-{i}" for i in range(BATCH)]
        valid = rng.random(shape[:3]) > 0.2
        label = np.full(BATCH, -1, np.int32)
        return dict(image=image, prompt=prompt, target=target, valid=valid, pass_id=task, label=label, key=keys)

    def iterate(self, start: int) -> Iterator[dict[str, Any]]:
        step = start
        while True:
            yield self.at(step)
            step += 1


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own in ``folder``; skips the test where it may not be mounted."""
    disk = folder / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield disk
    finally:  # lazily, for files in it may still be open
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
