"""Numbers on command lines: one set of types, one line for what is wrong."""

import pytest

from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import in_flags, number_in, run_verb

EVALUATE = ("evaluate", "--task", "depth", "--dataset", "scenes", "--model", "mini", "--json", "x")
COMPILE, PREDICT = ("compile", "--config", "c", "--topology", "t"), ("predict", "x", "--task", "depth", "--out", "o")
GENERATE = ("generate", "--model", "m", "--out", "o")


@pytest.mark.parametrize(
    ("words", "flag", "values"),
    [
        (EVALUATE, "--batch-size", ("-1", "0", "1.5", "many")),
        (EVALUATE, "--first", ("0",)),
        (EVALUATE, "--step-chunk", ("-2",)),
        (EVALUATE, "--panels", ("-1",)),
        (EVALUATE, "--seed", ("-1", "4294967296")),
        (EVALUATE, "--steps", ("-1", "0", "1,x", "1,2000")),
        (EVALUATE, "--ensemble", ("-1", "0")),
        (EVALUATE, "--count", ("-1",)),
        (COMPILE, "--steps", ("0", "1001")),
        (COMPILE, "--ensemble", ("-1",)),
        (GENERATE, "--guidance", ("nan", "inf", "-1")),
        (GENERATE, "--steps", ("0",)),
        (PREDICT, "--batch-size", ("0",)),
        (PREDICT, "--seconds", ("0", "nan")),
        (PREDICT, "--eta", ("inf",)),
        (PREDICT, "--clip", ("0", "nan")),
        (("prepare", "scenes", "--out", "o"), "--flow-divisor", ("0", "nan")),
        (("prepare", "scenes", "--out", "o"), "--batch", ("0",)),
        (("bench", "sample"), "--peak", ("0", "inf")),
        (("bench", "train"), "--cores", ("0",)),
        (("quickstart",), "--scenes", ("0",)),
    ],
)  # fmt: skip
def test_wrong_numbers_are_refused_and_named(words, flag, values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in values:
        with pytest.raises(UserError, match=flag) as refusal:
            run_verb(words[0], [*words[1:], f"{flag}={value}"])
        assert "\n" not in str(refusal.value) and value in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_numbers_at_the_ends_are_taken():
    assert number_in("[1, 1000]")("1000") == 1000 and number_in("(0, 1]", float)("1") == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*PREDICT, "--eta", "2"), "--eta 2.0: choose between"),
        ((*PREDICT, "--solver", "magic"), "unknown --solver 'magic'"),
        ((*PREDICT, "--aspect", "crop"), "unknown --aspect 'crop'"),
        ((*PREDICT, "--step-tolerance", "0.1", "--eta", "1"), "--step-tolerance goes with .*: --eta 0"),
        ((*PREDICT, "--step-tolerance", "0.1", "--steps", "4"), "--step-tolerance needs two looks .* 4 steps have 1"),
        ((*PREDICT, "--first", "3"), "--first goes with --tolerance"),
        ((*PREDICT, "--step-chunk", "3"), "--step-chunk goes with --step-tolerance"),
        ((*EVALUATE, "--reduce", "mode"), "--reduce 'mode' is no way to merge depth members"),
        (("evaluate", "--task", "generation", "--dataset", "textures", "--model", "mini"), "--task generation has no"),
        (("evaluate", "--task", "depth", "--dataset", "nyuv2", "--model", "mini"), "nyuv2 needs --data: the folder"),
        (("evaluate", "--task", "depth", "--dataset", "nyu", "--model", "mini"), "unknown --dataset 'nyu'"),
        (("prepare", "folder", "--out", "o", "--tasks", "depth"), "folder needs --raw: the folder"),
        (("prepare", "scenes", "--out", "o", "--count", "2", "--split", "x"), "scenes have no split 'x'"),
    ],
)  # fmt: skip
def test_messages_name_flags(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").touch()
    with pytest.raises(UserError, match=message):
        run_verb(words[0], list(words[1:]))


def test_names_are_flags_where_a_value_follows():
    flags = {"steps": "--steps", "eta": "--eta", "step_chunk": "--step-chunk", "a root": "--data"}
    assert in_flags("eta 1 with 4 steps, see runs/eta 1 and step_chunk", flags) == (
        "--eta 1 with 4 steps, see runs/eta 1 and --step-chunk"
    )
    assert in_flags("--steps 3: steps '3'; it needs a root", flags) == "--steps 3: --steps '3'; it needs --data"
