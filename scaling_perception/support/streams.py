"""Standard output and error that nobody reads end no run: what is written to a closed pipe or terminal is dropped."""

import errno
import io
import os
import select
import sys
import unicodedata
from typing import Any

_CONTROL = ("Cc", "Zl", "Zp")
_DIRECTION = {chr(code) for code in (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}
_NOBODY_READS = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET, errno.ENXIO, errno.ESHUTDOWN}
_PATIENCE = 1.0  # seconds that progress waits for its reader


class _Lenient(io.FileIO):
    """A file descriptor that turns into the null device when nobody reads any more.

    ``strict``: other errors, such as a full disk, are raised. Standard error shows progress alone, so no error of it
    is; of standard output, which may hold a result, they are.
    """

    def __init__(self, number: int, strict: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._strict, self._what = strict, "standard output" if number == 1 else "standard error"

    def write(self, data: Any, /) -> int:
        try:
            while (count := super().write(data)) is None:  # set to non-blocking, and full at the moment
                if not select.select([], [self], [], None if self._strict else _PATIENCE)[1]:
                    return memoryview(data).nbytes
            return count
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # processes that are started later write there as well
            os.close(null)
            if self._strict and error.errno not in _NOBODY_READS:
                raise OSError(error.errno, error.strerror, self._what) from error
            return memoryview(data).nbytes


def keep_standard_streams() -> None:
    """Make the process's own standard streams as above; streams that something else has put in their place stay.

    Descriptors that were closed when the process started are opened on the null device: else the next file that is
    opened would get their number, and what libraries print would go into it. A character that the encoding of the
    terminal lacks is written as an escape.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            if null != number:
                os.dup2(null, number)
                os.close(null)
    for number, name in ((1, "stdout"), (2, "stderr")):
        old, own = getattr(sys, name), getattr(sys, f"__{name}__")
        if old is not own or isinstance(getattr(getattr(old, "buffer", None), "raw", None), _Lenient):
            continue
        encoding = "utf-8" if old is None else old.encoding
        if old is not None:
            old.flush()
        raw = _Lenient(number, strict=number == 1)
        lines = number == 2 or raw.isatty()
        stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=lines)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def one_line(text: str) -> str:
    """A message on one line: control characters, which a file's name may hold, are written as escapes.

    A terminal would interpret them: a new line, another colour, or (marks of direction) the text in another order.
    """
    return "".join(_escaped(one) if unicodedata.category(one) in _CONTROL or one in _DIRECTION else one for one in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def print_message(line: str) -> None:
    """Print one line on stderr, see `one_line`."""
    print(one_line(line), file=sys.stderr, flush=True)
