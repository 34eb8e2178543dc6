"""How a verb becomes a command line: one parser for each verb module, and a call from inside the program."""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from scaling_perception.support.errors import UserError
from scaling_perception.support.flag_checks import check_outputs, refuse_empty
from scaling_perception.support.places import place_arguments

RENAMED = {"--first": "--members-per-round", "--step-chunk": "--steps-per-check", "--range": "--depth-range"}
"""Earlier spelling of a flag, which goes on working -> its spelling in helps and docs."""


class _Parser(argparse.ArgumentParser):
    """Argparse that answers a mistake in one line instead of the whole usage, and takes earlier spellings of flags."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words, end = list(sys.argv[1:] if args is None else args), "--"
        until = words.index(end) if end in words else len(words)
        for at, word in enumerate(words[:until]):
            flag, mark, value = word.partition("=")
            new = RENAMED.get(flag)
            if new in self._option_string_actions and flag not in self._option_string_actions:
                words[at] = new + mark + value
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def number_in(interval: str, kind: type = int) -> Callable[[str], Any]:
    """The ``type`` of a flag whose value is a finite number of ``kind`` in ``interval``, such as ``[1, inf)``."""

    def parse(text: str) -> Any:
        from scaling_perception.support.field_checks import inside, wanted
        from scaling_perception.support.fields import Field

        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not inside(interval, value):
            what = wanted(Field(kind, "", interval)).replace("a number", "a finite number")
            raise argparse.ArgumentTypeError(f"'{text}': give {what}")
        return value

    return parse


# Shared by all verbs
SEED, STEPS = number_in("[0, 4294967295]"), number_in("[1, 1000]")
COUNT, FROM_0 = number_in("[1, inf)"), number_in("[0, inf)")
MOST_MEMBERS = 10_000  # more are a slip of the keyboard, and would compute for days
MEMBERS = number_in(f"[1, {MOST_MEMBERS}]")
POSITIVE, NOT_NEGATIVE = number_in("(0, inf)", float), number_in("[0, inf)", float)


def add_mesh(parser: Any) -> None:
    """The flag of verbs that run a model which may be too large for one device."""
    what = "split weights over this machine's devices: fsdp, expert, tensor, data (default: whole on each)"
    parser.add_argument("--mesh", metavar="AXIS=N,…", help=what)


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """The flag that reaches every option of a dataset's source."""
    what = "option of the dataset; may be repeated"
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help=what)


def source_options(words: list[str]) -> dict[str, Any]:
    """Values of ``--option NAME=VALUE``, whole numbers as such.

    Raises:
        UserError: a word without a value, or a name given twice.
    """
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UserError(f"--option '{word}' has no value: write NAME=VALUE")
        if name in options:
            raise UserError(f"--option {name} is given twice: leave one out")
        options[name] = int(value) if re.fullmatch(r"-?\d{1,18}", value) else value
    return options


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


def _with_negative_values(words: list[str]) -> list[str]:
    """``--ensemble -1`` as ``--ensemble=-1``: argparse takes a negative number for a flag where a verb has a flag that
    looks like one (``-0``), and would say no more than that an argument is missing."""
    joined: list[str] = []
    for at, word in enumerate(words):
        if word == "--":
            return [*joined, *words[at:]]
        before = joined[-1] if joined else ""
        if re.match(r"-(?!0$)[\d.]", word) and before.startswith("--") and "=" not in before:
            joined[-1] = f"{before}={word}"
        else:
            joined.append(word)
    return joined


def in_flags(text: str, flags: Mapping[str, str]) -> str:
    """A message of the library, which names arguments, with the flags that set them (``FLAGS`` of a verb).

    ``eta 2.0: choose between …`` becomes ``--eta 2.0: choose between …``: a name counts where a value follows it, or
    where it is no word of English.
    """
    for name, flag in flags.items():
        value = "" if re.search("[ _]", name) else r"(?= (?:'|-?\d))"
        text = re.sub(rf"(?<![\w./'\"=-]){re.escape(name)}(?!\w){value}", flag, text)
    return text


def _as_typed(text: str, words: list[str], takes: Mapping[str, int] | None = None) -> str:
    """A message that names no flag, with the flag before the value or the field that it is about.

    ``law.json does not exist`` becomes ``--law law.json does not exist``, ``train.steps is 0`` where that was given
    ``--config.train.steps is 0``. Values count that look like a path, or with which the message begins.

    Args:
        takes: how many words each flag takes at most; what follows them is an input and no value of the flag.
    """
    if re.search(r"(?<![\w-])--\w", re.sub("`.*?`", "", text)):  # commands that mend it are no flags of this one
        return text
    flag, pairs, left = "", [], 0
    for word in words:
        if word.startswith("--config."):
            name, _, value = word.removeprefix("--config.").partition("=")
            if (unknown := f"config key '{name}'") in text:
                return text.replace(unknown, f"field --config.{name}", 1)
            field = rf"(?<![\w.'/-])(?:config\.)?{re.escape(name)}(?= (?:is|has) )"
            if re.search(field, text):
                return re.sub(field, f"--config.{name}", text, count=1)
            pairs.append((f"--config.{name}=", value))
        elif word.startswith("--"):
            flag, mark, value = word.partition("=")
            pairs += [(f"{flag}=", value)] if mark else []
            left = 0 if mark else (takes or {}).get(RENAMED.get(flag, flag), len(words))
        elif left > 0:
            left -= 1
            pairs.append((f"{flag} ", word))
            if flag == "--config" and ":" in word:
                file, _, arguments = word.partition(":")
                named = (one.partition("=") for one in arguments.split(","))
                pairs += [(f"--config {file}:{name}=", value) for name, _, value in named]
    for before, value in pairs:
        for shown, sure in ((os.path.abspath(value), True), (value, bool(re.search(r"[/.]", value)))):
            place = re.search(rf"(?<![\w./'=-]){re.escape(shown)}(?![\w/]|\.\w)", text)
            if value and place and (sure or place.start() == 0):
                return text[: place.start()] + before + value + text[place.end() :]
    return text


def _spelled(text: str, words: list[str]) -> str:
    """A message with the earlier spelling of a flag where that was typed."""
    for word in words:
        flag = word.partition("=")[0]
        text = text.replace(RENAMED[flag], flag) if flag in RENAMED else text
    return text


def _words_of_flags(parser: argparse.ArgumentParser, many: int) -> dict[str, int]:
    """How many words each flag takes at most; ``many`` for those that take any number."""
    counts: dict[Any, int] = {None: 1, "?": 1}
    return {
        flag: action.nargs if isinstance(action.nargs, int) else counts.get(action.nargs, many)
        for action in parser._actions
        for flag in action.option_strings
    }


def run_verb(verb: str, words: list[str]) -> int:
    """Run a verb with the words a person would type; returns its exit code.

    Folders of the flags in a verb's ``REMOTE`` may be written in a bucket; those in its ``OUTPUTS`` are files that it
    writes. A verb with ``split_overrides`` (``train``)
    also takes ``--config.some.key=value`` words. In messages the arguments
    that its ``FLAGS`` hold are called by their flags; a message without any gets the one that was typed.

    Raises:
        UserError: a flag or value is wrong.
    """
    module = importlib.import_module(f"scaling_perception.{verb}")
    parser = make_parser(verb)
    overrides, typed = [], list(words)
    if hasattr(module, "split_overrides"):
        words, overrides = module.split_overrides(words)
    takes = _words_of_flags(parser, len(typed))
    refuse_empty(words, {**takes, **{flag: takes[new] for flag, new in RENAMED.items() if new in takes}})
    try:
        args = parser.parse_args(_with_negative_values(words))
    except UserError as error:
        error.args = (_spelled(str(error), typed),)
        raise
    place_arguments(args, getattr(module, "REMOTE", ()))
    args.overrides = overrides
    check_outputs({f"--{name.replace('_', '-')}": getattr(args, name) for name in getattr(module, "OUTPUTS", ())})
    try:
        return module.run(args) or 0
    except UserError as error:
        named = in_flags(str(error), getattr(module, "FLAGS", {}))
        error.args = (_spelled(_as_typed(named, typed, takes), typed),)
        raise
