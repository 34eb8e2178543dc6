"""What a prediction is: members merged at the model's resolution, brought to the picture's size."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from scaling_perception.tasks import TaskOptions, get_task
from scaling_perception.tasks.base import Estimate

Arrays: TypeAlias = Any  # (H, W[, C]), (I, H, W[, C]), or a list where sizes differ: numpy arrays in each case


class Prediction:
    """What the predictor returns, for one image or several.

    For one image the arrays are as below; for several they have a leading image axis, or are lists where sizes differ.
    ``prediction[i]`` works either way, and indexing the object itself gives the ``Prediction`` of one image.

    Attributes:
        task: its name.
        prediction: depth: float32 (H, W) in [0, 1], affine-invariant, 0 near; flow: float32 (H, W, 2) pixels, u right
            and v down; amodal: bool (H, W), the whole object.
        uncertainty: float32 (H, W), spread of the members (all zero for one member: it says nothing then).
        members: what was merged, resized to the image: (M, H, W), (M, H, W, 2), amodal (M, H, W, 3) RGB in [-1, 1].
            Computed when asked for.
        whole: amodal only: float32 (H, W, 3) in [-1, 1], the painted object on white.
        forwards: network evaluations of each pass for each image: steps × members, which may differ between images;
            a step whose blocks come from a cache counts as the part of an evaluation that it computes, by MACs.
        macs: float64, multiply-accumulates of the DiT for each image (NaN if they are unknown).
    """

    def __init__(self, task: str, parts: Sequence[Estimate], macs: float, options: TaskOptions, single: bool) -> None:
        """Args: ``macs``: of one network evaluation of every pass. ``options``: the model's."""
        self.task, self._options = task, options
        self._parts, self._macs, self._single = tuple(parts), float(macs), single

    def _gather(self, arrays: list[np.ndarray]) -> Arrays:
        if self._single:
            return arrays[0]
        return np.stack(arrays) if len({a.shape for a in arrays}) == 1 else arrays

    @cached_property
    def prediction(self) -> Arrays:
        return self._gather([part.prediction for part in self._parts])

    @cached_property
    def uncertainty(self) -> Arrays:
        return self._gather([part.uncertainty for part in self._parts])

    @cached_property
    def members(self) -> Arrays:
        native = get_task(self.task).native
        return self._gather([np.stack([native(m, p.size, self._options) for m in p.members]) for p in self._parts])

    @cached_property
    def whole(self) -> Arrays | None:
        found = [part.whole for part in self._parts if part.whole is not None]
        return self._gather(found) if found else None

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
        return Prediction(self.task, [self._parts[index]], self._macs, self._options, single=True)

    def __iter__(self) -> Iterator["Prediction"]:
        return (self[i] for i in range(len(self)))
