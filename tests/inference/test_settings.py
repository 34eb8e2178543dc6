"""Settings are declared once: keyword arguments, flags and the table of the reference page are the same."""

import dataclasses
from pathlib import Path

import pytest

from scaling_perception.inference.settings import SETTINGS, Settings, flag_of, values_of
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import make_parser

PAGE = Path(__file__).parent.parent.parent / "docs" / "reference.md"


def test_the_page_lists_what_is_declared():
    text = PAGE.read_text(encoding="utf-8")
    part = text[text.index("## What a prediction may spend") :]
    rows = [line for line in part.splitlines() if line.startswith("| `")][: len(SETTINGS)]
    assert rows == [f"| `{name}` | {one['default']} | {one['text']} |" for name, one in SETTINGS.items()]


MODEL = ("autoencoder", "dtype", "mesh", "seed", "batch_size")
REQUIRED = {"predict": ["--out", "o"], "evaluate": ["--task", "depth", "--dataset", "scenes", "--model", "m"]}


def test_predict_and_evaluate_have_the_same_flags():
    """All settings are in both verbs, with one text, default and check; `evaluate` takes several values of some."""
    parsers = {verb: make_parser(verb) for verb in REQUIRED}
    actions = {verb: {one.dest: one for one in parser._actions} for verb, parser in parsers.items()}
    for name in (*SETTINGS, *MODEL):
        predict, evaluate = actions["predict"][name], actions["evaluate"][name]
        assert predict.option_strings == evaluate.option_strings == [flag_of(name)]
        assert predict.default is None and evaluate.default is None
        assert (evaluate.help or "").replace("; several, with commas", "") == predict.help
        several = name in SETTINGS and SETTINGS[name]["swept"]
        assert (evaluate.metavar, evaluate.type) == (predict.metavar, predict.type) or several
        for value in ("-1", "0", "x", "inf") if predict.type not in (None, str) else ():
            said = []
            for verb, parser in parsers.items():
                try:
                    parser.parse_args([*REQUIRED[verb], f"{flag_of(name)}={value}"])
                except UserError as error:
                    said.append(str(error).split(" (see")[0])
            assert len(said) in (0, 2) and len(set(said)) < 2, said


def test_several_values_are_checked_one_by_one():
    args = make_parser("evaluate").parse_args([*REQUIRED["evaluate"], "--steps", "1, 2,5", "--tolerance=0.1"])
    assert [values_of(args, name) for name in ("steps", "tolerance", "ensemble", "preset")] == [
        [1, 2, 5],
        [0.1],
        [5],
        [],
    ]
    with pytest.raises(UserError, match="--steps: '1,0' has '0': give"):
        make_parser("evaluate").parse_args([*REQUIRED["evaluate"], "--steps", "1,0"])


def test_defaults_are_the_fields():
    assert {one.name: one.default for one in dataclasses.fields(Settings)}.keys() == SETTINGS.keys()
    assert Settings().to_dict()["steps"] == 10 and Settings(solver="euler").solver == "ddim"
    telling = Settings(preset="v_trailing", reduce="least-squares")
    assert telling == Settings(preset="fixed", reduce="lsq"), "one name is recorded"


@pytest.mark.parametrize("verb", REQUIRED)
def test_earlier_spellings_of_flags_go_on_working(verb, capsys):
    words = [*REQUIRED[verb], "--tolerance", "1", "--step-tolerance=1"]
    parser = make_parser(verb)
    old = parser.parse_args([*words, "--first", "3", "--step-chunk=4"])
    new = parser.parse_args([*words, "--members-per-round=3", "--steps-per-check", "4"])
    assert old == new and (old.first, old.step_chunk) == (3, 4)
    assert "--first" not in parser.format_help() and capsys.readouterr() == ("", "")
    if verb == "predict":
        assert parser.parse_args([*words, "--", "--first"]).inputs == ["--first"]
        for one in ("--range", "--depth-range"):
            assert parser.parse_args([*words, one, "1,4"]).range == "1,4"
