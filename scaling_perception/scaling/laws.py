"""Scaling laws: fit a form to points, with intervals, hold-out, a certificate and warnings; write, load and predict.

``law = fit_law(points, "power_floor")``; ``write_law(path, law)``; ``law = load_law(path)``; ``predict(law, x)``;
``predict_interval(law, x)``. Points come from ``scaling.points.read_points`` or are made directly: ``Points(x, y,
x_names, y_name)``.

The JSON of a law (``fit --json``), version 1::

    {"kind": "scaling-law", "version": 1,
     "form": "power_floor",              one of law_forms.FORMS
     "equation": "y = E + A / macs^alpha",
     "x": ["macs"], "y": "abs_rel",      columns; the units of x and y are those of the CSV
     "level": 0.95,
     "parameters": {"E": {"value": 0.1, "interval": [0.08, 0.12],     the recommended interval (its "by")
                          "by": "bca", "bootstrap": [..], "bca": [..], "profile": [..] or null}, ...},
                                          of a hull also "corrected": [..] and "corrected_value": see envelope.correct
     "samples": {"names": ["E", "A", "alpha"], "values": [[..], ..]},  bootstrapped parameter sets, up to 400
     "noise": {"log_sd": 0.01, "quantiles": [..101 quantiles of log y - log f, widened for fitted parameters..]},
     "range": {"macs": [1e9, 1e13], "abs_rel": [0.1, 0.4]}, "points": 40, "clusters": 8, "group": ["run"],
     "loss": {"kind": "huber", "delta": 0.01, "tau": 0.5, "value": mean over points},
     "certificate": {"gradient": .., "rank": 3, "condition": .., "at_bound": [..], "starts": 12, "agree": 12,
                     "spread": ..},
     "holdout": {"points": 10, "fitted": 30, "from": {"macs": ..} or null, "what": "the largest decade",
                 "error": rms of log error, "bias": .., "inside": 0.93, "level": 0.95} or null,
     "choice": [{"form": .., "parameters": 3, "error": rms of log error held out}, ..], "chosen_by": "..",
     "warnings": ["..", ..], "notes": ["..", ..],
     "source": [{"file": "points.csv", "sha256": ".."}], "software": "0.1.0"}

Ends of intervals are null where the data set none. Parameters are those of the equation.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scaling_perception import __version__
from scaling_perception.scaling.law_checks import certificate, law_warnings, refuse_unfit
from scaling_perception.scaling.law_choice import choose_form, hold_out
from scaling_perception.scaling.law_fit import Options, Problem, bootstrap, fit_problem, intervals, with_noise
from scaling_perception.scaling.law_forms import Form, make_form
from scaling_perception.scaling.points import Points
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import read_json, write_json

VERSION = 1
EXTRAPOLATE = 1.5
"""Decades beyond the data from which a prediction is warned about."""
_SAMPLES = 400


@dataclass
class Law:
    """A fitted law: what the JSON holds (see the module). ``samples`` is (B, P) in the order of ``parameters``."""

    form: str
    equation: str
    x: tuple[str, ...]
    y: str
    level: float
    parameters: dict[str, dict[str, Any]]
    samples: np.ndarray
    noise: dict[str, Any]
    range: dict[str, list[float]]
    points: int
    clusters: int
    group: tuple[str, ...]
    loss: dict[str, Any]
    certificate: dict[str, Any]
    holdout: dict[str, Any] | None = None
    choice: list[dict[str, Any]] = field(default_factory=list)
    chosen_by: str = ""
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    source: list[dict[str, str]] = field(default_factory=list)
    software: str = __version__

    @property
    def values(self) -> np.ndarray:
        """The published parameters (P,)."""
        return np.array([one["value"] for one in self.parameters.values()])

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        content = {"kind": "scaling-law", "version": VERSION, **asdict(self)}
        names = list(self.parameters)
        content["samples"] = {"names": names, "values": [[_short(v) for v in row] for row in self.samples.tolist()]}
        content["x"], content["group"] = list(self.x), list(self.group)
        return content


def _short(value: float) -> float:
    return float(f"{value:.9g}")


def fit_law(points: Points, form: str = "auto", options: Options | None = None) -> Law:
    """Fit a law.

    Args:
        form: a name of ``law_forms.FORMS``, or ``auto``: of the forms for this many columns the one with the smallest
            error on held-out points.

    Raises:
        UserError: the points cannot decide such a law.
    """
    options = options or Options()
    choice: list[dict[str, Any]] = []
    chosen_by = "named"
    if form == "auto":
        form, choice, chosen_by = choose_form(points, options)
    refuse_unfit(points, form)
    if form == "hull":
        from scaling_perception.scaling.envelope import correct, fit_hull

        problem, best, samples, jackknife, extra = fit_hull(points, options)
    else:
        problem = Problem.of(points, form, options)
        best = fit_problem(problem, options)
        samples, jackknife = bootstrap(problem, best, options)
        extra = []
    estimate = problem.published(best.inner[None])[0]
    parameters = intervals(problem, best, estimate, samples, jackknife, options)
    if form == "hull":
        extra += correct(parameters, points, options)
    residual = problem.residual(best.inner)
    widen = math.sqrt(len(points) / max(len(points) - problem.form.size, 1))
    quantiles = np.quantile(residual, np.linspace(0, 1, 101)) * widen
    delta = problem.loss.delta
    columns = zip((*points.x_names, points.y_name), (*points.x, points.y), strict=True)
    law = Law(
        form=form,
        equation=problem.form.equation,
        x=points.x_names,
        y=points.y_name,
        level=options.level,
        parameters={name: parameters[name] for name in problem.form.published},
        samples=samples[:_SAMPLES],
        noise={"log_sd": float(residual.std() * widen), "quantiles": [_short(q) for q in quantiles]},
        range={name: [float(row.min()), float(row.max())] for name, row in columns},
        points=len(points),
        clusters=len(np.unique(points.groups[0])),
        group=points.group_names,
        loss={
            "kind": "hull" if form == "hull" else options.loss,
            "delta": None if math.isinf(delta) else delta,
            "tau": problem.loss.tau,
            "value": best.loss / len(points),
        },
        certificate=certificate(problem, best),
        holdout=hold_out(points, form, options),
        choice=choice,
        chosen_by=chosen_by,
        notes=list(points.notes),
        source=points.source,
    )
    law.warnings = law_warnings(law, points, problem, best.inner) + extra
    return law


def write_law(path: str | Path, law: Law) -> None:
    """Write the JSON of a law, whole or not at all."""
    write_json(path, finite(law.to_dict()))


def finite(value: Any) -> Any:
    """JSON knows no infinity: null stands for it."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    if isinstance(value, (np.floating, np.integer)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_law(path: str | Path) -> Law:
    """Read a law written by ``write_law`` or `fit --json`.

    Raises:
        UserError: it is missing, no law, or of a later version.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("kind") != "scaling-law":
        raise UserError(f"{path} is no law: make one with `scaling-perception fit POINTS.csv --json {path}`")
    if content.get("version") != VERSION:
        raise UserError(
            f"{path} is a law of version {content.get('version')}, this program reads {VERSION}: fit the points again"
        )
    try:
        content = {name: value for name, value in content.items() if name not in ("kind", "version")}
        content["samples"] = np.array(content["samples"]["values"], float).reshape(-1, len(content["parameters"]))
        content["x"], content["group"] = tuple(content["x"]), tuple(content["group"])
        law = Law(**content)
        wrong = _wrong_field(law)
    except (AttributeError, KeyError, TypeError, ValueError, UserError):
        wrong = "a field is missing or of another kind"
    if wrong:
        raise UserError(f"{path} is not a whole law ({wrong}): fit the points again with `fit --json`")
    return law


def _wrong_field(law: Law) -> str:
    """The first field that no law has so, and what is wrong with it; empty: all can be used."""
    ends = [*(law.range[name] for name in law.x), *law.range.values()]
    known = {
        f"its parameters are not those of {law.form}": tuple(law.parameters) == law_form(law).published,
        "a parameter is no number": np.isfinite(law.values).all(),
        "a sample of the parameters is no number": np.isfinite(law.samples).all(),
        "level is not between 0 and 1": 0 < law.level < 1,
        "a range is not two rising numbers above zero": all(0 < low <= high < math.inf for low, high in ends),
        "noise is not finite": np.isfinite([law.noise["log_sd"], *law.noise["quantiles"]]).all(),
        "noise has no quantiles": isinstance(law.noise["quantiles"], list) and len(law.noise["quantiles"]) > 0,
        "an interval is not two ends": all(_is_interval(one["interval"]) for one in law.parameters.values()),
        "loss is no table": isinstance(law.loss, dict),
        "warnings, notes or source is no list": all(
            isinstance(found, list) and all(isinstance(one, kind) for one in found)
            for found, kind in ((law.warnings, str), (law.notes, str), (law.source, dict))
        ),
    }
    return next((what for what, good in known.items() if not good), "")


def _is_interval(ends: Any) -> bool:
    """Two numbers, or null for an end that is open."""
    return len(ends) == 2 and all(end is None or isinstance(end, (int, float)) for end in ends)


def law_form(law: Law) -> Form:
    """The form of a law, for ``value``."""
    return make_form(law.form, law.x)


def _log_x(law: Law, x: Mapping[str, Any] | np.ndarray | Sequence[float] | float) -> np.ndarray:
    if isinstance(x, Mapping):
        missing = [name for name in law.x if name not in x]
        if missing:
            raise UserError(f"the law needs {', '.join(law.x)}; {', '.join(missing)} is missing")
        rows = [np.asarray(x[name], float).reshape(-1) for name in law.x]
    else:
        rows = list(np.asarray(x, float).reshape(len(law.x), -1))
    stacked = np.stack(np.broadcast_arrays(*rows))
    if not (np.isfinite(stacked).all() and (stacked > 0).all()):
        raise UserError(f"the law needs {', '.join(law.x)} above zero")
    return np.log(stacked)


def predict(law: Law, x: Mapping[str, Any] | np.ndarray | Sequence[float] | float) -> np.ndarray:
    """The law's y (n,) at x: a mapping from each name of ``law.x`` to numbers, or an array (v, n).

    Raises:
        UserError: a variable is missing or not above zero.
    """
    return law_form(law).value(law.values[None], _log_x(law, x))[0]


def predict_samples(law: Law, x: Mapping[str, Any] | np.ndarray | Sequence[float] | float) -> np.ndarray:
    """y (B, n) at x for every bootstrapped parameter set: what the uncertainty of the parameters makes of it."""
    return law_form(law).value(law.samples, _log_x(law, x))


def predict_interval(
    law: Law,
    x: Mapping[str, Any] | np.ndarray | Sequence[float] | float,
    level: float | None = None,
    noise: bool = True,
) -> np.ndarray:
    """Ends (2, n) of the interval of y at x.

    Args:
        level: None: the law's own.
        noise: a new run's y, with the scatter of points about the law; False: the law itself.
    """
    level = law.level if level is None else level
    logs = np.log(np.maximum(predict_samples(law, x), 5e-324))
    if noise:
        logs = with_noise(logs, np.asarray(law.noise["quantiles"]))
    return np.exp(np.quantile(logs, [0.5 - level / 2, 0.5 + level / 2], axis=0))


def decades_beyond(law: Law, x: Mapping[str, Any] | np.ndarray | Sequence[float] | float) -> np.ndarray:
    """How many decades (n,) x lies outside the fitted range, the farthest variable's; 0 inside."""
    logs = _log_x(law, x) / math.log(10)
    low, high = (np.log10([law.range[name][end] for name in law.x])[:, None] for end in (0, 1))
    return np.maximum(np.maximum(logs - high, low - logs), 0.0).max(0)


def dump(law: Law) -> str:
    """The JSON text of a law."""
    return json.dumps(finite(law.to_dict()), indent=2, allow_nan=False)
