"""An evaluation made by several jobs and joined is the JSON of one job, to the last digit."""

import json
import re
import shutil
from pathlib import Path

import pytest
from listed import Source

from scaling_perception.cli import main
from scaling_perception.support import locks
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import run_verb

pytest_plugins = ("nano",)

GRID = ["--steps", "2", "--ensemble", "1,2", "--tolerance", "0.05", "--seed", "3", "--batch-size", "4"]
WORDS = [*GRID, "--controls", "3", "--panels", "2"]


@pytest.fixture
def evaluate(nano_folder, monkeypatch, make_raw):
    monkeypatch.setattr(locks, "SAME_MACHINE", 0.0)
    samples = Source([make_raw(30 + 2 * i, 44, i) for i in range(9)])
    samples[1] = UserError("b.png is cut short")  # so that the third image that is measured is not the third of all
    samples[4] = make_raw(30, 44, 4, valid=samples[4]["valid"] & False)
    monkeypatch.setattr("scaling_perception.data.sources.open_source", lambda *words, **options: samples)

    def run(out, *words, task="depth"):
        model = ["--task", task, "--dataset", "scenes", "--model", str(nano_folder)]
        return run_verb("evaluate", [*model, "--json", str(out), *words])

    return run


def untimed(value):
    """A result without what a clock says."""
    if isinstance(value, dict):
        return {name: untimed(one) for name, one in value.items() if name != "seconds"}
    return [untimed(one) for one in value] if isinstance(value, list) else value


def load(out):
    return untimed(json.loads(out.read_text()))


def pictures(out):
    return {path.name: path.read_bytes() for path in (out.parent / "panels").iterdir()}


def test_parts_joined_are_the_result_of_one_job(evaluate, tmp_path, capsys):
    whole, out = tmp_path / "whole" / "r.json", tmp_path / "parts" / "r.json"
    assert evaluate(whole, *WORDS) == 1  # an image cannot be read
    for part in ("2/3", "3/3", "auto/3"):  # in any order
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("JOB_COMPLETION_INDEX", "1")
            assert evaluate(out, *WORDS, "--shard", part) == 0
    assert not out.exists() and len(list(out.parent.glob("r.json.part-*"))) == 3
    capsys.readouterr()
    assert evaluate(out, "--shard", "1/3", *WORDS) == 0  # a part again: nothing is left to do
    assert "part 1 of 3 is finished: 3 images" in capsys.readouterr().out
    kept = shutil.copytree(out.parent, tmp_path / "kept") / "r.json"
    csv = tmp_path / "cells.csv"
    assert evaluate(out, "--merge", *WORDS, "--csv", str(csv)) == 1
    said = capsys.readouterr()
    assert "left out: sample 1: b.png is cut short" in said.err and "depth on scenes: 7 images" in said.out
    one, joined = load(whole), load(out)
    assert joined == one and list(joined) == list(one)
    assert [row["key"] for row in one["controls"]["shuffled"]["rows"]] == ["raw/0", "raw/2", "raw/3"]
    assert one["controls"]["shuffled"]["adds"]["abs_rel"]["mean"] != 0 and len(one["cells"]) == 3
    assert pictures(out) == pictures(whole) and len(one["panels"]) == 2
    assert not list(out.parent.glob("r.json.part-*")) and csv.read_text().count("\n") == 4
    assert evaluate(out, "--shard", "1/3", *WORDS) == 1 and load(out) == one  # after joining
    assert evaluate(out, "--merge") == 1 and load(out) == one
    assert evaluate(kept, "--merge") == 1 and load(kept) == one  # settings are those of the parts
    with pytest.raises(UserError, match="--steps is 7, and the parts .* were made with 2"):
        evaluate(out, "--merge", "--steps", "7")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return tmp_path_factory.mktemp("parts")


@pytest.fixture
def parts(evaluate, two, tmp_path):
    """Two finished parts, in a folder of this test."""
    words = ["--steps", "1", "--ensemble", "1", "--batch-size", "2", "--controls", "0"]
    if not any(two.iterdir()):
        for i in (0, 1):
            evaluate(two / "r.json", *words, "--shard", f"{i}/2")
    return Path(shutil.copytree(two, tmp_path / "parts")) / "r.json", words


def head(path, **changes):
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(json.dumps({**json.loads(first), **changes}).encode() + b"\n" + rest)


def test_what_cannot_be_joined_is_said_in_one_line(evaluate, parts, tmp_path):
    def no_last_line(path):
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]) + b'{"images": [')

    def other_plan(path):
        head(path, plan={"images": 1, "members": 2})

    for number, (harm, said) in enumerate(
        (
            (lambda path: path.unlink(), "1 of 2 parts are missing .*: run --shard 1/2"),
            (no_last_line, r"part 1 of 2 .* unfinished \(2 of 3 groups of images\): run --shard 1/2 again"),
            (lambda path: head(path, part=[0, 2]), "are both part 0 of 2"),
            (lambda path: head(path, part=[0, 3]), "part 0 of 3 by its content"),
            (lambda path: shutil.copy(path, path.with_name("r.json.part-0-of-1.journal")), "are both part 1 of 2"),
            (lambda path: head(path, identity={"seed": 9}), "are of other settings .*seed"),
            (other_plan, "are of other settings .*images was 2, is 1"),
            (lambda path: head(path, journal=7), "is no journal of this version"),
            (lambda path: path.write_bytes(b"x\n" + path.read_bytes()), "is damaged"),
            (lambda path: path.write_bytes(path.read_bytes().replace(b'"described_by"', b'"x"', 1)), "no described_by"),
            (lambda path: path.write_bytes(path.read_bytes().replace(b'"identity"', b'"x"', 1)), "what it is of"),
            (lambda path: [one.unlink() for one in path.parent.glob("*.journal")], "holds no parts to join"),
        )
    ):
        out = Path(shutil.copytree(parts[0].parent, tmp_path / str(number))) / "r.json"
        harm(out.with_name("r.json.part-1-of-2.journal"))
        with pytest.raises(UserError, match=said) as caught:
            evaluate(out, "--merge")
        assert "\n" not in str(caught.value) and not out.exists()


def test_parts_of_an_earlier_version_are_joined(evaluate, parts, two, tmp_path):
    """It called the kind of a cell of constant compute `fixed`."""
    evaluate(parts[0], "--merge")
    now = load(parts[0])
    assert {cell["kind"] for cell in now["cells"]} == {"constant"}
    out = Path(shutil.copytree(two, tmp_path / "old")) / "r.json"
    path = out.with_name("r.json.part-0-of-2.journal")
    path.write_bytes(path.read_bytes().replace(b'"constant", "preset"', b'"fixed", "preset"'))
    assert b'"fixed", "preset"' in path.read_bytes()
    evaluate(out, "--merge")
    assert load(out) == now


def test_other_settings_and_a_whole_job_are_refused_beside_parts(evaluate, parts, capsys):
    out, words = parts
    (last := out.with_name("r.json.part-1-of-2.journal")).rename(out.with_name("kept"))
    for more, said in (
        (["--shard", "1/2", "--seed", "9"], "of other settings .*seed was 0, is 9"),
        (["--shard", "1/3"], "holds parts of 2"),
        (["--shard", "1/2", "--csv", "x.csv"], "--csv is made of the whole result: give it with --merge"),
        (["--shard", "1/2", "--overwrite"], "leave out --shard"),
        ([], "is a part of that result"),
    ):
        with pytest.raises(UserError, match=said):
            evaluate(out, *words, *more)
    assert not out.exists() and not last.exists()
    out.with_name("kept").rename(last)
    with locks.hold(out.with_name(f".{last.name}.lock"), "", ""):
        with pytest.raises(UserError, match="is in use by another evaluation"):
            evaluate(out, "--merge")
    for flag in ("--shard=1/2", "--merge"):
        assert main(["evaluate", "--task", "depth", "--dataset", "scenes", "--model", "mini", flag]) == 2
        assert re.search("give --json OUT", capsys.readouterr().err)
