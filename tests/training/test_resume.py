"""A run that was interrupted, killed or damaged ends where an undisturbed one ends, bit for bit."""

import contextlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from toys import LinearBatches, config_of, linear_objective, small_disk

from scaling_perception import train as verb
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


@pytest.mark.parametrize(
    ("stop", "optimizer"), [(3, "adamw"), (8, "muon"), pytest.param(13, "adam", marks=pytest.mark.slow)]
)
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
