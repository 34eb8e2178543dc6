"""The best choice under a budget, by fitted laws: what to train, and how to run it.

Every option is a point of a grid: size and resolution, denoising steps, members, and the split of the training where
there are two. What the options before it leave of the budget is trained with (the law falls with more). Cost is

    3 x forward MACs of the training  +  images to serve x passes x steps x members x forward MACs

in the budget's unit. The option of lowest predicted error within all limits is the choice (``support.choosing``,
the rule of `predict --budget`). Everything uncertain about it comes from the laws' bootstrapped parameters: each set
predicts the choice, its rival and its own best option.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from scaling_perception.models.compute import TRAINING_FACTOR
from scaling_perception.scaling.plan_laws import SERVING, TRAINING, Laws, check_range, refuse_undecided
from scaling_perception.scaling.plan_next import next_run
from scaling_perception.scaling.plan_sizes import Size, Speed, first_that_fits, rates, seconds, stage_macs
from scaling_perception.support import choosing
from scaling_perception.support.errors import UserError

STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 65, 80, 100, 125, 150, 200, 250, 350, 500, 700, 1000)
MEMBERS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50)
_COARSE, _FINE = 160, 160
_APART = 1.5  # by what factor of a quantity a rival differs at least
_MORE = 0.1  # the share of the choice's cost that a unit of compute is
_CELLS = 4_000_000  # numbers predicted at a time

Values = dict[str, np.ndarray]


@dataclass
class Question:
    """What is asked.

    ``budget`` in ``unit`` (``plan_sizes.UNITS``) for everything; ``images`` to serve (None: not said); ``steps``,
    ``members`` allowed (None: those near the law's data); ``sizes`` (None: any, where a law of params and tokens alone
    allows it); ``batch`` samples of a training step; ``item_macs``: of an item of the two trainings of a law of D1 x
    D2; ``limits`` by ``macs`` and ``seconds`` of one prediction, ``samples`` of the training.
    """

    budget: float
    unit: str = "macs"
    images: float | None = None
    passes: int = 1
    steps: tuple[int, ...] | None = None
    members: tuple[int, ...] | None = None
    sizes: list[Size] | None = None
    batch: int = 256
    item_macs: tuple[float, float] | None = None
    limits: dict[str, float] = field(default_factory=dict)
    samples: float | None = None
    speed: Speed = Speed()
    next_share: float = 0.1


class Options(NamedTuple):
    """All options: quantities (n,), costs in MACs and in the budget's unit, ``size`` the index of each."""

    values: Values
    sizes: list[Size]
    train: np.ndarray  # MACs, both passes
    serve: np.ndarray  # MACs of all images
    cost: np.ndarray  # of all, in the budget's unit
    per_image: np.ndarray
    seconds: np.ndarray
    train_rate: np.ndarray  # MACs a unit of the budget
    serve_rate: np.ndarray


def plan(laws: Laws, question: Question) -> dict[str, Any]:
    """The choice and what is known about it, JSON-able: see docs/plan.md for the fields.

    Raises:
        UserError: the laws do not support the question, or nothing is affordable.
    """
    q = _checked(laws, question)
    options = _options(laws, q)
    errors = laws.log_error(options.values)[0]
    order = choosing.ranked(errors, *_limits(options, q))
    if not len(order):
        raise UserError(_nothing(options, q))
    if q.sizes is None and "params" in options.values:
        options = _options(laws, q, float(options.values["params"][order[0]]))
        errors = laws.log_error(options.values)[0]
        order = choosing.ranked(errors, *_limits(options, q))
    at = options.values["size"].astype(int)
    best, memory = first_that_fits(order.tolist(), options.sizes, lambda i: int(at[i]), q.speed)
    if best is None:
        raise UserError(f"no size fits the memory of a chip: {'; '.join(f'{k}: {v}' for k, v in memory.items())}")
    unfit = {name for name, text in memory.items() if "not fit" in text}
    order = np.array(
        [i for i in order if f"{options.sizes[at[i]].name} at {options.sizes[at[i]].resolution}" not in unfit]
    )
    choice = {name: row[[best]] for name, row in options.values.items()}
    free = [name for name in laws.quantities if _varies(options.values, name)]
    spent = [name for name in laws.quantities if name in (*TRAINING, "serving")]
    refuse_undecided(laws, [*free, *spent])
    warnings = check_range(laws, choice)
    answer: dict[str, Any] = {"budget": q.budget, "choice": _row(laws, options, best, q), "free": free}
    answer["choice"] |= _intervals(laws, options, order, best)
    answer["runner_up"] = _rival(laws, options, order, best, free, q)
    answer["worth"] = _worth(laws, options, best)
    answer["next_run"] = next_run(laws, options, choice, q)
    answer["rests_on"] = _rests_on(options, best, q, memory)
    answer["warnings"] = [
        *warnings, *_edges(laws, options, order, best, q),
        *(f"{law.y} law: {text}" for law in laws.laws for text in law.warnings),
    ]  # fmt: skip
    answer["notes"] = list(laws.notes)
    return answer


def compare(plans: Mapping[str, tuple[Laws, dict[str, Any]]]) -> tuple[str, list[dict[str, Any]]]:
    """The plan of the lowest predicted error among plans by laws of different things, such as grids of timesteps, and
    how far above it the others lie. Parameter sets of different laws are unrelated: each is paired with each."""
    names = list(plans)
    choices = [answer["choice"] for _, answer in plans.values()]
    order = choosing.ranked([c["error"] for c in choices], {"cost": [c["cost"] for c in choices]}, {})
    drawn = []
    for laws, answer in plans.values():
        values = {name: np.array([answer["choice"][name]]) for name in laws.quantities}
        drawn.append(laws.log_error(values, sampled=True)[:, 0])
    best = int(order[0])
    others = []
    for at in order[1:].tolist():
        excess = (drawn[at][:, None] - drawn[best][None]).ravel()
        ends = _ends(np.exp(excess) - 1, choices[best]["level"])
        known = {"name": names[at], "error": choices[at]["error"], "excess": ends}
        known |= {"choice_better": float((excess > 0).mean()), "told_apart": choosing.told_apart(ends)}
        others.append(known)
    return names[best], others


def _checked(laws: Laws, q: Question) -> Question:
    """The question with what the laws leave open, or a refusal of what they cannot answer."""
    held = laws.quantities
    columns = ", ".join(c.name for row in laws.columns for c in row)
    trains, serves = any(k in held for k in TRAINING), any(k in held for k in SERVING)
    if not trains and not serves:
        raise UserError(f"the law of {columns} holds neither training nor inference: a budget buys none of it")
    sizes = q.sizes or []
    for what, quantity, several in (
        ("size", "params", len({s.name for s in sizes}) > 1),
        ("resolution", "resolution", len({s.resolution for s in sizes}) > 1),
        ("number of steps", "steps", len(q.steps or ()) > 1),
        ("number of members", "members", len(q.members or ()) > 1),
    ):
        if several and quantity not in held:
            raise UserError(
                f"the law holds {columns} and no {quantity}: the {what} cannot be chosen by it; give one, or fit a law "
                f"whose points differ in {quantity} too"
            )
    if any(s.dit is not None and s.dit.experts for s in sizes) and len(sizes) > 1:
        names = [c.name for row in laws.columns for c in row if c.quantity == "params"]
        if names and names[0] != "active_params":
            raise UserError(
                f"the law's {names[0]} does not tell experts from dense networks: fit one over active_params, or give "
                "dense sizes alone"
            )
    single = next((w for law in laws.laws for w in law.warnings if w.startswith("all points are of one size")), None)
    if single and len(sizes) != 1:
        raise UserError(f"{single}: no size can be chosen; name that size by --sizes")
    needs = [k for k in held if k in ("params", "samples", "steps", "members", "resolution")]
    if not sizes and needs and not ("tokens" in held and needs == ["params"]):
        raise UserError(f"the law's {needs[0]} costs what the network costs: give --sizes, such as --sizes a1,a2,a3")
    if {"first", "second"} & set(held) and q.item_macs is None:
        if len(sizes) != 1:
            raise UserError(
                "what an item of the two trainings costs is not known: give one of --sizes, or --item-macs FIRST,SECOND"
            )
        names = {c.quantity: c.name.lower() for row in laws.columns for c in row}
        each = [
            macs / (sizes[0].tokens if "token" in names.get(k, "") else 1)
            for k, macs in zip(("first", "second"), stage_macs(sizes[0]), strict=True)
        ]
        q = replace(q, item_macs=(each[0], each[1]))
    if trains and ("steps" in held or "members" in held) and not q.images:
        raise UserError(
            "the law holds training and inference: how they share the budget depends on the images to serve; give "
            "--images"
        )
    open_ = [k for k, given in (("steps", q.steps), ("members", q.members)) if k not in held and not given]
    if (
        open_
        and "serving" not in held
        and (q.images or (serves and not trains) or {"macs", "seconds"} & q.limits.keys())
    ):
        raise UserError(
            f"the law holds {columns} and no {open_[0]}, which predictions cost as well: give --{open_[0]}, such as "
            f"--{open_[0]} {10 if open_[0] == 'steps' else 1}"
        )
    if trains and q.images and not sizes:
        raise UserError("serving images costs what the network costs: give --sizes")
    return q


def _grid(laws: Laws, quantity: str, allowed: tuple[int, ...] | None, usual: tuple[int, ...]) -> np.ndarray:
    """Values to choose among: those allowed, or the usual ones within the law's data."""
    if allowed:
        return np.array(allowed, float)
    for law, row in zip(laws.laws, laws.columns, strict=True):
        for column in row:
            if column.quantity == quantity:
                low, high = law.range[column.name]
                found = [v for v in usual if low * 0.999 <= v <= high * 1.001]
                return np.array(sorted({*found, max(round(low), 1), max(round(high), 1)}), float)
    return np.ones(1)


def _options(laws: Laws, q: Question, near: float | None = None) -> Options:
    held = laws.quantities
    sizes = list(q.sizes or [])
    if not sizes and "params" in held:
        sizes = [Size("", n, n) for n in _params(laws, near)]
    sizes = sizes or [Size("", math.nan, math.nan)]
    steps, members = _grid(laws, "steps", q.steps, STEPS), _grid(laws, "members", q.members, MEMBERS)
    two = [k for k in held if k in ("first", "second", "first_macs", "second_macs")]
    shares = _shares() if len(two) > 1 else np.ones(1)
    broken = any(law.form == "broken" for law in laws.laws)  # before the break more compute may be worse
    parts = np.geomspace(1e-3, 1.0, 121) if broken or len(two) > 1 else np.ones(1)
    mesh = np.meshgrid(np.arange(len(sizes)), steps, members, shares, parts, indexing="ij")
    at = mesh[0].ravel().astype(int)
    t, m, share, part = (row.ravel() for row in mesh[1:])
    each = max(q.batch // q.speed.chips, 1)
    found = [[rates(q.unit, q.speed, s, each, int(k)) for k in members] for s in sizes]
    place = np.searchsorted(members, m) if len(members) > 1 else np.zeros(len(m), int)
    train_rate, serve_rate = (np.array([[pair[i] for pair in row] for row in found], float)[at, place] for i in (0, 1))
    forward = np.array([s.macs for s in sizes])[at]
    per_image = forward * t * m * q.passes
    values: Values = {"size": at.astype(float), "steps": t, "members": m, "forward": forward}
    values["params"] = np.array([s.params for s in sizes])[at]
    values["resolution"] = np.array([float(s.resolution or 1) for s in sizes])[at]
    train = any(k in held for k in TRAINING)
    images = (q.images or 0.0) if train else (q.images or 1.0)
    if "serving" in held and not train:  # the law says what a prediction's MACs do, however they are spent
        most = np.full_like(t, q.budget / images) * serve_rate * part
        if q.steps and q.sizes and not q.members:
            values["members"] = m = np.maximum(np.floor(most / (forward * t * q.passes)), 1)
        if q.members and q.sizes and not q.steps:
            values["steps"] = t = np.clip(np.floor(most / (forward * m * q.passes)), 1, 1000)
        per_image = forward * t * m * q.passes if q.sizes and (q.steps or q.members) else most
        values["serving"] = per_image
    serve = images * np.where(np.isnan(per_image), 0.0, per_image)
    left = (q.budget - serve / serve_rate) * train_rate * part
    spent = np.maximum(left, 0.0) if train else np.zeros_like(t)
    ok = np.where(left > 0, spent, np.nan) if train else spent
    if q.samples is not None:
        ok = np.minimum(ok, TRAINING_FACTOR * forward * q.samples)
    forward_spent = ok / TRAINING_FACTOR
    if train:
        values["training"] = forward_spent
        values["samples"] = forward_spent / forward
        values["tokens"] = values["samples"] * np.array([s.tokens for s in sizes])[at]
        for name, own in zip(("first", "second"), (share, 1 - share), strict=True):
            values[f"{name}_macs"] = forward_spent * own
            each = (q.item_macs or (1.0, 1.0))[name == "second"]
            values[name] = forward_spent * own / each
    if "serving" in held and train:
        values["serving"] = per_image
    latency = np.full_like(t, np.nan)
    if "seconds" in q.limits or q.speed.chip is not None or q.speed.per_mac is not None:
        table = {
            (i, int(k)): seconds(q.speed, s, int(k))[0]
            for i, s in enumerate(sizes) if not math.isnan(s.macs) for k in members
        }  # fmt: skip
        latency = np.array([table.get((int(i), int(k)), math.nan) for i, k in zip(at, m, strict=True)]) * t * q.passes
    return Options(
        values, sizes, ok, serve, serve / serve_rate + ok / train_rate, per_image, latency, train_rate, serve_rate
    )


def _shares() -> np.ndarray:
    """Shares of the first of two trainings: fine near both ends."""
    near = np.geomspace(1e-3, 0.1, 21)
    return np.concatenate([near, np.linspace(0.11, 0.89, 40), 1 - near[::-1]])


def _params(laws: Laws, near: float | None) -> np.ndarray:
    """Numbers of parameters to choose among, where any will do: wide, and narrow about ``near``."""
    low, high = next(
        law.range[c.name]
        for law, row in zip(laws.laws, laws.columns, strict=True)
        for c in row
        if c.quantity == "params"
    )  # fmt: skip
    wide = np.geomspace(low * 1e-4, high * 1e4, _COARSE)
    return wide if near is None else np.union1d(wide, near * np.geomspace(1 / 3, 3, _FINE + 1))


def _limits(options: Options, q: Question) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    costs = {"cost": options.cost, "macs": options.per_image, "seconds": options.seconds}
    return costs, {"cost": q.budget * (1 + 1e-9), **q.limits}


def _nothing(options: Options, q: Question) -> str:
    """Why no option is affordable: the cheapest one."""
    train = np.isnan(options.train)
    cheapest = float(np.nanmin(np.where(train, options.serve / options.serve_rate, options.cost)))
    limits = "".join(f", at most {most:.3g} {name} a prediction" for name, most in q.limits.items())
    if cheapest > q.budget or train.all():
        return f"a budget of {q.budget:.3g} {q.unit} buys nothing: the cheapest option takes {cheapest:.3g}{limits}"
    if np.isnan(options.per_image).all():
        return f"no option is within the limits{limits}, and what a prediction costs is not known: give --sizes"
    least = options.values
    fast = "" if np.isnan(options.seconds).all() else f" and {np.nanmin(options.seconds):.3g} s"
    return (
        f"no option is within the limits{limits}: the cheapest prediction takes {np.nanmin(options.per_image):.3g} "
        f"MACs{fast} ({least['steps'].min():g} step(s), {least['members'].min():g} member(s))"
    )


def _varies(values: Mapping[str, np.ndarray], name: str) -> bool:
    return name in values and name not in (*TRAINING, "serving") and len(np.unique(values[name])) > 1


def _row(laws: Laws, options: Options, at: int, q: Question) -> dict[str, Any]:
    """One option as JSON values."""
    size = options.sizes[int(options.values["size"][at])]
    held = laws.quantities
    out: dict[str, Any] = {"size": size.name or None}
    shown = [k for k in ("params", "resolution", "steps", "members", *TRAINING, "serving") if k in held]
    if size.name:
        out["resolution"] = size.resolution or None
    for name in shown:
        out[name] = float(options.values[name][at])
    for name, given in (("steps", q.steps), ("members", q.members)):
        if given or ("serving" in held and (q.steps or q.members)):
            out.setdefault(name, float(options.values[name][at]))
    known = "serving" in held or {"steps", "members"} <= out.keys()
    trains = any(k in held for k in TRAINING)
    if size.dit is not None and {"first", "second", "first_macs", "second_macs"} & set(held):
        spent = (float(options.values[f"{name}_macs"][at]) for name in ("first", "second"))
        out["stage_samples"] = [s / each for s, each in zip(spent, stage_macs(size), strict=True)]
    elif size.dit is not None and trains:
        out["samples"] = float(options.values["samples"][at])
        out["training_steps"] = max(int(out["samples"] // q.batch), 1)
    out["training_macs"] = float(options.train[at]) if trains else None
    out["serving_macs"] = float(options.serve[at]) if options.serve[at] > 0 else None
    out["macs_per_image"] = float(options.per_image[at]) if options.serve[at] > 0 else None
    out["seconds_per_image"] = float(options.seconds[at]) if known and not math.isnan(options.seconds[at]) else None
    out["cost"], out["unit"] = float(options.cost[at]), q.unit
    out["error"] = float(np.exp(laws.log_error({k: v[[at]] for k, v in options.values.items()})[0, 0]))
    return out


def _take(values: Mapping[str, np.ndarray], which: Sequence[int] | np.ndarray) -> Values:
    return {name: row[np.asarray(which, int)] for name, row in values.items()}


def _ends(values: np.ndarray, level: float) -> list[float]:
    return [float(v) for v in np.quantile(values, [0.5 - level / 2, 0.5 + level / 2])]


def _intervals(laws: Laws, options: Options, order: np.ndarray, best: int) -> dict[str, Any]:
    """Of the choice's error; and of each quantity: where the parameter sets have their own best options."""
    level = laws.laws[0].level
    own = np.exp(laws.log_error(_take(options.values, [best]), sampled=True)[:, 0])
    draws = laws.draws
    winner, lowest = np.zeros(draws, int), np.full(draws, np.inf)
    for begin in range(0, len(order), max(_CELLS // draws, 1)):
        part = order[begin : begin + max(_CELLS // draws, 1)]
        errors = laws.log_error(_take(options.values, part), sampled=True)
        errors = np.where(np.isnan(errors), np.inf, errors)
        at = errors.argmin(1)
        here = errors[np.arange(draws), at]
        better = here < lowest
        winner[better], lowest[better] = part[at[better]], here[better]
    names = [k for k in laws.quantities if k in options.values and len(np.unique(options.values[k][order])) > 1]
    found: dict[str, Any] = {name: _ends(options.values[name][winner], level) for name in names}
    sizes = [options.sizes[int(i)].name for i in options.values["size"][winner]]
    if any(sizes):
        names_of = dict.fromkeys(s.name for s in options.sizes)
        found["size"] = {name: sizes.count(name) / draws for name in names_of if name in sizes}
    return {"error_interval": _ends(own, level), "level": level, "intervals": found}


def _rival(
    laws: Laws, options: Options, order: np.ndarray, best: int, free: Sequence[str], q: Question
) -> dict[str, Any] | None:
    """The best option that differs from the choice: another size, or another number by a factor of 1.5."""
    values = options.values
    differs = np.zeros(len(order), bool)
    names = [*free, *(k for k in ("first", "first_macs") if k in laws.quantities)]
    for name in names:
        ratio = np.abs(np.log(values[name][order] / values[name][best]))
        differs |= ratio > (1e-6 if name in ("params", "resolution") and q.sizes else math.log(_APART))
    if not differs.any():
        return None
    other = int(order[differs][0])
    errors = laws.log_error(_take(values, [best, other]), sampled=True)
    level = laws.laws[0].level
    excess = _ends(np.exp(errors[:, 1] - errors[:, 0]) - 1, level)
    return {
        **_row(laws, options, other, q), "excess": excess,
        "choice_better": float((errors[:, 1] > errors[:, 0]).mean()), "told_apart": choosing.told_apart(excess),
    }  # fmt: skip


def _worth(laws: Laws, options: Options, best: int) -> list[dict[str, Any]]:
    """By what the error changes when a tenth more MACs is spent in one direction alone."""
    values = _take(options.values, [best])
    held = laws.quantities
    train, serve = float(np.nan_to_num(options.train[best])), float(options.serve[best])
    extra = _MORE * (train + serve)
    out = []
    directions: dict[str, dict[str, float]] = {}
    if "params" in held:
        grown = 1 + _MORE
        moved = ("params", "forward", "training", "serving")
        directions["size"] = {name: grown for name in moved if name in values}
    if train > 0:
        first = 1 + extra / train
        for name in ("tokens", "samples", "training"):
            if name in held:
                directions["training"] = {name: first}
        for name in ("first", "second", "first_macs", "second_macs"):
            if name in held:
                share = _share_of(values, name)
                directions[name] = {name: 1 + extra / (train * share)}
    if serve > 0:
        for name in ("steps", "members", "serving"):
            if name in held:
                directions[name] = {name: 1 + extra / serve}
    base = laws.log_error(values, sampled=True)[:, 0]
    point = laws.log_error(values)[0, 0]
    for name, factors in directions.items():
        moved_to = {k: v * factors.get(k, 1.0) for k, v in values.items()}
        change = float(np.exp(laws.log_error(moved_to)[0, 0] - point) - 1)
        drawn = np.exp(laws.log_error(moved_to, sampled=True)[:, 0] - base) - 1
        out.append({"direction": name, "macs": extra, "change": change, "interval": _ends(drawn, laws.laws[0].level)})
    return sorted(out, key=lambda row: row["change"])


def _share_of(values: Values, name: str) -> float:
    first, second = float(values["first_macs"][0]), float(values["second_macs"][0])
    return (first if name.startswith("first") else second) / (first + second)


def _rests_on(options: Options, best: int, q: Question, memory: Mapping[str, str]) -> dict[str, Any]:
    """Where memory and speed are from."""
    size = options.sizes[int(options.values["size"][best])]
    members = int(options.values["members"][best])
    out: dict[str, Any] = {"memory": memory or None, "training_speed": None, "serving_speed": None}
    if q.unit in ("chip-hours", "usd"):
        out["training_speed"] = rates(q.unit, q.speed, size, q.batch, members)[2]
    if not math.isnan(options.seconds[best]):
        out["serving_speed"] = seconds(q.speed, size, members)[1]
    return out


def _edges(laws: Laws, options: Options, order: np.ndarray, best: int, q: Question) -> list[str]:
    """Where the choice is the end of what was allowed: a wider choice may be better."""
    out = []
    if options.cost[best] < 0.5 * q.budget and not q.limits and q.samples is None:
        out.append(
            f"{options.cost[best] / q.budget:.2g} of the budget is used: no better choice that the law holds costs more"
        )
    for name in ("params", "steps", "members"):
        if name not in laws.quantities or not _varies(options.values, name):
            continue
        every = options.values[name]
        value = every[best]
        if value == every.max() and (name != "params" or q.sizes):
            out.append(f"{name} is the largest that was allowed: more may be better")
        if name == "params" and value == every.min() and q.sizes:
            out.append("the smallest size that was allowed is chosen: a smaller one may be better")
    return out
