"""Hold-out: fit the smaller points and predict the largest decade, how wrong and how sure; and choose a form by it."""

import math
from typing import Any, NamedTuple

import numpy as np

from scaling_perception.scaling.law_checks import refuse_unfit
from scaling_perception.scaling.law_fit import Options, Problem, bootstrap, fit_problem, with_noise
from scaling_perception.scaling.law_forms import make_form
from scaling_perception.scaling.points import X_NAMES, Points, find_column
from scaling_perception.support.errors import UserError

_BOOTSTRAPS = 400
_MOST = 2000
_NOISE = 1.2


class Split(NamedTuple):
    """Which points (n,) are held out, and how they were chosen."""

    held: np.ndarray
    what: str
    start: float | None  # of x where there is one column


def split_largest(points: Points, parameters: int) -> Split | None:
    """The largest decade of x (of several columns: of their product), if enough is left to fit; else the largest
    quarter; None if that leaves too little as well."""
    size = np.log10(points.x).sum(0)
    single = len(points.x) == 1
    edge = size.max() - 1
    held = size > edge + 1e-9
    kept = size[~held]
    enough = max(parameters + 2, int(1.5 * parameters))
    if len(kept) >= enough and len(np.unique(kept)) > parameters and np.ptp(kept) >= 0.5:
        what = "the largest decade" + ("" if single else " of " + " x ".join(points.x_names))
        return Split(held, what, 10**edge if single else None)
    values = np.unique(size)
    for share in (0.25, 0.1):
        edge = values[min(int(len(values) * (1 - share)), len(values) - 1)]
        held = size >= edge
        left = size[~held]
        if held.any() and len(left) >= enough and len(np.unique(left)) > parameters:
            return Split(
                held, f"the largest {'quarter' if share == 0.25 else 'tenth'} of sizes", 10**edge if single else None
            )
    return None


def thinned(points: Points) -> Points:
    """At most 2,000 of the points, drawn at random: enough to judge a hold-out."""
    if len(points) <= _MOST:
        return points
    keep = np.zeros(len(points), bool)
    keep[np.random.default_rng(0).choice(len(points), _MOST, replace=False)] = True
    return points.take(keep)


class HeldOut(NamedTuple):
    """Held-out points: log y - log prediction (m,), ends (2, m) of their intervals as errors of the same kind, and the
    scatter of the fitted points."""

    errors: np.ndarray
    ends: np.ndarray
    scatter: float

    @property
    def inside(self) -> np.ndarray:
        """Which points (m,) lie in their intervals."""
        return (self.errors >= self.ends[0] - 1e-9) & (self.errors <= self.ends[1] + 1e-9)


def held_out_points(points: Points, form: str, split: Split, options: Options) -> HeldOut:
    """Fit the points that are kept and predict those that are held out."""
    kept, held = points.take(~split.held), points.take(split.held)
    problem = Problem.of(kept, form, options)
    best = fit_problem(problem, options)
    log_y = np.log(held.y) - math.log(problem.scale)
    centred = np.log(held.x) - problem.centre[:, None]
    errors = log_y - np.log(np.maximum(problem.form.evaluate(best.inner[None], centred)[0], 5e-324))
    samples, _ = bootstrap(problem, best, options._replace(bootstraps=_BOOTSTRAPS))
    with np.errstate(all="ignore"):
        logs = np.log(np.maximum(problem.form.value(samples, np.log(held.x)), 5e-324))
    widen = math.sqrt(len(kept) / max(len(kept) - problem.form.size, 1))
    residual = np.quantile(problem.residual(best.inner), np.linspace(0, 1, 101)) * widen
    ends = np.empty((2, len(held)))
    level = 0.5 - options.level / 2, 0.5 + options.level / 2
    predicted = np.log(held.y) - errors
    for at in range(0, len(held), 64):
        part = slice(at, at + 64)
        ends[:, part] = np.quantile(with_noise(logs[:, part], residual), level, axis=0) - predicted[part]
    return HeldOut(errors, ends, float(problem.residual(best.inner).std() * widen))


def hold_out(points: Points, form: str, options: Options) -> dict[str, Any] | None:
    """Fit without the largest points and predict them: the ``holdout`` of a law; None where too few are left."""
    if form == "hull" or options.loss == "quantile":
        return None  # an envelope does not predict a point
    points = thinned(points)
    made = make_form(form, points.x_names)
    split = split_largest(points, made.size)
    if split is None:
        return None
    try:
        refuse_unfit(points.take(~split.held), form)
        found = held_out_points(points, form, split, options)
    except UserError:
        return None
    return {
        "points": len(found.errors), "fitted": int((~split.held).sum()), "what": split.what,
        "from": None if split.start is None else {points.x_names[0]: split.start},
        "error": float(np.sqrt((found.errors**2).mean())), "bias": float(found.errors.mean()),
        "inside": float(found.inside.mean()), "level": options.level,
    }  # fmt: skip


def candidates(points: Points) -> list[str]:
    """Forms that these columns may have, the simplest first."""
    count = len(points.x)
    if count == 1:
        return ["power", "power_floor", "broken"]
    if count == 2:
        usual = zip(points.x_names, X_NAMES["upcycling"], strict=True)
        upcycling = all(any(find_column([name], one) for one in options) for name, options in usual)
        return ["upcycling", "additive"] if upcycling else ["kaplan", "additive", "joint"]
    return ["test_time"]


def choose_form(points: Points, options: Options) -> tuple[str, list[dict[str, Any]], str]:
    """The simplest form that predicts held-out points as well as the best one.

    As well: its squared error is larger by less than two standard errors of the difference, or its error is no more
    than 1.2 times the scatter of the fitted points.

    Returns:
        its name, the errors of all forms, and how it was chosen.

    Raises:
        UserError: no form has enough points.
    """
    names = candidates(points)
    refuse_unfit(points, names[0])
    if options.loss == "quantile":  # an envelope lies below the points: forms are compared by what they say of the mean
        options = options._replace(loss="huber", delta=None)
    if len(names) == 1:
        return names[0], [], "the only form for so many columns"
    if np.ptp(np.log(points.y)) < 1e-12:
        return names[0], [], "the simplest form: all errors are equal"
    thin = thinned(points)
    sizes = {name: make_form(name, points.x_names).size for name in names}
    usable = [name for name in names if len(points) >= 3 * sizes[name]] or names[:1]
    split = split_largest(thin, max(sizes[name] for name in usable))
    while split is None and len(usable) > 1:
        usable = usable[:-1]
        split = split_largest(thin, max(sizes[name] for name in usable))
    if split is None or len(usable) == 1:
        return usable[0], [], "the simplest form: too few points to compare forms on held-out ones"
    errors, scatter = {}, {}
    for name in usable:
        try:
            refuse_unfit(thin.take(~split.held), name)
            errors[name], _, scatter[name] = held_out_points(thin, name, split, options)
        except UserError:
            continue
    if not errors:
        return usable[0], [], "the simplest form: too few points to compare forms on held-out ones"
    means = {name: float(np.sqrt((error**2).mean())) for name, error in errors.items()}
    best = min(means, key=lambda name: means[name])
    chosen = next(
        name
        for name in sorted(errors, key=lambda name: (sizes[name], means[name]))
        if name == best or means[name] <= _NOISE * scatter[best] or _close(errors[name], errors[best])
    )
    rows = [{"form": name, "parameters": sizes[name], "error": means[name]} for name in errors]
    how = f"error on {split.what}, held out" + ("" if chosen == best else f"; simpler than {best}, and as good")
    return chosen, rows, how


def _close(error: np.ndarray, best: np.ndarray) -> bool:
    """Whether squared errors exceed the best form's by less than two standard errors of the difference."""
    change = error**2 - best**2
    return bool(change.mean() <= 2 * change.std(ddof=1) / math.sqrt(len(change))) if len(change) > 1 else False
