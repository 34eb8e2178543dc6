"""Maps as pictures: colours of depth, flow, errors and masks, as uint8 RGB (H, W, 3)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Real, UInt8

from scaling_perception.tasks.shapes import Colours, Mask, Plain

UNKNOWN_FLOW = 1e9
"""Middlebury: a component beyond this is unknown."""


def flow_valid(flow: Real[np.ndarray, "H W 2"]) -> Mask:
    """bool (H, W): both components finite and at most ``UNKNOWN_FLOW``."""
    with np.errstate(invalid="ignore"):
        return np.asarray((np.isfinite(flow) & (np.abs(flow) <= UNKNOWN_FLOW)).all(axis=-1))


def _colour_wheel() -> np.ndarray:
    """Middlebury's 55 hues (Baker et al., "A Database and Evaluation Methodology for Optical Flow"), 0..255.

    Six arcs red, yellow, green, cyan, blue, magenta: in each one channel is full and another rises or falls.
    """
    arcs = ((15, 0, 1, 1), (6, 1, 0, -1), (4, 1, 2, 1), (11, 2, 1, -1), (13, 2, 0, 1), (6, 0, 2, -1))
    wheel = []
    for length, full, moving, direction in arcs:
        arc = np.zeros((length, 3))
        ramp = np.floor(255 * np.arange(length) / length)
        arc[:, full] = 255
        arc[:, moving] = ramp if direction > 0 else 255 - ramp
        wheel.append(arc)
    return np.concatenate(wheel)


def flow_to_color(flow: Real[np.ndarray, "H W 2"], max_flow: float | None = None, valid: Mask | None = None) -> Colours:
    """Hue is direction, saturation is speed: Middlebury's code as RAFT draws it.

    Args:
        flow: (H, W, 2) pixels.
        max_flow: the speed of full saturation; None takes the fastest valid pixel. Faster ones are darkened.
        valid: bool (H, W); the others (and unknown ones) become black.

    Returns:
        uint8 (H, W, 3).
    """
    known = flow_valid(flow) if valid is None else np.asarray(valid, bool) & flow_valid(flow)
    flow = np.where(known[..., None], flow, 0).astype(np.float64)
    if max_flow is None:
        flow = flow / (np.linalg.norm(flow, axis=-1).max(initial=0) + 1e-5)
    else:
        flow = flow / max_flow
    wheel = _colour_wheel() / 255.0
    radius = np.linalg.norm(flow, axis=-1)[..., None]
    place = (np.arctan2(-flow[..., 1], -flow[..., 0]) / np.pi + 1) / 2 * (len(wheel) - 1)
    low = np.floor(place).astype(np.int64)
    part = (place - low)[..., None]
    hue = (1 - part) * wheel[low] + part * wheel[(low + 1) % len(wheel)]
    colour = np.where(radius <= 1, 1 - radius * (1 - hue), hue * 0.75)
    return np.where(known[..., None], np.floor(255 * colour), 0).astype(np.uint8)


def flow_arrows(
    flow: Real[np.ndarray, "H W 2"], ground: Colours, colour: tuple[int, int, int] = (255, 220, 0)
) -> Colours:
    """Arrows of a flow in pixels, on a picture.

    About 24 arrows along the longer side, each from the pixel that moves. The longest spans 1.6 times their distance,
    so that lengths compare within a picture and not between pictures.
    """
    from PIL import Image, ImageDraw

    height, width = flow.shape[:2]
    apart = max(max(height, width) / 24, 4.0)
    rows = np.arange(apart / 2, height, apart).astype(int)
    columns = np.arange(apart / 2, width, apart).astype(int)
    known = flow_valid(flow)
    speeds = np.where(known, np.linalg.norm(np.where(known[..., None], flow, 0), axis=-1), 0)
    longest = float(speeds[np.ix_(rows, columns)].max(initial=0))
    if longest <= 0:
        return ground
    finer = 3  # drawn larger and shrunk, because Pillow's lines have no smooth edges
    picture = Image.fromarray(ground).resize((width * finer, height * finer), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(picture)
    scale, thick = 1.6 * apart / longest, max(1, round(apart * finer / 10))
    for y in rows:
        for x in columns:
            step = flow[y, x] * scale
            length = float(np.hypot(*step)) if known[y, x] else 0.0
            if length < 0.08 * apart:
                continue
            start = (np.array([x, y]) + 0.5) * finer
            end, along = start + step * finer, step / length
            across, head = np.array([-along[1], along[0]]), min(0.45 * length, 0.35 * apart) * finer
            draw.line([*start, *(end - along * head)], colour, thick)
            corners = (end, end - head * (along - 0.5 * across), end - head * (along + 0.5 * across))
            draw.polygon([(float(cx), float(cy)) for cx, cy in corners], fill=colour)
    return np.asarray(picture.resize((width, height), Image.Resampling.BOX))


def depth_to_color(depth: Plain, valid: Mask | None = None, name: str = "Spectral") -> Colours:
    """Depth in [0, 1] (0 near) through a matplotlib colour map; near is red with the default, invalid is black.

    Returns:
        uint8 (H, W, 3), truncated as Marigold does.
    """
    import matplotlib

    known = np.isfinite(depth) if valid is None else np.asarray(valid, bool) & np.isfinite(depth)
    colour = matplotlib.colormaps[name](np.clip(np.where(known, depth, 0), 0, 1))[..., :3]
    return np.where(known[..., None], (colour * 255).astype(np.uint8), np.uint8(0))


def heat(values: Plain, full: float | None = None, valid: Mask | None = None) -> Colours:
    """Non-negative (H, W) from black (0) to yellow (``full``; None: the largest value); invalid pixels are grey."""
    import matplotlib

    known = np.isfinite(values) if valid is None else np.asarray(valid, bool) & np.isfinite(values)
    values = np.where(known, values, 0)
    top = float(values.max(initial=0)) if full is None else full
    colour = matplotlib.colormaps["inferno"](np.clip(values / max(top, 1e-12), 0, 1))[..., :3]
    return np.where(known[..., None], (colour * 255).astype(np.uint8), np.uint8(128))


def mask_over(image: Colours, mask: Mask, colour: tuple[int, int, int] = (255, 80, 0)) -> Colours:
    """The image darkened, with ``mask`` in half-transparent colour."""
    base = image.astype(np.float32) * np.where(mask, 0.5, 0.6)[..., None]
    return (base + 0.5 * mask[..., None] * np.asarray(colour, np.float32)).clip(0, 255).astype(np.uint8)


def whole_picture(whole: Real[np.ndarray, "*shape 3"]) -> UInt8[np.ndarray, "*shape 3"]:
    """RGB in [-1, 1] as uint8."""
    return np.round((np.clip(whole, -1, 1) + 1) * 127.5).astype(np.uint8)
