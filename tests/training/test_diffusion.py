import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import BATCH, LatentBatches, config_of

from scaling_perception.diffusion.schedules import get_diffusion
from scaling_perception.interop.model_folder import load_model
from scaling_perception.models.presets import get_preset
from scaling_perception.support.configs import load_config
from scaling_perception.support.errors import UserError
from scaling_perception.training import diffusion
from scaling_perception.training.diffusion import (
    diffusion_objective,
    labels_of,
    latents_of,
    make_loss,
    measure_latent_norm,
    network_of,
    sample_timesteps,
    tasks_of,
)
from scaling_perception.training.state import named_leaves

PLAIN = {"shift": [[0.0] * 4] * 4, "scale": [[1.0] * 4] * 4}
SKEWED = {
    "shift": [[i + 0.5, -1.0, 0.25, 0.0] for i in range(4)],
    "scale": [[1.5 + i, 0.5, 2.0, 1.0] for i in range(4)],
}


class StubModel:
    """Stands for a DiT: remembers what it is called with and returns a fixed map of it."""

    def __init__(self, config, stats=None):
        self.config, self.stats, self.seen = config, stats or {}, {}

    def apply(self, variables, x, t, label, with_stats):
        assert with_stats
        self.seen = {"x": x, "t": t, "label": label}
        return jnp.concatenate([variables["params"] * x[..., -4:], jnp.full_like(x[..., :4], 7.0)], axis=-1), self.stats


def one_loss(config, prediction="v", norm=PLAIN, batch=None, cond=8, model_config=None):
    model = StubModel(dataclasses.replace(model_config or get_preset("nano"), cond_channels=cond))
    preset = get_diffusion("fixed", prediction=prediction)
    fields = {k: jnp.asarray(v) for k, v in (batch or LatentBatches().at(0)).items() if k != "key"}
    value, metrics = make_loss(model, preset, config, norm, None)(jnp.asarray(0.3), fields, jax.random.key(5))
    return float(value), {k: float(v) for k, v in metrics.items()}, model.seen, fields, preset


@pytest.mark.parametrize("prediction", ["v", "epsilon", "x0"])
def test_loss_is_the_masked_error_of_the_normalised_target(prediction):
    value, metrics, seen, fields, preset = one_loss(config_of(), prediction, SKEWED)
    task, valid = np.asarray(fields["pass_id"]), np.asarray(fields["valid"])
    shift, scale = (np.asarray(SKEWED[name])[task][:, None, None] for name in ("shift", "scale"))
    clean = (np.asarray(fields["target"], np.float64) - shift) / scale * valid[..., None]
    level = preset.alphas_cumprod()[np.asarray(seen["t"])][:, None, None, None]
    noisy = np.asarray(seen["x"][..., 8:], np.float64)
    eps = (noisy - np.sqrt(level) * clean) / np.sqrt(1 - level)
    wanted = {"epsilon": eps, "x0": clean, "v": np.sqrt(level) * eps - np.sqrt(1 - level) * clean}[prediction]
    error = np.square(0.3 * noisy - wanted)
    assert value == pytest.approx(error[valid].mean(), rel=1e-4)
    assert metrics["loss_depth"] == pytest.approx(error[valid & (task == 0)[:, None, None]].mean(), rel=1e-4)
    assert metrics["valid"] == pytest.approx(valid.mean())
    far = np.asarray(seen["t"]) > 500  # there the noise is recovered without loss of digits
    assert abs(eps[far].std() - 1) < 0.1 and abs(eps[far].mean()) < 0.1


def test_balance_of_every_layer_joins_the_loss_and_is_told():
    stats = {
        "balance": jnp.asarray([1.5, 2.0]),
        "load": jnp.asarray([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]),
        "entropy": jnp.asarray([1.0, 1.2]),
    }
    fields = {k: jnp.asarray(v) for k, v in LatentBatches().at(0).items() if k != "key"}
    config, preset = config_of("balance_loss=0.1"), get_diffusion("fixed")
    values = []
    for model in (StubModel(get_preset("nano")), StubModel(get_preset("nano", experts=4), stats)):
        loss = make_loss(model, preset, config, PLAIN, None)
        values.append(loss(jnp.asarray(0.3), fields, jax.random.key(5)))
    (plain, _), (balanced, metrics) = values
    assert float(balanced - plain) == pytest.approx(0.1 * 3.5, rel=1e-5)
    assert float(metrics["mse"]) == float(plain)
    assert float(metrics["balance"]) == pytest.approx(1.75) and float(metrics["router_entropy"]) == pytest.approx(1.1)
    assert float(metrics["expert_load_max"]) == pytest.approx(1.6)
    assert float(metrics["expert_load_min"]) == pytest.approx(0.4) and metrics["dropped"] == 0
    lost = {**stats, "load": stats["load"] * 0.75}  # a quarter of all pairs, in both layers
    told = make_loss(StubModel(get_preset("nano", experts=4), lost), preset, config, PLAIN, None)
    nano = get_preset("nano", experts=4)
    pairs = len(fields["pass_id"]) * nano.tokens * nano.active_experts
    assert told(jnp.asarray(0.3), fields, jax.random.key(5))[1]["dropped"] == 2 * pairs / 4


def test_input_is_image_prompt_noisy_and_the_task_label():
    _, _, seen, fields, _ = one_loss(config_of())
    np.testing.assert_array_equal(seen["x"][..., :4], np.asarray(fields["image"], np.float32))
    np.testing.assert_array_equal(seen["x"][..., 4:8], np.asarray(fields["prompt"], np.float32))
    np.testing.assert_array_equal(seen["label"], fields["pass_id"])  # nano has no classes
    _, _, seen, fields, _ = one_loss(config_of(), cond=4)
    assert seen["x"].shape[-1] == 8
    np.testing.assert_array_equal(seen["x"][..., :4], np.asarray(fields["image"], np.float32))


def test_labels():
    task = jnp.arange(4)
    xl = get_preset("XL/2")
    np.testing.assert_array_equal(labels_of(task, xl), 1000)  # the null label of 1,001 rows
    np.testing.assert_array_equal(labels_of(task, dataclasses.replace(xl, task_labels=4)), [1000, 1001, 1002, 1003])


def test_nothing_under_the_mask_matters():
    batch = LatentBatches().at(0)
    spoiled = {**batch, "target": np.where(batch["valid"][..., None], batch["target"], np.nan)}
    plain, spoilt = one_loss(config_of(), batch=batch), one_loss(config_of(), batch=spoiled)
    assert plain[0] == spoilt[0] and np.isfinite(spoilt[0])
    np.testing.assert_array_equal(plain[2]["x"], spoilt[2]["x"])


def test_a_task_without_samples_has_no_loss_of_its_own():
    batch = LatentBatches().at(0)
    batch["pass_id"] = np.where(batch["pass_id"] == 3, 2, batch["pass_id"]).astype(np.int32)
    _, metrics, *_ = one_loss(config_of(), batch=batch)
    assert np.isnan(metrics["loss_flow_y"]) and np.isfinite(metrics["loss_flow_x"])


def test_timesteps():
    t = np.asarray(sample_timesteps(jax.random.key(0), 20_000, "uniform"))
    assert t.min() == 0 and t.max() == 999 and abs(t.mean() - 499.5) < 8
    t = np.asarray(sample_timesteps(jax.random.key(0), 20_000, "high_noise"))
    assert t.min() == 0 and t.max() == 999
    assert np.mean(t >= 900) == pytest.approx(0.55, abs=0.02)  # half, and a tenth of the other half
    assert t[t < 900].mean() == pytest.approx(449.5, abs=12)


def test_multires_noise_is_smoother_than_white_noise():
    batch = LatentBatches().at(0)
    batch["target"] = np.zeros_like(batch["target"])
    neighbours = {}
    for noise in ("gaussian", "multires"):
        seen = one_loss(config_of(f"noise={noise}"), batch=batch)[2]
        x = np.asarray(seen["x"][..., 8:])[np.asarray(seen["t"]) > 300]
        neighbours[noise] = np.mean(x[:, 1:] * x[:, :-1]) / np.mean(x**2)
    assert neighbours["multires"] > neighbours["gaussian"] + 0.2


def test_latent_norm_is_mean_and_deviation_by_pass_over_valid_cells():
    batches = LatentBatches()
    norm = measure_latent_norm(batches, 512, lambda batch: (batch["target"], batch["valid"]))
    every = [batches.at(step) for step in (0, 1)]
    for index in range(4):
        cells = np.concatenate([b["target"][b["valid"] & (b["pass_id"] == index)[:, None, None]] for b in every])
        np.testing.assert_allclose(norm["shift"][index], cells.astype(np.float64).mean(0), atol=1e-6)
        np.testing.assert_allclose(norm["scale"][index], cells.astype(np.float64).std(0), atol=1e-6)


def test_latent_norm_of_an_absent_pass_and_of_a_constant_channel():
    batch = LatentBatches().at(0)
    batch["pass_id"][:] = 0
    batch["target"][..., 1] = 0.5
    source = types.SimpleNamespace(at=lambda step: batch, fingerprint={})
    norm = measure_latent_norm(source, 1024, lambda b: (b["target"], b["valid"]))  # type: ignore[arg-type]
    assert norm["shift"][3] == [0.0] * 4 and norm["scale"][3] == [1.0] * 4
    assert norm["shift"][0][1] == 0.5 and norm["scale"][0][1] == 0.01


class Pool:
    """An autoencoder for tests: 8 x 8 means of the three channels, and of their sum."""

    features = 0
    id, params = "feedfacecafe", {"gain": np.float32(1.0)}

    @staticmethod
    def encode(params, images):
        b, h, w, c = images.shape
        mean = images.reshape(b, h // 8, 8, w // 8, 8, c).mean((2, 4))
        return params["gain"] * jnp.concatenate([mean, mean.sum(-1, keepdims=True)], axis=-1), None


def pixel_batch():
    rng = np.random.default_rng(0)
    image, prompt, target = (rng.uniform(-1, 1, (BATCH, 64, 64, 3)).astype(np.float32) for _ in range(3))
    task = np.arange(BATCH, dtype=np.int32) % 4
    return dict(image=image, prompt=prompt, target=target, valid=rng.random((BATCH, 64, 64)) > 0.01, pass_id=task)


def test_encoding_on_the_way_equals_cached_latents(monkeypatch):
    pixels = pixel_batch()
    encode = lambda params, images: Pool.encode(params, images)[0]  # noqa: E731
    online = latents_of({**pixels, "constants": Pool.params}, encode, 2)
    cached = {name: np.asarray(encode(Pool.params, pixels[name])) for name in ("image", "prompt", "target")}
    valid = pixels["valid"].reshape(BATCH, 8, 8, 8, 8).all((2, 4))
    for got, want in zip(online, [*cached.values(), valid], strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
    assert latents_of({**pixels, "constants": Pool.params}, encode, 1)[1] is None

    monkeypatch.setattr("scaling_perception.models.autoencoders.load_autoencoder", lambda name: Pool)
    both = []
    for batch in (pixels, {**pixels, **cached, "valid": valid}):
        source = types.SimpleNamespace(at=lambda step, batch=batch: batch, fingerprint={}, autoencoders=set())
        objective = diffusion_objective(config_of(), source)  # type: ignore[arg-type]
        model, own = StubModel(objective.model), None if objective.constants is None else encode
        loss = make_loss(model, get_diffusion("fixed"), config_of(), objective.meta["latent_norm"], own)
        value, _ = loss(jnp.asarray(0.3), {**batch, "constants": objective.constants}, jax.random.key(3))
        both.append((objective.meta["latent_norm"], float(value), model.seen["x"]))
    np.testing.assert_allclose(both[0][0]["scale"], both[1][0]["scale"], atol=2e-6)
    np.testing.assert_allclose(both[0][2], both[1][2], atol=1e-4)
    assert both[0][1] == pytest.approx(both[1][1], rel=1e-4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model folder of the nano network with random weights."""
    folder = tmp_path_factory.mktemp("exported")
    objective = diffusion_objective(config_of("train.export_dtype=bfloat16"), LatentBatches())
    leaves, tree = jax.tree.flatten(jax.eval_shape(objective.init, jax.random.key(0)))
    params = tree.unflatten(
        [np.random.default_rng(i).normal(size=x.shape).astype(np.float32) for i, x in enumerate(leaves)]
    )
    objective.export(params, str(folder / "model"), {"steps": 3})
    return folder, params, objective


def test_weights_that_do_not_fit_are_not_exported(exported, tmp_path):
    objective = diffusion_objective(config_of("train.export_dtype=float16"), LatentBatches())
    large = jax.tree.map(lambda leaf: leaf * np.float32(1e6), exported[1])
    with pytest.raises(UserError, match=r"tensor .* does not fit float16, for its largest value is .*: use bfloat16"):
        objective.export(large, str(tmp_path / "model"), {"steps": 3})
    assert not (tmp_path / "model" / "config.json").exists()


def test_export_tells_everything_that_prediction_needs(exported):
    folder, params, objective = exported
    loaded, meta = load_model(folder / "model")
    assert meta["model"] == dataclasses.asdict(objective.model) and meta["model"]["input_size"] == 8
    assert meta["tasks"] == ["depth", "amodal", "flow"] and meta["autoencoder"] == "tiny" and meta["format"] == 1
    assert meta["diffusion"]["prediction"] == "v" and meta["task_options"]["flow_divisor"] == 75.0
    assert meta["latent_norm"] == objective.meta["latent_norm"] and meta["training"] == {"steps": 3}
    for name, leaf in named_leaves(loaded).items():
        assert str(leaf.dtype) == "bfloat16"
        np.testing.assert_allclose(np.asarray(leaf, np.float32), named_leaves(params)[name], rtol=2**-8, err_msg=name)


def test_init_takes_the_weights_and_the_normalisation_at_any_resolution(exported):
    folder, params, first = exported
    objective = diffusion_objective(
        config_of(f"init={folder}", "resolution=128", "latent_norm=none"), LatentBatches(16)
    )
    start = named_leaves(objective.starting_params)
    assert objective.meta["latent_norm"] == first.meta["latent_norm"]
    np.testing.assert_allclose(start["final/linear/kernel"], named_leaves(params)["final/linear/kernel"], rtol=2**-8)
    assert start["final/linear/kernel"].dtype == np.float32
    assert start["pos_embed"].shape == (64, 32) and start["pos_embed"][0, 8] == 1.0  # made anew: cos 0


def test_init_of_another_shape_names_the_tensor(exported):
    folder, *_ = exported
    with pytest.raises(UserError, match=r"init: blocks/attn/proj/bias is \(2, 32\) in .* and \(3, 32\) in this config"):
        changes = ("init_surgery=none", "model_changes={'depth': 3}")
        diffusion_objective(config_of(f"init={folder}", *changes), LatentBatches())
    with pytest.raises(UserError, match="nosuchmodel"):
        diffusion_objective(config_of("init=nosuchmodel"), LatentBatches())


def test_gradient_is_the_slope_of_the_loss():
    objective = diffusion_objective(config_of(), LatentBatches())
    fields = {name: value for name, value in LatentBatches().at(0).items() if name != "key"}
    leaves, tree = jax.tree.flatten(jax.eval_shape(objective.init, jax.random.key(0)))
    draw = [np.random.default_rng(i) for i in range(len(leaves))]
    params = tree.unflatten(
        [rng.normal(size=x.shape).astype(np.float32) * 0.2 for rng, x in zip(draw, leaves, strict=True)]
    )
    move = tree.unflatten([rng.normal(size=x.shape).astype(np.float32) for rng, x in zip(draw, leaves, strict=True)])
    slope = jax.jit(jax.value_and_grad(lambda p: objective.loss(p, fields, jax.random.key(2))[0]))
    along = lambda h: jax.tree.map(lambda p, m: p + h * m, params, move)  # noqa: E731
    move["pos_embed"] = np.zeros_like(move["pos_embed"])
    gradient = slope(params)[1]
    assert not np.any(gradient["pos_embed"])
    expected = sum(float(np.vdot(g, m)) for g, m in zip(jax.tree.leaves(gradient), jax.tree.leaves(move), strict=True))
    numeric = (float(slope(along(1e-3))[0]) - float(slope(along(-1e-3))[0])) / 2e-3
    assert numeric == pytest.approx(expected, rel=2e-2) and abs(expected) > 0.1


def test_tasks_without_weight_are_left_out():
    assert tasks_of(config_of("data.mixture.flow.weight=0")) == ["depth", "amodal"]


@pytest.mark.parametrize(
    ("spec", "overrides", "words"),
    [
        ("configs/flow.py:model=a1", ["model_changes={'cond_channels': 8}"], "2 passes .flow. need labels"),
        ("configs/amodal.py:model=a1", ["model_changes={'cond_channels': 4}"], "flow and amodal need 8"),
        ("configs/depth.py:model=a1", ["model_changes={}"], "cond_channels is 0"),
        ("configs/depth.py:model=a1", ["data.mixture={}"], "data.mixture is empty"),
        ("configs/depth.py:model=a9", [], "'model' is 'a9'"),
        ("configs/depth.py:model=a1,res=250", [], "resolution 250 is not a multiple of 16"),
    ],
)
def test_networks_that_cannot_serve_the_tasks(spec, overrides, words):
    with pytest.raises(UserError, match=words):
        network_of(load_config(spec, overrides))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("timestep_sampling=high", "did you mean 'high_noise'"),
        ("noise=multi", "did you mean 'multires'"),
        ("latent_norm=yes", "known: auto, none"),
        ("train.dtype=float64", "train.dtype"),
        ("train.dtype=float16", "give bfloat16, or float32"),
        ("train.export_dtype=float8", "known: bfloat16, float16, float32"),
        ("diffusion=fix", "did you mean 'fixed'"),
        ("diffusion_changes={'shedule': 'linear'}", "did you mean 'schedule'"),
        ("task_options.flow_divisor=-1", "flow_divisor"),
        ("resolution=128", "holds latents of 64 pixels and resolution is 128"),
    ],
)
def test_mistakes_are_told(override, words):
    with pytest.raises(UserError, match=words):
        diffusion_objective(config_of(override), LatentBatches())


def test_latents_of_another_autoencoder_are_refused(monkeypatch):
    monkeypatch.setattr("scaling_perception.models.autoencoders.load_autoencoder", lambda name: Pool)
    batches = LatentBatches()
    batches.autoencoders = {Pool.id}
    assert diffusion_objective(config_of(), batches).meta["autoencoder_id"] == Pool.id
    monkeypatch.setattr(diffusion, "starting_point", lambda *_: (None, {"autoencoder": "old", "autoencoder_id": "1"}))
    with pytest.raises(UserError, match="init elsewhere was trained in the latents of autoencoder old"):
        diffusion_objective(config_of("init=elsewhere"), batches)
    batches.autoencoders = {"000000000000"}
    with pytest.raises(UserError, match="encoded by autoencoder 000000000000, which is not 'tiny'"):
        diffusion_objective(config_of(), batches)
