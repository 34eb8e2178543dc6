"""Frames of video files: exact pixels, numbers, rotation, damage; and one line without PyAV."""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from scaling_perception.data.find import Search, find_inputs, name_results
from scaling_perception.data.video import VideoReader, count_frames
from scaling_perception.support.errors import UserError


def frames_of(count, height=24, width=32):
    return np.random.default_rng(3).integers(0, 256, (count, height, width, 3), np.uint8)


def write_video(path, frames, codec="png", pixels="rgb24"):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_frames_are_exact_in_any_order(tmp_path):
    frames, path = frames_of(7), tmp_path / "clip.mov"
    write_video(path, frames)
    assert count_frames(path) == 7
    reader = VideoReader()
    for index in (0, 1, 1, 3, 2, 6, 0):
        np.testing.assert_array_equal(reader.read(path, index), frames[index])
    with pytest.raises(UserError, match="ends before frame 7 .*has 7"):
        reader.read(path, 7)
    write_video(tmp_path / "other.avi", frames[::-1])
    np.testing.assert_array_equal(reader.read(tmp_path / "other.avi", 0), frames[6])
    reader.close()


def test_frames_of_a_lossy_codec_that_reorders_are_counted_as_they_are_shown(tmp_path):
    shades = np.full((12, 32, 32, 3), 0, np.uint8) + (np.arange(12, dtype=np.uint8) * 20)[:, None, None, None]
    write_video(tmp_path / "clip.mp4", shades, "libx264", "yuv420p")
    assert count_frames(tmp_path / "clip.mp4") == 12
    reader = VideoReader()
    means = [float(reader.read(tmp_path / "clip.mp4", i).mean()) for i in range(12)]
    np.testing.assert_allclose(means, np.arange(12) * 20, atol=8)
    reader.close()


def test_frames_of_a_turned_phone_are_upright(tmp_path):
    frames, path = frames_of(2), tmp_path / "clip.mov"
    write_video(path, frames)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    quarter = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # players turn it to the right
    data[matrix : matrix + 36] = quarter
    path.write_bytes(bytes(data))
    reader = VideoReader()
    np.testing.assert_array_equal(reader.read(path, 1), np.rot90(frames[1], -1))
    reader.close()


def test_videos_are_sequences_with_names(tmp_path):
    write_video(tmp_path / "clip.mov", frames_of(7))
    word = str(tmp_path / "clip.mov")
    items = name_results(find_inputs([word], "depth", search=Search(every=3, start=1)), "depth")
    assert [(item.name, item.inputs[0].frame) for item in items] == [("clip_000001", 1), ("clip_000004", 4)]
    pairs = find_inputs([word], "flow", search=Search(every=2, end=5))
    assert [(a.frame, b.frame) for a, b in pairs] == [(0, 2), (2, 4)]
    assert len(find_inputs([f"{tmp_path}/*"], "depth")) == 7


def test_damaged_videos_are_one_line(tmp_path):
    write_video(tmp_path / "clip.mov", frames_of(7))
    data = (tmp_path / "clip.mov").read_bytes()
    (tmp_path / "cut.mov").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("cut.mov", "text.mp4"):
        with pytest.raises(UserError, match="is no video, or a damaged one"):
            count_frames(tmp_path / name)
    with pytest.raises(UserError, match="does not exist"):
        VideoReader().read(tmp_path / "none.mp4", 0)


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'scaling-perception\[video\]'"):
        count_frames(Path(tmp_path / "clip.mp4"))
