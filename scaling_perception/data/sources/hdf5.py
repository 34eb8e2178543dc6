"""Arrays of HDF5 files (Hypersim's frames, MATLAB's .mat from version 7.3), through h5py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from scaling_perception.data.images import AGAIN, FilePath, file_errors
from scaling_perception.support.errors import UserError
from scaling_perception.support.failures import not_damage


def read_array(path: FilePath, name: str, index: int | None = None) -> np.ndarray:
    """The array ``name`` of a file, or only its entry ``index``.

    Raises:
        UserError: h5py is not installed; the file is missing, cut short or damaged, or holds no such array.
    """
    with opened(path) as file:
        array = _array(file, name, path)
        if index is not None and index >= len(array):
            raise UserError(f"{path}: {name} has {len(array)} entries, and entry {index} is asked for: {AGAIN}")
        return np.asarray(array[()] if index is None else array[index])


def array_shape(path: FilePath, name: str) -> tuple[int, ...]:
    """The shape of the array ``name``; raises as ``read_array``."""
    with opened(path) as file:
        return tuple(_array(file, name, path).shape)


def _array(file: Any, name: str, path: FilePath) -> Any:
    array = file.get(name)
    if not hasattr(array, "shape"):
        held = ", ".join(sorted(file)[:8]) or "nothing"
        raise UserError(f"{path} has no array '{name}', it holds {held}: {AGAIN}")
    return array


def need_hdf5(path: FilePath) -> Any:
    """The library that reads HDF5 files; UserError that names ``path`` where it is not installed."""
    try:
        import h5py  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"{path} needs h5py: pip install 'scaling-perception[hdf5]'") from None
    return h5py


@contextlib.contextmanager
def opened(path: FilePath) -> Iterator[Any]:
    """The open file; whatever the library raises on reading it becomes one ``UserError``."""
    library = need_hdf5(path)
    with file_errors(path):
        open(path, "rb").close()  # for the system's reason, which h5py's message hides
    try:
        with library.File(path, "r") as file:
            yield file
    except (UserError, MemoryError):
        raise
    except Exception as error:  # whatever damaged bytes make of the library
        if why := not_damage(error):
            raise UserError(f"{path} cannot be read: {why}") from None
        text = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is cut short or no HDF5 file ({text}): {AGAIN}") from None
