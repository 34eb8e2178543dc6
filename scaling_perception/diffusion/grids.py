"""Timesteps for a number of steps by dynamic programming on a table of costs (Watson et al. 2021, "Learning to
efficiently sample from diffusion probabilistic models").

A grid t_1 > t_2 > ... > t_N costs ``start[t_1] + jump[t_1, t_2] + ... + jump[t_{N-1}, t_N] + end[t_N]``. What is
summed is decided by who makes the table (``evaluation.grid_table``); the choice is exact for it.
"""

from typing import NamedTuple

import numpy as np

from scaling_perception.support.shapes import Float, Int


class Costs(NamedTuple):
    """Costs of K candidate timesteps, in the order of sampling; all may be any finite numbers.

    Attributes:
        t: (K,) int64, strictly falling in 0..999.
        start: (K,) of the first evaluation at each.
        jump: (K, K) of the step from row to column, read above the diagonal alone.
        end: (K,) of returning the clean estimate made at each.
    """

    t: Int[np.ndarray, " K"]
    start: Float[np.ndarray, " K"]
    jump: Float[np.ndarray, "K K"]
    end: Float[np.ndarray, " K"]


def best_grids(costs: Costs, most: int) -> list[tuple[float, list[int]]]:
    """(cost, timesteps) of the cheapest grid of 1, 2, ..., ``most`` steps; of equal ones that of earlier candidates.

    Raises:
        ValueError: ``most`` is outside 1..K.
    """
    count = len(costs.t)
    if not 1 <= most <= count:
        raise ValueError(f"{most} steps of {count} candidates")
    allowed = np.where(np.triu(np.ones((count, count), bool), 1), costs.jump, np.inf)
    reached, before, found = np.asarray(costs.start, np.float64), [], []
    for steps in range(1, most + 1):
        whole = reached + costs.end
        at = int(np.argmin(whole))
        chosen = [at]
        for last in reversed(before):
            chosen.append(int(last[chosen[-1]]))
        found.append((float(whole[at]), [int(costs.t[i]) for i in reversed(chosen)]))
        if steps < most:
            ways = reached[:, None] + allowed
            before.append(np.argmin(ways, axis=0))
            reached = ways.min(axis=0)
    return found
