"""A plan as text for people, and as the commands that carry it out."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from scaling_perception.scaling.law_text import number
from scaling_perception.scaling.plan_laws import Laws
from scaling_perception.tasks import TASKS

_LABELS = {
    "size": "size", "params": "parameters", "resolution": "resolution", "steps": "denoising steps",
    "members": "members", "tokens": "training tokens", "samples": "training samples", "training": "forward MACs of it",
    "training_steps": "training steps",
    "stage_steps": "steps of both", "serving": "MACs of a prediction", "first": "items of the first training",
    "second": "items of the second", "first_macs": "forward MACs of the first", "second_macs": "of the second",
    "training_macs": "training MACs, x 3", "serving_macs": "serving MACs", "macs_per_image": "MACs an image",
    "seconds_per_image": "seconds an image",
}  # fmt: skip
_WORTH = {"first": "the first training", "second": "the second", "first_macs": "the first training",
          "second_macs": "the second"}  # fmt: skip


def plan_text(answer: Mapping[str, Any], laws: Laws, commands: Sequence[str], because: str) -> str:
    """Everything about a plan that a reader needs, as lines. ``because`` says why there are no commands."""
    choice, rival = answer["choice"], answer["runner_up"]
    y, level = laws.laws[0].y, f"{100 * choice['level']:g} %"
    lines = [f"law       {law.equation}   (y = {law.y}, {law.points} points)" for law in laws.laws]
    if answer.get("alternative"):
        lines.append(
            f"of        {answer['alternative']}, before {', '.join(o['name'] for o in answer['alternatives'])}"
        )
    lines += [f"budget    {number(answer['budget'])} {choice['unit']}, of which {number(choice['cost'])} are used", ""]
    head = ["", "choice", f"{level} of the best"] + (["runner-up"] if rival else [])
    rows = [head]
    for name, label in _LABELS.items():
        value = choice.get(name)
        if value is None:
            continue
        row = [label, _cell(value), _spread(choice["intervals"].get(name))]
        rows.append(row + ([_cell(rival.get(name))] if rival else []))
    rows.append([y, number(choice["error"]), _ends(choice["error_interval"]) + " (the law)"])
    if rival:
        rows[-1].append(number(rival["error"]))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines += ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append("")
    if rival:
        low, high = rival["excess"]
        told = "can" if rival["told_apart"] else "cannot"
        lines.append(
            f"apart     the runner-up's error is {100 * low:+.2g} % to {100 * high:+.2g} % above the choice's: the "
            f"data {told} tell them apart (the choice is better in {100 * rival['choice_better']:.0f} % of the "
            "parameter sets)"
        )
    for other in answer.get("alternatives", ()):
        low, high = other["excess"]
        lines.append(
            f"instead   {other['name']}: {y} {number(other['error'])}, {100 * low:+.2g} % to {100 * high:+.2g} % above "
            f"{answer['alternative']}: the data {'can' if other['told_apart'] else 'cannot'} tell them apart"
        )
    for row in answer["worth"]:
        low, high = row["interval"]
        what = _WORTH.get(row["direction"], row["direction"])
        lines.append(
            f"worth     {number(row['macs'])} more MACs (a tenth) in {what}: {100 * row['change']:+.3g} % error "
            f"[{100 * low:+.3g}, {100 * high:+.3g}]"
        )
    found = answer["next_run"]
    if found is None:
        lines.append("next run  the law's parameters have no spread, or no run is affordable: none would say more")
    else:
        at = ", ".join(f"{name} = {number(value)}" for name, value in found["at"].items())
        lines.append(
            f"next run  {at} ({number(found['macs'])} MACs): the largest reduction of the variance of the predicted "
            f"error; its standard deviation goes from {100 * found['before']:.3g} % to {100 * found['after']:.3g} %"
        )
    rests = answer["rests_on"]
    for name, text in (rests["memory"] or {}).items():
        lines.append(f"memory    {name}: {text}")
    if rests["training_speed"]:
        lines.append(f"speed     of training: {rests['training_speed']}")
    if rests["serving_speed"]:
        lines.append(f"speed     of serving: {rests['serving_speed']}; the autoencoder's share is not counted")
    lines += [f"command   {line}" for line in commands]
    if because:
        lines.append(f"command   none: {because}")
    lines += [f"note: {note}" for note in answer["notes"]]
    lines += [f"warning: {warning}" for warning in answer["warnings"]]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else f"{value:.4g}" if abs(value) >= 1e5 else f"{value:,.6g}"


def _ends(ends: Sequence[float]) -> str:
    return f"[{number(ends[0])}, {number(ends[1])}]"


def _spread(found: Any) -> str:
    if found is None:
        return ""
    if isinstance(found, Mapping):
        return ", ".join(f"{name} {share:.0%}" for name, share in found.items())
    return _ends(found)


def commands_of(
    choice: Mapping[str, Any],
    stages: Sequence[tuple[str, int]],
    task: str,
    dataset: str,
    model: str,
    preset: str,
) -> tuple[list[str], str]:
    """The command lines of a choice, or why there are none.

    Args:
        stages: trainings one after the other: spec of the config, with ``{init}``, the folder of the one before, and
            ``{steps}`` or without; and how many steps. Empty: none is known.
        model: what to evaluate, where nothing is trained.
    """
    out: list[list[str]] = []
    if choice["training_macs"] is not None:
        if not stages:
            return [], "the law is of sizes or of a compute that no config stands for; name one by --sizes"
        model = ""
        for spec, steps in stages:
            spec = spec.replace("{steps}", str(steps)).replace("{init}", model)
            file = spec.partition(".py")[0].rpartition("/")[2]
            model = f"runs/plan/{file}-{str(choice['size']).replace('/', '-')}-{steps}"
            out.append(["train", "--config", spec, "--workdir", model, f"--config.train.steps={steps}"])
    if not model:
        return [], "nothing is trained, and --model names nothing to run"
    known = choice.get("steps") and choice.get("members")
    if (known or out) and task in TASKS and TASKS[task].conditioned:
        words = ["evaluate", "--task", task, "--dataset", dataset, "--model", model]
        for name, flag in (("steps", "--steps"), ("members", "--ensemble")):
            words += [flag, f"{choice[name]:g}"] if choice.get(name) else []
        if choice.get("cache"):
            words += ["--cache", choice["cache"], "--cache-interval", str(choice["cache_interval"])]
        for name, usual in (("solver", "ddim"), ("spacing", None), ("merge_in", "pixels"), ("views", "plain")):
            if choice.get(name) not in (None, usual):
                words += [f"--{name.replace('_', '-')}", choice[name]]
        out.append([*words, *(["--preset", preset] if preset else []), "--json", "runs/plan/evaluation.json"])
    why = "" if out else "the law does not say into how many steps and members the MACs go; give --members or --steps"
    return ["scaling-perception " + " ".join(map(shlex.quote, words)) for words in out], why
