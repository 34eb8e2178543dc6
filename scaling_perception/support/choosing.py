"""Choosing under limits: the lowest error among options whose costs are known.

One rule for every question of this kind: `predict --budget` chooses among the cells that were measured
(``inference.budgets``), `plan` among what a scaling law predicts (``scaling.planner``).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

Values = Sequence[float] | np.ndarray


def ranked(errors: Values, costs: Mapping[str, Values], limits: Mapping[str, float]) -> np.ndarray:
    """Indices of the options within all limits, the lowest error first; of equal errors the one that costs less.

    Args:
        errors: (n,); options whose error is NaN are left out.
        costs: by name (n,), the most important first: later ones only break ties of the earlier.
        limits: by a name of ``costs``; what is not named has none.
    """
    values = np.asarray(errors, float)
    table = {name: np.asarray(cost, float) for name, cost in costs.items()}
    allowed = ~np.isnan(values)
    for name, most in limits.items():
        allowed &= table[name] <= most
    order = np.lexsort((*reversed(table.values()), values))
    return order[allowed[order]]


def front(errors: Values, costs: Mapping[str, Values]) -> list[int]:
    """Indices of the options with less error than every cheaper one, from the cheapest to the lowest error.

    The first of ``costs`` is what cheap means; of equal cost the lower error comes first, then the other costs.
    """
    values = np.asarray(errors, float)
    first, *others = [np.asarray(cost, float) for cost in costs.values()]
    ahead: list[int] = []
    lowest = math.inf
    for at in np.lexsort((*reversed(others), values, first)).tolist():
        if values[at] < lowest:
            ahead.append(at)
            lowest = values[at]
    return ahead


def told_apart(excess: Sequence[float]) -> bool:
    """Whether an option is worse than another, from the interval of its paired excess error."""
    return excess[0] > 0
