"""The cache, the run and the journal are of these files: a rewrite that keeps names and sizes does not pass."""

import json
import os
import shutil
import time

import numpy as np
import pytest
import stand_ins
from pfm import write_pfm
from small_sets import H, W, picture, write, write_flow

from scaling_perception.data import contents, latents
from scaling_perception.data.latents import CacheReader
from scaling_perception.data.pipeline import open_batches
from scaling_perception.data.sources import open_source
from scaling_perception.evaluation.journal import Journal
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import run_verb
from scaling_perception.training.identity import LATER, as_json, keep_table, same_run


@pytest.fixture(autouse=True)
def own_index(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def depth(i, offset=0.0):
    return (1 + offset + np.random.default_rng(i).random((H, W))).astype(np.float32)


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "mine"
    for i in range(6):
        write(root / "image" / f"{i}.png", picture(i))
        write_flow(root / "flow" / f"{i}.flo", i)
        write(root / "image2" / f"{i}.png", picture(100 + i))
        (root / "depth").mkdir(exist_ok=True)
        np.save(root / "depth" / f"{i}.npy", depth(i))
    return root


def settle(root, age=100.0):
    """Let the files look older than the clock's tick, so that their hashes are remembered."""
    for path in root.rglob("*"):
        os.utime(path, (time.time() - age,) * 2)


def prepare(root, out, task="depth", *words):
    fixed = ["--latents", "--resolution", "32", "--shard-size", "2", "--batch", "8", "--workers", "0"]
    return run_verb("prepare", ["folder", "--raw", str(root), "--tasks", task, "--out", str(out), *fixed, *words])


@pytest.fixture
def stand_in(monkeypatch):
    stand_ins.install(monkeypatch.setattr)


def rewrite(root, kind, i):
    """Another content of the same size; the path below the root."""
    if kind == "flow":
        write_flow(root / "flow" / f"{i}.flo", 50 + i)
        return f"flow/{i}.flo"
    if kind == "npy":
        np.save(root / "depth" / f"{i}.npy", depth(i, 2.9))
        return f"depth/{i}.npy"
    write_pfm(root / "depth" / f"{i}.pfm", depth(i, 2.9))
    return f"depth/{i}.pfm"


@pytest.mark.parametrize("kind", ["npy", "pfm", "flow"])
def test_only_the_shards_of_changed_files_are_made_again(data, tmp_path, stand_in, capsys, kind):
    if kind == "pfm":
        for i in range(6):
            (data / "depth" / f"{i}.npy").unlink()
            write_pfm(data / "depth" / f"{i}.pfm", depth(i))
    settle(data)
    task, out = "flow" if kind == "flow" else "depth", tmp_path / "cache"
    assert prepare(data, out, task) == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    path = data / rewrite(data, kind, 3)
    os.utime(path, (time.time() - 100,) * 2)  # not even the time of the change gives it away
    capsys.readouterr()
    assert prepare(data, out, task) == 0
    told = capsys.readouterr()
    assert f"1 changed ({path.relative_to(data)})" in told.err and "already finished" not in told.out
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    assert [name for name in before if before[name] != after[name]] == ["latents-00001-of-00003.array_record"]
    prepare(data, tmp_path / "fresh", task)
    for name in after:
        assert (out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    capsys.readouterr()
    assert prepare(data, out, task) == 0 and "already finished" in capsys.readouterr().out
    for one in data.rglob("*.*"):  # written anew with what it held, and elsewhere: nothing has changed
        one.write_bytes(one.read_bytes())
    shutil.copytree(data, tmp_path / "moved")
    assert prepare(tmp_path / "moved", out, task) == 0 and "already finished" in capsys.readouterr().out
    (data / "image" / "9.png").write_bytes(b"")
    write(data / "image" / "9.png", picture(9))
    for field in {"flow": ("flow", "image2"), "npy": ("depth",), "pfm": ("depth",)}[kind]:
        one = next((data / field).iterdir())
        shutil.copy(one, one.with_stem("9"))
    with pytest.raises(UserError, match=r"cache of other samples|other settings"):
        prepare(data, out, task)


def test_caches_of_before_are_kept_where_no_file_is_newer(data, tmp_path, stand_in, capsys):
    settle(data)
    out = tmp_path / "cache"
    prepare(data, out)
    ledger = json.loads((out / "ledger.json").read_text())
    fingerprint = open_source("folder", data, "train", "depth").fingerprint()
    del ledger["entries"], fingerprint["entries"]
    ledger["settings"]["sources"][0]["source"] = fingerprint
    for shard in ledger["shards"]:
        del shard["contents"]
    (out / "ledger.json").write_text(json.dumps(ledger))
    for path in out.glob("*.samples.json"):
        path.unlink()
    known = CacheReader(out).fingerprint
    shutil.copytree(out, tmp_path / "second")
    assert prepare(data, out) == 0 and "already finished" in capsys.readouterr().out
    assert CacheReader(out).fingerprint == known  # what was trained on it may go on
    rewrite(data, "npy", 0)
    assert prepare(data, out) == 0 and "1 changed (depth/0.npy)" in capsys.readouterr().err
    assert prepare(data, tmp_path / "second") == 0
    assert "00000-of-00003.array_record is older than 1 of its files (depth/0.npy)" in capsys.readouterr().err


def test_hashes_are_computed_once_but_not_believed_within_a_tick(data, monkeypatch):
    opened = []
    digest = contents.hashlib.file_digest
    monkeypatch.setattr(
        contents.hashlib, "file_digest", lambda file, name: opened.append(file.name) or digest(file, name)
    )
    paths = ["depth/0.npy", "depth/1.npy"]
    first = contents.digests(data, paths)
    assert contents.digests(data, paths) == first and len(opened) == 4  # too young to be believed
    stamp, later = contents._stamp, time.time() + 10
    monkeypatch.setattr(contents.time, "time", lambda: later)
    assert contents.digests(data, paths) == first and len(opened) == 6
    assert contents.digests(data, paths) == first and len(opened) == 6
    np.save(data / "depth" / "1.npy", depth(1, 1.0))
    second = contents.digests(data, paths)
    assert len(opened) == 7 and second["depth/1.npy"] != first["depth/1.npy"]
    assert contents.changes(first, second) == "1 changed (depth/1.npy)"
    assert stamp(str(data / "depth" / "1.npy"))[0] == (data / "depth" / "1.npy").stat().st_size
    for index in (data.parent / "xdg").rglob("*.json"):
        index.write_text("{damaged")
    assert contents.digests(data, paths) == second
    with pytest.raises(UserError, match="lost.npy cannot be read"):
        contents.digests(data, ["lost.npy"])


def test_a_run_and_a_journal_name_the_file_that_changed(data, tmp_path):
    mixture = {"depth": {"source": "folder", "root": str(data), "task": "depth"}}

    def now():
        batches = open_batches({"mixture": mixture, "resolution": 16}, 2, 0)
        return as_json({"config": LATER, "data": batches.fingerprint, "meta": {}}), batches.files

    saved, files = now()
    keep_table(tmp_path, files)
    same_run(saved, *now()[:1], tmp_path, now()[1])
    with Journal(tmp_path / "j", {"data": saved["data"]}, {}, files):
        pass
    old = json.loads(json.dumps(saved))
    for name in ("contents", "entries"):
        del old["data"]["sources"][0]["source"][name]
    name = rewrite(data, "npy", 4)
    changed, held = now()
    same_run(old, changed, tmp_path, held)  # saved before contents were hashed: names and sizes
    with pytest.raises(UserError, match=rf"cannot resume .*: 1 changed \(depth/{name}\); restore them"):
        same_run(saved, changed, tmp_path, held)
    with pytest.raises(UserError, match=rf"other files \(1 changed \(depth/{name}\)\)"):
        Journal(tmp_path / "j", {"data": changed["data"]}, {}, held)
    (tmp_path / "files.json").unlink()
    with pytest.raises(UserError, match="data sources.depth.source.contents was"):
        same_run(saved, changed, tmp_path, held)


def test_files_outside_of_the_chosen_range_do_not_count(data):
    entry = {"source": "folder", "root": str(data), "task": "depth", "count": 2, "start": 1}

    def taken():
        return open_batches({"mixture": {"depth": entry}, "resolution": 16}, 2, 0).fingerprint

    before = taken()
    rewrite(data, "npy", 4)
    assert taken() == before
    rewrite(data, "npy", 2)
    assert taken() != before


def test_a_shard_and_its_description_are_written_together(data, tmp_path, stand_in):
    settle(data)
    prepare(data, tmp_path / "cache")
    described = json.loads((tmp_path / "cache" / "latents-00001-of-00003.samples.json").read_text())
    assert [row[0] for row in described["samples"]] == ["2", "3"]
    assert {row[2] for row in described["samples"]} == {described["files"][f"image/{i}.png"] for i in (2, 3)}
    shard = latents.read_ledger(tmp_path / "cache")["shards"][1]
    assert shard["contents"] == contents.combined(described["files"])
