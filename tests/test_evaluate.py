"""The evaluate verb: the JSON's promises, its pictures and tables, going on after a kill, mistakes told in one line."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from listed import Source
from safetensors.numpy import load_file, save_file

from scaling_perception.cli import main
from scaling_perception.data.formats import read_image
from scaling_perception.inference.budgets import choose, load_budgets
from scaling_perception.report import write_report
from scaling_perception.support.again import differing
from scaling_perception.support.errors import UserError

pytest_plugins = ("nano",)


@pytest.fixture
def evaluate(nano_folder, tmp_path, capsys, monkeypatch, make_raw):
    samples = Source([make_raw(40, 56, 0), make_raw(30, 44, 1), make_raw(40, 56, 2)])
    asked = []

    def open_source(name, root, split, task, **options):
        asked.append((name, root, split, task, options))
        return samples

    monkeypatch.setattr("scaling_perception.data.sources.open_source", open_source)

    def run(task, *words, code=0, json_name="eval/result.json"):
        options = ["--task", task, "--dataset", "scenes", "--model", str(nano_folder), "--batch-size", "4"]
        done = main(["evaluate", *options, "--json", str(tmp_path / json_name), *words])
        text = capsys.readouterr()
        assert done == code, text.err
        return text

    run.samples, run.asked = samples, asked
    return run


@pytest.mark.parametrize(
    ("task", "metrics", "baselines"),
    [
        ("depth", ["abs_rel", "delta1"], ["constant", "row", "inverse_row"]),
        ("flow", ["epe", "epe_fitted"], ["zero", "oracle_mean"]),
        ("amodal", ["iou", "iou_painted", "iou_joined"], ["visible"]),
    ],
)
def test_json_holds_what_is_promised(evaluate, tmp_path, task, metrics, baselines):
    grid = ["--steps", "2", "--ensemble", "1,2", "--preset", "fixed,paper"]
    text = evaluate(task, *grid, "--panels", "2", "--csv", str(tmp_path / "cells.csv"), "--count", "3")
    assert evaluate.asked == [("scenes", "", "val", task, {"count": 3})]
    path = tmp_path / "eval" / "result.json"
    result = json.loads(path.read_text())
    assert result["format"] == 1 and (result["task"], result["dataset"], result["images"]) == (task, "scenes", 3)
    assert result["resolution"] == 32 and len(result["protocol"]["fingerprint"]) == 12
    assert result["data"] == {"name": "tiny", "length": 3} and result["skipped"] == []
    cells = [(c["preset"], c["spacing"], c["schedule"], c["steps"], c["ensemble"]) for c in result["cells"]]
    assert cells == [
        ("fixed", "trailing", "cosine", 2, 1),
        ("fixed", "trailing", "cosine", 2, 2),
        ("paper", "leading", "cosine", 2, 1),
        ("paper", "leading", "cosine", 2, 2),
    ]
    passes = 2 if task == "flow" else 1
    assert result["cells"][1]["macs"] == 2 * result["cells"][0]["macs"] > 0
    assert result["cells"][0]["macs"] % (2 * passes) == 0
    ceilings = ["autoencoder", *(["threshold"] if task == "amodal" else [])]
    assert list(result["baselines"]) == [*baselines, *ceilings]
    for entry in (*result["cells"], *result["baselines"].values()):
        assert list(entry["metrics"]) == metrics
        assert [sorted(row) for row in entry["rows"]] == [sorted(["key", *metrics])] * 3
        for name in metrics:
            assert entry["metrics"][name]["ci95"] is None, "three images give no interval"
            assert entry["metrics"][name]["mean"] == pytest.approx(np.mean([row[name] for row in entry["rows"]]))
    assert result["controls"]["cell"]["ensemble"] == 2
    for name in ("blind", "shuffled"):
        control = result["controls"][name]
        assert [row["key"] for row in control["rows"]] == ["raw/0", "raw/1", "raw/2"]
        own, other = result["cells"][1]["metrics"], control["metrics"]
        for metric in metrics:
            assert control["adds"][metric]["mean"] == pytest.approx(own[metric]["mean"] - other[metric]["mean"])
    assert [panel["key"] for panel in result["panels"]] == ["raw/0", "raw/1"]
    for panel in result["panels"]:
        pictures = [panel[name] for name in ("image", "truth", "prediction", "error", "uncertainty")]
        pictures += [] if task == "depth" else [panel["prompt"]]
        sizes = {read_image(path.parent / picture).shape[1::-1] for picture in pictures}
        assert sizes == {(56, 40) if panel["key"] == "raw/0" else (44, 30)}
        assert panel["cell"]["preset"] == "fixed" and panel["cell"]["ensemble"] == 2
        assert [(one["steps"], one["ensemble"]) for one in panel["answers"]] == [(2, 1), (2, 2)]
        assert panel["answers"][1]["error"] == panel["error"] != panel["answers"][0]["error"]
        assert (path.parent / panel["answers"][0]["error"]).is_file() and panel["scales"]["error"]["words"]
        spread = panel["scales"]["uncertainty"]
        assert spread["high"] > spread["low"] == 0 and spread["colours"] == "inferno"
    with open(tmp_path / "cells.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and float(rows[3][metrics[0]]) == result["cells"][3]["metrics"][metrics[0]]["mean"]
    assert all(word in text.out for word in (*metrics, *baselines, "autoencoder", "paper", "picture against blind"))
    page = write_report(tmp_path / "eval", tmp_path / "report.html", "t").read_text()
    assert page.count('alt="prediction with ') == 2 * 2, "the report reads what evaluate writes"


def test_unreadable_samples_are_named_and_fail_at_the_end(evaluate, tmp_path):
    evaluate.samples[1] = UserError("b.png is cut short")
    text = evaluate("depth", "--steps", "2", "--ensemble", "2", code=1)
    assert "left out: sample 1: b.png is cut short" in text.err
    result = json.loads((tmp_path / "eval" / "result.json").read_text())
    assert result["images"] == 2 and [one["kind"] for one in result["skipped"]] == ["unreadable"]


def test_the_unit_of_true_depth_is_printed_and_doubted(evaluate, tmp_path):
    words = ("depth", "--steps", "1", "--ensemble", "1", "--controls", "0")
    text = evaluate(*words)
    low, high = json.loads((tmp_path / "eval" / "result.json").read_text())["ranges"]["depth"]
    valid = np.concatenate([raw["depth"][raw["valid"]] for raw in evaluate.samples])
    assert (low, high) == (valid.min(), valid.max()) and f"true depth: {low:.4g} .. {high:.4g} m" in text.out
    assert "outside 1 mm" not in text.err
    for raw in evaluate.samples:
        raw["depth"] = raw["depth"] * np.float32(1e6)  # depth_scale the wrong way round
    text = evaluate(*words, json_name="eval/wrong.json")
    assert "outside 1 mm to 10 km: depth_scale" in text.err


def test_same_command_same_figures(evaluate, tmp_path):
    results = []
    for name in ("a.json", "b.json"):
        evaluate("depth", "--steps", "2", "--ensemble", "2", json_name=name)
        result = json.loads((tmp_path / name).read_text())
        for cell in result["cells"]:
            del cell["seconds"]
        results.append(result)
    assert results[0] == results[1]


def _rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_result_is_replaced_by_wish_alone(evaluate, tmp_path):
    words = ("--steps", "1", "--ensemble", "1")
    evaluate("depth", *words)
    path = tmp_path / "eval" / "result.json"
    before = path.read_bytes()
    assert "already finished" in evaluate("depth", *words).out  # equal settings
    assert "seed: 0 there, 1 here" in evaluate("depth", *words, "--seed", "1", code=2).err
    assert path.read_bytes() == before
    evaluate("depth", *words, "--seed", "1", "--overwrite")
    assert json.loads(path.read_text())["asked"]["seed"] == 1
    found = differing({"a": {"b": (1,)}, "c": 2}, {"a": {"b": [1]}, "d": 3})
    assert found == ['c: 2 there, "absent" here', 'd: "absent" there, 3 here']


def test_tables_for_other_tools(evaluate, tmp_path):
    """Columns as docs/evaluate.md has them; what a cell does not have is empty."""
    cells, images = tmp_path / "cells.csv", tmp_path / "images.csv"
    words = ["--steps", "2", "--ensemble", "1,2", "--tolerance", "1e9", "--metrics", "rmse"]
    evaluate("depth", *words, "--csv", str(cells), "--per-image", str(images))
    result = json.loads((tmp_path / "eval" / "result.json").read_text())
    rows = _rows(cells)
    assert list(rows[0]) == [
        *("task", "dataset", "split", "images", "model", "weights", "params", "resolution", "protocol", "kind"),
        *("preset", "spacing", "schedule", "solver", "steps", "ensemble", "reduce", "tolerance", "first"),
        *("step_tolerance", "step_chunk", "mean_steps", "mean_members", "macs", "seconds"),
        *("abs_rel", "abs_rel_low", "abs_rel_high", "delta1", "delta1_low", "delta1_high"),
        *("1-delta1", "1-delta1_low", "1-delta1_high", "rmse", "rmse_low", "rmse_high"),
    ]
    assert [(r["kind"], r["ensemble"], r["tolerance"], r["mean_members"]) for r in rows] == [
        *[("constant", "1", "", "1"), ("constant", "2", "", "2"), ("adaptive", "2", "1000000000.0", "2.0")]
    ]
    for row in rows:
        assert row["1-delta1_low"] == row["1-delta1_high"] == "", "three images give no interval"
        assert float(row["1-delta1"]) == 1 - float(row["delta1"])
        assert row["solver"] == "ddim" and int(row["params"]) == result["params"] > 0 and float(row["macs"]) > 0
    rows = _rows(images)
    assert list(rows[0]) == [
        *("task", "dataset", "model", "key", "answer", "kind", "preset", "spacing", "solver", "steps", "ensemble"),
        *("tolerance", "step_tolerance", "forwards", "macs", "abs_rel", "delta1", "rmse"),
    ]
    answers = ["model"] * 9 + [name for name in result["baselines"] for _ in range(3)]
    assert [row["answer"] for row in rows] == answers
    assert [(row["key"], row["forwards"]) for row in rows[3:7]] == [
        *[(f"raw/{i}", "4") for i in range(3)],
        ("raw/0", "4"),
    ]
    assert float(rows[3]["abs_rel"]) == result["cells"][1]["rows"][0]["abs_rel"]
    assert float(rows[3]["macs"]) == 4 * result["macs_per_forward"] and rows[-1]["forwards"] == ""


def test_budgets_are_written_and_read(evaluate, nano_folder, tmp_path, make_raw, monkeypatch, capsys):
    few = evaluate("depth", "--steps", "1", "--write-budgets", str(tmp_path / "few"), "--controls", "0", code=2)
    assert "few" in few.err
    few = evaluate("depth", "--steps", "1", "--write-budgets", str(nano_folder), code=2)
    assert "3 images tell no settings apart" in few.err and not (tmp_path / "eval" / "result.json").exists()
    evaluate.samples += [make_raw(40, 56, 3), make_raw(40, 56, 4)]  # fewer than five tell no settings apart
    model = tmp_path / "model"
    shutil.copytree(nano_folder, model)
    for task, load in (("depth", 1.0), ("amodal", 99.0)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (0.0, load * os.cpu_count(), 0.0), raising=False)
        said = evaluate(
            task,
            "--steps",
            "1,2",
            "--ensemble",
            "1,2",
            "--tolerance",
            "0.1",
            "--write-budgets",
            str(model),
            "--overwrite",
        )
        assert ("the machine was busy (load average" in said.err) == (load > 1)
    table = load_budgets(model)
    assert table is not None and list(table["tasks"]) == ["amodal", "depth"]
    result = json.loads((tmp_path / "eval" / "result.json").read_text())
    entry = table["tasks"]["amodal"]
    assert len(entry["cells"]) == 4 and entry["weights"] == result["weights"] and entry["metric"] == "1-iou"
    assert choose(table, "amodal", macs=1e99).error == min(cell["error"] for cell in entry["cells"])
    text = evaluate("depth", "--eta", "0.5", "--write-budgets", str(model), code=2)
    assert "of the usual eta: leave out --eta" in text.err
    other = tmp_path / "other"
    shutil.copytree(nano_folder, other)
    (other / "config.json").write_bytes((model / "config.json").read_bytes())
    weights = load_file(other / "model.safetensors")
    save_file({name: leaf + 1 for name, leaf in weights.items()}, other / "model.safetensors")
    for flag in ("--write-budgets", "--write-grids"):
        main_words = ["--task", "depth", "--dataset", "scenes", "--model", str(nano_folder), flag, str(other)]
        assert main(["evaluate", *main_words]) == 2
        assert "holds other weights" in (text := capsys.readouterr().err) and text.count("\n") == 1
    assert not list(other.glob("*s.json"))
    (model / "budgets.json").write_text("{")
    text = evaluate("depth", "--write-budgets", str(model), code=2)
    assert "budgets.json is not valid JSON" in text.err


_KILLED = """
import os, signal, sys
from scaling_perception.cli import main
from scaling_perception.inference.predictor import Predictor
sample, left = Predictor.sample, [int(sys.argv[1])]
def last(*arguments):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return sample(*arguments)
Predictor.sample = last
main(sys.argv[2:])
"""


def test_a_killed_run_goes_on_and_ends_the_same(nano_folder, tmp_path, capsys):
    """SIGKILL in the middle of an image; the same command then gives the same bytes, apart from times."""
    count, points = 6, 4
    killed = random.randrange(points, count * points)
    results = []

    def words(out):
        grid = ["--steps", "1,2", "--ensemble", "1,2", "--preset", "fixed,paper", "--tolerance", "0.05"]
        data = ["--dataset", "scenes", "--count", str(count), "--option", "resolution=32", "--batch-size", "2"]
        return [
            "--task",
            "depth",
            *data,
            "--model",
            str(nano_folder),
            *grid,
            "--panels",
            "1",
            "--controls",
            "0",
            "--json",
            str(out),
        ]

    out = tmp_path / "x.json"
    process = subprocess.run([sys.executable, "-c", _KILLED, str(killed), "evaluate", *words(out)], capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    journal = tmp_path / "x.json.journal"
    assert not out.exists() and journal.read_bytes().count(b"\n") == 1 + killed // points
    assert main(["evaluate", *words(out)[:-2], "--seed", "1", "--json", str(out)]) == 2
    assert "seed was 0, is 1" in capsys.readouterr().err
    for path in (out, tmp_path / "y.json"):
        assert main(["evaluate", *words(path)]) == 0
        told = capsys.readouterr().err
        assert (f"{killed // points} images are done" in told) == (path == out)
        result = json.loads(path.read_text())
        for cell in result["cells"]:
            del cell["seconds"]
        results.append(json.dumps(result).replace("panels/x_", "panels/y_"))
        assert all(
            (tmp_path / name).is_file() for key, name in result["panels"][0].items() if key in ("image", "truth")
        )
    assert results[0] == results[1] and not list(tmp_path.glob("*.journal"))


def test_mistakes_are_one_line(evaluate, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for words, message in (
        (("dept",), "did you mean 'depth'"),
        (("depth", "--steps", "1,x"), "--steps: '1,x' has 'x': give"),
        (("depth", "--steps", "0"), "--steps: '0': give"),
        (("depth", "--ensemble", ""), "--ensemble is empty"),
        (("depth", "--ensemble", ","), "--ensemble: ',': give"),
        (("depth", "--preset", "fixd"), "did you mean 'fixed'"),
        (("depth", "--reduce", "mean"), "merge depth members"),
        (("depth", "--count", "-1"), "--count"),
        (("depth", "--count", "0"), "--count: '0': give"),
        (("depth", "--csv", str(tmp_path / "eval" / "result.json")), "--json and --csv are both"),
        (("depth", "--per-image", str(tmp_path / "x" / ".." / "p.csv"), "--csv", str(tmp_path / "p.csv")), "--csv and"),
        (("depth", "--csv", "/dev/null"), "--csv /dev/null: it is there and is no regular file"),
        (("depth", "--json", "/dev/zero", "--merge"), "--json /dev/zero: it is there"),
        (("depth", "--option", "x"), "--option 'x'"),
        (("depth", "--tolerance", "-1"), "--tolerance: '-1': give"),
        (("depth", "--step-tolerance", "nan"), "--step-tolerance: 'nan': give"),
        (("depth", "--step-tolerance", "0.1", "--solver", "ddpm"), "without noise"),
        (("depth", "--tolerance", "0.1", "--first", "0"), "--first"),
        (("depth", "--solver", "ddmi"), "did you mean"),
        (("depth", "--metrics", "rsme"), "did you mean 'rmse'"),
        (("depth", "--write-budgets", str(tmp_path / "nowhere")), "no folder"),
        (("depth", "--csv", str(tmp_path / "file" / "x.csv")), "cannot make"),
        (("depth", "--model", "mni"), "no folder, hub id"),
    ):
        text = evaluate(*words, code=2)
        assert message in text.err and text.err.count("\n") == 1, text.err
    assert not list(tmp_path.glob("eval/*.json"))
    monkeypatch.undo()
    assert main(["evaluate", "--task", "depth", "--dataset", "scnes", "--model", "x", "--json", "x.json"]) == 2
