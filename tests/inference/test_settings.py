"""Settings are declared once: keyword arguments, flags and the table of the reference page are the same."""

import dataclasses
from pathlib import Path

import pytest

from scaling_perception.inference.settings import SETTINGS, Settings, flag_of
from scaling_perception.support.verbs import make_parser

PAGE = Path(__file__).parent.parent.parent / "docs" / "reference.md"


def test_the_page_lists_what_is_declared():
    text = PAGE.read_text(encoding="utf-8")
    part = text[text.index("## What a prediction may spend") :]
    rows = [line for line in part.splitlines() if line.startswith("| `")][: len(SETTINGS)]
    assert rows == [f"| `{name}` | {one['default']} | {one['text']} |" for name, one in SETTINGS.items()]


@pytest.mark.parametrize("verb", ["predict", "evaluate"])
def test_flags_are_the_settings(verb):
    known = {word: action for action in make_parser(verb)._actions for word in action.option_strings}
    missing = [name for name in SETTINGS if flag_of(name) not in known]
    assert missing == ([] if verb == "predict" else ["spacing", "eta", "clip", "antithetic", "aspect"])
    for name, one in SETTINGS.items():
        if flag_of(name) in known:
            assert one["text"] in (known[flag_of(name)].help or "")


def test_defaults_are_the_fields():
    assert {one.name: one.default for one in dataclasses.fields(Settings)}.keys() == SETTINGS.keys()
    assert Settings().to_dict()["steps"] == 10 and Settings(solver="euler").solver == "ddim"
