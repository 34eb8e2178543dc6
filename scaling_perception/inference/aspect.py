"""Pictures that are not square: squashed (as in the paper), padded to a square, or cut into overlapping squares.

The model sees a fixed square. ``squash`` stretches the picture to it and is the only way that needs nothing here.
``letterbox`` repeats the border until the picture is square, predicts, and cuts the border off again: shapes keep their
proportions, and part of the model's pixels is spent on the border. ``tile`` predicts the squashed picture, and then
square windows at (about) the model's own scale, and blends the windows: depth windows are first brought to the squashed
prediction by least squares, because each window's depth has its own scale and shift; so the result has the windows'
detail and the whole picture's layout. An amodal window that shows nothing of the given mask is left to the squashed
prediction: nothing there asks for an object.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Real, Shaped

from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.tasks import get_task
from scaling_perception.tasks.alignment import fit_scale_shift
from scaling_perception.tasks.base import Estimate

ASPECTS = ("squash", "letterbox", "tile")
OVERLAP = 0.25  # share of a window's side that it has in common with the next
_LARGEST = 1.5  # pictures up to this many model sides on both sides are not cut: one window shows them well enough

Raw = dict[str, Any]
Predict = Callable[[Iterable[Raw]], Iterator[Estimate]]


class Box(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        return slice(self.left, self.left + self.width)


def check_aspect(aspect: str) -> str:
    """``aspect`` if it is one of ``ASPECTS``.

    Raises:
        UserError: it is not.
    """
    if aspect not in ASPECTS:
        raise UserError(f"unknown aspect '{aspect}'{did_you_mean(aspect, ASPECTS)}")
    return aspect


def with_aspect(predict: Predict, raws: Iterable[Raw], task: str, aspect: str, resolution: int) -> Iterator[Estimate]:
    """The estimates of ``predict`` for raw samples of any shape, one for each, in order.

    Args:
        predict: raw samples to estimates, one each, in order, lazily; it squashes.
        resolution: the model's side R in pixels.
    """
    sizes: list[tuple[tuple[int, int], list[Box]]] = []

    def parts() -> Iterator[Raw]:
        for raw in raws:
            height, width = raw["image"].shape[:2]
            boxes, pieces = cut(raw, aspect, resolution)
            sizes.append(((height, width), boxes))
            yield from pieces

    stream = predict(parts())
    for first in stream:  # pulling one estimate makes its sample known
        size, boxes = sizes.pop(0)
        rest = list(itertools.islice(stream, len(boxes) - 1))
        yield join(task, aspect, size, boxes, [first, *rest])


def cut(raw: Raw, aspect: str, resolution: int) -> tuple[list[Box], list[Raw]]:
    """The pictures that the model sees of a raw sample, with all that goes with them, and where each lies."""
    if aspect == "squash":
        height, width = raw["image"].shape[:2]
        return [Box(0, 0, height, width)], [raw]
    return _pad_to_square(raw) if aspect == "letterbox" else _cut(raw, resolution)


def join(task: str, aspect: str, size: tuple[int, int], boxes: list[Box], estimates: list[Estimate]) -> Estimate:
    """The estimate of a whole picture of ``size`` (H, W) from those of the pictures that `cut` made of it."""
    if aspect == "squash":
        return estimates[0]
    return (_unpad if aspect == "letterbox" else _blend_windows)(task, size, boxes, estimates)


def _maps(raw: Raw) -> dict[str, Shaped[np.ndarray, "H W *C"]]:
    """The fields of a raw sample that are pictures of the image's size."""
    size = raw["image"].shape[:2]
    return {name: value for name, value in raw.items() if isinstance(value, np.ndarray) and value.shape[:2] == size}


def _pad_to_square(raw: Raw) -> tuple[list[Box], list[Raw]]:
    height, width = raw["image"].shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    edges = ((top, side - height - top), (left, side - width - left))

    def pad(value: Shaped[np.ndarray, "H W *C"]) -> Shaped[np.ndarray, "side side *C"]:
        around = (*edges, *((0, 0),) * (value.ndim - 2))
        # an object does not go on beyond the picture; what is around it does
        return np.pad(value, around) if value.dtype == bool else np.pad(value, around, mode="edge")

    padded = {name: pad(value) for name, value in _maps(raw).items()}
    return [Box(top, left, height, width)], [{**raw, **padded}]


def _unpad(task: str, size: tuple[int, int], boxes: list[Box], estimates: list[Estimate]) -> Estimate:
    (box,), (estimate,) = boxes, estimates
    side = estimate.size[0]

    def crop(array: Shaped[np.ndarray, "side side *C"]) -> Shaped[np.ndarray, "H W *C"]:
        return array[box.top : box.top + box.height, box.left : box.left + box.width]

    inner = estimate.members.shape[1] / side  # model pixels for each pixel of the padded picture
    rows = slice(round(box.top * inner), max(round((box.top + box.height) * inner), round(box.top * inner) + 1))
    columns = slice(round(box.left * inner), max(round((box.left + box.width) * inner), round(box.left * inner) + 1))
    prediction, uncertainty = crop(estimate.prediction), crop(estimate.uncertainty)
    if get_task(task).relative:
        prediction, uncertainty = _restretch(prediction, uncertainty)
    whole = None if estimate.whole is None else crop(estimate.whole)
    painted = None if estimate.painted is None else crop(estimate.painted)
    members = estimate.members[:, rows, columns]
    return Estimate(prediction, uncertainty, members, whole, size, estimate.forwards, painted)


def _restretch(
    depth: Float[np.ndarray, "H W"], spread: Float[np.ndarray, "H W"]
) -> tuple[Float[np.ndarray, "H W"], Float[np.ndarray, "H W"]]:
    """Depth whose range was set by more than this picture, to [0, 1] again."""
    low = depth.min()
    size = max(float(depth.max() - low), 1e-6)
    return (depth - low) / np.float32(size), spread / np.float32(size)


def windows(size: tuple[int, int], side: int, overlap: float = OVERLAP) -> list[Box]:
    """Squares of ``side`` (or the picture's shorter side) that cover ``size`` (H, W), evenly placed, row by row.

    Neighbours share at least ``overlap`` of a side.
    """
    side = min(side, *size)

    def starts(length: int) -> list[int]:
        count = 1 if length == side else max(2, math.ceil((length - side) / (side * (1 - overlap))) + 1)
        return [round(i * (length - side) / max(count - 1, 1)) for i in range(count)]

    return [Box(top, left, side, side) for top in starts(size[0]) for left in starts(size[1])]


def _cut(raw: Raw, resolution: int) -> tuple[list[Box], list[Raw]]:
    """The whole picture, then its windows (none for a picture that is not large)."""
    height, width = raw["image"].shape[:2]
    boxes = [Box(0, 0, height, width)]
    if max(height, width) > _LARGEST * resolution:
        asked = raw.get("visible_mask", np.ones((height, width), bool))
        boxes += [box for box in windows((height, width), resolution) if asked[box.rows, box.columns].any()]
    maps = _maps(raw)

    def crop(box: Box) -> Raw:
        return {**raw, **{name: value[box.rows, box.columns] for name, value in maps.items()}}

    return boxes, [raw, *(crop(box) for box in boxes[1:])]


def ramp(box: Box, size: tuple[int, int], overlap: float = OVERLAP) -> Float[np.ndarray, "height width"]:
    """Weights (height, width) float32 of a window: 1 inside, falling to (nearly) 0 at sides with a neighbour."""

    def line(length: int, at_start: bool, at_end: bool) -> Float[np.ndarray, " {length}"]:
        fall = max(1.0, length * overlap)
        distance = np.arange(length) + 0.5
        rise = np.clip(distance / fall, 0, 1)
        both = (np.ones(length) if at_start else rise) * (np.ones(length) if at_end else rise[::-1])
        return np.sin(both * np.pi / 2) ** 2

    rows = line(box.height, box.top == 0, box.top + box.height == size[0])
    columns = line(box.width, box.left == 0, box.left + box.width == size[1])
    return (rows[:, None] * columns[None, :] + 1e-6).astype(np.float32)


def blend(
    pieces: list[Float[np.ndarray, "height width *C"]],
    boxes: list[Box],
    size: tuple[int, int],
    rest: Real[np.ndarray, "H W *C"] | Bool[np.ndarray, "H W *C"] | None = None,
) -> Float[np.ndarray, "H W *C"]:
    """Windows (height, width[, C]) to one array (H, W[, C]) float32, weighted by ``ramp``.

    Args:
        rest: (H, W[, C]), what is there where windows are left out; without it the windows must cover every pixel.
    """
    channels = pieces[0].shape[2:]
    one = (1,) * len(channels)
    total = np.zeros((*size, *channels), np.float64)
    weight = np.zeros(size, np.float64)
    for piece, box in zip(pieces, boxes, strict=True):
        own = ramp(box, size)
        total[box.rows, box.columns] += piece * own.reshape(*own.shape, *one)
        weight[box.rows, box.columns] += own
    if rest is not None:  # where all neighbours are there the weights add up to 1
        lacking = np.clip(1 - weight, 0, 1)
        total += rest * lacking.reshape(*size, *one)
        weight += lacking
    return (total / weight.reshape(*size, *one)).astype(np.float32)


def _blend_windows(task: str, size: tuple[int, int], boxes: list[Box], estimates: list[Estimate]) -> Estimate:
    overview, parts, places = estimates[0], estimates[1:], boxes[1:]
    if not parts:
        return overview
    predictions, spreads = [p.prediction for p in parts], [p.uncertainty for p in parts]
    relative = get_task(task).relative
    if relative:
        for index, box in enumerate(places):
            known = overview.prediction[box.rows, box.columns]
            scale, shift = fit_scale_shift(predictions[index], known)
            scale = max(scale, 0.0)  # a window that disagrees so far says nothing: the overview's mean is better
            shift = shift if scale else float(known.mean())
            predictions[index], spreads[index] = predictions[index] * scale + shift, spreads[index] * scale
    forwards = sum(estimate.forwards for estimate in estimates)
    left_out = overview.whole is not None  # of an amodal picture, windows without a part of the mask
    uncertainty = blend(spreads, places, size, overview.uncertainty if left_out else None)
    if overview.whole is not None:  # votes of the windows that saw a part of the object

        def votes(seen: list[Any], rest: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
            return blend([one.astype(np.float32) for one in seen], places, size, rest) >= 0.5

        prediction, painted = votes(predictions, overview.prediction), overview.painted
        painted = None if painted is None else votes([p.painted for p in parts], painted)
        whole = blend([p.whole for p in parts if p.whole is not None], places, size, overview.whole)
        return Estimate(prediction, uncertainty, overview.members, whole, size, forwards, painted)
    prediction = blend(predictions, places, size)
    if relative:
        prediction, uncertainty = _restretch(prediction, uncertainty)
    return Estimate(prediction, uncertainty, overview.members, None, size, forwards)
