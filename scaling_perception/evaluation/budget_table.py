"""Making a model's table of budgets (``budgets.json``) of an evaluation; ``inference.budgets`` reads it and chooses."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from scaling_perception.evaluation.comparisons import evaluations_of, kind, spacing_of
from scaling_perception.evaluation.intervals import FEWEST_IMAGES, bootstrap_ci
from scaling_perception.inference.budgets import (
    CACHE_CELL,
    CELL,
    DECODER_CELL,
    LEVERS,
    MERGE_CELL,
    SPACING_CELL,
    TABLE,
    VIEWS_CELL,
    Timing,
    load_budgets,
)
from scaling_perception.inference.settings import NAMED, flag_of
from scaling_perception.inference.task_tables import refuse_other_model
from scaling_perception.support.again import refuse_other
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import get_task

_BUSY = 1.5  # load of a processor: an evaluation itself makes up to 1


def error_rows(task: str, rows: list[dict[str, Any]]) -> np.ndarray:
    """(images,) float64, each image's error, which falls as results get better."""
    main = get_task(task).main
    assert main is not None
    return np.asarray([main.error(row[main.name]) for row in rows], np.float64)


def _ends(values: np.ndarray, limits: tuple[float, float] = (-math.inf, math.inf)) -> list[float]:
    return [_short(end) for end in bootstrap_ci(values, limits=limits) or ()]


def budget_entry(result: Mapping[str, Any], reference: Timing | None = None) -> dict[str, Any]:
    """One task's part of the table from an evaluation (`evaluate`'s JSON). Cells of adaptive compute are left out.

    ``excess`` of a cell is how much larger its images' errors are than with the lowest cell, paired by image.
    ``reference`` is `measure_timing` on the same machine, with which others compare theirs.

    Raises:
        UserError: no cell has a known number of MACs, or too few images for intervals.
    """
    task = result["task"]
    main = get_task(task).main
    assert main is not None
    fixed = [
        cell
        for cell in result["cells"]
        if kind(cell) == "constant" and cell["macs"] is not None and "verifier" not in cell  # no budget chooses one
    ]
    if not fixed:
        raise UserError("this evaluation has no cell with a known number of MACs: no table of budgets can be made")
    _need_images(result["images"])
    errors = [error_rows(task, cell["rows"]) for cell in fixed]
    lowest = min(errors, key=lambda values: values.mean())
    cells, limits = [], main.error_limits(get_task(task).limits)
    for cell, values in zip(fixed, errors, strict=True):
        excess = values - lowest
        numbers = {"error": _short(values.mean()), "ci95": _ends(values, limits)}
        numbers["excess"] = {"mean": _short(excess.mean()), "ci95": _ends(excess)}
        known = {name: cell.get(name, "ddim") if name == "solver" else cell[name] for name in CELL[:5]}
        known |= {name: cell[name] for name in (*CACHE_CELL, MERGE_CELL, VIEWS_CELL) if name in cell}
        known |= {SPACING_CELL: cell["spacing"]} if spacing_of(cell) else {}
        known |= {} if cell.get(DECODER_CELL) is None else {DECODER_CELL: cell[DECODER_CELL]}
        cells.append({**known, "seconds": _short(cell["seconds"]), **numbers})
    trivial = {
        name: float(error_rows(task, found["rows"]).mean())
        for name, found in result["baselines"].items()
        if name not in ("autoencoder", "threshold")
    }
    strongest = min(trivial, key=lambda name: trivial[name]) if trivial else None
    return {
        "dataset": result["dataset"],
        "split": result.get("split"),
        "images": result["images"],
        "metric": main.error_name,
        "weights": result.get("weights"),
        "autoencoder": result.get("autoencoder", {}).get("weights"),
        "reduce": fixed[0]["reduce"],
        "protocol": result["protocol"].get("fingerprint"),
        **({"asked": result["asked"]} if "asked" in result else {}),
        "timing": _numbers(fit_timing(cells)),
        **({} if reference is None else {"reference": _numbers(reference)}),
        **({"trivial": {"name": strongest, "error": trivial[strongest]}} if strongest else {}),
        "cells": sorted(_worth_keeping(cells), key=lambda c: (_compute(c), c["error"])),
    }


def _worth_keeping(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The plain cells, and of those with a lever (``LEVERS``, another solver) the ones that no cell beats: none has at
    most their error, MACs, MACs with the decoder's, and seconds, and less of one of them. Where all but the seconds are
    equal, it is the same computation by another name, and the first is kept."""
    costs = np.asarray([[cell["error"], cell["macs"], _compute(cell), cell["seconds"]] for cell in cells])

    def beaten(at: int) -> bool:
        own, same = costs[at], (costs[:at, :3] == costs[at, :3]).all(axis=1)
        return bool(same.any() or ((costs <= own).all(axis=1) & (costs < own).any(axis=1)).any())

    def plain(cell: dict[str, Any]) -> bool:
        return cell["solver"] == "ddim" and not set(LEVERS) & set(cell)

    return [cell for at, cell in enumerate(cells) if plain(cell) or not beaten(at)]


def _compute(cell: Mapping[str, Any]) -> float:
    return cell["macs"] + cell.get(DECODER_CELL, 0.0)


def _numbers(timing: Timing) -> dict[str, float]:
    return {name: _short(value) for name, value in timing._asdict().items()}


def _short(value: float) -> float:
    """Six digits: the table is read by people, too."""
    return float(f"{value:.6g}")


def busy() -> str | None:
    """Words for a machine that also did other things in the last five minutes, so that a table's seconds are too long;
    None where it did not, or does not say."""
    load, processors = os.getloadavg()[1] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load <= _BUSY * processors:
        return None
    return (
        f"the machine was busy (load average {load:.1f}, processors {processors}): seconds are too long; errors and "
        "MACs are not affected. Make the table again when nothing else runs"
    )


def check_entry(
    folder: str | os.PathLike[str],
    task: str,
    asked: Mapping[str, Any],
    overwrite: bool = False,
    images: int | None = None,
) -> None:
    """Refuse, before the work, to make a task's entry of the folder's table of an evaluation.

    Args:
        images: how many are evaluated, where that is known.

    Raises:
        UserError: the entry that is there is of other settings, or does not say its own; ``asked`` has a setting that
            no budget chooses; the folder's weights are not those that are evaluated; or there are too few images.
    """
    _need_images(FEWEST_IMAGES if images is None else images)
    for name in NAMED:
        if name in asked and name not in LEVERS:
            raise UserError(f"a table of budgets is of the usual {name}: leave out {flag_of(name)} or --write-budgets")
    entry = ((load_budgets(folder) or {}).get("tasks") or {}).get(task)
    if entry is not None and not overwrite:
        refuse_other(f"{Path(folder) / TABLE.file} ({task})", entry.get("asked"), asked)
    refuse_other_model(Path(folder), asked.get("weights"))


def _need_images(count: int) -> None:
    if count < FEWEST_IMAGES:
        raise UserError(f"{count} images tell no settings apart: a table of budgets needs {FEWEST_IMAGES}: give more")


def fit_timing(cells: list[dict[str, Any]]) -> Timing:
    """`Timing` of the machine that measured the cells: seconds = a + b members + c evaluations, none negative. Members
    that are merged as latents are decoded once, and so count as one but for their evaluations.

    Relative errors count, so that cheap cells do.
    """
    sampled = np.asarray([cell["ensemble"] for cell in cells], np.float64)
    members = np.asarray([1 if MERGE_CELL in cell else cell["ensemble"] for cell in cells], np.float64)
    forwards = sampled * np.asarray([evaluations_of(cell) for cell in cells], np.float64)
    seconds = np.maximum(np.asarray([cell["seconds"] for cell in cells], np.float64), 1e-9)
    columns = np.stack([np.ones_like(members), members, forwards], axis=1)
    (whole, each, forward), _ = nnls(columns / seconds[:, None], np.ones_like(seconds))
    return Timing(float(whole + each), float(forward))
