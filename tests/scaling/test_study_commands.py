"""The commands of a study's cells as processes: side by side, ended by a signal, logged."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from scaling_perception.scaling.study import Cell, StudyStopped, _Commands, read_marker, run_cells

A = Cell("a", "train", ("--config", "x"))
B = Cell("b", "train", ("--config", "x:init={a}"))
C = Cell("eval/b", "evaluate", ("--task", "depth", "--model", "{b}"))
D = Cell("d", "train", ("--config", "y"))
SETTINGS = {name: {"steps": 1, "from": name} for name in ("a", "b", "eval/b", "d")}


def test_cells_side_by_side_wait_for_those_that_they_need(tmp_path):
    both, out = threading.Barrier(2, timeout=20), []

    def run(words, log):
        if log.parent.name in "ad":  # neither ends before the other has begun
            both.wait()
        out.append(log.parent.name)
        (log.parent / ("result.json" if words[0] == "evaluate" else "model")).touch()
        return 0

    ended = [tuple(one)[:2] for one in run_cells([A, B, C, D], tmp_path, SETTINGS, lambda _: None, run, jobs=2)]
    assert sorted(ended) == [("a", "done"), ("b", "done"), ("d", "done"), ("eval/b", "done")]
    assert [name for name in out if name != "d"] == ["a", "b", "b"]  # the folder of eval/b is named b too


def test_a_signal_ends_all_cells_that_run(tmp_path, monkeypatch):
    """Two commands that never end by themselves; the second cell of each job never starts."""
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); print('up'); time.sleep(60)"
    popen = subprocess.Popen
    monkeypatch.setattr(
        "scaling_perception.scaling.study.subprocess.Popen",
        lambda _, **more: popen([sys.executable, "-uc", code], **more),
    )
    cells = [Cell(name, "train", ()) for name in "pqrs"]

    def up():
        logs = [tmp_path / name / "cell.log" for name in "pq"]
        return all(log.exists() and b"up" in log.read_bytes() for log in logs)

    def stop():
        end = time.monotonic() + 30
        while not up() and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(StudyStopped) as stopped:
        list(run_cells(cells, tmp_path, dict.fromkeys("pqrs", {}), lambda _: None, jobs=2))
    assert stopped.value.code == 143
    assert [read_marker(tmp_path / name)["state"] for name in "pq"] == ["started", "started"]
    assert not (tmp_path / "r" / "cell.log").exists() and not (tmp_path / "s" / "cell.log").exists()


def test_a_cell_is_a_process_with_a_log(tmp_path):
    commands = _Commands(shared=False)
    assert commands.run(["--version"], tmp_path / "log") == 0
    assert commands.run(["no-verb"], tmp_path / "log") == 2
    assert "$ scaling-perception --version\nscaling-perception " in (tmp_path / "log").read_text()
    assert "unknown verb 'no-verb'" in (tmp_path / "log").read_text()
