"""A run that was interrupted, killed or damaged ends where an undisturbed one ends, bit for bit."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import ROOT, scenes_command
from toys import LinearBatches, config_of, linear_objective, small_disk

from scaling_perception import train as verb
from scaling_perception.interop.model_folder import load_model
from scaling_perception.parallel.mesh import make_mesh
from scaling_perception.support.errors import UserError
from scaling_perception.training.checkpoints import Checkpoints
from scaling_perception.training.goodput import goodput_report
from scaling_perception.training.optim import make_optimizer
from scaling_perception.training.state import abstract_state, named_leaves


def linear_run(monkeypatch, workdir, batches=None, optimizer="adamw", **fields):
    objective = linear_objective(batches)._replace(**fields)
    monkeypatch.setattr(verb, "_objective", lambda config, *_: objective)
    fields = ("optim.lr=0.05", "optim.lr_final=0.01", "train.steps=20", f"optim.name={optimizer}")
    return verb.train(config_of(*fields), workdir)


def last_state(workdir, optimizer="adamw"):
    """The newest checkpoint of a linear run, leaf by leaf."""
    objective = linear_objective()
    tx, _ = make_optimizer(config_of(f"optim.name={optimizer}").optim, 20, objective.frozen)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = abstract_state(objective.init, tx)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=5)
    state = checkpoints.restore(abstract, lambda identity: None, print)
    checkpoints.close()
    return named_leaves(state)


class Seen(LinearBatches):
    """Remembers which batches were drawn from it."""

    def __init__(self, **fields):
        super().__init__(**fields)
        self.drawn = []

    def iterate(self, start):
        for batch in super().iterate(start):
            self.drawn.append(batch)
            yield dict(batch)


@pytest.mark.parametrize(("stop", "optimizer"), [(3, "adamw"), (8, "muon"), (13, "adam")])
def test_two_halves_make_the_whole_bit_for_bit(monkeypatch, tmp_path, stop, optimizer):
    whole = Seen()
    linear_run(monkeypatch, tmp_path / "whole", whole, optimizer)
    halves = [Seen(signal_at=stop), Seen()]
    with pytest.raises(verb.Stopped):
        linear_run(monkeypatch, tmp_path / "halves", halves[0], optimizer)
    linear_run(monkeypatch, tmp_path / "halves", halves[1], optimizer)

    expected, got = (last_state(tmp_path / name, optimizer) for name in ("whole", "halves"))
    assert expected.keys() == got.keys() and int(got["step"]) == 20
    for name, leaf in got.items():  # weights, both moments, counters, average
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
    np.testing.assert_array_equal(halves[1].drawn[0]["x"], whole.drawn[stop + 1]["x"])
    a, b = (np.load(tmp_path / name / "model" / "model.npz") for name in ("whole", "halves"))
    for name in a.files:
        np.testing.assert_array_equal(a[name], b[name])
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "halves")]
    steps = [[json.loads(line)["step"] for line in lines] for lines in rows]
    assert steps[0] == steps[1] == [4, 8, 12, 16, 20]
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "halves")]
    ends = [[(attempt["why"], attempt["end_step"]) for attempt in record["attempts"]] for record in records]
    assert ends == [[("finished", 20)], [("interrupted", stop + 1), ("finished", 20)]]
    report = goodput_report(tmp_path / "halves")
    assert 0 < report["goodput"] < 1 and report["seconds"]["lost"] == 0 and report["seconds"]["compile"] > 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The last state of a linear run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        linear_run(monkeypatch, folder)
    return last_state(folder)


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, leaf in state.items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "one flipped bit": flip,
    "deleted": Path.unlink,
}


def damage_one(work, copy, damage):
    """Damage one file of arrays of checkpoint 14 that restoring needs (Orbax leaves some that nothing refers to)."""
    for path in sorted((work / "checkpoints" / "14").rglob("d/*")):
        shutil.copytree(work / "checkpoints", copy / "checkpoints")
        damage(copy / path.relative_to(work))
        step = int(last_state(copy)["step"])
        shutil.rmtree(copy)
        if step == 12:
            damage(path)
            return path
    return None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_costs_steps_but_no_bits(monkeypatch, tmp_path, capsys, undisturbed, damage):
    with pytest.raises(verb.Stopped):
        linear_run(monkeypatch, tmp_path, LinearBatches(signal_at=13))
    assert damage_one(tmp_path, tmp_path.with_name(f"{tmp_path.name} copy"), DAMAGES[damage])
    linear_run(monkeypatch, tmp_path)
    told = capsys.readouterr().err
    assert "checkpoint 14 is damaged" in told and "resuming from step 12" in told
    assert_same(last_state(tmp_path), undisturbed)


class Filling(LinearBatches):
    """Fills the disk with one file before step 13."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def at(self, step):
        if step == 13:
            with contextlib.suppress(OSError), open(self.file, "wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        return super().at(step)


def test_a_full_disk_costs_steps_but_no_bits(monkeypatch, tmp_path, undisturbed):
    with small_disk(tmp_path, megabytes=4) as disk:
        with pytest.raises(UserError, match="free space"):
            linear_run(monkeypatch, disk / "work", Filling(disk / "filler"))
        (disk / "filler").unlink()
        assert int(last_state(disk / "work")["step"]) in (8, 12)  # 12 was being written when the disk became full
        linear_run(monkeypatch, disk / "work")
        assert_same(last_state(disk / "work"), undisturbed)
        assert goodput_report(disk / "work")["steps"]["kept"] == 20


def test_killed_while_exporting(monkeypatch, tmp_path, undisturbed):
    def half(params, path, info):
        Path(path).mkdir()
        (Path(path) / "model.npz").write_bytes(b"PK")
        raise Killed

    class Killed(BaseException):
        pass

    with pytest.raises(Killed):
        linear_run(monkeypatch, tmp_path, export=half)
    record = json.loads((tmp_path / "run.json").read_text())
    record["attempts"][0].update(why=None, ended=None, end_step=None)  # who is killed says nothing
    (tmp_path / "run.json").write_text(json.dumps(record))
    linear_run(monkeypatch, tmp_path)  # no step is left, but the model
    np.testing.assert_array_equal(np.load(tmp_path / "model" / "model.npz")["kernel"], undisturbed["ema/layer/kernel"])
    attempts = json.loads((tmp_path / "run.json").read_text())["attempts"]
    assert [(one["start_step"], one["end_step"], one["why"]) for one in attempts] == [
        (0, 20, "killed"),
        (20, 20, "finished"),
    ]
    report = goodput_report(tmp_path)
    assert report["steps"] == {"done": 20, "kept": 20, "lost": 0} and "running or killed" not in report["attempts"]


def test_a_checkpoint_of_eight_devices_resumes_on_one(monkeypatch, tmp_path):
    with pytest.raises(verb.Stopped):
        linear_run(monkeypatch, tmp_path, LinearBatches(signal_at=9))
    before = last_state(tmp_path)
    one = make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr("scaling_perception.parallel.mesh.make_mesh", lambda **_: one)
    linear_run(monkeypatch, tmp_path)
    after = last_state(tmp_path)
    assert int(before["step"]) == 10 and int(after["step"]) == 20
    assert np.abs(after["params/layer/kernel"] - before["params/layer/kernel"]).max() > 0


# ---- The real thing: the command, latents of scenes, real signals ----------------------------------------------------

STEPS = 100


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    return scenes_command(folder, STEPS, 4, "train.checkpoint_every=10", "optim.warmup=10")


def start(command, workdir):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # one device, compiled in half the time
    words = [sys.executable, "-m", "scaling_perception", "train", *command, "--workdir", str(workdir)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


def signal_at(process, step, number):
    """Read the log until ``step``, send the signal, and return the whole log."""
    lines = []
    with process:  # waits, and closes the pipe
        for line in process.stderr:
            lines.append(line)
            if line.startswith(f"train: step {step}/"):
                process.send_signal(number)
    return "".join(lines)


def finish(process):
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    return told


def test_killed_and_interrupted_run_equals_an_undisturbed_one(command, tmp_path):
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    print(f"seed {seed}")
    finish(start(command, tmp_path / "whole"))

    work = tmp_path / "disturbed"
    killed = start(command, work)
    # the second save, at step 20, waits for the first: from then on there is one to resume from
    signal_at(killed, draw.randrange(25, 50), signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    stopped = start(command, work)
    told = signal_at(stopped, draw.randrange(60, 90), signal.SIGINT)
    assert stopped.returncode == 130 and "resuming from step" in told
    hint = told.split("to resume run: ")[1].strip()
    assert hint.startswith("scaling-perception train --config ") and f"--workdir {work}" in hint
    assert all(word in hint for word in command if word.startswith("--config."))
    finish(start(command, work))

    saved = [json.loads((tmp_path / n / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text()) for n in NAMES]
    assert saved[0]["leaves"] == saved[1]["leaves"]  # hashes of weights, moments, average
    models = [named_leaves(load_model(tmp_path / name / "model")[0]) for name in NAMES]
    for name, leaf in models[0].items():
        np.testing.assert_array_equal(leaf, models[1][name], err_msg=name)
    rows = [[json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in NAMES]
    assert [row["step"] for row in rows[1]] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


NAMES = ("whole", "disturbed")
