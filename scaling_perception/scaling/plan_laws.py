"""What a law says about a plan: which quantity each column is, predictions of several laws together, what is refused.

Quantities (``QUANTITIES``): ``params``; ``tokens`` or ``samples`` of the training; ``training``: forward MACs of the
training (the paper's count; a backward pass costs twice as much again); ``serving``: MACs of one prediction; ``steps``
and ``members`` of it; ``resolution``; ``first`` and ``second``: two trainings one after the other (pre-training and
fine-tuning, a dense model and its experts), in items, or in forward MACs (``first_macs``, ``second_macs``).

Several laws are combined by ratios: the first predicts the error, and each other one by what factor its columns change
it, from the values at which the first law's points were measured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scaling_perception.scaling.laws import EXTRAPOLATE, Law, law_form
from scaling_perception.scaling.points import find_column
from scaling_perception.support.errors import UserError, did_you_mean

REFUSE = 3.0
"""Decades beyond the data from which a plan is refused."""
QUANTITIES: dict[str, tuple[str, ...]] = {
    "params": ("params", "n", "model_size", "parameters", "active_params"),
    "tokens": ("tokens", "d", "training_tokens", "train_tokens"),
    "samples": ("samples", "examples", "images_seen"),
    "training": ("train_macs", "training_macs", "train_compute", "own_train_macs", "training_compute"),
    "serving": ("inference_macs", "serving_macs", "macs_per_image"),
    "steps": ("steps", "denoising_steps"),
    "members": ("ensemble", "members"),
    "resolution": ("resolution", "pixels", "res"),
    "first": ("d1", "dense_tokens", "pretrain_tokens", "pretrain_samples"),
    "second": ("d2", "moe_tokens", "upcycling_tokens", "finetune_tokens", "finetune_samples"),
    "first_macs": ("pretrain_macs", "pretraining_macs", "dense_macs"),
    "second_macs": ("finetune_macs", "finetuning_macs", "upcycling_macs"),
}
CHOSEN = {
    "params": "--sizes",
    "tokens": "--samples, at most, and --tokens, of a sample",
    "samples": "--samples, at most",
    "serving": "--macs, at most",
    "steps": "--steps",
    "members": "--members",
    "resolution": "--resolution",
    **dict.fromkeys(("first", "second", "first_macs", "second_macs"), "--budget"),
}
"""Quantities that a plan chooses, and the flag that decides among what. Compute of a training that was done already
(``training``) can be fixed."""
TRAINING = ("tokens", "samples", "training", "first", "second", "first_macs", "second_macs")
SERVING = ("serving", "steps", "members")
_COMPUTE = ("macs", "compute", "c", "x")
_FLOPS = ("flops", "train_flops", "training_flops")


@dataclass(frozen=True)
class Column:
    """A column of a law: its quantity (``fixed`` with ``value`` for one that the plan does not set), and how many of
    its unit one unit of the quantity is (2 for FLOPs of MACs)."""

    name: str
    quantity: str
    scale: float = 1.0
    value: float = 0.0


@dataclass(frozen=True)
class Laws:
    """Laws with their columns. ``at``: values of the columns of the second and later laws that belong to the first's
    points. ``notes``: what was assumed, in sentences."""

    laws: tuple[Law, ...]
    columns: tuple[tuple[Column, ...], ...]
    at: Mapping[str, float]
    notes: tuple[str, ...]

    @property
    def quantities(self) -> tuple[str, ...]:
        """Every quantity that some law holds."""
        return tuple(dict.fromkeys(c.quantity for columns in self.columns for c in columns if c.quantity != "fixed"))

    @property
    def draws(self) -> int:
        """How many parameter sets can be paired."""
        return min(len(law.samples) for law in self.laws)

    def log_x(self, which: int, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """Log of the columns (v, n) of one law at quantities (n,)."""
        count = len(next(iter(values.values())))
        rows = []
        for column in self.columns[which]:
            fixed = np.full(count, column.value)
            rows.append(np.log(fixed if column.quantity == "fixed" else values[column.quantity] * column.scale))
        return np.stack(rows)

    def log_error(self, values: Mapping[str, np.ndarray], sampled: bool = False) -> np.ndarray:
        """Log of the predicted error (B, n): of the published parameters (B = 1) or of every bootstrapped set."""
        total = np.zeros(1)
        for which, law in enumerate(self.laws):
            parameters = law.samples[: self.draws] if sampled else law.values[None]
            form = law_form(law)
            with np.errstate(all="ignore"):
                total = total + np.log(form.value(parameters, self.log_x(which, values)))
                if which:
                    there = np.log([[self.at[name]] for name in law.x])
                    total = total - np.log(form.value(parameters, there))
        return total

    def beyond(self, values: Mapping[str, np.ndarray]) -> tuple[np.ndarray, list[str]]:
        """Decades (n,) outside the fitted ranges, the farthest column's; and of each option that column's name."""
        far, names = [], []
        for which, law in enumerate(self.laws):
            logs = self.log_x(which, values) / math.log(10)
            for row, column in zip(logs, self.columns[which], strict=True):
                low, high = np.log10(law.range[column.name])
                far.append(np.maximum(np.maximum(row - high, low - row), 0.0))
                names.append(column.name)
        worst = np.argmax(far, axis=0)
        return np.max(far, axis=0), [names[i] for i in worst]


def read_laws(
    laws: Sequence[Law],
    files: Sequence[str],
    named: Mapping[str, str],
    fixed: Mapping[str, float],
    at: Mapping[str, float],
) -> Laws:
    """The laws with the quantity of every column.

    Args:
        named: quantity of a column, where its name does not say it. fixed: values of columns that a plan does not set.
        at: where the first law's points were measured, for the columns of the others.

    Raises:
        UserError: a column of no known quantity, a law that predicts something else than the first, no ``at``, or a
            law without bootstrapped parameters.
    """
    known = [name for law in laws for name in law.x]
    for flag, given in (("--column", named), ("--fix", fixed), ("--at", at)):
        for name in given:
            if name not in known:
                raise UserError(f"{flag} {name}: no law has this column{did_you_mean(name, known)}")
    notes: list[str] = []
    columns = []
    for law, file in zip(laws, files, strict=True):
        if law.y != laws[0].y:
            raise UserError(f"{file} predicts {law.y} and {files[0]} {laws[0].y}: laws of one error can be combined")
        if not len(law.samples):
            raise UserError(f"{file} holds no bootstrapped parameters: fit the points again with `fit --json`")
        columns.append(tuple(_column(name, law, file, named, fixed, notes) for name in law.x))
        if any(str(one.get("file", "")).startswith("paper:") for one in law.source):
            notes.append(
                f"{file} was fitted to points made from a published formula: its intervals hold no error of measurement"
            )
        if law.form == "hull" or law.loss.get("kind") == "quantile":
            notes.append(f"{file} is a lower envelope: a typical run lies above it")
    for law, file in zip(laws[1:], files[1:], strict=True):
        for name in law.x:
            if name not in at:
                raise UserError(
                    f"{file} is combined by ratios: say at which {name} the points of {files[0]} were measured, such "
                    f"as --at {name}={law.range[name][0]:g}"
                )
        notes.append(
            f"{file} changes the error by a factor, 1 at {', '.join(f'{name} {at[name]:g}' for name in law.x)}: that "
            "the gains multiply is assumed"
        )
    used = [c.quantity for row in columns for c in row if c.quantity != "fixed"]
    twice = next((quantity for quantity in used if used.count(quantity) > 1), None)
    if twice:
        raise UserError(
            f"two columns are '{twice}': a plan can set it once; say which is what by --column NAME=QUANTITY"
        )
    return Laws(tuple(laws), tuple(columns), at, tuple(notes))


def _column(
    name: str, law: Law, file: str, named: Mapping[str, str], fixed: Mapping[str, float], notes: list[str]
) -> Column:
    if name in fixed:
        quantity = named.get(name) or next((one for one, names in QUANTITIES.items() if find_column(names, name)), "")
        if quantity in CHOSEN:
            raise UserError(f"--fix {name}: a plan chooses it: give {CHOSEN[quantity]}, in place of --fix")
        return Column(name, "fixed", value=fixed[name])
    flops = 2.0 if find_column(_FLOPS, name) else 1.0
    if name in named:
        if named[name] not in QUANTITIES:
            raise UserError(f"--column {name}={named[name]}{did_you_mean(named[name], QUANTITIES)}")
        return Column(name, named[name], flops)
    for quantity, names in QUANTITIES.items():
        if find_column(names, name):
            return Column(name, quantity)
    if find_column((*_COMPUTE, *_FLOPS), name):
        figure = next((str(one.get("file", "")) for one in law.source), "")
        if figure.startswith("paper:"):
            return Column(name, "training" if figure == "paper:fig2" else "serving", flops)
        quantity = "training" if "loss" in law.y.lower() or not find_column(("macs",), name) else "serving"
        what = "forward MACs of the training" if quantity == "training" else "MACs of one prediction"
        notes.append(f"{name} of {file} is taken as {what}: --column {name}=training or {name}=serving says otherwise")
        return Column(name, quantity, flops)
    raise UserError(
        f"{file}: the law has a column '{name}' that is no quantity of a plan: name it by --column {name}=QUANTITY "
        f"({', '.join(QUANTITIES)}), or hold it by --fix {name}=VALUE"
    )


def refuse_undecided(laws: Laws, free: Sequence[str]) -> None:
    """Refuse to choose a quantity that the data do not show to matter.

    Raises:
        UserError: the exponent's interval of one of ``free`` holds zero.
    """
    for law, columns in zip(laws.laws, laws.columns, strict=True):
        for at, column in enumerate(columns):
            if column.quantity not in free:
                continue
            low, high, name = _exponent(law, at)
            if high < 0:
                raise UserError(
                    f"{law.y} grows with {column.name}: the interval of {name}, {low:.3g} to {high:.3g}, lies below "
                    "zero, and no budget buys anything by it; check the columns"
                )
            if low <= 1e-3:
                hold = "hold it by one value" if column.quantity in ("steps", "members", "params", "resolution") else ""
                raise UserError(
                    f"the data do not show that {column.name} matters: the interval of {name}, {low:.3g} to "
                    f"{high:.3g}, holds zero, and no choice can be made by it; measure more"
                    + (f", or {hold}" if hold else "")
                )


def _exponent(law: Law, at: int) -> tuple[float, float, str]:
    """Ends and name of the interval of a column's exponent; upcycling's at the centre of the other column's range."""
    if law.form == "upcycling":
        names = list(law.parameters)
        own, cross = law.samples[:, names.index(f"alpha{at + 1}")], law.samples[:, names.index("alpha3")]
        middle = np.log(law.range[law.x[1 - at]]).mean()
        tail = (1 - law.level) / 2
        low, high = np.quantile(own - cross * middle, [tail, 1 - tail])
        return float(low), float(high), f"the exponent of {law.x[at]} in the middle of {law.x[1 - at]}"
    name = law_form(law).exponents[at]
    low, high = law.parameters[name]["interval"]
    return -math.inf if low is None else low, math.inf if high is None else high, name


def check_range(laws: Laws, values: Mapping[str, np.ndarray]) -> list[str]:
    """Warnings about one choice (arrays of one) outside the data.

    Raises:
        UserError: it lies more than `REFUSE` decades outside.
    """
    decades, names = laws.beyond(values)
    far, name = float(decades[0]), names[0]
    if far > REFUSE:
        law, column = next(
            (law, c)
            for law, row in zip(laws.laws, laws.columns, strict=True)
            for c in row
            if c.name == name
        )  # fmt: skip
        value = float(values[column.quantity][0]) * column.scale if column.quantity != "fixed" else column.value
        low, high = law.range[name]
        raise UserError(
            f"{name} would be {value:.3g}, {far:.1f} decades outside the data ({low:.3g} to {high:.3g}): no law is "
            f"trusted over {REFUSE:g} decades; give a --budget (or --samples) nearer to them, or measure nearer"
        )
    if far > EXTRAPOLATE:
        return [f"{name} lies {far:.1f} decades outside the data: over {EXTRAPOLATE:g} no interval can be trusted"]
    return []
