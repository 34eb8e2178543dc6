"""How many images and members are computed at once."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from scaling_perception.inference.draws import NoiseKeys, draw_members
from scaling_perception.support.shapes import RandomKey, UInt


class BatchPlan(NamedTuple):
    """Shape of the sampling batch: ``images`` × ``members`` at a time (times the task's passes)."""

    images: int
    members: int


def split(ensemble: int, rows: int, images: int, devices: int) -> BatchPlan:
    """Images and members of a batch of at most about ``rows``; on several devices filled up to a multiple of them."""
    if ensemble > rows:
        plan = BatchPlan(1, math.ceil(ensemble / math.ceil(ensemble / rows)))
    else:
        plan = BatchPlan(max(1, min(images, rows // ensemble)), ensemble)
    if plan.images * plan.members % devices == 0:
        return plan
    if plan.images > 1:  # images that only fill the batch are dropped, and so are members beyond the ensemble
        return plan._replace(images=_multiple(plan.images, devices // math.gcd(devices, plan.members)))
    return plan._replace(members=_multiple(plan.members, devices))


def _multiple(number: int, of: int) -> int:
    return math.ceil(number / of) * of


def free_bytes() -> int:
    """Memory that a graph may take on a device: what the accelerator has left, or half of what the machine has."""
    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(0.9 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    import psutil

    return psutil.virtual_memory().available // 2


def shrink(rows: int, needed: int, free: int) -> int:
    """Rows that should fit, when ``rows`` of them need ``needed`` bytes: in proportion, and fewer in any case."""
    return max(1, min(rows - 1, math.floor(rows * free / needed)))


def member_draws(
    key: RandomKey, ids: UInt[np.ndarray, " I"], ensemble: int, at_once: int, antithetic: bool
) -> Iterator[NoiseKeys]:
    """The noise of ``ensemble`` members, ``at_once`` at a time; the last batch is as large as the others."""
    for first in range(0, ensemble, at_once):
        yield draw_members(key, ids, first, at_once, antithetic)


def joined_members(
    batches: Iterable[Any], ensemble: int, watch: Callable[[np.ndarray], None] | None, axis: int
) -> np.ndarray:
    """Batches of members joined along their axis, the first ``ensemble`` of them.

    Args:
        watch: called with the members so far, after each batch of them but the last.
    """
    chunks: list[np.ndarray] = []
    for batch in batches:
        chunks.append(np.asarray(batch))
        if watch is not None and sum(chunk.shape[axis] for chunk in chunks) < ensemble:
            watch(np.concatenate(chunks, axis=axis))
    return np.concatenate(chunks, axis=axis)[(slice(None),) * axis + (slice(ensemble),)]
