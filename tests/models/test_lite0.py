"""The frozen features: their convolutions, the grid they lie on, and what a cache and a network take of them."""

import types

import jax
import numpy as np
import pytest

from scaling_perception.data.latents import decode_record, encode_record
from scaling_perception.models import lite0
from scaling_perception.models.autoencoders import load_autoencoder, part_size
from scaling_perception.models.presets import get_preset
from scaling_perception.models.surgery import widen_input
from scaling_perception.ops.doubling import doubled
from scaling_perception.support.configs import load_config
from scaling_perception.support.errors import UserError
from scaling_perception.training import diffusion


@pytest.fixture(scope="module")
def params():
    return lite0.load()


@pytest.mark.parametrize("shape", [(2, 6, 7, 3), (1, 1, 5, 2)])
def test_doubling_is_the_linear_resize(shape):
    batch, height, width, channels = shape
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    wanted = jax.image.resize(x, (batch, 2 * height, 2 * width, channels), "linear")
    np.testing.assert_allclose(doubled(x), wanted, atol=1e-6)


def test_features_lie_on_the_latents_grid_and_are_what_they_were(params):
    y, x = np.mgrid[:64, :96] / 32 - 1.0
    picture = np.stack([np.sin(5 * x), y / 2, np.cos(3 * x * y)], -1)[None].astype(np.float32)
    found = np.asarray(jax.jit(lite0.features)(params, picture))
    assert found.shape == (1, 8, 12, 32)
    np.testing.assert_allclose(found.std(), EXPECTED[0], rtol=2e-3)
    np.testing.assert_allclose(found[0, 3, 4, :4], EXPECTED[1], atol=5e-3)
    with pytest.raises(UserError, match="72x64 is no multiple of 16"):
        lite0.features(params, picture[:, :, :72])


EXPECTED = (1.09729, (0.25946, 0.46698, -0.13520, 1.07888))


def test_an_autoencoder_with_features_decodes_as_without(params):
    plain, more = load_autoencoder("tiny"), load_autoencoder("tiny+lite0")
    assert (more.features, more.latent_channels, more.name) == (32, 4, "tiny+lite0") and more.id != plain.id
    picture = np.random.default_rng(0).uniform(-1, 1, (1, 32, 32, 3)).astype(np.float32)
    latents, logvar = jax.jit(more.encode)(more.params, picture)
    assert latents.shape == (1, 4, 4, 36) and logvar is None
    np.testing.assert_allclose(latents[..., :4], plain.encode(plain.params, picture)[0], atol=1e-5)
    np.testing.assert_allclose(latents[..., 4:], jax.jit(lite0.features)(params, picture), atol=1e-4)
    count, macs = np.subtract(part_size(more, "encoder", 128, 128), part_size(plain, "encoder", 128, 128))
    assert count == sum(leaf.size for leaf in jax.tree.leaves(params)) and macs == lite0.macs(32, 128, 128)
    assert part_size(more, "decoder", 64, 64) == part_size(plain, "decoder", 64, 64)


def test_multiply_accumulates_are_those_of_the_products(params):
    def products(jaxpr):
        total = 0
        for one in jaxpr.eqns:
            if one.primitive.name == "dot_general":
                kept = one.params["dimension_numbers"][0][0]
                total += one.outvars[0].aval.size * np.prod([one.invars[0].aval.shape[axis] for axis in kept])
            if one.primitive.name == "conv_general_dilated":
                total += one.outvars[0].aval.size * np.prod(one.invars[1].aval.shape[:3])
        return total

    trained = jax.make_jaxpr(lambda x: lite0.blocks_of(params, x))(np.zeros((1, 128, 64, 3), np.float32))
    depthwise, side = 0, 64 * 32
    for block in lite0.blocks():
        side //= block.stride**2
        depthwise += side * block.kernel**2 * block.inner
    features = 8 * 4 * lite0.WIDTH * 32
    assert lite0.macs(32, 64, 32) == products(trained.jaxpr) + depthwise + features


def test_a_record_holds_features_of_conditions_alone():
    rng = np.random.default_rng(1)
    view = {name: rng.normal(size=(2, 2, 6)).astype(np.float16) for name in ("image", "prompt")}
    view |= {"target": rng.normal(size=(2, 2, 4)).astype(np.float16), "valid": np.array([[1, 0], [1, 1]], bool)}
    data = encode_record(2, -1, "a", [view, {**view, "valid": ~view["valid"]}])
    found = decode_record(data)
    for name, value in view.items():
        np.testing.assert_array_equal(found[name], value)
    assert not (found["flipped"]["valid"] & view["valid"]).any()
    with pytest.raises(ValueError, match="prompt has shape"):
        encode_record(2, -1, "a", [{**view, "prompt": view["target"]}])


def test_widening_starts_features_at_zero():
    config = get_preset("nano", cond_channels=0, task_labels=0, routed=False)
    kernel = np.random.default_rng(0).normal(size=(2, 2, 4, config.dim)).astype(np.float32)
    params, wide = widen_input(
        {"patch_embed": {"kernel": kernel, "bias": np.zeros(config.dim)}}, config, 72, features=32
    )
    made = params["patch_embed"]["kernel"]
    assert made.shape[2] == 76 and wide.conditions == 2 and wide.condition_channels == 36
    np.testing.assert_allclose(made[:, :, [0, 36, 72]].sum(2), kernel[:, :, 0], rtol=1e-6)
    assert not made[:, :, 4:36].any() and not made[:, :, 40:72].any()
    with pytest.raises(UserError, match="give a multiple of 36"):
        widen_input({}, config, 8, features=32)


def test_condition_channels_go_with_the_features():
    with pytest.raises(UserError, match="features=32 a picture has 36 channels: give 0, 36 or 72"):
        get_preset("nano", cond_channels=8, features=32)


@pytest.mark.parametrize(
    ("channels", "changes", "message"),
    [
        (
            4,
            {"features": 32, "cond_channels": 72},
            "no features beside its latents, and the network takes 32: prepare",
        ),
        (36, {}, "gives 32 features beside a latent, and the network takes 0: set model_changes.features=32"),
    ],
)
def test_a_cache_and_a_network_must_agree(channels, changes, message):
    config = load_config("configs/finetune.py:init=,model=nano,res=64,cache=runs/c,vae=tiny")
    with config.unlocked():
        config.model_changes.update(changes)
    batch = {"image": np.zeros((1, 8, 8, channels)), "target": np.zeros((1, 8, 8, 4))}
    stand = types.SimpleNamespace(at=lambda step: batch, autoencoders=set(), class_count=0)
    with pytest.raises(UserError, match=message):
        diffusion._autoencoder(config, stand, diffusion.network_of(config))
