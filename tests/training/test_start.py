"""Runs that start from a model of another shape: the loss goes on where it was, and then falls."""

import contextlib
import dataclasses
import json
from itertools import count
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import BATCH, config_of

from scaling_perception import train as verb
from scaling_perception.data.pipeline import open_batches
from scaling_perception.diffusion.schedules import get_diffusion
from scaling_perception.interop.model_folder import load_model, save_model
from scaling_perception.models.autoencoders import load_autoencoder
from scaling_perception.models.dit import DiT, DiTConfig, abstract_params, position_table
from scaling_perception.models.surgery import extend_labels
from scaling_perception.parallel.mesh import make_mesh
from scaling_perception.support.configs import load_config
from scaling_perception.support.errors import UserError
from scaling_perception.training.checkpoints import newest_meta
from scaling_perception.training.diffusion import diffusion_objective, latents_of, make_loss, network_of
from scaling_perception.training.identity import as_json
from scaling_perception.training.optim import make_optimizer
from scaling_perception.training.start import check_latents, starting_point
from scaling_perception.training.state import new_state

KEY = jax.random.key(11)
DIT = DiTConfig("dit", input_size=4, dim=32, depth=2, heads=2, num_classes=10)  # nano's blocks, trained on classes
TOY = "task=generalist,model=nano,res=64,source=scenes,vae=tiny,diffusion=paper"
SHORT = ["train.steps=30", "train.log_every=10", "train.checkpoint_every=30", "train.batch_size=8", "optim.warmup=2"]
SHORT += ["optim.ema=0.9", "optim.lr=3e-3", "optim.lr_final=1e-3"]


class SceneLatents:
    """Four batches of scenes of 64 pixels, encoded once."""

    def __init__(self):
        config = config_of()
        data = {**config.data.to_dict(), "resolution": 64, "task_options": config.task_options.to_dict()}
        pixels = open_batches(data, BATCH, 0)
        vae = load_autoencoder("tiny")
        encode = jax.jit(lambda params, images: vae.encode(params, images)[0])
        self.fingerprint, self.batches = {"name": "scenes"}, []
        self.autoencoders, self.class_count = set(), 0
        for step in range(4):
            batch = dict(pixels.at(step))
            found = latents_of({**batch, "constants": vae.params}, encode, 2)
            named = zip(("image", "prompt", "target", "valid"), map(np.asarray, found), strict=True)
            self.batches.append({**batch, **dict(named)})

    def at(self, step):
        return dict(self.batches[step % 4])

    def iterate(self, start):
        return (self.at(step) for step in count(start))


@pytest.fixture(scope="module")
def scenes():
    return SceneLatents()


@pytest.fixture(scope="module")
def run(scenes):
    """Runs train() on the scenes; takes the work folder and a config."""
    one = make_mesh(devices=jax.devices()[:1])  # compiles in half the time of eight

    def train(workdir, config):
        model = verb.train(config, workdir)
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert all(np.isfinite(row["loss"]) for row in rows)
        return model, rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verb, "_objective", lambda config, _, saved: diffusion_objective(config, scenes, None, saved))
        patch.setattr("scaling_perception.parallel.mesh.make_mesh", lambda **_: one)
        yield train


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A model folder as the import of a class-conditional DiT writes it, with random weights, and these."""
    folder = tmp_path_factory.mktemp("converted") / "dit"
    rng = np.random.default_rng(4)
    params = jax.tree.map(lambda x: rng.normal(0, 0.15, x.shape).astype(np.float32), abstract_params(DIT))
    params["pos_embed"] = position_table(32, 2)
    diffusion = {"schedule": "linear", "prediction": "epsilon", "spacing": "leading"}
    meta = {"model": dataclasses.asdict(DIT), "resolution": 32, "autoencoder": "tiny", "diffusion": diffusion}
    norm = {"shift": [[9.0] * 4], "scale": [[9.0] * 4]}  # of no meaning for tasks that it does not have
    save_model(folder, params, {**meta, "tasks": [], "task_options": {}, "latent_norm": norm})
    return folder, params


@pytest.fixture(scope="module")
def dense(run, converted, tmp_path_factory):
    """Work folder of a generalist that was fine-tuned from it, and what its training told."""
    folder = tmp_path_factory.mktemp("dense")
    return folder, run(folder, tuned(converted[0]))[1]


def tuned(init, *overrides):
    """The config that fine-tunes the model ``init`` densely."""
    return load_config(f"configs/from_dit.py:{TOY},init={init}", [*SHORT, *overrides])


def upcycled(init, *overrides, gating="renormalised"):
    """The config that upcycles it to 2 of 4 experts."""
    return load_config(f"configs/upcycle.py:{TOY},init={init},experts=4,gating={gating}", [*SHORT, *overrides])


def first_loss(objective, scenes, params=None):
    batch = {name: jnp.asarray(value) for name, value in scenes.at(0).items() if name != "key"}
    value, metrics = jax.jit(objective.loss)(objective.starting_params if params is None else params, batch, KEY)
    return float(value), {name: float(metric) for name, metric in metrics.items()}


class Averaging:
    """The class-conditional DiT itself, shown the mean of the latents that the widened one sees."""

    def __init__(self, config, network):
        self.config, self.network = config, network

    def apply(self, variables, x, t, label, with_stats=False):
        mean = x.reshape(*x.shape[:3], -1, 4).mean(axis=3)
        rows = label - self.config.num_classes + self.network.num_classes
        return DiT(self.network).apply(variables, mean, t, rows, with_stats=with_stats)


def test_a_widened_model_starts_with_the_loss_of_the_dit_on_the_mean_of_its_latents(converted, scenes, dense):
    folder, params = converted
    config = tuned(folder)
    objective = diffusion_objective(config, scenes)
    norm = objective.meta["latent_norm"]
    assert norm["scale"] == [[1.0] * 4] * 4  # the config's own
    tasks, network = extend_labels(params, dataclasses.replace(DIT, input_size=8))
    tasks["pos_embed"] = position_table(32, 4)
    old = Averaging(objective.model, network)
    reference = objective._replace(loss=make_loss(old, get_diffusion("paper"), config, norm, None))
    value, _ = first_loss(objective, scenes)
    assert value == pytest.approx(first_loss(reference, scenes, tasks)[0], rel=1e-5)
    rows = dense[1]  # and training takes it from there
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


def test_an_upcycled_model_goes_on_with_the_loss_of_the_dense_one(dense, scenes, run, tmp_path, capsys):
    folder, _ = dense
    before, _ = first_loss(diffusion_objective(tuned(folder), scenes), scenes)
    config = upcycled(folder)
    objective = diffusion_objective(config, scenes)
    value, metrics = first_loss(objective, scenes)
    assert metrics["mse"] == pytest.approx(before, rel=1e-5)
    assert value == pytest.approx(before + 0.01 * 2 * metrics["balance"], rel=1e-5)  # two layers

    state = new_state(objective.starting_params, make_optimizer(config.optim, 10, objective.frozen)[0])
    jax.tree.map(np.testing.assert_array_equal, state.ema, objective.starting_params)
    model, rows = run(tmp_path / "run", config)
    assert rows[-1]["mse"] < 0.95 * rows[0]["mse"]
    for row in rows:  # how the experts are used is told to the end
        assert row["grad_norm"] > 0 and row["dropped"] == 0 and row["tokens_per_second"] > 0
        assert 0 <= row["expert_load_min"] <= 1 <= row["expert_load_max"] <= 4
        assert 0 < row["router_entropy"] <= np.log(4) + 1e-6 and row["balance"] > 0.9
    params, meta = load_model(model)
    steps = ["MLPs upcycled to 4 experts, 2 active (gating renormalised: same function)"]
    assert meta["init"] == {"model": "nano", "steps": steps} and meta["model"]["experts"] == 4
    assert f"init {folder}: {steps[0]}\n" in capsys.readouterr().err
    # resumed, it needs the model it started from no more
    saved = newest_meta(tmp_path / "run" / "checkpoints")
    again = diffusion_objective(upcycled(tmp_path / "moved"), scenes, resumed=saved)
    assert again.starting_params is None and as_json(again.meta) == saved
    assert "moved" not in capsys.readouterr().err
    assert (
        "init" not in diffusion_objective(upcycled(tmp_path / "run"), scenes).meta
    )  # the same shapes: nothing to tell


def test_the_papers_gating_is_off_by_its_shrink(dense, scenes):
    plain = diffusion_objective(tuned(dense[0]), scenes)
    before, _ = first_loss(plain, scenes)
    objective = diffusion_objective(upcycled(dense[0], gating="paper"), scenes)
    assert first_loss(objective, scenes)[1]["mse"] != pytest.approx(before, rel=1e-5)

    def scaled(params, gain):  # every MLP's output times `gain`
        fc2 = jax.tree.map(lambda leaf: gain * leaf, params["blocks"]["mlp"]["fc2"])
        blocks = {**params["blocks"], "mlp": {**params["blocks"]["mlp"], "fc2": fc2}}
        return {**params, "blocks": blocks}

    # a router of zeros gives each expert a score of 1/4: two of them sum to one half
    moe = objective.starting_params["blocks"]["moe"]
    even = {**moe, "router": jax.tree.map(np.zeros_like, moe["router"])}
    params = {**objective.starting_params, "blocks": {**objective.starting_params["blocks"], "moe": even}}
    shrunk, _ = first_loss(plain, scenes, scaled(plain.starting_params, 0.5))
    assert first_loss(objective, scenes, params)[1]["mse"] == pytest.approx(shrunk, rel=1e-5)


def test_what_the_config_says_of_surgery_is_used(converted, dense, capsys):
    folder, params = converted
    kernel = starting_point(tuned(folder, "init_gain=released"), dataclasses.replace(DIT, cond_channels=8))[0]
    expected = params["patch_embed"]["kernel"] * np.float32(0.33)
    np.testing.assert_array_equal(kernel["patch_embed"]["kernel"][:, :, 4:8], expected)

    exact = load_model(dense[0] / "model")[0]["blocks"]["mlp"]["fc1"]["kernel"]
    config = upcycled(dense[0], "upcycle.noise=0.1")
    start, meta = starting_point(config, network_of(config))
    experts = start["blocks"]["moe"]["experts"]["fc1"]["kernel"]
    assert 0.09 < np.std(experts - exact[:, None]) / exact.std() < 0.11
    assert "noise 0.1" in meta["surgery"][0]
    assert "it was trained" not in capsys.readouterr().err
    config = upcycled(dense[0], "seed=5", "diffusion=fixed")
    other = starting_point(config, network_of(config))[0]["blocks"]["moe"]["router"]["kernel"]
    assert np.all(other != start["blocks"]["moe"]["router"]["kernel"])
    told = "it was trained to predict epsilon on cosine, and this config says v on cosine"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model_changes.depth=3"], r"init \S+: depth is 2 in model nano and 3 in nano, .*: choose model=nano"),
        (["init_surgery=none"], r"init: blocks/mlp/fc1/bias is \(2, 128\) .* init_surgery=auto"),
        (["init_surgery=yes"], "init_surgery is 'yes'; known: auto, none"),
        (["upcycle.drop=2.0"], "upcycle.drop is 2.0"),
    ],
)
def test_starts_that_are_refused(dense, scenes, overrides, words):
    with pytest.raises(UserError, match=words) as told:
        diffusion_objective(upcycled(dense[0], *overrides), scenes)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("named", "was", "channels", "fits"),
    [("tiny+lite0", "tiny", 0, True), ("tiny+lite0", "tiny", 8, False), ("tiny", "tiny+lite0", 0, False)],
)
def test_a_start_of_classes_never_saw_features(named, was, channels, fits):
    config = SimpleNamespace(init="runs/classes", autoencoder=named)
    start = {"autoencoder": was, "autoencoder_id": load_autoencoder(was).id, "model": {"cond_channels": channels}}
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match="trained in the latents of autoencoder"):
        check_latents(config, start, load_autoencoder(named).id)
