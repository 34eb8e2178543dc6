"""One run of the largest ensemble, read in every way: smaller ensembles, adaptive members, early exits.

Members do not depend on how many there are, and an image's trajectory does not depend on when others stop. So with all
members, and the clean estimates between chunks of steps, at hand, what `adaptive` would have done for any tolerance is
known: its own rules are asked for it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from scaling_perception.diffusion.sampler import SamplerTables
from scaling_perception.evaluation.protocols import measure
from scaling_perception.inference.adaptive import estimate_change, is_done, rests
from scaling_perception.inference.aspect import Box, join
from scaling_perception.inference.batches import BatchPlan
from scaling_perception.inference.draws import draw_members, mirrored_back
from scaling_perception.inference.latents import decode_merged, estimate, sample_latents
from scaling_perception.inference.predictor import Predictor
from scaling_perception.inference.settings import Settings
from scaling_perception.inference.verifying import verified
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import get_task
from scaling_perception.tasks.base import Estimate


class Adaptive(NamedTuple):
    """What else is made of the members than merging so many of them. All as in ``inference.settings.Settings``.

    Attributes:
        tolerances: of adaptive members, in rounds of ``first``.
        step_tolerances: of early exits, looked at every ``step_chunk``.
        latents: whether members are merged as latents too.
        verifiers: pairs of a verifier and its use.
    """

    tolerances: tuple[float, ...] = ()
    first: int = 2
    step_tolerances: tuple[float, ...] = ()
    step_chunk: int = 2
    latents: bool = False
    verifiers: tuple[tuple[str, str], ...] = ()

    def rounds(self, most: int) -> list[int]:
        """Members after each round of at most ``most``."""
        return [*range(self.first, most, self.first), most]


CONSTANT = "constant_prediction"
"""Key in an image's row where the model's answer is the same at every pixel, which a fit turns into the mean."""


class SweepContext(NamedTuple):
    """What is the same for all images: ``most`` members, merged by ``mode``; noise of ``key``; batches of ``plan``;
    of ``shared`` the settings that are not of the grid."""

    predictor: Predictor
    task: str
    protocol: dict[str, Any]
    mode: str
    most: int
    adaptive: Adaptive
    key: int
    plan: BatchPlan
    shared: Settings = Settings()

    def measure(self, estimate: Estimate, raw: Mapping[str, Any]) -> dict[str, float]:
        """The metrics of one image, and ``CONSTANT`` where the prediction is the same everywhere.

        Raises:
            UserError: the prediction is not finite.
        """
        try:
            found = measure(estimate.prediction, dict(raw), self.protocol, painted=estimate.painted)
            return found | ({CONSTANT: 1.0} if (estimate.prediction == estimate.prediction[0, 0]).all() else {})
        except ValueError as error:
            raise UserError(f"{raw['key']}: {error}: the weights are broken or do not fit the sampler") from None

    def timed(self, function: Callable[[], Any]) -> tuple[Any, float]:
        """The result and its seconds, without those spent compiling."""
        begin, compiling = time.perf_counter(), self.predictor.compile_seconds
        value = jax.block_until_ready(function())
        return value, time.perf_counter() - begin - (self.predictor.compile_seconds - compiling)


class Sampled(NamedTuple):
    """All members of a group of images.

    Attributes:
        pixels: (I, P, N, R, R, 3).
        seconds, decoding: of sampling them, and of the autoencoder where it was timed apart (else 0).
        steps: when each look before the end is taken.
        clean: of each look, the clean estimates (I, N, P, h, w, C).
        change: of each look, (I, N) from the one before; infinite for the first.
        latents: of all members, clean, (I, N, P, h, w, C), where they are merged as such.
        other: the same of the inputs the other way round, where a verifier wants it.
        flipped: whether every second member saw the mirror image; pixels are mirrored back, what is clean is not.
    """

    pixels: np.ndarray
    seconds: float
    decoding: float = 0.0
    steps: tuple[int, ...] = ()
    clean: tuple[np.ndarray, ...] = ()
    change: tuple[np.ndarray, ...] = ()
    latents: np.ndarray | None = None
    other: Sampled | None = None
    flipped: bool = False


def sample_all(way: SweepContext, tables: SamplerTables, latents: Any, group: list[dict[str, Any]]) -> Sampled:
    """All members of the group in one piece, decoded apart where latents are merged: nothing is said of early exits."""
    arguments = (latents, group, way.task, way.most, tables, way.key, way.plan, way.shared.antithetic)
    if not way.adaptive.latents:
        return Sampled(*way.timed(lambda: way.predictor.sample(*arguments)))
    engine, passes, at_once = way.predictor.engine, way.predictor.passes(way.task), way.plan.members
    clean, sampling = way.timed(lambda: sample_latents(way.predictor, *arguments))
    filled = np.concatenate([clean, *[clean[:, :1]] * (-way.most % at_once)], axis=1)  # whole batches, as they are made
    parts, decoding = way.timed(
        lambda: [
            np.asarray(engine.decode(way.predictor.weights[1], filled[:, first : first + at_once], passes))
            for first in range(0, way.most, at_once)
        ]
    )
    pixels = np.concatenate(parts, axis=2)[: len(group), :, : way.most]
    pixels = way.predictor.as_seen(pixels, way.task, latents)
    return Sampled(pixels, sampling, decoding, latents=clean[: len(group)])


def sample_with_looks(way: SweepContext, tables: SamplerTables, latents: Any, group: list[dict[str, Any]]) -> Sampled:
    """The same in chunks of ``step_chunk`` steps, with a look after each."""
    engine, passes, (params, vae) = way.predictor.engine, way.predictor.passes(way.task), way.predictor.weights
    ids, total, chunk = way.predictor.image_ids(group, way.plan.images), len(tables.t), way.adaptive.step_chunk
    looks = range(chunk, total, chunk)

    def steps(first: int) -> tuple[np.ndarray, list[np.ndarray]]:
        draw = draw_members(jax.random.key(way.key), ids, first, way.plan.members, way.shared.antithetic)
        cond_tokens, modulation_table, state = engine.init_state(params, latents, draw, passes, tables)
        clean = []
        for done in range(0, total, chunk):
            count = min(chunk, total - done)
            state = engine.run_steps(params, cond_tokens, modulation_table, state, passes.labels, tables, done, count)
            clean.append(np.asarray(state.x0))
        return np.asarray(state.x), clean[: len(looks)]

    parts, sampling = way.timed(lambda: [steps(first) for first in range(0, way.most, way.plan.members)])
    pixels, decoding = way.timed(lambda: [np.asarray(engine.decode(vae, x, passes)) for x, _ in parts])
    pixels = way.predictor.as_seen(np.concatenate(pixels, axis=2)[: len(group), :, : way.most], way.task, latents)
    whole = np.concatenate([np.asarray(x) for x, _ in parts], axis=1)[: len(group), : way.most]
    clean = [
        np.concatenate(look, axis=1)[: len(group), : way.most] for look in zip(*[p[1] for p in parts], strict=True)
    ]
    change = [np.full(clean[0].shape[:2], np.inf), *map(estimate_change, clean[1:], clean)]
    return Sampled(pixels, sampling, decoding, tuple(looks), tuple(clean), tuple(change), whole)


class InLatents(NamedTuple):
    """The name of an estimate: ``size`` members merged as latents."""

    size: int


class Verified(NamedTuple):
    """The name of an estimate: ``size`` members of which a verifier chooses."""

    size: int
    verifier: str
    use: str


class Nested:
    """What every cell makes of the members of one picture that the model sees. Nothing is merged twice."""

    def __init__(
        self,
        way: SweepContext,
        raw: dict[str, Any],
        sampled: Sampled,
        index: int,
        total: float,
        images: int,
        encoding: float,
    ) -> None:
        """Args: image ``index`` of the ``images`` in ``sampled``; evaluations ``total``; seconds of encoding all."""
        self.way, self.raw, self.sampled, self.index, self.total = way, raw, sampled, index, total
        self._encoding, self._sampling, self._decoding = (
            seconds / images for seconds in (encoding, sampled.seconds, sampled.decoding)
        )
        begin = time.perf_counter()
        self.members = way.predictor.decode_members(sampled.pixels[index], way.task)
        self._decoding += time.perf_counter() - begin
        self._early: dict[tuple[int, int], np.ndarray] = {}
        self._merged: dict[Any, np.ndarray] = {}
        self.other = None
        if sampled.other is not None:
            self.other = Nested(way, raw, sampled.other, index, total, images, 0.0)
        self._latent: dict[int, tuple[Estimate, float]] = {}
        self._reduced: dict[Any, tuple[tuple[np.ndarray, np.ndarray], float]] = {}

    def cell(self, cell: Mapping[str, Any]) -> tuple[float, float, Any]:
        """Network evaluations of each pass, seconds without merging, and the name of the estimate."""
        if cell["kind"] == "adaptive":
            return self.adaptive(cell["tolerance"], cell.get("verifier"))
        if cell["kind"] == "steps":
            return self.stopped(cell["ensemble"], cell["step_tolerance"])
        if "verifier" in cell:
            return self.verified(cell["ensemble"], cell["verifier"], cell["verify"])
        if cell.get("merge_in") == "latents":
            return self.in_latents(cell["ensemble"])
        return self.fixed(cell["ensemble"])

    def fixed(self, size: int) -> tuple[float, float, Any]:
        """An ensemble of ``size``."""
        self._merged[size] = self.members[:size]
        return self.total * size, self._seconds(size, self.total * size), size

    def in_latents(self, size: int) -> tuple[float, float, Any]:
        """An ensemble of ``size``, merged as latents and decoded once."""
        forwards, name = self.total * size, InLatents(size)
        return forwards, self._seconds(size, forwards, decoded=0) + self._in_latents(size)[1], name

    def _in_latents(self, size: int) -> tuple[Estimate, float]:
        """The estimate, and the seconds of making it of the latents."""
        if size not in self._latent:
            way, every = self.way, self.sampled.latents
            assert every is not None
            mode, members = dataclasses.replace(way.shared, merge_in="latents").reduce_for(way.task), every[self.index]

            def merged() -> Estimate:
                found = decode_merged(way.predictor, members[None, :size], way.task, mode)
                return estimate(way.predictor, self.raw, tuple(one[0] for one in found), way.task, mode, 0)

            self._latent[size] = way.timed(merged)
        return self._latent[size]

    def verified(self, size: int, verifier: str, use: str) -> tuple[float, float, Any]:
        """An ensemble of ``size`` of which a verifier chooses."""
        forwards, name = self.total * size, Verified(size, verifier, use)
        self._merged[name] = self.members[:size]
        seconds = self._seconds(size, forwards)
        if (other := self._other(name)) is None:
            return forwards, seconds, name
        return 2 * forwards, seconds + other._seconds(size, forwards), name

    def _other(self, name: Verified) -> Nested | None:
        """The members the other way round, where the verifier needs them."""
        return None if get_task(self.way.task).verifier(name.verifier).reverse is None else self.other

    def adaptive(self, tolerance: float, verifier: str | None = None) -> tuple[float, float, Any]:
        """Members until the prediction rests, or until a verifier's score is within the tolerance."""
        way, rounds, deciding = self.way, self.way.adaptive.rounds(self.way.most), 0.0
        use = {} if verifier is None else {"verifier": verifier, "verify": "allocate"}
        settings = dataclasses.replace(way.shared, ensemble=way.most, tolerance=tolerance, **use)
        for size in rounds:
            forwards, seconds, name = self.fixed(size)
            reduced, spent = self._reduce(name)
            begin = time.perf_counter()
            done = is_done(way.predictor, self.raw, way.task, settings, self.members[:size], reduced, way.mode)
            deciding += time.perf_counter() - begin
            if done:
                break
            deciding += spent
        return forwards, seconds + deciding, name

    def stopped(self, size: int, tolerance: float) -> tuple[float, float, Any]:
        """Steps until the estimate rests. Members that are sampled together stop together, as the predictor has it."""
        looks, at_once = self.sampled, self.way.plan.members
        parts, stops, forwards = [], [], 0
        for first in range(0, size, at_once):
            members = slice(first, min(first + at_once, size))
            own = slice(self.index, self.index + 1)
            calm = [bool(rests(change[own, members], tolerance, size)[0]) for change in looks.change]
            stop = calm.index(True) if any(calm) else None
            stops.append(stop)
            forwards += (self.total if stop is None else looks.steps[stop]) * (members.stop - members.start)
            parts.append(self.members[members] if stop is None else self._at(stop, first)[: members.stop - first])
        name = size if set(stops) == {None} else (size, *stops)
        self._merged[name] = np.concatenate(parts)
        return forwards, self._seconds(size, forwards), name

    def estimate(self, name: Any) -> tuple[Estimate, float]:
        """The members of that name merged, and the seconds of merging."""
        if isinstance(name, InLatents):
            return self._in_latents(name.size)[0], 0.0
        way, size = self.way, self.raw["image"].shape[:2]
        reduced, seconds = self._reduce(name)
        begin = time.perf_counter()
        merged = way.predictor.merge(self._merged[name], way.task, size, way.mode, self.raw, 0, reduced)
        return merged, seconds + time.perf_counter() - begin

    def _reduce(self, name: Any) -> tuple[tuple[np.ndarray, np.ndarray], float]:
        """Prediction and uncertainty at the model's resolution, and the seconds it took."""
        if name not in self._reduced:
            begin = time.perf_counter()
            if isinstance(name, Verified):
                reduced = self._verify(name)
            else:
                reduced = self.way.predictor.reduce(self.way.task, self._merged[name], self.way.mode)
            self._reduced[name] = reduced, time.perf_counter() - begin
        return self._reduced[name]

    def _verify(self, name: Verified) -> tuple[np.ndarray, np.ndarray]:
        way, other = self.way, self._other(name)
        settings = dataclasses.replace(way.shared, verifier=name.verifier, verify=name.use)
        back = None
        if other is not None:
            other.fixed(name.size)
            back = other._reduce(name.size)[0][0]
        return verified(way.predictor, self.raw, way.task, settings, self._merged[name], way.mode, back)

    def _seconds(self, size: int, forwards: float, decoded: int | None = None) -> float:
        """Encoding, and the share of sampling and decoding (of ``decoded`` members; None: all) that is this cell's."""
        share = (size if decoded is None else decoded) / self.way.most
        return self._encoding + self._sampling * forwards / (self.total * self.way.most) + self._decoding * share

    def _at(self, stop: int, first: int) -> np.ndarray:
        """The members that are sampled together with member ``first``, as they are at a look."""
        if (stop, first) not in self._early:
            way = self.way
            clean = self.sampled.clean[stop][self.index, first : first + way.plan.members]
            filled = np.concatenate([clean, np.repeat(clean[:1], way.plan.members - len(clean), axis=0)])[None]
            found = way.predictor.engine.decode(way.predictor.weights[1], filled, way.predictor.passes(way.task))
            pixels = np.asarray(found)[0, :, : len(clean)]
            pixels = mirrored_back(pixels, way.task, first) if self.sampled.flipped else pixels
            self._early[stop, first] = way.predictor.decode_members(pixels, way.task)
        return self._early[stop, first]


class Whole:
    """What every cell makes of one image, of the pictures that the model sees of it (one, but for windows)."""

    def __init__(self, way: SweepContext, raw: dict[str, Any], boxes: list[Box], parts: Sequence[Nested]) -> None:
        self.way, self.raw, self.boxes, self.parts = way, raw, boxes, parts
        self._rows: dict[tuple[Any, ...], tuple[dict[str, float], float]] = {}

    def cell(self, cell: Mapping[str, Any]) -> tuple[float, float, dict[str, float]]:
        """Network evaluations of each pass, seconds, metrics."""
        forwards, seconds, names = zip(*(part.cell(cell) for part in self.parts), strict=True)
        if names not in self._rows:
            estimate, merging = self._join(names)
            self._rows[names] = self.way.measure(estimate, self.raw), merging
        row, merging = self._rows[names]
        return sum(forwards), sum(seconds) + merging, row

    def estimate(self, cell: Mapping[str, Any]) -> Estimate:
        """The image's result in a cell."""
        return self._join([part.cell(cell)[2] for part in self.parts])[0]

    def _join(self, names: Sequence[Any]) -> tuple[Estimate, float]:
        found = [part.estimate(name) for part, name in zip(self.parts, names, strict=True)]
        begin, size = time.perf_counter(), (self.raw["image"].shape[0], self.raw["image"].shape[1])
        whole = join(self.way.task, self.way.shared.aspect, size, self.boxes, [estimate for estimate, _ in found])
        return whole, sum(seconds for _, seconds in found) + time.perf_counter() - begin
