"""Clips: one noise, one alignment, a video, and a flicker that is measured along the motion."""

import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from scaling_perception.cli import main
from scaling_perception.data.formats import read_image, read_png16, write_flo
from scaling_perception.data.sources.scenes import render_clip, render_scene
from scaling_perception.inference.clips import align, flicker, members_of_frames
from scaling_perception.inference.settings import Settings
from scaling_perception.inference.video import VideoReader, VideoWriter, survey
from scaling_perception.support.errors import UserError

pytest_plugins = ("nano", "predicting")
pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture
def frames(tmp_path, make_image):
    """A folder of three frames of one size, the second equal to the first."""
    folder = tmp_path / "walk"
    folder.mkdir()
    for i, seed in enumerate((0, 0, 5)):
        Image.fromarray(make_image(41, 56, seed)).save(folder / f"f{i}.png")
    return folder


def depth_of(out, name):
    return np.load(out / f"{name}_depth.npy")


def test_a_clip_is_aligned_once_and_written_as_a_video(predict, frames, tmp_path, capsys):
    predict("depth", "--video", frames)
    out = tmp_path / "out"
    depths = [depth_of(out, f"f{i}") for i in range(3)]
    whole = np.stack(depths)
    assert whole.min() >= 0 and whole.max() <= 1
    np.testing.assert_array_equal(read_png16(out / "f2_depth_16bit.png"), np.round(depths[2] * 65535))
    record = json.loads((out / "walk_depth_clip.json").read_text())
    assert record["frames"] == ["f0", "f1", "f2"] and record["carry"] == 0 and record["noise"] == "of the first frame"
    assert len(record["flicker"]["pairs"]) == 2 and record["flicker"]["flow"].startswith("predicted by")
    assert "--video" in record["command"] and str(frames) in record["command"]
    assert len(survey(out / "walk_depth.mp4").times) == 3
    shown = VideoReader().read(out / "walk_depth.mp4", 1)
    assert shown.shape == (42, 56, 3), "an odd side is filled up"
    assert np.abs(shown[:41].astype(int) - read_image(out / "f1_depth_color.png")).mean() < 12
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    predict("depth", "--video", frames)
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}, "finished clips are kept"
    (out / "walk_depth.mp4").unlink()
    predict("depth", "--video", frames)
    assert (out / "walk_depth.mp4").is_file() and json.loads((out / "walk_depth_clip.json").read_text()) == record
    text = predict("depth", frames / "f1.png")
    assert "made anew" in text.err, "a frame alone is another prediction"
    text = predict("depth", "--video", frames)
    assert "made anew" in text.err
    np.testing.assert_allclose(depth_of(out, "f1"), depths[1], atol=1e-6)


def test_frames_share_noise_and_alignment(predictor, make_image):
    images = [make_image(32, 32, 1), make_image(32, 32, 1), make_image(32, 32, 2)]
    raws = [{"key": str(i), "image": image} for i, image in enumerate(images)]
    settings = Settings(2, 2)
    tables = predictor.tables(settings, "depth", predictor.choose_diffusion())
    first, same, other = members_of_frames(predictor, raws, "depth", settings, tables, 0)
    np.testing.assert_allclose(first, same, atol=1e-5)
    alone = next(iter(members_of_frames(predictor, raws[2:], "depth", settings, tables, 0)))
    assert np.abs(alone - other).max() > 1e-4, "alone it has noise of its own"
    reduced = align(predictor, [first, other], "depth", "lsq")
    tall, _ = predictor.reduce("depth", np.concatenate([first, other], axis=1), "lsq")
    np.testing.assert_array_equal(np.concatenate([one for one, _ in reduced]), tall)
    assert tall.min() == 0 and tall.max() == 1
    carried = list(members_of_frames(predictor, raws, "depth", settings, tables, 0, carry=0.3))
    np.testing.assert_allclose(carried[0], first, atol=1e-5)
    assert np.abs(carried[1] - same).max() > 1e-5, "the second frame starts from the first one's latents"


def test_one_line_for_the_points_of_all_frames(predict, frames, tmp_path):
    predict("depth", "--video", frames, out="plain")
    depths = [depth_of(tmp_path / "plain", f"f{i}") for i in range(3)]
    places = [(0, 4, 5), (0, 30, 20), (2, 50, 33), (2, 10, 12)]
    rows = [f"f{i}.png,{x},{y},{2 + 3 * depths[i][y, x]:.9f}" for i, x, y in places]
    (tmp_path / "points.csv").write_text("\n".join(["image,x,y,depth", *rows]))
    predict("depth", "--video", "--align", tmp_path / "points.csv", frames)
    record = json.loads((tmp_path / "out" / "walk_depth_clip.json").read_text())
    assert record["metric"]["points"] == 4 and record["metric"]["scale"] == pytest.approx(3, abs=1e-3)
    for i, depth in enumerate(depths):
        metres = np.load(tmp_path / "out" / f"f{i}_depth_metric.npy")
        np.testing.assert_allclose(metres, 2 + 3 * depth, atol=2e-3)
    (tmp_path / "points.csv").write_text("image,x,y,depth\nother.png,1,1,2\n")
    text = predict("depth", "--video", "--align", tmp_path / "points.csv", frames, code=2, out="none")
    assert "no point of any frame" in text.err


def test_other_tasks_a_video_file_and_given_flow(predict, frames, tmp_path, make_image):
    with VideoWriter(tmp_path / "clip.mp4", 10) as video:
        for seed in (0, 1):
            video.add(make_image(32, 48, seed))
    flow = tmp_path / "flow"
    flow.mkdir()
    write_flo(flow / "clip_000000_flow.flo", np.zeros((32, 48, 2), np.float32))
    predict("depth", "--video", "--flow", flow, "--ensemble", 1, tmp_path / "clip.mp4", ensemble=1)
    record = json.loads((tmp_path / "out" / "clip_depth_clip.json").read_text())
    assert record["rate"] == 10 and record["flicker"]["flow"] == "given" and len(record["frames"]) == 2
    depths = [depth_of(tmp_path / "out", f"clip_00000{i}") for i in range(2)]
    images = [VideoReader().read(tmp_path / "clip.mp4", i) for i in range(2)]
    wanted = flicker(*depths, np.zeros((32, 48, 2)), tuple(images))
    assert record["flicker"]["mean"] == pytest.approx(wanted, rel=1e-5)
    predict("flow", "--video", "--carry", 0.2, frames)
    assert len(survey(tmp_path / "out" / "walk_flow.mp4").times) == 2


def test_what_does_not_go_with_a_clip_is_one_line(predict, frames, tmp_path, make_image):
    one = tmp_path / "one"
    one.mkdir()
    Image.fromarray(make_image(20, 20, 0)).save(one / "a.png")
    sizes = tmp_path / "sizes"
    sizes.mkdir()
    for i in (20, 24):
        Image.fromarray(make_image(20, i, 0)).save(sizes / f"{i}.png")
    for words, message in (
        ((one,), "has one frame"),
        ((frames, "--carry", "1"), "--carry 1: give a share"),
        ((frames, "--carry", "nan"), "--carry nan: give a share"),
        ((frames, "--carry", "0.1", "--eta", "1"), "--carry goes with solvers without noise"),
        ((frames, "--carry", "0.1", "--solver", "heun"), "--carry goes with"),
        ((frames, "--tolerance", "0.1"), "--video goes with neither"),
        ((frames, "--aspect", "letterbox"), "--video goes with neither"),
        ((frames, "--shard", "0/2"), "leave out --shard"),
        ((frames, "--flow", tmp_path), "has no f0_flow.flo"),
        ((sizes,), "give frames of one size"),
    ):
        text = predict("depth", "--video", *words, code=2, out="bad")
        assert message in text.err and len(text.err.strip().splitlines()[-1]) < 250, message
    assert "goes with --video" in predict("depth", "--carry", "0.1", frames, code=2).err
    assert not list((tmp_path / "bad").glob("*"))


def test_a_damaged_frame_is_named_and_the_others_are_a_clip(predict, frames, tmp_path):
    (frames / "f1.png").write_bytes((frames / "f1.png").read_bytes()[:200])
    text = predict("depth", "--video", frames, code=1)
    assert "f1.png" in text.err and "2 written" in text.out
    record = json.loads((tmp_path / "out" / "walk_depth_clip.json").read_text())
    assert record["frames"] == ["f0", "f2"] and len(survey(tmp_path / "out" / "walk_depth.mp4").times) == 2
    assert "is a frame of a clip" in repeat(tmp_path / "out" / "f0_depth.json")


def test_a_clip_of_damaged_frames_leaves_nothing(predict, frames, tmp_path):
    for path in frames.iterdir():
        path.write_bytes(b"no picture")
    assert "3 failed" in predict("depth", "--video", frames, code=1).out
    assert not list((tmp_path / "out").glob("*")), "neither a video nor a record of one"
    with pytest.raises(UserError, match="cannot write the video .* directory"):
        with VideoWriter(tmp_path / "none" / "x.mp4", 25) as video:
            video.add(np.zeros((16, 16, 3), np.uint8))


def repeat(record):
    """What `--repeat` of a record says."""
    with contextlib.redirect_stderr(io.StringIO()) as text:
        assert main(["predict", "--repeat", str(record), "--out", str(record.parent)]) == 2
    return text.getvalue()


def test_flicker_is_the_change_along_the_motion():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (12, 16, 3)).astype(np.uint8)
    values = rng.random((12, 16))
    still = np.zeros((12, 16, 2))
    assert flicker(values, values, still, (image, image)) == 0
    assert flicker(values, values + 0.25, still, (image, image)) == pytest.approx(0.25)
    right = still + np.array([3.0, 0.0])
    moved, seen = np.roll(values, 3, axis=1), np.roll(image, 3, axis=1)
    assert flicker(values, moved, right, (image, seen)) == 0 < flicker(values, moved, still, (image, seen))
    half = still + np.array([0.5, 0.0])
    ramp = np.tile(np.arange(16.0), (12, 1))
    assert flicker(ramp, ramp - 0.5, half, (image * 0, image * 0)) == pytest.approx(0)
    assert flicker(values, values, still + 99, (image, image)) is None
    vectors = np.stack([values, values], axis=-1)
    assert flicker(vectors, vectors + [3, 4], still, (image, image)) == pytest.approx(5)


def test_a_rendered_clip_moves_from_its_first_frame_to_its_second():
    clip, whole = render_clip(7, 3, 32), render_scene(7, 32)
    np.testing.assert_array_equal(clip[0]["image"], whole["image"])
    np.testing.assert_allclose(clip[0]["depth"], whole["depth"])
    np.testing.assert_allclose(clip[2]["depth"], whole["depth2"], atol=1e-4)
    shown = [np.abs(a["depth"] - b["depth"]).mean() for a, b in ((clip[0], clip[1]), (clip[0], clip[2]))]
    assert 0 < shown[0] < shown[1]
    half, flow = (np.abs(one["flow"]).mean() for one in (clip[0], whole))
    assert half == pytest.approx(flow / 2, rel=0.2)
    with pytest.raises(UserError, match="frames 1 of a clip"):
        render_clip(7, 1)
