"""Places as a person writes them: home folders, buckets, lists with colons."""

import argparse

import pytest

from scaling_perception.cli import main
from scaling_perception.support.configs import load_config
from scaling_perception.support.errors import UserError
from scaling_perception.support.places import place, place_arguments, split_places


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("a:b", ["a", "b"]),
        ("/a:/b:", ["/a", "/b"]),
        ("gs://bucket/a:s3://other/b:/c", ["gs://bucket/a", "s3://other/b", "/c"]),
        (r"C:\caches\a", [r"C:\caches\a"]),
        ("has:colon", ["has:colon"]),
    ],
)
def test_lists_are_split_at_colons_that_separate(text, parts, home):
    (home / "has:colon").mkdir()
    assert split_places(text) == parts


def test_home_is_put_in_and_other_texts_stay(home):
    assert place("~/x", "--out") == f"{home}/x" and place("split_file=~/l", "--option") == f"split_file={home}/l"
    for text in ("a/~", "runs/x", "XL/2", "madebyollin/taesd", "12:30", "mine.py:cache=a:/b", r"C:\x", "fov=60"):
        assert place(text, "--out") == text
    with pytest.raises(UserError, match="--out is ~nobody-here/x: there is no such home folder"):
        place("~nobody-here/x", "--out")


@pytest.mark.parametrize(
    "text", ["gs://b/x", "s3://b", "hf://m", "https://x.org/a.jpg", "file:///a", "gs:/b", "root=s3://b"]
)
def test_buckets_are_refused_at_once(text):
    with pytest.raises(UserError, match="--x is .*not supported here; copy it to a local folder first"):
        place_arguments(argparse.Namespace(x=text))
    with pytest.raises(UserError, match="the input is"):
        place_arguments(argparse.Namespace(inputs=["a.png", text]))


@pytest.mark.parametrize("field", ["data.cache", "held_out.cache", "init", "autoencoder", "text_encoder"])
def test_fields_of_configs(field, home):
    *tables, last = field.split(".")

    def value(text):
        config = load_config("configs/depth.py:model=a1", [f"{field}={text}"])
        return config[tables[0]][last] if tables else config[last]

    assert value("~/x") == f"{home}/x"
    if last == "cache":
        assert value("~/x:/y:~/z") == f"{home}/x:/y:{home}/z"
    with pytest.raises(UserError, match=f"{field} is gs://b/y: gs:// is not supported here"):
        value("gs://b/y")


def test_roots_of_a_mixture(home):
    assert load_config("configs/depth.py:model=a1,root=~/h").data.mixture.depth.root == f"{home}/h"


VERBS = [
    ["prepare", "scenes", "--out", "gs://b/x"],
    ["train", "--config", "configs/mini.py", "--workdir", "s3://b/x"],
    ["predict", "--task", "depth", "--out", "gs://b", "a.png"],
    ["evaluate", "--task", "depth", "--dataset", "scenes", "--model", "mini", "--json", "gs://b/x.json"],
    ["convert", "gs://b/m.pt", "m"],
    ["report", "gs://b/runs"],
]


@pytest.mark.parametrize("words", VERBS)
def test_no_verb_makes_a_folder_called_as_a_scheme(words, home, capsys):
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "not supported here" in told and len(told.splitlines()) == 1 and not list(home.iterdir())
