import contextlib
import json

import pytest

from scaling_perception.support.errors import UserError
from scaling_perception.training.writer import Window, Writer, duration


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


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
    writer.report(10, {"loss": 0.5, "lr": 1e-3, "other": 2.0})
    writer.close()
    assert rows_of(tmp_path) == [{"step": 10, "loss": 0.5, "lr": 1e-3, "other": 2.0}]
    line = capsys.readouterr().err.strip()
    assert line.startswith("train: step 10/100  loss 0.5  lr 0.001") and line.endswith("left") and "other" not in line
    events = list((tmp_path / "tb").glob("events.out.tfevents.*"))
    assert len(events) == 1 and b"other" in events[0].read_bytes()


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
