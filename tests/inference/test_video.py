"""Frames of video files: exact pixels, numbers, rotation, damage; and one line without PyAV."""

import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from scaling_perception.inference.find import Search, find_inputs, name_results
from scaling_perception.inference.video import VideoReader, survey
from scaling_perception.support.errors import UserError


def frames_of(count, height=24, width=32):
    return np.random.default_rng(3).integers(0, 256, (count, height, width, 3), np.uint8)


def write_video(path, frames, codec="png", pixels="rgb24", options=None):
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_frames_are_exact_in_any_order(tmp_path):
    frames, path = frames_of(7), tmp_path / "clip.mov"
    write_video(path, frames)
    assert len(survey(path).times) == 7
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
    assert len(survey(tmp_path / "clip.mp4").times) == 12
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
            survey(tmp_path / name)
    with pytest.raises(UserError, match="does not exist"):
        VideoReader().read(tmp_path / "none.mp4", 0)


def test_a_damaged_packet_costs_its_own_frame(tmp_path):
    frames, path = frames_of(7), tmp_path / "clip.mov"
    write_video(path, frames)
    data, starts, place = bytearray(path.read_bytes()), [], 0
    while (place := data.find(b"\x89PNG", place + 1)) > 0:
        starts.append(place)
    assert len(starts) == 7
    data[starts[3] : starts[3] + 200] = bytes(200)
    path.write_bytes(bytes(data))
    assert len(survey(path).times) == 7
    reader = VideoReader()
    for index in (0, 2, 4, 5, 6, 1):
        np.testing.assert_array_equal(reader.read(path, index), frames[index])
    for again in range(2):
        with pytest.raises(UserError, match="clip.mov frame 3 is damaged"):
            reader.read(path, 3)
        np.testing.assert_array_equal(reader.read(path, 4 + again), frames[4 + again])
    reader.close()


CUT = {  # codec, options of the container, and what is said of the frames that were there
    "clip.mkv": ("mpeg4", {}, r" of about 40 frames"),
    "clip.webm": ("libvpx", {}, r" of about 40 frames"),
    "clip.flv": ("flv1", {}, r" of about 4[01] frames"),
    "clip.avi": ("mpeg4", {}, r" of 40 frames"),
    "clip.mp4": ("mpeg4", {"movflags": "faststart"}, r" of 40 frames"),
    "parts.mp4": ("mpeg4", {"movflags": "frag_every_frame+empty_moov"}, r" frames"),
    "clip.ts": ("mpeg2video", {}, r" frames"),
    "clip.m2ts": ("mpeg2video", {}, r" frames"),
    "clip.mpg": ("mpeg1video", {}, r" frames"),
    "clip.wmv": ("wmv2", {}, r" frames"),
    "clip.ogv": ("libvpx", {}, r" frames"),
    "clip.mjpeg": ("mjpeg", {}, r" frames"),
}


@pytest.mark.parametrize("name", CUT)
def test_a_video_that_is_cut_says_so(tmp_path, name):
    codec, options, words = CUT[name]
    path, pixels = tmp_path / name, "yuvj420p" if codec == "mjpeg" else "yuv420p"
    write_video(path, frames_of(40, 48, 64), codec, pixels, options)
    assert find_inputs([str(path)], "depth")[-1][0].fault == "" and len(survey(path).times) == 40
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10 + 1])
    *rest, (last,) = find_inputs([str(path)], "depth")
    assert 0 < len(rest) < 35 and last.frame == len(rest) and not any(one.fault for (one,) in rest)
    assert re.fullmatch(rf"{path} ends early, after {len(rest)}{words}: copy or download it again", last.fault)
    assert len(find_inputs([str(path)], "depth", search=Search(end=len(rest)))) == len(
        rest
    )  # what is asked for is there
    *_, (before, missing) = find_inputs([str(path)], "flow")
    assert before.fault == "" and missing.fault == last.fault
    VideoReader().read(path, len(rest) // 2)


def test_sound_that_goes_on_counts_for_the_end(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("mpeg4", rate=25), container.add_stream("pcm_s16le", rate=8000)
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        for number, frame in enumerate(frames_of(25, 48, 64)):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            for part in range(2):  # twice as long as the picture
                wave = av.AudioFrame.from_ndarray(np.zeros((1, 320), np.int16), format="s16", layout="mono")
                wave.sample_rate, wave.pts = 8000, 320 * (2 * number + part)
                container.mux(sound.encode(wave))
        container.mux(video.encode(None))
    assert find_inputs([str(path)], "depth")[-1][0].fault == ""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert re.search(r"after \d+ frames \(\d\.\d s before its end\)", find_inputs([str(path)], "depth")[-1][0].fault)


def boxes(data, start, end):
    """(kind, start, length) of the boxes of an MP4 file."""
    while start < end:
        length, kind = struct.unpack(">I4s", data[start : start + 8])
        yield kind, start, length
        start += length


def test_a_cover_picture_is_not_the_video(tmp_path):
    av = pytest.importorskip("av")
    frames, path = frames_of(5), tmp_path / "drone.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        video = container.add_stream("png", rate=25)
        video.height, video.width, video.pix_fmt = 24, 32, "rgb24"
        grey = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 99, np.uint8), format="rgb24")
        for packet in [*cover.encode(grey), *cover.encode(None)]:
            container.mux(packet)
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
    data = path.read_bytes()
    _, start, length = next(box for box in boxes(data, 0, len(data)) if box[0] == b"moov")
    order = {b"mvhd": 0, b"udta": 1}  # as drones write it: the cover comes before the video
    inside = sorted(boxes(data, start + 8, start + length), key=lambda box: order.get(box[0], 2))
    moved = b"".join(data[place : place + size] for _, place, size in inside)
    path.write_bytes(data[: start + 8] + moved + data[start + length :])
    with av.open(str(path)) as container:
        assert container.streams.video[0].width == 16
    assert len(survey(path).times) == 5
    reader = VideoReader()
    np.testing.assert_array_equal(reader.read(path, 4), frames[4])
    reader.close()


def test_variable_rate_and_odd_sizes(tmp_path):
    av = pytest.importorskip("av")
    frames, path = frames_of(5, 25, 33), tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=1000)
        stream.height, stream.width, stream.pix_fmt = 25, 33, "bgr0"
        for frame, time in zip(frames, (0, 10, 11, 500, 4000), strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgr0")
            picture.pts = time
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    assert len(survey(path).times) == 5
    reader = VideoReader()
    for index in (1, 4, 0):
        np.testing.assert_array_equal(reader.read(path, index), frames[index])
    reader.close()


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'scaling-perception\[video\]'"):
        survey(Path(tmp_path / "clip.mp4"))
