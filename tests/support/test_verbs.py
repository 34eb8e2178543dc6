"""Numbers on command lines: one set of types, one line for what is wrong."""

import pytest

from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import number_in, run_verb

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
        (EVALUATE, "--steps", ("-1", "0", "1,x")),
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
