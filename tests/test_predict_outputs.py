"""Predict as a tool: point clouds, metres, records that repeat, budgets, lists, videos, interrupted runs."""

import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ply import read_ply

from scaling_perception import Predictor
from scaling_perception.cli import main
from scaling_perception.data.formats import read_depth, read_image
from scaling_perception.inference import budgets, job, outputs
from scaling_perception.inference.settings import Settings
from scaling_perception.predict import SETTINGS
from scaling_perception.support.verbs import make_parser

pytest_plugins = ("nano", "predicting")
pytestmark = pytest.mark.usefixtures("loaded_once")


def depth_of(folder, name):
    return np.load(folder / f"{name}_depth.npy")


def files_in(folder):
    return {path.name for path in folder.iterdir()}


def test_every_setting_has_a_flag():
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    assert list(SETTINGS) == list(fields)
    parser = make_parser("predict")
    args = parser.parse_args(["--out", "o", "--step-tolerance", "0.1", "--antithetic", "--first", "3", "x.png"])
    assert (args.step_tolerance, args.antithetic, args.first, args.eta) == (0.1, True, 3, None)
    assert all(one["text"] for one in SETTINGS.values())
    text = parser.format_help()
    assert all(f"\n{group}:" in text for group in ("inputs", "model", "compute", "budget", "outputs", "throughput"))


def test_settings_reach_the_predictor(predict, pictures, tmp_path):
    words = ("--solver", "dpm++2m", "--eta", 0.5, "--clip", 2.5, "--aspect", "letterbox", "--antithetic")
    predict("depth", pictures / "frame_1.png", *words, "--tolerance", 10, "--formats", "npy")
    record = json.loads((tmp_path / "out" / "frame_1_depth.json").read_text())
    settings = record["settings"]
    assert (settings["solver"], settings["eta"], settings["clip"]) == ("dpm++2m", 0.5, 2.5)
    assert settings["aspect"] == "letterbox" and settings["antithetic"] and settings["tolerance"] == 10
    assert record["forwards"] == 4 and set(record["request"]["settings"]) == set(SETTINGS)


# Point clouds and metres


def test_point_clouds_hold_depth_and_colours(predict, pictures, tmp_path):
    image = pictures / "frame_1.png"
    predict("depth", image, "--ply", "--intrinsics", "50,60,27.5,19.5")
    comments, xyz, rgb = read_ply(tmp_path / "out" / "frame_1_depth.ply")
    depth = depth_of(tmp_path / "out", "frame_1")
    assert len(xyz) == 40 * 56 and any("unknown scale and shift" in line for line in comments)
    np.testing.assert_allclose(xyz[:, 2], depth.ravel(), rtol=1e-6)
    rows, columns = np.mgrid[:40, :56]
    np.testing.assert_allclose(xyz[:, 0], (depth * (columns - 27.5) / 50).ravel(), atol=1e-6)
    np.testing.assert_allclose(xyz[:, 1], (depth * (rows - 19.5) / 60).ravel(), atol=1e-6)
    np.testing.assert_array_equal(rgb, read_image(image).reshape(-1, 3))
    text = predict("depth", image, "--ply", "--fov", 60, "--resume", code=2)
    assert "(--fov not given, now 60" in text.err and "--intrinsics 50,60,27.5,19.5, now not given" in text.err
    assert text.err.count("\n") == 1
    predict("depth", image, "--formats", "ply", "--fov", 60, "--range", "2,5", out="other")
    assert files_in(tmp_path / "other") == {"frame_1_depth.ply", "frame_1_depth.json"}
    _, xyz, _ = read_ply(tmp_path / "other" / "frame_1_depth.ply")
    np.testing.assert_allclose(xyz[:, 2], 2 + 3 * depth.ravel(), rtol=1e-5)


def write_points(path, depth, law, image=None, places=((3, 4), (50, 30), (20, 11), (41, 2))):
    lines = [f"{x},{y},{law(float(depth[y, x]))}" + (f",{image}" if image else "") for x, y in places]
    head = "x,y,depth" + (",image" if image else "")
    path.write_text("\n".join([head, *lines]) + "\n")


def test_points_of_known_distance_give_metres(predict, pictures, tmp_path):
    image, out, csv = pictures / "frame_1.png", tmp_path / "out", tmp_path / "points.csv"
    predict("depth", image)
    depth = depth_of(out, "frame_1")
    write_points(csv, depth, lambda d: 4 * d + 1.25)
    words = (image, "--align", csv, "--ply", "--fov", 70)
    assert "1 written" in predict("depth", *words).out
    metres = np.load(out / "frame_1_depth_metric.npy")
    assert metres.dtype == np.float32
    np.testing.assert_allclose(metres, 4 * depth + 1.25, atol=1e-4)
    np.testing.assert_allclose(read_depth(out / "frame_1_depth_metric_mm.png"), metres, atol=5.1e-4)
    comments, xyz, _ = read_ply(out / "frame_1_depth.ply")
    np.testing.assert_allclose(xyz[:, 2], metres.ravel(), rtol=1e-6)
    assert any("metres" in line for line in comments)
    record = json.loads((out / "frame_1_depth.json").read_text())
    fit = record["metric"]
    assert abs(fit["scale"] - 4) < 1e-3 and abs(fit["shift"] - 1.25) < 1e-3 and not fit["inverted"]
    assert fit["points"] == len(fit["residuals_m"]) == 4 and fit["rms_m"] < 1e-4
    assert "frame_1_depth_color.png" in record["outputs"].values(), "what was there before belongs to it"
    assert "1 already there" in predict("depth", *words).out
    write_points(csv, depth, lambda d: 5 * d + 1.25)
    assert "had been made with other settings (--align " in predict("depth", image, "--align", csv).err
    outputs_now = json.loads((out / "frame_1_depth.json").read_text())["outputs"]
    assert "ply" not in outputs_now and not (out / "frame_1_depth.ply").exists(), "a cloud of other points is stale"
    assert {"npy", "color", "metric_npy"} <= outputs_now.keys()
    predict("depth", *words, "--align-space", "disparity", "--align-fit", "robust", out="near")
    write_points(csv, depth, lambda d: 5 - 4 * d)
    text = predict("depth", *words, out="inverted")
    assert "note: " in text.err and "nearer is farther" in text.err


def test_points_of_some_images_leave_the_others_as_failures(predict, pictures, tmp_path):
    csv = tmp_path / "points.csv"
    csv.write_text("image,x,y,depth\nframe_1.png,3,4,1\nframe_1.png,50,30,2\nframe_2,99,1,2\nframe_2,1,1,3\n")
    text = predict("depth", pictures, "--align", csv, code=1)
    assert "1 written" in text.out and "2 failed" in text.out
    assert "line 4 (x 99, y 1) lies outside the picture of 56x40" in text.err
    assert "has no point of" in text.err and "frame_10.png" in text.err
    csv.write_text("image,x,y,depth\nframe_1.png,3,4,1\nframe_1.png,3,4,2\nsmall.png,1,2,3\nsmall.png,9,9,1\n")
    text = predict("depth", pictures / "frame_1.png", tmp_path / "small.png", "--align", csv, code=1, out="two")
    assert "two different points" in text.err and "1 written" in text.out
    assert not [name for name in files_in(tmp_path / "two") if name.startswith("frame_1")]


# Again


def test_a_record_repeats_its_prediction(predict, command, pictures, nano_folder, tmp_path):
    image, csv, out = pictures / "frame_1.png", tmp_path / "points.csv", tmp_path / "out"
    csv.write_text("x,y,depth\n3,4,1\n50,30,2\n")
    words = ("--align", csv, "--ply", "--fov", 50, "--seed", 7)
    predict("depth", image, *words)
    sidecar = out / "frame_1_depth.json"
    command("--repeat", sidecar, out="again")
    assert files_in(tmp_path / "again") == files_in(out)
    for name in ("frame_1_depth.npy", "frame_1_depth_metric.npy"):
        np.testing.assert_allclose(np.load(tmp_path / "again" / name), np.load(out / name), atol=2e-5)
    record, again = (json.loads((folder / sidecar.name).read_text()) for folder in (out, tmp_path / "again"))
    assert again["settings"] == record["settings"] and again["options"] == record["options"]
    assert record["versions"]["jax"] and record["versions"]["device"]

    assert "leave out --steps" in command("--repeat", sidecar, "--steps", 3, code=2).err
    assert "leave out inputs" in command("--repeat", sidecar, image, code=2).err
    (out / "old.json").write_text('{"format": 1, "settings": {}}')
    assert "no record of `predict`" in command("--repeat", out / "old.json", code=2).err
    (out / "old.json").write_text(sidecar.read_text().replace('"name": "frame_1"', '"name": "../frame_1"'))
    assert "outside of --out" in command("--repeat", out / "old.json", code=2).err
    csv.write_text("x,y,depth\n3,4,1\n50,30,3\n")
    assert "points of this picture" in command("--repeat", sidecar, code=2, out="b").err
    other = shutil.copytree(nano_folder.parent, tmp_path / "nano") / "model"
    sound = image.read_bytes()
    shutil.copy(pictures / "frame_10.png", image)
    text = command("--repeat", sidecar, code=2, out="b")
    assert "frame_1.png is not the input" in text.err and text.err.count("\n") == 1
    image.write_bytes(sound)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, other / "model.safetensors")
    text = command("--repeat", sidecar, "--model", other, code=2, out="b")
    assert "the weights of model" in text.err and text.err.count("\n") == 1
    assert not (tmp_path / "b").exists()


def test_the_recorded_command_makes_the_same(predict, pictures, tmp_path):
    predict("flow", pictures, "--seed", 4, "--formats", "npy", "--kitti")
    record = json.loads((tmp_path / "out" / "frame_2_flow.json").read_text())
    words = shlex.split(shlex.join(record["command"]))
    assert words[:2] == ["scaling-perception", "predict"]
    words[words.index("--out") + 1] = str(tmp_path / "again")
    assert main(words[1:]) == 0
    assert files_in(tmp_path / "again") == {name for name in files_in(tmp_path / "out") if name.startswith("frame_2_")}
    found = np.load(tmp_path / "again" / "frame_2_flow.npy")
    np.testing.assert_allclose(found, np.load(tmp_path / "out" / "frame_2_flow.npy"), atol=1e-3)


# Inputs


def test_paths_on_standard_input(predict, pictures, tmp_path, monkeypatch):
    odd = ["für 深度.png", "line\nbreak.png", "[x].png"]
    for name in odd:
        shutil.copy(pictures / "frame_1.png", tmp_path / name)
    data = b"\0".join(os.fsencode(tmp_path / name) for name in odd)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    predict("depth", "-0", "-", "--formats", "npy")
    assert files_in(tmp_path / "out") == {f"{n[:-4]}_depth.{end}" for n in odd for end in ("npy", "json")}
    (tmp_path / "list").write_text(f"# frames\n\n{pictures}/frame_1.png\n{tmp_path}/gone.png\n")
    text = predict("depth", "--list", tmp_path / "list", "--formats", "npy", code=1, out="b")
    assert "gone.png does not exist" in text.err and "1 written" in text.out


def test_folders_below_keep_their_places(predict, pictures, tmp_path):
    (pictures / "a" / "b").mkdir(parents=True)
    shutil.copy(pictures / "frame_1.png", pictures / "a" / "b" / "frame_1.png")
    text = predict("depth", pictures, "--recursive", "--every", 2, "--formats", "npy", "--json", out="in/out")
    assert (pictures / "out" / "a" / "b" / "frame_1_depth.npy").is_file()
    assert json.loads(text.out)["written"] == 3
    text = predict("depth", pictures, "--recursive", "--every", 2, "--formats", "npy", out="in/out")
    assert "3 already there" in text.out


def test_frames_of_videos(predict, tmp_path, make_image):
    av = pytest.importorskip("av")
    frames = [make_image(40, 56, i) for i in range(5)]
    with av.open(str(tmp_path / "clip.mov"), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.height, stream.width, stream.pix_fmt = 40, 56, "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    predict("depth", tmp_path / "clip.mov", "--every", 2, "--formats", "npy")
    assert files_in(tmp_path / "out") == {f"clip_{i:06d}_depth.{end}" for i in (0, 2, 4) for end in ("npy", "json")}
    from PIL import Image

    Image.fromarray(frames[2]).save(tmp_path / "two.png")
    predict("depth", tmp_path / "two.png", "--formats", "npy")
    np.testing.assert_allclose(depth_of(tmp_path / "out", "clip_000002"), depth_of(tmp_path / "out", "two"), atol=2e-5)
    predict("flow", tmp_path / "clip.mov", "--start", 1, "--end", 4, "--formats", "npy", out="flow")
    record = json.loads((tmp_path / "flow" / "clip_000002_flow.json").read_text())
    assert record["inputs"]["frames"] == [2, 3]
    assert shlex.join(record["command"]).endswith(f"--start 2 --end 4 -- {tmp_path / 'clip.mov'}")
    (tmp_path / "cut.mov").write_bytes((tmp_path / "clip.mov").read_bytes()[:2000])
    videos = (tmp_path / "cut.mov", tmp_path / "clip.mov")
    text = predict("flow", *videos, "--start", 1, "--end", 4, "--formats", "npy", out="flow", code=1)
    assert "2 already there, 1 failed" in text.out and "cut.mov is no video, or a damaged one" in text.err


# Compute


def test_budgets_choose_from_the_models_table(command, pictures, nano_folder, tmp_path, monkeypatch):
    model = tmp_path / "nano"
    shutil.copytree(nano_folder, model)
    same = {"preset": "paper", "solver": "ddim", "ci95": [0, 1]}
    cells = [
        {"steps": 1, "ensemble": 2, "macs": 2e6, "seconds": 1.0, "error": 0.5, **same},
        {"steps": 2, "ensemble": 2, "macs": 4e6, "seconds": 2.0, "error": 0.25, **same},
        {"steps": 1, "ensemble": 3, "macs": 2e7, "seconds": 4.0, "error": 0.2, **same, "merge_in": "latents"},
        {"steps": 1, "ensemble": 2, "macs": 2e7, "seconds": 4.0, "error": 0.1, **same, "spacing": "learned"},
    ]
    entry = {"metric": "abs_rel", "timing": {"fixed": 0.0, "per_forward": 0.5}, "cells": cells}
    (model / "budgets.json").write_text(json.dumps({"format": 1, "tasks": {"depth": entry}}))
    image = pictures / "frame_1.png"
    words = ("--task", "depth", "--model", model, "--formats", "npy", image)
    summary = json.loads(command(*words, "--macs", "3e6", "--json").out)
    record = json.loads((tmp_path / "out" / "frame_1_depth.json").read_text())
    assert record["settings"]["steps"] == 1 and record["forwards"] == 2
    assert record["settings"]["diffusion"]["spacing"] == "leading"
    budget = record["request"]["budget"]
    assert budget["asked"] == {"macs": 3e6} and budget["expected"]["error"] == 0.5
    assert summary["macs_per_image"] == record["macs"] > 0
    text = command(*words, "--macs", "9e6")
    assert "--macs 9e+06: 2 steps, 2 members, grid paper, solver ddim; expected abs_rel 0.25, 0.004 GMACs" in text.err
    assert "(--steps 1, now 2)" in text.err
    text = command(*words, "--macs", "3e7", out="latents")
    assert "1 steps, 3 members, grid paper, solver ddim, merged in latents" in text.err, "there are no learned grids"
    text = command(*words, "--macs", "3e7", "--verifier", "edges", out="verified")
    assert "2 steps, 2 members, grid paper, solver ddim; expected" in text.err, "verifiers are of members as pixels"
    for flags, message in (
        (("--budget", "fast", "--ensemble", 3), "leave out --budget or --ensemble"),
        (("--budget", "fast", "--seconds", 3), "not allowed with"),
        (("--budget", "fsat"), "did you mean 'fast'"),
        (("--macs", 10), "the cheapest is 1 step(s)"),
    ):
        text = command(*words, *flags, code=2, out="none")
        assert message in text.err and text.err.count("\n") == 1
    fast, slow = budgets.Timing(0.0, 0.1), budgets.Timing(0.0, 10.0)
    monkeypatch.setattr(budgets, "measure_timing", lambda *_: fast)
    command(*words, "--seconds", "0.5", out="timed")
    monkeypatch.setattr(budgets, "measure_timing", lambda *_: slow)
    text = command(*words, "--seconds", "0.5", out="timed")
    assert "1 already there" in text.out, "a busier machine does not choose otherwise in the middle of the work"
    assert "fits --seconds 0.5 s" in command(*words, "--seconds", "0.5", code=2, out="later").err
    for name, other in (("weights", "0" * 12), ("autoencoder", "1" * 12)):
        changed = {"format": 1, "tasks": {"depth": {**entry, name: other}}}
        (model / "budgets.json").write_text(json.dumps(changed))
        text = command(*words, "--macs", "3e6", code=2, out="other")
        assert f"budgets.json was made with other {name} ({other}, now " in text.err and text.err.count("\n") == 1
        predictor = Predictor.from_pretrained(str(model))
        with pytest.warns(UserWarning, match=f"other {name}"):
            assert budgets.own_budgets(predictor) == {"format": 1, "tasks": {}}
    (model / "budgets.json").unlink()
    assert "ships no table of budgets" in command(*words, "--seconds", 2, code=2).err


def test_the_summary_is_one_json(predict, pictures, tmp_path):
    (pictures / "bad.png").write_text("no picture")
    predict("depth", pictures / "frame_10.png")
    text = predict("depth", pictures, "--json", code=1)
    summary = json.loads(text.out)
    assert (summary["written"], summary["kept"], summary["failed"]) == (2, 1, 1)
    assert [file["name"] for file in summary["files"]] == ["bad", "frame_1", "frame_2", "frame_10"]
    assert [file["status"] for file in summary["files"]] == ["failed", "written", "written", "kept"]
    assert "bad.png is no image" in summary["files"][0]["error"]
    assert summary["seconds"] > 0 and summary["macs_per_image"] == summary["files"][1]["macs"]
    assert all((tmp_path / "out" / file).is_file() for file in summary["files"][1]["outputs"].values())


def test_threads_change_nothing(predict, pictures, tmp_path):
    for workers in (0, 3):
        predict("depth", pictures, tmp_path / "small.png", "--workers", workers, out=f"w{workers}")
    assert files_in(tmp_path / "w0") == files_in(tmp_path / "w3")
    for path in (tmp_path / "w0").glob("*.npy"):
        np.testing.assert_array_equal(np.load(path), np.load(tmp_path / "w3" / path.name))


# Interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_run_leaves_whole_results_and_goes_on(predict, pictures, tmp_path, monkeypatch, number, workers):
    def interrupt(stream, *_):
        for count, estimate in enumerate(stream):
            if count == 2:
                os.kill(os.getpid(), number)
            yield estimate

    words = ("depth", pictures, tmp_path / "small.png", "--workers", workers)
    with monkeypatch.context() as patch:
        patch.setattr(job, "progress", interrupt)
        if number == signal.SIGINT:
            assert "interrupted" in predict(*words, code=130).err
        else:
            with pytest.raises(SystemExit) as stop:
                predict(*words)
            assert stop.value.code == 143
    out = tmp_path / "out"
    assert files_in(out) == {f"{name}_depth{end}" for name in ("frame_1", "frame_2") for end in ENDS}
    text = predict(*words)
    assert "2 written" in text.out and "2 already there" in text.out
    assert not list(out.glob(".*"))


ENDS = (".json", ".npy", "_16bit.png", "_color.png", "_uncertainty.npy", "_uncertainty.png")


def test_a_full_disk_leaves_nothing_half_and_the_next_run_goes_on(predict, pictures, tmp_path, monkeypatch):
    count = []

    def fill(path, pixels):
        count.append(path)
        if len(count) == 2:
            raise OSError(28, "No space left on device")
        path.write_bytes(b"a picture")

    with monkeypatch.context() as patch:
        patch.setattr(outputs.formats, "write_png16", lambda path, array: write_atomic(path, array, fill))
        text = predict("depth", pictures, tmp_path / "small.png", "--formats", "npy,png16", code=2)
    assert "No space left" in text.err and text.err.count("scaling-perception: ") == 1
    names = files_in(tmp_path / "out")
    assert "frame_1_depth.json" in names and not [name for name in names if name[0] == "." or "frame_2" in name]
    text = predict("depth", pictures, tmp_path / "small.png", "--formats", "npy,png16")
    assert f"{4 - len(names) // 3} written" in text.out and len(files_in(tmp_path / "out")) == 12


def write_atomic(path, array, fill):
    from scaling_perception.support.files import atomic_path

    with atomic_path(path) as temporary:
        fill(temporary, array)


def test_a_replaced_result_stays_until_the_new_one_is_whole(predict, pictures, tmp_path, monkeypatch):
    image, out = pictures / "frame_1.png", tmp_path / "out"
    predict("depth", image)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "heat", stop)
        predict("depth", image, "--seed", 1, "--workers", 0, code=130)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "write_json", stop)
        predict("depth", image, "--seed", 1, "--workers", 0, code=130)
    assert not files_in(out), "no record, and nothing of either seed"
    assert "1 written" in predict("depth", image).out


def test_every_documented_command_parses():
    text = (Path(__file__).parent.parent / "docs" / "predict.md").read_text()
    lines = [line.rpartition("| ")[2] for line in text.splitlines() if re.match(r"(find .* \| )?scaling-perc", line)]
    parser, flags = make_parser("predict"), set()
    for line in lines[1:]:  # the first is the usage
        words = shlex.split(line)
        parser.parse_args(words[2:])
        flags |= {word for word in words if word.startswith("--")}
    known = {word for word in re.findall(r"--[a-z-]+", parser.format_help())} - {"--help"}
    missing = {flag for flag in known if flag not in text}
    assert len(lines) > 20 and not missing - {"--autoencoder", "--dtype", "--preset", "--null"}, missing
