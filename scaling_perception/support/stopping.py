"""Ctrl-C and SIGTERM end a command at once: 130 or 143, one line, nothing half-written.

No exception is raised: it could be dropped in a callback of a library, and the interpreter's teardown ends in a
segmentation fault while XLA's threads compile. A thread ends the process, so a compilation need not return first.
"""

import atexit
import contextlib
import os
import queue
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

PATIENCE = 10.0  # seconds that begun results are waited for
_ENDED = threading.Condition()  # guards the three below
_leaving = False
_begun = 0  # blocks of ``finished_first`` under way
_temporary: set[Path] = set()
_heard: queue.SimpleQueue[int] = queue.SimpleQueue()
_ONCE = threading.Lock()
_here = threading.local()  # .depth: how many of these blocks this thread is in


@contextlib.contextmanager
def finished_first() -> Iterator[None]:
    """What is begun in the block is finished before a signal ends the process; a second signal does not wait."""
    global _begun
    outermost = not getattr(_here, "depth", 0)
    if outermost:
        with _ENDED:
            _ENDED.wait_for(lambda: not _leaving)  # for ever: the process is about to end
            _begun += 1
    _here.depth = getattr(_here, "depth", 0) + 1
    try:
        yield
    finally:
        _here.depth -= 1
        if outermost:
            with _ENDED:
                _begun -= 1
                _ENDED.notify_all()


@contextlib.contextmanager
def removed_when_stopped(path: str | os.PathLike[str]) -> Iterator[None]:
    """A temporary file or folder that is removed if a signal ends the process within the block."""
    path = Path(path).absolute()
    _temporary.add(path)
    try:
        yield
    finally:
        _temporary.discard(path)


@contextlib.contextmanager
def making_temporary() -> Iterator[set[Path]]:
    """For the moment in which a temporary file is made and added to the set, whose members are removed at a signal."""
    with _ENDED:
        _ENDED.wait_for(lambda: not _leaving or getattr(_here, "depth", 0))
        yield _temporary


def answer_signals(line: str) -> None:
    """From now on SIGINT and SIGTERM end this process, unless they were ignored or had a handler before.

    Handlers that are set later (``train``, ``study``) take precedence for as long as they are set.

    Args:
        line: what is printed behind «interrupted; ».
    """
    if threading.current_thread() is not threading.main_thread():
        return
    mine = []
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) == default:
            signal.signal(number, _noted)
            mine.append(number)
    if not mine:
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # written to by C code, whatever the main thread does
    os.register_at_fork(after_in_child=_leave_to_parent)
    threading.Thread(target=_watch, args=(read, line), name="signals", daemon=True).start()
    threading.Thread(target=_end_begun, args=(line,), name="ending", daemon=True).start()


def _noted(number: int, frame: Any) -> None:
    """The handler: a thread does the work, and the main thread goes on until then."""
    global _leaving
    del frame
    _leaving = True
    _heard.put(number)  # the other thread may have found the next handler set already


def wait_if_leaving() -> None:
    """Where a command would end or report: it returns only if no signal is ending the process."""
    if _leaving:
        threading.Event().wait()


def _leave_to_parent() -> None:
    signal.set_wakeup_fd(-1)
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is _noted:
            signal.signal(number, default)


def _watch(read: int, line: str) -> None:
    count = 0
    while count < 2:  # the second one does not wait
        number = os.read(read, 1)[0]
        if signal.getsignal(number) is _noted:
            count += 1
            _heard.put(number)
    _leave(number, line)


def _end_begun(line: str) -> None:
    global _leaving
    number = _heard.get()
    with _ENDED:
        _leaving = True
        _ENDED.wait_for(lambda: not _begun, PATIENCE)
    _leave(number, line)


def _leave(number: int, line: str) -> NoReturn:
    what = "interrupted" if number == signal.SIGINT else "stopped by SIGTERM"
    leave_at_once(128 + number, f"scaling-perception: {what}; {line}")


def end_process(code: int) -> NoReturn:
    """End a finished command as the interpreter would, but for its teardown: exit handlers run, objects are left.

    Taking JAX's modules and programs apart takes a tenth of the processor time of a short command. Flush standard
    output before, where an error can still be reported.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # joins threads, pools' too; Python calls it first as well
    atexit._run_exitfuncs()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is _noted:  # from here on a signal is too late: there is nothing left to stop
            signal.signal(number, signal.SIG_IGN)
    wait_if_leaving()
    with contextlib.suppress(Exception):
        sys.stderr.flush()
    os._exit(code)


def leave_at_once(code: int, line: str) -> NoReturn:
    """End the process without the interpreter's teardown: temporary files removed, streams flushed."""
    global _leaving
    _ONCE.acquire()  # never released: one thread ends the process, another waits
    _leaving = True
    if "multiprocessing.process" in sys.modules:
        import multiprocessing

        for child in multiprocessing.active_children():
            child.kill()
        _unlink_semaphores()
    told = threading.Thread(target=_tell, args=(line,), daemon=True)  # a stream may be held, or nobody may read it
    told.start()
    told.join(1.0)
    for path in (*_temporary, *_temporary):  # twice: another thread may still write into a folder
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    os._exit(code)


def _unlink_semaphores() -> None:
    """Those of this process's queues: what is left of them, multiprocessing's tracker removes with a warning."""
    if "multiprocessing.synchronize" in sys.modules:
        from multiprocessing import synchronize, util

        with contextlib.suppress(Exception):  # other threads may still make some: nothing here may keep the process
            for finalizer in list(util._finalizer_registry.values()):  # type: ignore[attr-defined]
                if getattr(finalizer, "_callback", None) is synchronize.SemLock._cleanup:  # type: ignore[attr-defined]
                    finalizer()


def _tell(line: str) -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(Exception):
        print(line, file=sys.stderr, flush=True)
