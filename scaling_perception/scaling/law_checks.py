"""What points cannot decide (refused), what a fit is worth (its certificate), what to be careful about (warnings)."""

import math
from typing import Any

import numpy as np

from scaling_perception.scaling.law_fit import Problem
from scaling_perception.scaling.law_forms import make_form
from scaling_perception.scaling.law_solver import Best, jacobian
from scaling_perception.scaling.points import Points
from scaling_perception.support.errors import UserError

_AGREE = 1e-4  # relative difference of losses up to which two starts have reached the same fit
_CONDITION = 1e8


def refuse_unfit(points: Points, form: str) -> None:
    """Refuse points that cannot decide a law of this form.

    Raises:
        UserError: too few points or distinct x, a column with one value, or equal errors under a floor.
    """
    made = make_form(form, points.x_names)
    needed = made.size + 1
    if len(points) < needed:
        simpler = "" if made.size <= 2 else ", or choose --form power" if len(points.x) == 1 else ""
        raise UserError(
            f"{len(points)} point{'s' * (len(points) > 1)} for the {made.size} parameters of {form}: a law passes "
            f"through any {made.size}; give at least {needed}, better {3 * made.size}{simpler}"
        )
    for name, row in zip(points.x_names, points.x, strict=True):
        if len(np.unique(row)) == 1:
            what = "no law can be seen" if len(points.x) == 1 else "its term cannot be told from the floor"
            raise UserError(
                f"{name} is {row[0]:g} in all {len(points)} points: {what}; "
                + ("add other sizes" if len(points.x) == 1 else "leave it out of --x or add other values")
            )
    distinct = len(np.unique(points.x[0]) if len(points.x) == 1 else np.unique(points.x, axis=1).T)
    if distinct < made.size:
        raise UserError(
            f"{distinct} different values of {', '.join(points.x_names)} for the {made.size} parameters of {form}: "
            "they cannot be told apart; add other values or choose a form with fewer parameters"
        )
    if made.size > 2 and np.ptp(np.log(points.y)) < 1e-12:
        raise UserError(
            f"all {len(points)} values of {points.y_name} are {points.y[0]:g}: the parameters of {form} cannot be told "
            "apart; use --form power, or check the column"
        )


def certificate(problem: Problem, best: Best) -> dict[str, Any]:
    """How good the optimum is.

    ``gradient``: the largest derivative of the mean loss by a parameter in units of its column of the Jacobian, over
    what one point of typical error contributes (free parameters alone); ``rank`` and ``condition`` of the scaled
    Jacobian; ``at_bound``; ``starts`` tried, how many ``agree`` with the best loss, and the ``spread``: the largest
    relative difference of a parameter between those.
    """
    form = problem.form
    log_f, jac = jacobian(form, best.inner[None], problem.lx)
    residual, jac = problem.ly - log_f[0], jac[0]
    lower, upper = form.bounds()
    held = (best.inner <= lower + 1e-12) | (best.inner >= upper - 1e-9)
    norms = np.sqrt((jac**2).sum(1))
    unit = jac / np.maximum(norms, 1e-300)[:, None]
    pull = problem.loss.weights(residual) * residual
    free = ~held & (norms > 0)
    typical = math.sqrt(float((pull**2).sum()))
    gradient = float(np.abs(unit[free] @ pull).max()) / typical if free.any() and typical > 1e-14 else 0.0
    singular = np.linalg.svd(unit, compute_uv=False)
    rank = int((singular > 1e-9 * singular[0]).sum())
    agree = best.losses <= min(best.loss, best.losses[0]) * (1 + _AGREE) + 1e-20  # a subset's, of very many points
    same = best.reached[agree]
    spread = float((np.abs(same - same[0]) / (np.abs(best.inner) + 1e-3)).max()) if len(same) else math.inf
    at_bound = [name for name, one in zip(form.inner, held, strict=True) if one]
    return {
        "gradient": gradient, "rank": rank, "parameters": form.size,
        "condition": float(singular[0] / singular[-1]) if singular[-1] > 0 else math.inf,
        "at_bound": at_bound, "starts": len(best.losses), "agree": int(agree.sum()), "spread": spread,
    }  # fmt: skip


def law_warnings(law: Any, points: Points, problem: Problem, inner: np.ndarray) -> list[str]:
    """Everything about a law that its reader must know, a sentence each."""
    form, proof, out = problem.form, law.certificate, []
    mean = law.form != "hull"  # the hull is a procedure: it has no optimum and predicts no point
    if np.ptp(np.log(points.y)) < 1e-12:
        out.append(
            f"all values of {points.y_name} are equal: nothing scales, and the interval says nothing about noise"
        )
    if len(points) < 3 * form.size:
        out.append(
            f"{len(points)} points for {form.size} parameters: fewer than three a parameter; intervals are rough"
        )
    if points.group_names and law.clusters < 10:
        out.append(f"{law.clusters} clusters ({points.group_names[0]}): intervals that resample so few are rough")
    if points.one_size:
        out.append(f"all points are of one size ({points.one_size}): the law holds for that size alone")
    for name, row in zip(points.x_names, points.x, strict=True):
        decades = math.log10(row.max() / row.min())
        if decades < 1:
            out.append(f"{name} spans {decades:.2f} decades: an exponent from less than one decade is fragile")
    for name in proof["at_bound"]:
        if name in form.terms:
            out.append(f"{name} is zero: the data show no such term" + (" (no floor)" if name == "E" else ""))
        else:
            out.append(f"{name} is at its bound: the best value lies outside, or the data do not decide it")
    for name in form.exponents:
        low, high = law.parameters[name]["interval"]
        if low is not None and high is not None and low <= 1e-3 and high >= -1e-3:
            out.append(
                f"the {100 * law.level:g} % interval of {name}, {low:.3g} to {high:.3g}, holds zero: the data do not "
                "show that it matters"
            )
    if form.floor and "E" not in proof["at_bound"] and law.parameters["E"]["interval"][0] <= 1e-3 * points.y.min():
        out.append(
            "the interval of the floor E reaches zero: the data do not show a floor, and without one errors fall on"
        )
    if proof["rank"] < form.size or proof["condition"] > _CONDITION:
        out.append(
            f"the Jacobian has rank {proof['rank']} of {form.size} and condition {proof['condition']:.1e}: parameters "
            "compensate for each other; trust predictions inside the data, not single parameters"
        )
    if mean and proof["gradient"] > 1e-2:
        out.append(f"the optimum is not sharp (gradient {proof['gradient']:.1e}): treat the last digits with care")
    if mean and (proof["agree"] < 2 or proof["spread"] > 0.05):
        out.append(
            f"{proof['agree']} of {proof['starts']} starts reached the best fit, and their parameters differ by "
            f"{100 * proof['spread']:.2g} %: other optima are near"
        )
    found = law.holdout
    if found and found["inside"] < 0.8 * found["level"] and found["points"] >= 5:
        out.append(
            f"only {100 * found['inside']:.0f} % of the held-out points lie in their {100 * found['level']:g} % "
            "intervals: the form does not extrapolate as well as its intervals say"
        )
    if found is None and mean and law.loss["kind"] != "quantile":
        out.append("too few points to hold any out: how well the law extrapolates is not measured")
    if law.loss["tau"] == 0.5 and len(points) > 4 * form.size and mean:
        r = np.abs(problem.residual(inner))
        typical = 1.4826 * float(np.median(r))
        far = int((r > 6 * typical).sum()) if typical > 1e-9 else 0
        if far:
            out.append(
                f"{far} point{'s' * (far > 1)} more than six standard deviations from the law: see the residuals"
            )
    return out
