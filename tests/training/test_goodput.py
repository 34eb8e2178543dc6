"""Where the time went, on histories whose sums are known."""

import json

import pytest

from scaling_perception.training.goodput import (
    Clock,
    account,
    goodput_report,
    goodput_table,
    goodput_tables,
    waiting_advice,
)
from scaling_perception.training.record import open_record, why_ended

BEGIN = 1_800_000_000.0


class Time:
    """Seconds that pass when told."""

    def __init__(self, start=0.0):
        self.now = start

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


def test_the_clock_gives_each_second_to_the_innermost_cause():
    time = Time(100.0)
    clock = Clock(time)
    time.pass_(3)  # nobody's
    with clock.spend("compile"):
        time.pass_(5)
    with clock.spend("step"):
        time.pass_(10)
        with clock.spend("data_wait"):
            time.pass_(2)
        time.pass_(1)
        assert clock.totals()["step"] == 11  # in the middle of a block, too
        with pytest.raises(RuntimeError), clock.spend("checkpoint"):
            time.pass_(4)
            raise RuntimeError
        time.pass_(1)
        with clock.spend("other"):
            time.pass_(7)
    seconds = {"step": 12, "compile": 5, "restore": 0, "data_wait": 2, "checkpoint": 4, "evaluate": 0, "other": 10}
    assert clock.totals() == seconds and clock.elapsed() == sum(seconds.values()) == 33
    assert clock.report()["shares"]["step"] == pytest.approx(12 / 33)
    assert clock.row()["spent_data_wait"] == 2.0
    with pytest.raises(ValueError, match="unknown cause 'lunch'"), clock.spend("lunch"):
        pass


def attempt(first, last, begin, wall, why="killed", **spent):
    from scaling_perception.training.record import _stamp

    told = {"started": _stamp(BEGIN + begin), "ended": _stamp(BEGIN + begin + wall), "why": why, "spent": spent}
    return {"start_step": first, "end_step": last, **told}


def test_an_undisturbed_run():
    told = account([attempt(0, 100, 0, 250, "finished", compile=20, step=200, data_wait=10, checkpoint=5)])
    assert told["goodput"] == 0.8 and told["wall_seconds"] == 250
    wanted = {"step": 200, "compile": 20, "restore": 0, "data_wait": 10, "checkpoint": 5, "evaluate": 0}
    assert told["seconds"] == {**wanted, "lost": 0, "down": 0, "other": 15}
    assert told["steps"] == {"done": 100, "kept": 100, "lost": 0} and told["attempts"] == {"finished": 1}


def test_three_failures_in_closed_form():
    # killed at 47, resumed from 40; asked to stop at 60; killed at 90; resumed from 50, as two checkpoints were damaged
    history = [
        attempt(0, 47, 0, 124, compile=20, step=94, checkpoint=4),  # 2 s a step; 6 s other
        attempt(40, 60, 134, 60, "interrupted", restore=5, compile=20, step=30),  # 1.5 s a step; 5 s other
        attempt(60, 90, 1194, 100, restore=5, compile=20, step=60),  # 2 s a step; 15 s other
        attempt(50, 100, 1300, 150, "finished", restore=5, compile=20, step=100, checkpoint=10),  # 15 s other
    ]
    told = account(history)
    lost = 7 * 2 + 10 * 1.5 + 30 * 2
    assert told["seconds"]["lost"] == pytest.approx(lost)
    assert told["seconds"]["step"] == pytest.approx(94 + 30 + 60 + 100 - lost)
    assert told["seconds"]["down"] == pytest.approx(10 + 1000 + 6)
    assert told["seconds"]["compile"] == 80 and told["seconds"]["restore"] == 15 and told["seconds"]["checkpoint"] == 14
    assert told["seconds"]["other"] == pytest.approx(6 + 5 + 15 + 15)
    assert told["wall_seconds"] == pytest.approx(1450) and sum(told["shares"].values()) == pytest.approx(1)
    assert told["goodput"] == pytest.approx((284 - lost) / 1450)
    assert told["steps"] == {"done": 147, "kept": 100, "lost": 47}
    assert told["attempts"] == {"killed": 2, "interrupted": 1, "finished": 1}


def test_odd_histories():
    assert account([])["goodput"] == 0.0
    back = account([attempt(0, 10, 0, -50, step=20), attempt(0, 10, 5, 20, "finished", step=20)])  # clock set back
    assert back["goodput"] <= 1.0 and sum(back["shares"].values()) == pytest.approx(1)
    looked = [attempt(0, 10, 0, 20, "finished", step=20), attempt(10, 10, 9000, 3, "finished")]
    assert account(looked)["goodput"] == 1.0  # a look at a finished run is not part of it
    nothing = account(
        [attempt(0, 0, 0, 7), attempt(0, 10, 10, 20, "finished", step=20)]
    )  # killed before its first step
    assert nothing["seconds"]["other"] == 7 and nothing["goodput"] == pytest.approx(20 / 30)


def live(folder, time, first, last, seconds, log_every=5, save_every=10, rows=()):
    """What a training run tells its record and its rows, until ``last``; returns the record as if killed then."""
    clock = Clock(time)
    with clock.spend("restore"):
        time.pass_(2)
    record = open_record(folder, {"samples_per_step": 4, "macs_per_sample": 1e3}, now=time)
    record.attempt_started(first, clock.elapsed())
    kept = [row for row in rows if row["step"] <= first]
    with clock.spend("compile"):
        time.pass_(10)
    for step in range(first + 1, last + 1):
        with clock.spend("step"):
            time.pass_(seconds)
        if step % log_every == 0:
            kept.append({"step": step, "loss": 1.0, "time": time(), **clock.row()})
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept) + '{"step": 9')
        if step % save_every == 0:
            with clock.spend("checkpoint"):
                time.pass_(3)
            record.seen(step, clock.totals())
    return record, clock, kept


def test_a_report_of_a_run_with_injected_failures(tmp_path):
    time = Time(BEGIN)
    _, _, rows = live(tmp_path, time, 0, 28, seconds=2.0)  # dies at 28; last told 25, last saved 20
    told = goodput_report(tmp_path)
    assert told["attempts"] == {"running or killed": 1} and told["steps"]["done"] == 25
    assert told["wall_seconds"] == pytest.approx(2 + 10 + 25 * 2 + 2 * 3)
    time.pass_(100)
    _, _, rows = live(tmp_path, time, 20, 30, seconds=1.0, rows=rows)  # dies just after saving 30
    time.pass_(50)
    record, clock, _ = live(tmp_path, time, 30, 40, seconds=1.0, rows=rows)
    record.attempt_ended(40, why_ended(None), clock.totals())

    told = goodput_report(tmp_path)
    assert told["steps"] == {"done": 25 + 10 + 10, "kept": 40, "lost": 5}
    seconds = told["seconds"]
    assert seconds["lost"] == pytest.approx(5 * 2.0) and seconds["step"] == pytest.approx(20 * 2.0 + 10 + 10)
    assert seconds["compile"] == 30 and seconds["restore"] == 6 and seconds["other"] == pytest.approx(0, abs=0.01)
    assert seconds["checkpoint"] == pytest.approx(3 * 4)
    assert seconds["down"] == pytest.approx(3 * 2.0 + 100 + 50)  # the three steps nobody heard of are among them
    assert told["wall_seconds"] == pytest.approx(time() - BEGIN)
    assert told["goodput"] == pytest.approx(60 / (time() - BEGIN))
    table = goodput_table(told)
    assert "2 killed, 1 finished" in table and "steps: 40 kept, 5 done again" in table
    assert f"between attempts     {seconds['down'] / told['wall_seconds']:7.2%}" in table and "evaluating" not in table


def test_all_runs_of_a_folder(tmp_path, capsys):
    from scaling_perception.report import find_evaluations, write_report
    from scaling_perception.support.verbs import run_verb

    assert goodput_tables(tmp_path) == {}
    for name in ("one", "two/work"):
        (tmp_path / name).mkdir(parents=True)
        live(tmp_path / name, Time(BEGIN), 0, 20, seconds=1.0)
    for name, text in (("other", "{}"), ("torn", '{"attempts": [')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    tables = goodput_tables(tmp_path)
    assert list(tables) == ["one", "two/work"] and tables["one"].startswith("goodput 52.6% of 38s")
    assert list(goodput_tables(tmp_path / "one")) == ["one"]
    assert run_verb("report", [str(tmp_path)]) == 0  # no evaluation is needed
    told = capsys.readouterr().out
    assert "one: goodput 52.6%" in told and "two/work: goodput" in told
    page = write_report(tmp_path, tmp_path / "page.html", "t").read_text()
    assert "Where the time went, two/work" in page and "steps: 20 kept, 0 done again" in page
    assert find_evaluations(tmp_path, needed=False) == []


def test_waiting_for_data_says_what_to_do():
    online, cached = {"data": {"mixture": {"a": {}}, "cache": ""}}, {"data": {"mixture": {}, "cache": "runs/latents"}}
    assert "75% of the time" in (waiting_advice(0.75, online) or "")
    assert "prepare … --latents" in (waiting_advice(0.75, online) or "")
    assert "--config.data.workers" in (waiting_advice(0.31, cached) or "")
    assert waiting_advice(0.2, online) is None and waiting_advice(float("nan"), online) is None
