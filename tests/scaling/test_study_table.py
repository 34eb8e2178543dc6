"""The table of a study: its lines, and what is said of a finished cell whose files are damaged or of another cell."""

import csv
import io

import pytest
from study_cells import SETTINGS, A, B, C, D, Runs, evaluated, go, trained

from scaling_perception.scaling.study import read_marker
from scaling_perception.scaling.study_table import COLUMNS, collect, table_csv
from scaling_perception.support.errors import UserError


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
    with pytest.raises(
        UserError, match="b/metrics.jsonl: the last line is not valid JSON: restore it, or remove the line"
    ):
        collect(cells, tmp_path)


ASKED = {"task": "depth", "dataset": "scenes", "count": 0, "option": [], "seed": 0, "steps": "1,2", "solver": "ddim"}
FLAGS = {"task": "depth", "dataset": "scenes", "count": 0, "option": [], "seed": None, "steps": "1,2", "model": "{b}"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"asked": {**ASKED, "ensemble": "5"}}, None),  # the default, which is recorded too
        ({"model": "moved/b"}, None),
        ({"asked": {**ASKED, "steps": "1,10"}}, "--steps was 1,10, and is 1,2 in the cell"),
        ({"asked": {**ASKED, "preset": "paper"}}, "--preset was paper, and is "),
        ({"asked": {**ASKED, "seed": 3}}, "--seed was 3, and is 0 in the cell"),
        ({"asked": {**ASKED, "option": ["a=b"]}}, "--option was "),
        ({"asked": {**ASKED, "solver": "unipc"}}, "--solver was unipc, and is ddim"),
        ({"model": "out/a"}, r"--model was out/a, and is \{b\} in the cell"),
    ],
)
def test_a_result_of_another_cell_is_refused(tmp_path, changes, words):
    for name in ("a", "b"):
        trained(tmp_path / name)
    go([A, B, C], tmp_path, Runs(), SETTINGS | {"eval/b": {**FLAGS, "solver": None, "preset": None, "ensemble": None}})
    evaluated(tmp_path / "eval" / "b", **{"asked": ASKED, **changes})
    if words is None:
        assert collect([A, B, C], tmp_path)[0]
        return
    with pytest.raises(
        UserError, match=f"result.json is the result of another cell .{words}.*remove the folder .*eval/b"
    ):
        collect([A, B, C], tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("eval/b/result.json", None, "result.json does not exist: restore it, or remove the folder .*eval/b to do"),
        (
            "eval/b/result.json",
            '{"task": ',
            "result.json is not valid JSON .*: restore it, or remove the folder .*eval/b",
        ),
        ("eval/b/result.json", "[]", "result.json is no evaluation: restore it, or remove the folder"),
        ("eval/b/result.json", '{"task": 1, "cells": []}', "result.json lacks a field.*: restore it, or remove the"),
        ("eval/b/result.json", '{"task": 1, "cells": [], "format": 9}', "format is 9, and this version reads 1"),
        ("b/run.json", None, "b/run.json does not exist: restore it, or remove the folder .*b to do the cell again"),
        ("b/run.json", "{}", "b/run.json lacks a field"),
        ("b/metrics.jsonl", None, "b/metrics.jsonl does not exist: restore it, or remove"),
        (
            "b/metrics.jsonl",
            '{"step": 1, "samples": 2}\n{\n{"step": 2, "samples": 4}\n',
            "line 2 is not valid JSON: remove",
        ),
        ("b/metrics.jsonl", '{"step": 1, "samples": 2}\n{}\n', "row 2 has no step and samples: remove the line"),
    ],
)
def test_what_a_finished_cell_lacks_is_named_with_its_remedy(tmp_path, file, text, words):
    for name in ("a", "b"):
        trained(tmp_path / name)
    go([A, B, C], tmp_path, Runs())
    evaluated(tmp_path / "eval" / "b")
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=words) as raised:
        collect([A, B, C], tmp_path)
    assert "\n" not in str(raised.value) and str(tmp_path / file) in str(raised.value)
