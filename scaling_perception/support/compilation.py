"""Compiled programs are kept on disk, so that the second run of a command starts quickly."""

import contextlib
import hashlib
import importlib.util
import os
import platform
import sys
from pathlib import Path

_GOOGLE = "0x1ae0"  # as PCI names the maker
_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
EXECUTABLES = "SCALING_PERCEPTION_EXECUTABLES"
"""Names the folder of `support.executables`; empty: none are kept."""


def processor() -> str:
    """A short name of this kind of processor: what is compiled for one may not run on another that shares the home."""
    text, lines = platform.machine() + platform.processor(), processor_text().splitlines()
    for names in (("flags", "Features"), ("model name", "CPU part")):
        text += next((line for line in lines if line.startswith(names)), "")
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def processor_text() -> str:
    """What Linux says of the processors; empty elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def keep_compiled_programs() -> None:
    """Point JAX at a cache folder of this user and machine, unless JAX_COMPILATION_CACHE_DIR already says where.

    Call before JAX is imported. A folder that cannot be made or written is no reason to fail: then nothing is kept,
    which is said where the user named the folder. Executables are kept in its ``executables``, unless
    SCALING_PERCEPTION_EXECUTABLES names another folder, or is empty. A ``~`` at the beginning of either
    cache variable is the home folder.
    """
    given = os.environ.get(_VARIABLE)
    if given is not None:
        if not given or "://" in given:  # none, or a bucket that JAX itself opens
            return
        folder = Path(os.path.expanduser(given))
        if writable(folder):
            os.environ[_VARIABLE] = str(folder)
            os.environ.setdefault(EXECUTABLES, str(folder / "executables"))
        else:
            print(f"{_VARIABLE}={given} cannot be written: compiled programs are not kept", file=sys.stderr, flush=True)
            del os.environ[_VARIABLE]
        return
    folder = _own_folder()
    if folder is not None and writable(folder):
        os.environ[_VARIABLE] = str(folder)
        os.environ.setdefault(EXECUTABLES, str(folder / "executables"))
        # JAX's own, 1 s, leaves out what takes half of a second in every run of a command
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def cache_folder() -> Path | None:
    """Where compiled programs of this user and machine are kept, which may not exist yet; None: none are kept."""
    given = os.environ.get(_VARIABLE)
    if given is None or "://" in given:
        return _own_folder()
    return Path(os.path.expanduser(given)) if given else None


def _own_folder() -> Path | None:
    home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if not os.path.isabs(home):  # no home folder, or a setting that the XDG specification says to ignore
        return None
    return Path(home) / "scaling-perception" / "compiled" / processor()


def quiet_libtpu() -> None:
    """Keep libtpu, where it is installed, from asking for a TPU and printing its errors on a machine that has none.

    Call before JAX is imported. A machine with one (a device of Google's on the PCI bus) is left as it is, and so is
    one whose environment describes a slice.
    """
    if has_tpu():
        return
    if any(name.startswith(("TPU_", "MEGASCALE_")) for name in os.environ) or not importlib.util.find_spec("libtpu"):
        return
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }


def has_tpu() -> bool:
    """Whether a device of Google's is on the PCI bus."""
    with contextlib.suppress(OSError):
        vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
        return any(vendor.read_text().strip() == _GOOGLE for vendor in vendors)
    return False


def writable(folder: Path) -> bool:
    """Whether files can be written there; the folder is made if it does not exist."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)
