"""Caching of the transformer's blocks between denoising steps, as a table of weights beside the sampler's own.

Every ``interval``-th step, from the first one on, computes all blocks. A step between takes their features, what the
blocks add to the tokens, from the last two computed steps i > j, as

    F = last F_i + older F_j

so that a method is a way of choosing two numbers for each step, and all methods of one kind of features run in one
compiled program:

* ``fora``: F_i itself (FORA, Selvaraju et al. 2024): last 1, older 0.
* ``taylorseer``: a straight line in the number of the step n through both (order 1 of TaylorSeer, Liu et al. 2025):
  last 1 + r, older -r, with r = (n - i) / (i - j).
* ``l2p``: fitted by least squares for each step, on the features of a few pictures that are sampled without a cache
  (a learnable linear predictor; here one pair of weights a step, for all features together).

Until two steps are computed, older is 0.

Features are what attention and MLP of each block return, before their gates (which are those of the step itself), or,
with ``-trunk`` behind a method's name, the difference of the tokens after and before all blocks: 2 L times less memory.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from scaling_perception.diffusion.schedules import choose_name
from scaling_perception.support.errors import UserError

NO_CACHE = "none"
DEFAULT_INTERVAL = 2


@partial(jax.tree_util.register_dataclass, data_fields=["compute", "last", "older"], meta_fields=["features"])
@dataclasses.dataclass(frozen=True)
class CacheRows:
    """Columns (T,) of a `SamplerTables`: whether a step computes its blocks (int32), else the weights (float32) of the
    features of the last computed step and of the one before. ``features``: blocks or trunk."""

    compute: Any
    last: Any
    older: Any
    features: str = "blocks"


Weights = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class Cache(NamedTuple):
    """An entry of `CACHES`.

    Attributes:
        features: blocks or trunk.
        weights: of each step, (last, older), of the numbers (T,) of the step, of the last computed one and of the one
            before (-1: there is none). None: they are fitted to the model (`fit_weights`).
    """

    features: str
    weights: Weights | None


def hold(step: np.ndarray, last: np.ndarray, older: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The features of the last computed step."""
    return np.ones(len(step)), np.zeros(len(step))


def extrapolate(step: np.ndarray, last: np.ndarray, older: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A straight line through the features of the last two computed steps."""
    ahead = np.where(older < 0, 0.0, (step - last) / np.maximum(last - older, 1))
    return 1 + ahead, -ahead


CACHES: dict[str, Cache | None] = {
    NO_CACHE: None,
    "fora": Cache("blocks", hold),
    "taylorseer": Cache("blocks", extrapolate),
    "l2p": Cache("blocks", None),
    "fora-trunk": Cache("trunk", hold),
    "taylorseer-trunk": Cache("trunk", extrapolate),
    "l2p-trunk": Cache("trunk", None),
}


def cache_name(word: str) -> str:
    """``word``, a name of `CACHES`.

    Raises:
        UserError: it is none.
    """
    return choose_name("cache", word, CACHES, {})


def combinations(names: list[str], intervals: list[int] | None) -> list[tuple[str, int]]:
    """Every method with every interval (None: the default's), without a cache once.

    Raises:
        UserError: an unknown name, none, or intervals without a method.
    """
    names = list(dict.fromkeys(map(cache_name, names)))
    if intervals is not None and not set(names) - {NO_CACHE}:
        raise UserError("cache_interval goes with cache: give that too, or leave it out")
    several = list(dict.fromkeys(intervals or [DEFAULT_INTERVAL]))
    return [(name, interval) for name in names for interval in ([1] if name == NO_CACHE else several)]


def computed_steps(steps: int, interval: int) -> int:
    """How many of the steps compute all blocks."""
    return -(-steps // interval)


def cache_rows(name: str, steps: int, interval: int) -> CacheRows | None:
    """The columns of a method; those of a fitted one before fitting hold the last features. None: every step computes.

    Raises:
        UserError: an unknown name, or an interval below 1.
    """
    entry = CACHES[cache_name(name)]
    if interval < 1:
        raise UserError(f"cache_interval {interval}: give a whole number above 0")
    if entry is None or computed_steps(steps, interval) == steps:
        return None
    number = np.arange(steps)
    last = number // interval * interval
    weights = (entry.weights or hold)(number, last, last - interval)
    ahead, behind = (np.asarray(column, np.float32) for column in weights)
    return CacheRows((number == last).astype(np.int32), ahead, behind, entry.features)


def fit_weights(rows: CacheRows, moments: Float[np.ndarray, "T 5"]) -> CacheRows:
    """``rows`` with the weights that reproduce the features of every step best, by least squares.

    With F the features of a step, a those of the last computed one and d their difference from those of the one before,
    F - a = p a + r d is fitted, which is ``last`` = 1 + p + r and ``older`` = -r.

    Args:
        moments: of every step the sums over all features of (a a, a d, d d, a (F - a), d (F - a)).

    Raises:
        UserError: moments that are not finite.
    """
    if not np.isfinite(moments).all():
        raise UserError("the model's features are NaN or infinite: no cache can be fitted to them")
    last, older = np.ones(len(moments)), np.zeros(len(moments))
    computed = np.cumsum(rows.compute)
    for step in np.flatnonzero(np.asarray(rows.compute) == 0):
        aa, ad, dd, ae, de = np.asarray(moments[step], np.float64)
        if computed[step] < 2:
            last[step] = 1 + (ae / aa if aa > 0 else 0.0)
            continue
        (along, ahead), *_ = np.linalg.lstsq(np.asarray([[aa, ad], [ad, dd]]), np.asarray([ae, de]), rcond=1e-6)
        last[step], older[step] = 1 + along + ahead, -ahead
    return dataclasses.replace(rows, last=last.astype(np.float32), older=older.astype(np.float32))
