"""Parameter trees as safetensors files: nested names joined by '/', whole files or none, one-line errors."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  gives numpy the names bfloat16 and float8
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from scaling_perception.support.errors import UserError
from scaling_perception.support.files import atomic_path

Tree = dict[str, Any]  # nested dict of arrays

# numpy's name -> the format's
DTYPE_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_DTYPES = {code: np.dtype(name) for name, code in DTYPE_CODES.items()}


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """Named tensors that can be read one at a time, wherever they are.

    Attributes:
        shapes, dtypes: of every tensor, known before any is read; dtypes are numpy's (bfloat16 that of ``ml_dtypes``).
        read: name -> array on the host. Where the file allows it is a read-only view of the mapped file, which costs
            memory only while it is held and used.
        origin: where they are from, for people.
        metadata: text by name, as the file has it.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]
    read: Callable[[str], np.ndarray]
    origin: str
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)


def dtype_of(array: Any) -> np.dtype:
    """The numpy dtype of an array; one on a device stays there."""
    return np.dtype(array.dtype if hasattr(array, "dtype") else np.asarray(array).dtype)


def source_of(tensors: Mapping[str, Any], origin: str) -> TensorSource:
    """The source of arrays that are in memory (numpy or JAX)."""
    shapes = {name: tuple(np.shape(array)) for name, array in tensors.items()}
    dtypes = {name: dtype_of(array) for name, array in tensors.items()}
    return TensorSource(shapes, dtypes, lambda name: np.asarray(tensors[name]), origin)


def is_floating(dtype: Any) -> bool:
    """Whether the dtype is one of floating-point numbers, those of ``ml_dtypes`` included."""
    return np.dtype(dtype).kind == "f" or np.dtype(dtype).name.startswith(("bfloat", "float8"))


def cast(name: str, values: Any, dtype: Any) -> np.ndarray:
    """The values of tensor ``name`` as a contiguous array of ``dtype``.

    Raises:
        UserError: a value is NaN or infinite, or becomes so.
    """
    values = np.asarray(values)
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.ascontiguousarray(values, dtype).reshape(values.shape)
    if not is_floating(dtype) or np.isfinite(array).all():
        return array
    if not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        raise UserError(f"tensor {name} holds {count} value(s) that are NaN or infinite: give weights that are finite")
    wider, most = "bfloat16" if np.dtype(dtype) == np.float16 else "float32", float(np.abs(values).max())
    raise UserError(f"tensor {name} does not fit {np.dtype(dtype)}, for its largest value is {most:g}: use {wider}")


def flatten_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}, in the order of the tree.

    Raises:
        ValueError: a name is no text, holds '/', or names an empty branch, which a file of tensors cannot hold.
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if not isinstance(name, str) or "/" in name:
            raise ValueError(f"cannot name a tensor {name!r}: names are text without '/'")
        if not isinstance(value, Mapping):
            flat[name] = value
            continue
        below = flatten_tree(value)
        if not below:
            raise ValueError(f"branch {name!r} is empty: a file of tensors cannot hold it")
        flat.update({f"{name}/{rest}": leaf for rest, leaf in below.items()})
    return flat


def unflatten_tree(flat: Mapping[str, Any]) -> Tree:
    """{"a/b": x} -> {"a": {"b": x}}.

    Raises:
        ValueError: a name is both a tensor and a branch.
    """
    tree: Tree = {}
    for name, leaf in flat.items():
        *branches, last = name.split("/")
        node: Any = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name}: a part of this name is a tensor itself")
        if last in node:
            raise ValueError(f"{name} is both a tensor and a branch")
        node[last] = leaf
    return tree


class Entry(NamedTuple):
    """Where a tensor's bytes are: row-major, little-endian, from ``offset`` of the file on."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def view(self) -> np.ndarray:
        """The tensor as a read-only view of the mapped file: only what is used of it is read."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)  # nothing can be mapped
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


def read_entries(path: str | os.PathLike[str]) -> tuple[dict[str, Entry], dict[str, str]]:
    """(every tensor's place, metadata) of one safetensors file; no data is read.

    Raises:
        UserError: the file is missing, unreadable, truncated, no safetensors file, or of a dtype that numpy lacks.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: check the path")
    try:
        with safe_open(path, framework="numpy") as file:  # checks that the header is sound and the file whole
            metadata = dict(file.metadata() or {})
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except SafetensorError as error:
        why = foreign_content(path) or f"is no whole safetensors file ({error}): copy or download it again"
        raise UserError(f"{path} {why}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    entries = {}
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        if fields["dtype"] not in _DTYPES:
            raise UserError(f"{path}: tensor {name} has dtype {fields['dtype']}, which numpy lacks: convert it to F32")
        start = 8 + length + fields["data_offsets"][0]
        entries[name] = Entry(path, _DTYPES[fields["dtype"]], tuple(fields["shape"]), start)
    return entries, metadata


def source_of_entries(entries: Mapping[str, Entry], origin: str, metadata: Mapping[str, str]) -> TensorSource:
    """The source that maps each tensor from its file when it is asked for."""
    return TensorSource(
        {name: entry.shape for name, entry in entries.items()},
        {name: entry.dtype for name, entry in entries.items()},
        lambda name: entries[name].view(),
        origin,
        dict(metadata),
    )


def foreign_content(path: Path) -> str | None:
    """What a file that should hold tensors holds instead, where that is easily told, and how to mend it."""
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "is empty: download it again"
    if head.startswith(b"version https://git-lfs"):
        return "is only a Git LFS pointer: fetch the file itself (git lfs pull)"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not a checkpoint: download the file itself"
    return None


def write_tensors(path: str | os.PathLike[str], tree: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write the tensors of ``tree`` to ``path`` as it stands (see ``save_tree`` for a whole file or none).

    Raises:
        UserError: the file cannot be written, such as on a full disk.
    """
    tensors = {name: np.asarray(leaf, order="C") for name, leaf in flatten_tree(tree).items()}
    try:
        save_file(tensors, path, metadata={str(name): str(text) for name, text in metadata.items()})
    except SafetensorError as error:  # the writer reports a full disk this way, not as an OSError
        raise UserError(f"cannot write {path}: {error}; free space or choose another folder, then run again") from error


def save_tree(path: str | os.PathLike[str], tree: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write a nested dict of arrays (numpy or JAX, any float, integer or bool dtype) as one safetensors file.

    The file is written beside ``path``, flushed and renamed, so that ``path`` is either whole or as it was before.

    Args:
        metadata: text by name, kept in the file's header.

    Raises:
        UserError: the file cannot be written, such as on a full disk.
        ValueError: a name of the tree cannot name a tensor.
    """
    with atomic_path(path) as temporary:
        write_tensors(temporary, tree, metadata or {})
