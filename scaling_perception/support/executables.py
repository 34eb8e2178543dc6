"""Executables kept on disk, so that a later process neither traces nor lowers nor compiles the same program.

JAX's own cache spares compiling alone: it finds a program by its lowered form, so each process traces and lowers it
again. Here the key is everything that the program is made of (`_surroundings`, the caller's description, shapes), and
nothing else is ever looked at: a change of any of it is another file. Weights are arguments, and in no file.
"""

import contextlib
import hashlib
import json
import os
import pickle
import platform
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from scaling_perception.support.compilation import EXECUTABLES, processor
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import atomic_path
from scaling_perception.support.native import targets

PLATFORMS = ("cpu",)
"""Where a loaded executable is tested to give the bytes of a compiled one."""
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "ml-dtypes", "tokamax")
_VARIABLES = ("XLA_", "LIBTPU_", "TF_", "NVIDIA_", "CUDA_")
# settings of JAX that say where and how much it keeps and reports, not what it makes
_NO_PART = ("jax_compilation_cache", "jax_persistent_cache", "jax_enable_compilation_cache", "jax_raise_persistent")
_LIMIT = 2**30  # bytes of all files; beyond, those go that were not used for longest
_SUFFIX = ".program"
_BUILDING = threading.Lock()
_HITS: list[str] = []  # programs that JAX has read from its own cache


def kept_executable(
    about: str | None, arguments: Sequence[Any], devices: Sequence[Any], build: Callable[[], Any]
) -> Any:
    """``build()``, or an equal executable that an earlier process kept.

    Args:
        about: all that decides the program besides the package, JAX, this machine and the shapes; None: it cannot be
            described, and is neither looked for nor kept.
        arguments: what it is called with (arrays, or ``ShapeDtypeStruct`` in their place).
        devices: that it runs on.
        build: () -> ``jax.stages.Compiled``.
    """
    if about is None or not _wanted(arguments, devices):
        return build()
    leaves, tree = jax.tree.flatten(arguments)
    shapes = [[*leaf.shape, str(leaf.dtype), bool(getattr(leaf, "weak_type", False))] for leaf in leaves]
    places = [[one.id, one.platform, one.device_kind, one.client.platform_version] for one in devices]
    # registered before a program that calls them is loaded
    key = {"executable": about, "arguments": str(tree), "shapes": shapes, "devices": places, "native": targets()}
    text = json.dumps({**key, "of all": jax.device_count()}, sort_keys=True)

    def load(data: bytes) -> Any:
        program, out_tree = pickle.loads(data)
        in_tree = jax.tree.structure((tuple(arguments), {}))
        return deserialize_and_load(program, in_tree, out_tree, execution_devices=list(devices))

    def dump(compiled: Any) -> bytes:
        program, _, out_tree = serialize(compiled)
        return pickle.dumps((program, out_tree))

    return _kept(text, lambda: _compiled_anew(build), dump, load)


def kept_value(about: str, build: Callable[[], Any]) -> Any:
    """``build()``, a value that JSON holds, or what an earlier process kept of it; for values that the package, JAX and
    its settings decide besides ``about``."""
    if not os.environ.get(EXECUTABLES):
        return build()
    return _kept(
        json.dumps({"value": about}), lambda: (build(), True), lambda value: json.dumps(value).encode(), json.loads
    )


def _wanted(arguments: Sequence[Any], devices: Sequence[Any]) -> bool:
    if not os.environ.get(EXECUTABLES) or devices[0].platform not in PLATFORMS or jax.process_count() > 1:
        return False
    if not jax.config.jax_enable_compilation_cache:  # pyright: ignore[reportAttributeAccessIssue]
        return False  # as where a program is compiled for its text, which a loaded one lacks
    # an array that lies elsewhere takes the program with it
    return all(leaf.devices() <= set(devices) for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.Array))


@contextlib.contextmanager
def without_jax_cache() -> Iterator[None]:
    """JAX's own cache is neither read nor written meanwhile. JAX decides only once whether it has one, which the resets
    undo: a program of a TPU that is not here cannot be read from it, and one that was read has no text."""
    cached = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
        reset_cache()


def _compiled_anew(build: Callable[[], Any]) -> tuple[Any, bool]:
    """(what is built, whether it may be written).

    What JAX reads from its own cache runs, but written once more it lacks functions. Hence that cache is off meanwhile.
    Whatever is read from it all the same is not kept.
    """
    with _BUILDING, without_jax_cache():
        _count_hits()
        hits = len(_HITS)
        built = build()
        return built, len(_HITS) == hits


@lru_cache(maxsize=1)
def _count_hits() -> None:
    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            _HITS.append(event)

    jax.monitoring.register_event_listener(listen)


def _kept(
    about: str, build: Callable[[], tuple[Any, bool]], dump: Callable[[Any], bytes], load: Callable[[bytes], Any]
) -> Any:
    """What ``load`` makes of the file, or what ``build`` gives, and then keeps where it says that it may be kept."""
    try:
        text = about + _surroundings()
    except OSError:  # a package without readable sources
        return build()[0]
    file = Path(os.environ[EXECUTABLES]) / (hashlib.sha256(text.encode()).hexdigest()[:40] + _SUFFIX)
    try:
        found = load(_read(file, text))
        with contextlib.suppress(OSError):
            os.utime(file)  # used just now
        return found
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Exception as error:  # whatever a damaged file brings about
        warnings.warn(f"{file} is damaged and is made again: {_line(error)}", stacklevel=2)
    built, may_keep = build()
    if not may_keep:
        return built
    try:
        data = dump(built)
    except Exception:  # some programs have no such form: those that call back into Python, or hold arrays
        return built
    try:
        _write(file, text, data)
    except (OSError, UserError) as error:
        warnings.warn(f"executables are not kept: {_line(error)}", stacklevel=2)
    return built


def _read(file: Path, text: str) -> bytes:
    """Raises ValueError: not what was written; OSError."""
    digest, _, rest = file.read_bytes().partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != digest:
        raise ValueError("its checksum differs")
    about, _, data = rest.partition(b"\0")
    if about != text.encode():
        raise ValueError("it is of another program")
    return data


def _write(file: Path, text: str, data: bytes) -> None:
    rest = text.encode() + b"\0" + data
    with atomic_path(file) as temporary:
        temporary.write_bytes(hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest)
    with contextlib.suppress(OSError):
        entries = sorted((one.stat().st_mtime, one.stat().st_size, one) for one in file.parent.glob(f"*{_SUFFIX}"))
        excess = sum(size for _, size, _ in entries) - _LIMIT
        for _, size, one in entries:
            if excess > 0 and one != file:
                one.unlink(missing_ok=True)
                excess -= size


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _surroundings() -> str:
    """What every program depends on: sources of this package, versions, processor, settings of JAX and of XLA."""
    settings = {
        name: repr(getattr(jax.config, name, None)) for name in jax.config.values if not name.startswith(_NO_PART)
    }
    variables = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
    versions = {name: package_version(name) for name in _PACKAGES}
    parts = {"source": source_digest(), "versions": versions, "python": sys.version, "processor": processor()}
    return json.dumps({**parts, "system": platform.platform(), "jax": settings, "environment": variables})


@lru_cache(maxsize=1)
def source_digest() -> str:
    """Of every Python file of the package, and its name. Raises OSError."""
    digest, root = hashlib.sha256(), Path(__file__).resolve().parent.parent
    files = sorted(root.rglob("*.py"))
    if not files:
        raise OSError(f"{root} has no sources")
    for file in files:
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()


@lru_cache
def package_version(name: str) -> str | None:
    """Of an installed package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
