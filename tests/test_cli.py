"""The command line: help without heavy imports, one line and exit 2 for a user's mistake."""

import subprocess
import sys

import pytest

from scaling_perception.cli import VERBS, main
from scaling_perception.support.verbs import make_parser


def test_overview_names_every_verb(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_options_and_examples(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text and f"scaling-perception {verb}" in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_example_parses(verb):
    import importlib
    import shlex

    module = importlib.import_module(f"scaling_perception.{verb}")
    lines = [line.strip() for line in module.EXAMPLES.strip().splitlines() if line.strip()]
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[:2] == ["scaling-perception", verb], line
        rest = words[2:]
        if hasattr(module, "split_overrides"):
            rest, _ = module.split_overrides(rest)
        make_parser(verb).parse_args(rest)


def test_unknown_verb_is_one_line_with_a_suggestion(capsys):
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "did you mean 'train'" in error


def test_unknown_flag_is_one_line(capsys):
    assert main(["doctor", "--jsn"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--jsn" in error


def test_help_is_instant_because_jax_is_not_imported():
    code = (
        "import sys\n"
        "from scaling_perception.cli import VERBS\n"
        "from scaling_perception.support.verbs import make_parser\n"
        "for verb in VERBS: make_parser(verb)\n"
        "assert 'jax' not in sys.modules and 'tensorflow' not in sys.modules, 'heavy import while showing help'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_module_form_runs():
    done = subprocess.run([sys.executable, "-m", "scaling_perception", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("scaling-perception ")
