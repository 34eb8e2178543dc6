"""Frames of video files, through PyAV (``pip install 'scaling-perception[video]'``).

Frames are numbered from 0 in the order in which they are shown. PyAV carries FFmpeg's libraries in its wheels.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scaling_perception.support.errors import UserError

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".ogv")

_KEPT = 2  # a frame of a sequence is the second of one pair and the first of the next


def is_video(path: Path) -> bool:
    """Whether a file's name says that it is a video."""
    return path.suffix.lower() in SUFFIXES


def require_pyav(path: Path) -> Any:
    """The module ``av``.

    Raises:
        UserError: it is not installed.
    """
    try:
        import av
    except ImportError:
        raise UserError(
            f"{path} is a video, which needs PyAV: pip install 'scaling-perception[video]', or give a folder of frames"
        ) from None
    return av


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A container and its first video stream; what PyAV raises becomes one line."""
    av = require_pyav(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: check the path")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} holds no video stream: check the file")
            yield container, container.streams.video[0]
    except av.FFmpegError as error:
        raise UserError(f"{path} is no video, or a damaged one ({error.strerror}): copy or download it again") from None


def count_frames(path: Path) -> int:
    """How many frames a video's packets announce; nothing is decoded.

    Raises:
        UserError: no video, a damaged one, or PyAV is not installed.
    """
    with _opened(path) as (container, stream):
        count = sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)
    if not count:
        raise UserError(f"{path} holds no frame: check the file")
    return count


def _frames(path: Path) -> Generator[Any, None, None]:
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        yield from container.decode(stream)


class VideoReader:
    """Random access to frames that is quick for rising numbers: one video is open, the last frames are kept.

    Safe to call from several threads; they take turns.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._path: Path | None = None
        self._frames: Generator[Any, None, None] | None = None
        self._next = 0
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()

    def read(self, path: Path, index: int) -> np.ndarray:
        """Frame ``index`` as uint8 RGB (H, W, 3), upright.

        Raises:
            UserError: no video, a damaged one, one that ends before this frame, or PyAV is not installed.
        """
        with self._lock:
            if path != self._path or (index < self._next and index not in self._kept):
                self.close()
                self._path, self._frames = path, _frames(path)
            if index not in self._kept:
                self._kept[index] = self._decode(path, index)
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            return self._kept[index]

    def _decode(self, path: Path, index: int) -> np.ndarray:
        for frame in self._frames or ():
            self._next += 1
            if self._next > index:
                pixels = frame.to_ndarray(format="rgb24")
                return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
        raise UserError(
            f"{path} ends before frame {index} (it has {self._next}): it is cut short, or give a lower --end"
        )

    def close(self) -> None:
        """Close the video that is open, if any."""
        if self._frames is not None:
            self._frames.close()  # and with it the container
        self._path, self._frames, self._next = None, None, 0
        self._kept.clear()
