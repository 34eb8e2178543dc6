"""Files of ground truth: .flo, .pfm, .npy, .exr, .tif, 16-bit PNG (pictures and masks have modules of their own), and
their colours.

Readers raise ``UserError`` that names the file and the mending for anything missing, truncated, corrupt or of the wrong
kind. Writers go through ``atomic_path``: a file is whole or absent.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from scaling_perception.data.images import AGAIN, FilePath, file_errors, open_image
from scaling_perception.data.images import image_size as image_size
from scaling_perception.data.images import read_image as read_image
from scaling_perception.data.images import read_png16 as read_png16
from scaling_perception.data.images import write_image as write_image
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import atomic_path
from scaling_perception.tasks.colours import UNKNOWN_FLOW as UNKNOWN_FLOW
from scaling_perception.tasks.colours import depth_to_color as depth_to_color
from scaling_perception.tasks.colours import flow_to_color as flow_to_color
from scaling_perception.tasks.colours import flow_valid as flow_valid
from scaling_perception.tasks.normals import check_lengths, unit

FLO_MAGIC = 202021.25

# Bytes


def _read_bytes(path: FilePath) -> bytes:
    with file_errors(path):
        return Path(path).read_bytes()


def float32(array: np.ndarray) -> np.ndarray:
    """``array`` as float32; what is larger than that holds becomes infinite, which is invalid everywhere."""
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float32)


# Optical flow


def read_flo(path: FilePath) -> np.ndarray:
    """A Middlebury .flo file (facts 5.2): magic, width, height, then (u, v) interleaved, all little-endian.

    Returns:
        float32 (H, W, 2), pixels, as stored: unknown components stay huge (see ``flow_valid``).

    Raises:
        UserError: missing, wrong magic, or a length that does not fit width and height.
    """
    data = _read_bytes(path)
    if len(data) < 12:
        raise UserError(f"{path} is cut short ({len(data)} bytes, a .flo header has 12): {AGAIN}")
    magic, width, height = struct.unpack("<fii", data[:12])
    if magic != FLO_MAGIC:
        raise UserError(f"{path} is no .flo file (magic {magic:g}, not {FLO_MAGIC}): check the file")
    if width < 1 or height < 1:
        raise UserError(f"{path} is no .flo file (its header says {width} x {height} pixels): {AGAIN}")
    wanted = 12 + 8 * width * height
    if len(data) != wanted:
        size = f"{len(data)} bytes where {width}x{height} needs {wanted}"
        raise UserError(f"{path} is cut short or damaged ({size}): {AGAIN}")
    return np.frombuffer(data, "<f4", offset=12).reshape(height, width, 2).astype(np.float32)


def write_flo(path: FilePath, flow: np.ndarray) -> None:
    """Write (H, W, 2) as .flo; NaN is written as it is, so mark unknown pixels with 1e10 first."""
    flow = np.asarray(flow)
    if flow.ndim != 3 or flow.shape[-1] != 2:
        raise ValueError(f"flow has shape {flow.shape}, expected (H, W, 2)")
    with atomic_path(path) as temporary:
        header = struct.pack("<fii", FLO_MAGIC, flow.shape[1], flow.shape[0])
        temporary.write_bytes(header + np.ascontiguousarray(flow, "<f4").tobytes())


def read_kitti_flow(path: FilePath) -> tuple[np.ndarray, np.ndarray]:
    """KITTI's 16-bit RGB PNG: (u, v, valid), flow = (stored - 32768) / 64.

    Returns:
        flow float32 (H, W, 2), -512 where the file stores 0; valid bool (H, W).

    Raises:
        UserError: as ``read_png16``, one channel, or a third channel that is not 0 or 1.
    """
    stored = read_png16(path)
    if stored.ndim != 3:
        raise UserError(f"{path} has one channel, a KITTI flow file has three: check the file")
    if (top := int(stored[..., 2].max())) > 1:
        raise UserError(
            f"{path} is no KITTI flow: its third channel must be 0 or 1 (valid) and holds {top}: "
            "was it written as BGR (OpenCV)? Swap the channels"
        )
    flow = (stored[..., :2].astype(np.float32) - 32768) / 64
    return flow, stored[..., 2] > 0


def write_kitti_flow(path: FilePath, flow: np.ndarray, valid: np.ndarray | None = None) -> None:
    """Write (H, W, 2) as KITTI's PNG, rounded to 1/64 pixel and kept within +-512; invalid pixels are stored as 0."""
    flow = np.asarray(flow)
    valid = flow_valid(flow) if valid is None else np.asarray(valid, bool) & flow_valid(flow)
    known = np.where(valid[..., None], flow, 0).astype(np.float64)
    stored = np.clip(np.round(known * 64 + 32768), 0, 65535)
    stored = np.concatenate([stored, np.ones_like(stored[..., :1])], axis=-1)
    write_png16(path, np.where(valid[..., None], stored, 0).astype(np.uint16))


def read_flow(path: FilePath) -> tuple[np.ndarray, np.ndarray]:
    """Flow by suffix: .flo, .png (KITTI), .pfm (two first of three channels), .npy.

    Returns:
        flow float32 (H, W, 2) pixels, 0 where invalid; valid bool (H, W).
    """
    suffix = Path(path).suffix.lower()
    known = None
    if suffix == ".flo":
        flow = read_flo(path)
    elif suffix == ".png":
        flow, known = read_kitti_flow(path)
    elif suffix in (".pfm", ".npy"):
        flow = read_pfm(path) if suffix == ".pfm" else read_npy(path)
        if flow.ndim != 3 or flow.shape[-1] not in (2, 3):
            raise UserError(f"{path} holds {flow.shape}: flow needs (H, W, 2)")
        flow = float32(flow[..., :2])
    else:
        raise UserError(f"{path}: unknown flow format '{suffix}': give .flo, .png (KITTI), .pfm or .npy")
    valid = flow_valid(flow) if known is None else known & flow_valid(flow)
    return np.where(valid[..., None], flow, np.float32(0)), valid


# Float maps

_PFM_HEADER = re.compile(rb"(PF|Pf)\s+(\d+)\s+(\d+)\s+([-+0-9.eE]+)(?:\r\n|\s)")


def read_pfm(path: FilePath) -> np.ndarray:
    """A portable float map of either byte order (the sign of its scale tells), rows turned to top first.

    Returns:
        float32 (H, W) or (H, W, 3), as stored (the size of the scale is not applied, as everywhere).
    """
    data = _read_bytes(path)
    header = _PFM_HEADER.match(data)
    if not header:
        raise UserError(f"{path} is no .pfm file (its header is not PF or Pf, width, height, scale): check the file")
    channels = 3 if header[1] == b"PF" else 1
    width, height = int(header[2]), int(header[3])
    try:
        order = "<f4" if float(header[4]) < 0 else ">f4"
    except ValueError:
        raise UserError(f"{path} is no .pfm file (scale {header[4].decode()}): check the file") from None
    wanted = header.end() + 4 * width * height * channels
    if len(data) != wanted or not width or not height:
        size = f"{len(data)} bytes where {width}x{height} needs {wanted}"
        raise UserError(f"{path} is cut short or damaged ({size}): {AGAIN}")
    rows = np.frombuffer(data, order, offset=header.end()).reshape(height, width, channels)[::-1].astype(np.float32)
    return rows if channels == 3 else rows[..., 0]


def read_npy(path: FilePath, kinds: str = "fiu") -> np.ndarray:
    """The array of an ``.npy`` file, of one of the numpy ``kinds``; nothing is unpickled.

    Raises:
        UserError: missing, damaged, empty, or of another kind.
    """
    with file_errors(path):
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise UserError(f"{path} is no whole .npy file ({error}): save it again with numpy.save") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in kinds or not array.size:
        raise UserError(f"{path} holds no array of numbers: save it again with numpy.save")
    return array


# Surface normals


def read_normals(path: FilePath) -> tuple[np.ndarray, np.ndarray]:
    """A .npy of unit vectors (H, W, 3), x right, y down, z away; or a picture in which right is red, up is green and
    towards the camera is blue, 127.5 being none of it, as `predict` writes it.

    Returns:
        float32 (H, W, 3), scaled to unit length, and bool (H, W) where there is a direction (not: NaN, 0, black).

    Raises:
        UserError: missing, damaged, of another shape, integers in a .npy, or most vectors are not of unit length.
    """
    if Path(path).suffix.lower() == ".npy":
        stored = read_npy(path)
        if stored.dtype.kind != "f":
            raise UserError(
                f"{path} holds {stored.dtype}: normals in .npy are floats, unit vectors (save colours as .png)"
            )
        vectors = float32(stored)
        if vectors.ndim != 3 or vectors.shape[-1] != 3:
            raise UserError(f"{path} has shape {vectors.shape}: normals are (H, W, 3)")
        with np.errstate(invalid="ignore"):
            valid = np.asarray(np.isfinite(vectors).all(axis=-1) & (np.abs(vectors).max(axis=-1) > 1e-6))
    else:
        colours = read_image(path, upright=False)
        valid = np.asarray(colours.any(axis=-1))
        vectors = (colours.astype(np.float32) / 127.5 - 1) * np.array([1, -1, -1], np.float32)
    check_lengths(vectors[valid], f"{path}: normals")
    return unit(np.where(valid[..., None], vectors, 0)), valid


# PNG of 16 bits


def write_png16(path: FilePath, array: np.ndarray) -> None:
    """Write uint16 (H, W) or (H, W, 3) as a 16-bit PNG (grey or RGB); Pillow cannot write 16-bit RGB."""
    array = np.asarray(array)
    if array.dtype != np.uint16 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] != 3):
        raise ValueError(f"array is {array.dtype} {array.shape}, expected uint16 (H, W) or (H, W, 3)")
    height, width = array.shape[:2]
    rows = np.ascontiguousarray(array, ">u2").view(np.uint8).reshape(height, -1)
    # Filter 2 (up): each byte minus the one above, modulo 256; one numpy line, and it compresses well.
    filtered = np.full((height, rows.shape[1] + 1), 2, np.uint8)
    filtered[0, 1:] = rows[0]
    filtered[1:, 1:] = rows[1:] - rows[:-1]
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if array.ndim == 3 else 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes(), 6)), (b"IEND", b"")]
    with atomic_path(path) as temporary:
        body = b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
        temporary.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def read_depth(path: FilePath, scale: float | None = None, eight_bits: bool | None = None) -> np.ndarray:
    """Depth by suffix, see ``read_stored``.

    Args:
        path: the file.
        scale: stored units a metre. None: 1000 (millimetres) for integers, 1 for floats.
        eight_bits: take 8 bits too, which are more often a picture of depth than depth; None: where there is a scale.

    Returns:
        float32 (H, W) metres; whatever marks invalid pixels (0, NaN, inf) is kept.
    """
    stored = read_stored(path, eight_bits=scale is not None if eight_bits is None else eight_bits)
    divisor = scale if scale is not None else (1000.0 if stored.dtype.kind in "iu" else 1.0)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        return float32(stored) / np.float32(divisor)


def read_stored(path: FilePath, eight_bits: bool = False) -> np.ndarray:
    """A map of one channel as it is stored: .png and .tif (grey integers, or floats), .pfm, .npy, .exr.

    Args:
        eight_bits: take pictures of 8 bits too.

    Returns:
        (H, W) integers or floats.

    Raises:
        UserError: missing, damaged, of another kind, or of several channels.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".png":
        stored = read_png16(path, eight_bits=eight_bits)
    elif suffix in (".tif", ".tiff"):
        stored = read_tiff(path, eight_bits=eight_bits)
    elif suffix == ".pfm":
        stored = read_pfm(path)
    elif suffix == ".npy":
        stored = read_npy(path)
    elif suffix == ".exr":
        stored = read_exr(path)
    else:
        raise UserError(f"{path}: unknown depth format '{suffix}': give a 16-bit .png, .tif, .pfm, .npy or .exr")
    if stored.ndim == 3 and stored.shape[-1] == 1:
        stored = stored[..., 0]
    if stored.ndim != 2:
        raise UserError(f"{path} holds {stored.shape}: depth needs one channel (H, W)")
    return stored


_DEPTH_CHANNELS = ("z", "depth", "y", "v")  # by which programs call depth, the surest first


def need_exr(path: FilePath) -> Any:
    """The library that reads .exr files; UserError that names ``path`` where it is not installed."""
    try:
        import OpenEXR  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"{path} needs OpenEXR: pip install 'scaling-perception[exr]'") from None
    return OpenEXR


def read_exr(path: FilePath) -> np.ndarray:
    """The one channel of an OpenEXR file, or of several the one called Z (or ``ANYTHING.Z``), depth, Y or V; three
    equal channels R, G, B are one.

    Returns:
        float32 (H, W) as stored (float16 and uint32 too become float32).

    Raises:
        UserError: OpenEXR is not installed; missing, damaged, or none of its channels is depth by its name.
    """
    library = need_exr(path)
    _read_bytes(path)  # for the system's reason, which the library does not give
    try:
        with library.File(os.fspath(path), separate_channels=True) as file:
            channels = {name: np.array(one.pixels, np.float32) for name, one in file.channels().items()}
    except MemoryError:
        raise
    except Exception as error:  # whatever damaged bytes make of the library
        text = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is cut short or no OpenEXR file ({text}): {AGAIN}") from None
    by_name = {name.rpartition(".")[2].lower(): name for name in reversed(channels)}
    if len(channels) == 1:
        return next(iter(channels.values()))
    for name in _DEPTH_CHANNELS:
        if name in by_name:
            return channels[by_name[name]]
    colours = [channels[by_name[name]] for name in "rgb" if name in by_name]
    if len(colours) == 3 and all(np.array_equal(colours[0], one, equal_nan=True) for one in colours[1:]):
        return colours[0]
    held = ", ".join(channels) or "none"
    raise UserError(f"{path} has the channels {held}, and none is called Z: save depth as one channel")


def read_tiff(path: FilePath, eight_bits: bool = False) -> np.ndarray:
    """The one page of a TIFF of one channel: 16-bit or 32-bit integers, or 32-bit floats; 8 bits where asked for.

    Raises:
        UserError: missing, damaged, of another kind, or of several pages.
    """
    with open_image(path) as image:
        kinds = ("I;16", "I;16B", "I;16L", "I", "F", *(("L",) if eight_bits else ()))
        if image.format != "TIFF" or image.mode not in kinds:
            kind = f"a {image.format} picture of {'8 bits' if image.mode == 'L' else image.mode}"
            raise UserError(f"{path} is {kind}: give one channel of 16 bits or of floats, or depth_scale for 8 bits")
        if (pages := getattr(image, "n_frames", 1)) > 1:
            raise UserError(f"{path} has {pages} pages: save each as a file of its own")
        array = np.asarray(image)
        return array.astype(array.dtype.newbyteorder("="))


def read_raw_depth(path: FilePath, size: tuple[int, int]) -> np.ndarray:
    """ETH3D's depth: float32 little-endian rows without a header, whatever the file's suffix; inf where unknown.

    Args:
        path: the file.
        size: (H, W), which only the picture tells (4032 x 6048 in the release).

    Returns:
        float32 (H, W) metres, as stored.

    Raises:
        UserError: missing, or a length that does not fit the size.
    """
    data = _read_bytes(path)
    height, width = size
    if len(data) != 4 * height * width:
        wanted = f"{len(data)} bytes where float32 of {width}x{height} needs {4 * height * width}"
        raise UserError(f"{path} is no raw depth of its picture ({wanted}): {AGAIN}")
    return np.frombuffer(data, "<f4").reshape(height, width).astype(np.float32)


def write_depth_png(path: FilePath, depth: np.ndarray, scale: float = 1000.0) -> None:
    """Write metres (H, W) as a 16-bit PNG of ``round(depth * scale)``; invalid (NaN, inf, <= 0) becomes 0.

    Depths too far for 16 bits saturate at 65535 instead of wrapping round (facts 5.1 names that trap).
    """
    depth = np.asarray(depth, np.float64)
    with np.errstate(invalid="ignore"):
        known = np.isfinite(depth) & (depth > 0)
    write_png16(path, np.clip(np.round(np.where(known, depth, 0) * scale), 0, 65535).astype(np.uint16))


VECTORS = {"flow": read_flow, "normals": read_normals}
"""Fields whose files hold vectors and where they are valid -> their reader."""
