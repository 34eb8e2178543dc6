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
from study_cells import SETTINGS, A, B, C, D, Runs, evaluated, go, trained

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
    stages,
    study_cells,
)
from scaling_perception.scaling.study_table import differences
from scaling_perception.study import _settings
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import write_json
from scaling_perception.support.verbs import run_verb

LAST = ("arm=ladder", "seed=0", "last=1")  # of the published study


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
        ([Cell("a", "evaluate", ("--count", 2))], "here: cell 'a': its words have 2, which is no text: write '2'"),
        ([Cell("a", "evaluate", "--count")], "cell 'a': its words are '--count': give a tuple of texts"),
        ([Cell("a", "evaluate", None)], "cell 'a': its words are None: give a tuple"),
        ([A, Cell("b", "train", (), after=(A,))], "cell 'b': its after have Cell.name='a'.*which is no text"),
        ([A, Cell(3, "train", ())], "here: cell 2: its name is 3: give a text"),
        ([Cell("a", None, ())], "cell 'a': its verb is None: give a text"),
        ([Cell("a", "train", (), labels=["x"])], "cell 'a': its labels are .'x'.: give a mapping"),
        ([Cell("a", "train", (), labels={"x": Path("y")})], "cell 'a': its label 'x' is .*: give a text or a number"),
        (["a"], "here: cell 1: 'a' is no Cell: write Cell"),
        ([A, ("b", "train", ())], "here: cell 2: .'b', 'train', .*is no Cell"),
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


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("def study(arg): return None", r"listed.py: study\(arg\) returns None: return a list"),
        ("def study(arg): return 'abc'", r"study\(arg\) returns 'abc': return a list"),
        ("def study(arg): return {'a': 1}", r"study\(arg\) returns .'a': 1.: return a list"),
        ("def study(arg): return [1]", "cell 1: 1 is no Cell"),
        ("def study(arg): yield from ()", "declares no cell"),
        ("def runs(arg): return 3", r"runs\(arg\) returns 3: return a list"),
        ("def runs(arg): return ['ab', ('c',)]", r"runs\(arg\) has 'ab': give pairs of texts"),
        ("def runs(arg): return [('c', 'd', 'e')]", r"runs\(arg\) has .'c', 'd', 'e'.: give pairs"),
    ],
)
def test_what_is_no_list_of_cells_is_one_line(tmp_path, returned, words):
    (tmp_path / "listed.py").write_text(returned + "\n")
    with pytest.raises(UserError, match=words) as raised:
        study_cells(str(tmp_path / "listed.py"))
    assert "\n" not in str(raised.value)


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
        (("--measured", "nowhere"), "--measured nowhere: is no folder of a training run: give the --workdir"),
        (("--only", "rum"), "--only 'rum' names no cell; did you mean 'run'"),
        (("--stage", "0"), "--stage and --index go together"),
        (("--stage", "0", "--index", "1"), "--index 1: stage 0 has 1 cells"),
        (("--stage", "2", "--index", "0"), "--stage 2: this study has 2"),
        (("--write", "pbs"), "--write 'pbs'; known: jobset, slurm"),
        (("--write", "slurm"), "--dry-run and --write do not go together: give one of them"),
        (("--collect",), "--dry-run and --collect do not go together"),
        (("--compare", "eval", "eval"), "--dry-run and --compare do not go together"),
        (("--to", "jobs"), "--to is of no use with --dry-run: leave it out"),
        (("--csv", "x.csv"), "--csv is of no use with --dry-run: leave it out"),
        (("--jobs", "2"), "--jobs is of no use with --dry-run"),
    ],
)
def test_wrong_flags_are_one_clear_line(config, tmp_path, more, told):
    with pytest.raises(UserError) as raised:
        study(config, tmp_path / "out", *(() if more[1:] == ("pbs",) else ("--dry-run",)), *more)
    assert told in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--to", "jobs"), "--to is of no use without --write: leave it out, or give --write"),
        (("--price", "v5e=1"), "--price is of no use without --dry-run"),
        (("--measured", "x", "--collect"), "--measured is of no use with --collect: leave it out"),
        (("--only", "run", "--write", "slurm"), "--only is of no use with --write"),
        (("--images", "x.csv", "--stage", "0", "--index", "0"), "--images is of no use with --stage"),
        (("--collect", "--stage", "0", "--index", "0"), "--collect and --stage do not go together"),
        (("--collect",), "no cell of this study was begun there: give the study's folder, or run it first"),
        (("--collect", "--only", "run"), "no cell of this study was begun there"),
    ],
)
def test_flags_that_would_have_no_effect_run_nothing(config, tmp_path, monkeypatch, more, words):
    monkeypatch.setattr(_Commands, "run", lambda *_: pytest.fail("a cell was run"))
    with pytest.raises(UserError) as raised:
        study(config, tmp_path / "out", *more)
    assert words in str(raised.value) and "\n" not in str(raised.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("returned", "words"), [("[1]", "has 1: give Figure"), ("None", "returns None: return a list")]
)
def test_figures_that_are_none_are_refused_before_a_cell_runs(config, tmp_path, monkeypatch, returned, words):
    monkeypatch.setattr(_Commands, "run", lambda *_: pytest.fail("a cell was run"))
    Path(config).write_text(Path(config).read_text() + f"def figures(arg):\n    return {returned}\n")
    with pytest.raises(UserError, match=rf"figures\(arg\) {words}"):
        study(config, tmp_path / "out")


def test_a_cache_is_no_run_whose_speed_was_measured(config, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "ledger.json").write_text("{}")
    with pytest.raises(UserError, match="cache: is no folder of a training run") as raised:
        study(config, tmp_path / "out", "--dry-run", "--measured", str(tmp_path / "cache"))
    assert "remove" not in str(raised.value)


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
