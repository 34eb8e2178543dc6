import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import stand_ins
from PIL import Image

import scaling_perception
from scaling_perception.data import building, latents
from scaling_perception.data.latents import CacheReader
from scaling_perception.data.pipeline import flip_sample
from scaling_perception.support import locks
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import run_verb
from scaling_perception.tasks import RELEASED, TaskOptions, get_task


@pytest.fixture
def stand_in(monkeypatch):
    stand_ins.install(monkeypatch.setattr)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def encoded(pictures):
    autoencoder = stand_ins.make_autoencoder()
    return np.asarray(autoencoder.encode(autoencoder.params, np.stack(pictures))[0])


@pytest.mark.parametrize("vae", ["tiny", "logvar", "match"])
def test_cache_holds_what_tasks_and_autoencoder_make(tmp_path, stand_in, vae):
    assert stand_ins.prepare(tmp_path, "--vae", vae) == 0
    reader = CacheReader(tmp_path)
    reader.verify()
    source = stand_ins.StandIn()
    for i in (0, 5):
        for task in ("depth", "flow", "amodal"):
            for sample in get_task(task).encode(source[i], stand_ins.SIZE, TaskOptions()):
                record = reader[reader.indices(RELEASED[sample["pass_id"]])[i]]
                for view, made in ((record, sample), (record["flipped"], flip_sample(sample))):
                    prompt = made["prompt"] - made["image"] / 2 if vae == "match" and task == "flow" else made["prompt"]
                    wanted = encoded([made["image"], prompt, made["target"]])
                    for field, latent in zip(("image", "prompt", "target"), wanted, strict=True):
                        np.testing.assert_allclose(view[field], latent, atol=2e-3)
                        if vae == "logvar":
                            np.testing.assert_allclose(view[f"{field}_logvar"], latent * 2 - 5, atol=6e-3)
                    cells = made["valid"].reshape(4, 8, 4, 8).all((1, 3))
                    np.testing.assert_array_equal(view["valid"], cells)
                assert (record["key"], record["label"]) == (sample["key"], sample["label"])


def test_the_split_is_that_of_the_parts_where_none_is_given(tmp_path, stand_in):
    for part in ("1/2", "2/2"):
        assert stand_ins.prepare(tmp_path, "--split", "val", "--shard", part) == 0
    with pytest.raises(UserError, match="--split is test, and the parts in .* were made with val"):
        stand_ins.prepare(tmp_path, "--split", "test", "--merge")
    assert stand_ins.prepare(tmp_path, "--merge") == 0
    assert CacheReader(tmp_path).settings["split"] == "val"


def test_flip_turns_the_sign_of_horizontal_motion_only():
    x, y = get_task("flow").encode(stand_ins.StandIn()[0], 32, TaskOptions())
    np.testing.assert_array_equal(flip_sample(x)["target"], -x["target"][:, ::-1])
    np.testing.assert_array_equal(flip_sample(y)["target"], y["target"][:, ::-1])
    for sample in (x, y):
        for field in ("image", "prompt", "valid"):
            np.testing.assert_array_equal(flip_sample(sample)[field], sample[field][:, ::-1])
        np.testing.assert_array_equal(flip_sample(flip_sample(sample))["target"], sample["target"])


def test_finished_cache_is_verified_and_left_alone(tmp_path, stand_in, monkeypatch, capsys):
    stand_ins.prepare(tmp_path, "--flips", "none", "--tasks", "depth,amodal")
    reader = CacheReader(tmp_path)
    assert len(reader) == 16 and not reader.flipped and reader[0]["flipped"] is None
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != ".lock"}
    monkeypatch.setattr(stand_ins.StandIn, "__getitem__", None)  # nothing may be read again
    capsys.readouterr()
    assert stand_ins.prepare(tmp_path, "--flips", "none", "--tasks", "depth,amodal") == 0
    assert "already finished: 16 records" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != ".lock"}


def test_damaged_shard_is_made_again(tmp_path, stand_in, capsys):
    stand_ins.prepare(tmp_path)
    whole = files(tmp_path)
    shard = tmp_path / "latents-00001-of-00003.array_record"
    data = bytearray(whole[shard.name])
    data[3000] ^= 1
    shard.write_bytes(data)
    (tmp_path / "latents-00000-of-00003.array_record").unlink()
    assert stand_ins.prepare(tmp_path) == 0
    assert "latents-00001-of-00003.array_record does not match its checksum" in capsys.readouterr().err
    assert files(tmp_path) == whole


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda rows: rows[1].update(records=99), "has 99 records, and 12 by pass"),
        (lambda rows: rows[1]["passes"].update(depth=0, flow_x=6), "other passes than its ledger says"),
        (lambda rows: rows[1].pop("sha256"), "a shard has no sha256"),
        (lambda rows: rows.append(rows[0]), "is listed twice"),
        (lambda rows: rows.pop(), "lists 2 of 3 shards as all"),
        (lambda rows: rows.__setitem__(1, 5), "a shard has no file"),
    ],
)
def test_a_ledger_that_contradicts_its_shards_is_refused_and_mended(tmp_path, stand_in, harm, said, capsys):
    """A wrong count would say which records are of which pass, and none would be missed."""
    stand_ins.prepare(tmp_path)
    whole, path = files(tmp_path), tmp_path / "ledger.json"
    ledger = json.loads(path.read_text())
    harm(ledger["shards"])
    path.write_text(json.dumps(ledger))
    with pytest.raises(UserError, match=said):
        CacheReader(tmp_path).verify()
    assert stand_ins.prepare(tmp_path) == 0
    capsys.readouterr()
    CacheReader(tmp_path).verify()
    assert json.loads(path.read_text()) == json.loads(whole.pop("ledger.json"))
    assert {name: data for name, data in files(tmp_path).items() if name != "ledger.json"} == whole


@pytest.mark.parametrize("change", [{"shards": 5}, {"settings": {}}, {"complete": None}])
def test_a_ledger_without_its_parts_is_refused(tmp_path, stand_in, change):
    stand_ins.prepare(tmp_path, count=2)
    path = tmp_path / "ledger.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"ledger.json is damaged \(its .* not there\)"):
        stand_ins.prepare(tmp_path, count=2)
    assert files(tmp_path) == before


def test_killed_build_goes_on_and_ends_byte_identical(tmp_path, stand_in):
    stand_ins.prepare(tmp_path / "whole", "--flips", "none")
    script, out = Path(stand_ins.__file__), tmp_path / "killed"
    words = [sys.executable, str(script), "0.15", str(out), "--flips", "none"]
    env = {**os.environ, "PYTHONPATH": str(Path(scaling_perception.__file__).parent.parent)}
    process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 120
        while not any(out.glob("latents-00000*")) and time.monotonic() < limit and process.poll() is None:
            time.sleep(0.02)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not json.loads((out / "ledger.json").read_text())["complete"]
    with pytest.raises(UserError, match="unfinished"):
        CacheReader(out)
    (out / ".latents-00001-of-00003.abc.array_record").write_bytes(b"half")  # what a kill while writing leaves
    stand_ins.prepare(out, "--flips", "none")
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--vae", "other"], "autoencoder"),
        (["--flow-divisor", "40"], "task_options.flow_divisor: 75.0 there, 40.0 here"),
        (["--tasks", "depth"], "tasks"),
        (["--start", "5"], "start"),
        (["--flips", "none"], "flips"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, stand_in, words, named):
    stand_ins.prepare(tmp_path, count=2)
    before = files(tmp_path)
    with pytest.raises(UserError, match="other settings") as caught:
        stand_ins.prepare(tmp_path, *words, count=2)
    assert named in str(caught.value)
    assert files(tmp_path) == before


def test_other_settings_replace_by_wish(tmp_path, stand_in, monkeypatch):
    """The old cache is whole until the new one is; what is no part of a cache is never removed."""
    out = tmp_path / "cache"
    stand_ins.prepare(out, count=2)
    before, build = files(out), building._build
    with monkeypatch.context() as patch, pytest.raises(pytest.fail.Exception):
        patch.setattr(building, "_build", lambda *args: (build(*args), pytest.fail("killed")))
        stand_ins.prepare(out, "--tasks", "depth", "--overwrite", count=2)
    assert files(out) == before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="also holds notes.txt"):
        stand_ins.prepare(out, "--tasks", "depth", "--overwrite", count=2)
    (out / "notes.txt").unlink()
    assert stand_ins.prepare(out, "--tasks", "depth", "--overwrite", count=2) == 0
    CacheReader(out).verify()
    assert json.loads((out / "ledger.json").read_text())["settings"]["tasks"] == ["depth"]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_full_disk_tells_and_the_same_command_goes_on(tmp_path, stand_in, monkeypatch):
    stand_ins.prepare(tmp_path / "whole")
    out = tmp_path / "full"
    write, calls = latents.write_shard, []

    def write_limited(path, records):
        calls.append(path)
        if len(calls) < 2:
            return write(path, records)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # a real failure of the real writer
        try:
            write(path, records)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(latents, "write_shard", write_limited)
    with pytest.raises(UserError, match="cannot write .*latents-00001.*free space"):
        stand_ins.prepare(out)
    whole = {"latents-00000-of-00003.array_record", "latents-00000-of-00003.samples.json", "ledger.json"}
    assert set(files(out)) == whole
    monkeypatch.setattr(latents, "write_shard", write)
    assert stand_ins.prepare(out) == 0
    assert files(out) == files(tmp_path / "whole")


def test_two_at_once_are_refused(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(locks, "SAME_MACHINE", 0.0)
    with locks.hold(tmp_path / ".lock", "the first", ""):
        with pytest.raises(UserError, match="another prepare is writing .*process .* since .*choose another --out"):
            stand_ins.prepare(tmp_path)


def test_bad_samples_fail_or_are_left_out(tmp_path, monkeypatch, capsys):
    stand_ins.install(monkeypatch.setattr, bad=(4,))
    with pytest.raises(UserError, match="raw sample 4 .*--skip-bad"):
        stand_ins.prepare(tmp_path)
    assert stand_ins.prepare(tmp_path, "--skip-bad") == 0
    assert "1 bad samples left out" in capsys.readouterr().out
    reader = CacheReader(tmp_path)
    assert len(reader) == 28 and len(reader.indices("depth")) == 7
    keys = [reader[i]["key"] for i in reader.indices("flow_y")]
    assert keys == [f"stand-in/{i}" for i in (0, 1, 2, 3, 5, 6, 7)]
    assert "stand-in/4" in json.loads((tmp_path / "ledger.json").read_text())["shards"][1]["bad"][0]["reason"]


def test_what_the_machine_refuses_leaves_no_sample_out(tmp_path, stand_in, monkeypatch):
    def refuse(self, index):
        raise OSError(errno.EMFILE, "Too many open files", "depth.h5")

    monkeypatch.setattr("scaling_perception.data.manifest.RawSamples.read", refuse)
    with pytest.raises(UserError, match="cannot read raw sample 0: depth.h5: the limit of open files"):
        stand_ins.prepare(tmp_path, "--skip-bad")


def test_manifest_of_good_and_bad_samples(tmp_path, monkeypatch, capsys):
    stand_ins.install(monkeypatch.setattr, bad=(2,))
    words = ["prepare", ["scenes", "--out", str(tmp_path), "--count", "4", "--resolution", "32", "--workers", "0"]]
    assert run_verb(*words) == 1
    assert "3 good and 1 bad" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [line["ok"] for line in lines] == [True, True, False, True]
    assert "valid" in lines[2]["reason"]
    depth = [stand_ins.StandIn()[i] for i in (0, 1, 3)]
    depth = np.concatenate([raw["depth"][raw["valid"]] for raw in depth])
    summary = json.loads((tmp_path / "summary.json").read_text())
    np.testing.assert_allclose(summary["ranges"]["depth"], [depth.min(), depth.max()], rtol=1e-6)
    assert (summary["samples"], summary["good"], summary["bad"]) == (4, 3, 1)
    assert summary["sizes"] == {"32x32": 3} and summary["bad_samples"][0]["index"] == 2
    assert run_verb(words[0], [*words[1], "--skip-bad"]) == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image": np.zeros((32, 32), np.uint8)}, "image"),
        ({"image2": np.zeros((16, 32, 3), np.uint8)}, "image2"),
        ({"depth": np.full((32, 32), np.nan, np.float32)}, "not finite"),
        ({"depth": np.zeros((32, 32), np.float32)}, "above 0"),
        ({"flow": np.full((32, 32, 2), 1e9, np.float32)}, "flow reaches"),
        ({"flow": None}, "flow is absent"),
        ({"visible_mask": np.zeros((32, 32), bool)}, "visible_mask is empty"),
        ({"key": 3}, "key"),
    ],
)
def test_what_makes_a_sample_bad(change, named):
    from scaling_perception.data.manifest import check_sample

    tasks = ("depth", "flow", "amodal")
    raw = stand_ins.StandIn()[0]
    assert check_sample(raw, tasks, TaskOptions())["key"] == "stand-in/0"
    with pytest.raises(UserError, match=named):
        check_sample({**raw, **change}, tasks, TaskOptions())


def test_worker_processes_make_the_same_cache_of_files(tmp_path, monkeypatch):
    """A real data set, spawned processes, and a damaged file."""
    monkeypatch.setattr(stand_ins.autoencoders, "load_autoencoder", lambda name: stand_ins.make_autoencoder())
    rng, root = np.random.default_rng(0), tmp_path / "raw"
    for folder, name, shape in (
        ("occlusion", "occlusion", (32, 32, 3)),
        ("visible_object_mask", "visible_mask", (32, 32)),
        ("whole", "whole", (32, 32, 3)),
        ("whole_mask", "whole_mask", (32, 32)),
    ):
        (root / folder).mkdir(parents=True)
        for i in range(20):
            mask = np.zeros((32, 32), bool)
            mask[4:20, 4 : 8 + i] = True
            values = mask * 255 if len(shape) == 2 else rng.integers(0, 256, shape)
            if name == "whole":
                values[~mask] = 255
            Image.fromarray(values.astype(np.uint8)).save(root / folder / f"{i:03d}_{name}.png")
    words = ["pix2gestalt", "--raw", str(root), "--split", "all", "--out"]
    encode = ["--latents", "--resolution", "32", "--batch", "16", "--shard-size", "9"]
    for workers in ("0", "2"):
        run_verb("prepare", [*words, str(tmp_path / workers), *encode, "--workers", workers])
    assert files(tmp_path / "0") == files(tmp_path / "2")
    assert len(CacheReader(tmp_path / "2").indices("amodal")) == 20
    broken = root / "whole" / "003_whole.png"
    broken.write_bytes(broken.read_bytes()[:60])
    assert run_verb("prepare", [*words, str(tmp_path / "check"), "--workers", "0"]) == 1
    assert "003_whole" in json.loads((tmp_path / "check" / "summary.json").read_text())["bad_samples"][0]["reason"]


def test_mistakes_are_told(tmp_path, stand_in):
    for words, named in (
        (["scenery"], "did you mean 'scenes'"),
        (["scenes"], "--count"),
        (["scenes", "--count", "-1"], "--count -1"),
        (["scenes", "--count", "2", "--tasks", "dept"], "did you mean 'depth'"),
        (["hypersim", "--tasks", "flow"], "does not serve flow"),
        (["scenes", "--count", "2", "--latents", "--resolution", "33"], "multiple of 8"),
    ):
        with pytest.raises(UserError) as caught:
            run_verb("prepare", [*words, "--out", str(tmp_path), "--workers", "0"])
        assert named in str(caught.value)


@pytest.mark.parametrize("mode", [["--check"], ["--latents"]])
@pytest.mark.parametrize(
    ("raw", "out", "how"),
    [
        ("data", "data", "is the raw data"),
        ("data", "data/../data/", "is the raw data"),
        ("data", "link", "is the raw data"),
        ("link", "data/runs/cache", "lies in the raw data"),
        ("data/list.csv", "data", "contains the raw data"),
        ("data/image", "link", "contains the raw data"),
    ],
)
def test_the_raw_data_stays_as_it_is(tmp_path, monkeypatch, raw, out, how, mode):
    (tmp_path / "data" / "image").mkdir(parents=True)
    (tmp_path / "data" / "list.csv").write_text("image,depth\n")
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"^--out {out} {how}, --raw {raw}: give a folder apart from it$"):
        run_verb("prepare", ["folder", "--raw", raw, "--out", out, "--tasks", "depth", "--workers", "0", *mode])
    assert sorted(tmp_path.rglob("*")) == before


def test_options_of_the_source_are_taken_and_recorded(tmp_path, capsys):
    worlds = ["worlds", "--count", "2", "--tasks", "depth", "--resolution", "32", "--out", str(tmp_path / "out")]
    assert run_verb("prepare", [*worlds, "--option", "frames=1", "--option", "kind=wallpaper", "--workers", "0"]) == 0
    made = json.loads((tmp_path / "out/summary.json").read_text())["sources"][0]["source"]
    assert (made["frames"], made["kind"]) == (1, "wallpaper")
    for given, named in (
        (["frames=3"], "frames 3"),
        (["frame=1"], "did you mean 'frames'"),
        (["frames"], "NAME=VALUE"),
        (["frames=1", "frames=2"], "given twice"),
        (["count=3"], "give --count instead"),
    ):
        with pytest.raises(UserError, match=named):
            run_verb("prepare", [*worlds, *(word for one in given for word in ("--option", one))])
