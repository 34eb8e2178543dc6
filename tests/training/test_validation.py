import json
import shutil

import jax
import numpy as np
import pytest
from toys import BATCH, LinearBatches, config_of, linear_objective

from scaling_perception import train as verb
from scaling_perception.parallel.mesh import make_mesh, replicated
from scaling_perception.support.configs import flatten
from scaling_perception.support.errors import UserError
from scaling_perception.training.checkpoints import Checkpoints, load_ema
from scaling_perception.training.identity import FREE, LATER, same_run
from scaling_perception.training.validation import held_out_batches, make_validation


class Pieces(LinearBatches):
    """Held-out samples, of which a batch takes ``size``; sample i is the same whatever the size."""

    def __init__(self, size=BATCH, **fields):
        super().__init__(**fields)
        self.size = size

    def at(self, step):
        many = [super(Pieces, self).at(10_000 + i // BATCH) for i in range(step * self.size, (step + 1) * self.size)]
        rows = [i % BATCH for i in range(step * self.size, (step + 1) * self.size)]
        return {name: np.stack([one[name][row] for one, row in zip(many, rows, strict=True)]) for name in "xy"}


def noisy_objective(size=BATCH, **fields):
    """The linear problem, the noise of each sample drawn by its place."""
    plain = linear_objective(**fields)

    def loss(params, batch, key):
        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (3,)))(batch["index"])
        return plain.loss(params, {**batch, "x": batch["x"] + 0.1 * noise}, key)

    return plain._replace(loss=loss, held_out=Pieces(size))


EVERY = ("train.validate_every=4", "train.validate_samples=16")


@pytest.fixture
def linear(monkeypatch):
    def run(workdir, *overrides, objective=None, **batches):
        chosen = objective or noisy_objective(batches=LinearBatches(**batches))
        monkeypatch.setattr(verb, "_objective", lambda config, *_: chosen)
        return verb.train(config_of("optim.lr=0.05", "optim.lr_final=0.01", *overrides), workdir)

    return run


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def document(workdir, step):
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())


def test_the_number_depends_on_weights_and_key_alone():
    """Not on devices or the size of a chunk, nor on when it is asked for."""
    config = config_of(*EVERY)
    found = []
    for size, devices in ((8, 8), (4, 4), (2, 1)):
        config.train.batch_size = size
        mesh = make_mesh(devices=jax.devices()[:devices])
        objective = noisy_objective(size, jitter=0.0)
        validate = make_validation(objective, config, mesh)
        key = jax.device_put(jax.random.key(5), replicated(mesh))
        params = jax.device_put(jax.jit(objective.init)(jax.random.key(0)), replicated(mesh))
        found += [validate(params, key, None), validate(params, key, None)]
    assert found[0] == found[1] and found[0].keys() == {"held_out_loss", "held_out_largest"}
    for other in found[2:]:
        assert other["held_out_loss"] == pytest.approx(found[0]["held_out_loss"], rel=1e-5)
    bent = jax.tree.map(lambda leaf: leaf * 1.01, params)
    assert validate(bent, key, None)["held_out_loss"] != found[-1]["held_out_loss"]


def test_it_is_told_and_touches_nothing_of_the_training(linear, tmp_path):
    linear(tmp_path / "with", *EVERY, "train.log_every=6", "train.keep_best=1", "train.keep=1")
    rows = rows_of(tmp_path / "with")
    assert [row["step"] for row in rows] == [4, 6, 8, 12]
    losses = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
    assert all(0 <= row["data_wait"] <= 1 and row["spent_evaluate"] > 0 for row in rows)
    assert document(tmp_path / "with", 12)["metrics"]["held_out_loss"] == losses[-1]
    linear(tmp_path / "without", "train.log_every=6")
    assert document(tmp_path / "with", 12)["leaves"] == document(tmp_path / "without", 12)["leaves"]


def worsening(linear, workdir, *overrides):
    """A run whose held-out loss is best in the middle, for then its samples change."""
    objective = noisy_objective()
    at, asked = objective.held_out.at, []

    def later(step):
        asked.append(step)
        batch = at(step)
        return {**batch, "y": batch["y"] * np.float32(3 if len(asked) > 4 else 1)}

    objective.held_out.at = later
    return linear(workdir, *EVERY, *overrides, objective=objective)


def test_the_best_is_kept_and_can_be_what_is_exported(linear, tmp_path):
    last = worsening(linear, tmp_path / "last", "train.keep=1", "train.keep_best=1")
    assert sorted(path.name for path in (tmp_path / "last" / "checkpoints").iterdir()) == ["12", "8"]
    best = worsening(linear, tmp_path / "best", "train.keep=1", "train.keep_best=1", "train.export_from=best")
    eight, _ = load_ema(tmp_path / "best" / "checkpoints", step=8)
    twelve, step = load_ema(tmp_path / "last" / "checkpoints")
    assert step == 12
    np.testing.assert_array_equal(np.load(best / "model.npz")["kernel"], eight["layer"]["kernel"])
    np.testing.assert_array_equal(np.load(last / "model.npz")["kernel"], twelve["layer"]["kernel"])
    with pytest.raises(UserError, match="no whole checkpoint 4"):
        shutil.rmtree(tmp_path / "best" / "checkpoints" / "8" / "ema")
        load_ema(tmp_path / "best" / "checkpoints", step=4, warn=lambda _: None)


def test_without_held_out_samples_the_mean_training_loss_is_compared(linear, tmp_path):
    linear(tmp_path, "train.keep_best=1", "train.log_every=1")
    rows = rows_of(tmp_path)
    mean = np.mean([row["loss"] for row in rows if 8 < row["step"] <= 12])
    assert document(tmp_path, 12)["metrics"]["loss"] == pytest.approx(mean)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, 0, 1)
    assert checkpoints.best()[0] == (document(tmp_path, 12)["metrics"]["loss"], 12)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.keep_best=1", "train.best_metric=lost"], "has no metric 'lost'; did you mean 'loss'"),
        (["train.keep_best=1", "train.best_metric=held_out_loss"], "set train.validate_every and held_out as well"),
        ([*EVERY, "train.keep_best=1", "train.checkpoint_every=6"], "checkpoint_every is 6: give a multiple of .*, 4,"),
        (["train.export_from=best"], "set train.keep_best"),
        (["train.export_from=beast"], "train.export_from is 'beast'; did you mean 'best'"),
        (["train.validate_every=-1"], "train.validate_every is -1"),
        (["train.validate_every=4", "train.validate_samples=12"], "give a multiple of 8, a part of a batch"),
        (["train.validate_every=4", "train.validate_samples=4"], "give a multiple of 8, the devices"),
    ],
)
def test_impossible_values(linear, tmp_path, overrides, words):
    with pytest.raises(UserError, match=words):
        linear(tmp_path, *overrides)


def test_an_objective_that_holds_nothing_out(linear, tmp_path):
    with pytest.raises(UserError, match="this objective holds nothing out"):
        linear(tmp_path, *EVERY, objective=linear_objective())


# ---- Which samples ---------------------------------------------------------------------------------------------------


def scenes(config, **entry):
    own = {"source": "scenes", "task": "depth", "start": 100, "count": 8, **entry}
    config.held_out.mixture = {"depth": own}
    return config


def data_of(config):
    data = {**config.data.to_dict(), "resolution": 32, "task_options": config.task_options.to_dict()}
    return {**data, "mixture": {"depth": {"source": "scenes", "task": "depth", "count": 100}}}


def test_held_out_scenes_are_others_and_fit():
    from scaling_perception.data.pipeline import open_batches

    config = config_of("train.validate_every=4", "train.validate_samples=4", "train.batch_size=2").unlock()
    training = open_batches(data_of(config), 2, 0)
    held = held_out_batches(scenes(config), data_of(config), training)
    batch = held.at(1)
    assert batch["target"].shape == (2, 32, 32, 3)
    seen = {key for step in range(60) for key in training.elements(step)}
    assert len(seen) > 90 and not set(batch["key"]) & set(training.at(0)["key"])
    assert held_out_batches(config_of(), data_of(config), training) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"start": 99}, "held_out.mixture.depth holds samples of data.mixture.depth"),
        ({"start": 50, "count": 0}, "holds samples of"),
        ({"cache": "a:b"}, "held_out.cache a:b is trained on"),
        (None, "nothing is held out: set held_out.cache"),
    ],
)
def test_samples_that_are_trained_on_are_refused(fields, words):
    config = config_of("train.validate_every=4").unlock()
    data = data_of(config)
    if fields and "cache" in fields:
        config.held_out.cache, data["cache"] = fields["cache"], "c:b"
    elif fields:
        scenes(config, **fields)
    with pytest.raises(UserError, match=words):
        held_out_batches(config, data, None)


# ---- Resuming with the fields that came later ------------------------------------------------------------------------

NEW = ("on_spike", "spike_factor", "spike_window", "check_replicas", "keep_best", "best_metric", "export_from")
NEW += ("validate_every", "validate_samples", "wandb")


def test_a_run_from_before_these_fields_resumes(tmp_path):
    now = {"config": config_of().to_dict(), "data": {}, "meta": {}}
    old = json.loads(json.dumps(now))
    del old["config"]["held_out"]
    for name in NEW:
        del old["config"]["train"][name]
    for name in ("ema_every", "ema_dtype", "ema_place"):
        del old["config"]["optim"][name]
    same_run(old, json.loads(json.dumps(now)), tmp_path)
    for field in ("optim.ema_every=2", "optim.ema_dtype=bfloat16"):
        other = {**now, "config": config_of(field).to_dict()}
        with pytest.raises(UserError, match=f"{field.split('=')[0]} was .* and is now"):
            same_run(old, json.loads(json.dumps(other)), tmp_path)
    assert set(FREE) | set(LATER) <= flatten(now["config"]).keys()


def test_what_is_held_out_may_come_later_but_not_change(tmp_path):
    def described(*fields):
        return json.loads(json.dumps({"config": config_of(*fields).to_dict(), "data": {}, "meta": {}}))

    before, one = described(), described(*EVERY, "held_out.cache=one")
    same_run(before, one, tmp_path)
    same_run(one, before, tmp_path)
    with pytest.raises(UserError, match='held_out.cache was "one" and is now "two"'):
        same_run(one, described(*EVERY, "held_out.cache=two"), tmp_path)


def test_shared_samples_are_refused_unless_they_are_wanted(capsys):
    from scaling_perception.data.pipeline import open_batches

    config = config_of("train.validate_every=4", "train.validate_samples=4", "train.batch_size=2").unlock()
    scenes(config, start=98, count=8, split="")  # spelled in another way than the training's
    data = data_of(config)
    data["mixture"]["depth"]["split"] = "train"
    with pytest.raises(
        UserError, match=r"held_out: 2 of its samples .* \(scene-0000000098, scene-0000000099\): hold out other ones"
    ):
        held_out_batches(config, data, open_batches(data, 2, 0))
    config.held_out.shared = True
    assert held_out_batches(config, data, open_batches(data, 2, 0)) is not None
    assert "2 of its samples are trained on as well" in capsys.readouterr().err
