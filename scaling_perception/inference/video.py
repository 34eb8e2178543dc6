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

# What FFmpeg opens as a video by these names; lists of its formats hold sound, subtitles and pictures as well.
SUFFIXES = (
    *(
        ".mp4",
        ".m4v",
        ".mov",
        ".qt",
        ".mkv",
        ".mk3d",
        ".webm",
        ".avi",
        ".divx",
        ".mpg",
        ".mpeg",
        ".mpe",
        ".m2v",
        ".vob",
    ),
    *(".ts", ".mts", ".m2ts", ".m2t", ".tod", ".mod", ".wmv", ".asf", ".flv", ".f4v", ".ogv", ".ogm", ".3gp", ".3g2"),
    *(
        ".mxf",
        ".dv",
        ".y4m",
        ".h264",
        ".264",
        ".h265",
        ".265",
        ".hevc",
        ".mjpeg",
        ".mjpg",
        ".mj2",
        ".nut",
        ".rm",
        ".rmvb",
    ),
    *(".insv", ".lrv", ".360", ".av1", ".obu", ".ivf"),
)

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
    """A container and its best video stream, never a cover picture; what PyAV raises becomes one line."""
    av = require_pyav(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: check the path")
    try:
        with av.open(str(path)) as container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                what = "no video stream" if stream is None else "a cover picture and no video stream"
                raise UserError(f"{path} holds {what}: check the file")
            yield container, stream
    except av.FFmpegError as error:
        raise UserError(f"{path} is no video, or a damaged one ({error.strerror}): copy or download it again") from None


def frame_times(path: Path) -> list[int | None]:
    """When each frame is shown, in the order of showing, as the packets announce it; nothing is decoded.

    In units of the stream's time base; None for every frame where the container does not say (AVI).

    Raises:
        UserError: no video, a damaged one, or PyAV is not installed.
    """
    with _opened(path) as (container, stream):
        times = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
    if not times:
        raise UserError(f"{path} holds no frame: check the file")
    known = [time for time in times if time is not None]
    if len(set(known)) < len(times):
        return [None] * len(times)
    return [*sorted(known)]


def count_frames(path: Path) -> int:
    """How many frames a video's packets announce; nothing is decoded.

    Raises:
        UserError: no video, a damaged one, or PyAV is not installed.
    """
    return len(frame_times(path))


def _frames(path: Path) -> Generator[Any, None, None]:
    """The frames that can be decoded, in the order of showing; None for a packet that cannot be."""
    av = require_pyav(path)
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except av.FFmpegError:
                yield None


class VideoReader:
    """Random access to frames that is quick for rising numbers: one video is open, the last frames are kept.

    A damaged packet costs its own frame: the frames after it keep their numbers. Safe to call from several threads;
    they take turns.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._path: Path | None = None
        self._frames: Generator[Any, None, None] | None = None
        self._numbers: dict[int, int] = {}  # of frames, by the time at which they are shown; empty where none is known
        self._count = 0
        self._next = 0
        self._pending: tuple[int, Any] | None = None  # number and frame that were decoded and not asked for yet
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()

    def read(self, path: Path, index: int) -> np.ndarray:
        """Frame ``index`` as uint8 RGB (H, W, 3), upright.

        Raises:
            UserError: no video, a damaged one, a damaged frame, one that ends before this frame, or PyAV is not
                installed.
        """
        with self._lock:
            if path != self._path or (index < self._next and index not in self._kept):
                self.close()
                times = frame_times(path)
                self._numbers = {time: number for number, time in enumerate(times) if time is not None}
                self._path, self._count, self._frames = path, len(times), _frames(path)
            if index not in self._kept:
                self._kept[index] = self._decode(path, index)
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            return self._kept[index]

    def _decode(self, path: Path, index: int) -> np.ndarray:
        while (found := self._pending or self._advance()) is not None:
            number, frame = found
            self._pending = found if number > index else None
            if number > index:
                raise UserError(f"{path} frame {index} is damaged: it is left out")
            self._next = number + 1
            if number == index:
                if frame is None or frame.is_corrupt:
                    raise UserError(f"{path} frame {index} is damaged: it is left out")
                pixels = frame.to_ndarray(format="rgb24")
                return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
        if index < self._count and self._next > 0:
            raise UserError(f"{path} frame {index} is damaged, or the file is cut short: it is left out")
        raise UserError(
            f"{path} ends before frame {index} (it has {self._next}): it is cut short, or give a lower --end"
        )

    def _advance(self) -> tuple[int, Any] | None:
        """The next frame's number and the frame (None where it is damaged); None at the end."""
        for frame in self._frames or ():
            if self._numbers:
                if frame is None or frame.pts not in self._numbers:
                    continue  # a later frame shows by its time that this one is missing
                return self._numbers[frame.pts], frame
            return self._next, frame
        return None

    def close(self) -> None:
        """Close the video that is open, if any."""
        if self._frames is not None:
            self._frames.close()  # and with it the container
        self._path, self._frames, self._pending, self._next, self._count = None, None, None, 0, 0
        self._kept.clear()
