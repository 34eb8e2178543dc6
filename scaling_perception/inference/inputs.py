"""What a person may hand to the predictor: pictures and prompts as paths, PIL or arrays."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8

from scaling_perception.data.images import BitDepth, from_array, from_pil, orientation, read_image
from scaling_perception.data.masks import to_mask
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import TASKS, get_task
from scaling_perception.tasks.samples import require


def to_rgb(image: Any, depth: BitDepth | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """One picture as uint8 RGB (H, W, 3).

    Args:
        image: a path; a PIL picture of any mode; or an array, see ``images.from_array``. Transparency is laid on white.
        depth: of pictures of 16 bits, see ``images.BitDepth``.

    Raises:
        UserError: an unreadable file, or an array of another shape, type or range.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(image, depth=depth)
    if hasattr(image, "convert"):
        return from_pil(image, depth=depth)
    return from_array(np.asarray(image), depth)


def to_frames(first: Any, second: Any) -> list[UInt8[np.ndarray, "H W 3"]]:
    """Two frames as `to_rgb`; those of 16 bits lose as many bits, so that what is equal in both stays equal."""
    depths = BitDepth(), BitDepth()
    frames = [to_rgb(one, depth) for one, depth in zip((first, second), depths, strict=True)]
    most = max(depth.found or 0 for depth in depths)
    return [
        frame if depth.found in (None, most) else to_rgb(one, BitDepth(most))
        for frame, one, depth in zip(frames, (first, second), depths, strict=True)
    ]


def raw_samples(images: Sequence[Any], task: str, prompt: Any = None) -> list[dict[str, Any]]:
    """Pictures and prompts as raw samples (the fields that ``tasks.conditions`` reads).

    Raises:
        UserError: no or an unreadable picture, a missing, superfluous or misshapen prompt.
    """
    if not images:
        raise UserError("no image was given: give one picture or more")
    what = get_task(task)
    asks = what.prompt
    if asks is None:
        if prompt is not None and any(p is not None for p in prompt):
            prompted = " or ".join(one.name for one in TASKS.values() if one.prompt is not None)
            raise UserError(f"{task} takes no prompt: leave it out, or choose the task {prompted}")
        return [{"key": _name(image, i), "image": to_rgb(image)} for i, image in enumerate(images)]
    prompts = [] if prompt is None else list(prompt)
    if len(prompts) != len(images) or any(p is None for p in prompts):
        given = sum(p is not None for p in prompts)
        raise UserError(f"{task} needs a prompt for each image ({asks.words}): got {given} for {len(images)} image(s)")
    field, raws = asks.field, []
    for i, (image, one) in enumerate(zip(images, prompts, strict=True)):
        picture, seen = to_frames(image, one) if asks.frame else (to_rgb(image), to_mask(one))
        raws.append({"key": _name(image, i), "image": picture, field: seen})
    for raw, image, one in zip(raws, images, prompts, strict=True):
        _same_way_up(raw, field, image, one)
        require(raw, field, like="image")  # an error now, and not in the middle of a batch
        what.check(raw)
    return raws


def _same_way_up(raw: dict[str, Any], field: str, image: Any, prompt: Any) -> None:
    """UserError where EXIF turned one of two files and their sizes differ because of it."""
    high, wide = raw["image"].shape[:2]
    if raw[field].shape[:2] == (high, wide) or raw[field].shape[:2] != (wide, high):
        return
    turns = [orientation(one) if isinstance(one, (str, os.PathLike)) else 1 for one in (image, prompt)]
    if max(turns) > 1:
        raise UserError(
            f"{raw['key']} is {wide}x{high} upright (EXIF orientation {turns[0]}) but {field} is {high}x{wide} "
            f"(EXIF orientation {turns[1]}): turn both upright"
        )


def _name(image: Any, index: int) -> str:
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"image {index}"


def prompt_of(raw: dict[str, Any], task: str) -> Shaped[np.ndarray, "H W *C"] | None:
    """What a raw sample holds besides its picture for this task; None where the task asks for nothing."""
    asks = get_task(task).prompt
    return None if asks is None else raw.get(asks.field)
