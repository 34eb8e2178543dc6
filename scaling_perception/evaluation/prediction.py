"""What a prediction is: members merged at the model's resolution, brought to the picture's size."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np

from scaling_perception.evaluation.ensemble import ensemble_amodal, ensemble_depth, ensemble_flow
from scaling_perception.tasks.resize import resize_bilinear

_merge_depth = jax.jit(ensemble_depth, static_argnums=1)
_merge_flow = jax.jit(ensemble_flow, static_argnums=1)
_merge_amodal = jax.jit(ensemble_amodal)


class Estimate(NamedTuple):
    """One image's result, at the size of the model's own pictures where not said otherwise."""

    prediction: np.ndarray  # native size
    uncertainty: np.ndarray  # native size
    members: np.ndarray
    whole: np.ndarray | None  # native size, amodal only
    size: tuple[int, int]
    forwards: int = 0  # network evaluations that each pass took, steps × members
    painted: np.ndarray | None = None  # native size, amodal only: the mask of what was painted, without the given one


def reduce_members(task: str, members: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Merge (M, H, W[, C]) members: (prediction (H, W[, C]), uncertainty (H, W)); see `ensemble`."""
    if task == "amodal":
        merged = _merge_amodal(members)
    elif task == "flow":
        merged = _merge_flow(members, mode)
    else:
        merged = ensemble_depth(members, mode) if mode == "marigold" else _merge_depth(members, mode)
    return np.asarray(merged[0]), np.asarray(merged[1])


def to_native(task: str, array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A reduced map (R, R[, C]) at ``size`` (H, W), bilinear; flow values (and their spread) become native pixels."""
    scale = np.float32(size[1] / array.shape[1] if task == "flow" else 1)
    return resize_bilinear(array, size) * scale


class Prediction:
    """What the predictor returns, for one image or several.

    For one image the arrays are as below; for several they have a leading image axis, or are lists where sizes differ.
    ``prediction[i]`` works either way, and indexing the object itself gives the ``Prediction`` of one image.

    Attributes:
        task: depth, flow or amodal.
        prediction: depth: float32 (H, W) in [0, 1], affine-invariant, 0 near; flow: float32 (H, W, 2) pixels, u right
            and v down; amodal: bool (H, W), the whole object.
        uncertainty: float32 (H, W), spread of the members (all zero for one member: it says nothing then).
        members: what was merged, resized to the image: (M, H, W), (M, H, W, 2), amodal (M, H, W, 3) RGB in [-1, 1].
            Computed when asked for.
        whole: amodal only: float32 (H, W, 3) in [-1, 1], the painted object on white.
        forwards: network evaluations of each pass for each image: steps × members, which may differ between images.
        macs: float64, multiply-accumulates of the DiT for each image (NaN if nobody can count them).
    """

    def __init__(self, task: str, parts: Sequence[Estimate], macs: float, single: bool) -> None:
        """Args: ``macs``: of one network evaluation of every pass."""
        self.task = task
        self._parts, self._macs, self._single = tuple(parts), float(macs), single

    def _gather(self, arrays: list[np.ndarray]) -> Any:
        if self._single:
            return arrays[0]
        return np.stack(arrays) if len({a.shape for a in arrays}) == 1 else arrays

    @cached_property
    def prediction(self) -> Any:
        return self._gather([part.prediction for part in self._parts])

    @cached_property
    def uncertainty(self) -> Any:
        return self._gather([part.uncertainty for part in self._parts])

    @cached_property
    def members(self) -> Any:
        task = self.task
        return self._gather([np.stack([to_native(task, m, p.size) for m in p.members]) for p in self._parts])

    @cached_property
    def whole(self) -> Any:
        return self._gather([part.whole for part in self._parts if part.whole is not None]) if self._amodal else None

    @property
    def _amodal(self) -> bool:
        return self.task == "amodal"

    @property
    def forwards(self) -> Any:
        counts = np.asarray([part.forwards for part in self._parts])
        return counts[0] if self._single else counts

    @property
    def macs(self) -> Any:
        return self._macs * np.float64(self.forwards) if self._single else self._macs * self.forwards

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> "Prediction":
        return Prediction(self.task, [self._parts[index]], self._macs, single=True)

    def __iter__(self) -> Iterator["Prediction"]:
        return (self[i] for i in range(len(self)))
