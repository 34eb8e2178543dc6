"""Worker processes: order, errors, and that none stays behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from scaling_perception.data.workers import ordered_map
from scaling_perception.support.errors import UserError


def make(offset):
    def work(job):
        if job == "bad":
            raise UserError("no such picture")
        if job == "dead":
            os.kill(os.getpid(), signal.SIGKILL)
        return job + offset, os.getpid()

    return work


def test_results_come_in_the_order_of_the_jobs():
    for workers in (0, 2):
        results = ordered_map(make, (100,), [*range(9), "bad", 9], workers, ahead=2)
        found = [next(results) for _ in range(9)]
        assert [value for value, _ in found] == list(range(100, 109))
        processes = {process for _, process in found}
        assert len(processes) == max(workers, 1) and (os.getpid() in processes) == (workers == 0)
        with pytest.raises(UserError, match="no such picture"):
            next(results)
    assert not _workers_of(os.getpid())


def make_large(size):
    return lambda job: b"x" * size  # more than a pipe holds: a message is written in pieces


@pytest.mark.timeout(60)
def test_a_message_that_is_half_written_is_waited_for_by_nobody():
    for taken in range(4):
        results = ordered_map(make_large, (3_000_000 + taken,), range(100), 2, ahead=2)
        for _ in range(taken):
            next(results)
        begin = time.monotonic()
        results.close()
        assert time.monotonic() - begin < 15
    assert not _workers_of(os.getpid())


def test_a_worker_that_dies_is_said():
    results = ordered_map(make, (0,), [1, "dead", 2, 3], 2)
    assert next(results)[0] == 1
    with pytest.raises(UserError, match="a worker process ended early"):
        list(results)
    assert not _workers_of(os.getpid())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(tmp_path, number):
    words = ["prepare", "scenes", "--count", "4000", "--resolution", "64", "--workers", "2", "--out", tmp_path / "out"]
    words = [sys.executable, "-m", "scaling_perception", *map(str, words)]
    with open(tmp_path / "told", "w+") as told:
        parent = subprocess.Popen(words, stdout=told, stderr=told, start_new_session=True)
        try:
            workers = _workers(parent.pid)
            trackers = [
                child for child in psutil.Process(parent.pid).children() if "resource_tracker" in str(child.cmdline())
            ]
            assert trackers
            if number == signal.SIGINT:  # a terminal sends it to the whole group
                os.killpg(parent.pid, number)
            else:
                parent.kill()
            assert parent.wait(30) == (130 if number == signal.SIGINT else -signal.SIGKILL)
            _, alive = psutil.wait_procs([*workers, *trackers], 10)
            assert not alive
        finally:
            parent.kill()
        told.seek(0)
        said = told.read()
        assert "Traceback" not in said
        if number == signal.SIGINT:
            assert "leaked semaphore" not in said, "semaphores are left for multiprocessing's tracker"


def _workers(pid):
    """Two workers that have started: interrupts are the parent's affair."""
    for _ in range(600):
        time.sleep(0.1)
        found = _workers_of(pid)
        if len(found) == 2 and all(_ignores_interrupts(child.pid) for child in found):
            return found
    raise AssertionError("no workers")


def _workers_of(pid):
    return [child for child in psutil.Process(pid).children() if "spawn_main" in str(child.cmdline())]


def _ignores_interrupts(pid):
    with open(f"/proc/{pid}/status") as file:
        (mask,) = (int(line.split()[1], 16) for line in file if line.startswith("SigIgn"))
    return bool(mask >> (signal.SIGINT - 1) & 1)
