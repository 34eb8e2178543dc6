"""Weights as one safetensors file or several with an index, written and read slice by slice.

The names are Hugging Face's: ``model.safetensors``, or ``model-00001-of-0000N.safetensors`` with
``model.safetensors.index.json``. The index is renamed into place last, so that without it a set of files is no model.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scaling_perception.interop.safetensors_io import (
    DTYPE_CODES,
    Entry,
    TensorSource,
    cast,
    flatten_tree,
    read_entries,
    source_of_entries,
    unflatten_tree,
)
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import atomic_path, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 * 2**30

# in the order in which they are looked for: a folder may still hold an older single file beside an index
_NAMES = (INDEX, "diffusion_pytorch_model.safetensors.index.json", SINGLE, "diffusion_pytorch_model.safetensors")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

Progress = Callable[[int, int], None]
Slice = tuple[str, tuple[int, ...], Any]


def find_weights(folder: str | os.PathLike[str]) -> Path | None:
    """The index or the single file that holds a folder's weights, or None."""
    return next((path for name in _NAMES if (path := Path(folder) / name).is_file()), None)


def save_sharded(
    folder: str | os.PathLike[str],
    specs: Mapping[str, Any],
    slices: Iterable[Slice],
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> list[Path]:
    """Write tensors slice by slice; what is in memory at any time is one slice. Whole files or none.

    Earlier weights in the folder are replaced, and what is left of them removed, after the new ones are on disk.

    Args:
        specs: name -> anything with ``shape`` and ``dtype``, for every tensor.
        slices: (name, index, array) with ``tensor[index] = array``, where ``index`` is the first few axes' numbers, ()
            for a whole tensor. Every element exactly once, in any order; arrays are cast to the tensor's dtype.
        metadata: text by name, kept in every file's header.
        max_shard_bytes: a file that would grow beyond gets a successor; a larger tensor has a file of its own.
        progress: called with (bytes written, bytes in all) after each slice.

    Returns:
        The files, the index last.

    Raises:
        UserError: a file cannot be written, such as on a full disk; a value is not finite, or does not fit its dtype.
        ValueError: the slices do not make up the tensors.
    """
    folder = Path(folder)
    shards = _split(specs, max_shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    total = sum(_nbytes(spec) for spec in specs.values())
    _require_space(folder, total)
    with contextlib.ExitStack() as stack:
        # the stack is left in reverse: the index, entered first, is renamed last
        index = stack.enter_context(atomic_path(folder / INDEX)) if len(shards) > 1 else None
        entries: dict[str, Entry] = {}
        handles: dict[Path, int] = {}
        for name, shard in reversed(list(zip(names, shards, strict=True))):
            temporary = stack.enter_context(atomic_path(folder / name))
            header, places = _header(temporary, {tensor: specs[tensor] for tensor in shard}, metadata or {})
            entries |= places
            handles[temporary] = handle = os.open(temporary, os.O_WRONLY)
            stack.callback(os.close, handle)
            _write(handle, header, 0, folder / name)
        _fill(entries, handles, slices, folder, total, progress)
        if index:
            weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
            handles[index] = handle = os.open(index, os.O_WRONLY)
            stack.callback(os.close, handle)
            _write(handle, f"{text}\n".encode(), 0, folder / INDEX)
        for handle in handles.values():
            os.fsync(handle)  # all of them, before the first is renamed
        (folder / INDEX).unlink(missing_ok=True)  # from here on, old and new shards may mix
    kept = [*names, INDEX] if len(shards) > 1 else names
    for path in folder.iterdir():
        if (_SHARD.fullmatch(path.name) or path.name in (SINGLE, INDEX)) and path.name not in kept:
            path.unlink()
    return [folder / name for name in kept]


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _nbytes(spec: Any) -> int:
    return prod(spec.shape) * np.dtype(spec.dtype).itemsize


def _split(specs: Mapping[str, Any], limit: int) -> list[list[str]]:
    """Names of the tensors of each file. A tensor beyond the limit is alone; those around it stay together."""
    shards: list[list[str]] = []
    current: list[str] | None = None
    room = 0
    for name, spec in specs.items():
        size = _nbytes(spec)
        if size > limit:
            shards.append([name])
            continue
        if current is None or size > room:
            current, room = [], limit
            shards.append(current)
        current.append(name)
        room -= size
    return shards or [[]]


def _require_space(folder: Path, total: int) -> None:
    near = folder.absolute()
    while not near.exists():
        near = near.parent
    free = shutil.disk_usage(near).free
    if free < total:
        raise UserError(
            f"cannot write {folder}: it takes {total / 2**30:.1f} GiB and {free / 2**30:.1f} are free; free space or "
            "choose another folder, then run again"
        )


def _header(path: Path, specs: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, Entry]]:
    """The head of a safetensors file with these tensors, and where each will be."""
    fields: dict[str, Any] = {"__metadata__": {str(key): str(text) for key, text in metadata.items()}}
    offset, offsets = 0, {}
    # wide dtypes first, so that each tensor stands at a multiple of its item's size
    for name in sorted(specs, key=lambda name: -np.dtype(specs[name].dtype).itemsize):
        spec, size = specs[name], _nbytes(specs[name])
        code = DTYPE_CODES[np.dtype(spec.dtype).name]
        fields[name] = {"dtype": code, "shape": list(spec.shape), "data_offsets": [offset, offset + size]}
        offsets[name] = offset
        offset += size
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    start = 8 + len(text)
    places = {n: Entry(path, np.dtype(specs[n].dtype), tuple(specs[n].shape), start + offsets[n]) for n in specs}
    return len(text).to_bytes(8, "little") + text, places


def _fill(
    entries: Mapping[str, Entry],
    handles: Mapping[Path, int],
    slices: Iterable[Slice],
    folder: Path,
    total: int,
    progress: Progress | None,
) -> None:
    missing = {name: prod(entry.shape) * entry.dtype.itemsize for name, entry in entries.items()}
    done = 0
    for name, index, values in slices:
        entry = entries[name]
        array = cast(name, values, entry.dtype)
        if array.shape != entry.shape[len(index) :]:
            raise ValueError(f"slice {index} of {name} has shape {array.shape}, not {entry.shape[len(index) :]}")
        at = 0
        for number, size in zip(index, entry.shape, strict=False):
            at = at * size + number
        data = array.reshape(-1).view(np.uint8)
        _write(handles[entry.path], data, entry.offset + at * data.nbytes, folder)
        missing[name] -= data.nbytes
        done += data.nbytes
        if progress:
            progress(done, total)
    wrong = next((name for name, count in missing.items() if count), None)
    if wrong:
        raise ValueError(f"{missing[wrong]} bytes of {wrong} were not written")


def _write(handle: int, data: Any, offset: int, where: Path) -> None:
    view = memoryview(data)
    try:
        while len(view):  # a call writes 2 GiB at most
            count = os.pwrite(handle, view, offset)
            view, offset = view[count:], offset + count
    except OSError as error:
        raise UserError(
            f"cannot write {where}: {error.strerror or error}; free space or choose another folder, then run again"
        ) from error


def open_sharded(path: str | os.PathLike[str]) -> TensorSource:
    """The tensors of a safetensors file, of an index of several, or of a folder that has either.

    Raises:
        UserError: there is none, a file is missing or damaged, or the files are not those that the index says.
    """
    path = Path(path)
    found = find_weights(path) if path.is_dir() else path
    if found is None:
        raise UserError(f"{path} has no weights: expected {SINGLE} or {INDEX}")
    if found.suffix != ".json":
        entries, metadata = read_entries(found)
        return source_of_entries(entries, str(found), metadata)
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    index = _read_index(found)
    for name in sorted(set(index.values())):
        if not (found.parent / name).is_file():
            raise UserError(f"{found.parent / name} is missing, and {found.name} needs it: copy all of the files")
        places, told = read_entries(found.parent / name)
        metadata |= told
        for tensor, place in places.items():
            if index.get(tensor) != name:
                raise UserError(
                    f"{found.parent / name} holds {tensor}, which {found.name} does not say: copy both anew"
                )
            entries[tensor] = place
    for tensor, name in index.items():
        if tensor not in entries:
            raise UserError(f"{found.parent / name} does not hold {tensor}, as {found.name} says: copy both anew")
    return source_of_entries({tensor: entries[tensor] for tensor in index}, str(found), metadata)


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path)
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table:
        raise UserError(f"{path} is no index of safetensors files: it has no 'weight_map'")
    for name in table.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{path} names the file {name!r}: expected safetensors files beside the index")
    return table


def load_sharded(
    folder: str | os.PathLike[str], shardings: Mapping[str, Any] | None = None, dtype: Any = None
) -> dict[str, Any]:
    """The tree of a folder's tensors (names joined by '/').

    Args:
        folder: a folder, or a file or index in it.
        shardings: a NamedSharding for each tensor, as a tree of the same form. Each device then gets its part straight
            from the file: no tensor that is split is whole anywhere. None = numpy arrays on the host.
        dtype: of the floating tensors; None = as in the files.

    Raises:
        UserError: as ``open_sharded``; or the files' tensors are not those of ``shardings``.
    """
    source = open_sharded(folder)
    if shardings is None:
        return unflatten_tree({name: _read_slice(source, name, (), dtype) for name in source.shapes})
    places = flatten_tree(shardings)
    for name in places.keys() ^ source.shapes.keys():
        state = "is missing" if name in places else "is unknown to this model"
        raise UserError(f"{source.origin}: tensor {name} {state}: weights and config are of different models")
    return unflatten_tree({name: _place(source, name, place, dtype) for name, place in places.items()})


def _place(source: TensorSource, name: str, sharding: jax.sharding.Sharding, dtype: Any) -> jax.Array:
    read: dict[Any, np.ndarray] = {}  # devices that hold the same part share one copy

    def part(index: Any) -> np.ndarray:
        key = tuple((axis.start, axis.stop) for axis in index)
        if key not in read:
            read[key] = _read_slice(source, name, index, dtype)
        return read[key]

    return jax.make_array_from_callback(source.shapes[name], sharding, part)


def _read_slice(source: TensorSource, name: str, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    floating = jax.numpy.issubdtype(source.dtypes[name], jax.numpy.floating)
    return np.array(source.read(name)[index], dtype if floating else None, order="C")
