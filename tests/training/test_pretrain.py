"""Pre-training: the loss and where its gradient goes, a run from pictures to samples, and what starts from it."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from applying import LIKE_PROGRAMS
from PIL import Image
from toys import BATCH

from scaling_perception import train as verb
from scaling_perception.diffusion.guidance import guided
from scaling_perception.diffusion.schedules import get_diffusion
from scaling_perception.diffusion.solvers import sampler_tables
from scaling_perception.inference.class_pictures import example_classes, sample_classes, sheet
from scaling_perception.interop.model_folder import load_model
from scaling_perception.models.dit import DiT, position_table
from scaling_perception.models.presets import at_resolution, get_preset
from scaling_perception.support.configs import load_config
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import run_verb
from scaling_perception.training import pretrain
from scaling_perception.training.diffusion import diffusion_objective, network_of
from scaling_perception.training.start import starting_point

SPEC = "configs/pretrain.py:model=nano,res=64,source=textures,vae=tiny,classes=6,steps=3,batch=8"
NORM = {"shift": [[0.5, -1.0, 0.25, 0.0]], "scale": [[1.5, 0.5, 2.0, 1.0]]}
PRESET = get_diffusion("paper", schedule="linear")


class Stub:
    """Stands for a DiT: remembers what it is called with; its noise is a multiple of its input, its variance is 7."""

    def __init__(self, config):
        self.config, self.seen = config, {}

    def apply(self, variables, x, t, label, with_stats):
        self.seen = {"x": x, "t": t, "label": label}
        return jnp.concatenate([variables["params"] * x, jnp.full_like(x, 7.0)], axis=-1), {}


def config_of(*overrides):
    return load_config(SPEC, ["train.log_every=1", "samples.count=5", "samples.steps=2", *overrides])


def latents(seed=0, size=BATCH, side=8):
    rng = np.random.default_rng(seed)
    return {
        "target": rng.normal(size=(size, side, side, 4)).astype(np.float32),
        "target_logvar": rng.uniform(-6, -2, (size, side, side, 4)).astype(np.float32),
        "valid": np.ones((size, side, side), bool),
        "label": np.arange(size, dtype=np.int32) % 6,
        "pass_id": np.full(size, 4, np.int32),
    }


def random_params(dit, scale=0.2):
    """A fresh network is silent: its last layers are zero."""
    shapes = jax.eval_shape(lambda key: DiT(dit).init(key, *example(dit)), jax.random.key(0))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    drawn = [np.random.default_rng(i).normal(0, scale, leaf.shape).astype(np.float32) for i, leaf in enumerate(leaves)]
    return {**tree.unflatten(drawn), "pos_embed": position_table(dit.dim, dit.grid)}


def example(dit):
    return jnp.zeros((1, dit.input_size, dit.input_size, dit.input_channels)), jnp.zeros(1), jnp.zeros(1, jnp.int32)


@pytest.fixture(scope="module")
def dit():
    return network_of(config_of())


def test_loss_is_mse_plus_bound_of_what_was_drawn(dit):
    model, config, batch = Stub(dit), config_of("label_dropout=0.5"), latents()
    del batch["target_logvar"]
    loss = pretrain.generation_parts(model, PRESET, config, NORM, None).loss
    value, metrics = loss(jnp.asarray(0.3), {k: jnp.asarray(v) for k, v in batch.items()}, jax.random.key(5))
    noisy, t = np.asarray(model.seen["x"], np.float64), np.asarray(model.seen["t"])
    assert noisy.shape[-1] == 4  # the noisy latent alone
    clean = (batch["target"].astype(np.float64) - NORM["shift"][0]) / NORM["scale"][0]
    level = PRESET.alphas_cumprod()[t][:, None, None, None]
    eps = (noisy - np.sqrt(level) * clean) / np.sqrt(1 - level)
    assert abs(eps[t > 300].std() - 1) < 0.1
    assert float(metrics["mse"]) == pytest.approx(np.square(0.3 * noisy - eps).mean(), rel=1e-3)
    tables = pretrain.variance_tables(PRESET)
    seven = np.full_like(noisy, 7.0)  # what the stand-in says of the variance
    bits = pretrain.learned_range_bits(tables, "epsilon", *map(jnp.float32, (0.3 * noisy, seven, clean, noisy)), t)
    assert float(metrics["bound"]) == pytest.approx(float(bits.mean()), rel=1e-3)
    assert float(value) == pytest.approx(float(metrics["mse"] + metrics["bound"]), rel=1e-6)
    label = np.asarray(model.seen["label"])
    kept = label != dit.null_label
    np.testing.assert_array_equal(label[kept], batch["label"][kept])
    assert 0 < kept.sum() < BATCH and dit.null_label == 6


def test_labels_are_dropped_at_their_rate_and_absent_ones_are_null(dit):
    size = 20_000
    label, index = jnp.full(size, 3).at[:5].set(-1), jnp.arange(size)
    rows = np.asarray(pretrain.dropped_labels(label, dit, 0.1, jax.random.key(0), index))
    assert set(rows) == {3, 6} and (rows[:5] == 6).all()
    assert np.mean(rows[5:] == 6) == pytest.approx(0.1, abs=0.01)
    assert (np.asarray(pretrain.dropped_labels(label, dit, 0.0, jax.random.key(0), index))[5:] == 3).all()


def test_the_latent_is_drawn_from_the_posterior_by_the_place_in_the_batch():
    batch = latents(size=64)
    index = jnp.arange(64)
    drawn = np.asarray(pretrain.latent_draw(batch, None, jax.random.key(1), index))
    noise = (drawn - batch["target"]) / np.exp(0.5 * batch["target_logvar"])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    other = np.random.default_rng(0).permutation(64)  # however the batch is cut up, each sample keeps its draw
    mixed = {name: value[other] for name, value in batch.items()}
    again = np.asarray(pretrain.latent_draw(mixed, None, jax.random.key(1), jnp.asarray(other)))
    np.testing.assert_array_equal(again, drawn[other])
    assert not np.allclose(drawn, pretrain.latent_draw(batch, None, jax.random.key(2), index))
    del batch["target_logvar"]  # of an autoencoder without a variance
    np.testing.assert_array_equal(pretrain.latent_draw(batch, None, jax.random.key(1), index), batch["target"])

    def moments(params, images):
        mean = params * images[:, ::8, ::8].mean(-1, keepdims=True)
        return jnp.broadcast_to(mean, (64, 8, 8, 4)), jnp.full((64, 8, 8, 4), -jnp.inf)

    pixels = {"target": np.ones((64, 64, 64, 3), np.float32), "constants": jnp.asarray(2.0)}
    np.testing.assert_array_equal(pretrain.latent_draw(pixels, moments, jax.random.key(1), index), 2.0)


def test_the_bound_trains_the_variance_channels_alone(dit, monkeypatch):
    config, batch, params = config_of(), latents(), random_params(dit)
    fields = {name: jnp.asarray(value) for name, value in batch.items()}
    slopes = []
    for bound in (True, False):
        if not bound:
            monkeypatch.setattr(pretrain, "learned_range_bits", lambda *_: jnp.zeros(BATCH))
        loss = pretrain.generation_parts(DiT(dit), PRESET, config, NORM, None).loss
        of = jax.value_and_grad(lambda p, loss=loss: loss(p, fields, jax.random.key(2)), has_aux=True)
        slope = jax.jit(of, compiler_options=LIKE_PROGRAMS)
        slopes.append(slope(params))
    (both, metrics), gradient = slopes[0]
    (plain, _), alone = slopes[1]
    assert float(metrics["mse"]) == float(plain) and float(both) > float(plain)
    kernels = [np.asarray(g["final"]["linear"]["kernel"]).reshape(32, 4, 8) for g in (gradient, alone)]
    np.testing.assert_array_equal(kernels[0][..., :4], kernels[1][..., :4])
    assert not kernels[1][..., 4:].any() and np.abs(kernels[0][..., 4:]).max() > 1e-4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model_changes.cond_channels=4"], "model_changes.cond_channels is 4: generation has none"),
        (["model_changes.task_labels=4"], "model_changes.task_labels is 4"),
        (["model_changes.num_classes=0"], "num_classes is 0: set it to the number of classes"),
        (["label_dropout=1.5"], "label_dropout is 1.5"),
        (["data.mixture={'a': {'task': 'depth'}, 'b': {'task': 'generation'}}"], "so train it alone"),
    ],
)
def test_networks_that_cannot_be_pre_trained(overrides, words):
    with pytest.raises(UserError, match=words):
        network_of(config_of(*overrides))


def test_more_classes_than_rows_are_refused():
    small = dataclasses.replace(get_preset("a1"), num_classes=5)
    with pytest.raises(UserError, match="the data has 6 classes and the model 5: set model_changes.num_classes=6"):
        pretrain.check_classes(small, 6)
    assert pretrain.check_classes(get_preset("a1"), 6) == 6
    assert pretrain.check_classes(get_preset("a1"), 0) == 1000


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_device):
    """A short run from pictures: rendered, encoded on the way, trained, exported, sampled."""
    folder = tmp_path_factory.mktemp("pretrain")
    verb.train(config_of("data.mixture.generation.count=48"), folder / "run")
    return folder / "run"


def test_a_run_ends_in_a_starting_point_with_samples(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and {row["lr"] for row in rows} == {float(np.float32(1e-4))}
    assert all(row["loss"] == pytest.approx(row["mse"] + row["bound"], rel=1e-5) for row in rows)
    params, meta = load_model(run / "model")
    assert meta["tasks"] == [] and meta["classes"] == 6 and meta["diffusion"]["schedule"] == "linear"
    assert params["label_embed"].shape == (7, 32) and params["patch_embed"]["kernel"].shape == (2, 2, 4, 32)
    with Image.open(run / "model" / "samples.png") as picture:
        assert picture.size == (4 * 66 - 2, 2 * 66 - 2)
    card = (run / "model" / "README.md").read_text()
    assert "pre-trained, without a task" in card


def test_perception_starts_from_it(run):
    config = load_config(f"configs/depth.py:model=nano,res=64,source=scenes,init={run},diffusion=paper")
    start, meta = starting_point(config, network_of(config))
    assert start["patch_embed"]["kernel"].shape[-2] == 8 and meta["surgery"]


def test_the_verb_draws_classes(run, tmp_path, capsys):
    words = ["--model", str(run), "--steps", "2", "--classes", "0,5,3"]
    for name, more in (("a", []), ("b", ["--solver", "ddpm"]), ("c", ["--guidance", "1"])):
        assert run_verb("generate", [*words, "--out", str(tmp_path / f"{name}.png"), *more]) == 0
    assert "classes 0, 5, 3, 3 to a row" in capsys.readouterr().out
    for wrong, what in (("7", "class 7: give one or more of 0..5"), ("a", "give whole numbers")):
        with pytest.raises(UserError, match=what):
            run_verb("generate", [*words[:-1], wrong, "--out", str(tmp_path / "x.png")])
    with pytest.raises(UserError, match="draws no classes"):
        run_verb("generate", ["--model", "mini", "--out", str(tmp_path / "x.png")])


def test_cached_latents_train_as_pictures_do(tmp_path):
    words = ["--latents", "--resolution", "64", "--count", "24", "--workers", "0", "--flips", "none", "--batch", "3"]
    run_verb("prepare", ["textures", "--out", str(tmp_path / "cache"), *words])
    values = []
    for cache in ("", str(tmp_path / "cache")):
        config = config_of(f"data.cache={cache}", "data.mixture.generation.count=24", "data.flip=false")
        objective = diffusion_objective(config)
        params = random_params(objective.model)
        batch = {name: value for name, value in objective.batches.at(1).items() if name != "key"}
        loss = objective.loss(params, {**batch, "constants": objective.constants}, jax.random.key(0))[0]
        values.append(float(loss))
    assert values[0] == pytest.approx(values[1], rel=2e-3)


def test_normalised_latents(monkeypatch):
    batch = {**latents(), "key": [""] * BATCH}
    del batch["target_logvar"]
    batch["target"] = 3 * batch["target"] + 1
    source = types.SimpleNamespace(at=lambda step: batch, fingerprint={}, autoencoders=set(), class_count=0)
    objective = diffusion_objective(config_of("latent_norm=auto"), source)  # type: ignore[arg-type]
    norm = objective.meta["latent_norm"]
    np.testing.assert_allclose(norm["scale"], batch["target"].reshape(1, -1, 4).std(1), atol=1e-4)


def test_sampling_is_guided_and_each_picture_is_its_own():
    dit = at_resolution(get_preset("nano", cond_channels=0, task_labels=0, routed=False, num_classes=6), 32)
    params, tables = random_params(dit), sampler_tables(PRESET, 3)
    labels = [4, 0, 4]
    got = sample_classes(dit, params, tables, labels, guidance=3.0, key=7)
    assert got.shape == (3, 4, 4, 4)
    np.testing.assert_allclose(got[:2], sample_classes(dit, params, tables, labels[:2], guidance=3.0, key=7), atol=1e-5)
    assert np.abs(got[0] - got[2]).max() > 0.1  # of one class, from other noise

    x = np.stack(
        [
            jax.random.normal(jax.random.fold_in(jax.random.fold_in(jax.random.key(7), i), 0), (4, 4, 4))
            for i in range(3)
        ]
    )
    both = jnp.asarray([*labels, 6, 6, 6])
    network = jax.jit(lambda x, t: DiT(dit).apply({"params": params}, x, jnp.full(6, t), both))
    step = guided(lambda x, t: network(x, t)[..., :4], 3.0)
    for i in range(3):
        out = np.asarray(step(jnp.asarray(x, jnp.float32), tables.t[i]))
        whole = np.asarray(network(jnp.concatenate([x, x]).astype(jnp.float32), tables.t[i]))
        conditional, unconditional = whole[:3, ..., :4], whole[3:, ..., :4]
        by_hand = unconditional + 3.0 * (conditional - unconditional)
        by_hand[..., 3] = conditional[..., 3]
        np.testing.assert_allclose(out, by_hand, atol=1e-4)
        clean = tables.x0_x[i] * x + tables.x0_out[i] * out
        x = tables.next_x[i] * x + tables.next_x0[i] * clean
    np.testing.assert_allclose(got, x, rtol=1e-3, atol=1e-3)


def test_sheets_and_example_classes():
    assert example_classes(1000, 3) == [207, 360, 387] and example_classes(6, 3) == [0, 2, 4]
    assert example_classes(2, 8) == [0, 1]
    made = sheet(np.zeros((5, 10, 10, 3), np.uint8))
    assert made.shape == (22, 46, 3) and (made[12:, 12:] == 255).all() and (made[0, :10] == 0).all()
