"""A reader of binary PLY files that follows the header alone, to check what is written."""

import struct

import numpy as np

_CODES = {"float": "f", "uchar": "B", "double": "d", "int": "i"}


def read_ply(path):
    """Comments, points (n, 3) and colours (n, 3) of a file of vertices."""
    data = path.read_bytes()
    end = data.index(b"end_header\n") + len(b"end_header\n")
    lines = data[:end].decode("ascii").splitlines()
    assert lines[0] == "ply" and lines[1] == "format binary_little_endian 1.0"
    comments = [line.removeprefix("comment ") for line in lines if line.startswith("comment ")]
    (count,) = [int(line.split()[2]) for line in lines if line.startswith("element vertex ")]
    properties = [line.split()[1:] for line in lines if line.startswith("property ")]
    row = struct.Struct("<" + "".join(_CODES[kind] for kind, _ in properties))
    assert len(data) - end == count * row.size
    table = np.asarray([row.unpack_from(data, end + i * row.size) for i in range(count)])
    column = {name: i for i, (_, name) in enumerate(properties)}
    return comments, table[:, [column[n] for n in "xyz"]], table[:, [column[n] for n in ("red", "green", "blue")]]
