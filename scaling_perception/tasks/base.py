"""What a task is: one object that holds everything the rest of the package asks about it.

A task's file defines functions and, at its end, one ``Task`` made of them. Everything else looks tasks up by name
(``tasks.get_task``) and never compares the name: what differs between tasks is a field of this class.

Shapes: M members, P passes, R the side of the model's square, (H, W) native size, C channels of an answer.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from jaxtyping import Float, Real, Shaped

from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.tasks.resize import resize_bilinear
from scaling_perception.tasks.shapes import Colours, Map, Mask, Members, Native, Pixels, Plain, Size, Spread
from scaling_perception.tasks.verifiers import Verifier

if TYPE_CHECKING:
    import jax

FIELDS: tuple[str, ...] = ("image", "prompt", "target")
"""The pictures of a training sample, for a task that does not name its own."""

VALID_MINIMUM = 10
"""Valid pixels below which a sample says nothing: a fit of scale and shift passes through two of them anyway."""

WEIGHT = "_pixels"
"""Suffix of an entry of ``measure`` that is no metric: the weight of the metric before it in a mean over images."""

Raw = Mapping[str, Any]
Traced: TypeAlias = "jax.Array"  # shapes: `tasks.pixel_losses`, which imports JAX


class Pass(NamedTuple):
    """One diffusion pass of a task: a picture that the network makes.

    Attributes:
        name: unique among all tasks; caches, model folders and logs call it so.
        id: the number stored in cached records and batches (``pass_id``). Never reused or changed.
        mirrored: what the target's channels are multiplied by when a sample is seen in a mirror (left to right).
    """

    name: str
    id: int
    mirrored: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def mirror(self, target: Real[np.ndarray, "R R 3"]) -> Real[np.ndarray, "R R 3"]:
        """A target picture (R, R, 3) as seen in a mirror. Doing it twice gives the same picture again."""
        turned = np.ascontiguousarray(target[:, ::-1])
        return turned if min(self.mirrored) > 0 else turned * np.asarray(self.mirrored, target.dtype)


class Prompt(NamedTuple):
    """What a task needs besides the picture.

    Attributes:
        field: its name in a raw sample.
        words: what it is, for messages.
        frame: whether it is another picture (the next frame), or a mask of the same picture.
        cli: how a command line names it.
    """

    field: str
    words: str
    frame: bool
    cli: str

    def example(self, side: int) -> Shaped[np.ndarray, "{side} {side} *C"]:
        """A prompt (side, side[, 3]) that asks for nothing in particular, to measure times with."""
        return np.full((side, side, 3), 127, np.uint8) if self.frame else np.ones((side, side), bool)


class Metric(NamedTuple):
    """The metric that a task is judged by: its name, how it is written, and whether less is better."""

    name: str
    label: str
    less_is_better: bool

    def error(self, value: float) -> float:
        """The metric as an error: less is better."""
        return value if self.less_is_better else 1 - value

    def error_limits(self, limits: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
        """The least and the most that the metric as an error can be, by the limits of metrics."""
        least, most = sorted(map(self.error, limits.get(self.name, (-math.inf, math.inf))))
        return least, most

    @property
    def error_name(self) -> str:
        return self.name if self.less_is_better else f"1-{self.name}"

    @property
    def error_label(self) -> str:
        return self.label if self.less_is_better else f"1 − {self.label}"


class Estimate(NamedTuple):
    """One image's result, at the size of the model's own pictures where not said otherwise."""

    prediction: Native  # native size
    uncertainty: Float[np.ndarray, "H W"]  # native size
    members: Members
    whole: Float[np.ndarray, "H W 3"] | None  # native; only of tasks that paint a picture and make their answer of it
    size: Size
    forwards: float = 0  # network evaluations that each pass took, steps × members; see ``Model.evaluations``
    painted: Mask | None = None  # native size: the answer made of ``whole`` alone, without the prompt


class Answer(NamedTuple):
    """A merged map made into the task's answer at native size, see ``Estimate``."""

    prediction: Native
    whole: Float[np.ndarray, "H W 3"] | None = None
    painted: Mask | None = None


class File(NamedTuple):
    """One file of a result.

    Attributes:
        end: what is put behind the result's name.
        writer: how it is written, a name of ``inference.outputs.WRITERS``.
        array: what is written of an ``Estimate``.
    """

    end: str
    writer: str
    array: Callable[[Estimate], Native]


class Scale(NamedTuple):
    """What the colours of a picture mean.

    Attributes:
        words: what is drawn, in words.
        unit: of ``low`` and ``high``, such as ``px``.
        low, high: values of the first and last colour, None where there is no bar of colours.
        colours: the map of colours, by matplotlib's name.
    """

    words: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    colours: str = ""


View = Callable[[Estimate, Colours], Colours]
"""(estimate, picture) -> what a person looks at."""


Encode = Callable[[Raw, int, Any], list[dict[str, Any]]]
Conditions = Callable[[Raw, int, Any], dict[str, Map]]
Decode = Callable[[Pixels, Size, Any], Members]
Merge = Callable[[Members, str, Any], tuple[Map, Spread]]
PixelLoss = Callable[[Traced, Traced, Traced, Any], Traced]
Refine = Callable[[Map, Raw, Any], Map]
Restore = Callable[[Map, Size, Any, Native | None], Answer]


class Measure(Protocol):
    def __call__(
        self,
        prediction: Native,
        raw: Raw,
        protocol: Mapping[str, Any],
        /,
        fitted: bool = False,
        painted: Mask | None = None,
    ) -> dict[str, float]: ...


def lazily(module: str, name: str) -> Callable[..., Any]:
    """A function of another module of tasks, which imports JAX, when it is called: data workers load tasks without."""
    return lambda *arguments: getattr(importlib.import_module(f"scaling_perception.tasks.{module}"), name)(*arguments)


def prediction_of(estimate: Estimate) -> Native:
    """What most files hold: the prediction itself."""
    return estimate.prediction


def plain_native(array: Real[np.ndarray, "R R *C"], size: Size, options: Any = None) -> Float[np.ndarray, "H W *C"]:
    """A map (R, R[, C]) at native size (H, W): bilinear, values as they are."""
    return resize_bilinear(array, size)


def nothing_to_check(raw: Raw) -> None:
    """Any input will do."""


def same_truth(raw: dict[str, Any], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The sample as it is."""
    return raw


def few_valid(raw: Raw, protocol: Mapping[str, Any]) -> str:
    """Why a sample with a ``valid`` mask has no figure; empty if enough pixels are valid."""
    count, least = int(raw["valid"].sum()), protocol.get("minimum_valid", 1)
    if not count:
        return "no valid pixel within range and crop"
    if count < least:
        return f"{count} valid pixel(s) within range and crop: fewer than {least}, which any prediction fits"
    return ""


def no_panels(raw: Raw, estimate: Estimate, protocol: Mapping[str, Any]) -> dict[str, Colours]:
    """No pictures besides those that every task has."""
    return {}


def no_picture(prediction: Native, scale: float | None) -> Colours:
    """For a task that predicts nothing of a picture."""
    raise ValueError("this task has no frames to show")


def no_scales(raw: Raw, protocol: Mapping[str, Any]) -> dict[str, Scale]:
    """Nothing is known of the colours."""
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Everything that is known about a task. Fields with a default may be left out.

    What the network is trained on:

    Attributes:
        name: as users write it.
        passes: its passes, in the order in which ``decode_prediction`` expects them.
        encode: (raw sample, R, options) -> one training sample a pass: image, prompt, target float32 (R, R, 3) in
            [-1, 1]; valid bool (R, R); pass_id, label int32; key. UserError names a sample that lacks something.
        conditions: (raw sample, R, options) -> image and prompt alone, which is all that prediction needs.
        fields: the pictures of its samples. A task with the target alone has no conditions: nothing can be predicted
            from a picture, so the fields below do not matter.
        prompt: what it needs besides the picture, None where that is nothing.
        columns, optional_columns, one_of: file columns that a folder of a person's own data must have, may have, and
            must have one of.
        pictures: fields of a raw sample that must be 8-bit RGB.
        truth: the dense field (H, W[, C]) of a raw sample that answers are compared with; '' where there is none.
        ranges: what ``inspect`` finds -> its unit.
        inspect: (raw sample, (H, W)) -> value ranges of the truth. UserError: it cannot be learned from.
        loss: what a decoded picture costs, in JAX: (prediction (R, R, 3), truth (R, R, 3), valid (R, R), options) ->
            float32 () of one pass of one sample (``tasks.pixel_losses``); None where there is none.
        default: taken where a data set serves it and no task was named.
        dataset: what it is usually trained on.

    From pictures to an answer:
        check: UserError for a raw input that asks for nothing.
        decode_prediction: (pixels (P, M, R, R, 3), (H, W), options) -> members (M, H, W[, C]).
        reduce_modes: ways of merging members; the first is the default.
        latent_modes: those of them by which latents can be merged (``inference.latents``).
        merge: (members (M, R, R[, C]), mode, options) -> (merged (R, R[, C]), uncertainty (R, R)).
        verifiers: scores of members that need no truth, by name (``tasks.verifiers``).
        native: (map (R, R[, C]), (H, W), ``TaskOptions``) -> the same at native size, in native units.
        refine: (merged, raw input, options) -> the map in more detail (R', R'[, C]), by looking at the input again.
        restore: (merged, (H, W), options, the prompt or None) -> ``Answer``; None: the map itself by ``native``.
        relative: whether the answer is known up to scale and shift: parts of a picture are fitted to the whole, and
            a part of an answer is stretched to [0, 1] again.
        flags: those of ``predict`` that belong to this task.
        files: name of a format -> kind of file -> ``File``.
        usual_files: the formats that are written unasked.
        views: ways of showing an answer, by name; the first is the default.
        member_picture: a member at native size (H, W[, C]) as uint8 RGB (H, W, 3).

    How it is measured:
        protocol: what decides a figure (``evaluation.protocols``).
        sizes: how sizes are matched, in words.
        metrics: every metric; ``protocol["metrics"]`` are those shown unasked.
        more_is_better: those of them of which more is better.
        limits: metric -> the least and the most that it can be, where intervals end.
        reported: metrics that ``evaluate`` reports besides.
        main: the metric that it is judged by.
        prepare: (raw sample, protocol) -> the sample as measured.
        unmeasurable: (prepared sample, protocol) -> why it has no figure, or ''.
        measure: (prediction, prepared sample, protocol, fitted, painted) -> every metric.
        baselines: prepared sample -> trivial answers at native size, by name.
        baseline_names: trivial answer or ceiling -> what it is, in words.
        ceilings: further ceilings that are made of the encoded truth.
        panels: (prepared sample, estimate, protocol) -> prompt, truth, prediction, error as uint8 RGB (H, W, 3).
        clip_picture: (answer at native size, scale) -> uint8 RGB (H, W, 3), a frame of a clip's video.
        clip_scale: answer -> what colours are scaled by, whose largest value all frames of a clip share; None: nothing.
        panel_scales: (prepared sample, protocol) -> what their colours mean, and those of the uncertainty.
    """

    name: str
    passes: tuple[Pass, ...]
    encode: Encode
    conditions: Conditions
    decode_prediction: Decode
    inspect: Callable[[Raw, Size], dict[str, Any]]
    ranges: Mapping[str, str]
    fields: tuple[str, ...] = FIELDS
    prompt: Prompt | None = None
    columns: tuple[str, ...] = ()
    optional_columns: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ("image",)
    truth: str = ""
    loss: PixelLoss | None = None
    default: bool = True
    dataset: str = ""
    check: Callable[[Raw], None] = nothing_to_check
    reduce_modes: tuple[str, ...] = ()
    latent_modes: tuple[str, ...] = ()
    merge: Merge | None = None
    verifiers: Mapping[str, Verifier] = dataclasses.field(default_factory=dict)
    native: Callable[[Real[np.ndarray, "R R *C"], Size, Any], Float[np.ndarray, "H W *C"]] = plain_native
    refine: Refine | None = None
    restore: Restore | None = None
    relative: bool = False
    flags: tuple[str, ...] = ()
    files: Mapping[str, Mapping[str, File]] = dataclasses.field(default_factory=dict)
    usual_files: tuple[str, ...] = ()
    views: Mapping[str, View] = dataclasses.field(default_factory=dict)
    member_picture: Callable[[Native], Colours] | None = None
    protocol: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sizes: str = ""
    metrics: tuple[str, ...] = ()
    more_is_better: tuple[str, ...] = ()
    limits: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    reported: tuple[str, ...] = ()
    main: Metric | None = None
    prepare: Callable[[dict[str, Any], Mapping[str, Any]], dict[str, Any]] = same_truth
    unmeasurable: Callable[[Raw, Mapping[str, Any]], str] = few_valid
    measure: Measure | None = None
    baselines: Callable[[Raw], dict[str, Native]] | None = None
    baseline_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ceilings: tuple[str, ...] = ()
    panels: Callable[[Raw, Estimate, Mapping[str, Any]], dict[str, Colours]] = no_panels
    clip_picture: Callable[[Native, float | None], Colours] = no_picture
    clip_scale: Callable[[Native], float] | None = None
    panel_scales: Callable[[Raw, Mapping[str, Any]], dict[str, Scale]] = no_scales

    @property
    def conditioned(self) -> bool:
        """Whether it predicts something of a picture; if not, it generates pictures of classes."""
        return self.fields != ("target",)

    def reduce_mode(self, mode: str | None, latents: bool = False) -> str:
        """``mode``, or the task's default for None; ``latents``: to merge latents by.

        Raises:
            UserError: the task has no such mode, or none for latents.
        """
        if mode is None:
            return self.reduce_modes[0]
        if mode not in self.reduce_modes:
            near = did_you_mean(mode, self.reduce_modes)
            raise UserError(f"reduce '{mode}' is no way to merge {self.name} members{near}")
        if latents and mode not in self.latent_modes:
            known = ", ".join(self.latent_modes)
            raise UserError(f"reduce '{mode}' is no way to merge {self.name} latents: give {known}, or merge_in pixels")
        return mode

    def verifier(self, name: str) -> Verifier:
        """The verifier called ``name``.

        Raises:
            UserError: the task has no such one.
        """
        if name not in self.verifiers:
            raise UserError(f"verifier '{name}' is none of {self.name}{did_you_mean(name, self.verifiers)}")
        return self.verifiers[name]

    def answer(self, merged: Map, size: Size, options: Any, raw: Mapping[str, Any] | None) -> Answer:
        """The merged map (R, R[, C]) as the task's answer at native size (H, W); ``raw``: the raw input, or None where
        there is none."""
        if self.restore is not None:
            prompt = None if raw is None or self.prompt is None else raw.get(self.prompt.field)
            return self.restore(merged, size, options, prompt)
        if self.refine is not None and raw is not None:
            merged = self.refine(merged, raw, options)
        return Answer(self.native(merged, size, options))

    def merged(self, members: Real[np.ndarray, "M H W *C"], mode: str, options: Any) -> tuple[Native, Plain]:
        """``merge``, for a task that has one.

        Raises:
            UserError: the task predicts nothing of a picture.
        """
        if self.merge is None:
            raise UserError(f"{self.name} predicts nothing of a picture: use `scaling-perception generate`")
        return self.merge(members, mode, options)


# Shared by the checks of truth


def field_of(raw: Raw, name: str, shape: tuple[int, ...]) -> Shaped[np.ndarray, ...]:
    """The field ``name``, which must have ``shape``.

    Raises:
        UserError: it is absent or has another shape.
    """
    value = np.asarray(raw[name]) if raw.get(name) is not None else None
    if value is None or value.shape != shape:
        raise UserError(f"{name} is {'absent' if value is None else value.shape}: it must have the shape {shape}")
    return value


def valid_of(raw: Raw, size: Size) -> Mask:
    """The valid mask bool (H, W); all True where the sample has none."""
    return field_of(raw, "valid", size).astype(bool) if raw.get("valid") is not None else np.ones(size, bool)


def range_of(values: Real[np.ndarray, " n *C"], name: str) -> list[float]:
    """[least, most] of the valid values (n[, C]) of a truth.

    Raises:
        UserError: none or too few are valid, or one is not finite.
    """
    if not values.size:
        raise UserError(f"no {name} pixel is valid")
    if len(values) < VALID_MINIMUM:
        raise UserError(f"{len(values)} {name} pixel(s) are valid: give at least {VALID_MINIMUM}, or leave it out")
    if not np.isfinite(values).all():
        raise UserError(f"{name} holds {int((~np.isfinite(values)).sum())} valid pixels that are not finite")
    return [float(values.min()), float(values.max())]
