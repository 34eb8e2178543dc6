"""ScanNet's .sens recordings (version 4): colour as JPEG or PNG, depth as compressed 16-bit integers.

A file is a header, then frame after frame. All numbers are little-endian.

    uint32 version; uint64 n, n bytes: the sensor's name
    float32 x 16, four times: intrinsics and extrinsics of colour, of depth
    int32 compression of colour (1 PNG, 2 JPEG), of depth (0 none, 1 zlib)
    uint32 width and height of colour, of depth; float32 depth units a metre; uint64 number of frames
    a frame: float32 x 16 pose; uint64 time of colour, of depth, bytes of colour, of depth; colour, depth
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from scaling_perception.data.images import AGAIN, FilePath, file_errors
from scaling_perception.data.sources.imagenet import decode
from scaling_perception.support.errors import UserError

_VERSION = 4
_MOST = 1 << 14  # pixels of a side
_FRAME = struct.Struct("<64x16xQQ")  # pose and times are not needed


class Recording(NamedTuple):
    """What a header says: sizes (H, W), units a metre, compressions, frames, and where the first begins."""

    colour: tuple[int, int]
    depth: tuple[int, int]
    scale: float
    kinds: tuple[int, int]
    frames: int
    start: int


def read_header(path: FilePath) -> Recording:
    """The header of a recording.

    Raises:
        UserError: missing, cut short, of another version, or of a compression that is not read.
    """
    with file_errors(path), open(path, "rb") as file:
        return _header(file, path)


def frame_offsets(path: FilePath) -> np.ndarray:
    """Where each frame begins that is whole, int64 (frames,): fewer than the header says of a file that is cut short.

    Raises:
        UserError: as ``read_header``.
    """
    with file_errors(path), open(path, "rb") as file:
        about, size = _header(file, path), os.fstat(file.fileno()).st_size
        found, place = [], about.start
        while len(found) < about.frames and place + _FRAME.size <= size:
            file.seek(place)
            end = place + _FRAME.size + sum(_FRAME.unpack(file.read(_FRAME.size)))
            if end > size:
                break
            found.append(place)
            place = end
        return np.array(found, np.int64)


def read_frame(path: FilePath, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Colour uint8 (H, W, 3) and depth float32 (h, w) metres, 0 where unknown, of the frame that begins at ``offset``.

    Raises:
        UserError: the frame is cut short or damaged.
    """
    with file_errors(path), open(path, "rb") as file:
        about = _header(file, path)
        file.seek(offset)
        lengths = _FRAME.unpack(_bytes(file, _FRAME.size, path, "a frame"))
        colour, depth = (_bytes(file, length, path, "a frame") for length in lengths)
    image = decode(colour, f"{path}, the colour at byte {offset},")
    if image.shape[:2] != about.colour:
        says = f"colour of {_text(image.shape)} where its header says {_text(about.colour)}"
        raise UserError(f"{path} holds {says}: {AGAIN}")
    try:
        if about.kinds[1] == 1:
            depth = zlib.decompressobj().decompress(depth, 2 * about.depth[0] * about.depth[1] + 1)
    except zlib.error as error:
        raise UserError(f"{path} is damaged (the depth at byte {offset}: {error}): {AGAIN}") from None
    if len(depth) != 2 * about.depth[0] * about.depth[1]:
        raise UserError(f"{path} holds {len(depth)} bytes of depth for {_text(about.depth)}: {AGAIN}")
    return image, np.frombuffer(depth, "<u2").reshape(about.depth).astype(np.float32) / np.float32(about.scale)


def _header(file: BinaryIO, path: FilePath) -> Recording:
    version, name = struct.unpack("<IQ", _bytes(file, 12, path, "the header"))
    if version != _VERSION or name > 4096:
        raise UserError(f"{path} is no .sens recording of version {_VERSION} (it says {version}): check the file")
    _bytes(file, name + 4 * 64, path, "the header")
    found: Any = struct.unpack("<2i4IfQ", _bytes(file, 36, path, "the header"))
    colour, depth, width, height, depth_width, depth_height, scale, frames = found
    if colour not in (1, 2) or depth not in (0, 1):
        raise UserError(f"{path} is compressed in a way that is not read (colour {colour}, depth {depth}): export it")
    if frames * _FRAME.size > os.fstat(file.fileno()).st_size:
        raise _cut(path, f"it says {frames} frames")
    if not all(0 < one <= _MOST for one in (width, height, depth_width, depth_height)):
        sizes = f"colour of {width}x{height} and depth of {depth_width}x{depth_height}"
        raise UserError(f"{path} says {sizes}: {AGAIN}")
    if not 1e-3 < scale < 1e9:
        raise UserError(f"{path} says {scale:g} depth units a metre: {AGAIN}")
    return Recording((height, width), (depth_height, depth_width), scale, (colour, depth), frames, file.tell())


def _bytes(file: BinaryIO, count: int, path: FilePath, what: str) -> bytes:
    found = file.read(count) if count <= os.fstat(file.fileno()).st_size else b""
    if len(found) != count:
        raise _cut(path, f"within {what}")
    return found


def cut_short(path: FilePath, number: int, frames: int) -> UserError:
    """What is wrong with a file that ends before frame ``number``."""
    return _cut(path, f"before the end of frame {number} of {frames}")


def _cut(path: FilePath, where: str) -> UserError:
    return UserError(f"{path} is cut short ({where}): {AGAIN}")


def _text(size: Any) -> str:
    return f"{size[1]}x{size[0]}"
