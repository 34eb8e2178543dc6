"""Studies: order, resuming, refusals, jobs, cost and collection; one study of real cells is slow."""

import csv
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaling_perception.scaling import study_cost
from scaling_perception.scaling.study import (
    LOCK,
    MARKER,
    Cell,
    StudyStopped,
    _Commands,
    check_settings,
    in_order,
    read_marker,
    run_cells,
    stages,
    study_cells,
)
from scaling_perception.scaling.study_table import COLUMNS, collect, differences, table_csv
from scaling_perception.study import _settings
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import write_json
from scaling_perception.support.verbs import run_verb

A = Cell("a", "train", ("--config", "x"))
B = Cell("b", "train", ("--config", "x:init={a}"))
C = Cell("eval/b", "evaluate", ("--task", "depth", "--model", "{b}"), labels={"arm": "one"})
D = Cell("d", "train", ("--config", "y"))
SETTINGS = {name: {"steps": 1, "from": name} for name in ("a", "b", "eval/b", "d")}


LAST = ("arm=ladder", "seed=0", "last=1")  # of the published study


class Runs:
    """Stands for the commands of the cells: makes what they leave, or fails as it is asked to."""

    def __init__(self, **codes):
        self.codes, self.ran = codes, []

    def __call__(self, words, log):
        name = log.parent.name
        self.ran.append(name)
        log.write_text(f"did {name}\nno space left\n")
        code = self.codes.get(name, 0)
        if isinstance(code, BaseException):
            raise code
        if code == 0:
            (log.parent / ("result.json" if words[0] == "evaluate" else "model")).touch()
        return max(code, 0)


def go(cells, out, run, settings=None):
    said = []
    return [tuple(one)[:2] for one in run_cells(cells, out, settings or SETTINGS, said.append, run)], said


def test_cells_come_after_what_they_need():
    ordered = in_order([C, D, B, A], "here")
    assert [cell.name for cell in ordered] == ["d", "a", "b", "eval/b"]
    assert [[cell.name for cell in stage] for stage in stages(ordered)] == [["d", "a"], ["b"], ["eval/b"]]
    assert C.command(Path("o")) == ["evaluate", "--task", "depth", "--model", "o/b", "--json", "o/eval/b/result.json"]
    assert Cell("e", "train", (), after=("a",)).needs() == ("a",)


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        ([], "declares no cell"),
        ([A, A], "two cells are named 'a'"),
        ([Cell("../a", "train", ())], "letters, digits"),
        ([Cell("a", "predict", ())], "did you mean|known: evaluate, prepare, train"),
        ([Cell("a", "train", ("--workdir=x",))], "--workdir, which is the cell's folder"),
        ([A, Cell("c", "train", ("{aa}",))], "needs 'aa'; did you mean 'a'"),
        ([A, Cell("a/x", "train", ())], "lies in the folder of cell 'a'"),
        ([Cell("x", "train", ("{y}",)), Cell("y", "train", ("{x}",))], "wait for one another: x, y"),
    ],
)
def test_cells_that_do_not_go_together_are_refused(cells, told):
    with pytest.raises(UserError, match=told):
        in_order(cells, "here")


def test_a_study_goes_on_where_it_stopped(tmp_path):
    cells = [A, B, C, D]
    run = Runs(b=3)
    ended, said = go(cells, tmp_path, run)
    assert ended == [("a", "done"), ("b", "failed"), ("eval/b", "waits"), ("d", "done")]
    assert any("exit code 3: no space left" in line for line in said)
    assert any("needs b, which failed" in line for line in said)
    assert read_marker(tmp_path / "b")["state"] == "started" and not (tmp_path / "eval").exists()

    run = Runs(b=StudyStopped(143))  # the second time the study itself is stopped
    with pytest.raises(StudyStopped):
        go(cells, tmp_path, run)
    assert run.ran == ["b"] and read_marker(tmp_path / "b")["state"] == "started"

    run = Runs()
    ended, _ = go(cells, tmp_path, run)
    assert ended == [("a", "was done"), ("b", "done"), ("eval/b", "done"), ("d", "was done")] and run.ran == ["b", "b"]
    marker = read_marker(tmp_path / "b")
    assert marker["attempts"] == 3 and marker["after"] == {"a": read_marker(tmp_path / "a")["fingerprint"]}


@pytest.mark.parametrize(("code", "told"), [(-9, "ended by SIGKILL: no space"), (-63, "ended by signal 63: no space")])
def test_a_command_that_a_signal_ended_is_reported_so(tmp_path, code, told):
    def run(words, log):
        log.write_text("no space left\n")
        return code

    assert told in go([A], tmp_path, run)[1][-1]


def test_a_command_that_leaves_nothing_has_failed(tmp_path):
    ended, said = go([A], tmp_path, lambda words, log: 0)
    assert ended == [("a", "failed")] and "left no model" in said[-1]


def test_a_cell_that_another_process_runs_is_left_to_it(tmp_path):
    (tmp_path / "a").mkdir()
    with open(tmp_path / "a" / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended, _ = go([A, B], tmp_path, run := Runs())
    assert ended == [("a", "elsewhere"), ("b", "waits")] and run.ran == []


def test_other_settings_are_refused_by_name(tmp_path):
    go([A, B], tmp_path, Runs())
    now = {name: dict(value) for name, value in SETTINGS.items()}
    assert check_settings([A, B], tmp_path, lambda cell: now[cell.name])["a"] == SETTINGS["a"]
    now["b"] |= {"steps": 2, "new": [1]}
    with pytest.raises(
        UserError, match=r"b was begun with other settings: new was absent and is now \[1\]; steps was 1"
    ):
        check_settings([A, B], tmp_path, lambda cell: now[cell.name])
    now = {**SETTINGS, "b": {**SETTINGS["b"], "flag": "old"}}  # of a later version of the library
    known = check_settings([A, B], tmp_path, lambda cell: now[cell.name], lambda cell: {"flag": "old"})
    assert known["b"] == SETTINGS["b"]
    with pytest.raises(UserError, match='flag was "new" and is now "old"'):
        check_settings([A, B], tmp_path, lambda cell: now[cell.name], lambda cell: {"flag": "new"})
    then = {"free": True, "unset": False, "flag": "old"}  # a later version records none of these
    write_json(tmp_path / "b" / MARKER, read_marker(tmp_path / "b") | {"settings": SETTINGS["b"] | then})
    defaults, free = (lambda cell: {"flag": "old"}), (lambda cell: frozenset({"free"}))
    assert check_settings([A, B], tmp_path, lambda cell: SETTINGS[cell.name], defaults, free)["b"]["flag"] == "old"
    with pytest.raises(UserError, match="flag was .old. and is now absent; free was true and is now absent"):
        check_settings([A, B], tmp_path, lambda cell: SETTINGS[cell.name])
    write_json(tmp_path / "b" / MARKER, read_marker(tmp_path / "b") | {"settings": SETTINGS["b"]})
    now = {**SETTINGS, "a": {"steps": 9}}
    (tmp_path / "a" / MARKER).unlink()  # a was removed to do it again in another way
    with pytest.raises(UserError, match="b was made from 'a' of other settings"):
        check_settings([A, B], tmp_path, lambda cell: now[cell.name])
    (tmp_path / "a" / MARKER).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        check_settings([A, B], tmp_path, lambda cell: now[cell.name])


def test_configs_that_list_runs_are_studies(tmp_path):
    listed = tmp_path / "listed.py"
    listed.write_text("def runs(arg=''):\n    return [(f'run{n}', f'{arg},n={n}') for n in (1, 2)]\n")
    cells = study_cells(f"{listed}:data=DATA")
    assert [(cell.name, cell.verb) for cell in cells] == [("run1", "train"), ("run2", "train")]
    assert cells[1].words == ("--config", f"{listed}:data=DATA,n=2")
    listed.write_text("def runs(arg=''):\n    return [].pop()\n")
    with pytest.raises(UserError, match="listed.py, line 2: IndexError"):
        study_cells(str(listed))
    with pytest.raises(UserError, match="declares no study"):
        study_cells("configs/mini.py")


def test_the_shipped_study_compares_like_with_like(monkeypatch):
    monkeypatch.setattr(study_cost, "_params", lambda dit: 0)  # which takes longest
    cells = study_cells("configs/scenes_study.py")
    costs = {cost.name: cost.macs for cost in study_cost.costs(cells, [c.name for c in cells if c.verb == "train"])}
    ladder = [macs for name, macs in costs.items() if name.startswith("ladder/")]
    assert max(ladder) > 100 * min(ladder)  # two decades
    assert len({name.split("/")[1].split("-")[0] for name in costs if name.startswith("ladder/")}) == 5
    for size in ("s2", "s3", "s4"):
        twins = [costs[f"upcycle/{size}-{kind}"] for kind in ("dense", "paper", "renormalised")]
        assert max(twins) < 1.01 * min(twins)
    assert costs["noise/s3-2000-seed0"] == costs["schedule/linear-seed0"] == costs["ladder/s3-2000-seed0"]


# ---- The table ----------------------------------------------------------------------------------------------------


def trained(folder, macs=100.0, **config):
    folder.mkdir(parents=True)
    record = {"config": {"model": "nano", "resolution": 64, "seed": 3} | config}
    record |= {"parameters": 50, "macs_per_sample": 10, "environment": {"devices": {"kind": "cpu", "count": 1}}}
    write_json(folder / "run.json", record)
    rows = [{"step": step, "samples": 5 * step, "loss": 1 / step, "macs": macs * step / 2} for step in (1, 2)]
    rows[0]["held_out_loss"] = 0.5
    rows[1] |= {"samples_per_second": 4.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluated(folder, shift=0.0, **changes):
    cell = {
        "kind": "fixed",
        "preset": "fixed",
        "solver": "ddim",
        "steps": 5,
        "ensemble": 2,
        "macs": 20.0,
        "reduce": "lsq",
    }
    cell |= {"schedule": "cosine", "seconds": 0.1}
    cell["rows"] = [{"key": f"k{i}", "abs_rel": 0.1 * i + shift, "delta1": 0.1 * i} for i in range(1, 6)]
    few = {"rows": [{"key": f"k{i}", "abs_rel": 0.5} for i in range(4)]}
    found = {"task": "depth", "dataset": "scenes", "split": "val", "images": 5, "params": 50, "resolution": 64}
    found |= {"weights": "w", "seed": 0, "model": "FOLDER/b", "protocol": {"fingerprint": "p"}, "prediction_type": "v"}
    found |= {"cells": [cell, {**cell, "kind": "adaptive"}], "baselines": {"constant": few}, "macs_per_forward": 2}
    write_json(folder / "result.json", found | changes)


def test_the_table_has_a_line_for_each_figure(tmp_path):
    cells = [A, B._replace(words=("--config", "x:init={a},steps=2")), C, D]
    for name in ("a", "b"):
        trained(tmp_path / name)
    go(cells[:3], tmp_path, Runs())
    evaluated(tmp_path / "eval" / "b")
    rows, missing = collect(cells, tmp_path)
    assert missing == ["d"] and {row["study_cells"] for row in rows} == {"3/4"}
    lines = list(csv.DictReader(io.StringIO(table_csv(rows))))
    assert list(lines[0])[: len(COLUMNS)] == list(COLUMNS) and "arm" in lines[0]
    losses = [
        (one["run"], one["metric"], one["train_step"], one["train_macs"]) for one in lines if one["kind"] == "train"
    ]
    assert losses == [
        ("a", "held_out_loss", "1", "50"),
        ("a", "loss", "2", "100"),
        ("b", "held_out_loss", "1", "150"),
        ("b", "loss", "2", "200"),  # with those of a, from which it started
    ]
    found = [one for one in lines if one["kind"] == "evaluate"]
    assert [one["metric"] for one in found] == ["abs_rel", "delta1", "1-delta1"]
    first, share, rest = found
    assert (float(first["value"]), first["members"], first["steps"]) == (pytest.approx(0.3), "2", "5")
    assert 0.1 < float(first["low"]) < 0.3 < float(first["high"]) < 0.5
    assert (first["run"], first["model"], first["train_macs"], first["seed"]) == ("b", "nano", "200", "3")
    assert first["arm"] == "one" and first["fingerprint"] == read_marker(tmp_path / "eval" / "b")["fingerprint"]
    assert float(rest["low"]) == pytest.approx(1 - float(share["high"]))
    floor = [one for one in lines if one["kind"] == "baseline"]
    assert [(one["preset"], one["value"], one["low"]) for one in floor] == [("constant", "0.5", "")]  # too few images
    images, _ = collect(cells, tmp_path, images=True)
    assert [one["key"] for one in images if one["metric"] == "abs_rel"] == [f"k{i}" for i in range(1, 6)]
    assert {(one["run"], one["kind"]) for one in images} == {("b", "evaluate")}

    (tmp_path / "b" / "metrics.jsonl").write_text("{}\n{")
    with pytest.raises(UserError, match="line 2 is no JSON"):
        collect(cells, tmp_path)


def test_two_evaluations_are_compared_image_by_image(config, tmp_path, capsys):
    evaluated(tmp_path / "one")
    evaluated(tmp_path / "two", shift=0.1)
    (first, second, _) = differences(tmp_path / "one", tmp_path / "two")
    assert first == "fixed, 5 step(s), 2 member(s): abs_rel 0.3000 to 0.4000, paired +0.1000 [+0.1000, +0.1000]"
    assert second.endswith("paired +0.0000 [+0.0000, +0.0000]")
    evaluated(tmp_path / "three", cells=[])
    one = list(differences(tmp_path / "one", tmp_path / "two", (("fixed", 5, 2), ("fixed", 5, 2))))
    assert one[0].startswith("fixed, 5 step(s), 2 member(s) to fixed, 5 step(s)") and one[0].endswith(
        "[+0.1000, +0.1000]"
    )
    with pytest.raises(UserError, match=r"two has no figures of paper, 5 step\(s\)"):
        list(differences(tmp_path / "one", tmp_path / "two", (("fixed", 5, 2), ("paper", 5, 2))))
    found = json.loads((tmp_path / "one" / "result.json").read_text())
    cell, cached = found["cells"][0], {"cache": "fora", "cache_interval": 2}
    worse = [{**row, "abs_rel": row["abs_rel"] + 1} for row in cell["rows"]]
    evaluated(tmp_path / "both", cells=[cell, {**cell, **cached, "rows": worse}])
    lines = list(differences(tmp_path / "both", tmp_path / "both"))
    assert lines[0].startswith("fixed, 5 step(s), 2 member(s): abs_rel 0.3000 to 0.3000")
    assert lines[3].startswith("fixed, 5 step(s), 2 member(s), ddim + fora 2: abs_rel 1.3000 to 1.3000")
    with pytest.raises(UserError, match=r"both has fixed, 5 .* of several solvers \(ddim, ddim \+ fora 2\)"):
        list(differences(tmp_path / "both", tmp_path / "both", (("fixed", 5, 2), ("fixed", 5, 2))))
    with pytest.raises(UserError, match="nothing is paired"):
        list(differences(tmp_path / "one", tmp_path / "three"))
    with pytest.raises(UserError, match="no cell 'evil' evaluates; did you mean 'eval'"):
        study(config, tmp_path, "--compare", "eval", "evil")
    with pytest.raises(UserError, match="eval is not done"):
        study(config, tmp_path, "--compare", "eval", "eval")
    go([Cell("eval", "evaluate", ())], tmp_path, Runs(), {"eval": _settings(study_cells(config)[1])})
    for wrong, told in (("eval:fixed,1", "write PRESET,STEPS,MEMBERS"), ("eval:fixed,5,2", "give both cells")):
        with pytest.raises(UserError, match=told):
            study(config, tmp_path, "--compare", wrong, "eval")


@pytest.mark.parametrize(
    ("words", "alpha"),
    [
        (
            ("test_time_mini.csv", "--where", "task=depth", "preset=paper", "members=1", "--x", "steps", "--group"),
            0.156,
        ),
        (
            ("test_time_mini.csv", "--where", "task=depth", "preset=fixed", "members=1", "--x", "steps", "--group"),
            -0.060,
        ),
        (("scenes_study.csv", "--where", "kind=train", "metric=held_out_loss", *LAST, "--x", "train_macs"), 0.070),
    ],
)
def test_the_published_tables_give_the_published_laws(tmp_path, capsys, words, alpha):
    table, *more = words
    path = Path(__file__).parents[2] / "docs" / "studies" / table
    found = ["--y", "value", "--form", "power", "--bootstraps", "100", "--json", str(tmp_path / "law.json")]
    assert run_verb("fit", [str(path), *more, *found]) == 0
    assert json.loads((tmp_path / "law.json").read_text())["parameters"]["alpha"]["value"] == pytest.approx(
        alpha, abs=6e-4
    )


# ---- Cost ---------------------------------------------------------------------------------------------------------

TWO = """
from scaling_perception.scaling.study import Cell
SIZE = "scenes_study.py:size=s1,steps={steps}"
def study(arg=""):
    depth = ("--task", "depth", "--dataset", "scenes", "--option", "resolution=64", "--count", "2")
    return [
        Cell("run", "train", ("--config", "configs/scenes_study.py:size=s1,steps=STEPS", *MORE)),
        Cell("eval", "evaluate", (*depth, "--model", "{run}", "--steps", "1,2", "--ensemble", "1,3")),
    ]
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "two.py"
    path.write_text(TWO.replace("STEPS", "4").replace("*MORE", ""))
    return str(path)


def study(config, out, *more):
    return run_verb("study", ["--config", config, "--out", str(out), *more])


def test_the_cost_is_counted_before_anything_is_made(config, tmp_path, capsys):
    out = tmp_path / "out"
    assert study(config, out, "--dry-run", "--price", "v5e=2", "--mfu", "v5e=0.5") == 0 and not out.exists()
    text = capsys.readouterr().out
    run, one = study_cost.costs(study_cells(config), ["run", "eval"])
    forward = run.macs / 3 / 32 / 4
    assert one.macs == 2 * 3 * 3 * forward and run.params == one.params  # images x members x (1 + 2 steps)
    assert "cells     2: 1 train, 1 evaluate" in text
    hours = 2 * (run.macs + run.autoencoder_macs + one.macs + one.autoencoder_macs) / (197e12 * 0.5 * 3600)
    assert f"v5e       {hours:.4g} chip-hours at 50% of the peak (--mfu), {2 * hours:.4g} USD at 2 an hour" in text
    assert "(assumed)" in text and "prices    USD" in text

    trained(tmp_path / "before")
    report = {"chip": {"name": "v5p"}, "estimate": {"mfu_best": 0.25}}
    write_json(tmp_path / "compiled.json", [report])
    more = ("--measured", str(tmp_path / "before"), "--roofline", str(tmp_path / "compiled.json"))
    assert study(config, out, "--dry-run", "--only", "run", *more) == 0
    text = capsys.readouterr().out
    assert "at 2.4e-07 GFLOP/s (1 x cpu, measured in" in text and "25% of the peak (roofline at best" in text


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--price", "v5=1"), "--price v5=1: unknown chip; did you mean"),
        (("--mfu", "v5e=1.2"), "--mfu v5e=1.2: give a number above 0, up to 1"),
        (("--price", "v5e=nan"), "--price v5e=nan: give a number above 0"),
        (("--measured", "nowhere"), "nowhere/metrics.jsonl does not exist"),
        (("--only", "rum"), "--only 'rum' names no cell; did you mean 'run'"),
        (("--stage", "0"), "--stage and --index go together"),
        (("--stage", "0", "--index", "1"), "--index 1: stage 0 has 1 cells"),
        (("--stage", "2", "--index", "0"), "--stage 2: this study has 2"),
        (("--write", "pbs"), "--write 'pbs'; known: jobset, slurm"),
    ],
)
def test_wrong_flags_are_one_clear_line(config, tmp_path, more, told):
    with pytest.raises(UserError) as raised:
        study(config, tmp_path / "out", *(() if more[0] == "--write" else ("--dry-run",)), *more)
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_a_wrong_flag_of_a_cell_is_found_before_the_first_runs(config, tmp_path):
    path = Path(config)
    path.write_text(TWO.replace("STEPS", "4").replace("*MORE", '"--config.train.step=3"'))
    with pytest.raises(UserError, match=r"cell 'run': unknown config key 'train.step'"):
        study(config, tmp_path / "out")
    path.write_text(TWO.replace("STEPS", "4").replace("*MORE", "").replace("--count", "--cout"))
    with pytest.raises(UserError, match=r"cell 'eval': .*--cout"):
        study(config, tmp_path / "out")


def test_a_study_by_its_verb(config, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"

    def run(words, log):
        if words[0] == "train":
            trained(out / "run" / "x")
            for file in ("run.json", "metrics.jsonl"):
                (out / "run" / "x" / file).rename(out / "run" / file)
            (out / "run" / "model").mkdir()
            return 0
        log.write_text("scaling-perception: no such thing\n")
        return 2

    monkeypatch.setattr(_Commands, "run", lambda _, words, log: run(words, log))
    assert study(config, out) == 1
    told = capsys.readouterr()
    assert "not done: eval: exit code 2: scaling-perception: no such thing" in told.err
    assert "1 of 2 cells are done" in told.err and "1 of 2 cells are missing from the table: eval" in told.err
    assert (out / "study.csv").read_text().startswith("cell,kind,run,")
    assert study(config, out, "--collect") == 0
    (out / "study.csv").write_text("mine\n")
    with pytest.raises(UserError, match=r"study.csv holds another result .*--overwrite"):
        study(config, out, "--collect")
    assert (out / "study.csv").read_text() == "mine\n" and study(config, out, "--collect", "--overwrite") == 0
    Path(config).write_text(TWO.replace("STEPS", "5").replace("*MORE", ""))
    with pytest.raises(UserError, match=r"run was begun with other settings: .*train.steps was 4 and is now 5"):
        study(config, out, "--collect")


# ---- Real cells ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_cells_end_to_end_through_a_kill_and_a_signal(config, tmp_path):
    fields = ("train.checkpoint_every=5", "train.log_every=5", "train.batch_size=4", "latent_norm=none")
    more = ", ".join(f'"--config.{field}"' for field in (*fields, "data.mixture.depth.count=8"))
    Path(config).write_text(TWO.replace("STEPS", "60").replace("*MORE", more))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "scaling_perception", "study", "--config", config, "--out", str(out)]

    place = {**os.environ, "XLA_FLAGS": ""}  # one device

    def started(until):
        process = subprocess.Popen(command, env=place, stderr=subprocess.DEVNULL)
        wait = time.monotonic() + 400
        while not until() and time.monotonic() < wait:
            time.sleep(0.05)
        return process

    checkpoints = out / "run" / "checkpoints"
    process = started(lambda: len(list(checkpoints.glob("[0-9]*"))) > 0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 143 and read_marker(out / "run")["state"] == "started"
    assert "stopped at step" in (out / "run" / "cell.log").read_text()

    done = subprocess.run(command, env=place, stderr=subprocess.PIPE, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert read_marker(out / "run")["attempts"] == 2
    assert "resuming from step" in (out / "run" / "cell.log").read_text()
    rows = list(csv.DictReader(io.StringIO((out / "study.csv").read_text())))
    found = [row for row in rows if row["metric"] == "abs_rel" and row["kind"] == "evaluate"]
    assert [(row["steps"], row["members"]) for row in found] == [("1", "1"), ("1", "3"), ("2", "1"), ("2", "3")]
    assert all(float(row["train_macs"]) > 0 and row["study_cells"] == "2/2" for row in found)
    before = (out / "eval" / "result.json").stat().st_mtime_ns
    assert subprocess.run(command, env=place, capture_output=True).returncode == 0
    assert (out / "eval" / "result.json").stat().st_mtime_ns == before
