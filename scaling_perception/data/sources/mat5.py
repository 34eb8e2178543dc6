"""Arrays of numbers in MATLAB's files of version 5 to 7 (``splits.mat``), whose damage must not end the process.

A file is a header of 128 bytes, then elements: a type and a length (uint32 each; of at most 4 bytes both in one word,
the data behind them), data, padding to 8 bytes. An array is an element of elements: flags, dimensions, name, values.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from scaling_perception.data.images import AGAIN, FilePath, file_errors
from scaling_perception.support.errors import UserError

_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_ARRAY, _COMPRESSED = 14, 15
_MOST = 1 << 24  # bytes of what is compressed: lists of numbers are small


def read_arrays(path: FilePath) -> dict[str, np.ndarray]:
    """Name -> array of each array of real numbers; what else the file holds is passed over.

    Raises:
        UserError: missing, cut short, damaged, or of another version.
    """
    with file_errors(path):
        data = Path(path).read_bytes()
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128], "")
    if not order or data[:6] != b"MATLAB":
        raise UserError(f"{path} is cut short or no MATLAB file of version 5 to 7: {AGAIN}")
    found: dict[str, np.ndarray] = {}
    try:
        for kind, content in _elements(data[128:], order):
            if kind == _COMPRESSED:
                ((kind, content),) = _elements(_decompressed(content), order)
            if kind == _ARRAY:
                found.update(_array(content, order))
    except (ValueError, struct.error, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is cut short or damaged ({error}): {AGAIN}") from None
    return found


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    place = 0
    while place < len(data):
        kind, size = struct.unpack_from(order + "II", data, place)
        start = place + 8
        if kind >> 16:  # a short one
            kind, size, start = kind & 0xFFFF, kind >> 16, place + 4
            if size > 4:
                raise ValueError(f"a short element of {size} bytes")
        if start + size > len(data):
            raise ValueError(f"{start + size - len(data)} bytes are missing")
        yield kind, data[start : start + size]
        place = start + size
        place += 0 if kind == _COMPRESSED else -place % 8


def _decompressed(content: bytes) -> bytes:
    reader = zlib.decompressobj()
    data = reader.decompress(content, _MOST)
    if not reader.eof:
        raise ValueError("what is compressed has no end")
    return data


def _array(content: bytes, order: str) -> dict[str, np.ndarray]:
    """{name: array}; {} for cells, text, complex numbers and whatever else has another form."""
    parts = list(_elements(content, order))
    if len(parts) != 4:
        return {}
    (_, flags), (_, sizes), (_, name), (kind, values) = parts
    array_class = flags[0 if order == "<" else 3]
    if kind not in _NUMBERS or not 6 <= array_class <= 15:
        return {}
    shape = np.frombuffer(sizes, order + "i4")
    return {name.decode("ascii"): np.frombuffer(values, order + _NUMBERS[kind]).reshape(shape, order="F")}
