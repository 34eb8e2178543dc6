"""Metres from relative depth and a few points whose distance is known: scale and shift, plain or robust.

A point is a pixel (x right, y down, the middle of the top left pixel is 0, 0) and its distance along the camera's axis
in metres. In ``depth`` space metres = scale * prediction + shift; in ``disparity`` space it is 1 / metres that the line
gives (Marigold's variant), which weights near points more. ``robust`` takes the line through two of the points that
is nearest to most of them, and then least squares over those that are near it: nearly half may be wrong. Of three
points or fewer none can be called the wrong one, and it is plain least squares.
"""

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from scaling_perception.inference.find import Picture
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.tables import read_table
from scaling_perception.tasks.alignment import Fit, fit_scale_shift

SPACES = ("depth", "disparity")
FITS = ("least-squares", "robust")

_PAIRS = 2000  # lines through two points that are tried; all of them up to 63 points
_NEAR = 2.5  # standard deviations
_DEVIATION = 1.4826  # standard deviation over median absolute deviation (normal errors)
_FARTHEST = 65.535  # metres that a PNG in millimetres holds
_MANY = 0.5  # share of a map beyond that which is worth a note: a sky may well be
_TOLD = 256  # residuals that are listed one by one


class Points(NamedTuple):
    """Sparse depth of one image, each (n,)."""

    x: Float[np.ndarray, " n"]  # float64 pixels
    y: Float[np.ndarray, " n"]
    depth: Float[np.ndarray, " n"]  # float64 metres
    lines: Int[np.ndarray, " n"]  # of the file, from 1

    def digest(self) -> str:
        """16 hexadecimal digits of the numbers."""
        values = np.stack([self.x, self.y, self.depth]).astype("<f8")
        return hashlib.sha256(values.tobytes()).hexdigest()[:16]


class MetricFit(NamedTuple):
    """A line from predictions to metres (``space`` depth) or to 1 / metres (disparity)."""

    scale: float
    shift: float
    space: str
    residuals: Float[np.ndarray, " n"]  # metres, fitted minus given, as the points; inf where the line has no depth

    @property
    def inverted(self) -> bool:
        """Whether what the prediction calls nearer comes out farther."""
        return self.scale < 0 if self.space == "depth" else self.scale > 0

    def to_dict(self) -> dict[str, Any]:
        """JSON values: the line, and how far from it the points are."""
        size = np.abs(self.residuals[np.isfinite(self.residuals)])
        told = [round(float(r), 6) if np.isfinite(r) else None for r in self.residuals]
        return {
            "space": self.space,
            "scale": self.scale,
            "shift": self.shift,
            "points": len(self.residuals),
            "inverted": self.inverted,
            "rms_m": float(np.sqrt(np.mean(size**2))) if len(size) else None,
            "median_m": float(np.median(size)) if len(size) else None,
            "largest_m": float(size.max()) if len(size) else None,
            **({"residuals_m": told} if len(told) <= _TOLD else {}),
        }


# Points


def read_points(path: str) -> dict[str | None, Points]:
    """A CSV file with the columns x, y, depth and perhaps image: the points of each image, None without that column.

    Raises:
        UserError: missing, a column is not there, or a value is no number or no distance.
    """
    table = read_table(Path(path).expanduser())
    missing = [name for name in ("x", "y", "depth") if name not in table.names]
    if missing:
        raise UserError(f"{path} has no column '{missing[0]}' in its first line: write x,y,depth[,image]")
    columns = {name: table.numbers(name) for name in ("x", "y", "depth")}
    images = [word.strip() for word in table.text("image")] if "image" in table.names else None
    rows: dict[str | None, list[tuple[float, float, float, int]]] = {}
    for at, line in enumerate(table.lines):
        if images and not images[at]:
            raise UserError(f"{path} line {line}: the image is missing: write its file name")
        for name, values in columns.items():
            if not np.isfinite(values[at]):
                word = table.text(name)[at].strip()
                raise UserError(f"{path} line {line}: {name} '{word}' is no number: write it with a decimal point")
        x, y, depth = (float(values[at]) for values in columns.values())
        if not depth > 0:
            raise UserError(f"{path} line {line}: depth {depth:g} is no distance in metres")
        rows.setdefault(images[at] if images else None, []).append((x, y, depth, line))
    return {image: Points(*np.asarray(found, np.float64).T) for image, found in rows.items()}


def points_of(path: str, table: dict[str | None, Points], images: Sequence[Picture]) -> list[Points | None]:
    """The points of every image; None where the file has none of it.

    An image is named by its file name, as much of its path as is needed, or its name without suffix (frames of videos:
    with the frame's number, as their results are named).

    Raises:
        UserError: several images and no image column, or a name that several of them have.
    """
    if None in table:
        if len(images) > 1:
            raise UserError(f"{path} has no column 'image' but there are {len(images)} images: add it")
        return [table[None]]
    places: dict[str, list[int]] = {}
    for index, image in enumerate(images):
        for name in _names(image):
            places.setdefault(name, []).append(index)
    found: list[Points | None] = [None] * len(images)
    for name, points in table.items():
        indices = places.get(str(Path(str(name))), [])
        if len(indices) > 1:
            raise UserError(f"{path}: '{name}' names {len(indices)} images: write more of their paths")
        for index in indices:
            other = found[index]
            both = [points] if other is None else [other, points]
            found[index] = Points(*(np.concatenate(columns) for columns in zip(*both, strict=True)))
    return found


def _names(image: Picture) -> set[str]:
    if image.frame is not None:
        return {image.stem, image.place[0].removesuffix(image.path.name) + image.stem}
    parts = Path(image.place[0]).parts
    return {image.stem, *(str(Path(*parts[first:])) for first in range(len(parts)))}


def check_inside(points: Points, size: tuple[int, int]) -> None:
    """UserError when a point lies outside a picture (H, W)."""
    height, width = size
    x, y = points.x, points.y
    outside = (x < -0.5) | (y < -0.5) | (x > width - 0.5) | (y > height - 0.5)
    if outside.any():
        i = int(np.argmax(outside))
        raise UserError(
            f"the point of line {points.lines[i]:.0f} (x {x[i]:g}, y {y[i]:g}) lies outside the picture of "
            f"{width}x{height}: give pixels of the original picture, counted from 0"
        )


def at_points(depth: Float[np.ndarray, "H W"], points: Points) -> Float[np.ndarray, " n"]:
    """A map (H, W) at the points, bilinear, float64 (n,).

    Raises:
        UserError: a point outside the picture.
    """
    height, width = depth.shape
    check_inside(points, (height, width))
    x, y = points.x, points.y
    x, y = np.clip(x, 0, width - 1), np.clip(y, 0, height - 1)
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    across, down = x - left, y - top
    values = np.asarray(depth, np.float64)
    upper = values[top, left] * (1 - across) + values[top, right] * across
    lower = values[bottom, left] * (1 - across) + values[bottom, right] * across
    return upper * (1 - down) + lower * down


# The line


def check_choice(name: str, value: str, known: Sequence[str]) -> str:
    """``value`` if it is known.

    Raises:
        UserError: it is not.
    """
    if value not in known:
        raise UserError(f"unknown {name} '{value}'{did_you_mean(value, known)}")
    return value


def fit_points(
    depth: Float[np.ndarray, "H W"], points: Points, space: str = "depth", method: str = "least-squares"
) -> MetricFit:
    """Scale and shift from a prediction (H, W) to the points.

    Raises:
        UserError: a point outside the picture, fewer than two different ones, or a prediction or a distance that is
            the same at all of them: then there is no scale to find.
    """
    check_choice("align-space", space, SPACES)
    check_choice("align-fit", method, FITS)
    if len(np.unique(np.stack([points.x, points.y]), axis=1).T) < 2:
        raise UserError(f"scale and shift need two different points, got {len(points.x)} at one pixel: add one")
    values = at_points(depth, points)
    if np.ptp(values) <= 1e-6:
        raise UserError(
            f"the prediction is {values[0]:.4g} at all {len(values)} points: add one that is nearer or farther"
        )
    wanted = points.depth if space == "depth" else 1 / points.depth
    robust = method == "robust" and len(values) > 3
    scale, shift = _robust(values, wanted) if robust else fit_scale_shift(values, wanted)
    if abs(scale) * np.ptp(values) <= 1e-6 * wanted.max():
        if np.ptp(points.depth) <= 1e-6 * points.depth.max():
            raise UserError(
                f"all {len(values)} points are {points.depth[0]:.4g} m away: add one that is nearer or farther"
            )
        raise UserError(
            f"the fit to {len(values)} points gives one distance everywhere: check the columns x, y and depth, or "
            "add points"
        )
    line = scale * values + shift
    with np.errstate(divide="ignore"):
        metres = line if space == "depth" else np.where(line > 0, 1 / line, np.inf)
    return MetricFit(float(scale), float(shift), space, metres - points.depth)


def _robust(values: Float[np.ndarray, " n"], wanted: Float[np.ndarray, " n"]) -> Fit:
    """Least median of squares, then least squares of the points that are near its line (Rousseeuw 1984)."""
    scale, shift = _through_two(values, wanted)
    residuals = np.abs(scale * values + shift - wanted)
    deviation = _DEVIATION * (1 + 5 / (len(values) - 2)) * float(np.median(residuals))
    near = residuals <= _NEAR * deviation + 1e-9 * float(np.abs(wanted).max())
    return fit_scale_shift(values, wanted, near)


def _through_two(values: Float[np.ndarray, " n"], wanted: Float[np.ndarray, " n"]) -> Fit:
    """The line through two points whose absolute residual that just over half of all points keep is the smallest."""
    count = len(values)
    half = count // 2
    if count * (count - 1) // 2 <= _PAIRS:
        pairs = np.asarray(list(itertools.combinations(range(count), 2)))
    else:  # the same ones each time
        pairs = np.random.default_rng(0).integers(0, count, (_PAIRS, 2))
    step = values[pairs[:, 1]] - values[pairs[:, 0]]
    pairs, step = pairs[np.abs(step) > 1e-9], step[np.abs(step) > 1e-9]
    best, line = np.inf, fit_scale_shift(values, wanted)
    # scanned one by one: a matrix of all lines and points could be large
    for scale, (first, _) in zip((wanted[pairs[:, 1]] - wanted[pairs[:, 0]]) / step, pairs, strict=True):
        shift = wanted[first] - scale * values[first]
        size = float(np.partition(np.abs(scale * values + shift - wanted), half)[half])
        if size < best:
            best, line = size, Fit(float(scale), float(shift))
    return line


def fit_warning(depth: Float[np.ndarray, "H W"], fit: MetricFit) -> str:
    """What makes a fit doubtful, in words: inverted, or a map that is mostly too far for the PNG; '' for nothing."""
    if fit.inverted:
        return "by its points what the prediction has nearer is farther: check the columns x, y and depth"
    with np.errstate(invalid="ignore"):
        share = float(np.mean(to_metres(depth, fit) >= _FARTHEST))
    if share < _MANY:
        return ""
    return (
        f"{share:.0%} of its pixels are {_FARTHEST} m away or farther, the most that the 16-bit PNG holds: are the "
        "points in metres?"
    )


def to_metres(depth: Float[np.ndarray, "H W"], fit: MetricFit) -> Float[np.ndarray, "H W"]:
    """The whole map in metres, float32; NaN where the line gives no distance in front of the camera."""
    line = fit.scale * np.asarray(depth, np.float64) + fit.shift
    known = line > 0
    metres = np.where(known, line if fit.space == "depth" else 1 / np.where(known, line, 1), np.nan)
    return metres.astype(np.float32)
