"""Held out means held out: copies, renamed ones, overlaps and whole data sets under the name of a split."""

import json
import shutil

import pytest
import stand_ins
from small_sets import picture, write

from scaling_perception.data.overlap import shared_samples
from scaling_perception.data.pipeline import open_batches
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import run_verb


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders and caches: mine 0..5; renamed copies of 3, 4, 5; others under the same names."""
    root = tmp_path_factory.mktemp("overlap")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "xdg"))
        stand_ins.install(patch.setattr)
        for name, keys, seeds in (
            ("mine", range(6), range(6)),
            ("renamed", "abc", (3, 4, 5)),
            ("other", range(6), range(10, 16)),
        ):
            for key, seed in zip(keys, seeds, strict=True):
                write(root / name / "image" / f"{key}.png", picture(seed))
                write(root / name / "visible_mask" / f"{key}.png", picture(seed)[..., 0] // 128 * 255)
                write(root / name / "whole" / f"{key}.png", picture(50 + seed))
                write(root / name / "depth" / f"{key}.png", picture(seed)[..., 0].astype("u2") + 900)
            fixed = ["--latents", "--resolution", "32", "--shard-size", "4", "--batch", "8", "--workers", "0"]
            words = ["folder", "--raw", str(root / name), "--tasks", "depth", "--out", str(root / f"{name}.cache")]
            assert run_verb("prepare", [*words, *fixed]) == 0
    return root


def batches(place, cache="", **entry):
    if cache:
        return open_batches({"cache": str(place / cache), "flip": False}, 2, 0)
    source = {"source": "folder", "task": "depth", **entry}
    if "root" in source:
        source["root"] = str(place / source["root"])
    return open_batches({"mixture": {"x": source}, "resolution": 32}, 2, 0)


SCENES = {"source": "scenes", "task": "depth"}


@pytest.mark.parametrize(
    ("held", "trained", "names"),
    [
        ({"cache": "mine.cache"}, {"cache": "mine.cache"}, list("012345")),
        ({"cache": "renamed.cache"}, {"cache": "mine.cache"}, list("abc")),
        ({"cache": "other.cache"}, {"cache": "mine.cache"}, []),
        ({"cache": "renamed.cache"}, {"root": "mine"}, list("abc")),
        ({"root": "renamed"}, {"cache": "mine.cache"}, [f"image/{key}.png" for key in "abc"]),
        ({"root": "other"}, {"cache": "mine.cache"}, []),
        ({"root": "renamed", "task": "amodal"}, {"root": "mine"}, [f"image/{key}.png" for key in "abc"]),
        ({"root": "mine", "count": 3}, {"root": "mine", "start": 2}, ["image/2.png"]),
        (
            {**SCENES, "start": 5, "count": 4},
            {**SCENES, "start": 1, "count": 6},
            ["scene-0000000005", "scene-0000000006"],
        ),
        ({**SCENES, "start": 7, "count": 4}, {**SCENES, "start": 1, "count": 6}, []),
        ({**SCENES, "split": "val", "count": 4}, {**SCENES, "count": 6}, []),
    ],
)
def test_samples_are_their_pictures(place, monkeypatch, held, trained, names):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "xdg"))
    assert shared_samples(batches(place, **held), batches(place, **trained)) == names


def test_caches_of_before_are_compared_by_their_latents(place, tmp_path):
    for name in ("mine", "renamed", "other"):
        shutil.copytree(place / f"{name}.cache", tmp_path / name)
        for path in (tmp_path / name).glob("*.samples.json"):
            path.unlink()
    mine = batches(tmp_path, "mine")
    assert shared_samples(batches(tmp_path, "renamed"), mine) == list("abc")
    assert shared_samples(batches(place, "renamed.cache"), mine) == list("abc")
    assert shared_samples(batches(tmp_path, "other"), mine) == []


def test_a_split_of_data_that_has_none_is_refused(place, monkeypatch, capsys):
    words = ["folder", "--raw", str(place / "mine"), "--tasks", "depth", "--out", str(place / "val")]
    for split in ("val", "test"):
        with pytest.raises(UserError, match=f"mine has no splits, so that split '{split}' would be everything"):
            run_verb("prepare", [*words, "--split", split])
        with pytest.raises(UserError, match="would be everything"):
            batches(place, root="mine", split=split)
    rows = [{"image": f"image/{i}.png", "depth": f"depth/{i}.png"} for i in range(3)]
    (place / "mine" / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="would be everything"):
        batches(place, root="mine/list.jsonl", split="val")
    assert len(batches(place, root="mine/list.jsonl").opened["x"][1]) == 3
    from scaling_perception.data.sources import open_source

    assert open_source("folder", place / "mine", "val", "depth").notes == [
        f"{place / 'mine'} has no splits: split 'val' is everything"
    ]


@pytest.mark.parametrize(
    ("entry", "length"),
    [
        ({"source": "folder", "split": "train"}, 6),
        ({"count": 4}, 4),
        ({"start": 2}, 4),
        ({"start": 2, "count": 3}, 3),
        ({"source": "hypersim"}, "asks for hypersim .* holds folder: leave that out"),
        ({"split": "val"}, "asks for val .*split.* holds train"),
        ({"root": "elsewhere"}, "elsewhere does not exist"),
        ({"root": "renamed"}, "root is .*renamed, which holds other samples than .*mine.cache"),
        ({"root": "mine"}, 6),
        ({"count": 7}, "asks for 7 of depth, and .* holds 6"),
        ({"start": 4, "count": 3}, "asks for 3 from 4 on of depth, and .* holds 2"),
        ({"start": 6}, "asks for samples from 6 on of depth, and .* holds 0"),
        ({"resolution": 64}, "asks for 64 .* holds 32"),
    ],
)
def test_what_a_mixture_says_of_a_cache_is_honoured_or_refused(place, entry, length):
    data = {"cache": str(place / "mine.cache"), "flip": False, "mixture": {"x": {"task": "depth", **entry}}}
    if (place / entry.get("root", "-")).is_dir():
        data["mixture"]["x"]["root"] = str(place / entry["root"])
    if isinstance(length, str):
        with pytest.raises(UserError, match=length):
            open_batches(data, 2, 0)
        return
    found = open_batches(data, length, 0)
    keys = {key for step in range(2) for key in found.at(step)["key"]}
    assert keys == {str(i) for i in range(6)[entry.get("start", 0) :][:length]}


def test_of_several_caches_those_of_the_split_are_taken(place, tmp_path):
    shutil.copytree(place / "other.cache", tmp_path / "val")
    ledger = json.loads((tmp_path / "val" / "ledger.json").read_text())
    ledger["settings"]["split"] = "val"
    (tmp_path / "val" / "ledger.json").write_text(json.dumps(ledger))
    both = f"{place / 'mine.cache'}:{tmp_path / 'val'}"
    mixture = {"x": {"task": "depth", "split": "val", "count": 5}}
    assert open_batches({"cache": both, "flip": False, "mixture": mixture}, 2, 0).streams[0].length == 5
    mixture["x"]["start"] = 3
    mixture["x"]["count"] = 3
    found = open_batches({"cache": both, "flip": False, "mixture": mixture}, 3, 0)
    assert set(found.at(0)["key"]) == {"3", "4", "5"}
