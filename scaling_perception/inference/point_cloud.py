"""Depth and a pinhole camera to coloured points, and points to a PLY file.

The camera looks along +z, x is right and y is down (OpenCV's and COLMAP's axes); the middle of the top left pixel is
(0, 0), as OpenCV counts.
"""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from scaling_perception.support.errors import UserError
from scaling_perception.support.files import atomic_path

_VERTEX = np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)])
_PROPERTIES = [
    *(f"property float {axis}" for axis in "xyz"),
    *(f"property uchar {c}" for c in ("red", "green", "blue")),
]


class Camera(NamedTuple):
    """A pinhole camera in pixels."""

    fx: float
    fy: float
    cx: float
    cy: float


def parse_camera(text: str) -> Camera:
    """``fx,fy,cx,cy`` in pixels.

    Raises:
        UserError: not four numbers, or a focal length that is not above 0.
    """
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)) or min(numbers[:2]) <= 0:
        raise UserError(f"--intrinsics {text}: give fx,fy,cx,cy in pixels, fx and fy above 0")
    return Camera(*numbers)


def camera_of_fov(degrees: float, size: tuple[int, int]) -> Camera:
    """A camera of square pixels that sees ``degrees`` across the width of a picture (H, W), looking at its middle.

    Raises:
        UserError: not between 0 and 180 degrees.
    """
    if not 0 < degrees < 180:
        raise UserError(f"--fov {degrees:g}: give the degrees across the picture's width, above 0 and below 180")
    height, width = size
    focal = width / 2 / math.tan(math.radians(degrees) / 2)
    return Camera(focal, focal, (width - 1) / 2, (height - 1) / 2)


def unproject(depth: Float[np.ndarray, "H W"], camera: Camera) -> Float[np.ndarray, "H W 3"]:
    """Distances along the camera's axis (H, W) to points float32 (H, W, 3) in the same unit."""
    height, width = depth.shape
    x = (np.arange(width) - camera.cx) / camera.fx
    y = (np.arange(height) - camera.cy) / camera.fy
    z = np.asarray(depth, np.float64)
    return np.stack([z * x[None, :], z * y[:, None], z], axis=-1).astype(np.float32)


def write_ply(
    path: str | os.PathLike[str],
    points: Float[np.ndarray, "H W 3"],
    colours: UInt8[np.ndarray, "H W 3"],
    comments: Sequence[str] = (),
) -> None:
    """Write coloured points as a binary little-endian PLY: float x, y, z and uchar red, green, blue.

    Args:
        points: float (..., 3); those that are not finite are left out.
        colours: uint8 (..., 3).
        comments: lines of ASCII for the header.

    Raises:
        UserError: the file cannot be written.
    """
    points, colours = np.reshape(points, (-1, 3)), np.reshape(colours, (-1, 3))
    known = np.isfinite(points).all(axis=1)
    vertices = np.empty(int(known.sum()), _VERTEX)
    vertices["xyz"], vertices["rgb"] = points[known], colours[known]
    header = [
        "ply",
        "format binary_little_endian 1.0",
        *(f"comment {line}" for line in comments),
        f"element vertex {len(vertices)}",
        *_PROPERTIES,
        "end_header",
    ]
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(("\n".join(header) + "\n").encode("ascii"))
        file.write(vertices.tobytes())
