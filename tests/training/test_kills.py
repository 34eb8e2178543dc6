"""Killed twenty times at random, a run ends where an undisturbed one ends: every leaf, and every batch of every step.

    pytest -m slow tests/training/test_kills.py -s

takes about a quarter of an hour. Moments are drawn over the whole life of the processes: imports, restoring, a first
compilation, steps, and on purpose while a checkpoint is being written; of two processes the first, the second or both
are killed. ``SCALING_PERCEPTION_SEED`` repeats a draw, as far as clocks can.
"""

import collections
import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
from runs import finish, leaf_hashes, losses, scenes_command, start, steps_noted

from scaling_perception.training.goodput import goodput_report, goodput_table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
STEPS, KILLS, AFTER = 240, 20, 2
LAST = STEPS - 50  # kills in the loop aim at steps before this one, so that each finds a run to kill
EVERY = 5
PATIENCE = 10  # seconds until the other process is killed as well, as launchers do


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    changes = (f"train.checkpoint_every={EVERY}", "train.keep=3", "optim.warmup=10", "optim.ema=0.9")
    return scenes_command(tmp_path_factory.mktemp("kills"), STEPS, 8, *changes)


class Victim:
    """One start of a run, watched through its log until it is killed."""

    def __init__(self, work, begin):
        self.work, self.log = work, Path(f"{work}.0.log")
        self.before = self.log.stat().st_size if self.log.exists() else 0
        self.stale = self.halves()  # what another kill has left, until the next save removes it
        self.running = begin()

    def halves(self):
        found = set()
        for path in self.work.glob("checkpoints/*tmp*"):
            with contextlib.suppress(OSError):
                found.add((path.name, path.stat().st_ctime_ns))
        return found

    def told(self):
        return self.log.read_text()[self.before :]

    def step(self):
        lines = [line for line in self.told().splitlines() if line.startswith("train: step ")]
        return int(lines[-1].split()[2].split("/")[0]) if lines else 0

    def saving(self):
        return bool(self.halves() - self.stale)

    def wait(self, reached, seconds=240):
        """Until ``reached()``, or the end of a process."""
        deadline = time.monotonic() + seconds
        while not reached() and all(process.poll() is None for process in self.running):
            assert time.monotonic() < deadline, self.told()[-2000:]
            time.sleep(0.005)

    def phase(self):
        """What the run was about, as far as can be seen from outside."""
        told = self.told()
        if "exported" in told or self.step() == STEPS:
            return "ending"
        if self.saving() and self.step():
            return "saving"
        if self.step():
            return "training"
        if "compiled the step" in told:
            return "first step"
        return "compiling" if "steps of" in told else "importing, restoring"

    def kill(self, who):
        """SIGKILL; returns what was going on, or None if all had ended before."""
        phase = self.phase()
        alive = [process for process in self.running if process.poll() is None]
        for index in who:
            self.running[index].send_signal(signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and any(process.poll() is None for process in self.running):
            time.sleep(0.02)
        late = [process for process in self.running if process.poll() is None]
        for process in late:
            process.kill()
        codes = [process.wait() for process in self.running]
        hit = alive and any(codes[index] == -signal.SIGKILL for index in who)
        return (phase, codes, len(late)) if hit else None


def disturb(work, begin, draw, startup, processes):
    """Kill a run KILLS times before its last steps, then up to AFTER times at its end; returns what each kill hit."""
    hits, whos = [], [(0,), (1,), (0, 1)][: 1 if processes == 1 else 3]
    while len(hits) < KILLS:
        victim, who = Victim(work, begin), draw.choice(whos)
        kind = draw.choices(["clock", "step", "save"], [0.35, 0.4, 0.25])[0]
        if kind == "clock":
            time.sleep(draw.uniform(0, startup))
        else:
            done = max([0, *(int(path.name) for path in work.glob("checkpoints/*") if path.name.isdecimal())])
            goal = min(max(done, LAST * len(hits) // KILLS) + draw.randrange(1, 20), LAST)  # all over the run
            victim.wait(lambda victim=victim, goal=goal: victim.step() >= goal)
            if kind == "save":
                victim.wait(victim.saving)
            time.sleep(draw.uniform(0, 0.3 if kind == "step" else 0.06))
        hit = victim.kill(who)
        assert hit, f"kill {len(hits) + 1} came too late: {victim.told()[-2000:]}"
        hits.append((who, *hit))
        print(f"kill {len(hits):2} of process {who}: {hit[0]}, step {victim.step()}, exit codes {hit[1]}", flush=True)
    for _ in range(AFTER):  # one that comes too late is no failure
        victim, who = Victim(work, begin), draw.choice(whos)
        victim.wait(lambda victim=victim: victim.step() == STEPS or "finished" in victim.told())
        time.sleep(draw.uniform(0, 0.6))
        hit = victim.kill(who)
        print(f"kill at the end, process {who}: {hit or 'too late'}", flush=True)
        hits += [(who, *hit)] if hit else []
    return hits


@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills_change_nothing(command, tmp_path, processes):
    seed = int(os.environ.get("SCALING_PERCEPTION_SEED", random.randrange(10**6)))
    draw = random.Random(seed)
    print(f"\nseed {seed}, {processes} process(es) of {8 // processes} devices")
    whole, work = tmp_path / "whole", tmp_path / "killed"

    def begin(workdir, cache):
        words = [*command, "--config.mesh.fsdp=2"]
        return start(words, workdir, processes, 8 // processes, True, JAX_COMPILATION_CACHE_DIR=str(tmp_path / cache))

    undisturbed = Victim(whole, lambda: begin(whole, "cache"))
    clock = time.monotonic()
    undisturbed.wait(lambda: undisturbed.step() > 0)
    startup = time.monotonic() - clock
    finish(undisturbed.running, 0, whole)
    print(f"undisturbed: first step after {startup:.1f} s, all after {time.monotonic() - clock:.1f} s", flush=True)

    # a compilation cache of its own, so that kills also hit the compiler and the writing of that cache
    hits = disturb(work, lambda: begin(work, "another"), draw, startup, processes)
    told = finish(begin(work, "another"), 0, work)
    print("hit:", dict(collections.Counter(hit[1] for hit in hits)), "of", len(hits))
    print("another process had to be killed as well:", sum(hit[3] > 0 for hit in hits))
    assert "is damaged" not in told and not (work / "damaged").exists()

    hashes = [leaf_hashes(folder, STEPS) for folder in (whole, work)]
    assert hashes[0] == hashes[1], [name for name in hashes[0] if hashes[0][name] != hashes[1].get(name)]
    print(f"{len(hashes[0])} leaves of weights, optimiser and average: equal")
    assert losses(whole) == losses(work)
    models = [{path.name: path.read_bytes() for path in (folder / "model").iterdir()} for folder in (whole, work)]
    assert models[0].keys() == models[1].keys()
    assert all(models[0][name] == models[1][name] for name in models[0] if name.endswith(".safetensors"))
    for index in range(processes):  # what is done again is done on the same samples, and no step is left out
        expected, seen = steps_noted(whole, index), steps_noted(work, index)
        assert [step for step, *_ in expected] == list(range(STEPS))
        assert set(seen) == set(expected)
        print(f"process {index}: {STEPS} batches the same, {len(seen) - STEPS} of them more than once")
    report = goodput_report(work)
    assert report["steps"]["kept"] == STEPS and sum(report["shares"].values()) == pytest.approx(1)
    print(goodput_table(report))
