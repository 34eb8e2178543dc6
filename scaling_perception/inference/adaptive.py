"""Compute where it helps: members only for images whose prediction still moves, steps only until the estimate rests.

Both work in batches of fixed shapes. Images that are done leave; the others close ranks, in batches of the plan's size
(members) or of the next power of two (steps), so that only a few graphs are ever compiled.

**Members.** With n independent members of spread s (per pixel, on the merged scale), the mean of n and the mean of N
are s sqrt(1/n - 1/N) apart, root mean square; a median is sqrt(pi/2) times as uncertain. An image is done when that
distance over its pixels is within the tolerance: a prediction of how far it would still move, from its own members.

**Steps.** The sampler's clean estimate is the prediction at every step. An image is done when none of its members or
passes changes by more than the tolerance over a chunk of steps, and the estimate is then its result. Only members that
are asked for have a say: those that fill up a batch of the plan's size are not part of the result (``rests``).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from scaling_perception.diffusion.sampler import SamplerTables, State
from scaling_perception.inference.batches import BatchPlan
from scaling_perception.inference.draws import NoiseKeys, draw_members
from scaling_perception.inference.model import Model
from scaling_perception.inference.settings import Settings
from scaling_perception.inference.verifying import score_of_merged, verifier_of
from scaling_perception.support.shapes import Array, Bool, Float, RandomKey, Real
from scaling_perception.tasks.base import Estimate
from scaling_perception.tasks.shapes import Map, Members, Pixels, Spread

_MEDIAN = math.sqrt(math.pi / 2)  # standard error of a median over that of a mean (normal members)
_DEVIATION = 1.4826  # standard deviation over median absolute deviation (normal members)
_POOL = 4  # batches of images that are in work together, so that those that go on can close ranks


def remaining_change(uncertainty: Real[np.ndarray, "..."], members: int, most: int, mean: bool) -> float:
    """Expected root-mean-square distance of the merged prediction of ``members`` members from that of ``most``.

    Args:
        uncertainty: the ensemble's own (H, W): standard deviation for a ``mean``, median absolute deviation otherwise.
    """
    if members >= most:
        return 0.0
    spread = float(np.sqrt(np.mean(np.square(uncertainty, dtype=np.float64))))
    if mean:  # the deviation from the members' own mean is too small by one degree of freedom
        spread *= math.sqrt(members / (members - 1)) if members > 1 else math.inf
    else:
        spread *= _DEVIATION * _MEDIAN if members > 1 else math.inf
    return spread * math.sqrt(1 / members - 1 / most) if spread > 0 else 0.0


def adaptive_stream(
    model: Model,
    raws: Iterable[dict[str, Any]],
    task: str,
    settings: Settings,
    tables: SamplerTables,
    key: RandomKey,
    mode: str,
    plan: BatchPlan,
    watch: Callable[[Estimate], None] | None = None,
) -> Iterator[Estimate]:
    """One estimate for each raw sample, in order. See the module.

    Args:
        watch: of a single sample, called with what its clean latents give at each look of the early exit, and with what
            its members so far give; not with the result.
    """
    samples = iter(raws)
    step = settings.first if settings.tolerance is not None else plan.members
    step = min(step, settings.ensemble)
    while pool := list(itertools.islice(samples, _POOL * plan.images)):
        latents = [
            row
            for start in range(0, len(pool), plan.images)
            for row in np.asarray(model.encode(pool[start : start + plan.images], task, plan, settings.views_seen))
        ][: len(pool)]
        members: list[list[np.ndarray]] = [[] for _ in pool]
        forwards: list[float] = [0] * len(pool)
        estimates, open_images = {}, list(range(len(pool)))
        while open_images:
            done = len(members[open_images[0]])  # all that are open have as many
            for start in range(0, len(open_images), plan.images):
                chosen = open_images[start : start + plan.images]
                group, known = [pool[i] for i in chosen], [latents[i] for i in chosen]
                seen = None
                if watch is not None and len(pool) == 1:
                    seen = partial(_see, watch, model, pool[0], task, mode, members[0], settings.ensemble)
                pixels, steps = _sample(model, group, known, task, settings, tables, key, done, step, plan, seen)
                for image, one, taken in zip(chosen, pixels, steps, strict=True):
                    decoded = model.decode_members(one, task)
                    members[image] += list(decoded[: settings.ensemble - done])
                    forwards[image] += taken * min(step, settings.ensemble - done)
            for image in list(open_images):
                raw, found = pool[image], np.stack(members[image])
                reduced = model.reduce(task, found, mode)
                if is_done(model, raw, task, settings, found, reduced, mode):
                    size = (raw["image"].shape[0], raw["image"].shape[1])
                    estimates[image] = model.merge(found, task, size, mode, raw, forwards[image], reduced)
                    open_images.remove(image)
                elif watch is not None and len(pool) == 1:
                    size = (raw["image"].shape[0], raw["image"].shape[1])
                    watch(model.merge(found, task, size, mode, raw, forwards[image], reduced))
        yield from (estimates[i] for i in range(len(pool)))


def is_done(
    model: Model,
    raw: dict[str, Any],
    task: str,
    settings: Settings,
    members: Members,
    reduced: tuple[Map, Spread],
    mode: str,
) -> bool:
    """Whether an image needs no further members: `settled`, or by the score of a verifier."""
    by = verifier_of(settings, task)
    if by is None or len(members) >= settings.ensemble:
        return settled(reduced[1], len(members), settings.ensemble, mode, settings.tolerance)
    return score_of_merged(model, raw, task, by, members, reduced[0]) <= (settings.tolerance or 0.0)


def settled(uncertainty: Real[np.ndarray, "H W"], members: int, most: int, mode: str, tolerance: float | None) -> bool:
    """Whether an image needs no further members: it has all, or they would hardly move its prediction.

    Args:
        uncertainty: of the merged members, (H, W). Of a single member nothing is known.
        tolerance: None gives every image ``most``.
    """
    if members >= most:
        return True
    if tolerance is None or members < 2:
        return False
    return remaining_change(uncertainty, members, most, mode == "mean") <= tolerance


def estimate_change(
    now: Float[np.ndarray, "I M P h w C"], last: Float[np.ndarray, "I M P h w C"]
) -> Float[np.ndarray, "I M"]:
    """(I, M) change of clean estimates (I, M, P, h, w, C), root mean square of the pass that changes most: what an
    early exit holds against its tolerance."""
    return np.sqrt(np.mean(np.square(now - last), axis=(3, 4, 5))).max(axis=2)


def rests(change: Float[np.ndarray, "I M"], tolerance: float, wanted: int) -> Bool[np.ndarray, " I"]:
    """(I,) whether images take no further steps, by the change (I, M) of their members, the first ``wanted`` of which
    are asked for."""
    return change[:, :wanted].max(axis=1) <= tolerance


def _sample(
    model: Model,
    group: list[dict[str, Any]],
    latents: list[Float[np.ndarray, "h w C"]],
    task: str,
    settings: Settings,
    tables: SamplerTables,
    key: RandomKey,
    first: int,
    count: int,
    plan: BatchPlan,
    seen: Callable[[Pixels], None] | None = None,
) -> tuple[Float[np.ndarray, "I P M R R 3"], list[float]]:
    """Pixels (images of the group, P, M, R, R, 3) of members ``first`` …, and the evaluations that each
    image took."""
    padded = np.stack([*latents, *[latents[0]] * (plan.images - len(latents))])
    draw = draw_members(key, model.image_ids(group, plan.images), first, count, settings.antithetic)
    back = partial(model.as_seen, task=task, latents=padded, first=first)
    if settings.step_tolerance is None:
        pixels = model.engine.sample(*model.weights, padded, draw, model.passes(task), tables)
        return back(np.asarray(pixels)[: len(group)]), [model.evaluations(settings)] * len(group)
    wanted = min(count, settings.ensemble - first)
    shown = None if seen is None else lambda pixels: seen(back(pixels))
    pixels, taken = _until_settled(model, padded, len(group), task, settings, tables, draw, wanted, shown)
    return back(pixels), [*taken]


def _until_settled(
    model: Model,
    latents: Float[np.ndarray, "B h w C"],
    real: int,
    task: str,
    settings: Settings,
    tables: SamplerTables,
    draw: NoiseKeys,
    wanted: int,
    seen: Callable[[Pixels], None] | None,
) -> tuple[Float[np.ndarray, "I P M R R 3"], list[int]]:
    engine, passes, params = model.engine, model.passes(task), model.params
    cond_tokens, modulation_table, state = engine.init_state(params, latents, draw, passes, tables)
    images = list(range(real))  # which image each row of the state is
    cond_tokens, state = _rows(cond_tokens, state, images)
    clean: dict[int, np.ndarray] = {}
    taken = [0] * real
    first, last = 0, None
    while images:
        count = min(settings.step_chunk, settings.steps - first)
        state = engine.run_steps(params, cond_tokens, modulation_table, state, passes.labels, tables, first, count)
        first += count
        now = np.asarray(state.x0)
        at_end = first >= settings.steps
        if seen is not None and not at_end:
            seen(np.asarray(engine.decode(model.weights[1], now, passes))[0])
        if last is None or at_end:
            stops = [at_end] * len(images)
        else:
            stops = [*rests(estimate_change(now, last), settings.step_tolerance or 0.0, wanted)][: len(images)]
        for row, image in enumerate(images):
            if stops[row]:
                clean[image], taken[image] = np.asarray(state.x[row]) if at_end else now[row], first
        going = [row for row in range(len(images)) if not stops[row]]
        images = [images[row] for row in going]
        if images and len(going) < len(stops):
            cond_tokens, state = _rows(cond_tokens, state, going)
        last = now[going] if images else None
        if last is not None and len(state.x) > len(last):  # rows that only fill the bucket
            last = np.concatenate([last, np.repeat(last[:1], len(state.x) - len(last), axis=0)])
    z = np.stack([clean[i] for i in range(real)])
    whole = np.concatenate([z, np.repeat(z[:1], len(latents) - real, axis=0)])
    return np.asarray(engine.decode(model.weights[1], whole, passes))[:real], taken


def _see(
    watch: Callable[[Estimate], None],
    model: Model,
    raw: dict[str, Any],
    task: str,
    mode: str,
    known: list[np.ndarray],
    most: int,
    pixels: Pixels,
) -> None:
    """Show what the finished members and the pixels (P, M, R, R, 3) of those in work give."""
    found = np.stack([*known, *model.decode_members(pixels, task)])[:most]
    size = (raw["image"].shape[0], raw["image"].shape[1])
    watch(model.merge(found, task, size, mode, raw))


def _rows(
    cond_tokens: Float[Array, "I *M P T D"], state: State, rows: list[int]
) -> tuple[Float[Array, "J *M P T D"], State]:
    """The chosen images of a batch, repeated to a power of two (or to the batch's own size, if that is less)."""
    size = min(1 << (len(rows) - 1).bit_length(), cond_tokens.shape[0])
    index = np.asarray([*rows, *[rows[0]] * (size - len(rows))])
    if len(index) == cond_tokens.shape[0] and (index == np.arange(len(index))).all():
        return cond_tokens, state
    return cond_tokens[index], jax.tree.map(lambda array: array[index], state)
