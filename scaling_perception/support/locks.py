"""One writer at a time: a lock file beside what is written, held until the block ends or the process dies.

The lock is the kernel's (``flock``; Linux passes it on to NFS servers), so that a killed process leaves none behind.
The file says who holds it. Where the file system has no such locks (some Lustre mounts), a living process of this
machine that the file names is still respected, and one line says that other machines are not seen.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaling_perception.support.errors import UserError
from scaling_perception.support.failures import explain_os
from scaling_perception.support.stopping import removed_when_stopped

# Seconds to wait for a holder, who may just have been killed: his kernel lets go once his memory is freed, an NFS
# server once the lease of his machine (90 s, usually) is over.
SAME_MACHINE, OTHER_MACHINE = 3.0, 100.0
_POLL = 0.1
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


@contextlib.contextmanager
def hold(path: str | os.PathLike[str], what: str, mend: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock file ``path`` within the block; its folder is made if absent, the file is removed at the end.

    Args:
        what: who is in the way, for the message, such as ``another prepare is writing to runs/x``.
        mend: what to do then, such as ``wait for it or choose another --out``.
        wait: wait for the holder as long as it takes.

    Raises:
        UserError: another process holds it (told with its host, process id and since when), or the file cannot be
            written.
    """
    path = Path(path)
    file = _take(path, what, mend, wait)
    try:
        with removed_when_stopped(path):
            yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is still locked: who opened it before finds out in ``_same``
        os.close(file)


def _take(path: Path, what: str, mend: str, wait: bool) -> int:
    begin, told = time.monotonic(), False
    while True:
        file = _open(path)
        try:
            taken = _lock(file, path)
            if taken and _same(file, path):
                _sign(file)
                return file
        except BaseException:
            os.close(file)
            raise
        holder = _holder(file)
        os.close(file)
        if taken:  # the file was removed by its last holder: open the new one
            continue
        elsewhere = holder.get("host", socket.gethostname()) != socket.gethostname()
        if not wait and time.monotonic() - begin >= (OTHER_MACHINE if elsewhere else SAME_MACHINE):
            raise UserError(f"{what} ({_described(holder)}): {mend}")
        if elsewhere and not told and not wait:
            told = True
            print(
                f"{what} ({_described(holder)}); waiting up to {OTHER_MACHINE:.0f} s, in case that machine is gone",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(_POLL)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except PermissionError:  # another user's, in a folder that several share
            if not path.exists():
                raise
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"cannot write {explain_os(error, path)}") from None


def _lock(file: int, path: Path) -> bool:
    """Whether the lock is ours now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno not in _UNSUPPORTED:
            raise
        holder = _holder(file)
        here = holder.get("host") == socket.gethostname() and holder["pid"] != os.getpid()
        if here and holder.get("started") == _started(holder["pid"]) != "":
            return False
        print(
            f"{path.parent}: this file system has no locks ({error.strerror}); make sure that no other machine "
            "writes here at the same time",
            file=sys.stderr,
            flush=True,
        )
    return True


def _same(file: int, path: Path) -> bool:
    """Whether ``path`` is still the file that is open."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _sign(file: int) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "since": now}
    with contextlib.suppress(OSError):  # a full disk is no reason not to hold the lock
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(holder).encode(), 0)


def _holder(file: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(file, 4096, 0))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("pid"), int) else {}


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return "its process is not known"
    return f"process {holder['pid']} on {holder.get('host')}, since {holder.get('since')}"


def _started(pid: int) -> str:
    """When the process ``pid`` of this machine began, in the kernel's ticks; "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""
