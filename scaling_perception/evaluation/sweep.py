"""Error against compute: denoising steps × ensemble sizes × timestep grids × solvers on one source, with shared work.

Every image is encoded once. For every grid, solver and step count the largest ensemble is sampled once, and smaller
ensembles are its first members (members do not depend on how many there are), so that a change with the ensemble size
is never a change of noise.

Adaptive compute is read off the same members (``nested``), so that its curves cost no sampling of their own.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from scipy.ndimage import distance_transform_edt

from scaling_perception.data.contents import contents_of, described
from scaling_perception.data.manifest import widen_depth
from scaling_perception.diffusion.caching import NO_CACHE
from scaling_perception.diffusion.schedules import LEARNED
from scaling_perception.evaluation.controls import control_inputs
from scaling_perception.evaluation.journal import Journal
from scaling_perception.evaluation.nested import (
    CONSTANT,
    Adaptive,
    Nested,
    SweepContext,
    Whole,
    sample_all,
    sample_with_looks,
)
from scaling_perception.evaluation.parts import plan_of_others
from scaling_perception.evaluation.points import Point, point_size, points_of, way_of
from scaling_perception.evaluation.protocols import baseline_rows, prepare_raw, unmeasurable
from scaling_perception.evaluation.results import result_of
from scaling_perception.inference.aspect import Box, cut, with_aspect
from scaling_perception.inference.batches import BatchPlan
from scaling_perception.inference.predictor import Predictor
from scaling_perception.inference.settings import Settings
from scaling_perception.support.errors import UserError
from scaling_perception.support.parts import Part, note_idle
from scaling_perception.tasks import get_task
from scaling_perception.tasks.base import Estimate


class Samples(Protocol):
    """What is evaluated: raw samples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class Shown(NamedTuple):
    """One image with its result for the most compute, and, as (cell, estimate without members), in every cell of
    constant compute of the first grid and solver, for pictures."""

    raw: dict[str, Any]
    estimate: Estimate
    cell: dict[str, Any]
    answers: tuple[tuple[dict[str, Any], Estimate], ...] = ()


def sweep(
    predictor: Predictor,
    source: Samples,
    task: str,
    protocol: dict[str, Any],
    steps: Sequence[int] = (10,),
    ensemble: Sequence[int] = (5,),
    presets: Sequence[str | None] = (None,),
    shared: Settings = Settings(),  # noqa: B008
    key: int = 0,
    batch_size: int | None = None,
    macs_per_forward: float | None = None,
    panels: int = 0,
    progress: Callable[..., Iterable[int]] | None = None,
    solvers: Sequence[str] = ("ddim",),
    caches: Sequence[tuple[str, int]] = ((NO_CACHE, 1),),
    adaptive: Adaptive | None = None,
    journal: Path | None = None,
    show: Callable[[Shown, int], Any] | None = None,
    controls: int = 0,
    part: Part | None = None,
    described_by: Mapping[str, Any] | None = None,
    spacings: Sequence[str | None] = (),
    one_lever: bool = False,
    views: Sequence[str] = ("plain",),
) -> tuple[dict[str, Any], list[Any]]:
    """Evaluate every cell of the grid, the trivial answers and the autoencoder's floor on the same images.

    Args:
        predictor: the model.
        source: raw samples; one that cannot be read or measured is skipped and listed, never silently.
        protocol: of ``protocols.get_protocol``.
        steps, ensemble, presets, solvers: the grid; preset None is the model's own. ``single`` takes one step whatever
            ``steps`` are.
        caches: also of the grid: (method, interval), see ``diffusion.caching``; those that would compute every step of
            a step count are left out there.
        shared: the settings of all cells: eta, clip, reduce, antithetic, aspect. Those that the grid or
            ``adaptive`` has are not read.
        key: of all noise.
        batch_size: images × members at once; None chooses by memory.
        macs_per_forward: of the DiT on one image; None takes the predictor's own count.
        panels: so many first images are shown, with their results in the cells of constant compute of the first preset
            and solver.
        progress: wraps the work, as ``support.progress.progress``; its unit is a denoising step of a group of images.
        adaptive: tolerances of adaptive members and of early exits: more cells, at no further sampling.
        journal: file in which finished images are kept; where it holds some, they are not done again. The caller
            removes it once the result is written.
        show: makes JSON of an image to show and its number, as soon as it is done; None keeps it as it is (which a
            journal cannot).
        controls: of how many images the controls are measured (see ``controls``), at the fewest steps of the first
            grid and solver with all members.
        part: do this part of the images alone, into the ``journal``, for `parts.join`; returned is nothing of them.
        described_by: of a part: JSON values that the journal keeps beside it, the same for all parts.
        spacings: also of the grid; none: that of ``shared``.
        one_lever: leave out what differs from the first preset, spacing, solver and cache in more than one of them.
        views: also of the grid, see ``inference.draws``.

    Returns:
        ``images``, ``macs_per_forward``, ``macs_per_decode``, ``cells``, ``baselines``, ``controls``, ``skipped``,
        ``ranges`` (of the true depth, metres) of the evaluation JSON, and what is shown. A cell's ``seconds`` are per
        image: encoding, the share of the sampling and decoding that its members and steps take, deciding, and merging;
        compiling is left out.

    Raises:
        UserError: an empty grid, a bad value in it, no image left, a prediction that is not finite, or a journal of
            another evaluation.
    """
    predictor.check_task(task)
    grid = {"steps": steps, "ensemble": ensemble, "presets": presets, "solvers": solvers, "caches": caches}
    grid["views"] = views = list(dict.fromkeys(views))
    for name, values in grid.items():
        if not values:
            raise UserError(f"no {name} to evaluate: give one or more")
    sizes, mode, adaptive = sorted(set(ensemble)), get_task(task).reduce_mode(shared.reduce), adaptive or Adaptive()
    if shared.aspect == "tile" and (adaptive.tolerances or adaptive.step_tolerances):
        raise UserError("aspect 'tile' is measured with constant compute: leave out tolerance and step_tolerance")
    points = points_of(
        predictor,
        task,
        steps,
        sizes,
        presets,
        solvers,
        caches,
        mode,
        adaptive,
        shared,
        spacings or (shared.spacing,),
        one_lever,
        views,
    )
    forward = predictor.macs_per_forward if macs_per_forward is None else macs_per_forward
    largest = max(points, key=point_size).tables
    given = largest if batch_size is None else None
    plan = predictor.plan(task, sizes[-1], len(source), batch_size, given, views=views[-1])
    way = SweepContext(predictor, task, protocol, mode, sizes[-1], adaptive, key, plan, shared)
    run = _Run(way, source, points, sizes, panels, show, controls, one_lever)
    about = run.about(forward)
    if journal is None:
        run.go(progress)
    else:
        files = contents_of(source)
        identity, more = run.identity(files), {}
        if part is not None:
            plan = BatchPlan(**plan_of_others(journal, part, identity, plan._asdict()))
            count = len(range(0, len(source), plan.images))
            note_idle(part, count, f"batches of {plan.images} images", "--batch-size")
            more = {"part": list(part), "groups": len(part.block(count)), "about": about, "described_by": described_by}
        with Journal(journal, identity, plan._asdict(), files, more) as kept:
            run.way, run.groups = way._replace(plan=BatchPlan(**kept.plan)), list(kept.groups)
            run.go(progress, kept.append, part or Part(0, 1))
    if part is not None:
        return {"images": sum(len(group["images"]) for group in run.groups)}, []
    return result_of(run.groups, about), run.shown


_Seen = tuple[list[dict[str, Any]], dict[str, tuple[Any, float]]]  # pictures; by views, latents and seconds of them


class _Run:
    """What is done so far: a record for every group of images, as the journal keeps it.

    {"images": [{"key", "baselines": {name: {metric: value}}, "cells": [[forwards, seconds, {metric: value}], ...]}],
    "skipped": [{"key", "kind", "reason"}], "shown": [...]}
    """

    def __init__(
        self,
        way: SweepContext,
        source: Samples,
        points: list[Point],
        sizes: list[int],
        panels: int,
        show: Callable[[Shown, int], Any] | None,
        controls: int,
        one_lever: bool,
    ) -> None:
        self.way, self.source, self.points, self.sizes, self.controls = way, source, points, sizes, controls
        self.panels, self.show = panels, show or (lambda shown, number: shown)
        first = (point for point in points if way_of(point) == way_of(points[0]))
        self.controlled = min(first, key=lambda point: point.settings.steps)
        self.one_lever, self.views = one_lever, list(dict.fromkeys(point.settings.views for point in points))
        self.groups: list[dict[str, Any]] = []
        self.before = 0  # images of earlier parts, as far as it matters which are the first
        self.merging_is_compiled = False

    def identity(self, files: Mapping[str, str]) -> dict[str, Any]:
        """Everything that decides a figure, for the journal; ``files``: hashes of the data's contents."""
        from scaling_perception import __version__

        way, predictor = self.way, self.way.predictor
        caches = list(dict.fromkeys((p.settings.cache, p.settings.cache_interval) for p in self.points))
        return {
            "version": __version__,
            "task": way.task,
            "data": described(self.source, files) if hasattr(self.source, "fingerprint") else len(self.source),
            "protocol": way.protocol,
            "model": predictor.id,
            "autoencoder": predictor.autoencoder_id,
            "diffusion": dataclasses.asdict(predictor.diffusion),
            "task_options": predictor.options.to_dict(),
            "dtype": str(predictor.engine.model.dtype),
            "devices": f"{predictor.engine.layout} {jax.default_backend()}",
            "presets": list(dict.fromkeys(point.preset for point in self.points)),
            "solvers": list(dict.fromkeys(point.settings.solver for point in self.points)),
            "steps": list(dict.fromkeys(point.settings.steps for point in self.points)),
            "ensemble": self.sizes,
            **({"caches": [list(one) for one in caches]} if caches != [(NO_CACHE, 1)] else {}),
            **({"views": self.views} if self.views != ["plain"] else {}),
            "reduce": way.mode,
            **self._spacings(),
            **({"one_lever": True} if self.one_lever else {}),
            **way.shared.named,
            "adaptive": {n: v for n, v in way.adaptive._asdict().items() if n not in ("latents", "verifiers") or v},
            "seed": way.key,
            "panels": self.panels,
            **({"controls": self.controls} if self.controls else {}),
        }

    def _spacings(self) -> dict[str, Any]:
        """What tells grids apart: given spacings, and the timesteps of learned ones."""
        spacings = list(dict.fromkeys(point.settings.spacing for point in self.points))
        if spacings == [None]:
            return {}
        learned = [point.tables.t.tolist() for point in self.points if point.settings.spacing == LEARNED]
        named = spacings[0] if len(spacings) == 1 else spacings
        return {"spacing": named, **({"timesteps": learned} if learned else {})}

    @property
    def shown(self) -> list[Any]:
        return [one for group in self.groups for one in group["shown"]]

    def go(
        self,
        progress: Callable[..., Iterable[int]] | None,
        keep: Callable[[dict[str, Any]], None] | None = None,
        part: Part = Part(0, 1),  # noqa: B008
    ) -> None:
        """Do the groups of images of a part that are still to be done."""
        starts = range(0, len(self.source), self.way.plan.images)
        own = part.block(len(starts))
        starts = starts[own.start : own.stop]
        left = starts[len(self.groups) :]
        self.before = self._measured_before(starts.start, max(self.panels, self.controls)) if left else 0
        units = len(left) * sum(point.settings.evaluations for point in self.points)
        label = f"evaluate {self.way.task}"
        if done := sum(len(group["images"]) for group in self.groups):
            label += f", {done} images are done"
        count = iter(range(units) if progress is None else progress(range(units), units, label))
        for start in left:
            record: dict[str, Any] = {"images": [], "skipped": [], "shown": [], "ranges": {}}
            indices = range(start, min(start + self.way.plan.images, len(self.source)))
            self._add(list(self._readable(indices, record["skipped"], record["ranges"])), record, count)
            self._add_controls(record)
            if keep is not None:
                keep(record)
            self.groups.append(record)
        next(count, None)

    def _add_controls(self, record: dict[str, Any]) -> None:
        """Measure the controls of a group's images, as long as some are wanted."""
        way, point, group = self.way, self.controlled, self._group
        wanted = (
            self.controls - self.before - sum("controls" in image for one in self.groups for image in one["images"])
        )
        asked = [
            (image, raw, name, inputs)
            for image, (index, raw) in list(zip(record["images"], group, strict=True))[: max(wanted, 0)]
            for name, inputs in control_inputs(self.source, index, raw)
        ]
        settings = dataclasses.replace(point.settings, ensemble=way.most)
        raws = (inputs for _, _, _, inputs in asked)
        run = partial(
            way.predictor.sampled,
            task=way.task,
            settings=settings,
            tables=point.tables,
            key=way.key,
            mode=way.mode,
            plan=way.plan,
        )
        answers = with_aspect(run, raws, way.task, settings.aspect, way.predictor.resolution)
        for (image, raw, name, _), estimate in zip(asked, answers, strict=True):
            row = way.measure(estimate, raw)
            row.pop(CONSTANT, None)
            image.setdefault("controls", {})[name] = row

    def _measured_before(self, stop: int, most: int) -> int:
        """How many of the images before number ``stop`` can be evaluated; the count ends at ``most``."""
        found = 0
        for index in range(stop if most else 0):
            with contextlib.suppress(UserError):
                raw = prepare_raw(self.source[index], self.way.protocol)
                found += not unmeasurable(raw, self.way.protocol)
            if found == most:
                break
        return found

    def _readable(
        self, indices: Iterable[int], skipped: list[dict[str, str]], ranges: dict[str, list[float]]
    ) -> Iterator[dict[str, Any]]:
        self._group: list[tuple[int, dict[str, Any]]] = []  # index and sample of those that were taken
        for index in indices:
            try:
                sample = self.source[index]
                widen_depth(ranges, sample)
                raw = prepare_raw(sample, self.way.protocol)
            except UserError as error:
                skipped.append({"key": f"sample {index}", "kind": "unreadable", "reason": str(error)})
                continue
            if reason := unmeasurable(raw, self.way.protocol):
                skipped.append({"key": str(raw["key"]), "kind": "unmeasurable", "reason": reason})
            else:
                self._group.append((index, raw))
                yield raw

    def _add(self, group: list[dict[str, Any]], record: dict[str, Any], count: Iterator[int]) -> None:
        """Evaluate one group of images in every cell."""
        way, aspect, resolution = self.way, self.way.shared.aspect, self.way.predictor.resolution
        boxes: list[list[Box]] = []
        seen: list[_Seen] = []
        if group:
            record["images"] = [
                {"key": str(raw["key"]), "baselines": floors, "cells": []}
                for raw, floors in zip(group, self._baselines(group), strict=True)
            ]
            self._compile_merging()
            pieces = []
            for raw in group:
                where, own = cut(raw, aspect, resolution)
                boxes.append(where)
                pieces += own
            for start in range(0, len(pieces), way.plan.images):
                chunk = pieces[start : start + way.plan.images]
                encode = partial(way.predictor.encode, chunk, way.task, way.plan)
                seen.append((chunk, {views: way.timed(partial(encode, views)) for views in self.views}))
        wanted = max(self.panels - self.before - len(self.shown), 0)
        answers: list[list[tuple[dict[str, Any], Estimate]]] = [[] for _ in group[:wanted]]
        for point in self.points:
            parts = self._sampled(point, seen)
            for i, (raw, where, image) in enumerate(zip(group, boxes, record["images"], strict=True)):
                found = Whole(way, raw, where, list(itertools.islice(parts, len(where))))
                image["cells"] += [found.cell(cell) for cell in point.cells]
                if i < wanted and way_of(point) == way_of(self.points[0]):
                    every = ((cell, found.estimate(cell)) for cell in point.cells[: len(self.sizes)])
                    answers[i] += [(cell, one._replace(members=one.members[:0])) for cell, one in every]
            for _ in range(point.settings.evaluations):
                next(count, None)
        for raw, found in zip(group, answers, strict=False):
            cell, estimate = max(found, key=lambda one: (one[0]["steps"], one[0]["ensemble"]))
            number = self.before + len(self.shown) + len(record["shown"])
            record["shown"].append(self.show(Shown(raw, estimate, cell, tuple(found)), number))

    def _sampled(self, point: Point, seen: list[_Seen]) -> Iterator[Nested]:
        """All members of each picture in ``seen``, in order; few batches of them are held at a time."""
        way, sample = self.way, sample_with_looks if point.looks else sample_all
        total, views = way.predictor.evaluations(point.settings), point.settings.views
        task = get_task(way.task)
        turn = next((one for name, _ in way.adaptive.verifiers if (one := task.verifier(name).reverse)), None)
        for chunk, encoded_as in seen:
            latents, encoding = encoded_as[views]
            sampled = sample(way, point.tables, latents, chunk)._replace(flipped=views != "plain")
            if turn is not None:
                turned = [turn(raw) for raw in chunk]
                encoded, more = way.timed(partial(way.predictor.encode, turned, way.task, way.plan, views))
                other = sample_all(way, point.tables, encoded, turned)
                sampled = sampled._replace(other=other._replace(seconds=other.seconds + more))
            for index, raw in enumerate(chunk):
                yield Nested(way, raw, sampled, index, total, len(chunk), encoding)

    def _compile_merging(self) -> None:
        """Merge once for nothing, so that compiling it is in no cell's time."""
        if self.merging_is_compiled:
            return
        predictor, task, adaptive = self.way.predictor, self.way.task, self.way.adaptive
        side, passes = predictor.resolution, len(get_task(task).passes)
        counts = {*self.sizes, *(adaptive.rounds(self.way.most) if adaptive.tolerances else ())}
        if adaptive.latents or adaptive.verifiers:
            counts.add(1)
        if any(use == "weighted" for _, use in adaptive.verifiers):
            counts |= {2 * size for size in self.sizes}
        for count in sorted(counts):
            members = predictor.decode_members(np.zeros((passes, count, side, side, 3), np.float32), task)
            predictor.merge(members, task, (side, side), self.way.mode)
        self.merging_is_compiled = True

    def _baselines(self, group: list[dict[str, Any]]) -> Iterator[dict[str, dict[str, float]]]:
        """Of each image the trivial answers, and what no model can beat: the truth through the autoencoder and back,
        and for amodal the mask that is found in the true picture."""
        predictor, task, plan = self.way.predictor, self.way.task, self.way.plan
        targets = [
            np.stack([s["target"] for s in get_task(task).encode(whole, predictor.resolution, predictor.options)])
            for whole in (fill_invalid(raw, get_task(task).truth) for raw in group)
        ]
        targets += [targets[0]] * (plan.images - len(group))
        pictures = predictor.round_trip(np.concatenate(targets)).reshape(plan.images, *targets[0].shape)
        for raw, target, carried in zip(group, targets, pictures, strict=False):
            floors = {"autoencoder": carried} | dict.fromkeys(get_task(task).ceilings, target)
            found = dict(baseline_rows(raw, self.way.protocol))
            for name, picture in floors.items():
                # Merged by "median", which leaves a single member as it is.
                members = predictor.decode_members(picture[:, None], task)
                answer = predictor.merge(members, task, raw["image"].shape[:2], "median", raw)
                row = self.way.measure(answer, raw)
                found[name] = {metric: value for metric, value in row.items() if metric != CONSTANT}
            yield found

    def about(self, forward: float) -> dict[str, Any]:
        """What `results.result_of` needs to know of the work besides the images; ``forward``: MACs of a forward."""
        each = forward * len(get_task(self.way.task).passes)
        before = [len(point.cells) for point in self.points[: self.points.index(self.controlled)]]
        return {
            "cells": [cell for point in self.points for cell in point.cells],
            "controlled": sum(before) + len(self.sizes) - 1,  # constant compute with all members
            "macs_per_forward": None if math.isnan(each) else each,
            "macs_per_decode": self.way.predictor.decoder_macs(self.way.task),
        }


def fill_invalid(raw: dict[str, Any], truth: str) -> dict[str, Any]:
    """A sample whose ``truth`` takes the nearest valid pixel's value wherever it is not valid.

    The floor is asked what the autoencoder can carry of the truth; the holes of a sparse truth are not part of it.
    """
    if not truth or "valid" not in raw or raw["valid"].all():
        return raw
    nearest: Any = distance_transform_edt(~raw["valid"], return_distances=False, return_indices=True)
    return {**raw, truth: raw[truth][nearest[0], nearest[1]], "valid": np.ones_like(raw["valid"])}
