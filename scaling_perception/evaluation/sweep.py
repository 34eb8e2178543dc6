"""Error against compute: a grid of denoising steps × ensemble sizes × timestep grids on one source, with shared work.

Every image is encoded once. For every preset and step count the largest ensemble is sampled once, and smaller
ensembles are its first members (members do not depend on how many there are), so that a change with the ensemble size
is never a change of noise.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from scipy.ndimage import distance_transform_edt

from scaling_perception.diffusion.sampler import SamplerTables, sampler_tables
from scaling_perception.diffusion.schedules import PRESETS, DiffusionPreset
from scaling_perception.evaluation.baselines import bootstrap_ci
from scaling_perception.evaluation.prediction import Estimate
from scaling_perception.evaluation.predictor import Plan, Predictor
from scaling_perception.evaluation.protocols import baseline_rows, measure, prepare_raw, reduce_mode, unmeasurable
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import get_task, pass_indices


class Samples(Protocol):
    """What is evaluated: raw samples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class Setting(NamedTuple):
    """One sampled grid point; ensembles of every size come from it."""

    preset: str
    diffusion: DiffusionPreset
    steps: int
    tables: SamplerTables


class Shown(NamedTuple):
    """One image with its result in the last cell, for pictures."""

    raw: dict[str, Any]
    estimate: Estimate
    cell: dict[str, Any]


def sweep(
    predictor: Predictor,
    source: Samples,
    task: str,
    protocol: dict[str, Any],
    steps: Sequence[int] = (10,),
    ensemble: Sequence[int] = (5,),
    presets: Sequence[str | None] = (None,),
    reduce: str | None = None,
    key: int = 0,
    batch_size: int | None = None,
    macs_per_forward: float | None = None,
    panels: int = 0,
    progress: Callable[..., Iterable[int]] | None = None,
) -> tuple[dict[str, Any], list[Shown]]:
    """Evaluate every cell of the grid, the trivial answers and the autoencoder's floor on the same images.

    Args:
        predictor: the model.
        source: raw samples; one that cannot be read or measured is skipped and listed, never silently.
        protocol: of ``protocols.get_protocol``.
        steps, ensemble, presets: the grid; preset None is the model's own.
        reduce: how members are merged; None is the task's default.
        key: of all noise.
        batch_size: images × members at once; None chooses by memory.
        macs_per_forward: of the DiT on one image; None takes the predictor's own count.
        panels: so many first images are returned with their result in the last cell (most steps, largest ensemble,
            first preset).
        progress: wraps the image groups, as ``support.progress.progress``.

    Returns:
        ``images``, ``cells``, ``baselines``, ``skipped`` of the evaluation JSON, and the images to show. A cell's
        ``seconds`` are per image: encoding, the share of the sampling and decoding that its members take, and merging;
        compiling is left out.

    Raises:
        UserError: an empty grid, a bad value in it, no image left, or a prediction that is not finite.
    """
    predictor.check_task(task)
    for name, values in (("steps", steps), ("ensemble", ensemble), ("presets", presets)):
        if not values:
            raise UserError(f"no {name} to evaluate: give one or more")
    if min(ensemble) < 1:
        raise UserError(f"ensemble {min(ensemble)}: give whole numbers above 0")
    mode = reduce_mode(task, reduce)
    grid = [(preset, count) for preset in dict.fromkeys(presets) for count in dict.fromkeys(steps)]
    settings = [_setting(predictor, preset, count) for preset, count in grid]
    forward = predictor.macs_per_forward if macs_per_forward is None else macs_per_forward
    run = _Run(predictor, task, protocol, settings, sorted(set(ensemble)), mode, key, forward)
    plan = predictor.plan(task, max(ensemble), len(source), batch_size)
    groups = range(0, len(source), plan.images)
    for start in groups if progress is None else progress(groups, len(groups), f"evaluate {task}"):
        run.add(list(_readable(source, range(start, min(start + plan.images, len(source))), run)), plan, panels)
    return run.result(), run.shown


def _setting(predictor: Predictor, preset: str | None, steps: int) -> Setting:
    diffusion = predictor.choose_diffusion(preset)
    return Setting(preset or _grid_name(diffusion), diffusion, steps, sampler_tables(diffusion, steps))


def _grid_name(own: DiffusionPreset) -> str:
    """The preset whose timesteps a model's own diffusion uses, or ``own``."""
    for name, preset in PRESETS.items():
        if all(
            getattr(own, field) == getattr(preset, field) for field in ("spacing", "steps_offset", "final_alpha_one")
        ):
            return name
    return "own"


def _readable(source: Samples, indices: Iterable[int], run: "_Run") -> Iterator[dict[str, Any]]:
    for index in indices:
        try:
            raw = prepare_raw(source[index], run.protocol)
        except UserError as error:
            run.skip(f"sample {index}", "unreadable", str(error))
            continue
        if reason := unmeasurable(raw, run.protocol):
            run.skip(str(raw["key"]), "unmeasurable", reason)
        else:
            yield raw


class _Run:
    """Rows collected so far, a list for every cell and baseline."""

    def __init__(
        self,
        predictor: Predictor,
        task: str,
        protocol: dict[str, Any],
        settings: list[Setting],
        sizes: list[int],
        mode: str,
        key: int,
        forward: float,
    ) -> None:
        self.predictor, self.task, self.protocol = predictor, task, protocol
        self.settings, self.sizes, self.mode = settings, sizes, mode
        self.key, self.forward = key, forward
        self.rows: dict[tuple[int, int], list[dict[str, Any]]] = {
            (i, size): [] for i in range(len(settings)) for size in sizes
        }
        self.seconds = dict.fromkeys(self.rows, 0.0)
        self.baselines: dict[str, list[dict[str, Any]]] = {name: [] for name in (*protocol["baselines"], "autoencoder")}
        self.skipped: list[dict[str, str]] = []
        self.shown: list[Shown] = []
        self.merging_is_compiled = False

    def skip(self, key: str, kind: str, reason: str) -> None:
        self.skipped.append({"key": key, "kind": kind, "reason": reason})

    def add(self, group: list[dict[str, Any]], plan: Plan, panels: int) -> None:
        """Evaluate one group of images in every cell."""
        if not group:
            return
        predictor, task = self.predictor, self.task
        self._add_baselines(group, plan)
        self._compile_merging()
        latents, encoding = self._timed(lambda: predictor.encode(group, task, plan))
        for index, setting in enumerate(self.settings):
            arguments = (latents, group, task, self.sizes[-1], setting.tables, self.key, plan)
            pixels, sampling = self._timed(lambda arguments=arguments: predictor.sample(*arguments))
            for raw, one in zip(group, pixels, strict=True):
                size = (int(raw["image"].shape[0]), int(raw["image"].shape[1]))
                begin = time.perf_counter()
                members = predictor.decode_members(one, task)
                decoding = time.perf_counter() - begin
                for count in self.sizes:
                    share = count / self.sizes[-1]
                    begin = time.perf_counter()
                    estimate = predictor.merge(members[:count], task, size, self.mode, raw.get("visible_mask"))
                    merging = time.perf_counter() - begin
                    cell = (index, count)
                    self.seconds[cell] += (encoding + sampling * share) / len(group) + decoding * share + merging
                    self.rows[cell].append({"key": str(raw["key"]), **self._measure(estimate, raw)})
                    # The last cell of the first preset: most is known of it, and it is what a reader looks for.
                    if index == self._shown_setting and count == self.sizes[-1] and len(self.shown) < panels:
                        self.shown.append(Shown(raw, estimate, self._name(cell)))

    def _timed(self, function: Callable[[], Any]) -> tuple[Any, float]:
        """The result and its seconds, without those spent compiling."""
        begin, compiling = time.perf_counter(), self.predictor.compile_seconds
        value = jax.block_until_ready(function())
        return value, time.perf_counter() - begin - (self.predictor.compile_seconds - compiling)

    def _compile_merging(self) -> None:
        """Merge once for nothing, so that compiling it is in no cell's time."""
        if self.merging_is_compiled:
            return
        side, passes = self.predictor.resolution, len(pass_indices(self.task))
        for count in self.sizes:
            members = self.predictor.decode_members(np.zeros((passes, count, side, side, 3), np.float32), self.task)
            self.predictor.merge(members, self.task, (side, side), self.mode)
        self.merging_is_compiled = True

    @property
    def _shown_setting(self) -> int:
        first = [i for i, s in enumerate(self.settings) if s.preset == self.settings[0].preset]
        return max(first, key=lambda i: self.settings[i].steps)

    def _measure(self, estimate: Estimate, raw: Mapping[str, Any]) -> dict[str, float]:
        try:
            return measure(estimate.prediction, dict(raw), self.protocol)
        except ValueError as error:
            raise UserError(f"{raw['key']}: {error}: the weights are broken or do not fit the sampler") from None

    def _add_baselines(self, group: list[dict[str, Any]], plan: Plan) -> None:
        """The trivial answers, and the truth through the autoencoder and back."""
        predictor, task = self.predictor, self.task
        targets = [
            np.stack([s["target"] for s in get_task(task).encode(whole, predictor.resolution, predictor.options)])
            for whole in (fill_invalid(raw) for raw in group)
        ]
        targets += [targets[0]] * (plan.images - len(group))
        pictures = predictor.round_trip(np.concatenate(targets))
        pictures = pictures.reshape(plan.images, len(pass_indices(task)), 1, *pictures.shape[1:])
        for raw, one in zip(group, pictures, strict=False):
            for name, row in baseline_rows(raw, self.protocol).items():
                self.baselines[name].append({"key": str(raw["key"]), **row})
            height, width = raw["image"].shape[:2]
            # Merged by "median", which leaves a single member as it is.
            members, visible = predictor.decode_members(one, task), raw.get("visible_mask")
            estimate = predictor.merge(members, task, (height, width), "median", visible)
            self.baselines["autoencoder"].append({"key": str(raw["key"]), **self._measure(estimate, raw)})

    def _name(self, cell: tuple[int, int]) -> dict[str, Any]:
        setting, count = self.settings[cell[0]], cell[1]
        return {
            "preset": setting.preset,
            "spacing": setting.diffusion.spacing,
            "schedule": setting.diffusion.schedule,
            "steps": setting.steps,
            "ensemble": count,
            "reduce": self.mode,
        }

    def result(self) -> dict[str, Any]:
        """``images``, ``cells``, ``baselines``, ``skipped``."""
        images = len(next(iter(self.rows.values())))
        if not images:
            reason = f": {self.skipped[0]['key']}: {self.skipped[0]['reason']}" if self.skipped else ""
            raise UserError(f"no image could be evaluated{reason}; check the data set and its split")
        passes = len(pass_indices(self.task))
        cells = []
        for cell, rows in self.rows.items():
            macs = self.forward * passes * self.settings[cell[0]].steps * cell[1]
            cells.append(
                {
                    **self._name(cell),
                    "macs": None if np.isnan(macs) else macs,
                    "seconds": self.seconds[cell] / images,
                    "metrics": summarise(rows),
                    "rows": rows,
                }
            )
        baselines = {name: {"metrics": summarise(rows), "rows": rows} for name, rows in self.baselines.items()}
        return {"images": images, "cells": cells, "baselines": baselines, "skipped": self.skipped}


def fill_invalid(raw: dict[str, Any]) -> dict[str, Any]:
    """A sample whose depth or flow takes the nearest valid pixel's value wherever it is not valid.

    The floor is asked what the autoencoder can carry of the truth; the holes of a sparse truth are not part of it.
    """
    if "valid" not in raw or raw["valid"].all():
        return raw
    nearest: Any = distance_transform_edt(~raw["valid"], return_distances=False, return_indices=True)
    filled = {name: raw[name][nearest[0], nearest[1]] for name in ("depth", "flow") if name in raw}
    return {**raw, **filled, "valid": np.ones_like(raw["valid"])}


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean over images of every metric, with its 95 % bootstrap interval: {metric: {"mean", "ci95"}}."""
    names = [name for name in rows[0] if name != "key"]
    summary = {}
    for name in names:
        values = np.asarray([row[name] for row in rows], np.float64)
        summary[name] = {"mean": float(values.mean()), "ci95": list(bootstrap_ci(values, seed=0))}
    return summary
