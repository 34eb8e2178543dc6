"""A list that several jobs predict is what one job makes of it: the same files, and one index."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

pytest_plugins = ("nano", "predicting")
pytestmark = pytest.mark.usefixtures("loaded_once")

TIMES = ("seconds", "seconds_per_image", "compile_seconds", "out")


@pytest.fixture
def listed(tmp_path, make_image):
    """Seven names in a list, the last of a file that is no picture; with spaces and umlauts."""
    folder = tmp_path / "Bilder ä"
    folder.mkdir()
    names = [folder / f"b {i}.png" for i in range(7)]
    for i, name in enumerate(names):
        Image.fromarray(make_image(20 + 2 * i, 30, i)).save(name)
    names[6].write_bytes(b"no picture")
    (tmp_path / "list.txt").write_text("\n".join(map(str, names)))
    return tmp_path / "list.txt"


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def untimed(text):
    return {name: value for name, value in json.loads(text).items() if name not in TIMES}


def merge(command, *words, **more):
    return command("--task", "depth", "--merge", *words, **more)


def test_parts_joined_are_the_results_of_one_job(predict, command, listed, tmp_path, monkeypatch):
    one = untimed(predict("depth", "--list", listed, "--json", code=1, out="whole").out)
    for name, value in (("ID", "3"), ("COUNT", "3"), ("MIN", "1"), ("MAX", "3")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    for part in ("2/3", "auto", "1/3"):
        said = predict("depth", "--list", listed, "--shard", part)
        assert ("failed: " in said.err) == (part == "2/3")
    out = tmp_path / "out"
    assert {*files(out)} == {*files(tmp_path / "whole")} | {f"depth.part-{i}-of-3.json" for i in range(3)}
    kept = shutil.copytree(out, tmp_path / "kept")
    assert untimed(merge(command, "--list", listed, "--json", code=1).out) == one
    assert [file["status"] for file in one["files"]] == [*["written"] * 6, "failed"]
    index = json.loads((out / "depth.index.json").read_text())
    assert [file["name"] for file in index["files"]] == [f"b {i}" for i in range(7)]
    assert "b 6.png" in index["files"][6]["error"] and "outputs" not in index["files"][6]
    assert index["settings"]["steps"] == 2 and not list(out.glob("*part*"))
    for file in (file for file in index["files"] if "outputs" in file):
        for name in file["outputs"].values():
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        records = [
            json.loads((folder / f"{file['name']}_depth.json").read_text()) for folder in (out, tmp_path / "whole")
        ]
        commands = [[word for word in one.pop("command") if "/test_parts" not in word] for one in records]
        assert records[0] == records[1] and commands[0] == commands[1] and "--shard" not in commands[0]
    before = files(out)
    assert "already joined" in merge(command, code=1).out and files(out) == before
    assert "already joined" in predict("depth", "--list", listed, "--shard", "1/3").out and files(out) == before
    merge(command, code=1, out=kept.name)  # without inputs: those of the parts
    assert files(kept)["depth.index.json"] == before["depth.index.json"]
    predict("depth", listed.parent / "Bilder ä" / "b 0.png", "--shard", "0/2", out="few")
    predict("depth", listed.parent / "Bilder ä" / "b 0.png", "--shard", "1/2", out="few")  # one of them has no work
    assert "1 written" in merge(command, out="few").out


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_cannot_be_joined_is_said_in_one_line(predict, command, pictures, tmp_path):
    for i in (0, 1):
        predict("depth", pictures, "--shard", f"{i}/2", out="two")
    two = tmp_path / "two"
    harms = (
        (lambda path: path.unlink(), "1 of 2 parts are missing", "run --shard 1/2"),
        (lambda path: change(path, summary=None), "part 1 of 2", "is unfinished"),
        (lambda path: change(path, part=[0, 2]), "are both part 0 of 2", "remove one"),
        (lambda path: change(path, part=[1, 4]), "part 1 of 4 by its content", "restore"),
        (lambda path: change(path, settings={"seed": 9}), "are of other settings", "settings.antithetic"),
        (lambda path: change(path, summary={"files": [{"name": 3}]}), "part-1-of-2.json is damaged", "remove it"),
        (lambda path: path.write_text("{}"), "is no file of `predict --shard`", "remove it"),
        (
            lambda path: next(path.parent.glob("frame_10_depth.npy")).unlink(),
            "1 files of part 1 of 2 are gone",
            "frame_10",
        ),
        (
            lambda path: next(path.parent.glob("frame_10_depth.npy")).write_bytes(b"x"),
            "1 files of part 1 of 2",
            "no longer of the size",
        ),
        (
            lambda path: [one.unlink() for one in path.parent.glob("depth.part*")],
            "holds no parts to join",
            "--shard i/n",
        ),
    )
    for number, (harm, *told) in enumerate(harms):
        out = Path(shutil.copytree(two, tmp_path / str(number)))
        harm(out / "depth.part-1-of-2.json")
        said = merge(command, code=2, out=out.name).err
        assert all(word in said for word in told) and said.count("\n") == 1 and not (out / "depth.index.json").exists()
    for words, told in (
        (["--shard", "1/3"], "holds parts of 2"),
        (["--shard", "1/2", "--seed", "4"], "of other settings (request.seed: 0 there, 4 here"),
        (["--shard", "1/2", "--seconds", "3"], "--seconds"),
        (["--shard", "2"], "give i/n"),
        (["--shard", "1/2", "--merge"], "leave out --shard"),
    ):
        assert told in predict("depth", pictures, *words, code=2, out="two").err
    for words, told in (
        (["--seed", "7"], "--seed is 7, and the parts"),
        ([pictures / "frame_1.png"], "of other inputs"),
    ):
        assert told in merge(command, *words, code=2, out="two").err
    assert {path.name for path in two.glob("depth.part*")} == {"depth.part-0-of-2.json", "depth.part-1-of-2.json"}
