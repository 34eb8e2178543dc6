"""Two real processes with every guard on: the same decisions in both, bit for bit the same after a stop."""

import json
import signal
import time
from pathlib import Path

import pytest
import runs

from scaling_perception.support.verbs import run_verb

STEPS = 18
GUARDS = ["train.check_replicas=4", "train.on_spike=skip", "train.spike_window=6", "train.spike_factor=1.05"]
AVERAGE = ["optim.ema=0.9", "optim.ema_every=4", "optim.ema_dtype=bfloat16", "optim.ema_place=host"]
HELD_OUT = ["train.validate_every=6", "train.validate_samples=16", "train.keep_best=1", "train.checkpoint_every=6"]


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_guarded_processes_stop_and_go_on(tmp_path):
    """About two minutes: ``pytest -m slow tests/training/test_guarded_processes.py``.

    The factor of 1.05 calls many a step a spike, so that the decisions differ from step to step. One process decides
    alike but for rounding; an average in the hosts' memory is that of two hosts.
    """
    held = tmp_path / "held"
    changes = [*GUARDS, *AVERAGE, *HELD_OUT, f"held_out.cache={held}", "optim.warmup=4", "optim.name=adamw"]
    command = runs.scenes_command(tmp_path, STEPS, 8, *changes)
    words = ["scenes", "--out", str(held), "--latents", "--vae", str(tmp_path / "vae"), "--resolution", "32"]
    assert run_verb("prepare", [*words, "--count", "6", "--start", "50", "--batch", "8", "--workers", "0"]) == 0
    one, whole, parts = (tmp_path / name for name in ("one", "whole", "parts"))
    runs.finish(runs.start(command, one, devices=4), 0, one)
    fsdp = [*command, "--config.mesh.fsdp=2"]
    runs.finish(runs.start(fsdp, whole, processes=2, devices=2), 0, whole)

    running = runs.start(fsdp, parts, processes=2, devices=2)
    log = Path(f"{parts}.0.log")
    while all(process.poll() is None for process in running) and "train: step 7/" not in log.read_text():
        time.sleep(0.05)
    running[1].send_signal(signal.SIGTERM)
    assert "stopped at step" in runs.finish(running, 143, parts)
    runs.finish(runs.start(fsdp, parts, processes=2, devices=2), 0, parts)

    saved = [json.loads((w / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text()) for w in (whole, parts)]
    assert saved[0]["leaves"] == saved[1]["leaves"] and "guard/loss" in saved[0]["leaves"]
    assert saved[0]["metrics"]["held_out_loss"] == saved[1]["metrics"]["held_out_loss"]
    for field in ("loss", "grad_norm", "spike", "skipped"):
        told = [[row.get(field, 0.0) for row in rows_of(w)] for w in (one, whole, parts)]
        assert told[1] == told[2] and told[1] == pytest.approx(told[0], rel=1e-3), field
    spikes = [row["step"] for row in rows_of(whole) if row["spike"]]
    lines = [json.loads(line) for line in (whole / "skipped.jsonl").read_text().splitlines()]
    assert 0 < len(spikes) < STEPS and [line["step"] for line in lines] == spikes
    assert all(len(line["keys"]) == 8 for line in lines)  # of both processes
    for other in rows_of(one):
        if "held_out_loss" in other:
            here = next(row for row in rows_of(whole) if row["step"] == other["step"])
            assert here["held_out_loss"] == pytest.approx(other["held_out_loss"], rel=1e-2)  # averages are rounded
