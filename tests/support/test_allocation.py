"""Freed memory is kept where a process computes on a CPU."""

import os
import platform
import subprocess
import sys

import pytest

from scaling_perception.support import allocation

SCRIPT = """
import resource, numpy as np
from scaling_perception.support.allocation import keep_freed_memory
print(keep_freed_memory())
def touch():
    np.full(10_000_000, 1.0, np.float32).sum()  # 40 MB: beyond what glibc keeps by itself
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(**variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GLIBC_", "MALLOC_"))}
    words = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(words, env=environment | variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    asked, faults = done.stdout.split()
    return asked == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize(
    ("variables", "kept"),
    [
        ({"JAX_PLATFORMS": "cpu"}, True),
        ({"JAX_PLATFORMS": "tpu"}, False),
        ({"JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "2"}, False),
        ({"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""}, False),
    ],
)
def test_pages_are_touched_once(variables, kept):
    asked, faults = run(**variables)
    assert asked == kept
    assert faults < 100 if kept else faults > 100  # 9,766 pages of 4 KiB an array, 20 of 2 MiB


def test_a_machine_with_an_accelerator_is_left_alone(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith(("GLIBC_", "MALLOC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(allocation, "has_tpu", lambda: False)
    monkeypatch.setattr(allocation, "_ACCELERATORS", (str(tmp_path),))
    assert not allocation._on_cpu() and not allocation.keep_freed_memory()
    monkeypatch.setattr(allocation, "_ACCELERATORS", (str(tmp_path / "none"),))
    assert allocation._on_cpu()
    monkeypatch.setattr(allocation, "has_tpu", lambda: True)
    assert not allocation._on_cpu()


@pytest.mark.parametrize(
    ("words", "asks"),
    [("train", True), ("quickstart", True), ("bench train", True), ("bench sample", False), ("", False)],
)
def test_commands_that_train_ask_for_it(words, asks):
    script = (
        "import sys; from scaling_perception import cli; cli.keep_freed_memory = lambda: print('asked')\n"
        f"sys.argv = ['scaling-perception', *{words.split()}, '--help']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and ("asked" in done.stdout) == asks, done.stderr
