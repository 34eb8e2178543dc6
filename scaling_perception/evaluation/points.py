"""The grid of an evaluation: its points, each of which is sampled once, and the cells that are read off each."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from scaling_perception.diffusion.caching import NO_CACHE
from scaling_perception.diffusion.sampler import SamplerTables
from scaling_perception.diffusion.schedules import LEARNED, PRESETS, DiffusionPreset
from scaling_perception.diffusion.solvers import SOLVERS, solver_name
from scaling_perception.evaluation.nested import Adaptive
from scaling_perception.inference.budgets import OWN
from scaling_perception.inference.predictor import Predictor
from scaling_perception.inference.settings import ALIASES, Settings
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import get_task


class Point(NamedTuple):
    """One sampled point of the grid; all its cells come from one run of the largest ensemble."""

    preset: str
    settings: Settings
    tables: SamplerTables
    looks: bool  # whether the clean estimates between chunks of steps are kept
    cells: tuple[dict[str, Any], ...]


def points_of(
    predictor: Predictor,
    task: str,
    steps: Sequence[int],
    sizes: list[int],
    presets: Sequence[str | None],
    solvers: Sequence[str],
    caches: Sequence[tuple[str, int]],
    mode: str,
    adaptive: Adaptive,
    shared: Settings,
    spacings: Sequence[str | None],
    one_lever: bool = False,
    views: Sequence[str] = ("plain",),
) -> list[Point]:
    """All points of the grid; ``one_lever``: of presets, spacings, solvers and caches, those alone that differ from
    the first of each in one at most, and compute something else than an earlier point; all with every views."""
    points: list[Point] = []
    named = list(dict.fromkeys(ALIASES.get(preset, preset) for preset in presets))
    solvers, spacings = list(dict.fromkeys(map(solver_name, solvers))), list(dict.fromkeys(spacings))
    for preset, spacing in itertools.product(named, spacings):
        diffusion = predictor.choose_diffusion(preset, spacing)
        name = preset or _grid_name(predictor.diffusion)
        for solver, (cache, interval), seen in itertools.product(solvers, caches, views):
            moved = (preset != named[0], spacing != spacings[0], solver != solvers[0], (cache, interval) != caches[0])
            if one_lever and sum(moved) > 1:
                continue
            for count in dict.fromkeys([1] if SOLVERS[solver].at_once else steps):
                more = {"cache": cache, "cache_interval": interval}
                grid = {"steps": count, "ensemble": sizes[-1], "preset": preset, "solver": solver, **more}
                grid |= {"spacing": spacing, "views": seen}
                settings = dataclasses.replace(shared, first=adaptive.first, **grid)
                tables = predictor.tables(settings, task, diffusion)
                if cache != NO_CACHE and tables.cache is None:
                    continue
                if one_lever and any(_same_run(tables, p.tables) for p in points if p.settings.views == seen):
                    continue
                looks = bool(adaptive.step_tolerances) and count > 2 * adaptive.step_chunk
                known = {"preset": name, "spacing": diffusion.spacing, "schedule": diffusion.schedule}
                known |= {"solver": solver, "steps": count, "reduce": mode, **shared.named}
                known |= {} if seen == "plain" else {"views": seen}
                if diffusion.spacing == LEARNED:
                    known |= {"timesteps": tables.t.tolist()}
                if tables.cache is not None:
                    known |= {**more, "evaluations": predictor.evaluations(settings)}
                # one member sees the picture itself: of several views, those after the first leave it out
                several = sizes if seen == views[0] else [size for size in sizes if size > 1]
                if not several:
                    continue
                cells = tuple(_cells(task, known, several, settings, adaptive, looks))
                points.append(Point(name, settings, tables, looks, cells))
    if not points:
        raise UserError("cache: every cell would compute every step: give a shorter cache_interval, or more steps")
    return points


_ONE_STEP = ("t", "x0_x", "x0_out", "limit", "next_x", "next_x0", "sigma")


def _same_run(one: SamplerTables, other: SamplerTables) -> bool:
    """Whether both take the same single step: solvers that look back have nothing to look at in their first."""
    if not len(one.t) == len(other.t) == 1:
        return False
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in _ONE_STEP)


def _cells(
    task: str, known: dict[str, Any], sizes: list[int], settings: Settings, adaptive: Adaptive, looks: bool
) -> Iterator[dict[str, Any]]:
    """The cells of a point. Settings refuse what does not go together."""
    for size in sizes:
        dataclasses.replace(settings, ensemble=size)
        yield {"kind": "constant", **known, "ensemble": size}
    for size in sizes:
        if adaptive.latents and size > 1 and settings.views == "plain":  # one member is decoded as it is
            yield {"kind": "constant", **known, "ensemble": size, "merge_in": "latents"}
    for (name, use), size in itertools.product(dict.fromkeys(adaptive.verifiers), sizes):
        if use != "allocate" and size > 1:  # one member leaves nothing to choose
            twice = get_task(task).verifier(name).reverse is not None
            more = {"evaluations": 2 * known.get("evaluations", settings.evaluations)} if twice else {}
            yield {"kind": "constant", **known, "ensemble": size, "verifier": name, "verify": use, **more}
    allocating = [{"verifier": name, "verify": use} for name, use in adaptive.verifiers if use == "allocate"]
    for tolerance, use in itertools.product(dict.fromkeys(adaptive.tolerances), allocating or [{}]):
        dataclasses.replace(settings, tolerance=tolerance, **use)
        more = {"tolerance": tolerance, "first": adaptive.first}
        yield {"kind": "adaptive", **known, "ensemble": sizes[-1], **more, **use}
    for tolerance in dict.fromkeys(adaptive.step_tolerances):
        dataclasses.replace(settings, step_tolerance=tolerance, step_chunk=adaptive.step_chunk)
        more = {"step_tolerance": tolerance, "step_chunk": adaptive.step_chunk}
        for size in sizes if looks else ():
            yield {"kind": "steps", **known, "ensemble": size, **more}


def point_size(point: Point) -> tuple[int, bool, bool]:
    """What orders points by the memory that they take."""
    cache = point.tables.cache
    return len(point.tables.t), cache is not None, cache is not None and cache.features == "blocks"


def way_of(point: Point) -> tuple[Any, ...]:
    """All of a point's settings but for the number of steps."""
    settings = point.settings
    return point.preset, settings.spacing, settings.solver, settings.cache, settings.cache_interval, settings.views


def _grid_name(own: DiffusionPreset) -> str:
    """The preset whose timesteps a model's own diffusion uses, or ``own``."""
    for name, preset in PRESETS.items():
        if all(
            getattr(own, field) == getattr(preset, field) for field in ("spacing", "steps_offset", "final_alpha_one")
        ):
            return name
    return OWN
