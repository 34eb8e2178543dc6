"""What is wrong with this machine: versions, devices, memory, disk, weights, data.

Every line is `ok`, `note` (works, but read it) or `FAIL` (with the mend). Exit code 1 when something failed, 2 when JAX
has no device, without which no other command runs (nor do the checks that compute).
"""

import argparse
import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from scaling_perception.support.failures import no_backend

EXAMPLES = """
scaling-perception doctor
scaling-perception doctor --data /data/hypersim --dataset hypersim
scaling-perception doctor --json
"""

_GIB = 2**30
_PYTHON = (3, 11)
_PACKAGES = {  # distribution: the oldest version that the tests run with
    "jax": (0, 10, 2),
    "flax": (0, 12, 8),
    "optax": (0, 2, 8),
    "orbax-checkpoint": (0, 12, 8),
    "grain": (0, 2, 18),
    "numpy": (2, 0),
}


class Finding(NamedTuple):
    """One checked thing: `level` is ok, note or FAIL."""

    level: str
    name: str
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--dataset", help="also open this dataset (name as in `evaluate --dataset`)")
    parser.add_argument("--data", default="", help="folder of that dataset")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())


def _check_python() -> Finding:
    version = sys.version.split()[0]
    if _numbers(version) < _PYTHON:
        return Finding("FAIL", "python", f"{version}: install Python 3.11 or newer")
    return Finding("ok", "python", version)


def _check_packages() -> list[Finding]:
    found = []
    for name, oldest in _PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding("FAIL", name, "not installed: run `pip install -e .` again"))
            continue
        enough = _numbers(version) >= oldest
        text = version if enough else f"{version} is older than {'.'.join(map(str, oldest))}: pip install -U {name}"
        found.append(Finding("ok" if enough else "FAIL", name, text))
    return found


def _check_devices() -> list[Finding]:
    import jax

    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        return [Finding("FAIL", "devices", no_backend() or str(error))]
    kind = devices[0].device_kind
    text = f"{len(devices)} x {kind} ({devices[0].platform}), {jax.process_count()} process(es)"
    if devices[0].platform != "cpu":
        return [Finding("ok", "devices", text)]
    extra = []
    if shutil.which("nvidia-smi"):
        extra.append(
            Finding("note", "cuda", "an NVIDIA driver is here but jax runs on the CPU: pip install -e '.[cuda]'")
        )
    elif os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0"):
        extra.append(Finding("note", "tpu", "a TPU is here but jax runs on the CPU: pip install -e '.[tpu]'"))
    return [Finding("ok", "devices", text), *extra]


def _check_processes() -> Finding:
    from scaling_perception.parallel.joining import PROCESSES, other_processes
    from scaling_perception.support.errors import UserError

    try:
        seen = other_processes()
    except UserError as error:
        return Finding("FAIL", "processes", str(error))
    if not seen:
        return Finding("ok", "processes", "runs alone")
    text = f"one of several ({seen}): train joins the others, other verbs run in one ({PROCESSES}=1: alone)"
    return Finding("note", "processes", text)


def _check_arithmetic() -> Finding:
    """A small gradient, compiled: finds broken installs that merely import."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    value = jax.jit(jax.grad(lambda x: jnp.sum(jnp.tanh(x) ** 2)))(jnp.full((8,), 0.5))
    right = 2 * np.tanh(0.5) * (1 - np.tanh(0.5) ** 2)
    if np.allclose(np.asarray(value), right, rtol=1e-4):
        return Finding("ok", "arithmetic", "a compiled gradient is right")
    return Finding("FAIL", "arithmetic", "a compiled gradient is wrong: reinstall jax and jaxlib of one version")


def _check_kernels() -> list[Finding]:
    """Where JAX runs on a processor: whether it has the kernels in C++ (docs/kernels.md)."""
    import jax

    from scaling_perception.support import native

    if jax.default_backend() != "cpu":
        return []
    if native.targets():
        return [
            Finding("ok", "kernels", f"attention and convolutions for this processor, compiled, in {native.folder()}")
        ]
    if native.folder() is None:
        reason = f"off: {native.NATIVE} or JAX_COMPILATION_CACHE_DIR is empty, or there is no home folder"
    elif native.NATIVE not in os.environ and not native.pays():
        return [Finding("ok", "kernels", f"not used on this processor ({native.NATIVE}=FOLDER does, docs/kernels.md)")]
    elif native.compiler() is None:
        reason = "no C++ compiler: install g++ or clang++, or set CXX"
    else:
        reason = "they cannot be compiled: see the warning"
    return [Finding("note", "kernels", f"{reason}; attention and convolutions take about twice as long without")]


def _check_memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available / _GIB
    text = f"{free:.1f} GiB free of {psutil.virtual_memory().total / _GIB:.1f} GiB"
    return Finding("ok", "memory", text) if free >= 6 else Finding("note", "memory", f"{text}; quickstart wants 6 GiB")


def _check_disk() -> Finding:
    free = shutil.disk_usage(tempfile.gettempdir()).free / _GIB
    text = f"{free:.1f} GiB free in {tempfile.gettempdir()}"
    return Finding("ok", "disk", text) if free >= 2 else Finding("note", "disk", f"{text}; free some space first")


def _check_weights() -> list[Finding]:
    """The shipped weights load and are those that were shipped."""
    from scaling_perception.interop.model_folder import load_model
    from scaling_perception.models.autoencoders import load_autoencoder
    from scaling_perception.support.errors import UserError

    found = []
    checks: dict[str, Callable[[], str]] = {
        "autoencoder 'tiny'": lambda: f"id {load_autoencoder('tiny').id}",
        "model 'mini'": lambda: (
            f"tasks {', '.join(load_model(Path(__file__).parent / 'weights' / 'mini')[1]['tasks'])}"
        ),
    }
    for name, check in checks.items():
        try:
            found.append(Finding("ok", name, check()))
        except UserError as error:
            found.append(Finding("FAIL", name, f"{error}"))
    return found


def _check_dataset(name: str, root: str) -> Finding:
    from scaling_perception.data.sources import ENDLESS, SOURCES, open_source
    from scaling_perception.support.errors import UserError

    try:
        task = SOURCES[name][1][0] if name in SOURCES else "depth"
        source = open_source(name, root, split="val" if name in ENDLESS else "all", task=task)
        sample = source[0]
    except UserError as error:
        return Finding("FAIL", f"dataset {name}", str(error))
    return Finding("ok", f"dataset {name}", f"{len(source)} samples; first {sample['key']}, {sample['image'].shape}")


def findings(dataset: str | None = None, root: str = "") -> list[Finding]:
    """All findings about this machine; `dataset` adds a look into one dataset folder."""
    found = [
        _check_python(),
        *_check_packages(),
        *_check_devices(),
        _check_processes(),
        _check_memory(),
        _check_disk(),
    ]
    if _without_device(found):
        return found
    found += [_check_arithmetic(), *_check_kernels(), *_check_weights()]
    if dataset:
        found.append(_check_dataset(dataset, root))
    return found


def _without_device(found: list[Finding]) -> bool:
    return any(item.name == "devices" and item.level == "FAIL" for item in found)


def run(args: argparse.Namespace) -> int:
    found = findings(args.dataset, args.data)
    if args.json:
        import json

        print(json.dumps([item._asdict() for item in found], indent=2))
    else:
        width = max(len(item.name) for item in found)
        for item in found:
            print(f"{item.level:<4}  {item.name:<{width}}  {item.text}")
    failed = sum(item.level == "FAIL" for item in found)
    if failed and not args.json:
        print(f"{failed} problem(s): mend the FAIL lines above")
    if _without_device(found):
        return 2
    return 1 if failed else 0
