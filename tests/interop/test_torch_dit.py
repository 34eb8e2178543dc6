"""Published checkpoints in and out: exact names, exact bytes, refusals that name the tensor."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from scaling_perception.interop.safetensors_io import flatten_tree, source_of
from scaling_perception.interop.torch_dit import (
    attention_layout,
    check_tensors,
    config_from_shapes,
    config_from_torch,
    dit_from_torch,
    dit_to_torch,
    leaf_pieces,
    leaf_specs,
    stream_from_torch,
    stream_to_torch,
)
from scaling_perception.interop.torch_files import open_torch
from scaling_perception.models.dit import DiT, DiTConfig, abstract_params, count_params
from scaling_perception.models.presets import get_preset
from scaling_perception.support.errors import UserError

REFERENCE = DiTConfig("reference", input_size=8, dim=64, depth=3, heads=4, num_classes=10)
_SMALL = DiTConfig("small", input_size=8, dim=32, depth=2, heads=4, num_classes=10)
_EXPERTS = dataclasses.replace(_SMALL, experts=4, expert_mlp="swiglu", shared_experts=2)
_TASKS = dataclasses.replace(_SMALL, experts=3, cond_channels=8, task_labels=4, routed=True, num_classes=1000)
LAYOUTS = {
    "dit": _SMALL,
    "dit_moe": _EXPERTS,
    "dit_moe_flash": dataclasses.replace(_EXPERTS, qk_norm=True),
    "generalist": _TASKS,
    "generalist_shared": dataclasses.replace(_TASKS, shared_experts=1),
    "generalist_dense": dataclasses.replace(_TASKS, experts=0),
    "other_hidden_width": dataclasses.replace(_EXPERTS, mlp_ratio=1.53125, shared_experts=0),
    "no_sigma": dataclasses.replace(_SMALL, learn_sigma=False, cond_channels=4),
}


@pytest.fixture
def state(golden):
    return weights(golden / "dit_dense" / "p2_8x8.safetensors")


def weights(path):
    arrays = load_file(path)
    return {name.removeprefix("weights/"): value for name, value in arrays.items() if name.startswith("weights/")}


def random_params(config, dtype=np.float32):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), abstract_params(config))


def identical(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and a.tobytes() == b.tobytes(), ours, theirs))


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


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("config", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_survives_the_round_trip_bit_by_bit(config, dtype):
    params = random_params(config, dtype)
    state = dit_to_torch(params, config)
    assert sum(array.size for array in state.values()) == count_params(config)
    shapes = {name: array.shape for name, array in state.items()}
    assert config_from_shapes(shapes, config.heads, config.name) == config
    identical(dit_from_torch(state, config, dtype=None), params)
    masters = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    identical(dit_from_torch(state, config), masters)


@pytest.mark.parametrize("config", LAYOUTS.values(), ids=LAYOUTS)
def test_streaming_gives_what_whole_dictionaries_give(config):
    params = random_params(config)
    state = dit_to_torch(params, config)
    order = np.random.default_rng(1).permutation(sorted(state))  # a file may hold them in any order
    source = source_of({str(name): state[name] for name in order}, "test")
    specs = leaf_specs(source, config)
    flat = {leaf: np.full(spec.shape, np.nan, spec.dtype) for leaf, spec in specs.items()}
    largest = max(array.size for array in state.values())
    for leaf, index, array in stream_from_torch(source, config):
        assert array.size <= largest and np.isnan(flat[leaf][index]).all()
        flat[leaf][index] = array
    assert all(np.array_equal(flat[leaf], array) for leaf, array in flatten_tree(params).items())
    back = dict(stream_to_torch(source_of(flat, "test"), config))
    assert list(back) == list(state) and all(np.array_equal(back[name], state[name]) for name in state)


def test_layers_and_experts_keep_their_order_and_turn(golden, state):
    params = dit_from_torch(state, REFERENCE)
    for layer in range(3):
        theirs = state[f"blocks.{layer}.mlp.fc1.weight"]
        np.testing.assert_array_equal(params["blocks"]["mlp"]["fc1"]["kernel"][layer], theirs.T)
    moe = weights(golden / "dit_moe" / "e8_top2_s2.safetensors")
    ours = dit_from_torch(moe, config_from_torch(moe, heads=4))["blocks"]["moe"]
    for layer, expert in ((0, 0), (1, 7)):
        for name in ("gate", "up", "down"):
            theirs = moe[f"blocks.{layer}.moe.experts.{expert}.{name}_proj.weight"]
            np.testing.assert_array_equal(ours["experts"][name]["kernel"][layer, expert], theirs.T)
    np.testing.assert_array_equal(
        ours["shared"]["down"]["kernel"][1], moe["blocks.1.moe.shared_experts.down_proj.weight"].T
    )
    np.testing.assert_array_equal(ours["router"]["kernel"][1][:, 3], moe["blocks.1.moe.gate.weight"][3])


def test_released_names_of_the_generalist():
    config = dataclasses.replace(_TASKS, experts=8)
    params = random_params(config)
    state = dit_to_torch(params, config)
    assert state["x_embedder.proj.conv_in_4.weight"].shape == (32, 12, 2, 2)
    assert state["y_embedder.embedding_table.weight"].shape == (1005, 32)
    assert state["pos_embed"].shape == (1, 16, 32)
    assert state["blocks.1.moe.experts.7.fc1.weight"].shape == (128, 32)
    assert state["blocks.1.moe.gate.weight"].shape == (8, 32)
    np.testing.assert_array_equal(
        state["x_embedder.proj.conv_in_3.weight"][5, 7], params["patch_embed"]["kernel"][2, :, :, 7, 5]
    )


def test_sizes_are_read_off_the_tensors(golden, state):
    assert config_from_torch(state, heads=4, name="reference") == REFERENCE
    moe = weights(golden / "dit_moe" / "e8_top2_s2.safetensors")
    assert config_from_torch(moe, heads=4, active_experts=3, gating="renormalised") == DiTConfig(
        *("converted", 8, 48, 2, 4), num_classes=10, experts=8, active_experts=3, expert_mlp="swiglu", shared_experts=2,
        gating="renormalised",
    )  # fmt: skip
    shared = weights(golden / "generalist" / "uc_e8_top2_shared.safetensors")
    assert config_from_torch(shared, heads=2, name="uc") == DiTConfig(
        *("uc", 8, 32, 2, 2), cond_channels=8, task_labels=4, routed=True, experts=8, shared_experts=2
    )


def test_published_sizes_are_recognised_with_their_heads():
    for name in ("S/2", "a3", "S/2-16E2A", "a2-4E2A", "XL-8E2A"):
        preset = get_preset(name)
        shapes = {piece.tensor: piece.shape for plan in leaf_pieces(preset).values() for piece in plan.pieces}
        found = config_from_shapes(shapes, name=name, active_experts=preset.active_experts, gating=preset.gating)
        assert found == preset and check_tensors(shapes, preset) == []


def test_heads_are_told_by_the_norms_where_there_are_any():
    config = LAYOUTS["dit_moe_flash"]
    shapes = {piece.tensor: piece.shape for plan in leaf_pieces(config).values() for piece in plan.pieces}
    assert shapes["blocks.0.attn.Wqkv.weight"] == (96, 32) and shapes["blocks.1.attn.k_norm.bias"] == (8,)
    assert config_from_shapes(shapes, name=config.name) == config
    with pytest.raises(UserError, match="8 heads do not fit: the checkpoint's are 8 wide, and the model 32"):
        config_from_shapes(shapes, heads=8)


def test_either_attention_layout_holds_either_kind_of_attention():
    params = {name: random_params(LAYOUTS[name]) for name in ("dit_moe", "dit_moe_flash")}
    for name, layout in (("dit_moe", "flash"), ("dit_moe_flash", "timm")):
        state = dit_to_torch(params[name], LAYOUTS[name], attention=layout)
        assert attention_layout(state) == layout
        identical(dit_from_torch(state, LAYOUTS[name]), params[name])
    with pytest.raises(UserError, match="attention layout 'flsh'; did you mean 'flash'"):
        leaf_pieces(_SMALL, "flsh")


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


def test_all_problems_are_listed_before_anything_is_read():
    config = LAYOUTS["dit_moe"]
    shapes = {piece.tensor: piece.shape for plan in leaf_pieces(config).values() for piece in plan.pieces}
    source = source_of({name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}, "test")
    assert check_tensors(shapes, config) == []
    del source.shapes["blocks.1.moe.experts.2.up_proj.weight"]
    source.shapes["blocks.0.moe.gate.weight"] = (3, 32)
    source.shapes["head.bias"] = (4,)
    problems = check_tensors(source.shapes, config)
    for line, words in zip(
        problems,
        (
            "no tensor blocks.1.moe.experts.2.up_proj.weight (128, 32), which small needs for blocks/moe/experts/up",
            "blocks.0.moe.gate.weight has shape (3, 32), model small needs (4, 32)",
            "head.bias (4,) has no place in small",
        ),
        strict=True,
    ):
        assert words in line and "\n" not in line

    def read(_):
        raise AssertionError("read too early")

    blind = dataclasses.replace(source, read=read)
    with pytest.raises(UserError, match=r"experts\.2\.up_proj.*and 2 more such tensors"):
        next(stream_from_torch(blind, config))
    with pytest.raises(UserError, match=r"parameter .* of small is missing"):
        next(stream_to_torch(dataclasses.replace(blind, shapes={}), config))


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
    with pytest.raises(UserError, match="task context .context_dim=8., for which published checkpoints have no place"):
        leaf_pieces(dataclasses.replace(_SMALL, context_dim=8))


def test_published_file_forms_give_the_reference_output(shared_dir, torch):
    folder = shared_dir / "golden" / "checkpoints" / "dit"
    expected = load_file(folder / "expected.safetensors")
    config = DiTConfig("tiny", input_size=8, dim=32, depth=2, heads=4, num_classes=10)
    x = jnp.asarray(expected["in/x"].transpose(0, 2, 3, 1))
    t, label = jnp.asarray(expected["in/t"], jnp.int32), jnp.asarray(expected["in/y"], jnp.int32)
    forward = jax.jit(lambda params: DiT(config).apply({"params": params}, x, t, label))
    for file, name in (("DiT-tiny-2-64x64.pt", "plain"), ("0000002.pt", "ema")):
        source = open_torch(folder / file)
        assert config_from_shapes(source.shapes, heads=4, name="tiny") == config
        out = forward(dit_from_torch({key: source.read(key) for key in source.shapes}, config))
        np.testing.assert_allclose(out.transpose(0, 3, 1, 2), expected[f"out/{name}"], atol=2e-5)


def test_released_generalist_files_hold_the_reference_weights(shared_dir, golden, torch):
    for suffix, case, heads in (("", "uc_e8_top2", 4), ("_ema", "uc_e8_top2_shared", 2)):
        source = open_torch(
            shared_dir / "golden" / "checkpoints" / "generalist" / f"dit_moe_generalist_tiny{suffix}.pt"
        )
        expected = weights(golden / "generalist" / f"{case}.safetensors")
        assert {name: array.shape for name, array in expected.items()} == source.shapes
        config = config_from_shapes(source.shapes, heads)
        params = dit_from_torch({name: source.read(name) for name in source.shapes}, config)
        again = dit_to_torch(params, config)
        assert set(again) == set(expected) and all(np.array_equal(again[name], expected[name]) for name in expected)
