"""What every task shares: the options, and how fields of a raw sample are read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Real, Shaped

from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.tasks.base import Pass
from scaling_perception.tasks.resize import resize_bilinear, resize_nearest
from scaling_perception.tasks.shapes import Colours, Pixels

IMAGE_RESIZES = ("bilinear", "nearest", "nearest_depth")
DEPTH_PROMPTS = ("ones", "valid")
FLOW_FRAMES = ("native", "square")


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """How ground truth becomes a picture; stored with a model, because decoding needs the same numbers.

    Attributes:
        flow_divisor: pixels of a 512-wide frame that stand for 1.0 in a flow picture (facts 5.2).
        flow_frame: the frame in whose pixels both components of flow are measured: ``native``, the picture at a width
            of 512 (facts 5.2), or ``square``, the 512x512 that it is squashed to. A network sees the square alone: one
            that is to work with pictures of other shapes than it was trained on needs ``square``, and so does one that
            is given a match of the two frames. For square pictures both are the same.
        flow_refine: how often merged flow is brought to twice its size and refined there by matching the two frames
            around it (``models.matching.refined``), up to their own size; 0 leaves it as the members give it.
        depth_quantiles: the two quantiles of the valid depths that become -1 and +1 (facts 5.1).
        mask_threshold: a predicted object is where grey <= this, on 0..255 (facts 5.3).
        keep_visible: the predicted mask also covers the given mask of the visible part. Off in pix2gestalt's rule,
            which loses what is brighter than the threshold though the visible part is known.
        mask_opening: what is painted beside the given mask joins it only where a square of 2 ``mask_opening`` + 1
            pixels of the model's picture fits into it (a morphological opening): a small autoencoder paints a rim
            around every object. 0 lets all of it join; else ``keep_visible`` must be true.
        image_resize: how pictures become square: ``bilinear`` (antialiased), ``nearest`` (torch's nearest-exact, of
            everything), or ``nearest_depth`` (nearest for depth, bilinear for the others), which is what the released
            generalist was fed (facts 5 and 10, row 26).
        depth_prompt: what depth gets as its prompt: ``ones``, or ``valid``: the mask of valid depths, 0 or 1, where the
            raw sample has depths, as the authors do. That mask is made of the ground truth and tells where it has none:
            errors measured so are not those of a picture alone. Predicting from a picture, it is ones.
        clip_depth: decoded depth is clipped to [-1, 1] and mapped to [0, 1] before members are merged, as Marigold
            does. The authors merge what the decoder gives (facts 7.1); merging then brings it to [0, 1].

    Raises:
        UserError: a value out of range.
    """

    flow_divisor: float = 75.0
    flow_frame: str = "native"
    flow_refine: int = 0
    depth_quantiles: tuple[float, float] = (0.02, 0.98)
    mask_threshold: float = 250
    keep_visible: bool = False
    mask_opening: int = 0
    image_resize: str = "bilinear"
    depth_prompt: str = "ones"
    clip_depth: bool = True

    def __post_init__(self) -> None:
        for name, default in (("flow_divisor", 75), ("mask_threshold", 250)):
            if not _is_number(value := getattr(self, name)):
                raise UserError(f"{name} {value!r} must be a number: the default is {default}")
        both = self.depth_quantiles
        if not isinstance(both, (tuple, list)) or len(both) != 2 or not all(map(_is_number, both)):
            raise UserError(f"depth_quantiles {both!r} must be two numbers: the default is 0.02, 0.98")
        low, high = (float(q) for q in both)
        object.__setattr__(self, "depth_quantiles", (low, high))  # JSON gives a list
        if not 0.0 <= low < high <= 1.0:
            raise UserError(f"depth_quantiles {low}, {high} must rise within [0, 1]: the default is 0.02, 0.98")
        if not self.flow_divisor > 0:
            raise UserError(f"flow_divisor {self.flow_divisor} must be above 0: the default is 75")
        if type(self.flow_refine) is not int or not 0 <= self.flow_refine <= 4:
            raise UserError(f"flow_refine {self.flow_refine!r} must be a whole number in 0..4: the default is 0")
        if not 0 <= self.mask_threshold <= 255:
            raise UserError(f"mask_threshold {self.mask_threshold} must be in 0..255: the default is 250")
        if type(self.mask_opening) is not int or not 0 <= self.mask_opening <= 16:
            raise UserError(f"mask_opening {self.mask_opening!r} must be a whole number in 0..16: the default is 0")
        for name, default in (("keep_visible", "false"), ("clip_depth", "true")):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} {getattr(self, name)!r} must be true or false: the default is {default}")
        if self.mask_opening and not self.keep_visible:
            raise UserError(f"mask_opening {self.mask_opening} needs keep_visible: set it true, or mask_opening 0")
        known = {"image_resize": IMAGE_RESIZES, "depth_prompt": DEPTH_PROMPTS, "flow_frame": FLOW_FRAMES}
        for name, options in known.items():
            if getattr(self, name) not in options:
                raise UserError(
                    f"{name} {getattr(self, name)!r} is unknown{did_you_mean(getattr(self, name), options)}"
                )

    def encoding(self) -> dict[str, Any]:
        """The options that decide what a sample is encoded to, as JSON values; the others matter afterwards alone."""
        values = self.to_dict()
        for name in ("mask_threshold", "keep_visible", "mask_opening", "clip_depth", "flow_refine"):
            del values[name]
        return values

    def nearest(self, task: str) -> bool:
        """Whether ``task`` brings its pictures to the model's square by nearest."""
        return self.image_resize == "nearest" or (self.image_resize == "nearest_depth" and task == "depth")

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values."""
        return {**dataclasses.asdict(self), "depth_quantiles": list(self.depth_quantiles)}

    @classmethod
    def from_dict(cls, values: Any) -> TaskOptions:
        """Options from a config or a model's metadata; missing ones keep their default.

        Raises:
            UserError: an unknown option or a value out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping):
            raise UserError(f"task_options are {values!r}: give a table of {', '.join(known)}")
        for name in values:
            if name not in known:
                raise UserError(f"unknown task option '{name}'{did_you_mean(name, known)}")
        return cls(**dict(values))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def picture(
    raw: Mapping[str, Any], field: str, resolution: int, nearest: bool = False
) -> Float[np.ndarray, "{resolution} {resolution} 3"]:
    """A uint8 RGB field of ``raw`` as float32 (resolution, resolution, 3) in [-1, 1], antialiased (facts 10, row 26).

    ``nearest`` takes the nearest pixels instead, as the released generalist's depth does.

    Raises:
        UserError: the field is missing or is no uint8 (H, W, 3).
    """
    resize = resize_nearest if nearest else resize_bilinear
    return to_unit(resize(require_picture(raw, field), (resolution, resolution)))


def require_picture(raw: Mapping[str, Any], field: str) -> Colours:
    """The uint8 (H, W, 3) field of ``raw``.

    Raises:
        UserError: it is missing, or something else, naming the sample.
    """
    pixels = require(raw, field)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise UserError(
            f"sample '{raw.get('key', '?')}': {field} has shape {pixels.shape} and type {pixels.dtype}: "
            "give an 8-bit RGB picture (H, W, 3)"
        )
    return pixels


def to_unit(values: Real[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """0..255 to float32 [-1, 1]."""
    return (values.astype(np.float32) / np.float32(127.5)) - np.float32(1.0)


def require(raw: Mapping[str, Any], field: str, like: str | None = None) -> Shaped[np.ndarray, ...]:
    """The array ``raw[field]``; with ``like`` its height and width must be those of that field.

    Raises:
        UserError: it is missing or of another size, naming the sample.
    """
    key = raw.get("key", "?")
    if raw.get(field) is None:
        raise UserError(f"sample '{key}' has no {field}, which this task needs: choose another task or add the file")
    value = np.asarray(raw[field])
    if like is not None:
        other = require(raw, like)
        if value.shape[:2] != other.shape[:2]:
            sizes = f"{field} is {size_text(value)} but {like} is {size_text(other)}"
            raise UserError(f"sample '{key}': {sizes}: give both the same size")
    return value


def size_text(array: Shaped[np.ndarray, ...]) -> str:
    """``W x H`` of an (H, W, ...) array, for messages."""
    return "x".join(str(n) for n in array.shape[1::-1])


def sample(
    raw: Mapping[str, Any],
    made: Pass,
    conditions: Mapping[str, Float[np.ndarray, "R R 3"]],
    target: Real[np.ndarray, "R R *C"],
    valid: Bool[np.ndarray, "R R"],
) -> dict[str, Any]:
    """One training sample with the pictures of ``conditions``.

    ``target`` (R, R) is repeated to 3 channels, (R, R, 3) is taken as it is.
    """
    if target.ndim == 2:
        target = np.repeat(target[..., None], 3, axis=-1)
    return {
        **conditions,
        "target": np.ascontiguousarray(target, np.float32),
        "valid": valid,
        "pass_id": np.int32(made.id),
        "label": np.int32(raw.get("label", -1)),
        "key": str(raw.get("key", "")),
    }


def check_pixels(pixels: Real[np.ndarray, ...], passes: int) -> Pixels:
    """Decoded pixels (P, M, R, R, 3) as float32; ValueError when the shape is another (a mistake of the caller)."""
    pixels = np.asarray(pixels, np.float32)
    if pixels.ndim != 5 or pixels.shape[0] != passes or pixels.shape[-1] != 3:
        raise ValueError(f"decoded pixels have shape {pixels.shape}, expected ({passes}, members, R, R, 3)")
    return pixels
