"""Frames of video files, through PyAV (``pip install 'scaling-perception[video]'``).

Frames are numbered from 0 in the order in which they are shown. PyAV carries FFmpeg's libraries in its wheels.
"""

import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import Generator, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import UInt8

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


def require_pyav(what: str, instead: str = "") -> Any:
    """The module ``av``.

    Raises:
        UserError: it is not installed; ``what`` needs it, and ``instead`` is another way.
    """
    try:
        import av
    except ImportError:
        raise UserError(f"{what}, which needs PyAV: pip install 'scaling-perception[video]'{instead}") from None
    return av


def _reading(path: Path) -> Any:
    return require_pyav(f"{path} is a video", ", or give a folder of frames")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A container and its best video stream, never a cover picture; what PyAV raises becomes one line."""
    av = _reading(path)
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


class Survey(NamedTuple):
    """What a video's packets announce; nothing of it is decoded."""

    times: list[
        int | None
    ]  # when each frame is shown, in that order, in the stream's time base; None where unknown (AVI)
    fault: str  # of a file that ends early, what is wrong in one line; else empty


def survey(path: Path) -> Survey:
    """The frames that a video announces, and whether it ends before it should.

    Raises:
        UserError: no video, a damaged one, or PyAV is not installed.
    """
    end, damaged = 0.0, deque(maxlen=3)
    with _opened(path) as (container, stream):
        times = []
        played = [one for one in container.streams if one.type in ("video", "audio")]
        for packet in container.demux(*played):
            time = packet.pts if packet.pts is not None else packet.dts
            if packet.size and time is not None and packet.time_base:
                end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
            if packet.size and packet.stream_index == stream.index:
                damaged.append(packet.is_corrupt)
                times += [] if packet.is_discard else [packet.pts]
        listed = "mp4" in container.format.name  # each frame is listed: the duration may hold what edits leave out
        left = 0.0 if listed else (container.duration or 0) / 1e6 + (container.start_time or 0) / 1e6 - end
        rate, frames = float(stream.average_rate or 25), stream.frames
    if not times:
        raise UserError(f"{path} holds no frame: check the file")
    fault, count, late = "", len(times), left > max(2.5 / rate, 0.1)
    if late or any(damaged) or frames > count or ends_inside(path):
        whole = f" of {frames}" if frames > count else ""
        whole = f" of about {count + round(left * rate)}" if late and len(played) == 1 and not whole else whole
        more = f" ({left:.1f} s before its end)" if late and not whole else ""
        fault = f"{path} ends early, after {count}{whole} frames{more}: copy or download it again"
    known = [time for time in times if time is not None]
    return Survey([*sorted(known)] if len(set(known)) == len(times) else [None] * len(times), fault)


def ends_inside(path: Path) -> bool:
    """Whether a file ends inside of one of the parts whose length its container states (those known here)."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(4096)

        def at(place: int, count: int) -> bytes:
            file.seek(place)
            return file.read(count)

        if head[:4] == b"RIFF" or head[4:8] in (b"ftyp", b"styp", b"moov"):
            place, big = 0, head[:4] != b"RIFF"
            while place + 8 <= size:
                length = _length_of_box(at(place, 16)) if big else 8 + int.from_bytes(at(place + 4, 4), "little")
                if not length or length == 8 + 0xFFFFFFFF:
                    return False  # up to the end, or not known when it was written
                place += length if big else length + length % 2
            return place > size + (not big)  # the last byte that makes a length even is often left out
        if head[:4] == b"\x1aE\xdf\xa3":  # Matroska and WebM: a header, then one segment
            header, place = _ebml_size(head, 4)
            segment = place + (header or 0)
            length, place = _ebml_size(at(segment, 16), 4)
            return length is not None and segment + place + length > size
        if head[:4] == b"OggS":
            tail = at(max(0, size - 65536), 65536)
            last = tail[tail.rfind(b"OggS") :]
            return len(last) > 5 and not last[5] & 4  # the page that ends a stream says so
        if head[:3] == b"\xff\xd8\xff":  # pictures one after the other
            return b"\xff\xd9" not in at(max(0, size - 64), 64)
        if (place := head.find(_ASF_PROPERTIES)) > 0 and head[:4] == b"0&\xb2u":
            return int.from_bytes(head[place + 40 : place + 48], "little") > size
        for unit, first in ((188, 0), (192, 4)):
            if len(head) > 2 * unit + first and {head[first + i * unit] for i in range(3)} == {0x47}:
                return size % unit > 0
    return False


_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def _length_of_box(head: bytes) -> int:
    """The length of an MP4 box; 0: up to the end of the file."""
    short = int.from_bytes(head[:4], "big")
    return int.from_bytes(head[8:16], "big") if short == 1 else max(short, 8) if short else 0


def _ebml_size(data: bytes, place: int) -> tuple[int | None, int]:
    """The size that stands at a place, None where it was not known when it was written, and the place after it."""
    first = data[place] if place < len(data) else 0
    count = 9 - first.bit_length()
    value = int.from_bytes(data[place : place + count], "big") & ((1 << 7 * count) - 1)
    return (None if not first or value == (1 << 7 * count) - 1 else value), place + count


def _frames(path: Path) -> Generator[Any, None, None]:
    """The frames that can be decoded, in the order of showing; None for a packet that cannot be."""
    av = _reading(path)
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
        self._kept: OrderedDict[int, UInt8[np.ndarray, "H W 3"]] = OrderedDict()

    def read(self, path: Path, index: int) -> UInt8[np.ndarray, "H W 3"]:
        """Frame ``index`` as uint8 RGB (H, W, 3), upright.

        Raises:
            UserError: no video, a damaged one, a damaged frame, one that ends before this frame, or PyAV is not
                installed.
        """
        with self._lock:
            if path != self._path or (index < self._next and index not in self._kept):
                self.close()
                times = survey(path).times
                self._numbers = {time: number for number, time in enumerate(times) if time is not None}
                self._path, self._count, self._frames = path, len(times), _frames(path)
            if index not in self._kept:
                self._kept[index] = self._decode(path, index)
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            return self._kept[index]

    def _decode(self, path: Path, index: int) -> UInt8[np.ndarray, "H W 3"]:
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


def frame_rate(path: Path) -> Fraction:
    """Frames a second of a video, 25 where it does not say.

    Raises:
        UserError: no video, a damaged one, or PyAV is not installed.
    """
    with _opened(path) as (_, stream):
        return Fraction(stream.average_rate or 25)


class VideoWriter:
    """Writes uint8 RGB frames (H, W, 3) of one size into an MP4 (H.264); a side of odd length is filled up by one.

    Raises:
        UserError: PyAV is not installed, or the file cannot be written.
    """

    def __init__(self, path: Path, rate: Fraction | int) -> None:
        self._av, self._path = require_pyav(f"{path} is a video"), path
        self._rate, self._stream = Fraction(rate).limit_denominator(65535), None
        with self._explained():
            self._container = self._av.open(str(path), "w", format="mp4")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._explained():
            try:
                if self._stream is not None:
                    self._container.mux(self._stream.encode())
            finally:
                self._container.close()

    def add(self, pixels: UInt8[np.ndarray, "H W 3"]) -> None:
        """Append a frame."""
        height, width = pixels.shape[:2]
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        with self._explained():
            if self._stream is None:
                self._stream = self._container.add_stream("libx264", rate=self._rate, options={"crf": "16"})
                self._stream.height, self._stream.width = pixels.shape[:2]
                self._stream.pix_fmt = "yuv420p"
            frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            self._container.mux(self._stream.encode(frame))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What PyAV raises becomes one line."""
        try:
            yield
        except self._av.FFmpegError as error:
            raise UserError(f"cannot write the video {self._path} ({error.strerror})") from None
