"""The figures of an evaluation from the records of its images, whoever made them: one job, or several parts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling_perception.data.manifest import wider
from scaling_perception.evaluation.comparisons import evaluations_of, kind
from scaling_perception.evaluation.controls import control_results
from scaling_perception.evaluation.intervals import summarise
from scaling_perception.evaluation.nested import CONSTANT
from scaling_perception.support.errors import UserError


def result_of(groups: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> dict[str, Any]:
    """What `sweep.sweep` returns of its images.

    Args:
        groups: records of all groups of images, in order, as `sweep` makes them.
        about: ``cells``, ``controlled`` (number of the cell that the controls belong to) and ``macs_per_forward``.

    Raises:
        UserError: no image could be evaluated.
    """
    images = [image for group in groups for image in group["images"]]
    skipped = [one for group in groups for one in group["skipped"]]
    if not images:
        reason = f": {skipped[0]['key']}: {skipped[0]['reason']}" if skipped else ""
        more = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
        raise UserError(f"no image could be evaluated{reason}{more}; check the data set and its split")
    ranges: dict[str, list[float]] = {}
    for group in groups:
        wider(ranges, group.get("ranges", {}))
    each, at = about["macs_per_forward"], about["controlled"]
    decode = about.get("macs_per_decode")  # a part's journal may be of an earlier version
    cells = [
        _summary(cell, [(image["key"], *image["cells"][i]) for image in images], each, decode)
        for i, cell in enumerate(about["cells"])
    ]
    baselines = {
        name: [{"key": image["key"], **image["baselines"][name]} for image in images] for name in images[0]["baselines"]
    }
    return {
        "images": len(images),
        "macs_per_forward": each,
        "macs_per_decode": decode,
        "cells": cells,
        "baselines": {name: {"metrics": summarise(rows), "rows": rows} for name, rows in baselines.items()},
        "controls": control_results(images, at, about["cells"][at]),
        "skipped": skipped,
        "ranges": ranges,
    }


def _summary(
    cell: dict[str, Any],
    found: list[tuple[str, int, float, dict[str, float]]],
    each: float | None,
    decode: float | None,
) -> dict[str, Any]:
    """A cell with its means over images; where compute differs by image, with its distribution."""
    cell = {**cell, "kind": kind(cell)}  # a part's journal may be of an earlier version
    forwards = [one[1] for one in found]
    mean = float(np.mean(forwards))
    rows = [{"key": key, **row} for key, _, _, row in found]
    constant = sum(row.pop(CONSTANT, 0) > 0 for row in rows)
    spent: dict[str, Any] = {"constant_predictions": constant} if constant else {}
    if cell.get("aspect") == "tile":  # every window is sampled, and images have as many as they are large
        spent |= {"evaluations": mean / cell["ensemble"], "forwards": forwards}
    if cell["kind"] != "constant":
        by = evaluations_of(cell) if cell["kind"] == "adaptive" else cell["ensemble"]
        counts = Counter(count / by for count in forwards)
        spent |= {"counts": {f"{count:g}": counts[count] for count in sorted(counts)}, "forwards": forwards}
    members = mean / evaluations_of(cell) if cell["kind"] == "adaptive" else cell["ensemble"]
    decodes = 1 if cell.get("merge_in") == "latents" else members
    return {
        **cell,
        "mean_steps": mean / cell["ensemble"] if cell["kind"] == "steps" else cell["steps"],
        "mean_members": members,
        "macs": None if each is None else each * mean,
        "decoder_macs": None if decode is None else decode * decodes,
        "seconds": float(np.mean([one[2] for one in found])),
        **spent,
        "metrics": summarise(rows),
        "rows": rows,
    }
