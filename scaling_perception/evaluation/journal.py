"""What a long evaluation has done so far, on disk, so that the same command goes on after a kill.

A journal is JSON lines: first the evaluation's identity (everything that decides a figure), then a line for each group
of images. A line is flushed to disk before the next group begins. A last line that a kill cut short is cut off.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from scaling_perception.data.contents import changes
from scaling_perception.support.errors import UserError
from scaling_perception.support.failures import explain_os
from scaling_perception.support.locks import hold
from scaling_perception.support.stopping import finished_first

_FORMAT = 1


class Journal:
    """An open journal, for a ``with``. Whoever has written the result removes the file.

    Attributes:
        plan: how the work is cut up.
        groups: what was there when it was opened.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        identity: dict[str, Any],
        plan: dict[str, Any],
        files: Mapping[str, str] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the journal at ``path``, or begin one.

        Args:
            identity: JSON values of everything that decides a figure.
            plan: how the work is cut up. A journal that is there brings its own, because figures computed in other
                batches differ in their last digits.
            files: path -> hash of the content of each file of the data, to name those that have changed.
            more: JSON values for the first line, of who joins several journals.

        Raises:
            UserError: it belongs to another evaluation, is damaged, in use, or cannot be written.
        """
        self.path = Path(path)
        self.plan = plan
        self.groups: list[dict[str, Any]] = []
        identity = json.loads(json.dumps(identity))
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as opening:
            what = f"{self.path} is in use by another evaluation"
            lock = self.path.with_name(f".{self.path.name}.lock")
            opening.enter_context(hold(lock, what, "wait for it, or choose another result"))
            try:
                self._file = opening.enter_context(open(self.path, "a+b", buffering=0))
            except OSError as error:
                raise UserError(f"cannot write {explain_os(error, self.path)}") from None
            if lines := self._read():
                self._check(lines[0], identity, dict(files or {}))
                self.plan, self.groups = lines[0]["plan"], lines[1:]
            else:
                self.append(
                    {"journal": _FORMAT, "identity": identity, "plan": plan, "files": dict(files or {}), **(more or {})}
                )
            self._closing = opening.pop_all()

    def _read(self) -> list[dict[str, Any]]:
        """The whole lines; what comes after the last of them is cut off."""
        self._file.seek(0)
        lines, size = whole_lines(self.path, self._file.read())
        self._file.truncate(size)
        return lines

    def _check(self, head: Any, identity: dict[str, Any], files: dict[str, str]) -> None:
        known = identity_of(self.path, head)
        names = [name for name in {**known, **identity} if known.get(name) != identity.get(name)]
        if names == ["data"] and head.get("files") and (found := changes(head["files"], files)):
            raise UserError(
                f"{self.path} is of an evaluation of other files ({found}): restore them, choose another result, or "
                "remove the file to start anew"
            )
        if names:
            told = other_settings(known, identity)
            raise UserError(
                f"{self.path} is of an evaluation with other settings ({told}): run that to its end, choose another "
                "result, or remove the file to start anew"
            )

    def append(self, group: dict[str, Any]) -> None:
        """Add a group of images, and wait until it is on disk.

        Raises:
            UserError: the disk is full.
        """
        data = json.dumps(group).encode() + b"\n"
        try:
            with finished_first():
                while data:  # past Python's buffer: what a full disk does not take must not fail again on closing
                    data = data[self._file.write(data) or 0 :]
                os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {explain_os(error, self.path)}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()


def whole_lines(path: Path, text: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines of a journal as far as they are whole, and how many bytes these are.

    Raises:
        UserError: a whole line is damaged.
    """
    whole = text[: text.rfind(b"\n") + 1]
    try:
        return [json.loads(line) for line in whole.splitlines()], len(whole)
    except ValueError:
        raise UserError(f"{path} is damaged: remove it to start anew") from None


def identity_of(path: Path, head: Any) -> dict[str, Any]:
    """What the first line of a journal says that it is of.

    Raises:
        UserError: it is no such line.
    """
    if not isinstance(head, dict) or head.get("journal") != _FORMAT or "plan" not in head:
        raise UserError(f"{path} is no journal of this version: remove it to start anew")
    if not isinstance(head.get("identity"), dict):
        raise UserError(f"{path} does not say what it is of: remove it to start anew")
    return head["identity"]


def other_settings(known: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """What differs between two identities, in words; ``''`` for nothing."""
    names = [name for name in {**known, **identity} if known.get(name) != identity.get(name)]
    return "; ".join(f"{name} was {_short(known.get(name))}, is {_short(identity.get(name))}" for name in names)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
