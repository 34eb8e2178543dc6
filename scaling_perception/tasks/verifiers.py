"""Scores of members that need no truth: how far an answer contradicts its own input, or the other members.

A score is a number for each member, less is better, infinite where nothing can be said; what it says of different
pictures is comparable as far as its unit is. Each task lists its own (``Task.verifiers``).

Shapes: M members, R the side of the model's square.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Real

from scaling_perception.tasks.shapes import Map, Members, Size

_LEAST_INSIDE = 0.1  # share of the picture that a flow must leave inside the other frame


class Seen(NamedTuple):
    """What a verifier may look at besides the members.

    Attributes:
        image, prompt: (R, R, 3) in [-1, 1], what the model was given.
        merged: the members' usual merge (R, R[, C]).
        options: the model's ``TaskOptions``.
        size: (H, W) of the picture.
        reverse: the answer to the input the other way round (R, R[, C]), for a verifier that has ``reverse``.
    """

    image: Float[np.ndarray, "R R 3"]
    prompt: Float[np.ndarray, "R R 3"]
    merged: Map
    options: Any
    size: Size
    reverse: Map | None = None


class Verifier(NamedTuple):
    """A score.

    Attributes:
        text: what it is and its unit, in words.
        score: (members (M, R, R[, C]), what is seen) -> float64 (M,).
        reverse: the raw sample the other way round, which is predicted too: twice the compute.
        among: whether members are compared with each other, so that a merged answer has no score of its own.
    """

    text: str
    score: Callable[[Members, Seen], Float[np.ndarray, " M"]]
    reverse: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    among: bool = False


# Flow


def look_up(
    picture: Real[np.ndarray, "R R *C"], flow: Real[np.ndarray, "R R 2"]
) -> tuple[Float[np.ndarray, "R R *C"], Bool[np.ndarray, "R R"]]:
    """The picture at x + flow(x), bilinear, and where that lies inside it."""
    height, width = flow.shape[:2]
    x, y = np.arange(width) + flow[..., 0].astype(np.float64), np.arange(height)[:, None] + flow[..., 1]
    with np.errstate(invalid="ignore"):
        inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    x, y = np.where(inside, x, 0), np.where(inside, y, 0)
    left, top = np.minimum(x.astype(int), max(width - 2, 0)), np.minimum(y.astype(int), max(height - 2, 0))
    right, below = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    shape = (height, width, *[1] * (picture.ndim - 2))
    across, down = (x - left).reshape(shape), (y - top).reshape(shape)
    upper = picture[top, left] * (1 - across) + picture[top, right] * across
    lower = picture[below, left] * (1 - across) + picture[below, right] * across
    return upper * (1 - down) + lower * down, inside


def _mean_inside(error: Float[np.ndarray, "R R"], inside: Bool[np.ndarray, "R R"]) -> float:
    return float(error[inside].mean()) if inside.mean() >= _LEAST_INSIDE else np.inf


def square_scale(size: Size, options: Any) -> Float[np.ndarray, " 2"]:
    """What a flow on the model's square, as ``flow.decode_prediction`` gives it there, is multiplied by to be in pixels
    of the square both across and down. ``size``: (H, W) of the frames."""
    height, width = size
    return np.asarray([1, 1 if options.flow_frame == "square" else width / height], np.float32)


def photometric(flows: Real[np.ndarray, "M R R 2"], seen: Seen) -> Float[np.ndarray, " M"]:
    """Mean difference of colours in [0, 1] between a pixel and where the flow says it went, of those still inside."""
    found = []
    for flow in flows * square_scale(seen.size, seen.options):
        moved, inside = look_up(seen.prompt, flow)
        found.append(_mean_inside(np.abs(moved - seen.image).mean(axis=-1) / 2, inside))
    return np.asarray(found)


def cycle(flows: Real[np.ndarray, "M R R 2"], seen: Seen) -> Float[np.ndarray, " M"]:
    """Mean distance in pixels from a pixel to where the flow there and the reverse flow back bring it."""
    assert seen.reverse is not None
    found, scale = [], square_scale(seen.size, seen.options)
    for flow in flows * scale:
        back, inside = look_up(seen.reverse * scale, flow)
        found.append(_mean_inside(np.linalg.norm(flow + back, axis=-1), inside))
    return np.asarray(found)


def flow_agreement(flows: Real[np.ndarray, "M R R 2"], seen: Seen) -> Float[np.ndarray, " M"]:
    """Mean distance to the merged flow, in pixels."""
    apart = (flows - seen.merged[None]) * square_scale(seen.size, seen.options)
    return np.linalg.norm(apart, axis=-1).mean(axis=(1, 2), dtype=np.float64)


def other_way(raw: dict[str, Any]) -> dict[str, Any]:
    """The pair from its second frame to its first."""
    return {**raw, "image": raw["image2"], "image2": raw["image"]}


FLOW = {
    "photometric": Verifier("difference of colours along the flow, of [0, 1]", photometric),
    "cycle": Verifier("distance of there and back, px of the model's frame", cycle, reverse=other_way),
    "agreement": Verifier("distance to the merged flow, px of the model's frame", flow_agreement, among=True),
}


# Depth and normals


def _steepness(maps: Real[np.ndarray, "*M R R"]) -> Float[np.ndarray, "*M r r"]:
    """Sum of the absolute differences to the right and below."""
    maps = np.asarray(maps, np.float64)
    across = np.abs(np.diff(maps, axis=-1))[..., :-1, :]
    return across + np.abs(np.diff(maps, axis=-2))[..., :-1]


def edges(members: Members, seen: Seen) -> Float[np.ndarray, " M"]:
    """The part of a map's change from pixel to pixel that lies where the picture does not change, of [0, 1].

    Each pixel's change counts exp(-g / mean g), g being the picture's change there. Scale and shift of a map, negative
    ones too, change nothing; a constant map, which has no edge, scores 1, as bad as one whose edges are all elsewhere.
    """
    picture = _steepness(np.moveaxis(seen.image, -1, 0)).sum(axis=0)
    level = picture.mean()
    weight = np.exp(-picture / level) if level > 0 else np.ones_like(picture)
    channels = np.moveaxis(members, -1, 1) if members.ndim == 4 else members[:, None]
    change = _steepness(channels).sum(axis=1)
    total = change.sum(axis=(1, 2))
    share = (change * weight).sum(axis=(1, 2)) / np.where(total > 0, total, 1)
    return np.where(total > 0, share, 1.0)


def depth_agreement(depths: Real[np.ndarray, "M R R"], seen: Seen) -> Float[np.ndarray, " M"]:
    """The part of the merged depth's variance that no scale (above 0) and shift of the member explains."""
    flat = np.asarray(depths, np.float64).reshape(len(depths), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    merged = np.asarray(seen.merged, np.float64).ravel()
    merged = merged - merged.mean()
    size = np.linalg.norm(flat, axis=1) * np.linalg.norm(merged)
    correlation = np.where(size > 0, flat @ merged / np.where(size > 0, size, 1), 0.0)
    return 1 - np.square(np.clip(correlation, 0, 1))


DEPTH = {
    "edges": Verifier("part of the depth's change where the picture does not change, of [0, 1]", edges),
    "agreement": Verifier("unexplained part of the merged depth's variance, of [0, 1]", depth_agreement, among=True),
}
