"""Which run to make next: the affordable one that makes the choice's prediction surest.

The bootstrapped parameter sets predict the choice (h) and a run (g, in logs). With s the scatter of runs about the law,
measuring the run leaves of the variance of h

    var(h) - cov(g, h)^2 / (var(g) + s^2)

which is exact for normal errors and laws that are linear in their parameters, and a ranking for others.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from scaling_perception.models.compute import TRAINING_FACTOR
from scaling_perception.scaling.laws import law_form
from scaling_perception.scaling.plan_laws import TRAINING, Laws

if TYPE_CHECKING:
    from scaling_perception.scaling.planner import Options, Question, Values

_PLACES = 9  # of each column
IMAGES = 64  # of an evaluation


def next_run(laws: Laws, options: "Options", choice: "Values", q: "Question") -> dict[str, Any] | None:
    """The run, its cost in MACs and what is left of the prediction's standard deviation; None where no run helps.

    Runs lie on a grid of the law's columns, from the least of the data to the choice. One that trains may cost
    ``next_share`` of the budget; one that only evaluates no more for an image than the choice does.
    """
    target = laws.log_error(choice, sampled=True)[:, 0]
    before = float(target.std())
    if before < 1e-9:
        return None
    found: dict[str, Any] | None = None
    for which, law in enumerate(laws.laws):
        columns = laws.columns[which]
        axes = []
        for column in columns:
            low, high = law.range[column.name]
            if column.quantity == "fixed":
                axes.append(np.array([column.value]))
            elif column.quantity == "params" and q.sizes:
                axes.append(np.array(sorted({s.params for s in q.sizes})))
            else:
                end = max(high, float(choice[column.quantity][0]) * column.scale)
                places = np.geomspace(low, end, _PLACES)
                whole = column.quantity in ("steps", "members")
                axes.append(np.unique(np.maximum(np.round(places), 1)) if whole else places)
        x = np.stack([row.ravel() for row in np.meshgrid(*axes, indexing="ij")])
        named = {c.quantity: row / c.scale for c, row in zip(columns, x, strict=True)}
        macs, allowed = _cost(named, options, choice, q)
        if not allowed.any():
            continue
        x, macs = x[:, allowed], macs[allowed]
        with np.errstate(all="ignore"):
            drawn = np.log(law_form(law).value(law.samples[: laws.draws], np.log(x)))
        both = (drawn - drawn.mean(0)) * (target - target.mean())[:, None]
        gain = both.mean(0) ** 2 / (drawn.var(0) + law.noise["log_sd"] ** 2)
        best = int(np.nanargmax(gain))
        if found is None or gain[best] > found["gain"]:
            at = {name: float(v) for name, v in zip(law.x, x[:, best], strict=True)}
            after = float(np.sqrt(max(target.var() - gain[best], 0.0)))
            found = {"at": at, "macs": float(macs[best]), "gain": float(gain[best]), "before": before, "after": after}
    return found


def _cost(
    named: dict[str, np.ndarray], options: "Options", choice: "Values", q: "Question"
) -> tuple[np.ndarray, np.ndarray]:
    """MACs (n,) of the runs and which are affordable."""
    count = len(next(iter(named.values())))
    forward = np.full(count, float(choice["forward"][0]))
    if "params" in named:
        known = options.values["params"], options.values["forward"]
        place = np.argsort(known[0])
        forward = np.exp(np.interp(np.log(named["params"]), np.log(known[0][place]), np.log(known[1][place])))
    each = q.item_macs or (1.0, 1.0)
    train = np.zeros(count)
    samples = choice.get("samples", np.ones(1))
    per_item = {
        "tokens": forward * samples / choice.get("tokens", samples), "samples": forward,
        "first": each[0], "second": each[1],
    }  # fmt: skip
    for name in TRAINING:
        if name in named:
            train = train + TRAINING_FACTOR * named[name] * per_item.get(name, 1.0)
    if any(name in named for name in TRAINING):
        rate = float(np.nanmedian(options.train_rate))
        return train, train <= q.next_share * q.budget * rate
    steps, members = (named.get(name, choice[name][0]) for name in ("steps", "members"))
    each_image = named["serving"] if "serving" in named else forward * steps * members * q.passes
    if "serving" in named:
        here = float(choice["serving"][0])
    else:
        here = float((choice["forward"] * choice["steps"] * choice["members"])[0] * q.passes)
    return IMAGES * each_image, each_image <= here * (1 + 1e-9)
