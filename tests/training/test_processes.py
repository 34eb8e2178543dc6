"""Two real processes as one run: the losses of one process, stopped together, continued by one process elsewhere."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from scaling_perception.models import tiny_vae
from scaling_perception.models.autoencoders import save_part
from scaling_perception.parallel.processes import COORDINATOR, PROCESS, PROCESSES, join
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import run_verb

STEPS = 24
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The words of a training command on a small cache of 32-pixel scenes, less its --workdir."""
    folder = tmp_path_factory.mktemp("processes")
    thin = {"encoder_widths": (4, 4, 4), "encoder_blocks": (1, 1, 1), "decoder_widths": (4, 4, 4)}
    config = tiny_vae.TinyVAEConfig(**thin, decoder_blocks=(1, 1, 1), patch=2)
    for part in ("encoder", "decoder"):
        save_part(folder / "vae", part, config, tiny_vae.init_part(part, config, jax.random.key(0)), {})
    words = ["scenes", "--out", str(folder / "cache"), "--latents", "--vae", str(folder / "vae"), "--resolution", "32"]
    assert run_verb("prepare", [*words, "--count", "6", "--batch", "8", "--workers", "0"]) == 0
    spec = f"configs/mini.py:model=nano,res=32,cache={folder / 'cache'},vae={folder / 'vae'},batch=8,steps={STEPS}"
    changes = ["train.checkpoint_every=12", "train.log_every=1", "optim.warmup=4", "optim.name=adamw"]
    return ["--config", spec, *(f"--config.{change}" for change in [*changes, "latent_norm=auto", "optim.ema=0.9"])]


def start(command, workdir, processes=1, devices=4):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for index in range(processes):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
        environment["XLA_FLAGS"] = flags
        if processes > 1:
            environment |= {COORDINATOR: f"127.0.0.1:{port}", PROCESSES: str(processes), PROCESS: str(index)}
        words = [sys.executable, "-m", "scaling_perception", "train", *command, "--workdir", str(workdir)]
        log = open(f"{workdir}.{index}.log", "a")  # noqa: SIM115
        running.append(subprocess.Popen(words, stderr=log, stdout=log, cwd=ROOT, env=environment))
        log.close()
    return running


def finish(running, code, workdir):
    try:
        codes = [process.wait(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    told = Path(f"{workdir}.0.log").read_text()
    assert codes == [code] * len(running), told[-3000:]
    return told


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def test_two_processes_stop_together_and_one_goes_on(command, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(command, one), 0, one)
    running = start([*command, "--config.mesh.fsdp=2"], two, processes=2, devices=2)
    log = Path(f"{two}.0.log")
    while all(process.poll() is None for process in running) and "train: step 6/" not in log.read_text():
        time.sleep(0.05)
    running[1].send_signal(signal.SIGTERM)  # the other one is told
    told = finish(running, 143, two)
    stopped = int(told.split("stopped at step ")[1].split()[0])
    assert 6 < stopped < STEPS and len(losses(two)) == stopped
    assert "2 process(es)" in told and "data 2 × fsdp 2" in told
    told = finish(start(command, two, devices=1), 0, two)  # another mesh, another number of processes
    assert f"resuming from step {stopped}" in told
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


def test_joining_is_told_what_is_missing():
    with pytest.raises(UserError, match=f"{PROCESSES} is not"):
        join({COORDINATOR: "localhost:1"})
    with pytest.raises(UserError, match="whole numbers"):
        join({COORDINATOR: "localhost:1", PROCESSES: "two", PROCESS: "0"})
    with pytest.raises(UserError, match=r"not in 0\.\.1"):
        join({COORDINATOR: "localhost:1", PROCESSES: "2", PROCESS: "2"})
    join({})
    join({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"})
