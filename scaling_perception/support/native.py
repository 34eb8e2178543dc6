"""C++ kernels for CPUs: compiled once on the machine that runs them, kept, and called by XLA as custom calls.

They are an addition: without a compiler, or without a folder to keep them in, callers use XLA's own programs.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import threading
import warnings
from functools import lru_cache
from pathlib import Path

from scaling_perception.support.compilation import cache_folder, processor, processor_text, writable
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import atomic_path

NATIVE = "SCALING_PERCEPTION_NATIVE"
"""Names the folder that keeps compiled kernels; empty: there are none."""
_OPS = Path(__file__).resolve().parent.parent / "ops"
_SOURCES = (_OPS / "attention.cc", _OPS / "convolution.cc")
_HEADERS = (_OPS / "vectors.h",)
_TARGETS = ("attention_forward", "attention_backward", "convolution", "inverted_bottleneck")
_COMPILERS = ("c++", "g++", "clang++")
_ONCE = threading.Lock()
_REGISTERED: set[str] = set()
_SECONDS = 300  # that compiling may take, on a very busy machine


def targets() -> dict[str, str]:
    """Names of the custom calls, kernel to target, after they have been registered with JAX; {} where there are none.

    The target's name has a hash of the kernel's source and compilation in it, so that programs kept on disk name what
    they were compiled for. The first call on a machine compiles, for a few seconds; others load a file.
    """
    with _ONCE:  # a name is registered only once
        return _registered()


@lru_cache(maxsize=1)
def _registered() -> dict[str, str]:
    if not wanted():
        return {}
    library, mark = _library()
    if library is None:
        return {}
    import jax

    found = {name: f"scaling_perception_{name}_{mark}" for name in _TARGETS}
    for name, target in found.items():
        if target not in _REGISTERED:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
            _REGISTERED.add(target)
    return found


def wanted() -> bool:
    """Whether kernels are looked for: `pays`, or SCALING_PERCEPTION_NATIVE names a folder; and there is a compiler, or
    what it has made before."""
    where = folder()
    if where is None or not (NATIVE in os.environ or pays()):
        return False
    # a folder of the user's choice that cannot be written is reported when something is to be written
    able = compiler() is not None and (NATIVE in os.environ or writable(where))
    return able or _is_whole(_file(_mark()))


def pays() -> bool:
    """Whether this is a processor on which the kernels were measured to be faster (docs/kernels.md): one of Intel's
    with AVX-512."""
    text = processor_text()
    return "GenuineIntel" in text and "avx512f" in text.split()


def folder() -> Path | None:
    """That keeps compiled kernels; None: nothing is kept (SCALING_PERCEPTION_NATIVE or JAX_COMPILATION_CACHE_DIR is
    empty, or there is no home folder)."""
    named = os.environ.get(NATIVE)
    if named is not None:
        return Path(os.path.expanduser(named)) if named else None
    found = cache_folder()
    return None if found is None else found / "native"


def compiler() -> str | None:
    """Path of the C++ compiler: that of the variable CXX, or the first of c++, g++ and clang++."""
    named = os.environ.get("CXX")
    return next((path for name in ([named] if named else _COMPILERS) if (path := shutil.which(name))), None)


def _flags() -> list[str]:
    tuned = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    # the compiler's library of C++ goes into the kernel: another one may be loaded already
    alone = ["-static-libstdc++", "-static-libgcc"] if platform.system() == "Linux" else []
    # contraction: products and sums in one instruction, which ISO C++ leaves off
    return ["-std=c++17", "-O3", "-ffp-contract=fast", tuned, "-fPIC", "-shared", "-w", *alone]


def _mark() -> str:
    """Of everything that decides what the kernels are, but for the compiler."""
    import jaxlib.version  # its headers are part of the kernel

    parts = [processor(), *platform.libc_ver(), jaxlib.version.__version__, *_flags()]
    digest = hashlib.sha256(" ".join(parts).encode())
    for source in (*_SOURCES, *_HEADERS):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _file(mark: str) -> Path:
    where = folder()
    assert where is not None, "the caller asks wanted()"
    return where / f"kernels-{mark}.so"


def _library() -> tuple[ctypes.CDLL | None, str]:
    mark = _mark()
    file = _file(mark)
    try:
        if not _is_whole(file):
            _compile(file)
        return ctypes.CDLL(str(file)), mark
    except (OSError, UserError, subprocess.SubprocessError) as error:
        return _without(error), mark


def _digest_file(file: Path) -> Path:
    return file.with_suffix(".sha256")


def _is_whole(file: Path) -> bool:
    """Whether it is what was compiled: a library that is cut would end the process when it is used."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest() == _digest_file(file).read_text("ascii", "replace")
    except OSError:
        return False


def _compile(file: Path) -> None:
    """Raises UserError: there is no compiler, it fails, or the folder cannot be written; OSError; SubprocessError."""
    import jax

    program = compiler()
    if program is None:
        raise UserError("there is no C++ compiler: install g++, or set CXX")
    with atomic_path(file) as temporary:
        words = [program, *_flags(), "-isystem", jax.ffi.include_dir(), "-x", "c++", "-", "-o", str(temporary)]
        whole = "".join(f'#include "{source}"\n' for source in _SOURCES)  # XLA's headers take most of the time: once
        done = subprocess.run(words, input=whole, capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise UserError(f"{program} ended with {done.returncode}: {(lines or ['it says no reason'])[0].strip()}")
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
    with atomic_path(_digest_file(file)) as temporary:
        temporary.write_text(digest, "ascii")


def _without(error: Exception) -> None:
    why = " ".join(str(error).split())[:300]
    text = f"kernels for this processor cannot be compiled, so slower programs are used: {why} ({NATIVE}= for none)"
    warnings.warn(text, stacklevel=2)
