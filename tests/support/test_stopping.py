"""Ctrl-C and SIGTERM at any moment: 130 or 143, one line, nothing half-written; never 0, never a death by signal."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

STUB = """
import sys, threading, time
from pathlib import Path
from scaling_perception import cli
from scaling_perception.support.files import atomic_path
from scaling_perception.support.overlap import WriteBehind

def slow(path):
    with atomic_path(path) as temporary:
        print("up", flush=True)
        time.sleep(0.5)
        temporary.write_text("whole")

def verb(words):
    folder, how = Path(words[1]), words[2]
    with WriteBehind(int(how == "written"), 1) as write, atomic_path(folder / "never.txt") as temporary:
        temporary.write_text("half")
        if how == "written":
            write(slow, folder / "whole.txt")
        try:
            if how == "sleep":
                print("up", flush=True)
            time.sleep(30)
        finally:
            print("unwound")

cli._run = verb
raise SystemExit(cli.main())
"""


@pytest.fixture
def stub(tmp_path):
    def start(how, numbers, pause=0.0):
        words = [sys.executable, "-c", STUB, "predict", str(tmp_path), how]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "up\n"
            for number in numbers:
                process.send_signal(number)
                time.sleep(pause)
            out, err = process.communicate(timeout=20)
        return process.returncode, out, err

    return start


@pytest.mark.parametrize(
    "how, numbers, code, left",
    [
        ("sleep", [signal.SIGINT], 130, []),
        ("written", [signal.SIGTERM], 143, ["whole.txt"]),  # what was handed over is finished work
        ("written", [signal.SIGINT, signal.SIGINT], 130, []),  # no patience
    ],
)
def test_a_signal_ends_a_command_at_once(stub, tmp_path, how, numbers, code, left):
    begin = time.monotonic()
    found, out, err = stub(how, numbers, pause=0.05)
    assert (found, out) == (code, "") and time.monotonic() - begin < 10
    assert err.count("\n") == 1 and "; the same command goes on from what is finished" in err
    assert sorted(os.listdir(tmp_path)) == left


# ---- Every verb, at twenty moments -----------------------------------------------------------------------------------


def words_of(verb, folder, out):
    return {
        "evaluate": "--task depth --dataset scenes --count 2 --option resolution=64 --model mini --steps 1,2 "
        f"--ensemble 1,2 --controls 0 --json {out}/e.json",
        "predict": f"--task depth --model mini --steps 2 --ensemble 2 --out {out} {folder}/p.png {folder}/q.png",
        "prepare": f"scenes --tasks depth --count 8 --resolution 64 --latents --vae tiny --out {out}",
        "generate": f"--model {folder}/classes --out {out}/g.png --steps 30",
        "fit": f"{folder}/points.csv --bootstraps 500 --x x --y y --json {out}/law.json",
        "convert": f"{folder}/model {out}/converted --to safetensors",
    }[verb].split()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    from nano import nano_meta, nano_params

    from scaling_perception.interop.find import find_model
    from scaling_perception.interop.model_folder import save_model

    folder = tmp_path_factory.mktemp("inputs")
    draw = np.random.default_rng(0)
    for name in ("p.png", "q.png"):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / name)
    x = np.logspace(0, 4, 12)
    (folder / "points.csv").write_text("x,y\n" + "".join(f"{a},{2 * a**-0.3 + 0.1}\n" for a in x))
    shutil.copytree(find_model("mini"), folder / "model")
    own = {"cond_channels": 0, "task_labels": 0, "routed": False, "num_classes": 6}
    meta = nano_meta(model=own) | {"tasks": [], "task_options": {}, "classes": 6}
    save_model(folder / "classes", nano_params(meta), meta)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)  # twenty moments of a cold start each
@pytest.mark.parametrize("cache", ["cold", "warm"])
@pytest.mark.parametrize("verb", ["evaluate", "predict", "prepare", "generate", "fit", "convert"])
def test_interrupted_at_many_moments(verb, cache, inputs, tmp_path):
    """Each ends with 130 and one line, and leaves no temporary file; in the end the same command finishes."""
    draw, moments = random.Random(f"{verb} {cache}"), int(os.environ.get("STOPPING_MOMENTS", "20"))
    warm = tmp_path / "warm"
    whole = run(verb, inputs, tmp_path / "whole", warm)
    assert whole.code == 0, whole.err
    if cache == "warm":
        whole = run(verb, inputs, tmp_path / "again", warm)
    longest = 0.85 * whole.seconds
    for moment in range(moments):
        found = None
        while found is None:  # a run that ended before its signal is no try: others, or none, had the processor
            folder = tmp_path / f"at{moment}_{longest:.3f}"
            at = draw.uniform(0, longest)
            cold = tmp_path / f"cold{moment}_{longest:.3f}"
            found = run(verb, inputs, folder, warm if cache == "warm" else cold, at)
            longest *= 1 if found else 0.8
        assert found.code == 130, (at, found)
        assert "interrupted; the same command" in found.err and "Traceback" not in found.err
        hidden = [path for path in folder.rglob("*") if path.name.startswith(".")]
        assert not hidden, (at, hidden)
        for path in folder.rglob("*_depth.npy"):
            assert path.with_suffix(".json").is_file(), f"{path} has no record"
    assert run(verb, inputs, folder, warm).code == 0


class Ended(NamedTuple):
    code: int
    err: str
    seconds: float


def run(verb, inputs, folder, cache, at=None):
    """Run a verb; ``at``: seconds after it began to answer signals, when it gets SIGINT.

    Returns:
        None if it had ended by then, or was in the interpreter's teardown.
    """
    folder.mkdir(exist_ok=True)
    words = [sys.executable, "-m", "scaling_perception", verb, *words_of(verb, inputs, folder)]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as one:
        while not answers(one.pid):
            time.sleep(0.005)
        begin = time.monotonic()
        if at is not None:
            time.sleep(at)
            alive = answers(one.pid)
            one.send_signal(signal.SIGINT)
            if not alive:
                one.communicate()
                return None
        err, _ = one.communicate(timeout=300)
    return Ended(one.returncode, err, time.monotonic() - begin)


def answers(pid):
    """Whether the process has a handler of SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(caught) and int(caught[0], 16) >> (signal.SIGTERM - 1) & 1  # a process that has ended catches none
