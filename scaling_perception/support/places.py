"""Where files lie, as a person writes it: ``~`` is expanded, buckets are refused, lists are split.

Everything here reads and writes local folders (or those that are mounted). A name with a scheme, such as
``gs://bucket/x``, is therefore refused before anything is opened, and never becomes a local folder called ``gs:``.
"""

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling_perception.support.errors import UserError

CONFIG_PLACES = ("cache", "root", "init", "autoencoder", "teacher", "text_encoder")  # fields of configs, at any depth
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # gs://, s3://, and what pathlib makes of them; C:/ is a drive
_OPTION = re.compile(r"[A-Za-z][\w-]*=(?=~)|[A-Za-z][\w-]*=(?=[A-Za-z][A-Za-z0-9+.-]+://)")
_SEPARATOR = re.compile(r":(?!//|\\)")
_NO_PLACES = ("title", "overrides")  # flags that hold other words


def place(text: str, what: str) -> str:
    """``text`` with its home folder put in.

    Args:
        what: the flag or field, for the message.

    Raises:
        UserError: it has a scheme, or the home folder is not known.
    """
    if option := _OPTION.match(text):  # NAME=VALUE
        return option.group() + place(text[option.end() :], what)
    if (scheme := _SCHEME.match(text)) and not os.path.lexists(text.split(":/")[0] + ":"):
        raise UserError(
            f"{what} is {text}: {scheme.group().removesuffix('/')}// is not supported here; copy it to a local folder "
            "first, or mount it"
        )
    if not text.startswith("~"):
        return text
    found = os.path.expanduser(text)
    if found.startswith("~") and not os.path.lexists(text):
        raise UserError(f"{what} is {text}: there is no such home folder; write the whole path")
    return found


def split_places(text: str) -> list[str]:
    """The folders of ``a:b:c``. A colon before ``//`` or a backslash belongs to a scheme or drive and splits nothing,
    nor does any in the name of a folder that exists as it stands."""
    text = text.strip()
    if not text or Path(text).is_dir():
        return [text] if text else []
    return [part for part in _SEPARATOR.split(text) if part]


def place_arguments(args: argparse.Namespace) -> None:
    """Apply ``place`` to every text among a verb's arguments.

    Raises:
        UserError: as ``place``.
    """
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if name in _NO_PLACES:
            continue
        if isinstance(value, str):
            setattr(args, name, place(value, flag))
        elif isinstance(value, list) and all(isinstance(one, str) for one in value):
            setattr(args, name, [place(one, flag if name != "inputs" else "the input") for one in value])


def place_fields(config: Any, path: str = "") -> None:
    """Apply ``place`` to the fields of an unlocked config that name files; several caches stay joined by colons.

    Raises:
        UserError: as ``place``.
    """
    for name in config:
        value = config[name]
        if isinstance(value, Mapping) or hasattr(value, "to_dict"):
            place_fields(value, f"{path}{name}.")
        elif isinstance(value, str) and name in CONFIG_PLACES:
            parts = split_places(value) if name == "cache" else [value]
            config[name] = os.pathsep.join(place(part, path + name) for part in parts)
