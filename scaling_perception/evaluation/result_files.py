"""Files of evaluations among others: which JSON is one, of which format, and which is damaged."""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from scaling_perception.inference.settings import SETTINGS
from scaling_perception.support.errors import UserError
from scaling_perception.support.failures import explain_os

FORMAT = 1
"""Of the JSON that `evaluate` writes."""
USUAL = {"steps": "10", "ensemble": "5", "solver": "ddim", "first": 2, "step_chunk": 2, "seed": 0, "dtype": "float32"}
"""Flags that a result records at their default too; of the other settings those alone that differ from it."""

_MARKS = ("task", "dataset")
_ONE_OF = ("asked", "cells", "protocol")
_ABOVE_ZERO = ("steps", "ensemble", "mean_steps", "mean_members", "macs")


def is_evaluation(path: Path, value: Any) -> bool:
    """Whether a JSON value is an evaluation.

    Raises:
        UserError: it is one of another format.
    """
    if not (isinstance(value, dict) and "cells" in value and "task" in value):
        return False
    if value.get("format", FORMAT) != FORMAT:  # without the field: made by another program
        raise UserError(
            f"{path}: format is {json.dumps(value['format'])}, and this version reads {FORMAT}: evaluate again, or use "
            "the version that wrote it"
        )
    return True


def read_evaluation(path: Path) -> dict[str, Any] | None:
    """The evaluation in a JSON file; None where it holds something else.

    Raises:
        UserError: it cannot be read, is of another format, or has the names of an evaluation's fields and is no JSON:
            it was cut or edited.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {explain_os(error, path)}") from None
    text = data.decode("utf-8-sig", "replace")
    try:
        value = json.loads(text)
    except ValueError as error:
        if not text.strip() or _has_marks(text):
            what = f"is not valid JSON ({error})" if text.strip() else "is empty"
            raise UserError(f"{path} {what}: restore it, evaluate again, or remove it") from None
        return None
    return value if is_evaluation(path, value) else None


def _has_marks(text: str) -> bool:
    def has(name: str) -> bool:
        return f'"{name}"' in text

    return all(map(has, _MARKS)) and any(map(has, _ONE_OF))


def differing_flag(result: dict[str, Any], flags: Mapping[str, Any]) -> str:
    """The first flag of `evaluate` by which a result was made with another value than ``flags`` have, and both values;
    empty: none. Results of versions that recorded no flags differ in none."""
    if "asked" not in result:
        return ""
    usual = {name: one["default"] for name, one in SETTINGS.items()} | USUAL
    there, here = ({**usual, **_given(one)} for one in (result["asked"], flags))
    for name in dict.fromkeys([*SETTINGS, *result["asked"]]):
        if name in flags and name != "autoencoder" and str(there.get(name)) != str(here.get(name)):
            return f"--{name.replace('_', '-')} was {there.get(name)}, and is {here.get(name)} in the cell"
    made, wanted = str(result.get("model", "")), re.sub(r"[{}]", "", str(flags.get("model") or ""))
    if wanted and not f"/{made}".endswith(f"/{wanted}"):  # the folder of a study may have been moved
        return f"--model was {made}, and is {flags['model']} in the cell"
    return ""


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value not in (None, "", [])}


def wrong_field(evaluation: dict[str, Any], tasks: Collection[str]) -> str:
    """The first field that cannot be one of an evaluation of one of ``tasks``, and what is wrong with it; empty: none
    is found."""
    return next(_wrong_fields(evaluation, tasks), "")


def _wrong_fields(evaluation: dict[str, Any], tasks: Collection[str]) -> Iterator[str]:
    if evaluation["task"] not in tasks:
        yield f"task is {evaluation['task']!r}, none of {', '.join(tasks)}"
    if not evaluation["cells"]:
        yield "cells is empty"
    if not _above_zero(evaluation["images"]):
        yield f"images is {evaluation['images']!r}, no number above zero"
    mark = evaluation["protocol"].get("fingerprint")
    if not (mark is None or isinstance(mark, str)):
        yield f"protocol.fingerprint is {mark!r}, no text"
    for at, cell in enumerate(evaluation["cells"]):
        for name in _ABOVE_ZERO:
            unknown = name == "macs" and cell[name] is None
            if name in cell and not unknown and not _above_zero(cell[name]):
                yield f"{name} of cell {at + 1} is {cell[name]!r}, no number above zero"
        if not isinstance(cell["preset"], str):
            yield f"preset of cell {at + 1} is {cell['preset']!r}, no text"
        if not cell["rows"]:
            yield f"cell {at + 1} has no rows of images"


def _above_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
