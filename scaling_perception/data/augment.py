"""Random changes of training samples: mirroring, crops and colours, each a function of (seed, element number) alone.

``crop`` and ``jitter`` change a raw sample before its task makes pictures of it, so that a crop is resized once, depth
is normalised within it, and flow is measured in its width; a flip mirrors the finished pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.tasks import FIELDS, Task, TaskOptions, get_pass
from scaling_perception.tasks.base import VALID_MINIMUM
from scaling_perception.tasks.samples import require_picture

_TRIES = 8  # crops that are drawn before a sample is taken whole
_GREY = np.array([0.299, 0.587, 0.114], np.float32)


def flip_sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample (image, prompt, target (R, R, 3), valid (R, R), pass_id, ...) mirrored left to right."""
    out = dict(sample)
    for field in (*FIELDS, "valid"):
        if field in sample:
            out[field] = np.ascontiguousarray(sample[field][:, ::-1])
    out["target"] = get_pass(int(sample["pass_id"])).mirror(sample["target"])  # which may change signs too
    return out


@dataclasses.dataclass(frozen=True)
class Flip:
    """Half of the samples are seen in a mirror."""

    on: bool = True

    def __call__(self, rng: np.random.Generator) -> bool:
        return bool(self.on and rng.random() < 0.5)


@dataclasses.dataclass(frozen=True)
class Crop:
    """A window of the picture's own shape, at a place drawn uniformly.

    Attributes:
        least: the smallest share of height and width that it keeps; that share is uniform in [least, 1].
    """

    least: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.least <= 1:
            raise UserError(f"data.augment.crop is {self.least}: give a share of the sides above 0, up to 1 (no crops)")

    def __call__(self, raw: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """The same window of every field (H, W[, C]); values stay as they are.

        Where fields differ in size nothing is cut: the task names them.
        """
        share = rng.uniform(self.least, 1)
        spatial = {name for name, value in raw.items() if np.ndim(value) >= 2}
        (height, width), *other = {np.shape(raw[name])[:2] for name in spatial}
        tall, wide = max(1, round(share * height)), max(1, round(share * width))
        top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
        if other:
            return dict(raw)
        window = (slice(top, top + tall), slice(left, left + wide))
        return {name: value[window] if name in spatial else value for name, value in raw.items()}


@dataclasses.dataclass(frozen=True)
class Jitter:
    """Colours of a photograph: brightness, contrast, saturation and hue, in this order.

    Attributes:
        brightness, contrast, saturation: b: a factor uniform in [1 - b, 1 + b], of the picture, of its distance from
            its mean grey, and of its distance from each pixel's grey.
        hue: h: a turn of the colours about the grey axis, uniform in [-h, h], in full turns.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        for name, most in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"data.augment.{name} is {getattr(self, name)}: give a number in 0..{most}")

    def __call__(self, pictures: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
        """uint8 RGB pictures (H, W, 3), all changed alike; contrast turns about the mean grey of the first."""
        bright, contrast, saturation = (
            np.float32(rng.uniform(1 - one, 1 + one)) for one in (self.brightness, self.contrast, self.saturation)
        )
        turn = _about_grey(2 * np.pi * rng.uniform(-self.hue, self.hue))
        mean = bright * np.float32((pictures[0] @ _GREY).mean())
        changed = []
        for picture in pictures:
            values = (picture.astype(np.float32) * bright - mean) * contrast + mean
            grey = (values @ _GREY)[..., None]
            values = (grey + (values - grey) * saturation) @ turn.T
            changed.append(np.clip(np.rint(values), 0, 255).astype(np.uint8))
        return changed


def _about_grey(angle: float) -> np.ndarray:
    """The rotation (3, 3) of colours about the grey axis, red towards green, float32."""
    axis, plain = np.full(3, 3**-0.5), np.eye(3)
    turned = np.cos(angle) * plain + np.sin(angle) * np.cross(axis, plain).T
    return (turned + (1 - np.cos(angle)) * np.outer(axis, axis)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Augment:
    """What ``data.augment`` asks for. The default changes nothing."""

    crop: Crop = Crop()
    jitter: Jitter = Jitter()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Augment:
        """Of ``data.augment``: crop, brightness, contrast, saturation, hue; missing ones change nothing.

        Raises:
            UserError: an unknown field, or a value out of range.
        """
        colours = [field.name for field in dataclasses.fields(Jitter)]
        for name in values:
            if name not in ("crop", *colours):
                raise UserError(f"unknown field data.augment.{name}{did_you_mean(name, ('crop', *colours))}")
        numbers = {name: float(value) for name, value in values.items()}
        return cls(Crop(numbers.pop("crop", 1.0)), Jitter(**numbers))

    @property
    def names(self) -> list[str]:
        """The fields of ``data.augment`` that change something."""
        return [name for name, value in self.to_dict().items() if value != _NOTHING[name]]

    def to_dict(self) -> dict[str, float]:
        """The fields as ``data.augment`` has them."""
        return {"crop": self.crop.least, **dataclasses.asdict(self.jitter)}

    def check(self, task: Task) -> None:
        """UserError for colours of a task that paints what it sees: they would be what it learns."""
        colours = [name for name in self.names if name != "crop"]
        if colours and not task.conditioned:
            raise UserError(
                f"data.augment.{colours[0]} changes the pictures that {task.name} learns to make: leave it out"
            )

    def encode(
        self, task: Task, raw: Mapping[str, Any], resolution: int, options: TaskOptions, draw: int
    ) -> list[dict[str, Any]]:
        """``task.encode`` of the changed sample; ``draw``: the seed of all that is drawn.

        A crop in which the task has nothing to learn (fewer than 10 valid pixels, no part of what its mask asks for)
        is drawn again, at most eight times; then the sample is taken whole.
        """
        rng, colours = np.random.default_rng([draw, 0]), np.random.default_rng([draw, 1])
        if self.jitter != Jitter():
            names = ["image", *([task.prompt.field] if task.prompt and task.prompt.frame else ())]
            changed = self.jitter([require_picture(raw, name) for name in names], colours)
            raw = {**raw, **dict(zip(names, changed, strict=True))}
        for _ in range(_TRIES if self.crop != Crop() else 0):
            try:
                made = task.encode(self.crop(raw, rng), resolution, options)
            except UserError:  # as the whole sample might be: then it says so below
                continue
            if all(_teaches(task, sample) for sample in made):
                return made
        return task.encode(raw, resolution, options)


_NOTHING = Augment().to_dict()


def _teaches(task: Task, sample: Mapping[str, Any]) -> bool:
    asked = task.prompt is None or task.prompt.frame or bool((sample["prompt"] > 0).any())
    return asked and int(sample["valid"].sum()) >= VALID_MINIMUM
