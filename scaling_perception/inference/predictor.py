"""From pictures to predictions in one call; the parts are in ``model``, what may be turned in ``settings``."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from scaling_perception.diffusion.sampler import SamplerTables
from scaling_perception.diffusion.solvers import evaluations
from scaling_perception.inference.adaptive import adaptive_stream
from scaling_perception.inference.aspect import with_aspect
from scaling_perception.inference.batches import BatchPlan
from scaling_perception.inference.draws import draw_members, key_of
from scaling_perception.inference.latents import latent_stream
from scaling_perception.inference.model import Model
from scaling_perception.inference.prediction import Prediction
from scaling_perception.inference.settings import Settings, check_together
from scaling_perception.inference.verifying import verified, verifier_of
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.shapes import RandomKey
from scaling_perception.tasks.base import Estimate


class Predictor(Model):
    """A trained model with its autoencoder, ready to be called on pictures."""

    def __call__(
        self,
        images: Any,
        task: str = "depth",
        steps: int = 10,
        ensemble: int = 5,
        key: int | RandomKey = 0,
        prompt: Any = None,
        preset: str | None = None,
        spacing: str | None = None,
        reduce: str | None = None,
        batch_size: int | None = None,
        **more: Any,
    ) -> Prediction:
        """Predict. Safe to call from several threads.

        Args:
            images: one picture or several (list, tuple, or an array (B, H, W, C), of NumPy or JAX): paths, PIL
                pictures, or arrays (H, W[, C]) of uint8, uint16 or float in [0, 1]. Sizes may differ; results are as
                large as the pictures.
            task: a task that the model knows.
            key: integer or JAX key; the same key gives the same prediction.
            prompt: flow: the second frame of each image; amodal: the mask of the object's visible part.
            steps, ensemble, preset, spacing, reduce, more: see ``inference.settings.Settings``; ``more``: solver,
                eta, clip, antithetic, views, aspect, tolerance, first, step_tolerance, step_chunk, cache,
                cache_interval, merge_in, verifier or verify.
            batch_size: images × members sampled at once; None chooses by memory. When given, short batches are padded
                to it, so that calls of any length share one graph.

        Raises:
            UserError: an unreadable picture, a missing prompt, or a setting that is unknown, impossible or of another
                type.
        """
        fields = [field.name for field in dataclasses.fields(Settings)]
        for name in more:
            if name not in fields:
                raise TypeError(f"unknown setting '{name}'{did_you_mean(name, fields)}")
        check_together(more)
        given = {"preset": preset, "spacing": spacing, "reduce": reduce}
        settings = Settings(steps=steps, ensemble=ensemble, **given, **more)
        several = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4  # of numpy or JAX
        raws = self.raw_inputs(list(images) if several else [images], task, prompt if several else [prompt])
        parts = list(self.stream(raws, task, settings, key, batch_size, len(raws)))
        return Prediction(task, parts, self.macs(task, 1, 1), self.options, single=not several)

    def intermediates(
        self,
        image: Any,
        task: str = "depth",
        at: Sequence[int] = (0, -1),
        key: int | RandomKey = 0,
        prompt: Any = None,
        **settings: Any,
    ) -> list[Prediction]:
        """The prediction as it would be if sampling stopped after each of the steps ``at`` (supplement Fig. 1).

        Args:
            at: numbers of steps, 0 is the first; negative ones count from the end. All come from one run.
            settings: as for calling the predictor (steps, ensemble, …), squashing and without tolerances.

        Raises:
            UserError: as calling; a step that is not there.
        """
        check_together(settings)
        chosen = Settings(**settings)
        if chosen.adaptive or chosen.aspect != "squash" or chosen.merge_in != "pixels" or chosen.verifier:
            raise UserError("intermediates go with neither tolerance, aspect, merge_in nor verifier: leave them out")
        steps = [step + chosen.steps if step < 0 else step for step in at]
        if not steps or len(set(steps)) < len(steps) or not set(steps) <= set(range(chosen.steps)):
            raise UserError(f"steps {list(at)} to look at: give different ones in 0..{chosen.steps - 1}")
        (raw,) = raws = self.raw_inputs([image], task, [prompt])
        diffusion = self.choose_diffusion(chosen.preset, chosen.spacing)
        mode = chosen.reduce_for(task)
        tables = self.tables(chosen, task, diffusion)
        plan = BatchPlan(1, chosen.ensemble)
        draw = draw_members(key_of(key), self.image_ids(raws, 1), 0, chosen.ensemble, chosen.antithetic)
        latents = self.encode(raws, task, plan, chosen.views_seen)
        rows = tuple(evaluations(chosen.solver, step + 1) - 1 for step in steps)
        kept = np.asarray(self.engine.sample(*self.weights, latents, draw, self.passes(task), tables, rows))
        found, size = [], (raw["image"].shape[0], raw["image"].shape[1])
        for step, pixels in zip(steps, kept, strict=True):
            members = self.decode_members(self.as_seen(pixels[0], task, latents), task)
            forwards = self.evaluations(dataclasses.replace(chosen, steps=step + 1)) * chosen.ensemble
            estimate = self.merge(members, task, size, mode, raw, forwards)
            found.append(Prediction(task, [estimate], self.macs(task, 1, 1), self.options, single=True))
        return found

    def stream(
        self,
        raws: Iterable[dict[str, Any]],
        task: str,
        settings: Settings,
        key: int | RandomKey = 0,
        batch_size: int | None = None,
        count: int | None = None,
        watch: Callable[[Estimate], None] | None = None,
    ) -> Iterator[Estimate]:
        """One result for each raw sample, in order; holds few batches of samples at a time.

        Args:
            count: how many samples there are, if that is known: short runs then take smaller batches.
            watch: called with what the members so far give, where one sample's members come in several batches
                (``batch_size``) or rounds, and with what its steps so far give at each look of an early exit; squashed,
                and not with the last, which is the result.
        """
        key, mode = key_of(key), settings.reduce_for(task)
        in_latents = settings.merge_in == "latents" and settings.ensemble > 1  # one member is decoded as usual
        tables = self.tables(settings, task, self.choose_diffusion(settings.preset, settings.spacing))
        if settings.aspect == "tile":
            count = None  # windows: more than there are samples
        members = min(settings.first, settings.ensemble) if settings.tolerance is not None else settings.ensemble
        plan = self.plan(task, members, count or 10**9, batch_size, tables, not in_latents, settings.views_seen)
        seen = watch if settings.aspect == "squash" else None  # else these are parts of a picture, or padded
        how: dict[str, Any] = {"task": task, "settings": settings, "tables": tables, "key": key, "mode": mode}
        of = partial(adaptive_stream if settings.adaptive else latent_stream, self)
        run = partial(of if settings.adaptive or in_latents else self.sampled, **how, plan=plan, watch=seen)
        yield from with_aspect(run, raws, task, settings.aspect, self.resolution)

    def sampled(
        self,
        raws: Iterable[dict[str, Any]],
        task: str,
        settings: Settings,
        tables: SamplerTables,
        key: int | RandomKey,
        mode: str,
        plan: BatchPlan,
        watch: Callable[[Estimate], None] | None = None,
    ) -> Iterator[Estimate]:
        """One result for each raw sample, squashed and with constant compute, in the batches of ``plan``.

        Args:
            watch: see `stream`.
        """
        key = key_of(key)
        samples, each = iter(raws), self.evaluations(settings)
        by = verifier_of(settings, task)

        def sample(group: list[dict[str, Any]], watch: Any = None) -> np.ndarray:
            latents = self.encode(group, task, plan, settings.views_seen)
            return self.sample(latents, group, task, settings.ensemble, tables, key, plan, settings.antithetic, watch)

        def merged(raw: dict[str, Any], pixels: np.ndarray, other: np.ndarray | None = None) -> Estimate:
            members, reduced, times = self.decode_members(pixels, task), None, 1
            if by is not None:
                back = None if other is None else self.reduce(task, self.decode_members(other, task), mode)[0]
                reduced, times = verified(self, raw, task, settings, members, mode, back), 1 if back is None else 2
            spent = each * len(members) * times
            return self.merge(members, task, raw["image"].shape[:2], mode, raw, spent, reduced)

        while group := list(itertools.islice(samples, plan.images)):
            others: Any = [None] * len(group)
            if by is not None and by.reverse is not None and settings.ensemble > 1:
                others = sample([by.reverse(raw) for raw in group])
            seen = None
            if watch is not None and len(group) == 1:
                seen = partial(_see, watch, partial(merged, group[0], other=others[0]))
            for raw, one, other in zip(group, sample(group, seen), others, strict=True):
                yield merged(raw, one, other)


def _see(watch: Callable[[Estimate], None], merged: Callable[[np.ndarray], Estimate], pixels: np.ndarray) -> None:
    watch(merged(pixels[0]))
