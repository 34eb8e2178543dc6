"""Memory of a process that computes on a CPU: what is freed is kept for the next array."""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

from scaling_perception.support.compilation import has_tpu

# of mallopt, by glibc's malloc.h, with what each is set to
_ARENAS, _MAPPED, _TRIM, _MORE = -8, -4, -1, -2
_OPTIONS = ((_ARENAS, 1), (_MAPPED, 0), (_TRIM, 2**31 - 1), (_MORE, 64 << 20))
_ACCELERATORS = ("/dev/nvidia0", "/dev/kfd")


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed, in one heap; call before a second thread begins. Whether it was asked to.

    XLA frees large arrays and gets them again in every step. glibc returns them to the system, which has to clear each
    page again when it is next touched: a tenth of a training step (docs/speed.md). Nothing is done with another C
    library, on a machine with an accelerator (unless JAX_PLATFORMS says cpu), and where a variable of the environment
    sets glibc's malloc.
    """
    chosen = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if not sys.platform.startswith("linux") or chosen or not _on_cpu():
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return all([mallopt(option, value) for option, value in _OPTIONS])
    return False


def _on_cpu() -> bool:
    named = os.environ.get("JAX_PLATFORMS", "")
    return named.startswith("cpu") if named else not (has_tpu() or any(Path(path).exists() for path in _ACCELERATORS))
