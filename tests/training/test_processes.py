"""Several real processes as one run: the losses of one process, stopped together, continued elsewhere."""

import signal
import time
from pathlib import Path

import pytest
from runs import finish, losses, scenes_command, start

from scaling_perception.parallel.processes import COORDINATOR, PROCESS, PROCESSES, join, leaving_at_once
from scaling_perception.support.errors import UserError

STEPS = 24
CHANGES = ("train.checkpoint_every=12", "optim.warmup=4", "optim.name=adamw", "optim.ema=0.9")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    return scenes_command(tmp_path_factory.mktemp("processes"), STEPS, 8, *CHANGES)


def stop_after(running, workdir, step, index):
    """SIGTERM to one of the processes once ``step`` was told; all stop. Returns the step they stopped at."""
    log = Path(f"{workdir}.0.log")
    while all(process.poll() is None for process in running) and f"train: step {step}/" not in log.read_text():
        time.sleep(0.05)
    running[index].send_signal(signal.SIGTERM)
    told = finish(running, 143, workdir)
    return int(told.split("stopped at step ")[1].split()[0])


def test_two_processes_stop_together_and_one_goes_on(command, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(command, one), 0, one)
    running = start([*command, "--config.mesh.fsdp=2"], two, processes=2, devices=2)
    stopped = stop_after(running, two, 6, 1)  # the other one is told
    told = Path(f"{two}.0.log").read_text()
    assert 6 < stopped < STEPS and len(losses(two)) == stopped
    assert "2 process(es)" in told and "data 2 × fsdp 2" in told
    told = finish(start(command, two, devices=1), 0, two)  # another mesh, another number of processes
    assert f"resuming from step {stopped}" in told
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


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
