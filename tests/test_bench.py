"""The verb `bench`: what it measures is right, what it writes is complete, mistakes are one line."""

import json
import math

import pytest

from scaling_perception.cli import main
from scaling_perception.support.errors import UserError
from scaling_perception.timing import peer
from scaling_perception.timing.rounds import in_rounds

SMALL = "bench moe --tokens 64 --dim 8 --experts 4 --active 2 --repeats 2".split()


def test_moe_measures_every_dispatcher_and_how_far_it_is_from_dense(tmp_path, capsys):
    file = tmp_path / "moe.json"
    assert main([*SMALL, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["mesh"]["expert"] == 4 and found["machine"]["devices"] == 8  # so ring is there too
    assert list(found["dispatchers"]) == ["dense", "ragged", "ring"]
    assert (found["tokens"], found["kind"], found["dtype"]) == (64, "gelu", "float32")
    for name, row in found["dispatchers"].items():
        for what in ("forward", "gradient"):
            assert row[f"{what}_seconds"] > 0 and math.isfinite(row[f"{what}_ratio"])
            assert row[f"{what}_difference"] < 3e-6
            assert (row[f"{what}_difference"] == 0 and row[f"{what}_ratio"] == 1) == (name == "dense")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["dispatcher", "dense", "ragged", "ring"]


def test_functions_are_called_in_turns_each_after_an_untimed_call():
    calls = []
    found = in_rounds({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=2, warm=True)
    assert "".join(calls) == "aabb" + "bbaa"
    assert [len(found[name]["rounds"]) for name in "ab"] == [2, 2]


def test_an_installed_package_says_where_the_peer_is(monkeypatch, tmp_path):
    """A wheel holds no ``benchmarks/``."""
    monkeypatch.setattr(peer, "FOLDER", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UserError, match=r"--against torch needs benchmarks/torch_peer.py of a checkout.*in a clone"):
        peer.load("torch_peer")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["bench"], "WHAT"),
        (["bench", "mow"], "invalid choice: 'mow'"),
        (["bench", "moe", "--tokens", "many"], "invalid int value: 'many'"),
        ([*SMALL, "--repeats", "0"], "--repeats 0: give 1 or more"),
        ([*SMALL, "--active", "5"], "--active 5: a token cannot meet more than the 4 experts"),
        ([*SMALL, "--tokens", "63"], "--tokens 63 cannot be split over 8 devices"),
        ([*SMALL, "--dtype", "float16"], "invalid choice: 'float16'"),
    ],
)
def test_mistakes_are_one_line(words, told, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told in error
