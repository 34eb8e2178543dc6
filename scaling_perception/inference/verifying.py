"""What scores of members without truth (``tasks.verifiers``) are used for: ``Settings.verify``.

* ``best``: the member with the least score is the answer; the uncertainty is that of all members.
* ``weighted``: members are merged as usual, as if there were more of those with less score: 2 N copies in all, shared
  out in proportion to exp(-score / standard deviation of the scores). Equal scores are the usual merge exactly.
* ``allocate``: members are added only to images whose merged answer (``agreement``: whose mean member) still scores
  more than ``tolerance`` (``inference.adaptive``).
"""

import math
from typing import Any

import numpy as np

from scaling_perception.inference.model import Model
from scaling_perception.inference.settings import Settings
from scaling_perception.support.shapes import Float, Int
from scaling_perception.tasks import get_task
from scaling_perception.tasks.shapes import Map, Members, Spread
from scaling_perception.tasks.verifiers import Seen, Verifier


def verifier_of(settings: Settings, task: str) -> Verifier | None:
    """The settings' verifier."""
    return None if settings.verifier is None else get_task(task).verifiers[settings.verifier]


def scores(
    model: Model,
    raw: dict[str, Any],
    task: str,
    by: Verifier,
    members: Members,
    merged: Map,
    reverse: Map | None = None,
) -> Float[np.ndarray, " M"]:
    """(M,) float64, less is better, of members at the model's resolution; infinite in place of NaN.

    Args:
        merged: their usual merge. reverse: see ``Seen``.
    """
    given = get_task(task).conditions(raw, model.resolution, model.options)
    seen = Seen(given["image"], given["prompt"], merged, model.options, raw["image"].shape[:2], reverse)
    found = by.score(members, seen)
    return np.where(np.isnan(found), np.inf, found)


def copies(scores: Float[np.ndarray, " M"]) -> Int[np.ndarray, " M"]:
    """How many copies of each member are merged, 2 M in all: see the module."""
    finite, count = np.isfinite(scores), len(scores)
    spread = float(np.std(scores[finite])) if finite.any() else 0.0
    weights = finite.astype(np.float64) if finite.any() else np.ones(count)
    if spread > 0:
        weights[finite] = np.exp(-(scores[finite] - scores[finite].min()) / spread)
    share = 2 * count * weights / weights.sum()
    whole = np.floor(share + 1e-9).astype(int)
    order = np.lexsort((scores, np.round(whole - share, 9)))  # the largest remainders; of equal ones the less score
    whole[order[: 2 * count - whole.sum()]] += 1
    return whole


def verified(
    model: Model,
    raw: dict[str, Any],
    task: str,
    settings: Settings,
    members: Members,
    mode: str,
    reverse: Map | None = None,
) -> tuple[Map, Spread]:
    """`Model.reduce` of the members by ``best`` or ``weighted``."""
    usual, by = model.reduce(task, members, mode), verifier_of(settings, task)
    if by is None or len(members) == 1:
        return usual
    found = scores(model, raw, task, by, members, usual[0], reverse)
    if settings.verify == "best":
        best = int(np.argmin(found))
        return model.reduce(task, members[best : best + 1], mode)[0], usual[1]
    return model.reduce(task, np.repeat(members, copies(found), axis=0), mode)


def score_of_merged(model: Model, raw: dict[str, Any], task: str, by: Verifier, members: Members, merged: Map) -> float:
    """What ``allocate`` holds against the tolerance; infinite where members are compared and there is one."""
    if not by.among:
        return float(scores(model, raw, task, by, merged[None], merged)[0])
    return float(scores(model, raw, task, by, members, merged).mean()) if len(members) > 1 else math.inf
