"""Train, scale, run and study diffusion models for visual perception."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling_perception.evaluation.predictor import Predictor as Predictor

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``Predictor``, imported when first asked for: ``import scaling_perception`` and ``--help`` stay instant."""
    if name != "Predictor":
        raise AttributeError(f"module 'scaling_perception' has no attribute '{name}'")
    from scaling_perception.evaluation.predictor import Predictor
    from scaling_perception.scaling.compute import forward_macs

    Predictor.count_macs = staticmethod(forward_macs)  # evaluation lies below scaling and may not import it
    return Predictor


def __dir__() -> list[str]:
    return ["Predictor", "__version__"]
