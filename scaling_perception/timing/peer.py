"""The same models in PyTorch, which stand in the checkout beside the package: ``benchmarks/torch_*.py``."""

import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

from scaling_perception.support.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
_NAME = "scaling_perception_benchmarks"


def load(module: str) -> Any:
    """A module of ``benchmarks/``, such as ``torch_peer``.

    Raises:
        UserError: no torch here, or the package does not lie in a checkout.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError("--against torch needs PyTorch: pip install 'scaling-perception[torch]', or leave it out")
    if not (FOLDER / f"{module}.py").is_file():
        raise UserError(
            f"--against torch needs benchmarks/{module}.py of a checkout, which an installed package has not: "
            "run it in a clone (pip install -e '.[torch]'), or leave it out"
        )
    if _NAME not in sys.modules:  # a package of that name, for the folder's own may be another's in sys.path
        package = types.ModuleType(_NAME)
        package.__path__ = [str(FOLDER)]
        sys.modules[_NAME] = package
    return importlib.import_module(f"{_NAME}.{module}")


def prepare() -> Any:
    """The module ``torch_peer``, with as many threads for torch as there are processors for JAX.

    Raises:
        UserError: as of `load`, or an accelerator on our side.
    """
    import jax

    peer = load("torch_peer")
    if jax.default_backend() != "cpu":
        raise UserError("--against torch compares on the processor: set JAX_PLATFORMS=cpu, or leave it out")
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return peer
