"""Training the small autoencoder: its bank, its losses and gradients, both phases in short runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import tiny_vae as config_file
from scaling_perception.models import tiny_vae
from scaling_perception.models.autoencoders import load_autoencoder, load_part, save_part, tree_hash
from scaling_perception.support.errors import UserError
from scaling_perception.training import autoencoder
from scaling_perception.training.optim import make_optimizer
from scaling_perception.training.state import new_state
from scaling_perception.training.step import make_step

NARROW = tiny_vae.TinyVAEConfig(
    encoder_widths=(8, 8, 8), encoder_blocks=(1, 1, 1), decoder_widths=(8, 8, 8), decoder_blocks=(1, 1, 1), patch=2
)
SIDE = 16


def encoder_loss(*arguments):
    return autoencoder._score("latent_mse", autoencoder.encoder_tally(*arguments))


def decoder_loss(*arguments):
    return autoencoder._score("pixel_mse", autoencoder.decoder_tally(*arguments))


@pytest.fixture
def teacher(tmp_path):
    """A network to be taught by: any folder that load_autoencoder reads."""
    folder = tmp_path / "teacher"
    for i, part in enumerate(("encoder", "decoder")):
        save_part(folder, part, NARROW, tiny_vae.init_part(part, NARROW, jax.random.key(i)), {})
    return folder


@pytest.fixture
def config(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(autoencoder, "BLOCK", 8)  # two blocks of eight pictures: textures, then scenes
    config = config_file.get_config(f"phase=encoder,teacher={teacher},cache={tmp_path / 'bank'},res={SIDE},bank=16")
    config.vae = ConfigDict(NARROW.to_dict())
    config.train.update({"steps": 30, "batch_size": 8})
    config.optim.update({"lr": 3e-3, "warmup": 1, "ema": 0.0})
    return config


def train(objective, config, steps):
    tx, _ = make_optimizer(config.optim, config.train.steps)
    start = objective.starting_params or objective.init(jax.random.key(0))
    state, step = new_state(jax.tree.map(jnp.asarray, start), tx), jax.jit(make_step(objective, tx, 0.0))
    losses = []
    for number in range(steps):
        batch = objective.batches.at(number)
        assert all(key.startswith("bank/") for key in batch.pop("key"))
        state, metrics = step(state, batch, jax.random.key(1), None)
        losses.append(float(metrics["loss"]))
    return jax.device_get(state.ema), losses


def test_both_phases_learn_and_export_a_whole_autoencoder(config, tmp_path, teacher):
    objective = autoencoder.autoencoder_objective(config)
    params, losses = train(objective, config, 30)
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:4])
    objective.export(params, str(tmp_path / "one"), {"steps": 30, "samples": 240, "config": {"secret": str(tmp_path)}})
    network, encoder = load_part(tmp_path / "one", "encoder")
    assert network == NARROW
    np.testing.assert_allclose(encoder["stem"]["kernel"], params["stem"]["kernel"], atol=1e-3)
    assert str(tmp_path) not in (tmp_path / "one" / "encoder.safetensors").read_bytes().decode("latin1")

    config.phase, config.init = "decoder", str(tmp_path / "one")
    objective = autoencoder.autoencoder_objective(config)
    params, losses = train(objective, config, 30)
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    objective.export(params, str(tmp_path / "two"), {"steps": 30})
    model = load_autoencoder(str(tmp_path / "two"))
    assert model.id == tree_hash(encoder)  # the frozen encoder went along unchanged
    np.testing.assert_allclose(model.params["decoder"]["head"]["bias"], params["head"]["bias"], atol=1e-3)

    # a second run goes on from the exported weights
    config.init = str(tmp_path / "two")
    again = autoencoder.autoencoder_objective(config)
    jax.tree.map(np.testing.assert_array_equal, again.starting_params, model.params["decoder"])
    config.phase = "encoder"
    again = autoencoder.autoencoder_objective(config)
    jax.tree.map(np.testing.assert_array_equal, again.starting_params, encoder)


def test_the_frozen_encoder_s_latents_are_its_own(config, tmp_path, teacher):
    config.phase, config.init = "decoder", str(teacher)
    batches = autoencoder.autoencoder_objective(config).batches
    batch, model = batches.at(1), load_autoencoder(str(teacher))
    expected = model.encode(model.params, batch["image"].astype(np.float32))[0]
    np.testing.assert_allclose(batch["own"].astype(np.float32), expected, atol=5e-3)
    np.testing.assert_allclose(batch["latent"].astype(np.float32), expected, atol=5e-3)  # this teacher is the encoder
    assert batches.fingerprint["encoder"] == model.id


def test_the_bank_is_half_targets_and_repeats_exactly(monkeypatch):
    monkeypatch.setattr(autoencoder, "BLOCK", 24)
    made = [autoencoder.bank_picture(index, SIDE) for index in range(48)]
    targets = np.array([target for _, target in made])
    assert 0.35 < targets.mean() < 0.65
    for index in (0, 2, 24, 25, 27, 28):
        picture, target = autoencoder.bank_picture(index, SIDE)
        np.testing.assert_array_equal(picture, made[index][0])
        assert target == targets[index] and picture.shape == (SIDE, SIDE, 3) and picture.dtype == np.float32
    scenes = made[24:]
    assert set(autoencoder.SCENE_VIEWS) == {"image", "depth", "flow_x", "flow_y", "whole", "visible"}
    for place, view in enumerate(autoencoder.SCENE_VIEWS):
        grey = np.ptp(scenes[place][0], axis=-1).max() == 0
        assert grey == (view in ("depth", "flow_x", "flow_y", "visible")), view


def test_the_bank_goes_on_where_it_stopped(config, tmp_path, teacher, monkeypatch):
    folder, asked = tmp_path / "bank", []
    original = autoencoder.bank_picture

    def note(index, resolution):
        asked.append(index)
        return original(index, resolution)

    monkeypatch.setattr(autoencoder, "bank_picture", note)
    autoencoder.open_bank(folder, str(teacher), 8, SIDE)
    assert asked == list(range(8))
    (folder / "block_00001.pictures.npy").write_bytes(b"half a file")  # killed within the second block
    bank = autoencoder.open_bank(folder, str(teacher), 16, SIDE)
    assert asked == list(range(16)) and len(bank) == 16
    for index in (0, 9):
        picture, target = original(index, SIDE)
        np.testing.assert_allclose(bank.rows(bank.pictures, np.array([index]))[0], picture, atol=1e-3)
        assert bank.targets[index] == target
    save_part(teacher, "encoder", NARROW, tiny_vae.init_part("encoder", NARROW, jax.random.key(9)), {})
    with pytest.raises(UserError, match="choose another folder"):
        autoencoder.open_bank(folder, str(teacher), 16, SIDE)


def test_batches_are_a_function_of_the_step(config):
    batches = autoencoder.autoencoder_objective(config).batches
    keys = [batches.at(step)["key"] for step in range(4)]
    assert sorted(keys[0] + keys[1]) == sorted(f"bank/{i}" for i in range(16))  # an epoch holds every picture once
    assert keys[0] + keys[1] != keys[2] + keys[3]
    stream = batches.iterate(2)
    for step in (2, 3):
        batch = next(stream)
        assert batch["key"] == keys[step]
        for name in ("image", "latent", "weight"):
            np.testing.assert_array_equal(batch[name], batches.at(step)[name])
    with pytest.raises(UserError, match="exceeds the 16 pictures"):
        autoencoder.BankBatches(batches.bank, 17, 0)


def test_the_encoder_s_loss_is_the_weighted_error():
    params = tiny_vae.init_part("encoder", NARROW, jax.random.key(0))
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (2, SIDE, SIDE, 3)).astype(np.float16)
    z = np.asarray(tiny_vae.Encoder(NARROW).apply({"params": params}, image.astype(np.float32)))
    off = np.array([0.5, 0.1], np.float32).reshape(2, 1, 1, 1)
    batch = {"image": image, "latent": z + off, "weight": np.array([1, 2], np.float32)}
    loss, metrics = encoder_loss(NARROW, params, batch)
    np.testing.assert_allclose(loss, (0.25 + 2 * 0.01) / 3, rtol=1e-4)
    np.testing.assert_allclose(metrics["latent_mse_rgb"], 0.25, rtol=1e-4)
    np.testing.assert_allclose(metrics["latent_mse_target"], 0.01, rtol=1e-3)
    only = encoder_loss(NARROW, params, {k: v[:1] for k, v in batch.items()})[1]
    assert np.isnan(only["latent_mse_target"])
    # gradient of the head's bias: 2 / 4 channels * mean error, weighted
    gradient = jax.grad(lambda p: encoder_loss(NARROW, p, batch)[0])(params)
    expected = 2 / 4 * (-0.5 - 2 * 0.1) / 3
    np.testing.assert_allclose(gradient["head"]["bias"], np.full(4, expected), rtol=1e-3)


def test_the_decoder_s_loss_falls_to_its_parts(monkeypatch):
    """A decoder that paints zero: the loss of a known picture by hand, and none at the truth."""
    params = jax.tree.map(jnp.zeros_like, tiny_vae.init_part("decoder", NARROW, jax.random.key(0)))
    params["head"]["bias"] = jnp.full(12, 0.5)  # (0.5 * 2 - 1) = 0
    picture = np.zeros((1, SIDE, SIDE, 3), np.float16)
    latent = np.zeros((1, 2, 2, 4), np.float16)
    batch = {"image": picture, "latent": latent, "own": latent, "weight": np.ones(1, np.float32)}
    assert float(decoder_loss(NARROW, params, batch, jax.random.key(0))[0]) == 0
    picture[:, :, SIDE // 2 :] = 0.5  # one edge: half the pixels off by 0.5, one jump of 0.5 in each row's 15 steps
    loss, metrics = decoder_loss(NARROW, params, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, 0.25 + 0.125 + 0.5 * 0.5 / 15, rtol=1e-5)
    np.testing.assert_allclose(metrics["pixel_mse_rgb"], 0.125, rtol=1e-5)


def test_beyond_white_is_no_error_and_below_it_is():
    params = jax.tree.map(jnp.zeros_like, tiny_vae.init_part("decoder", NARROW, jax.random.key(0)))
    latent = np.zeros((1, 2, 2, 4), np.float16)
    for painted, truth, wrong in ((1.25, 1, 0), (0.75, 1, 0.25), (-1.25, -1, 0), (-0.5, -1, 0.5), (1.25, 0.75, 0.5)):
        params["head"]["bias"] = jnp.full(12, (painted + 1) / 2)
        picture = np.full((1, SIDE, SIDE, 3), truth, np.float16)
        batch = {"image": picture, "latent": latent, "own": latent, "weight": np.ones(1, np.float32)}
        loss = decoder_loss(NARROW, params, batch, jax.random.key(0))[0]
        np.testing.assert_allclose(loss, wrong + wrong**2, atol=1e-6)


def test_wrong_settings_are_told_in_one_line(config, tmp_path):
    config.phase = "decoder"
    with pytest.raises(UserError, match="needs the trained encoder"):
        autoencoder.autoencoder_objective(config)
    config.init = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="does not exist"):
        autoencoder.autoencoder_objective(config)
    with pytest.raises(UserError, match="known: decoder, encoder"):
        config_file.get_config("phase=both")
    config.phase, config.init, config.teacher = "encoder", "", str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither 'tiny' nor a folder"):
        autoencoder.autoencoder_objective(config)
