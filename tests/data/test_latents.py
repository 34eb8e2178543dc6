import json
import os
import pickle

import numpy as np
import pytest
import stand_ins

from scaling_perception.data import latents
from scaling_perception.data.latents import CacheReader, decode_record, encode_record, write_shard
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import RELEASED


def make_view(rng, h=3, w=5, c=4, logvar=False):
    names = ["image", "prompt", "target"]
    names += [f"{name}_logvar" for name in names] if logvar else []
    view = {name: rng.normal(size=(h, w, c)).astype(np.float16) for name in names}
    return {**view, "valid": rng.random((h, w)) < 0.5}


@pytest.mark.parametrize("logvar", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_record_round_trip(logvar, count):
    rng = np.random.default_rng(0)
    views = [make_view(rng, logvar=logvar) for _ in range(count)]
    data = encode_record(2, -1, "a/ß", views)
    assert len(data) == 18 + 4 + count * ((6 if logvar else 3) * 3 * 5 * 4 * 2 + 2)
    back = decode_record(data)
    assert (back["pass_id"], back["label"], back["key"]) == (2, -1, "a/ß")
    for name, value in views[0].items():
        np.testing.assert_array_equal(back[name], value)
        assert back[name].dtype == value.dtype
    if count == 2:
        for name, value in views[1].items():
            np.testing.assert_array_equal(back["flipped"][name], value)
    else:
        assert back["flipped"] is None


def test_record_layout_is_as_documented():
    view = {name: np.full((1, 1, 4), i, np.float16) for i, name in enumerate(("image", "prompt", "target"))}
    data = encode_record(1, 5, "k", [{**view, "valid": np.ones((1, 1), bool)}])
    assert data[:4] == b"SPL1"
    assert data[4:8] == bytes([0, 1, 4, 0])
    assert data[8:18] == bytes([1, 0, 1, 0, 5, 0, 0, 0, 1, 0])
    assert data[18:19] == b"k"
    assert data[19:43] == np.repeat(np.arange(3), 4).astype("<f2").tobytes()
    assert data[43:] == b"\x80"


def test_records_that_are_none():
    with pytest.raises(ValueError):
        decode_record(b"SPL")
    with pytest.raises(ValueError):
        decode_record(b"XXXX" + bytes(40))
    data = encode_record(0, 0, "k", [make_view(np.random.default_rng(0))])
    with pytest.raises(ValueError):
        decode_record(data + b"x")
    with pytest.raises(ValueError):
        decode_record(data[:-3])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    stand_ins.install(monkeypatch.setattr)
    assert stand_ins.prepare(tmp_path / "cache") == 0
    return tmp_path / "cache"


def test_reader_finds_each_pass(cache):
    reader = CacheReader(cache)
    assert len(reader) == 8 * 4 and reader.shape == (4, 4, 4) and reader.flipped
    assert sorted(np.concatenate([reader.indices(name) for name in RELEASED]).tolist()) == list(range(32))
    for number, name in enumerate(RELEASED):
        records = [reader[i] for i in reader.indices(name)]
        assert [record["key"] for record in records] == [f"stand-in/{i}" for i in range(8)]
        assert {int(record["pass_id"]) for record in records} == {number}
        assert [int(record["label"]) for record in records] == list(range(7, 15))
    assert len(reader.indices("other")) == 0
    with pytest.raises(IndexError):
        reader[32]
    again = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(again[31]["target"], reader[31]["target"])
    assert again.fingerprint == reader.fingerprint
    json.dumps(reader.fingerprint)
    assert str(cache) not in json.dumps(reader.fingerprint)


def test_readers_are_bounded_by_the_limit_of_open_files(cache, monkeypatch):
    monkeypatch.setattr(latents.resource, "getrlimit", lambda _: (8, 8))
    expected = [record for shard in CacheReader(cache).everything() for record in shard]
    reader = CacheReader(cache)
    assert reader.raw(range(32)) == expected and len(latents._open_readers) == 2  # of three shards
    assert reader.raw([31, 0, 16, 0]) == [expected[i] for i in (31, 0, 16, 0)]


@pytest.mark.parametrize(
    ("text", "words"), [("Too many open files", "ulimit -n"), ("Permission denied", "ask for the permission")]
)
def test_what_the_machine_refuses_is_no_damage(cache, monkeypatch, text, words):
    from array_record.python import array_record_module

    def refuse(*_):
        raise RuntimeError(f"open() failed: {text}; opening x")

    monkeypatch.setattr(array_record_module, "ArrayRecordReader", refuse)
    with pytest.raises(UserError, match=f"^cannot read .*latents-00000.*{words}") as told:
        CacheReader(cache)[0]
    assert "damaged" not in str(told.value) and "delete" not in str(told.value)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_cache_of_another_user_is_one_line(cache):
    reader = CacheReader(cache)
    os.chmod(cache / reader.shards[0]["file"], 0)
    os.chmod(cache / "ledger.json", 0o600)
    for folder in (cache, *cache.parents):  # temporary folders are the user's own, each of them
        if folder.stat().st_mode & 0o005 != 0o005:
            os.chmod(folder, folder.stat().st_mode | 0o055)
    os.seteuid(54321)
    try:
        with pytest.raises(UserError, match="cannot read .*ledger.json: Permission denied .it is of root, mode 600"):
            CacheReader(cache)
        with pytest.raises(UserError, match="cannot read .*latents-00000.*: Permission denied"):
            reader.verify()
    finally:
        os.seteuid(0)


def test_one_flipped_bit_is_found_by_every_way_of_reading(cache):
    shard = cache / "latents-00001-of-00003.array_record"
    data = bytearray(shard.read_bytes())
    data[3000] ^= 4
    shard.write_bytes(data)
    reader = CacheReader(cache)  # opening looks at sizes only
    with pytest.raises(UserError, match="latents-00001.*checksum"):
        reader.verify()
    with pytest.raises(UserError, match="latents-00001.*checksum"):
        list(reader.everything())
    with pytest.raises(UserError, match="latents-00001.*damaged"):
        reader.raw(list(range(len(reader))))
    assert reader[0]["key"] == "stand-in/0"  # other shards still serve


def test_truncated_missing_unfinished_and_foreign(cache, tmp_path):
    shard = cache / "latents-00002-of-00003.array_record"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match="latents-00002.*truncated"):
        CacheReader(cache)
    shard.unlink()
    with pytest.raises(UserError, match="latents-00002.*missing"):
        CacheReader(cache)
    ledger = json.loads((cache / "ledger.json").read_text())
    (cache / "ledger.json").write_text(json.dumps({**ledger, "complete": False, "shards": ledger["shards"][:2]}))
    with pytest.raises(UserError, match=r"unfinished \(2 of 3"):
        CacheReader(cache)
    (cache / "ledger.json").write_text(json.dumps({**ledger, "format": 99}))
    with pytest.raises(UserError, match="format"):
        CacheReader(cache)
    with pytest.raises(UserError, match="no latent cache"):
        CacheReader(tmp_path / "nothing")


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        (tmp_path / "file").write_text("")
        write_shard(tmp_path / "file" / "x.array_record", [b"1"])
    with pytest.raises(ZeroDivisionError):
        write_shard(tmp_path / "x.array_record", (bytes(1 // 0) for _ in range(1)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
