"""One step, end to end: it learns, is the sampler's own step, and is exported as it was trained."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nano import nano_autoencoder, nano_meta, nano_params
from toys import config_of

from scaling_perception.diffusion.schedules import get_diffusion
from scaling_perception.inference.draws import draw_members
from scaling_perception.inference.predictor import Predictor
from scaling_perception.inference.settings import Settings
from scaling_perception.interop.model_folder import load_model, save_model
from scaling_perception.models.dit import DiT, DiTConfig
from scaling_perception.parallel.mesh import make_mesh
from scaling_perception.support.errors import UserError
from scaling_perception.support.field_checks import check_config
from scaling_perception.training import one_step
from scaling_perception.training.diffusion import diffusion_objective
from scaling_perception.training.optim import make_optimizer
from scaling_perception.training.state import new_state
from scaling_perception.training.step import make_step

SPEC = "configs/one_step.py:model=nano,res=64,batch=8,steps=12,task=depth+flow+amodal,source=scenes"


SHALLOW = ("model_changes.depth=1",)


def settings(*overrides, spec=SPEC):
    return config_of("init=mini", *overrides, spec=spec)


class Rows:
    """Latents (8, 8, 8, 4), or pixels (8, 64, 64, 3), of every pass."""

    fingerprint = {"name": "rows"}
    autoencoders: set[str] = set()
    class_count = 0

    def __init__(self, side=8, channels=4):
        self.shape = (8, side, side, channels)

    def at(self, step):
        rng = np.random.default_rng(step)
        image, prompt, target = (rng.normal(0, 0.5, self.shape).astype(np.float32) for _ in range(3))
        valid = np.ones(self.shape[:3], bool)
        valid[:, :2] = False
        target[:, :2] = np.nan  # what hides under the mask may be anything
        ids = np.arange(8, dtype=np.int32) % 4
        label = np.full(8, -1, np.int32)
        return dict(image=image, prompt=prompt, target=target, valid=valid, pass_id=ids, label=label)


@pytest.fixture(scope="module")
def vae():
    return nano_autoencoder()


@pytest.fixture(autouse=True)
def small_autoencoder(vae, monkeypatch):
    monkeypatch.setattr("scaling_perception.models.autoencoders.load_autoencoder", lambda name, dtype="float32": vae)


def objective_of(config, batches, mesh=None):
    return diffusion_objective(config, batches, mesh, resumed={"latent_norm": NORM})


NORM = {"shift": [[0.1, 0.0, 0.2, 0.0]] * 4, "scale": [[1.0, 0.8, 1.2, 0.5]] * 4}


def test_a_batch_is_learned():
    config = settings("optim.lr=1e-2", "optim.schedule=constant", "noise=gaussian", *SHALLOW)
    objective = objective_of(config, batches := Rows())
    tx, _ = make_optimizer(config.optim, 12, objective.frozen)
    state = new_state(objective.init(jax.random.key(0)), tx)
    step = jax.jit(make_step(objective, tx, 0.9))
    losses = []
    for _ in range(30):
        state, metrics = step(state, batches.at(0), jax.random.key(1), objective.constants)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[-1] < 0.7 * losses[0], losses
    assert {f"loss_{name}" for name in ("depth", "amodal", "flow_x", "flow_y")} <= set(metrics)


@pytest.mark.slow  # two compilations of a train step, one of them for four devices
def test_parts_and_meshes_give_the_loss_of_the_whole_batch():
    config, batches = settings("optim.ema=0.0", *SHALLOW, spec=SPEC.replace("depth+flow+amodal", "flow")), Rows()
    fields = dict(batches.at(0))
    fields["pass_id"] = np.int32([2, 3] * 4)
    fields["valid"][3] = False  # of no weight, wherever it lies
    whole = objective_of(config, batches)
    params, key = whole.init(jax.random.key(0)), jax.random.key(1)
    params = jax.tree.map(lambda leaf: leaf + 0.02 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    tx, _ = make_optimizer(config.optim, 12, whole.frozen)
    found = []
    for mesh, parts in ((None, 1), (make_mesh(data=2, fsdp=2, devices=jax.devices()[:4]), 2)):
        objective = objective_of(config, batches, mesh)
        step = jax.jit(make_step(objective, tx, None, parts))
        found.append(jax.device_get(step(new_state(params, tx), fields, key, objective.constants)[1]))
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=2e-4), name
    assert found[0]["grad_norm"] > 0


def test_the_truth_of_a_cache_is_what_its_latents_decode_to(vae):
    meta, rows = nano_meta(), jnp.arange(2)
    rng = np.random.default_rng(0)
    conditions = [jnp.asarray(rng.normal(size=(2, 4, 4, 8)), jnp.float32)]
    latents = jnp.asarray(rng.normal(size=(2, 4, 4, 4)), jnp.float32)
    cells = np.ones((2, 4, 4), bool)
    cells[0, 1] = False
    pixels = cells.repeat(8, 1).repeat(8, 2)
    found = []
    for target, valid in ((latents, cells), (vae.decode(vae.params, latents), pixels)):

        def inputs(batch, target=target, valid=valid):
            return conditions, target, jnp.asarray(valid), rows, rows

        model, trained = DiT(DiTConfig(**meta["model"])), {"depth": 0, "amodal": 1}
        parts = one_step.one_step_parts(model, get_diffusion("fixed"), settings(), NORM, inputs, vae.decode, trained)
        found.append(jax.jit(parts.tally)(nano_params(meta), {"constants": vae.params}, jax.random.key(0)))
    assert float(found[0]["losses"]) > 0
    for name in found[0]:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-5)


@pytest.mark.parametrize("noise, diffusion", [("zeros", "released"), ("gaussian", "fixed")])
def test_what_is_trained_is_what_one_step_of_the_sampler_decodes(vae, noise, diffusion):
    preset = get_diffusion(diffusion, spacing="trailing")
    fields = {name: value for name, value in dataclasses.asdict(preset).items() if name != "zero_snr"}
    meta = nano_meta(one_step={"noise": noise}, latent_norm=NORM, diffusion=fields)
    predictor = Predictor(params := nano_params(meta), meta, vae)
    image = np.random.default_rng(0).normal(size=(1, 4, 4, 8)).astype(np.float32)
    draw = draw_members(jax.random.key(3), np.zeros(1, np.uint32), 0, 2, False)
    tables, passes = Settings(1, 2).tables(predictor.diffusion), predictor.passes("flow")
    pixels = np.asarray(predictor.engine.sample(*predictor.weights, image, draw, passes, tables))[0, 1]  # flow_y
    starts = predictor.engine._noise(draw, (4, 4, 4))[0]
    assert np.asarray(starts).any() == (noise == "gaussian")
    assert np.allclose(pixels[0], pixels[1], atol=1e-5) == (noise == "zeros")
    assert one_step.start_noise(jax.random.key(1), jnp.arange(2), (2, 4, 4, 4), noise).any() == starts.any()
    model, row = DiT(DiTConfig(**meta["model"])), jnp.full(2, 3)
    latents, _ = one_step.one_step_latents(
        model, preset, NORM, params, [jnp.repeat(image, 2, 0)], starts, row, passes.labels[1:].repeat(2)
    )
    np.testing.assert_allclose(vae.decode(vae.params, latents), pixels, atol=2e-5)


def test_rows_are_decoded_in_turns_with_the_gradient_of_the_whole(vae, monkeypatch):
    latents = jax.random.normal(jax.random.key(0), (6, 4, 4, 4))
    shapes = []

    def decode(params, rows):
        shapes.append(rows.shape[0])
        return vae.decode(params, rows)

    def total(rows, turns):
        pixels = one_step.decoded_in_turns(decode, vae.params, rows) if turns else vae.decode(vae.params, rows)
        return jnp.sum(jnp.sin(pixels))

    monkeypatch.setattr(one_step, "AT_ONCE", 2 * 16)
    slope = jax.jit(jax.value_and_grad(total), static_argnums=1)
    found = [slope(latents, turns) for turns in (False, True)]
    assert set(shapes) == {2}
    for one, two in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("noise, members", [("zeros", 1), ("gaussian", 2)])
def test_an_exported_model_says_how_it_predicts(tmp_path, noise, members):
    config = settings(f"noise={noise}", spec=SPEC.replace("task=depth+flow+amodal", "task=depth"))
    objective = objective_of(config, Rows())
    objective.export(jax.device_get(objective.init(jax.random.key(0))), str(tmp_path / "m"), {})
    params, meta = load_model(tmp_path / "m")
    assert meta["one_step"] == {"noise": noise}
    assert f"--steps 1 --ensemble {5 if members > 1 else 1}" in (tmp_path / "m" / "README.md").read_text()
    predictor = Predictor(params, meta)
    assert predictor.one_step == noise and predictor.engine.zero_start == (noise == "zeros")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor.tables(Settings(1, members), "depth", predictor.diffusion)
    with pytest.warns(UserWarning, match="use steps 1"):
        predictor.tables(Settings(2, 1), "depth", predictor.diffusion)
    if noise == "zeros":
        with pytest.warns(UserWarning, match="use ensemble 1"):
            predictor.tables(Settings(1, 2), "depth", predictor.diffusion)
    with pytest.raises(UserError, match="one_step of the model has the noise 'no'"):
        Predictor(params, {**meta, "one_step": {"noise": "no"}})


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["init="], "init is empty"),
        (["noise=multires"], "noise is 'multires'"),
        (["diffusion_changes.spacing=leading"], "leading grid"),
        (["diffusion_changes.prediction=epsilon"], "one step at t = 999"),
        (["objective=diffusion"], "noise is 'zeros'"),
        (["data.mixture.depth.task=generation"], "data.mixture has generation"),
    ],
)
def test_what_one_step_cannot_be_trained_with_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        check_config(settings(*overrides))


def test_a_start_without_a_task_is_refused(tmp_path):
    config = settings(*SHALLOW)
    objective = objective_of(config, Rows())
    save_model(tmp_path / "m", jax.device_get(objective.init(jax.random.key(0))), {**objective.meta, "tasks": []})
    with pytest.raises(UserError, match="trained for no task yet"):
        diffusion_objective(settings(f"init={tmp_path / 'm'}", *SHALLOW), Rows())
