"""The user's mistakes, told in one line."""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """The user's input is wrong. The message names the file, field or flag, what is wrong, and how to mend it.

    The command line prints the message alone and exits with ``code``.
    """

    code = 2


def short(value: Any, most: int = 60) -> str:
    """``repr`` of a value on one line of at most ``most`` characters, for messages."""
    return " ".join(repr(value).split())[:most]


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """A suffix such as ``; did you mean 'depth'? Known: amodal, depth, flow`` for an unknown ``word``."""
    known = sorted(str(option) for option in options)
    lowered = {option.lower(): option for option in known}  # Uniform and XL/2 are near uniform and xl/2
    near = difflib.get_close_matches(str(word).lower(), lowered, n=1, cutoff=0.5)
    hint = f"; did you mean '{lowered[near[0]]}'?" if near else ";"
    return f"{hint} known: {', '.join(known)}"
