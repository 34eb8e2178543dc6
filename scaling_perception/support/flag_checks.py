"""What is refused of any verb's flags before its work: empty values, and outputs that are one file or no file."""

import os
from collections.abc import Mapping, Sequence

from scaling_perception.support.errors import UserError


def refuse_empty(words: Sequence[str], takes: Mapping[str, int]) -> None:
    """UserError for an empty value, such as that of a shell variable that is not set.

    Args:
        takes: how many words each flag takes at most.
    """
    flag, left = "", 0
    for at, word in enumerate(words):
        if word == "--":
            flag, left = "", 0
        elif "--" not in words[:at] and (word.startswith("--") or word in takes):
            flag, mark, value = word.partition("=")
            left = 0 if mark else takes.get(flag, len(words))
            if mark and not value.strip():
                raise UserError(f"{flag} is empty: give a value, or leave it out")
        elif not word.strip():
            raise UserError(f"{flag if left else 'an input'} is empty: give a value, or leave it out")
        else:
            left = max(left - 1, 0)


def check_outputs(outputs: Mapping[str, str | os.PathLike[str] | None]) -> None:
    """UserError where two outputs are one file, or where something lies that is no regular file.

    Args:
        outputs: flag -> path, None or empty where there is no such output.
    """
    taken: dict[str, str] = {}
    for flag, path in outputs.items():
        if not path:
            continue
        if (other := taken.setdefault(os.path.realpath(path), flag)) != flag:
            raise UserError(f"{other} and {flag} are both {path}: give two names")
        refuse_irregular(flag, path)


def refuse_irregular(flag: str, path: str | os.PathLike[str]) -> None:
    """UserError for a folder, a device or a pipe: reading one could wait for ever or never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{flag} {path}: it is there and is no regular file; choose another name")
