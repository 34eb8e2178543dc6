"""Every command of every page is one that its verb takes, and no page trains twice into one folder."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from scaling_perception.cli import VERBS
from scaling_perception.support.verbs import make_parser

DOCS = Path(__file__).parent.parent / "docs"


def commands(page):
    """The words of each command of a page that stands in a block of its own."""
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if line.strip().startswith("scaling-perception ") and not re.search(r"[\[…|;]|\bVERB\b|\.\.\.", line):
            yield shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_every_command_of_a_page_parses_and_trains_into_its_own_folder(page):
    trained = {}
    for verb, *words in commands(page):
        assert verb in VERBS, verb
        split = getattr(importlib.import_module(f"scaling_perception.{verb}"), "split_overrides", None)
        words, overrides = split(words) if split else (words, [])
        if verb == "convert" and words[0].isupper():
            continue  # the usage
        args = make_parser(verb).parse_args(words)
        if verb == "train" and args.workdir and not args.dry_run:
            before = trained.setdefault(args.workdir, (args.config, overrides))
            assert before == (args.config, overrides), f"{args.workdir} is of another run of this page"
