"""The main job end to end at its smallest, with the shipped weights, and again without repeating what is done."""

import json

import pytest

from scaling_perception import quickstart
from scaling_perception.cli import main


@pytest.fixture
def small(monkeypatch, one_device):
    """One step, one member; training in small batches on one device, with a point of its curve every other step."""
    stage = quickstart._stage
    shorter = {"train": ("--config.train.batch_size=8", "--config.train.log_every=2"), "prepare": ("--batch", "1")}
    monkeypatch.setattr(quickstart, "STEPS", "1")
    monkeypatch.setattr(quickstart, "ENSEMBLE", "1")
    monkeypatch.setattr(quickstart, "_stage", lambda verb, *words: stage(verb, *words, *shorter.get(verb, ())))


def test_renders_trains_evaluates_and_reports(tmp_path, small, capfd):
    words = ["quickstart", "--workdir", str(tmp_path), "--scenes", "4", "--train-steps", "4", "--images", "2"]
    assert main(words) == 0
    said = capfd.readouterr().out
    for verb in ("prepare", "train", "evaluate", "report"):
        assert f"$ scaling-perception {verb} " in said, "every stage is printed as the command it is"
    assert str((tmp_path / "report.html").resolve()) in said
    for task, metric in (("depth", "abs_rel"), ("flow", "epe"), ("amodal", "iou")):
        found = json.loads((tmp_path / "evaluations" / f"{task}.json").read_text())
        assert found["images"] == 2 and len(found["cells"]) == 2  # presets
        assert all(len(cell["rows"]) == 2 and metric in cell["metrics"] for cell in found["cells"])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<h2>") == 5 and "http" not in page.replace("http-equiv", "")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "evaluations").glob("*.json")}
    assert main(words) == 0
    assert "already finished: " in capfd.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}, "a finished stage is not repeated"


def test_what_lies_there_is_judged_by_evaluate(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(quickstart, "_stage", lambda verb, *words: ran.append((verb, words)) or 0.0)
    monkeypatch.setattr(quickstart, "print_table", lambda folder: None)
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "depth.json").write_text('{"images": 2}')  # foreign: evaluate refuses it
    assert main(["quickstart", "--workdir", str(tmp_path), "--images", "2"]) == 0
    assert [verb for verb, _ in ran] == ["prepare", "train", "evaluate", "evaluate", "evaluate", "report"]
    assert str(tmp_path / "evaluations" / "depth.json") in ran[2][1]


def test_a_wrong_number_is_one_line(tmp_path, capsys):
    assert main(["quickstart", "--workdir", str(tmp_path / "w"), "--images", "0"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--images 0" in error and not (tmp_path / "w").exists()
