"""AutoencoderKL files in and out: exact names of two generations, exact bytes, refusals that name tensor or field."""

import json

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from scaling_perception.interop.diffusers_vae import (
    load_vae_folder,
    save_vae_folder,
    vae_config_from_json,
    vae_config_to_json,
    vae_from_torch,
    vae_to_torch,
)
from scaling_perception.interop.safetensors_io import unflatten_tree
from scaling_perception.models import vae
from scaling_perception.support.errors import UserError

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def published(golden):
    """(config.json, state dict) of a small published network."""
    file = golden / "vae" / "small_32x32.safetensors"
    with safe_open(file, "np") as handle:
        fields = json.loads(handle.metadata()["config"])
    return fields, {k.removeprefix("weights/"): v for k, v in load_file(file).items() if k.startswith("weights/")}


def renamed(state, convolutions=False):
    """The state under the names of the first Stable Diffusion files."""
    out = {}
    for name, value in state.items():
        for new, old in OLD.items():
            if f".{new}." in name:
                name = name.replace(new, old)
                value = value[:, :, None, None] if convolutions and value.ndim == 2 else value
        out[name] = value
    return out


def test_back_and_forth_changes_no_byte_and_no_name(published):
    fields, state = published
    config = vae_config_from_json(fields)
    params = vae_from_torch(state, config)
    for part in vae.PARTS:
        flat = {"/".join(str(key.key) for key in path): leaf for path, leaf in jax.tree.leaves_with_path(params[part])}
        assert {name: leaf.shape for name, leaf in flat.items()} == vae.part_shapes(part, config)
        assert all(leaf.dtype == np.float32 for leaf in flat.values())
    again = vae_to_torch(params, config)
    assert set(again) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(again[name], value)
        assert again[name].flags.c_contiguous


def test_both_generations_of_names_give_the_same_parameters(published):
    fields, state = published
    config = vae_config_from_json(fields)
    params = vae_from_torch(state, config)
    for convolutions in (False, True):
        old = renamed(state, convolutions)
        assert len(set(old) - set(state)) == 16
        jax.tree.map(np.testing.assert_array_equal, vae_from_torch(old, config), params)


def test_tensors_that_do_not_fit_are_named(published):
    fields, state = published
    config = vae_config_from_json(fields)
    query = "encoder.mid_block.attentions.0.to_q.weight"

    def message(state):
        with pytest.raises(UserError) as caught:
            vae_from_torch(state, config, "file")
        assert str(caught.value).startswith("file: ") and "\n" not in str(caught.value)
        return str(caught.value)

    assert f"'{query}' (32, 32) is missing" in message({k: v for k, v in state.items() if k != query})
    assert "'decoder.extra' has no place" in message(state | {"decoder.extra": np.zeros(3)})
    assert "to_q.weight' has shape (32, 31) but (32, 32)" in message(state | {query: np.zeros((32, 31))})
    assert "'quant_conv.weight' has shape (8, 8) but (8, 8, 1, 1)" in message(state | {"quant_conv.weight": np.eye(8)})
    old = query.replace("to_q", "query")  # both generations in one file: which one is meant?
    assert f"'{old}' has no place" in message(state | {old: state[query]})

    params = vae_from_torch(state, config)
    for change, text in (
        (
            {"conv_in": {"kernel": np.zeros((3, 3, 3, 15)), "bias": np.zeros(16)}},
            r"conv_in/kernel has shape \(3, 3, 3, 15",
        ),
        ({"conv_in": {"bias": np.zeros(16)}}, "encoder/conv_in/kernel is missing"),
        ({"extra": {"bias": np.zeros(16)}}, "encoder/extra/bias has no place"),
    ):
        with pytest.raises(UserError, match=text):
            vae_to_torch(params | {"encoder": params["encoder"] | change}, config)


def test_configs_of_every_age_are_read(published, golden):
    fields, _ = published
    expected = vae.VAEConfig((16, 16, 32, 32), layers_per_block=1, norm_num_groups=16)
    assert vae_config_from_json(fields) == expected
    newer = {"force_upcast": True, "shift_factor": None, "latents_mean": None, "mid_block_add_attention": True}
    assert vae_config_from_json(fields | newer | {"_diffusers_version": "0.42.1", "future": None}) == expected
    older = {name: fields[name] for name in ("act_fn", "block_out_channels", "layers_per_block", "norm_num_groups")}
    assert vae_config_from_json({"_class_name": "AutoencoderKL"} | older) == expected
    assert vae_config_from_json(json.loads(json.dumps(vae_config_to_json(expected)))) == expected
    assert vae_config_from_json(vae_config_to_json(vae.VAEConfig())) == vae.VAEConfig()


@pytest.mark.parametrize(
    "change, text",
    [
        ({"_class_name": "VQModel"}, "_class_name is 'VQModel'"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu'"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types is"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "up_block_types is"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is False"),
        ({"shift_factor": 0.1159}, "shift_factor is 0.1159"),
        ({"latents_mean": [0.1] * 4}, "latents_mean is"),
        ({"scaling_factor": None}, "scaling_factor is None"),
        ({"block_out_channels": 128}, "block_out_channels is 128"),
        ({"block_out_channels": [16, 16, 32, "x"]}, "block_out_channels has 'x'"),
        ({"norm_num_groups": 5}, "no multiple of norm_num_groups=5"),
        ({"layers_per_blok": 3}, "'layers_per_blok' is unknown; did you mean 'layers_per_block'"),
    ],
)
def test_other_networks_are_refused_by_field(published, change, text):
    with pytest.raises(UserError) as caught:
        vae_config_from_json(published[0] | change, "config.json")
    assert str(caught.value).startswith("config.json: ") and text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_without_sizes_is_refused(published):
    fields = {k: v for k, v in published[0].items() if k != "layers_per_block"}
    with pytest.raises(UserError, match="field 'layers_per_block' is missing"):
        vae_config_from_json(fields)


def test_a_written_folder_is_read_back(published, tmp_path):
    config = vae_config_from_json(published[0])
    params = vae_from_torch(published[1], config)
    read, again = load_vae_folder(save_vae_folder(tmp_path / "vae", params, config))
    assert read == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors does not exist"):
        load_vae_folder(tmp_path / "nothing")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [0, 1])
def test_random_sizes_against_the_original(seed, tmp_path, torch):
    """Moments, pictures and, once, the gradient of a decoded picture; and our file is read by the original."""
    diffusers = pytest.importorskip("diffusers")
    rng = np.random.default_rng(seed)
    groups, levels = int(rng.integers(2, 5)), 2 + seed
    widths = tuple(groups * int(width) for width in rng.integers(1, 9, levels))
    config = vae.VAEConfig(widths, layers_per_block=1 + seed, norm_num_groups=groups)
    params = {}
    for part in vae.PARTS:  # weights of about unit gain, norms and biases that do something
        flat = {}
        for name, shape in vae.part_shapes(part, config).items():
            flat[name] = (rng.normal(size=shape) * max(1, np.prod(shape[:-1])) ** -0.5).astype(np.float32)
        params[part] = unflatten_tree(flat)
    model = diffusers.AutoencoderKL.from_pretrained(save_vae_folder(tmp_path, params, config)).eval()
    images = rng.uniform(-1, 1, (2, 3 * config.factor, 5 * config.factor, 3)).astype(np.float32)
    z, weight = rng.normal(size=(2, 3, 5, 4)).astype(np.float32), rng.normal(size=images.shape).astype(np.float32)

    def nchw(array):
        return torch.from_numpy(np.moveaxis(array, -1, 1).copy())

    def ours(z):
        picture = vae.decode(params, config, z)
        return (picture * weight).mean(), picture

    latent = nchw(z).requires_grad_()
    decoded = model.decode(latent).sample
    with torch.no_grad():
        theirs = model.encode(nchw(images)).latent_dist
    mean, logvar = jax.jit(lambda x: vae.encode_moments(params, config, x))(images)
    pairs = [(mean, theirs.mean), (logvar, theirs.logvar)]
    if seed == 0:
        (decoded * nchw(weight)).mean().backward()
        (_, picture), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(z)
        pairs.append((gradient, latent.grad))
    else:
        picture = jax.jit(ours)(z)[1]
    pairs.append((picture, decoded.detach()))
    for got, expected in pairs:
        expected = np.moveaxis(expected.numpy(), 1, -1)
        np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
