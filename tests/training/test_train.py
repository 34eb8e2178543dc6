import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from toys import BATCH, LatentBatches, LinearBatches, config_of, linear_objective

from scaling_perception import train as verb
from scaling_perception.interop.model_folder import load_model
from scaling_perception.interop.safetensors_io import save_tree
from scaling_perception.interop.sharded import save_sharded
from scaling_perception.parallel.mesh import make_mesh
from scaling_perception.support import locks
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import run_verb
from scaling_perception.training.diffusion import diffusion_objective
from scaling_perception.training.export import damage_of
from scaling_perception.training.identity import without_places
from scaling_perception.training.state import named_leaves


@pytest.fixture
def linear(monkeypatch):
    """Runs train() on the linear problem; takes the batches, a work folder and overrides."""

    def run(workdir, *overrides, batches=None, command="resume me"):
        objective = linear_objective(batches)
        monkeypatch.setattr(verb, "_objective", lambda config, *_: objective)
        return verb.train(config_of("optim.lr=0.05", "optim.lr_final=0.01", *overrides), workdir, command)

    return run


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_loss_falls_and_everything_is_recorded(linear, tmp_path):
    model = linear(tmp_path / "run", "train.steps=60", "train.log_every=10", "train.keep=1")
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60]
    assert rows[-1]["loss"] < 0.1 * rows[0]["loss"]
    fields = {
        "loss",
        "lr",
        "grad_norm",
        "largest",
        "samples",
        "macs",
        "seconds_per_step",
        "samples_per_second",
        "data_wait",
    }
    assert fields <= rows[0].keys() and rows[3]["samples"] == 40 * BATCH
    assert 0 <= rows[2]["data_wait"] <= 1
    assert rows[0]["samples_per_second"] == pytest.approx(BATCH / rows[0]["seconds_per_step"])
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["optim"]["lr"] == 0.05 and saved["model"] == "nano"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["60"]
    assert list((tmp_path / "run" / "tb").iterdir())
    weights = np.load(model / "model.npz")
    assert np.abs(weights["kernel"] - [[1.0, -2.0], [0.5, 0.0], [2.0, 1.0]]).max() < 0.6
    np.testing.assert_array_equal(weights["table"], np.float32(0.25))


def test_the_average_is_what_is_exported(linear, tmp_path):
    last = np.load(linear(tmp_path / "last", "optim.ema=0.0") / "model.npz")
    mean = np.load(linear(tmp_path / "mean", "optim.ema=0.9") / "model.npz")
    assert np.abs(last["kernel"] - mean["kernel"]).max() > 1e-3


def test_a_model_does_not_tell_where_its_data_lay(tmp_path):
    config = config_of(f"data.cache={tmp_path / 'latents'}", f"init={tmp_path / 'start'}").to_dict()
    told = without_places(config)
    assert told["data"]["cache"] == "latents" and told["init"] == "start" and str(tmp_path) not in json.dumps(told)
    assert config["data"]["cache"] == str(tmp_path / "latents")


def test_a_finished_run_does_nothing_again(linear, tmp_path, capsys):
    model = linear(tmp_path / "run")
    before = (model / "model.npz").stat().st_mtime_ns
    linear(tmp_path / "run")
    assert "already finished" in capsys.readouterr().err
    assert (model / "model.npz").stat().st_mtime_ns == before


def test_a_run_that_may_report_differently_is_the_same_run(linear, tmp_path):
    linear(tmp_path / "run")
    linear(tmp_path / "run", "train.log_every=3", "train.checkpoint_every=5", "data.workers=3", "data.cache=elsewhere")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.lr_final=0.002"], "config optim.lr_final was 0.01 and is now 0.002"),
        (["train.steps=24"], "config train.steps was 12 and is now 24"),
        (["model_changes={'depth': 3}"], 'config model_changes.depth was "absent" and is now 3'),
    ],
)
def test_another_config_refuses_in_one_line(linear, tmp_path, overrides, words):
    linear(tmp_path / "run")
    with pytest.raises(UserError, match=f"cannot resume in .*{words}") as told:
        linear(tmp_path / "run", *overrides)
    assert "\n" not in str(told.value)


def test_one_run_at_a_time_in_a_work_folder(linear, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "SAME_MACHINE", 0.0)
    with locks.hold(tmp_path / "run" / ".lock", "", ""):
        with pytest.raises(UserError, match=r"another run is training in .*run \(process .* since .*another --w"):
            linear(tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_other_data_refuses_and_says_what_changed(linear, tmp_path):
    linear(tmp_path / "run")
    with pytest.raises(UserError, match='data name was "linear" and is now "curved"'):
        linear(tmp_path / "run", batches=LinearBatches(name="curved"))


def test_nan_stops_with_step_and_keys_and_is_never_saved(linear, tmp_path):
    with pytest.raises(UserError, match="loss nan.* at step 8 .samples sample7-0, .*last good checkpoint is step 4"):
        linear(tmp_path / "run", batches=LinearBatches(nan_at=7))
    bad = json.loads((tmp_path / "run" / "bad_batch.json").read_text())
    assert bad["step"] == 8 and bad["keys"] == [f"sample7-{i}" for i in range(BATCH)]
    assert not (tmp_path / "run" / "checkpoints" / "8").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_names_the_command(linear, tmp_path, capsys, number):
    before = signal.getsignal(number)
    with pytest.raises(verb.Stopped) as stopped:
        linear(tmp_path / "run", batches=LinearBatches(signal_at=6, number=number), command="do 'this thing' again")
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert (tmp_path / "run" / "checkpoints" / "7").exists() and not (tmp_path / "run" / "model").exists()
    assert "stopped at step 7 of 12; to resume run: do 'this thing' again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.batch_size=12"], "train.batch_size is 12: give a multiple of 8, the 8 device"),
        (["train.steps=0"], "train.steps is 0"),
        (["optim.ema=1.0"], "optim.ema is 1.0"),
    ],
)
def test_impossible_values(linear, tmp_path, overrides, words):
    with pytest.raises(UserError, match=words):
        linear(tmp_path / "run", *overrides)


def test_unknown_objective(tmp_path):
    with pytest.raises(UserError, match="did you mean 'diffusion'"):
        verb.train(config_of("objective=difusion"), tmp_path)


def test_a_model_folder_is_no_work_folder(linear, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is a model, not a work folder"):
        linear(tmp_path)
    (tmp_path / "run" / "model").mkdir(parents=True)
    with pytest.raises(UserError, match="finished model without checkpoints"):
        linear(tmp_path / "run")


def test_command_line_overrides():
    words, overrides = verb.split_overrides(["--config", "a.py", "--config.optim.lr=1e-3", "--workdir", "w"])
    assert words == ["--config", "a.py", "--workdir", "w"] and overrides == ["optim.lr=1e-3"]


def test_help_is_instant():
    import subprocess

    code = "import sys, scaling_perception.train; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_diffusion_from_scratch_then_fine_tuned(tmp_path, monkeypatch):
    """The real objective end to end: nano DiT learns, its model folder loads, and another run starts from it."""
    monkeypatch.setattr(verb, "_objective", lambda config, *_: diffusion_objective(config, LatentBatches()))
    one = make_mesh(devices=jax.devices()[:1])  # compiles in half the time of eight
    monkeypatch.setattr("scaling_perception.parallel.mesh.make_mesh", lambda **_: one)
    fields = ("train.steps=40", "train.log_every=10", "train.checkpoint_every=40", "optim.lr=3e-3")
    model = verb.train(config_of(*fields), tmp_path / "first")
    rows = rows_of(tmp_path / "first")
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert {"loss_depth", "loss_amodal", "loss_flow_x", "loss_flow_y"} <= rows[0].keys()
    assert rows[-1]["macs"] > 0
    params, meta = load_model(model)
    assert meta["training"]["samples"] == 40 * BATCH and meta["resolution"] == 64 and len(meta["tasks"]) == 3
    assert named_leaves(params)["patch_embed/kernel"].dtype == np.float16

    tuned = verb.train(config_of(*fields, f"init={model}"), tmp_path / "second")
    assert rows_of(tmp_path / "second")[0]["loss"] < rows[0]["loss"]
    assert load_model(tuned)[1]["latent_norm"] == meta["latent_norm"]


def test_dry_run_tells_and_makes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = str(Path(verb.__file__).parent.parent / "configs" / "depth.py") + ":model=a1,res=256"
    assert not run_verb("train", ["--config", config, "--dry-run"])
    told = capsys.readouterr().out
    assert "14,803,488 parameters" in told and "chip-hours" in told and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="--workdir is missing"):
        run_verb("train", ["--config", config])


def test_steps_to_trace_are_checked_before_anything_is_made(tmp_path):
    with pytest.raises(UserError, match="FIRST:COUNT"):
        verb.train(config_of(), tmp_path / "run", profile="ten")
    assert not (tmp_path / "run").exists()


def test_a_damaged_export_is_made_again(linear, tmp_path, capsys):
    model = linear(tmp_path)
    before, broken = (model / "model.npz").read_bytes(), model / "model.safetensors"
    save_tree(broken, {"a": np.zeros(9, np.float32)})
    assert not damage_of(model)
    broken.write_bytes(broken.read_bytes()[:-4])
    capsys.readouterr()
    assert linear(tmp_path) == model and not broken.exists() and (model / "model.npz").read_bytes() == before
    text = capsys.readouterr().err
    assert f"{broken} is no whole safetensors file" in text and "the model is exported anew" in text
    linear(tmp_path)
    assert "already finished" in capsys.readouterr().err


@pytest.mark.parametrize("harm", [lambda shards: shards[0].unlink(), lambda shards: os.truncate(shards[1], 90)])
def test_the_damage_of_several_files_is_found(tmp_path, harm):
    tensors = {name: np.zeros(9, np.float32) for name in "ab"}
    slices = [(name, (), array) for name, array in tensors.items()]
    *shards, _ = save_sharded(tmp_path, tensors, slices, max_shard_bytes=40)
    assert not damage_of(tmp_path)
    harm(shards)
    assert damage_of(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    (tmp_path / "config.json").write_text("{}")
    assert damage_of(tmp_path) == f"{tmp_path} has no weights"


def test_a_finished_folder_and_other_options(linear, tmp_path, capsys):
    model = linear(tmp_path)
    before = (model / "model.npz").read_bytes()
    capsys.readouterr()
    linear(tmp_path, "train.log_every=3", "mesh.fsdp=2")
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"already finished: {model}")
    assert "mesh.fsdp: 1 there, 2 here" in line and "train.log_every: 4 there, 3 here" in line
    words = 'finished with other settings .train.export_dtype: "float16" there, "bfloat16" here'
    with pytest.raises(UserError, match=words):
        linear(tmp_path, "train.export_dtype=bfloat16")
    linear(tmp_path, "train.log_every=3", "mesh.fsdp=2")  # what was refused left no trace
    assert "there" not in capsys.readouterr().err and (model / "model.npz").read_bytes() == before
