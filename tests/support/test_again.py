"""The same command again: one rule for every file and folder that a verb writes."""

import os
from argparse import Namespace

import pytest

from scaling_perception.support.again import (
    check_output,
    differing,
    keep_folder_settings,
    refuse_other,
    replacing,
    restore_folder,
    settings_of,
    settings_there,
    swap_folder,
)
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import make_parser, run_verb

MINE = {"steps": [1, 2], "model": "a"}


def write(path, text, settings=MINE):
    with replacing(path, settings) as file:
        file.write_text(text)


def test_equal_settings_go_on_and_others_are_named(tmp_path):
    out = tmp_path / "out.csv"
    check_output(out, MINE)  # nothing is there
    out.touch()
    check_output(out, MINE)  # nothing is lost
    write(out, "1")
    check_output(out, {"steps": (1, 2), "model": "a"})
    with pytest.raises(UserError, match=r'out.csv holds another result \(--model: "a" there, "b" here\).*--overwrite'):
        check_output(out, {**MINE, "model": "b"})
    check_output(out, {**MINE, "model": "b"}, overwrite=True)
    out.write_text("somebody else's")
    with pytest.raises(UserError, match="settings are not known"):
        check_output(out, MINE)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.csv.settings", "out.csv"]


def test_differences_name_the_field():
    old = {"a": 1, "b": {"c": [1, 2]}, "sources": [{"n": 0}, {"n": {"m": 1}}], "same": 0}
    new = {"a": 2, "b": {"c": (1, 3)}, "sources": ({"n": 0}, {"n": {"m": 2}}), "same": 0}
    named = ["a: 1 there, 2 here", "b.c: [1, 2] there, [1, 3] here", "sources[1].n.m: 1 there, 2 here"]
    assert differing(old, new) == named and differing(old, old) == []
    assert differing(old, {**old, "sources": []}) == [
        'sources: [{"n": 0}, {"n": {"m": 1}}] there, [] here',
    ]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.csv").symlink_to(tmp_path / "real" / "out.csv")
    write(tmp_path / "link.csv", "1")
    check_output(tmp_path / "real" / "out.csv", MINE)
    assert settings_there(tmp_path / "link.csv") == MINE


def test_a_crash_leaves_the_old_result_with_its_settings(tmp_path, monkeypatch):
    out = tmp_path / "out.csv"
    write(out, "old")
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: pytest.fail("killed") if b == out else rename(a, b))
    with pytest.raises(pytest.fail.Exception):
        write(out, "new", {"steps": 3})
    monkeypatch.undo()
    assert out.read_text() == "old" and settings_there(out) == MINE
    with pytest.raises(RuntimeError), replacing(out, MINE) as file:
        file.write_text("half")
        raise RuntimeError
    assert out.read_text() == "old" and settings_there(out) == MINE


def test_folders(tmp_path):
    target, made = tmp_path / "model", tmp_path / ".model.partial"
    for content in ("old", "new"):
        made.mkdir()
        (made / "weights").write_text(content)
        keep_folder_settings(made, {"of": content})
        swap_folder(made, target)
        assert settings_there(target) == {"of": content} and (target / "weights").read_text() == content
    os.replace(target, tmp_path / ".model.old")  # killed between the two renamings
    restore_folder(target)
    assert settings_there(target) == {"of": "new"}
    (target / "budgets.json").write_text("{}")  # would be lost: no longer the folder of the record
    assert settings_there(target) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_settings_of_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.csv").touch()
    args = Namespace(points=["p.csv", "paper:fig8b"], json="o", x=[], seed=0, tau=None, overwrite=True)
    assert settings_of(args, ("json",), ("points",)) == {"points": [str(tmp_path / "p.csv"), "paper:fig8b"]} | {
        "seed": 0
    }


WRITERS = {
    "generate": (["--model", "mini"], "--out"),
    "fit": (["POINTS"], "--json"),
    "fit ": (["POINTS"], "--figure"),
    "compile": (["--config", "configs/mini.py", "--topology", "cpu:1"], "--json"),
    "compile ": (["--config", "configs/mini.py", "--topology", "cpu:1"], "--hlo"),
    "bench": (["moe"], "--json"),
    "report": (["EVALS"], "--out"),
    "study": (["--config", "configs/scenes_study.py", "--out", "STUDY"], "--csv"),
}


@pytest.mark.parametrize("verb", WRITERS)
def test_no_verb_replaces_what_is_not_its_own(verb, tmp_path):
    """Refused before any work, by the same words; the file stays."""
    words, flag = WRITERS[verb]
    (tmp_path / "EVALS").mkdir()
    (tmp_path / "POINTS").write_text("x,y\n1,2\n")
    words = [str(tmp_path / word) if word.isupper() else word for word in words]
    out = tmp_path / "notes.svg"
    out.write_text("mine")
    with pytest.raises(UserError, match="notes.svg holds another result.*settings are not known.*--overwrite"):
        run_verb(verb.strip(), [*words, flag, str(out)])
    assert out.read_text() == "mine"
    assert make_parser(verb.strip()).parse_args([*words, flag, str(out), "--overwrite"]).overwrite


def test_prepare_checks_into_no_other_folder(tmp_path):
    words = ["scenes", "--count", "2", "--resolution", "32", "--workers", "0", "--out", str(tmp_path / "out")]
    for _ in range(2):
        assert run_verb("prepare", words) == 0
    with pytest.raises(UserError, match="manifest.jsonl holds another result .*--count: 2 there, 3 here"):
        run_verb("prepare", [*words, "--count", "3"])
    assert run_verb("prepare", [*words, "--count", "3", "--overwrite"]) == 0


def test_the_fit_is_made_again(tmp_path):
    """End to end: equal words, other words, --overwrite."""
    (tmp_path / "p.csv").write_text("macs,abs_rel\n" + "".join(f"{10.0**i},{10.0 ** (-i / 4)}\n" for i in range(6, 13)))
    words = [str(tmp_path / "p.csv"), "--form", "power", "--bootstraps", "100", "--json", str(tmp_path / "law.json")]
    for _ in range(2):
        assert run_verb("fit", words) == 0
    with pytest.raises(UserError, match="law.json holds another result .*--seed: 0 there, 1 here"):
        run_verb("fit", [*words, "--seed", "1"])
    assert run_verb("fit", [*words, "--seed", "1", "--overwrite"]) == 0


def test_a_refusal_names_few_settings_and_short_digests():
    there, here = ({"data": {"contents": digit * 64}, **{f"x{n}": digit for n in range(9)}} for digit in "ab")
    with pytest.raises(UserError) as caught:
        refuse_other("out.json", there, here)
    line = str(caught.value)
    assert 'data.contents: "aaaaaaaaaaaa" there, "bbbbbbbbbbbb" here; x0' in line and "; and 5 more)" in line
    assert len(line) < 300
