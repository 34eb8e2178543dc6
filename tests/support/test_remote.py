"""Folders in a bucket, in the place of which stands fsspec's memory: copied once, again where they changed."""

import argparse
import collections
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from scaling_perception.cli import main
from scaling_perception.data.latents import CacheReader, encode_record, pass_table, sha256, write_shard
from scaling_perception.data.sources import open_source
from scaling_perception.interop.find import find_model
from scaling_perception.support import remote
from scaling_perception.support.configs import load_config
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import write_json
from scaling_perception.support.places import place_arguments

pytest_plugins = ("nano",)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty store; counts what is copied from it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    found = fsspec.filesystem("memory")
    found.store.clear()
    copied, get = [], type(found).get_file
    monkeypatch.setattr(
        type(found), "get_file", lambda self, name, *to, **more: (copied.append(name), get(self, name, *to, **more))[1]
    )
    found.copied = copied
    yield found
    found.store.clear()


def put(store, folder, name="bucket/data"):
    store.put(f"{folder}/", f"/{name}/", recursive=True)
    return f"memory://{name}"


def make_cache(folder, key="a"):
    """A cache of two records, by hand."""
    view = {name: np.full((4, 4, 4), 0.5, np.float16) for name in ("image", "prompt", "target")}
    view["valid"] = np.ones((4, 4), bool)
    shard = folder / "latents-00000-of-00001.array_record"
    folder.mkdir()
    write_shard(shard, [encode_record(0, -1, f"{key}{i}", [view]) for i in range(2)])
    row = {"file": shard.name, "records": 2, "passes": {"depth": 2}, "bytes": shard.stat().st_size}
    settings = {"latent": [4, 4, 4], "flips": "none", "shards": 1, "resolution": 32}
    rows = [{**row, "sha256": sha256(shard), "bad": []}]
    write_json(
        folder / "ledger.json",
        {"format": 1, "settings": settings, "passes": pass_table(), "complete": True, "shards": rows},
    )
    return folder


def test_a_cache_is_copied_once_and_again_where_it_changed(tmp_path, store):
    made = make_cache(tmp_path / "cache")
    url = put(store, made)
    reader = CacheReader(url)
    reader.verify()
    assert reader[1]["key"] == "a1" and len(store.copied) == 2
    CacheReader(f"{url}/").verify()
    assert len(store.copied) == 2
    shutil.rmtree(made)
    make_cache(made, "other")
    store.rm("/bucket/data", recursive=True)
    (made / "ledger.json").rename(tmp_path / "later")
    put(store, made)
    with pytest.raises(UserError, match="is no latent cache"):  # what is gone there goes here
        CacheReader(url)
    shutil.copy(tmp_path / "later", made / "ledger.json")
    put(store, made)
    assert CacheReader(url)[0]["key"] == "other0"
    shard = next(CacheReader(url).path.glob("latents*"))
    shard.write_bytes(shard.read_bytes()[:-5])  # the copy is damaged
    CacheReader(url).verify()
    store.pipe_file("/bucket/data/latents-00000-of-00001.array_record", b"cut short")
    with pytest.raises(UserError, match="has 9 bytes instead of .*truncated"):
        CacheReader(url)


def test_a_copy_that_was_stopped_goes_on(tmp_path, store, monkeypatch):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(20):
        (folder / f"ä {i}.bin").write_bytes(bytes([i]) * 100)
    url, copied = put(store, folder), type(store).get_file

    def fail(self, name, target, **more):
        if name.endswith("7.bin"):
            raise ConnectionError("the line is dead\nand more")
        copied(self, name, target, **more)

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="ConnectionError: the line is dead.*same command"),
    ):
        patch.setattr(type(store), "get_file", fail)
        remote.local(url)
    store.copied.clear()
    found = remote.local(url)
    assert len(store.copied) < 20 and len(collections.Counter(store.copied)) == len(store.copied)
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == sorted(p.name for p in _files(found))
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in _files(found))


def _files(found):
    return [path for path in Path(found).rglob("*") if path.is_file() and path.name != ".copied.jsonl"]


def test_models_and_raw_data(tmp_path, store, nano_folder, capsys):
    url = put(store, nano_folder, "b/nano")
    assert (find_model(url) / "config.json").read_bytes() == (nano_folder / "config.json").read_bytes()
    raw = tmp_path / "raw"
    for name in ("occlusion", "visible_object_mask", "whole", "whole_mask"):
        (raw / name).mkdir(parents=True)
        kind = {"visible_object_mask": "visible_mask"}.get(name, name)
        shape = (32, 32) if "mask" in name else (32, 32, 3)
        Image.fromarray(np.full(shape, 255, np.uint8)).save(raw / name / f"0_{kind}.png")
    url = put(store, raw, "b/raw")
    there, here = (open_source("pix2gestalt", root, "all", "amodal")[0] for root in (url, raw))
    np.testing.assert_array_equal(there["whole"], here["whole"])
    words = ["prepare", "pix2gestalt", "--raw", url, "--split", "all", "--workers", "0", "--out", str(tmp_path / "out")]
    assert main(words) == 0 and "1 good" in capsys.readouterr().out


def test_what_cannot_be_read_is_said_in_one_line(tmp_path, store, monkeypatch):
    store.pipe_file("/b/file.bin", b"x")
    for url, told in (("memory://b/none", "holds nothing"), ("memory://b/file.bin", "is a file: give the folder")):
        with pytest.raises(UserError, match=told):
            remote.local(url)
    for url in ("memory://", "memory:///", "memory://.."):
        with pytest.raises(UserError, match="names no folder"):
            remote.local(url)
        with pytest.raises(UserError, match="names no folder"):
            remote.WorkingCopy(url)
    store.pipe_file("/long/" + "x" * 300, b"x")
    with pytest.raises(UserError, match="cannot copy memory://long/x.*too long"):
        remote.local("memory://long")
    store.pipe_file("/index/.copied.jsonl", b"1\n")
    store.pipe_file("/index/a", b"x")
    assert [path.name for path in Path(remote.local("memory://index")).iterdir() if path.name[0] != "."] == ["a"]
    assert (Path(remote.local("memory://index")) / "a").read_bytes() == b"x"
    usage = collections.namedtuple("usage", "total used free")(10, 10, 0)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="needs 1e-09 GB more and .* has 0 GB free"):
        patch.setattr(shutil, "disk_usage", lambda place: usage)
        remote.local("memory://b")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="raw is gs://b/x: gs:// .* or install gcsfs"):
        patch.setattr(remote.importlib.util, "find_spec", lambda name: None)
        place_arguments(argparse.Namespace(raw="gs://b/x"))
    for name in ("out", "json", "workdir", "list", "write_budgets"):  # written, or files
        with pytest.raises(UserError, match="memory:// is not supported here"):
            place_arguments(argparse.Namespace(**{name: "memory://b"}))
    config = load_config("configs/depth.py:model=a1", ["data.cache=memory://b/x:/y"])
    assert config.data.cache == "memory://b/x:/y"
    with pytest.raises(UserError, match="data.cache is memory://b: memory:// is not supported here"):
        load_config("configs/tiny_vae.py", ["data.cache=memory://b"])
