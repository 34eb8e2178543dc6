"""Train, scale, run and study diffusion models for visual perception."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling_perception.inference.predictor import Predictor as Predictor

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``Predictor``, imported when first asked for: ``import scaling_perception`` and ``--help`` stay instant."""
    if name != "Predictor":
        raise AttributeError(f"module 'scaling_perception' has no attribute '{name}'")
    # by name, for the root of the package stands below every room in the order of imports
    return importlib.import_module("scaling_perception.inference.predictor").Predictor


def __dir__() -> list[str]:
    return ["Predictor", "__version__"]
