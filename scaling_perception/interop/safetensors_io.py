"""Parameter trees as safetensors files: nested names joined by '/', whole files or none, one-line errors."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from scaling_perception.support.errors import UserError
from scaling_perception.support.files import atomic_path

Tree = dict[str, Any]  # nested dict of arrays


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


def source_of(tensors: Mapping[str, Any], origin: str) -> TensorSource:
    """The source of arrays that are in memory (numpy or JAX)."""
    shapes = {name: tuple(np.shape(array)) for name, array in tensors.items()}
    dtypes = {name: np.asarray(array).dtype for name, array in tensors.items()}
    return TensorSource(shapes, dtypes, lambda name: np.asarray(tensors[name]), origin)


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


def load_tree(path: str | os.PathLike[str]) -> tuple[Tree, dict[str, str]]:
    """Read a safetensors file: (nested dict of numpy arrays on the host, metadata).

    Raises:
        UserError: the file is missing, unreadable, truncated or no safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: check the path")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            flat = {name: file.get_tensor(name) for name in file.keys()}
        return unflatten_tree(flat), metadata
    except SafetensorError as error:
        raise UserError(f"{path} is no whole safetensors file ({error}): copy or download it again") from error
    except ValueError as error:
        raise UserError(f"{path} holds names that make no tree: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
