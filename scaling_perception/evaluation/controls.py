"""Controls: what the model answers when it cannot see the picture. They say how much of an error is the picture's.

``blind``: the model on a grey picture. ``shuffled``: the model on another picture of the set, measured on this one's
truth. Both are asked for the same thing as the model itself (an amodal mask stays where it is), with the same settings,
and compared image by image. A model that has learned the data set's mean alone answers as well without the picture.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from scaling_perception.evaluation.intervals import bootstrap_ci, summarise
from scaling_perception.support.errors import UserError
from scaling_perception.tasks.base import WEIGHT
from scaling_perception.tasks.resize import resize_bilinear

CONTROLS = ("blind", "shuffled")
GREY = 128
_SEEN = ("image", "image2")  # fields that are looked at; the others are the prompt's or the truth's


def control_inputs(source: Any, index: int, raw: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(control, ``raw`` with other pictures); ``shuffled`` takes those of the next sample that can be read, if any."""
    fields = [name for name in _SEEN if name in raw]
    yield "blind", {**raw, **{name: np.full_like(raw[name], GREY) for name in fields}}
    other = _another(source, index)
    if other is not None:
        size = raw["image"].shape[:2]
        pictures = {name: np.round(resize_bilinear(other[name], size)).astype(np.uint8) for name in fields}
        yield "shuffled", {**raw, **pictures}


def _another(source: Any, index: int) -> dict[str, Any] | None:
    for step in range(1, min(len(source), 10)):
        try:
            return source[(index + step) % len(source)]
        except UserError:
            continue
    return None


def control_results(images: list[dict[str, Any]], at: int, cell: dict[str, Any]) -> dict[str, Any]:
    """What the controls say of a cell: {control: {"metrics", "rows"}, with "adds": {metric: {"mean", "ci95"}}}.

    ``adds`` is the cell's figure minus the control's, paired by image: below 0 for an error means that the picture
    helps.

    Args:
        images: records of images: ``key``, ``cells`` [[forwards, seconds, row], ...] and, of some, ``controls``.
        at: number of the cell among ``cells``.
        cell: its description.
    """
    found: dict[str, Any] = {}
    for name in CONTROLS:
        mine = [image for image in images if name in image.get("controls", {})]
        if not mine:
            continue
        rows = [{"key": image["key"], **image["controls"][name]} for image in mine]
        adds = {}
        for metric in rows[0]:
            if metric == "key" or metric.endswith(WEIGHT):
                continue
            own = [image["cells"][at][2] for image in mine]
            both = [(one, row) for one, row in zip(own, rows, strict=True) if metric in one and metric in row]
            known = np.asarray([one[metric] - row[metric] for one, row in both])
            if known.size:
                ends = bootstrap_ci(known)
                adds[metric] = {"mean": float(known.mean()), "ci95": None if ends is None else list(ends)}
        found[name] = {"metrics": summarise(rows), "rows": rows, "adds": adds}
    return {"cell": cell, **found} if found else {}
