"""A cache made by several jobs or on several devices is, byte for byte, the one that one job makes on one device."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import stand_ins

import scaling_perception
from scaling_perception.data import building, latents
from scaling_perception.data.latents import CacheReader
from scaling_perception.models import autoencoders
from scaling_perception.support import locks
from scaling_perception.support.errors import UserError
from scaling_perception.support.parts import Part, all_parts, parse_part, refuse_elsewhere, stated_part
from scaling_perception.support.verbs import run_verb


@pytest.fixture
def stand_in(monkeypatch):
    stand_ins.install(monkeypatch.setattr)
    monkeypatch.setattr(locks, "SAME_MACHINE", 0.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A cache of three shards made in one job, and the three parts of another."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        stand_ins.install(patch.setattr)
        stand_ins.prepare(folder / "whole")
        for i in (1, 2, 3):  # numbers as an array from 1 has them
            stand_ins.prepare(folder / "parts", "--shard", f"{i}/3")
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def merge(out, *words):
    return run_verb("prepare", ["scenes", "--out", str(out), "--latents", "--merge", *words])


@pytest.fixture
def parts(whole, tmp_path):
    return Path(shutil.copytree(whole / "parts", tmp_path / "parts"))


def test_every_piece_is_in_one_part():
    for count in (0, 1, 5, 16, 17):
        for of in (1, 3, 8):
            blocks = [Part(i, of).block(count) for i in range(of)]
            assert [one for block in blocks for one in block] == list(range(count))
            assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


SLURM = {f"SLURM_ARRAY_TASK_{word}": value for word, value in zip(("MIN", "MAX", "COUNT"), "187", strict=True)}
JOB = {"JOB_COMPLETION_INDEX": "5"}


@pytest.mark.parametrize(
    ("text", "environment", "part"),
    [
        ("0/8", {}, Part(0, 8)),
        ("8/8", {}, Part(0, 8)),
        ("auto", {**SLURM, "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_ID": "8"}, Part(0, 8)),
        ("auto/8", {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "2"}, Part(3, 8)),
        ("auto/8", JOB, Part(5, 8)),
        ("3", {}, "--shard '3': give i/n"),
        ("9/8", {}, "part 9 of 8 is none"),
        ("0/0", {}, "part 0 of 0 is none"),
        ("auto/8", {"SLURM_ARRAY_TASK_ID": "x"}, "SLURM_ARRAY_TASK_ID is 'x' and no number"),
        ("auto", {**SLURM, "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MAX": "x"}, "give auto/n"),
        ("9" * 5000 + "/8", {}, "give i/n"),
        ("-1/8", {}, "--shard '-1/8': give i/n"),
        ("auto", {}, "neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX is set"),
        ("auto", JOB, "give auto/n"),
        ("auto", {**SLURM, "SLURM_ARRAY_TASK_ID": "3"}, "give auto/n"),
    ],
)
def test_which_part(text, environment, part):
    if isinstance(part, Part):
        assert parse_part(text, environment) == part
    else:
        with pytest.raises(UserError, match=re.escape(part)):
            parse_part(text, environment)


def test_three_parts_joined_are_the_cache_of_one_job(whole, parts, capsys):
    with pytest.raises(UserError, match="parts of a cache that are not joined"):
        CacheReader(parts)
    assert merge(parts) == 0
    assert "3 parts joined, 32 records in 3 shards, all checksums match" in capsys.readouterr().out
    assert files(parts) == files(whole / "whole")
    assert merge(parts) == 0 and files(parts) == files(whole / "whole")


def test_a_part_without_work_and_a_part_after_joining(tmp_path, whole, stand_in, capsys):
    for i in (3, 0, 4, 2, 1):
        stand_ins.prepare(tmp_path, "--shard", f"{i}/5")
    assert "3 shards for 5 parts" in capsys.readouterr().err
    stand_ins.prepare(tmp_path, "--shard", "4/5")
    assert "part 4 of 5 of" in (out := capsys.readouterr().out) and "already finished: 3 records" not in out
    merge(tmp_path)
    assert files(tmp_path) == files(whole / "whole")
    stand_ins.prepare(tmp_path, "--shard", "4/5")
    assert "already finished: its parts are joined" in capsys.readouterr().out
    assert files(tmp_path) == files(whole / "whole")


def test_a_part_that_is_stopped_goes_on(tmp_path, whole, stand_in, monkeypatch):
    write = latents.write_shard

    def stop(path, records):
        if "00001-of" in path.name:
            raise KeyboardInterrupt
        write(path, records)

    monkeypatch.setattr(latents, "write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        stand_ins.prepare(tmp_path, "--shard", "1/1")
    with pytest.raises(UserError, match=r"part 0 of 1 .* unfinished \(1 of 3 shards\): run --shard 0/1 again"):
        merge(tmp_path)
    with pytest.raises(UserError, match="holds parts of a cache"):  # and leaves what they are writing alone
        (tmp_path / ".latents-00001-of-00003.abc.array_record").write_bytes(b"half")
        stand_ins.prepare(tmp_path)
    assert (tmp_path / ".latents-00001-of-00003.abc.array_record").exists()
    monkeypatch.setattr(latents, "write_shard", write)
    stand_ins.prepare(tmp_path, "--shard", "1/1")
    merge(tmp_path)
    assert files(tmp_path) == files(whole / "whole")


@pytest.mark.slow  # test_a_part_that_is_stopped_goes_on, with a real kill
def test_a_killed_part_goes_on(tmp_path, stand_in):
    stand_ins.prepare(tmp_path / "whole", count=24)
    script, out = Path(stand_ins.__file__), tmp_path / "killed"
    words = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(script.parent)!r}); import stand_ins; "]
    words[-1] += f"stand_ins.install(seconds=0.1); stand_ins.prepare({str(out)!r}, '--shard', '0/2', count=24)"
    env = {**os.environ, "PYTHONPATH": str(Path(scaling_perception.__file__).parent.parent)}
    process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 120
        while not any(out.glob("latents-00001*")) and time.monotonic() < limit and process.poll() is None:
            time.sleep(0.02)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    for i in (0, 1):
        stand_ins.prepare(out, "--shard", f"{i}/2", count=24)
    merge(out)
    assert files(out) == files(tmp_path / "whole")


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


SHARD = "latents-00001-of-00003.array_record"


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda out: (out / "ledger-part-1-of-3.json").unlink(), "1 of 3 parts are missing .*: run --shard 1/3"),
        (lambda out: change(out / "ledger-part-1-of-3.json", complete=False), r"part 1 of 3 .* unfinished \(1 of 1"),
        (lambda out: change(out / "ledger-part-1-of-3.json", part=[2, 3]), "are both part 2 of 3"),
        (
            lambda out: shutil.copy(out / "ledger-part-1-of-3.json", out / "ledger-part-1-of-3 copy-of-3.json"),
            "are both part 1 of 3",
        ),
        (lambda out: change(out / "ledger-part-1-of-3.json", part=[1, 4]), "part 1 of 4 by its content"),
        (lambda out: change(out / "ledger-part-1-of-3.json", shards=[]), r"unfinished \(0 of 1 shards\)"),
        (
            lambda out: change(
                out / "ledger-part-1-of-3.json",
                shards=json.loads((out / "ledger-part-2-of-3.json").read_text())["shards"],
            ),
            "lists other shards than part 1 of 3 has",
        ),
        (lambda out: change(out / "ledger-part-1-of-3.json", entries=["x"]), "of other settings .*entries"),
        (lambda out: (out / "ledger-part-1-of-3.json").write_text('{"form'), "is not valid JSON"),
        (lambda out: (out / SHARD).unlink(), f"{SHARD} is missing: run --shard 1/3 again"),
        (lambda out: os.truncate(out / SHARD, 9000), "truncated.*: run --shard 1/3 again"),
        (lambda out: (out / SHARD).write_bytes((out / SHARD).read_bytes()[::-1]), "checksum .*: run --shard 1/3 again"),
        (lambda out: [one.unlink() for one in out.glob("ledger-part*")], "holds parts|is no latent cache|no parts"),
    ],
)
def test_what_cannot_be_joined_is_said_in_one_line(parts, harm, said):
    harm(parts)
    before = files(parts)
    with pytest.raises(UserError, match=said) as caught:
        merge(parts)
    assert "\n" not in str(caught.value)
    assert files(parts) == before


def test_parts_of_other_settings_or_numbers_are_refused_at_once(parts, stand_in):
    before = files(parts)
    (parts / "ledger-part-1-of-3.json").rename(parts.parent / "kept")
    for words, said in (
        (["--shard", "1/3", "--flips", "none"], "of other settings .*flips"),
        (["--shard", "1/3", "--vae", "other"], "of other settings .*autoencoder"),
        (["--shard", "1/2"], "holds parts of 3"),
        (["--shard", "1/3", "--overwrite"], "--overwrite replaces a whole cache"),
        (["--shard", "1/3", "--merge"], "leave out --shard"),
        ([], "holds parts of a cache"),
    ):
        with pytest.raises(UserError, match=said):
            stand_ins.prepare(parts, *words)
    shutil.copy(parts / "ledger-part-2-of-3.json", parts / "ledger-part-1-of-3.json")
    with pytest.raises(UserError, match="ledger-part-1-of-3.json is not of part 1 of 3 by its content"):
        stand_ins.prepare(parts, "--shard", "1/3")
    (parts.parent / "kept").rename(parts / "ledger-part-1-of-3.json")
    assert files(parts) == before
    change(parts / "ledger-part-1-of-3.json", shards=json.loads(before["ledger-part-2-of-3.json"])["shards"])
    stand_ins.prepare(parts, "--shard", "1/3")  # rows of another part are not this one's
    assert files(parts) == before
    for words, said in (
        (["--resolution", "64"], "--resolution is 64, and the parts .* were made with 32"),
        (["--tasks", "depth"], "--tasks is depth"),
    ):
        with pytest.raises(UserError, match=said):
            merge(parts, *words)
    with locks.hold(parts / ".part-2-of-3.lock", "", ""):
        with pytest.raises(UserError, match="another prepare is making part 2 of 3"):
            merge(parts)
        with pytest.raises(UserError, match="another prepare is making part 2 of 3"):
            stand_ins.prepare(parts, "--shard", "2/3")
    stand_ins.prepare(parts.parent / "begun", count=2)
    change(parts.parent / "begun" / "ledger.json", complete=False)
    with pytest.raises(UserError, match="begun without --shard"):
        stand_ins.prepare(parts.parent / "begun", "--shard", "0/2", count=2)
    with pytest.raises(UserError, match="--shard is for caches of latents"):
        run_verb("prepare", ["scenes", "--count", "2", "--out", str(parts.parent / "x"), "--shard", "0/2"])


def test_any_number_of_devices_makes_the_same_bytes(tmp_path, stand_in, monkeypatch):
    """The shipped autoencoder on eight devices and on one; and in bfloat16, whose error is measured."""
    tiny = autoencoders.make_tiny, autoencoders.load_part
    used, real = [], building.Encoder

    def load(name, dtype="float32"):
        config, encoder = tiny[1](autoencoders.TINY_FOLDER, "encoder")
        return tiny[0]("tiny", config, {"encoder": encoder}, dtype)

    monkeypatch.setattr(autoencoders, "load_autoencoder", load)
    monkeypatch.setattr(building, "Encoder", lambda *args: (used.append(len(args[3])), real(*args))[1])
    every = jax.local_devices()
    for count in (8, 1):
        monkeypatch.setattr(jax, "local_devices", lambda count=count: every[:count])
        stand_ins.prepare(tmp_path / str(count), "--batch", "1", "--shard-size", "4")
    assert used == [8, 1]
    assert files(tmp_path / "1") == files(tmp_path / "8")
    words = ["--batch", "1", "--shard-size", "4", "--dtype", "bfloat16"]
    with pytest.raises(UserError, match='other settings .*dtype: "absent" there, "bfloat16" here'):
        stand_ins.prepare(tmp_path / "8", *words)
    stand_ins.prepare(tmp_path / "half", *words)
    for i in (0, 1):
        stand_ins.prepare(tmp_path / "parts", *words, "--shard", f"{i}/2")
    merge(tmp_path / "parts")
    assert files(tmp_path / "parts") == files(tmp_path / "half")
    exact, half = (CacheReader(tmp_path / name) for name in ("8", "half"))
    said = json.loads((tmp_path / "half" / "ledger.json").read_text())
    rms = [shard["error"]["rms"] for shard in said["shards"]]
    first = half.indices("depth")[[0, 4]]  # its image is the first picture of each shard
    true = [np.sqrt(np.mean(np.square(half[i]["image"].astype(float) - exact[i]["image"]))) for i in first]
    np.testing.assert_allclose(rms, true, rtol=0.1)  # both are rounded to float16
    assert 0 < max(rms) < 0.1
    assert re.search(
        r"encoded in bfloat16: on the first pictures of each shard \(2 in all\) .* differ", said["precision"]
    )


def test_a_cache_in_a_bucket(tmp_path, whole, stand_in, monkeypatch, capsys):
    """In parts, one of which is stopped and goes on at another machine, whose copies are its own."""
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    store.store.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    url = "memory://bucket/latents"
    write = latents.write_shard
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            latents, "write_shard", lambda path, made: write(path, made) if "00000-of" in path.name else stop()
        )
        stand_ins.prepare(url, "--shard", "0/1")
    assert {path.rsplit("/", 1)[1] for path in store.find("/bucket/latents")} == {
        "ledger-part-0-of-1.json",
        "latents-00000-of-00003.array_record",
        "latents-00000-of-00003.samples.json",
    }
    with pytest.raises(UserError, match=rf"part 0 of 1 in {url} is unfinished \(1 of 3 shards\)"):
        merge(url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    made = []
    monkeypatch.setattr(latents, "write_shard", lambda path, rows: (made.append(path.name), write(path, rows)))
    stand_ins.prepare(url, "--shard", "0/1")
    assert len(made) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "three"))
    merge(url)
    said = capsys.readouterr().out
    assert f"part 0 of 1 of {url}: " in said and f"{url}: 1 parts joined" in said
    names = {path.rsplit("/", 1)[1]: path for path in store.find("/bucket/latents")}
    assert {name: store.cat_file(path) for name, path in names.items()} == files(whole / "whole")
    CacheReader(url).verify()
    stand_ins.prepare("memory://bucket/whole")
    found = {path.rsplit("/", 1)[1]: store.cat_file(path) for path in store.find("/bucket/whole")}
    assert found == files(whole / "whole")
    with pytest.raises(UserError, match="--overwrite replaces local folders"):
        stand_ins.prepare("memory://bucket/whole", "--overwrite")
    with pytest.raises(UserError, match="a check is written to a local folder"):
        run_verb("prepare", ["scenes", "--count", "2", "--out", "memory://bucket/check"])
    store.store.clear()


def stop():
    raise KeyboardInterrupt


@pytest.mark.parametrize("said", [None, 3, [1], [0, None], [[0], 1], [2, 2], [-1, 2], [True, 2]])
def test_files_that_do_not_say_which_part_they_are(tmp_path, said):
    assert stated_part(said) is None
    refuse_elsewhere(Part(0, 2), [said], tmp_path)
    with pytest.raises(UserError, match="does not say which part it is"):
        all_parts({"ledger": said}, tmp_path, lambda part: None)
