"""Every command of every page: one that its verb takes, on files that are there by then; and all of them, run in order.

The run is at a small size: `trial` puts few steps and samples in place of many. What needs data, weights or machines
that are not here is counted by its reason.
"""

import collections
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pages import PAGES, ROOT, commands, is_known, lines, made_by, own, taken_by
from PIL import Image

from scaling_perception.data.formats import write_png16
from scaling_perception.interop.find import find_model


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_parses_and_finds_its_files(page):
    yours, before, trained, unknown, used = own(page), [], {}, [], set()
    for command in commands(page):
        taken = [name.rstrip("/") for name in taken_by(command)]
        unknown += [f"{name}: {command.line}" for name in taken if not is_known(name, before, yours)]
        used |= {mine for mine in yours for name in taken if name == mine or name.startswith(f"{mine}/")}
        before += made_by(command)
        if command.verb == "train" and command.args.workdir and not command.args.dry_run:
            run = (command.args.config, command.overrides)
            assert trained.setdefault(command.args.workdir, run) == run, f"{command.line}: of another run of this page"
    assert not unknown, "files that no earlier command makes and that the page does not call yours: " + "; ".join(
        unknown
    )
    assert used == yours, f"no command takes {yours - used}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_columns_of_tables_have_titles_of_their_own(page):
    text = page.read_text(encoding="utf-8")
    for head in re.findall(r"^(\|.*)\n\|[-| :]+\n", text, re.MULTILINE):
        titles = [title.strip() for title in head.strip("|").split("|") if title.strip()]
        assert len(set(titles)) == len(titles), head


# ---- Run -------------------------------------------------------------------------------------------------------------

ELSEWHERE = {
    r"^(pip|git|sbatch|\$)": "another program, or a refusal",
    r"quickstart|doctor": "tests/test_quickstart.py, tests/test_doctor.py",
    r"compile ": "tests/test_compile.py: minutes a command",
    r"launch/(tpu|gke)": "tests/test_launch.py: a cloud",
    r"SRC DST|\bVERB\b|\w\|\w|…": "usage",
    r"--(compare|collect|write)|runs/\S*study\.csv": "the results of a study of hours",
    r"stabilityai/": "weights from the hub",
    r"\b(DATA|CACHES|DIR|TASK|NAME|SHARED|FILE\.py)\b|/data/": "a data set, or a name to fill in",
}


def trial(line):
    """The same command at a small size."""
    if (" train " in line or " -- --config" in line) and "--dry-run" not in line:
        line = re.sub(r"--kills \d+", "--kills 1", line)
        small = {"steps": 2, "log_every": 1, "checkpoint_every": 2}
        small |= {"validate_every": 2, "validate_samples": 16} if "validate_every" in line else {}
        small |= {"check_replicas": 1} if "check_replicas" in line else {}
        line = re.sub(rf" --config\.train\.({'|'.join(small)})=\S+", "", line)
        line += "".join(f" --config.train.{name}={value}" for name, value in small.items())
    if " evaluate " in line:
        line = re.sub(r"--steps \S+", "--steps 1,2", re.sub(r"--ensemble \S+", "--ensemble 1,2", line))
        line = re.sub(r"--count \d+", "--count 2", line)
    if " prepare " in line:
        line = re.sub(r"--count \d+", "--count 16", line) + " --workers 0"
    if " predict " in line and not re.search("--(steps|budget|macs|seconds|repeat)", line):
        line = line.replace(" predict ", " predict --steps 1 --ensemble 2 ")
    if " predict " in line and "flow" in line and "clip.mp4" in line:
        line = line.replace(" predict ", " predict --end 3 ")
    if " fit " in line and "docs/studies" not in line and "paper:" not in line:
        line += " --bootstraps 100"
    return line + (" --dry-run" if " study " in line and "--dry-run" not in line else "")


def picture(path, seed, size=(48, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)


def of_predict(folder):
    names = ("photo.jpg", "first.png", "second.png", "photos/a.jpg", "photos/b.jpg", "more/c.png")
    for seed, name in enumerate((*names, "dataset/a/d.jpg", "dataset/e.jpg", "frames/1.png", "frames/2.png")):
        picture(folder / name, seed)
    picture(folder / "large.jpg", 99, (260, 200))
    mask = np.zeros((40, 48), np.uint8)
    mask[10:30, 10:30] = 255
    (folder / "masks").mkdir()
    for name in ("a", "b"):
        Image.fromarray(mask).save(folder / "masks" / f"{name}_mask.png")
    (folder / "photos.txt").write_text("photo.jpg\nphotos/b.jpg\n")
    points = "image,x,y,depth\n" + "".join(
        f"{name},{x},{y},{1 + x / 20}\n"
        for name in ("photo.jpg", "a.jpg", "b.jpg")
        for x, y in ((3, 4), (20, 9), (31, 30), (45, 20), (12, 33))
    )
    (folder / "points.csv").write_text(points)
    shutil.copytree(find_model("mini"), folder / "models" / "mine")
    av = pytest.importorskip("av")
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(112):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def of_own_data(folder):
    draw = np.random.default_rng(0)
    for number in range(12):
        picture(folder / "pairs" / "image" / f"{number}.png", 100 + number)
        (folder / "pairs" / "depth").mkdir(exist_ok=True)
        write_png16(folder / "pairs" / "depth" / f"{number}.png", draw.integers(500, 9000, (40, 48)).astype(np.uint16))
    for split, count in (("train", 6), ("val", 4)):
        for number in range(count):
            picture(folder / "mydata" / split / "image" / f"{number}.png", 10 * count + number)
            (folder / "mydata" / split / "depth").mkdir(exist_ok=True)
            depth = draw.integers(500, 9000, (40, 48)).astype(np.uint16)
            write_png16(folder / "mydata" / split / "depth" / f"{number}.png", depth)


def of_laws(folder):
    x, draw = np.logspace(9, 14, 24), np.random.default_rng(0)
    y = (x**-0.1 + 0.05) * np.exp(draw.normal(0, 0.01, 24))
    rows = "".join(f"{a},{b},r{i % 3}\n" for i, (a, b) in enumerate(zip(x, y, strict=True)))
    (folder / "points.csv").write_text("macs,absrel,run\n" + rows)
    sizes = [(n, d) for n in np.logspace(7, 10, 5) for d in np.logspace(9, 11, 5)]
    rows = "".join(f"{n},{d},{1.7 + 400 / n**0.34 + 410 / d**0.28}\n" for n, d in sizes)
    (folder / "runs.csv").write_text("params,tokens,loss\n" + rows)


def of_convert(folder):
    shutil.copytree(find_model("mini"), folder / "models" / "mine")


YOURS = {"predict": of_predict, "own_data": of_own_data, "laws": of_laws, "plan": of_laws, "convert": of_convert}
YOURS["README"] = YOURS["index"] = lambda folder: picture(folder / "photo.jpg", 0)


def of_tutorial(folder):
    of_own_data(folder)
    picture(folder / "photo.jpg", 0)


YOURS["tutorial"] = of_tutorial


@pytest.mark.slow
@pytest.mark.timeout(1800)  # predict.md: 5 minutes on two busy cores
@pytest.mark.parametrize("page", [page for page in PAGES if any(lines(page))], ids=lambda page: page.stem)
def test_every_command_of_a_page_runs_in_order(page, tmp_path, tmp_path_factory):
    YOURS.get(page.stem, lambda folder: None)(tmp_path)
    (tmp_path / "docs").mkdir()
    for name in ("docs/studies", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = tmp_path_factory.getbasetemp() / "programs"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(programs), "PATH": path, "t": "flow"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # one device, as the reader has; quick to compile
    left, ran = collections.Counter(), 0
    for line in lines(page):
        reason = next((reason for pattern, reason in ELSEWHERE.items() if re.search(pattern, line)), "")
        lacking = re.findall(
            r"(?:\s|=)((?:runs|models)/[\w./-]+|[\w.-]+\.(?:pt|json)|taesd|stable-diffusion-2)(?=[\s,:])", line
        )
        lacking += re.findall(r"report (\S+)", line)
        made = re.findall(r"--(?:workdir|out|json|csv|per-image|html|figure)\s+(\S+)", line)
        made += re.findall(r"convert \S+ (\S+)", line)
        lacking = [name for name in lacking if name not in made and not (tmp_path / name).exists()]
        if reason or (lacking and "for t in" not in line):
            left[reason or "a file of a command that was left out, or of yours"] += 1
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", trial(line)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{trial(line)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr, done.stderr
        ran += 1
    print(f"{page.stem}: {ran} run, left out {dict(left)}")
    assert ran or left
