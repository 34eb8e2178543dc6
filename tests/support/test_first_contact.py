"""What a person sees first: warnings as notes, time that passes, a hub that does not answer."""

import sys
import time
import warnings

import pytest

from scaling_perception.cli import _warnings_as_notes
from scaling_perception.support.errors import UserError
from scaling_perception.support.hub import fetch
from scaling_perception.support.progress import waiting


def test_warnings_are_one_line_without_a_place_in_the_source(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back at the end
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    _warnings_as_notes()
    assert ".py" in warnings.formatwarning("a", UserWarning, "x.py", 3), "Python's own form for who asked for it"
    monkeypatch.setattr(sys, "warnoptions", [])
    _warnings_as_notes()
    assert warnings.formatwarning(UserWarning("two\n lines"), UserWarning, "x.py", 3) == "note: two lines\n"


def test_waiting_says_how_long(capsys):
    with waiting("compiling train", 0.02):
        time.sleep(0.07)
    first, *more = capsys.readouterr().err.splitlines()
    assert first == "compiling train …" and len(more) >= 2 and all(line == "compiling train: 0 s" for line in more)


def offline(*_, **__):
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        raise ConnectionError("[Errno -2] Name or service not known")
    except ConnectionError as error:
        raise LocalEntryNotFoundError("Got: ConnectError: [Errno -2] Name or service not known\nlong story") from error


def slow(*_, **__):
    raise TimeoutError("The read operation timed out")


def absent(*_, **__):
    from huggingface_hub.errors import RepositoryNotFoundError

    raise RepositoryNotFoundError.__new__(RepositoryNotFoundError, "404 Client Error. (Request ID: Root=1)")


@pytest.mark.parametrize(
    ("hub", "line"),
    [
        (offline, "https://huggingface.co cannot be reached"),
        (slow, "does not answer in time"),
        (absent, "no such model, or it is private"),
    ],
)
def test_a_hub_that_gives_nothing_is_one_line(monkeypatch, hub, line):
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    with pytest.raises(UserError, match="model 'a/b' .* could not be fetched") as told:
        fetch("a/b", ["*"], "model")
    text = str(told.value)
    assert line in text and "Errno" not in text and "Error" not in text and "\n" not in text
