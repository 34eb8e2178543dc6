"""PyTorch checkpoint files: read without running anything that they hold, written as plain state dicts.

torch is needed for these alone, and is imported when one is opened.
"""

import argparse
import contextlib
import importlib
import os
import pickletools
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scaling_perception.interop.safetensors_io import TensorSource, foreign_content
from scaling_perception.interop.sharded import find_weights, open_sharded
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import atomic_path

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

# where training files keep the weights; the first that is there is taken, averages before the rest
_ENTRIES = ("ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "model", "state_dict", "module")
_PREFIXES = ("module.", "_orig_mod.", "_forward_module.")  # what wrappers put before every name, also one in another
_MODULES = ("ema_model.", "model_ema.", "ema.", "model.", "net.", "network.")  # where Lightning modules keep a network
_HARMLESS = ("torch.", "collections.OrderedDict", "argparse.Namespace")
_SHARD = re.compile(r"(bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_(optim|model)_states\.pt")
_GATHER = "run the zero_to_fp32.py beside it, then give the pytorch_model.bin that it writes"
_REOPEN_BYTES = 2**30  # a mapped file counts as memory of this process once read: opened anew after so much
_ALIGN = 64


def open_tensors(path: str | os.PathLike[str]) -> TensorSource:
    """The tensors of a checkpoint: a safetensors file, an index of several, a PyTorch file, or a folder with one of
    these.

    Raises:
        UserError: none of these, or damaged; as ``open_sharded`` and ``open_torch``.
    """
    path = Path(path)
    if path.is_dir():
        found = find_weights(path) or _only_checkpoint(path)
    elif path.is_file():
        found = path
    else:
        raise UserError(f"{path} does not exist: check the path")
    if found.suffix in SUFFIXES or (found.suffix not in (".safetensors", ".json") and _looks_like_torch(found)):
        return open_torch(found)
    return open_sharded(found)


def _only_checkpoint(folder: Path) -> Path:
    names = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", *SUFFIXES) and path.is_file())
    if len(names) == 1:
        return names[0]
    if names:
        listed = ", ".join(path.name for path in names[:5])
        raise UserError(f"{folder} has {len(names)} checkpoint files ({listed}): name the one to read")
    raise UserError(f"{folder} has no checkpoint: expected a safetensors file, or one of {', '.join(SUFFIXES)}")


def _looks_like_torch(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")  # a zip, or a pickle of protocol 2


def _torch(path: Path) -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise UserError(f"{path}: PyTorch files need torch: pip install 'scaling-perception[torch]'") from error


def open_torch(path: str | os.PathLike[str]) -> TensorSource:
    """The weights in a PyTorch file: its ``ema`` entry if it has one, else ``model``, ``state_dict`` or ``module`` (as
    DeepSpeed calls it), else the file is a state dict itself. Prefixes that all names share are dropped, one after the
    other (``module._orig_mod.``), and of a Lightning module the network is taken, its average first.

    Nothing but tensors, plain containers and ``argparse.Namespace`` (which DiT's training files hold) is unpickled, and
    the file is mapped, not read, where its form allows.

    Raises:
        UserError: torch is missing; the file is missing, damaged, holds other objects, or no weights.
    """
    path = Path(path)
    torch = _torch(path)
    state, entry, mapped = _open(torch, path)
    prefix = _prefix(state)
    state = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    shapes, dtypes = {}, {}
    for name, tensor in state.items():
        shapes[name.removeprefix(prefix)] = tuple(tensor.shape)
        dtypes[name.removeprefix(prefix)] = _numpy_dtype(tensor, name, path)
    seen = 0

    def read(name: str) -> np.ndarray:
        nonlocal state, seen
        if mapped and seen > _REOPEN_BYTES:
            state, seen = _open(torch, path)[0], 0
        array = _to_numpy(torch, state[prefix + name])
        seen += array.nbytes
        return array

    origin = f"{path} (its '{entry}' weights)" if entry else str(path)
    return TensorSource(shapes, dtypes, read, origin)


def _prefix(state: Mapping[str, Any]) -> str:
    """What stands before the names of the network: wrappers, one in another, and a module that holds it."""
    prefix = ""
    while True:
        rest = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
        shared = next((p for p in (*_PREFIXES, *_MODULES) if all(name.startswith(p) for name in rest)), "")
        if not shared and not prefix and not any("." not in name for name in rest):
            heads = {name.partition(".")[0] + "." for name in rest}
            if heads <= {*_MODULES, "vae.", "loss.", "autoencoder.", "text_encoder."}:
                shared = next((p for p in _MODULES if p in heads), "")
        if not shared:
            return prefix
        prefix += shared


def _calls(path: Path) -> str:
    """The first thing, as module.name, that a pickle calls and weights have no need of; '' where there is none."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        else:
            with open(path, "rb") as file:
                data = file.read(1 << 24)
        words: list[str] = []
        for code, value, _ in pickletools.genops(data):
            name = ""
            if code.name == "GLOBAL":
                name = str(value).replace(" ", ".")
            elif code.name == "STACK_GLOBAL" and len(words) > 1:
                name = f"{words[-2]}.{words[-1]}"
            elif isinstance(value, str):
                words.append(value)
            if name and not name.startswith(_HARMLESS):
                return name
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile, IndexError, KeyError):
        return ""
    return ""


def _open(torch: Any, path: Path) -> tuple[dict[str, Any], str, bool]:
    """(state dict, the entry that it is, whether the file is mapped)."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: check the path")
    if _SHARD.fullmatch(path.name):
        raise UserError(f"{path} is one process's part of a DeepSpeed ZeRO checkpoint: {_GATHER}")
    why = foreign_content(path)
    if why:
        raise UserError(f"{path} {why}")
    mapped = _mappable(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the file's age and pickle protocol
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise
        found = re.search(r"(?:GLOBAL|global:?|class) ([\w.]+\.\w+)", str(error))
        called = found[1] if found else _calls(path)
        if called:
            raise UserError(
                f"{path} holds objects other than tensors ({called}), which could run code when read: "
                "save its weights alone (torch.save of a state dict) where it was made"
            ) from error
        reason = str(error).strip().splitlines()
        if "Cannot allocate memory" in str(error):
            raise UserError(
                f"{path} cannot be mapped: this machine has less memory than the file is long; "
                "convert it on a larger one, or allow more (sysctl vm.overcommit_memory=1)"
            ) from error
        detail = f" ({reason[0][:120]})" if reason and "Weights only" not in reason[0] else ""
        raise UserError(f"{path} is no whole PyTorch checkpoint{detail}: copy or download it again") from error
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path} holds {type(loaded).__name__} instead of a state dict: save a model's state_dict()")
    entry = next((name for name in _ENTRIES if isinstance(loaded.get(name), Mapping)), "")
    state = dict(loaded[entry] if entry else loaded)
    other = [str(name) for name, value in state.items() if not isinstance(name, str) or not torch.is_tensor(value)]
    if other or not state:
        held = f"'{other[0]}' is no tensor" if other else "it is empty"
        raise UserError(f"{path}{f' entry {entry}' if entry else ''} is no state dict ({held}): give weights alone")
    if "param_shapes" in loaded and not any(tensor.numel() for tensor in state.values()):
        raise UserError(f"{path} is of DeepSpeed ZeRO 3, which keeps the weights in other files: {_GATHER}")
    return state, entry, mapped


def _mappable(path: Path) -> bool:
    """Whether the file is a zip of stored members: the older form is none, and mapped, packed members would be read as
    if they were not packed."""
    try:
        with zipfile.ZipFile(path) as archive:
            return all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
    except (zipfile.BadZipFile, OSError):
        return False


def _kind(tensor: Any) -> str:
    return ", without data (device meta)" if tensor.is_meta else ", quantised" if tensor.is_quantized else ""


def _numpy_dtype(tensor: Any, name: str, path: Path) -> np.dtype:
    try:
        if str(tensor.layout) != "torch.strided" or tensor.is_meta or tensor.is_quantized:
            raise TypeError(f"layout {tensor.layout}")
        return np.dtype(str(tensor.dtype).removeprefix("torch."))
    except TypeError as error:
        raise UserError(
            f"{path}: tensor {name} is {tensor.dtype}, {tensor.layout}{_kind(tensor)}: store plain floats"
        ) from error


def _to_numpy(torch: Any, tensor: Any) -> np.ndarray:
    dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
    if dtype.kind == "V":  # bfloat16 and the like, which torch does not hand to numpy
        tensor = tensor.view({1: torch.uint8, 2: torch.int16}[dtype.itemsize])
    array = tensor.detach().numpy().view(dtype)
    array.flags.writeable = False
    return array


def _to_torch(torch: Any, array: np.ndarray) -> Any:
    if array.dtype.kind != "V":
        return torch.from_numpy(array)
    return torch.from_numpy(array.view({1: np.uint8, 2: np.int16}[array.dtype.itemsize])).view(
        getattr(torch, array.dtype.name)
    )


@contextlib.contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as the latter
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(
            f"cannot write {path}: {reason}; free space or choose another folder, then run again"
        ) from error


def write_torch(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]]
) -> None:
    """Write a plain state dict, a whole file or none. What is in memory at any time is one tensor: they are gathered in
    an unnamed file beside ``path`` first, which takes as much disk again until the end.

    Args:
        tensors: (name, array) pairs, or a mapping; bfloat16 is that of ``ml_dtypes``.

    Raises:
        UserError: torch is missing, or the file cannot be written, such as on a full disk.
    """
    path = Path(path)
    torch = _torch(path)
    with atomic_path(path) as temporary, tempfile.TemporaryFile(dir=temporary.parent) as scratch:
        places = []
        for name, array in tensors.items() if isinstance(tensors, Mapping) else tensors:
            array = np.asarray(array, order="C")
            with _as_user_error(path):
                scratch.write(b"\0" * (-scratch.tell() % _ALIGN))
                places.append((name, array.dtype, array.shape, scratch.tell()))
                scratch.write(array.reshape(-1).view(np.uint8).data)
        with _as_user_error(path):
            scratch.flush()
            state = {}
            for name, dtype, shape, offset in places:
                # private and writable, as torch wants it; nothing writes
                view = np.memmap(scratch, dtype, "c", offset, shape) if 0 not in shape else np.empty(shape, dtype)
                state[name] = _to_torch(torch, view)
            torch.save(state, temporary)
