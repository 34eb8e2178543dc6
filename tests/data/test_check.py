"""`prepare --check`: counts beside those published, every corrupt file counted, and going on after a kill anywhere."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from raw_sets import make_hypersim, make_nyu, make_sens, make_vkitti, write_frame
from small_sets import H, W, picture, write, write_flow
from test_benchmarks import write_diode, write_kitti, write_kitti_pair
from test_cocoa import write_cocoa, write_mp3d
from test_sources import make_chairs, make_pix2gestalt
from test_sources import make_hypersim as make_marigold

from scaling_perception.data import check, manifest
from scaling_perception.data.formats import write_png16
from scaling_perception.support import locks
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import run_verb


def prepare(name, root, out, *words):
    return run_verb("prepare", [name, "--raw", str(root), "--out", str(out), "--check", "--workers", "0", *words])


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def results(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name in ("manifest.jsonl", "summary.json")}


def make_folder(root, count=8):
    for number in range(count):
        write(root / "image" / f"{number:02d}.png", picture(number))
        write_png16_of(root, number)
    return root


def write_png16_of(root, number, seed=0):
    (root / "depth").mkdir(exist_ok=True)
    values = np.random.default_rng(100 * seed + number).integers(500, 9000, (H, W))
    write_png16(root / "depth" / f"{number:02d}.png", values.astype(np.uint16))


def make_diode(root):
    for number, kind in enumerate(("indoors", "outdoor")):
        write_diode(root, f"val/{kind}", number)


def make_eth3d(root):
    write(root / "pipes" / "images" / "dslr_images" / "DSC_1.JPG", picture(0))
    truth = root / "pipes" / "ground_truth_depth" / "dslr_images" / "DSC_1.JPG"
    truth.parent.mkdir(parents=True)
    truth.write_bytes(np.linspace(0.5, 40, H * W, dtype="<f4").tobytes())


def make_sintel(root):
    for frame in (1, 2, 3):
        write(root / "training" / "clean" / "alley_1" / f"frame_{frame:04d}.png", picture(frame))
        if frame < 3:
            write_flow(root / "training" / "flow" / "alley_1" / f"frame_{frame:04d}.flo", frame)


def make_kitti_flow(root):
    write_kitti_pair(root / "training", "image_2")


FOLDER = ("--tasks", "depth")


@pytest.mark.parametrize(
    ("name", "make", "split", "good", "known"),
    [
        ("hypersim", make_hypersim, "train", 2, "53,885 samples of hypersim (train); 2 are here, 53,883 are not here"),
        ("hypersim", make_marigold, "train", 3, "53,885 samples of hypersim (train); 3 are here"),
        ("vkitti2", make_vkitti, "all", 4, "42,520 samples of vkitti2 (all); 4 are here"),
        ("nyuv2", make_nyu, "test", 2, "654 samples of nyuv2 (test); 2 are here"),
        ("scannet", make_sens, "val", 3, "800 samples of scannet (val); 3 are here"),
        ("diode", make_diode, "val", 2, "771 samples of diode (val); 2 are here, 769 are not here"),
        ("eth3d", make_eth3d, "val", 1, "454 samples of eth3d (val); 1 are here"),
        ("sintel", make_sintel, "val", 2, "1,041 samples of sintel (val); 2 are here"),
        ("kitti_flow", make_kitti_flow, "val", 1, "200 or 194 samples of kitti_flow (val); 1 are here"),
        ("coco_amodal", write_cocoa, "val", 2, "12,753 samples of coco_amodal (val); 3 are here"),
        ("mp3d_amodal", write_mp3d, "test", 1, ""),
        ("flying_chairs", make_chairs, "val", 2, "640 samples of flying_chairs (val); 2 are here"),
        ("pix2gestalt", make_pix2gestalt, "all", 3, ""),
    ],
)
def test_every_raw_format_is_checked(tmp_path, capsys, name, make, split, good, known):
    if name in ("hypersim", "nyuv2"):
        pytest.importorskip("h5py")
    make(tmp_path / "raw")
    assert prepare(name, tmp_path / "raw", tmp_path / "out", "--split", split) == 0
    text = capsys.readouterr().out
    assert f"{good} good and 0 bad samples" in text
    assert ("published: " in text) == bool(known) and known in text
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.endswith(".part")] == []
    assert summary_of(tmp_path / "out")["good"] == good


@pytest.mark.parametrize(
    ("name", "count", "split"),
    [
        ("hypersim", "", "train"),
        ("flying_chairs", "", "val"),
        ("pix2gestalt", "", "all"),
        ("nyuv2", 1, "val"),
        ("kitti_depth", 1, "val"),
        ("icl_nuim", 6, "val"),
        ("tum_rgbd", 1, "val"),
        ("coco_amodal", 32, "val"),
        ("sintel", 1, "val"),
        ("middlebury_flow", 2, "val"),
    ],
)
def test_real_samples_are_checked(tmp_path, shared_dir, name, count, split):
    assert prepare(name, shared_dir / "data" / name, tmp_path, "--split", split) == 0
    found = summary_of(tmp_path)
    assert found["bad"] == found["left_out"] == 0 and found["good"] >= (count or 1)


def test_the_eigen_list_is_checked(tmp_path, capsys):
    (tmp_path / "eigen.txt").write_text("\n".join(write_kitti(tmp_path)))
    assert prepare("kitti_depth", tmp_path, f"{tmp_path}-out", "--option", "list=eigen.txt") == 1
    text = capsys.readouterr().out
    assert "1 of 3 images have no ground truth and are left out" in text
    assert "652 samples of kitti_depth (val); 2 are here, 650 are not here" in text
    assert "bad sample 0: " in text and "in every valid pixel" in text  # of these maps


def test_numbers_beside_those_published():
    def line(found, *numbers):
        return check.published_line(
            {"dataset": "x", "split": "val", "published": {"samples": list(numbers), "found": found}}
        )

    assert line(654, 654) == "published: 654 samples of x (val); all of them are here"
    assert line(653, 654).endswith("653 are here, 1 are not here") and line(656, 654).endswith("2 more than that")
    assert line(194, 200, 194) == "published: 200 or 194 samples of x (val); all of them are here"
    assert check.published_line({"dataset": "folder"}) == ""
    table = {("hypersim", "train"): 53885, ("hypersim", "val"): 7370, ("hypersim", "test"): 7682}
    table |= {("flying_chairs", "train"): 22232, ("flying_chairs", "val"): 640, ("nyuv2", "test"): 654}
    table |= {("kitti_depth", "val"): 652, ("eth3d", "val"): 454, ("scannet", "val"): 800, ("diode", "val"): 771}
    assert {key: check.published(*key) for key in table} == {key: [count] for key, count in table.items()}


def test_all_damage_is_counted_and_the_first_ten_are_named(tmp_path, capsys):
    root = make_folder(tmp_path / "raw with ü and space", 15)
    for number in range(9):
        path = root / "depth" / f"{number:02d}.png"
        path.write_bytes(path.read_bytes()[: 20 + 4 * number])
    (root / "depth" / "09.png").write_bytes(b"")
    (root / "depth" / "10.png").unlink()
    (root / "depth" / "10.png").symlink_to("10.png")
    write_png16(root / "depth" / "11.png", np.zeros((H, W), np.uint16))
    assert prepare("folder", root, tmp_path / "out", *FOLDER) == 1
    text = capsys.readouterr().out
    assert "3 good and 12 bad samples" in text and "… and 2 more" in text
    named = [line for line in text.splitlines() if line.startswith("bad sample")]
    assert len(named) == 10 and all(f"{number:02d}.png" in line for number, line in enumerate(named))
    assert summary_of(tmp_path / "out")["bad"] == 12
    assert prepare("folder", root, tmp_path / "out", *FOLDER, "--skip-bad") == 0
    with pytest.raises(UserError, match="09.png is empty|10.png is missing"):  # nothing else takes them
        run_verb("prepare", ["folder", "--raw", str(root), "--out", str(tmp_path / "c"), "--latents", *FOLDER])


def test_frames_without_use_are_left_out_and_counted(tmp_path, capsys, monkeypatch):
    pytest.importorskip("h5py")
    colour, distance, entity = make_hypersim(tmp_path / "raw")
    write_frame(tmp_path / "raw", "ai_001_001", "cam_00", 0, colour, distance, np.full_like(entity, -1))
    assert prepare("hypersim", tmp_path / "raw", tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert "1 good and 0 bad samples, 1 left out" in text and "left out sample 0: " in text
    assert "1 of 3 frames are not in the public release and are left out" in text
    import stand_ins

    monkeypatch.setattr(stand_ins.autoencoders, "load_autoencoder", lambda name: stand_ins.make_autoencoder())
    words = ["--out", str(tmp_path / "c"), "--latents", "--resolution", "32", "--workers", "0"]
    assert run_verb("prepare", ["hypersim", "--raw", str(tmp_path / "raw"), *words]) == 0
    assert "1 bad samples left out" in capsys.readouterr().out


# Going on


@pytest.fixture
def begun(tmp_path):
    """A folder, what a whole check of it writes, and what it had kept just before its end."""
    root, whole = make_folder(tmp_path / "raw"), tmp_path / "whole"
    kept = []

    def remember(self):
        yield from lines(self)
        kept.append((whole / check.PART).read_bytes())

    lines = check._Part.lines
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check._Part, "lines", remember)
        prepare("folder", root, whole, *FOLDER)
    return root, whole, kept[0]


def test_a_kill_at_any_byte_ends_in_the_same_result(begun, tmp_path, monkeypatch, capsys):
    root, whole, kept = begun
    out, reads = tmp_path / "out", []
    read = manifest.RawSamples.read
    monkeypatch.setattr(manifest.RawSamples, "read", lambda self, index: reads.append(index) or read(self, index))
    first = kept.index(b"\n") + 1
    for place in (0, 1, first - 1, first, *range(first + 1, len(kept), 97), len(kept) - 1, len(kept)):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / check.PART).write_bytes(kept[:place])
        left = [
            ".manifest.x1y2.jsonl",
            ".summary.x1y2.json",
            "..manifest.jsonl.x1y2.settings",
        ]  # as `atomic_path` names
        for name in left:
            (out / name).write_bytes(b"half")
        reads.clear()
        prepare("folder", root, out, *FOLDER)
        assert results(out) == results(whole)
        done = kept[first:place].count(b"\n") if place >= first else 0
        assert reads == list(range(done, 8))
        assert ("going on: " in capsys.readouterr().err) == (done > 0)
        assert not any((out / name).exists() for name in (check.PART, *left))


def test_files_that_changed_meanwhile_are_checked_again(begun, tmp_path, monkeypatch, capsys):
    root, _, kept = begun
    out = tmp_path / "out"
    out.mkdir()
    (out / check.PART).write_bytes(kept)
    (root / "depth" / "03.png").write_bytes(b"no longer a picture")
    assert prepare("folder", root, out, *FOLDER) == 1
    assert "7 good and 1 bad" in capsys.readouterr().out  # another size: another data set, so all anew
    write_png16_of(root, 3)
    (out / check.PART).write_bytes(kept)
    os.utime(root / "depth" / "03.png", (1, 1))
    reads, read = [], manifest.RawSamples.read
    monkeypatch.setattr(manifest.RawSamples, "read", lambda self, index: reads.append(index) or read(self, index))
    assert prepare("folder", root, out, *FOLDER) == 0 and reads == [3]


def test_other_settings_are_refused_and_replaced_by_wish(begun, tmp_path):
    root, whole, kept = begun
    before = results(whole)
    with pytest.raises(UserError, match="manifest.jsonl holds another result .--count: 0 there, 3 here"):
        prepare("folder", root, whole, *FOLDER, "--count", "3")
    assert results(whole) == before
    out = tmp_path / "out"
    out.mkdir()
    (out / check.PART).write_bytes(kept[:-20])
    with pytest.raises(UserError, match="a check that was begun. holds another result .--count"):
        prepare("folder", root, out, *FOLDER, "--count", "3")
    assert (out / check.PART).read_bytes() == kept[:-20]
    assert prepare("folder", root, out, *FOLDER, "--count", "3", "--overwrite") == 0
    assert summary_of(out)["samples"] == 3


def test_a_full_disk_loses_nothing(begun, tmp_path):
    root, whole, kept = begun
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) - 300, hard))  # a real failure of the real writer
    try:
        with pytest.raises(UserError, match="cannot write .*part"):
            prepare("folder", root, out, *FOLDER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not results(out) and (out / check.PART).stat().st_size == len(kept) - 300
    assert prepare("folder", root, out, *FOLDER) == 0 and results(out) == results(whole)


def test_one_at_a_time_and_where_nothing_can_be_written(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "raw", 1)
    monkeypatch.setattr(locks, "SAME_MACHINE", 0.0)
    with locks.hold(tmp_path / "out" / ".lock", "the first", ""):
        with pytest.raises(UserError, match="another prepare is writing .*choose another --out"):
            prepare("folder", root, tmp_path / "out", *FOLDER)
    with pytest.raises(UserError, match="cannot write /proc/out"):
        prepare("folder", root, "/proc/out", *FOLDER)

    def refuse(self, index):
        raise OSError(errno.EMFILE, "Too many open files", "a.png")

    monkeypatch.setattr(manifest.RawSamples, "read", refuse)
    with pytest.raises(UserError, match="cannot read raw sample 0: a.png: the limit of open files"):
        prepare("folder", root, tmp_path / "out", *FOLDER)  # no reason to call a sample bad


def test_flags_of_a_check(tmp_path, monkeypatch, capsys):
    root = make_folder(tmp_path / "raw", 2)
    with pytest.raises(UserError, match="--check and --latents: give one of them"):
        prepare("folder", root, tmp_path / "out", "--latents")
    with pytest.raises(UserError, match="--out is missing"):
        run_verb("prepare", ["folder", "--raw", str(root)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run_verb("prepare", ["folder", "--raw", str(root), *FOLDER, "--check", "--workers", "0"]) == 0
    (made,) = (tmp_path / "cache" / "scaling-perception" / "checks").iterdir()
    assert f"see {made / 'manifest.jsonl'}" in capsys.readouterr().out and len(results(made)) == 2
    # without --check it is the same command
    assert run_verb("prepare", ["folder", "--raw", str(root), *FOLDER, "--out", str(made), "--workers", "0"]) == 0


def test_a_kill_at_any_write_leaves_nothing_behind(begun, tmp_path, monkeypatch):
    """Whatever stands in the folder before each renaming of a file is what a kill there leaves."""
    root, whole, _ = begun
    seen, replace = [], os.replace

    def remember(source, target):
        shutil.copytree(tmp_path / "one", tmp_path / str(len(seen)))
        seen.append(str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", remember)
    prepare("folder", root, tmp_path / "one", *FOLDER)
    monkeypatch.undo()
    assert sum(name.startswith(str(tmp_path / "one")) for name in seen) >= 4
    names = {path.name for path in (tmp_path / "one").iterdir()}
    for number in range(len(seen)):
        (tmp_path / str(number) / ".lock").unlink(missing_ok=True)
        prepare("folder", root, tmp_path / str(number), *FOLDER)
        assert results(tmp_path / str(number)) == results(whole)
        assert {path.name for path in (tmp_path / str(number)).iterdir()} == names


def test_worker_processes_find_the_same(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "raw", 20)
    (root / "depth" / "07.png").write_bytes(b"")
    for workers in ("0", "2"):
        assert prepare("folder", root, tmp_path / workers, *FOLDER, "--workers", workers) == 1
    assert results(tmp_path / "0") == results(tmp_path / "2")


KILLED = """
import sys, time
from scaling_perception.data import manifest
from scaling_perception.support.verbs import run_verb
real = manifest.check_sample
manifest.check_sample = lambda *args: (time.sleep(0.05), real(*args))[1]
sys.exit(run_verb("prepare", sys.argv[1:]))
"""


def test_a_killed_process_goes_on_and_ends_byte_identical(tmp_path):
    root, out = make_folder(tmp_path / "raw", 30), tmp_path / "out"
    prepare("folder", root, tmp_path / "whole", *FOLDER)
    words = ["folder", "--raw", str(root), "--out", str(out), "--check", "--workers", "0", *FOLDER]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *words], stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < limit:
            if (out / check.PART).exists() and (out / check.PART).read_bytes().count(b"\n") > 4:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert (out / check.PART).read_bytes().count(b"\n") < 31 and not results(out)
    assert prepare("folder", root, out, *FOLDER) == 0
    assert results(out) == results(tmp_path / "whole")
