"""Compiled programs are kept on disk, so that the second run of a command starts quickly."""

import hashlib
import os
import platform
from pathlib import Path


def _machine() -> str:
    """A short name of this kind of processor: what is compiled for one may not run on another that shares the home."""
    text = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    text += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def keep_compiled_programs() -> None:
    """Point JAX at a cache folder of this user and machine, unless JAX_COMPILATION_CACHE_DIR already says where.

    Call before JAX is imported. A folder that cannot be made is no reason to fail: then nothing is kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "scaling-perception" / "compiled" / _machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
