"""Where files lie, as a person writes it: ``~`` is expanded, buckets are refused, lists are split.

What is written goes to local folders (or those that are mounted). A name with a scheme, such as ``gs://bucket/x``, is
therefore refused before anything is opened, and never becomes a local folder called ``gs:``. Folders of data and of
models, which are only read, may lie in a bucket (``support.remote``).
"""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling_perception.support.errors import UserError
from scaling_perception.support.remote import PACKAGES, is_remote

CONFIG_PLACES = ("cache", "root", "init", "autoencoder", "teacher", "text_encoder")  # fields of configs, at any depth
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # gs://, s3://, and what pathlib makes of them; C:/ is a drive
_OPTION = re.compile(r"[A-Za-z][\w-]*=(?=~)|[A-Za-z][\w-]*=(?=[A-Za-z][A-Za-z0-9+.-]+://)")
_SEPARATOR = re.compile(r":(?!//|\\)")
_NO_PLACES = ("title", "overrides")  # flags that hold other words
_READ = ("raw", "data", "model", "vae", "cache", "root", "init", "autoencoder")  # flags and fields of folders to read


def place(text: str, what: str, read: bool = False) -> str:
    """``text`` with its home folder put in.

    Args:
        what: the flag or field, for the message. read: a folder that is only read, and may lie in a bucket.

    Raises:
        UserError: it has a scheme that is not read here, or the home folder is not known.
    """
    if read and is_remote(text):
        return text
    if option := _OPTION.match(text):  # NAME=VALUE
        return option.group() + place(text[option.end() :], what)
    if (scheme := _SCHEME.match(text)) and not os.path.lexists(text.split(":/")[0] + ":"):
        name = scheme.group().removesuffix(":/")
        package = PACKAGES.get(name)
        install = f", or install {package} (pip install {package})" if read and package else ""
        raise UserError(
            f"{what} is {text}: {name}:// is not supported here; copy it to a local folder first, or mount it{install}"
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


def place_arguments(args: argparse.Namespace, written: Sequence[str] = ()) -> None:
    """Apply ``place`` to every text among a verb's arguments.

    Args:
        written: names of flags whose folders may lie in a bucket although they are written.

    Raises:
        UserError: as ``place``.
    """
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if name in _NO_PLACES:
            continue
        if isinstance(value, str):
            setattr(args, name, place(value, flag, name in (*_READ, *written)))
        elif isinstance(value, list) and all(isinstance(one, str) for one in value):
            setattr(args, name, [place(one, flag if name != "inputs" else "the input") for one in value])


def place_fields(config: Any, path: str = "", remote: bool | None = None) -> None:
    """Apply ``place`` to the fields of an unlocked config that name files; several caches stay joined by colons.

    Args:
        remote: whether folders to read may lie in a bucket; None: where the objective only reads them.

    Raises:
        UserError: as ``place``.
    """
    if remote is None:  # the bank of an autoencoder is written, too
        remote = config.get("objective", "") in ("diffusion", "one_step")
    for name in config:
        value = config[name]
        if isinstance(value, Mapping) or hasattr(value, "to_dict"):
            place_fields(value, f"{path}{name}.", remote)
        elif isinstance(value, str) and name in CONFIG_PLACES:
            parts = split_places(value) if name == "cache" else [value]
            config[name] = os.pathsep.join(place(part, path + name, bool(remote) and name in _READ) for part in parts)
