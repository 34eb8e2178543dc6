"""A law as text for people: parameters with intervals, hold-out, certificate, warnings."""

from collections.abc import Sequence
from typing import Any

from scaling_perception.scaling.laws import EXTRAPOLATE, Law, decades_beyond, predict, predict_interval


def number(value: float | None) -> str:
    """Four significant digits; an end that the data do not set is ``open``."""
    return "open" if value is None else f"{value + 0.0:.4g}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows]  # fmt: skip


def _interval(ends: Any) -> str:
    return "" if ends is None else f"[{number(ends[0])}, {number(ends[1])}]"


def law_text(law: Law) -> str:
    """Everything about a law that a reader needs, as lines."""
    level = f"{100 * law.level:g} %"
    ranges = ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in law.range.items())
    lines = [f"{law.equation}   (y = {law.y})", f"{law.points} points: {ranges}"]
    if law.group:
        lines.append(f"{law.clusters} clusters ({' > '.join(law.group)})")
    every = ("corrected", "bootstrap", "bca", "profile")
    kinds = [kind for kind in every if any(p.get(kind) for p in law.parameters.values())]
    rows = [["", "value", f"{level} interval", *kinds]]
    for name, one in law.parameters.items():
        by = "" if len({p["by"] for p in law.parameters.values()}) == 1 else f" {one['by']}"
        rows.append([name, number(one["value"]), _interval(one["interval"]) + by, *(_interval(one[k]) for k in kinds)])
    shown = {p["by"] for p in law.parameters.values()}
    if len(shown) == 1:
        rows[0][2] += f" ({next(iter(shown))})"
    lines += ["", *_table(rows), ""]
    lines.append(f"scatter about the law: {100 * law.noise['log_sd']:.2g} % (log standard deviation)")
    loss = law.loss
    how = {
        "huber": f"Huber, delta {number(loss['delta'])}",
        "lsq": "least squares",
        "hull": "iterated hull, least squares",
    }.get(loss["kind"])
    lines.append(f"loss: {how or 'quantile ' + number(loss['tau'])} on log error, mean {loss['value']:.4g}")
    if law.choice:
        lines.append(f"form chosen by {law.chosen_by}:")
        rows = [["", "parameters", "held-out error"]]
        for row in law.choice:
            name = row["form"] + (" *" if row["form"] == law.form else "")
            rows.append([name, str(row["parameters"]), f"{100 * row['error']:.2f} %"])
        lines += _table(rows)
    elif law.chosen_by != "named":
        lines.append(f"form: {law.chosen_by}")
    if law.holdout:
        held = law.holdout
        start = "".join(f", {name} from {value:.3g}" for name, value in (held["from"] or {}).items())
        lines.append(
            f"hold-out: {held['points']} points ({held['what']}{start}) predicted from the {held['fitted']} smaller: "
            f"error {100 * held['error']:.2g} %, mean {100 * held['bias']:+.2g} %; {100 * held['inside']:.0f} % inside "
            f"their {100 * held['level']:g} % intervals"
        )
    if law.form != "hull":
        proof = law.certificate
        bound = f"; at a bound: {', '.join(proof['at_bound'])}" if proof["at_bound"] else ""
        lines.append(
            f"certificate: gradient {proof['gradient']:.1e}, rank {proof['rank']} of {proof['parameters']}, condition "
            f"{proof['condition']:.3g}, {proof['agree']} of {proof['starts']} starts agree "
            f"(spread {proof['spread']:.1e}){bound}"
        )
    lines += [f"note: {note}" for note in law.notes]
    lines += [f"warning: {warning}" for warning in law.warnings]
    return "\n".join(lines)


def prediction_text(law: Law, row: Sequence[float]) -> str:
    """One line: the prediction at x, intervals of the law and of a new run, and a warning far outside the data."""
    x = {name: value for name, value in zip(law.x, row, strict=True)}
    value = float(predict(law, x)[0])
    inner, outer = (predict_interval(law, x, noise=noise)[:, 0] for noise in (False, True))
    at = ", ".join(f"{name} = {number(v)}" for name, v in x.items())
    line = f"at {at}: {law.y} = {number(value)}, law {_interval(inner.tolist())}, a new run {_interval(outer.tolist())}"
    beyond = float(decades_beyond(law, x)[0])
    if beyond > EXTRAPOLATE:
        line += f"\nwarning: {beyond:.1f} decades beyond the data: over {EXTRAPOLATE:g} no interval can be trusted"
    elif beyond > 0.01:
        line += f" ({beyond:.1f} decades beyond the data)"
    return line
