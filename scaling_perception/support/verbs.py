"""How a verb becomes a command line: one parser for each verb module, and a call from inside the program."""

import argparse
import importlib
from typing import NoReturn

from scaling_perception.support.errors import UserError


class _Parser(argparse.ArgumentParser):
    """Argparse that answers a mistake with one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def make_parser(verb: str) -> argparse.ArgumentParser:
    """The parser of one verb, with the verb's examples below the options."""
    module = importlib.import_module(f"scaling_perception.{verb}")
    parser = _Parser(
        prog=f"scaling-perception {verb}",
        description=module.__doc__,
        epilog="examples:\n" + "\n".join(f"  {line.strip()}" for line in module.EXAMPLES.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return parser


def run_verb(verb: str, words: list[str]) -> int:
    """Run a verb with the words a person would type; returns its exit code.

    A verb with ``split_overrides`` (``train``) also takes ``--config.some.key=value`` words.

    Raises:
        UserError: a flag or value is wrong.
    """
    module = importlib.import_module(f"scaling_perception.{verb}")
    parser = make_parser(verb)
    overrides: list[str] = []
    if hasattr(module, "split_overrides"):
        words, overrides = module.split_overrides(words)
    args = parser.parse_args(words)
    args.overrides = overrides
    return module.run(args) or 0
