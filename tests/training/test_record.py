"""run.json: what it holds, how attempts end, what a damaged one costs; and traces of chosen steps."""

import json
import subprocess

import jax
import jax.numpy as jnp
import pytest

from scaling_perception.support.errors import UserError
from scaling_perception.training import profile
from scaling_perception.training.record import git_state, open_record, why_ended
from scaling_perception.training.writer import Writer

FACTS = {
    "command": "scaling-perception train --config x.py --workdir y",
    "config": {"model": "a1", "train": {"steps": 100}},
    "data": {"name": "linear", "length": 64},
    "parameters": {"total": 1000, "active": 400},
    "macs_per_sample": 1e9,
    "samples_per_step": 8,
}


class Time:
    def __init__(self):
        self.now = 1_800_000_000.0

    def __call__(self):
        return self.now


def read(folder):
    return json.loads((folder / "run.json").read_text())


def test_one_undisturbed_run(tmp_path):
    time = Time()
    record = open_record(tmp_path, FACTS, now=time)
    assert not (tmp_path / "run.json").exists()  # nothing has started
    record.attempt_started(0)
    time.now += 1800
    record.attempt_ended(100, why_ended(None), {"step": 1700.1234})
    told = read(tmp_path)
    assert {name: told[name] for name in FACTS} == FACTS
    assert told["environment"]["devices"] == {"kind": "cpu", "platform": "cpu", "count": 8, "processes": 1}
    assert {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint"} <= set(told["environment"]["packages"])
    assert len(told["environment"]["host"]) == 12 and told["version"]
    assert told["started"] == "2027-01-15T08:00:00.000+00:00" and told["finished"] == "2027-01-15T08:30:00.000+00:00"
    (attempt,) = told["attempts"]
    assert (attempt["start_step"], attempt["end_step"], attempt["why"]) == (0, 100, "finished")
    assert attempt["spent"] == {"step": 1700.123} and attempt["devices"]["count"] == 8
    assert told["cost"] == {"device_hours": 4.0, "macs": 100 * 8 * 1e9}


def test_how_attempts_end(tmp_path):
    time = Time()
    endings = [SystemExit(143), KeyboardInterrupt(), UserError("loss nan\nat step 7"), None]
    for number, error in enumerate(endings):
        record = open_record(tmp_path, {**FACTS, "command": f"number {number}"}, now=time)
        record.attempt_started(number)
        time.now += 1
        record.attempt_ended(number + 1, why_ended(error), error=str(error or ""))
    told = read(tmp_path)
    assert [one["why"] for one in told["attempts"]] == ["interrupted", "interrupted", "error", "finished"]
    assert [one.get("error") for one in told["attempts"]] == [None, None, "loss nan", None]
    assert told["command"] == "number 3" and told["started"] < told["attempts"][1]["started"]


def test_a_killed_attempt_is_closed_by_the_next(tmp_path, monkeypatch):
    time = Time()
    monkeypatch.setattr("time.time", time)
    open_record(tmp_path, FACTS).attempt_started(0)  # killed without a word
    time.now += 10
    record = open_record(tmp_path, FACTS)
    record.attempt_started(0)
    writer = Writer(tmp_path, 0, 100)
    for step in (5, 10, 15):
        time.now += 10
        writer.report(step, {"loss": 1.0, "spent_step": 2.0 * step, "spent_compile": 3.0})
        if step == 10:
            record.seen(10, {"step": 20.0, "compile": 3.0})
    writer.close()
    time.now += 1000
    record = open_record(tmp_path, FACTS)
    assert read(tmp_path)["attempts"][1]["why"] is None  # opening changes nothing
    record.attempt_started(10)
    Writer(tmp_path, 10, 100).close()  # drops the row that attempt 1 was closed by
    silent, second, third = read(tmp_path)["attempts"]
    assert (silent["why"], silent["end_step"], silent["ended"]) == ("killed", 0, silent["started"])
    assert (second["why"], second["end_step"], second["spent"]) == ("killed", 15, {"step": 30.0, "compile": 3.0})
    assert second["ended"] == "2027-01-15T08:00:40.000+00:00" and "seen" not in second
    assert third["why"] is None and third["start_step"] == 10
    record.seen(20, {"step": 7.0})  # later than any row: a checkpoint between two reports
    time.now += 60
    open_record(tmp_path, FACTS).attempt_started(30)  # and one that was whole before it was told
    assert read(tmp_path)["attempts"][2]["end_step"] == 30


def test_a_damaged_record_does_not_stop_a_run(tmp_path):
    for damage in ("", "[1, 2", '{"attempts": []}', "[]"):
        (tmp_path / "run.json").write_text(damage)
        open_record(tmp_path, FACTS, write=False)
        assert (tmp_path / "run.json").read_text() == damage  # not the first process: touches nothing
        open_record(tmp_path, FACTS).attempt_started(0)
        assert len(read(tmp_path)["attempts"]) == 1
        assert (tmp_path / "run.damaged.json").read_text() == damage


def test_git_state(tmp_path):
    assert git_state(tmp_path) is None

    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    git("init", "-q")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    (tmp_path / "untracked").write_text("")
    told = git_state(tmp_path)
    assert told is not None and len(told["commit"]) == 40 and not told["dirty"]
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path) == {**told, "dirty": True}
    (tmp_path / "inside").mkdir()
    assert git_state(tmp_path / "inside") is None  # installed somewhere in another repository


def test_which_steps_to_trace():
    assert profile.parse_steps("10:5") == (10, 5) and profile.parse_steps("3") == (3, 1)
    for wrong in ("", "0:5", "5:0", "a:b", "1:2:3", "-1"):
        with pytest.raises(UserError, match="--profile is '.*': give FIRST:COUNT"):
            profile.parse_steps(wrong)


def steps(folder, monkeypatch, first, count, numbers, error_at=0):
    """The numbers of the steps under trace, and what was said."""
    events, said = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda place: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    with profile.trace_steps(folder, first, count, said.append) as hook:
        for number in numbers:
            with hook(number, jnp.zeros(())):
                events.append(number)
                if number == error_at:
                    raise RuntimeError
    return events, said


def test_a_trace_holds_whole_steps(tmp_path, monkeypatch):
    events, said = steps(tmp_path, monkeypatch, 3, 2, range(1, 7))
    assert events == [1, 2, "start", 3, 4, "stop", 5, 6] and "profile" in said[0]
    assert steps(tmp_path, monkeypatch, 3, 2, range(1, 5))[0] == [1, 2, "start", 3, 4, "stop"]  # ends with the run
    assert steps(tmp_path, monkeypatch, 3, 2, range(10, 14))[0] == ["start", 10, 11, "stop", 12, 13]  # resumed later
    events, said = steps(tmp_path, monkeypatch, 30, 2, range(1, 3))
    assert events == [1, 2] and "ended before step 30" in said[0]
    assert steps(tmp_path, monkeypatch, 1, 0, range(1, 3)) == ([1, 2], [])
    with pytest.raises(RuntimeError):
        steps(tmp_path, monkeypatch, 2, 9, range(1, 9), error_at=3)


def test_a_real_trace(tmp_path):
    step = jax.jit(lambda x: x @ x)
    state = jnp.ones((8, 8))
    with profile.trace_steps(tmp_path, 2, 1) as hook:
        for number in (1, 2, 3):
            with hook(number, state):
                state = step(state)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
