"""What a machine refuses, in one line: permissions, open files, memory, devices. None of it is damage of a file.

Libraries tell of these in exceptions of their own, of which only the words are known: hence the texts looked for here.
"""

import errno
import os
import resource
import sys
from pathlib import Path

_PLATFORMS = "jax_platforms"  # a field of JAX's config that has no static type
_TOO_MANY = ("too many open files", "emfile", "enfile", "os error 24", "errno 24")
_DENIED = ("permission denied", "permission_denied", "operation not permitted")
_NO_MEMORY = ("resource_exhausted", "out of memory", "cannot allocate memory", "out_of_memory", "bad_alloc")
_SMALL_MEMORY = ("vmem", "smem", "shared memory")  # a kernel's own: no batch size mends that
_PASSING = ("stale file handle", "no space left", "disk quota", "timed out", "unavailable")


def explain_os(error: OSError, path: str | os.PathLike[str] = "") -> str:
    """``FILE: what is wrong; how to mend it`` for an error of the system.

    Args:
        path: the file, if the error does not name it.
    """
    name = str(error.filename if error.filename is not None and not path else path)
    reason = error.strerror or str(error)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{name}: {too_many_files()}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{name}: {reason}{_owner(name)}; ask for the permission, or choose another place"
    if error.errno == errno.EROFS:
        return f"{name}: {reason}; choose another place"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{name}: {reason}; free space or choose another place, then run again"
    return f"{name}: {reason}; choose another place"


def full_or_read_only(error: BaseException) -> bool:
    """Whether nothing more can be written at all: a full or read-only disk. Other errors are of one file."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def too_many_files() -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"the limit of open files ({soft}) is reached; raise it with `ulimit -n {max(4096, min(hard, 65536))}`"


def _owner(name: str) -> str:
    """Whose the file is, or the nearest folder above that can be looked at."""
    for place in (Path(name), *Path(name).absolute().parents):
        try:
            status = place.stat()
        except OSError:
            continue
        try:
            import pwd

            owner = pwd.getpwuid(status.st_uid).pw_name
        except (KeyError, ImportError):
            owner = f"user {status.st_uid}"
        which = "it" if str(place) == name else str(place)
        return f" ({which} is of {owner}, mode {status.st_mode & 0o777:o})"
    return ""


def not_damage(error: BaseException) -> str | None:
    """Why reading failed, where that says nothing about the file: no permission, no memory, too many open files, a
    disk or network that does not answer. None: it may be damage."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return "out of memory"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM):
        return explain_os(error)
    if any(sign in text for sign in _TOO_MANY):
        return too_many_files()
    if any(sign in text for sign in _DENIED):
        return "permission denied; ask for the permission, or choose another place"
    if any(sign in text for sign in _PASSING) or isinstance(error, TimeoutError):
        return f"{_first_line(error)}; run again once the disk or network answers"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or device memory did not suffice, while compiling or running."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    if type(error).__name__ not in ("XlaRuntimeError", "JaxRuntimeError", "RuntimeError", "ValueError", "OSError"):
        return False
    return any(sign in text for sign in _NO_MEMORY) and not any(sign in text for sign in _SMALL_MEMORY)


def memory_cause(error: BaseException) -> str | None:
    """What was said where memory did not suffice, if that or what it was raised from is such an error."""
    seen: BaseException | None = error
    while seen is not None:
        if is_out_of_memory(seen):
            return _first_line(seen)
        seen = seen.__cause__ or seen.__context__
    return None


def explain(error: BaseException) -> str | None:
    """One line for an exception that the machine is to blame for, or None: then it is a bug, and its trace is wanted.

    The cause may also be an exception that this one was raised from.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.EMFILE, errno.ENFILE):
            return explain_os(seen) if seen.filename else too_many_files()
        if isinstance(seen, OSError) and seen.filename is not None and seen.errno in (errno.EACCES, errno.EPERM):
            return explain_os(seen)
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return explain_os(seen).removeprefix(": ")
        if is_out_of_memory(seen):
            return f"out of memory ({_first_line(seen)})"
        seen = seen.__cause__ or seen.__context__
    if isinstance(error, (RuntimeError, AssertionError)):
        return no_backend()
    return None


def no_backend() -> str | None:
    """Why JAX cannot start the platform it was asked for, naming JAX_PLATFORMS and what there is; None: it can."""
    if "jax" not in sys.modules:
        return None
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked, why = getattr(jax.config, _PLATFORMS), _first_line(error).split(" (set JAX_PLATFORMS")[0]
        why = "no such device was found" if isinstance(error, AssertionError) else why
    else:
        return None
    if not asked:
        return f"JAX finds no device ({why}): check the drivers, or set JAX_PLATFORMS=cpu"
    from jax.extend.backend import clear_backends

    try:
        clear_backends()
        jax.config.update(_PLATFORMS, None)
        there = ", ".join(sorted({device.platform for device in jax.devices()} | {"cpu"}))
    except (RuntimeError, AssertionError):
        there = "cpu"
    finally:
        clear_backends()
        jax.config.update(_PLATFORMS, asked)
    return f"JAX_PLATFORMS={asked}: {why}; this machine has: {there}. Set JAX_PLATFORMS to one of these, or unset it"


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0].strip()
    return line[:200] or type(error).__name__
