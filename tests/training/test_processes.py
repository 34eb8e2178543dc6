"""Real processes: one run of several, stopped together, continued elsewhere; killed and interrupted runs go on.

Unasked the command runs seven times, on one small cache of latents.
"""

import json
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import runs
from runs import finish, losses, scenes_command, start

from scaling_perception.interop.model_folder import load_model
from scaling_perception.parallel.processes import COORDINATOR, PROCESS, PROCESSES, join, leaving_at_once
from scaling_perception.support.errors import UserError
from scaling_perception.training.state import named_leaves

STEPS = 64
CHANGES = ("train.checkpoint_every=8", "optim.warmup=4", "optim.name=adamw", "optim.ema=0.9")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    return scenes_command(tmp_path_factory.mktemp("processes"), STEPS, 8, *CHANGES)


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    """The work folder of a run on one device that nothing happened to."""
    work = tmp_path_factory.mktemp("alone") / "work"
    finish(start(command, work, devices=1), 0, work)
    return work


def signal_after(running, workdir, steps, number, index=0):
    """Send a signal to one of the processes as soon as so many steps of this start are in the log."""
    log = Path(f"{workdir}.0.log")
    before = log.read_text().count("train: step ")
    while all(process.poll() is None for process in running):
        if log.read_text().count("train: step ") >= before + steps:
            break
        time.sleep(0.005)
    running[index].send_signal(number)


def stop_after(running, workdir, steps, index):
    """SIGTERM to one of the processes after so many steps; all stop. Returns the step they stopped at."""
    signal_after(running, workdir, steps, signal.SIGTERM, index)
    told = finish(running, 143, workdir)
    return int(told.split("stopped at step ")[1].split()[0])


def test_two_processes_stop_together_and_one_goes_on(command, alone, tmp_path):
    two = tmp_path / "two"
    running = start([*command, "--config.mesh.fsdp=2"], two, processes=2, devices=2)
    stopped = stop_after(running, two, 6, 1)  # the other one learns of it
    told = Path(f"{two}.0.log").read_text()
    assert 6 < stopped < STEPS and len(losses(two)) == stopped
    assert "2 process(es)" in told and "data 2 × fsdp 2" in told
    told = finish(start(command, two, devices=1), 0, two)  # another mesh, another number of processes
    assert f"resuming from step {stopped}" in told
    assert losses(two) == pytest.approx(losses(alone), rel=1e-5)


def test_killed_and_interrupted_run_equals_an_undisturbed_one(command, alone, tmp_path):
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    print(f"seed {seed}")
    work = tmp_path / "disturbed"
    killed = start(command, work, devices=1)
    # the second save, at step 16, waits for the first: from then on there is one to resume from
    signal_after(killed, work, draw.randrange(17, 24), signal.SIGKILL)
    before = len(finish(killed, -signal.SIGKILL, work))
    stopped = start(command, work, devices=1)
    signal_after(stopped, work, draw.randrange(2, 10), signal.SIGINT)
    told = finish(stopped, 130, work)[before:]
    assert "resuming from step" in told
    hint = told.split("to resume run: ")[1].strip()
    assert hint.startswith("scaling-perception train --config ") and f"--workdir {work}" in hint
    assert all(word in hint for word in command if word.startswith("--config."))
    finish(start(command, work, devices=1), 0, work)

    runs_of = (alone, work)
    saved = [json.loads((one / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text()) for one in runs_of]
    assert saved[0]["leaves"] == saved[1]["leaves"]  # hashes of weights, moments, average
    models = [named_leaves(load_model(one / "model")[0]) for one in runs_of]
    for name, leaf in models[0].items():
        np.testing.assert_array_equal(leaf, models[1][name], err_msg=name)
    assert losses(alone) == losses(work)


@pytest.mark.slow
def test_fifty_losses_are_those_of_one_process(tmp_path):
    """``pytest -m slow tests/training/test_processes.py`` (three minutes): 1, 2 and 4 processes; then from 4 to 2."""
    command = scenes_command(tmp_path, 50, 8, *CHANGES)
    alone = tmp_path / "alone"
    finish(start(command, alone, devices=1), 0, alone)
    spreads = {2: ["--config.mesh.fsdp=4"], 4: ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"]}
    for count, mesh in spreads.items():
        work = tmp_path / f"{count}"
        told = finish(start([*command, *mesh], work, count, 8 // count), 0, work)
        assert f"{count} process(es)" in told and "on 8 cpu device(s)" in told
        assert losses(work) == pytest.approx(losses(alone), rel=1e-5)
    work = tmp_path / "moved"
    stopped = stop_after(start([*command, *spreads[4]], work, 4, 2), work, 20, 3)
    told = finish(start([*command, *spreads[2]], work, 2, 4), 0, work)
    assert 20 <= stopped < 50 and f"resuming from step {stopped}" in told
    assert losses(work) == pytest.approx(losses(alone), rel=1e-5)
    for count in spreads:
        print(f"{count} processes: largest relative difference {difference(tmp_path / str(count), alone):.1e}")
    print(f"4 processes until step {stopped}, then 2: {difference(work, alone):.1e}")


LONG = 1200  # seconds that a run may take on a busy machine
FOUR = [[0, 1, 4, 5]] * 2 + [[2, 3, 6, 7]] * 2  # of each pair that tensor joins the same rows
SPREADS = {  # processes, devices of each, their order, mesh, and the rows of a batch of 8 that each process holds
    "tensor over two hosts": (2, 2, "0,1,2,3", {"tensor": 4}, [[*range(8)]] * 2),
    "two hosts interleaved": (2, 2, "0,2,1,3", {"data": 4}, [[0, 1, 4, 5], [2, 3, 6, 7]]),
    "tensor over four hosts": (4, 1, "0,1,2,3", {"tensor": 4}, [[*range(8)]] * 4),
    "four hosts interleaved": (4, 2, "0,2,4,6,1,3,5,7", {"fsdp": 4, "tensor": 2}, FOUR),
}


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    """A command, the folder of its run on one device, what each of its steps was given, and hashes of its weights.

    In two parts, with held-out samples, with the copies of weights and inputs compared at each step, and with skipped
    steps, whose samples' keys are listed.
    """
    folder = tmp_path_factory.mktemp("spreads")
    changes = [*CHANGES, "train.accumulate=2", "train.check_replicas=1", "train.validate_every=4"]
    changes += ["train.validate_samples=8", f"held_out.cache={folder / 'held'}", "train.on_spike=skip"]
    changes += ["train.spike_window=4", "train.spike_factor=1.01", "latent_norm=none"]
    command = runs.scenes_command(folder, 12, 8, *changes)
    runs.prepare_scenes(folder, "held", "4", "--start", "50")
    alone = folder / "alone"
    finish(start(command, alone, devices=1, noted=True), 0, alone, seconds=LONG)
    return command, alone, runs.steps_noted(alone), runs.leaf_hashes(alone, 12)


@pytest.mark.slow
@pytest.mark.timeout(2 * LONG)
@pytest.mark.parametrize("name", SPREADS)
def test_batches_weights_and_curves_however_hosts_lie(on_one_device, tmp_path, name):
    """``pytest -m slow tests/training/test_processes.py -s -k hosts`` (some minutes)."""
    command, alone, whole, weights = on_one_device
    count, devices, order, sizes, places = SPREADS[name]
    work = tmp_path / "work"
    mesh = [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]
    told = finish(start([*command, *mesh], work, count, devices, True, **{runs.ORDER: order}), 0, work, seconds=LONG)
    assert f"{count} process(es)" in told
    for index in range(count):
        for (step, keys, rows), (now, held, arrays) in zip(whole, runs.steps_noted(work, index), strict=True):
            assert step == now and held == tuple(keys[place] for place in places[index])
            assert arrays == tuple(rows[place] for place in places[index])
    for field, least in (("loss", 6), ("held_out_loss", 3)):  # a skipped step has no loss
        curves = [{row["step"]: row[field] for row in metrics(one) if field in row} for one in (work, alone)]
        apart = max(abs(curves[0][step] / value - 1) for step, value in curves[1].items())
        print(f"{name}: {field} of {len(curves[0])} steps within {apart:.1e}")
        assert curves[0].keys() == curves[1].keys() and len(curves[0]) >= least and apart < 1e-5
    lines = [[json.loads(line) for line in (one / "skipped.jsonl").read_text().splitlines()] for one in (work, alone)]
    listed = [[(row["step"], row["keys"]) for row in rows] for rows in lines]
    assert listed[0] == listed[1] and listed[0]
    same = sum(weights[leaf] == hashed for leaf, hashed in runs.leaf_hashes(work, 12).items())
    print(f"{name}: {len(listed[0])} skipped steps' keys and all batches equal, {same} of {len(weights)} leaves")


@pytest.mark.slow
def test_processes_started_apart_are_refused(tmp_path):
    command = runs.scenes_command(tmp_path, 4, 8, *CHANGES)
    work = tmp_path / "work"
    running = start(command, work, 2, 1, others=["--config.seed=5"])
    assert "process 1 has another config than process 0" in finish(running, 2, work)
    assert not (work / "checkpoints").exists() or not any((work / "checkpoints").iterdir())


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def difference(workdir, other):
    return max(abs(a / b - 1) for a, b in zip(losses(workdir), losses(other), strict=True))


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [(UserError("no disk"), 2, "scaling-perception: no disk\n"), (ValueError("reset by peer"), 1, "reset by peer")],
)
def test_an_error_among_several_processes_waits_for_nobody(monkeypatch, capsys, error, code, told):
    def leave(code):
        raise SystemExit(code)  # which leaves the block as os._exit would the process

    monkeypatch.setattr("os._exit", leave)
    with pytest.raises(type(error)), leaving_at_once():
        raise error
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    with pytest.raises(SystemExit) as left, leaving_at_once():
        raise error
    assert left.value.code == code and told in capsys.readouterr().err
    with pytest.raises(SystemExit) as left, leaving_at_once():
        raise SystemExit(143)  # all stop together
    assert left.value.code == 143


def test_joining_is_told_what_is_missing():
    with pytest.raises(UserError, match=f"{PROCESSES} is not"):
        join({COORDINATOR: "localhost:1"})
    with pytest.raises(UserError, match="whole numbers"):
        join({COORDINATOR: "localhost:1", PROCESSES: "two", PROCESS: "0"})
    with pytest.raises(UserError, match=r"not in 0\.\.1"):
        join({COORDINATOR: "localhost:1", PROCESSES: "2", PROCESS: "2"})
    join({})
    join({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"})
