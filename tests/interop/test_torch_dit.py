"""Published DiT checkpoints in and out: exact names, exact bytes, refusals that name the tensor."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from scaling_perception.interop.torch_dit import config_from_torch, dit_from_torch, dit_to_torch
from scaling_perception.models.dit import DiT, DiTConfig, abstract_params, init_params
from scaling_perception.models.presets import get_preset
from scaling_perception.support.errors import UserError

REFERENCE = DiTConfig("reference", input_size=8, dim=64, depth=3, heads=4, num_classes=10)


@pytest.fixture
def state(golden):
    arrays = load_file(golden / "dit_dense" / "p2_8x8.safetensors")
    return {name.removeprefix("weights/"): value for name, value in arrays.items() if name.startswith("weights/")}


def test_back_and_forth_changes_no_byte_and_no_name(state):
    params = dit_from_torch(state, REFERENCE)
    shapes = abstract_params(REFERENCE)
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, params, shapes))
    again = dit_to_torch(params, REFERENCE)
    assert set(again) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(again[name], value)
        assert again[name].flags.c_contiguous


def test_layers_keep_their_order(state):
    params = dit_from_torch(state, REFERENCE)
    for layer in range(3):
        theirs = state[f"blocks.{layer}.mlp.fc1.weight"]
        np.testing.assert_array_equal(params["blocks"]["mlp"]["fc1"]["kernel"][layer], theirs.T)


def test_routed_model_survives_the_round_trip_under_the_released_names():
    config = dataclasses.replace(get_preset("nano"), num_classes=1000, learn_sigma=True)
    params = jax.tree.map(np.asarray, init_params(config, jax.random.key(0)))
    state = dit_to_torch(params, config)
    assert state["x_embedder.proj.conv_in_4.weight"].shape == (32, 12, 2, 2)
    assert state["y_embedder.embedding_table.weight"].shape == (1005, 32)
    assert state["pos_embed"].shape == (1, 64, 32)
    np.testing.assert_array_equal(
        state["x_embedder.proj.conv_in_3.weight"][5, 7], params["patch_embed"]["kernel"][2, :, :, 7, 5]
    )
    back = dit_from_torch(state, config)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, back))


def test_sizes_are_read_off_the_tensors(state):
    assert config_from_torch(state, heads=4, name="reference") == REFERENCE
    config = dataclasses.replace(get_preset("nano"), num_classes=1000)
    routed = dit_to_torch(init_params(config, jax.random.key(0)), config)
    assert config_from_torch(routed, heads=2, name="nano") == config


def test_half_precision_is_read_as_float32(state):
    params = dit_from_torch({name: value.astype(np.float16) for name, value in state.items()}, REFERENCE)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


def test_missing_tensor_is_named(state):
    del state["blocks.1.attn.qkv.bias"]
    with pytest.raises(UserError, match=r"no tensor blocks\.1\.attn\.qkv\.bias \(192,\)"):
        dit_from_torch(state, REFERENCE)
    del state["x_embedder.proj.weight"]
    with pytest.raises(UserError, match=r"no tensor x_embedder\.proj\.weight"):
        dit_from_torch(state)


def test_unexpected_tensor_is_named(state):
    state["blocks.1.attn.q_norm.weight"] = np.zeros(16, np.float32)
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.q_norm\.weight \(16,\) has no place"):
        dit_from_torch(state, REFERENCE)


def test_misshaped_tensor_is_named_with_both_shapes(state):
    state["final_layer.linear.weight"] = np.zeros((16, 64), np.float32)
    with pytest.raises(UserError, match=r"final_layer\.linear\.weight has shape \(16, 64\).*needs \(32, 64\)"):
        dit_from_torch(state, REFERENCE)


def test_another_resolution_is_refused_by_its_position_table(state):
    with pytest.raises(UserError, match=r"pos_embed has shape \(1, 16, 64\).*needs \(1, 64, 64\)"):
        dit_from_torch(state, dataclasses.replace(REFERENCE, input_size=16))


def test_export_refuses_a_tree_that_does_not_fit(state):
    params = dit_from_torch(state, REFERENCE)
    with pytest.raises(UserError, match="parameter extra has no place"):
        dit_to_torch({**params, "extra": np.zeros(3)}, REFERENCE)
    with pytest.raises(UserError, match=r"pos_embed has shape \(3,\).*needs \(16, 64\)"):
        dit_to_torch({**params, "pos_embed": np.zeros(3)}, REFERENCE)
    with pytest.raises(UserError, match="label_embed.*missing"):
        dit_to_torch({name: value for name, value in params.items() if name != "label_embed"}, REFERENCE)


def test_published_file_forms_give_the_reference_output(shared_dir):
    torch = pytest.importorskip("torch")
    folder = shared_dir / "golden" / "checkpoints" / "dit"
    expected = load_file(folder / "expected.safetensors")
    config = DiTConfig("tiny", input_size=8, dim=32, depth=2, heads=4, num_classes=10)
    x = jnp.asarray(expected["in/x"].transpose(0, 2, 3, 1))
    t, label = jnp.asarray(expected["in/t"], jnp.int32), jnp.asarray(expected["in/y"], jnp.int32)
    plain = torch.load(folder / "DiT-tiny-2-64x64.pt", weights_only=True)
    with torch.serialization.safe_globals([argparse.Namespace]):
        training = torch.load(folder / "0000002.pt", weights_only=True)
    for name, weights in (("plain", plain), ("ema", training["ema"]), ("model", training["model"])):
        params = dit_from_torch({key: value.numpy() for key, value in weights.items()}, config)
        out = DiT(config).apply({"params": params}, x, t, label)
        np.testing.assert_allclose(out.transpose(0, 3, 1, 2), expected[f"out/{name}"], atol=2e-5)
