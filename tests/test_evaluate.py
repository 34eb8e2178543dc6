"""The evaluate verb: the JSON's promises, its pictures and table, and mistakes told in one line."""

import csv
import json

import numpy as np
import pytest

from scaling_perception.cli import main
from scaling_perception.data.formats import read_image
from scaling_perception.report import write_report
from scaling_perception.support.errors import UserError

pytest_plugins = ("nano",)


class Source(list):
    def fingerprint(self):
        return {"name": "tiny", "length": len(self)}

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if isinstance(sample, Exception):
            raise sample
        return sample


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
        ("amodal", ["iou"], ["visible"]),
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
    assert list(result["baselines"]) == [*baselines, "autoencoder"]
    for entry in (*result["cells"], *result["baselines"].values()):
        assert list(entry["metrics"]) == metrics
        assert [sorted(row) for row in entry["rows"]] == [sorted(["key", *metrics])] * 3
        for name in metrics:
            low, high = entry["metrics"][name]["ci95"]
            assert low <= entry["metrics"][name]["mean"] <= high
            assert entry["metrics"][name]["mean"] == pytest.approx(np.mean([row[name] for row in entry["rows"]]))
    assert [panel["key"] for panel in result["panels"]] == ["raw/0", "raw/1"]
    for panel in result["panels"]:
        pictures = [panel[name] for name in ("image", "truth", "prediction", "error", "uncertainty")]
        pictures += [] if task == "depth" else [panel["prompt"]]
        sizes = {read_image(path.parent / picture).shape[1::-1] for picture in pictures}
        assert sizes == {(56, 40) if panel["key"] == "raw/0" else (44, 30)}
        assert panel["cell"]["preset"] == "fixed" and panel["cell"]["ensemble"] == 2
    with open(tmp_path / "cells.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and float(rows[3][metrics[0]]) == result["cells"][3]["metrics"][metrics[0]]["mean"]
    assert all(word in text.out for word in (*metrics, *baselines, "autoencoder", "paper"))
    page = write_report(tmp_path / "eval", tmp_path / "report.html", "t").read_text()
    assert page.count('alt="prediction"') == 2, "the report reads what evaluate writes"


def test_unreadable_samples_are_named_and_fail_at_the_end(evaluate, tmp_path):
    evaluate.samples[1] = UserError("b.png is cut short")
    text = evaluate("depth", "--steps", "2", "--ensemble", "2", code=1)
    assert "left out: sample 1: b.png is cut short" in text.err
    result = json.loads((tmp_path / "eval" / "result.json").read_text())
    assert result["images"] == 2 and [one["kind"] for one in result["skipped"]] == ["unreadable"]


def test_same_command_same_figures(evaluate, tmp_path):
    results = []
    for name in ("a.json", "b.json"):
        evaluate("depth", "--steps", "2", "--ensemble", "2", json_name=name)
        result = json.loads((tmp_path / name).read_text())
        for cell in result["cells"]:
            del cell["seconds"]
        results.append(result)
    assert results[0] == results[1]


def test_mistakes_are_one_line(evaluate, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for words, message in (
        (("dept",), "did you mean 'depth'"),
        (("depth", "--steps", "1,x"), "--steps '1,x'"),
        (("depth", "--steps", "0"), "--steps '0'"),
        (("depth", "--ensemble", ""), "--ensemble ''"),
        (("depth", "--preset", "fixd"), "did you mean 'fixed'"),
        (("depth", "--reduce", "mean"), "merge depth members"),
        (("depth", "--count", "-1"), "--count -1"),
        (("depth", "--option", "x"), "--option 'x'"),
        (("depth", "--csv", str(tmp_path / "file" / "x.csv")), "cannot make"),
        (("depth", "--model", "mni"), "no folder, hub id"),
    ):
        text = evaluate(*words, code=2)
        assert message in text.err and text.err.count("\n") == 1, text.err
    assert not list(tmp_path.glob("eval/*.json"))
    monkeypatch.undo()
    assert main(["evaluate", "--task", "depth", "--dataset", "scnes", "--model", "x", "--json", "x.json"]) == 2
