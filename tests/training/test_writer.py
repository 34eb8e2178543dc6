import contextlib
import json
import os
import sys
import types

import pytest

from scaling_perception.support.errors import UserError
from scaling_perception.training.writer import Pace, Window, Writer, duration, peak_flops


def rows_of(folder):
    """The rows of a run, less the time of day that each has."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop("time") > 1.7e9 for row in rows)
    return rows


def test_window_means_skip_what_is_undefined():
    window = Window()
    window.add({"loss": 1.0, "loss_depth": float("nan")})
    window.add({"loss": 3.0, "loss_depth": 5.0})
    assert window.means() == {"loss": 2.0, "loss_depth": 5.0}
    assert window.means() == {}


def test_rows_lines_and_tensorboard(tmp_path, capsys):
    writer = Writer(tmp_path, 0, 100)
    writer.begin()
    for _ in range(10):
        writer.tick()
    writer.report(10, {"loss": 0.5, "lr": 1e-3, "other": 2.0, "spent_step": 7.0})
    writer.close()
    assert rows_of(tmp_path) == [{"step": 10, "loss": 0.5, "lr": 1e-3, "other": 2.0, "spent_step": 7.0}]
    line = capsys.readouterr().err.strip()
    assert line.startswith("train: step 10/100  loss 0.5  lr 0.001") and line.endswith("left") and "other" not in line
    events = list((tmp_path / "tb").glob("events.out.tfevents.*"))
    assert len(events) == 1 and b"other" in events[0].read_bytes()
    assert b"spent" not in events[0].read_bytes()  # accounts are no curves


def test_rows_after_the_resumed_step_and_torn_lines_go(tmp_path):
    writer = Writer(tmp_path, 0, 100)
    for step in (10, 20, 30):
        writer.report(step, {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    writer = Writer(tmp_path, 20, 100)
    writer.report(30, {"loss": -1.0})
    writer.close()
    assert [(row["step"], row["loss"]) for row in rows_of(tmp_path)] == [(10, 10.0), (20, 20.0), (30, -1.0)]


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    writer = Writer(tmp_path, 3, 5, label="train")
    writer.begin()
    writer.tick()
    writer.report(4, {"loss": 0.25})
    writer.say("a line")
    writer.tick()
    writer.close()
    told = capsys.readouterr().err
    assert "5/5" in told and "loss=0.25" in told and "a line" in told


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    writer = Writer(tmp_path, 0, 10)
    full = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(writer, "_file", full)
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device; free space"):
        writer.report(1, {"loss": 1.0})
    monkeypatch.undo()
    writer.close()
    with contextlib.suppress(OSError):
        full.close()


def test_duration():
    assert [duration(s) for s in (0, 59.4, 90, 4000)] == ["0s", "59s", "1m30s", "1h06m"]


def test_pace():
    now = 0.0
    pace = Pace(lambda: now)
    assert pace.row(8) == {}
    for seconds in range(1, 101):
        now += 1000.0  # a checkpoint, say
        pace.resume()
        now += seconds + 50.0  # of which it was validated for so long
        pace.leave_out(50.0)
        pace.tick()
    told = pace.row(samples=64, macs=1e12, devices=4, kind="TPU v5 lite", tokens=256)
    assert told["seconds_per_step"] == pytest.approx(50.5) and told["samples_per_second"] == pytest.approx(64 / 50.5)
    assert told["step_seconds_p50"] == pytest.approx(50.5) and told["step_seconds_p90"] == pytest.approx(90.1)
    assert told["step_seconds_p99"] == pytest.approx(99.01)
    assert told["tokens_per_second"] == pytest.approx(256 * 64 / 50.5)
    assert told["mfu"] == pytest.approx(6e12 * 64 / 50.5 / (4 * 197e12))
    assert pace.row(8) == {}
    pace.tick()
    assert not {"mfu", "tokens_per_second"} & pace.row(8, macs=1e12, kind="cpu").keys()


def test_mfu_of_a_published_run():
    # DiT-XL/2 at 256 on TPU v3-256: 5.7 steps of 256 a second are 6.6 % of 128 chips, each two devices
    now = 0.0
    pace = Pace(lambda: now)
    now = 1 / 5.7
    pace.tick()
    assert pace.row(256, 118.64e9, 256, "TPU v3")["mfu"] == pytest.approx(0.066, abs=1e-3)


def test_peaks():
    kinds = {"TPU v5": 459e12, "TPU v5p": 459e12, "TPU v5e": 197e12, "TPU v6 lite": 918e12, "TPU v4": 275e12}
    kinds |= {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12}
    kinds |= {"NVIDIA A100-SXM4-80GB": 312e12, "cpu": None, "TPU v4 lite": None, "NVIDIA GeForce RTX 4090": None}
    assert {kind: peak_flops(kind) for kind in kinds} == kinds


def test_the_same_goes_to_weights_and_biases(tmp_path, monkeypatch):
    calls = []

    class Run:
        def __getattr__(self, name):
            return lambda *words, **fields: calls.append((name, *words, fields))

    def init(**fields):
        calls.append(("init", fields))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for start in (0, 10):
        writer = Writer(tmp_path / "mine", start, 100, wandb="depth", config={"seed": 1})
        writer.report(start + 10, {"loss": 0.5, "spent_step": 3.0})
        writer.close()
        writer.close()
    (_, first), axis, row, finish, (_, second), *_ = calls
    assert first == second and first["project"] == "depth" and first["resume"] == "allow"  # one run, goes on
    assert first["config"] == {"seed": 1} and first["dir"] == str(tmp_path / "mine") and first["name"] == "mine"
    assert axis == ("define_metric", "*", {"step_metric": "step"})
    assert row == ("log", {"step": 10, "loss": 0.5}, {}) and finish[0] == "finish" and len(calls) == 8


def test_weights_and_biases_that_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"train.wandb needs Weights & Biases: pip install"):
        Writer(tmp_path, 0, 10, wandb="depth")

    def init(**_):
        raise RuntimeError("api_key not configured (no-tty)\nmore")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(UserError, match=r"train.wandb=depth: api_key not configured \(no-tty\); .*WANDB_MODE=offline"):
        Writer(tmp_path, 0, 10, wandb="depth")


def test_real_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setitem(os.environ, "HOME", str(tmp_path))
    writer = Writer(tmp_path, 0, 10, wandb="depth", config={"seed": 1})
    writer.report(1, {"loss": 0.5})
    writer.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
