"""The dense DiT against numbers of the reference implementation (facebookresearch/DiT): values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from applying import applied, fresh
from safetensors.numpy import load_file

from scaling_perception.interop.torch_dit import dit_from_torch, dit_to_torch
from scaling_perception.models.dit import (
    DiT,
    DiTConfig,
    PatchEmbed,
    PrecomputedConditioning,
    abstract_params,
    config_from_dict,
    count_params,
    embed_conditions,
    frozen_paths,
    guide,
    init_params,
    modulations,
    patchify,
    position_table,
    timestep_features,
    unpatchify,
)
from scaling_perception.models.presets import get_preset
from scaling_perception.support.errors import UserError

REFERENCE = DiTConfig("reference", input_size=8, dim=64, depth=3, heads=4, num_classes=10)


def nhwc(array):
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def close(mine, theirs, tolerance):
    """Largest difference over the largest reference value."""
    theirs = np.asarray(theirs)
    assert mine.shape == theirs.shape
    assert np.max(np.abs(np.asarray(mine) - theirs)) <= tolerance * np.max(np.abs(theirs))


def reference_case(path, config):
    arrays = load_file(path)
    weights = {name.removeprefix("weights/"): value for name, value in arrays.items() if name.startswith("weights/")}
    return config, dit_from_torch(weights, config), arrays


@pytest.fixture(scope="module")
def reference(golden):
    return reference_case(golden / "dit_dense" / "p2_8x8.safetensors", REFERENCE)


@pytest.fixture(scope="module")
def outputs(reference):
    """The forward pass of the reference inputs, with what the modules inside returned."""
    config, params, arrays = reference

    @jax.jit
    def run(params, x, t, label):
        return DiT(config).apply({"params": params}, x, t, label, capture_intermediates=True, mutable="intermediates")

    out, state = run(params, nhwc(arrays["in/x"]), arrays["in/t"].astype(np.int32), arrays["in/y"].astype(np.int32))
    return out, state["intermediates"]


def test_forward_equals_the_reference(outputs, reference):
    close(outputs[0], nhwc(reference[2]["out/forward"]), 1e-5)


def test_parts_equal_the_reference(outputs, reference):
    inside, arrays = outputs[1], reference[2]
    close(inside["patch_embed"]["__call__"][0], arrays["out/x_embedder"], 1e-5)
    close(inside["time_embed"]["__call__"][0], arrays["out/t_embedder"], 1e-5)
    close(inside["blocks"]["__call__"][0][0][0], arrays["out/block0"], 1e-5)  # layer 0 of the stacked outputs


def test_tables_equal_the_reference(reference):
    arrays = reference[2]
    # the reference rounds some frequencies otherwise, by one unit in the last place: 6e-5 of an angle at t = 998
    close(timestep_features(jnp.asarray(arrays["in/t_fractional"])), arrays["out/timestep_embedding"], 4e-5)
    index = np.arange(128) / 128
    angles = arrays["in/t_fractional"][:2, None].astype(np.float64) * 10000.0**-index
    exact = np.hstack([np.cos(angles), np.sin(angles)])
    close(timestep_features(jnp.asarray(arrays["in/t_fractional"][:2])), exact, 1e-6)
    close(position_table(64, 4), arrays["out/pos_embed"][0], 1e-6)
    close(position_table(64, 4), arrays["weights/pos_embed"][0], 1e-6)


def test_fractional_timesteps_and_guidance_equal_the_reference(reference):
    config, params, arrays = reference
    model = DiT(config)
    run = jax.jit(lambda params, x, t, label: model.apply({"params": params}, x, t, label))
    label = arrays["in/y"].astype(np.int32)
    fractional = run(params, nhwc(arrays["in/x"]), arrays["in/t_fractional"], label)
    close(fractional, nhwc(arrays["out/forward_fractional_t"]), 1e-5)
    # the reference feeds [x, x] with labels [wanted, null], and answers with both halves
    x = nhwc(arrays["in/cfg_x"])[:2]
    t, labels = arrays["in/cfg_t"].astype(np.float32), arrays["in/cfg_y"].astype(np.int32)
    wanted, null = run(params, x, t[:2], labels[:2]), run(params, x, t[2:], labels[2:])
    scale = float(arrays["in/cfg_scale"])
    expected = nhwc(arrays["out/forward_with_cfg"])
    close(guide(wanted, null, scale), expected[:2], 2e-5)
    close(guide(wanted, null, scale)[..., :3], expected[2:, ..., :3], 2e-5)
    assert not np.allclose(guide(wanted, null, scale, channels=4)[..., 3], expected[:2, ..., 3])


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_equal_the_reference(reference, remat):
    config, params, arrays = reference
    model = DiT(config, remat=remat)
    x, target = nhwc(arrays["in/x"]), nhwc(arrays["in/eps_target"])
    t, label = arrays["in/t"].astype(np.int32), arrays["in/y"].astype(np.int32)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return jnp.mean(jnp.square(model.apply({"params": params}, x, t, label)[..., :4] - target))

    value, gradient = loss(params)
    assert value == pytest.approx(float(arrays["out/loss"]), rel=1e-5)
    assert not np.any(gradient["pos_embed"])  # stored, never trained
    theirs = dit_to_torch(gradient, config)
    norms = {name.removeprefix("out/grad_norm/"): v for name, v in arrays.items() if name.startswith("out/grad_norm/")}
    assert set(norms) == set(theirs) - {"pos_embed"}
    for name, norm in norms.items():
        assert np.linalg.norm(theirs[name].astype(np.float64)) == pytest.approx(float(norm), rel=1e-4), name
    for name, whole in arrays.items():
        if name.startswith("out/grad/"):
            close(theirs[name.removeprefix("out/grad/")], whole, 1e-4)


def test_larger_picture_equals_the_reference(golden):
    config = dataclasses.replace(REFERENCE, input_size=16)
    config, params, arrays = reference_case(golden / "dit_dense" / "p2_16x16.safetensors", config)
    x, t, label = nhwc(arrays["in/x"]), arrays["in/t"].astype(np.int32), arrays["in/y"].astype(np.int32)
    close(applied(DiT(config), params, x, t, label), nhwc(arrays["out/forward"]), 1e-5)
    close(position_table(64, 8), arrays["out/pos_embed"][0], 1e-6)


@pytest.fixture(scope="module")
def router(golden):
    """The authors' PatchEmbedRouter: config, its parameters, inputs, expected tokens."""
    arrays = load_file(golden / "dit_dense" / "router.safetensors")
    config = DiTConfig("router", 8, dim=48, depth=1, heads=4, cond_channels=8, task_labels=4, routed=True)
    convs = [f"weights/x_embedder.proj.conv_in_{i}" for i in (1, 2, 3, 4)]
    params = {
        "kernel": np.stack([arrays[f"{conv}.weight"].transpose(2, 3, 1, 0) for conv in convs]),
        "bias": np.stack([arrays[f"{conv}.bias"] for conv in convs]),
    }
    return config, params, nhwc(arrays["in/x"]), arrays["in/y"].astype(np.int32), arrays["out/patch_embed"]


def test_each_task_has_its_own_patch_embedding(router):
    config, params, x, label, expected = router
    assert label.tolist() == [1000, 1001, 1002, 1003]
    close(applied(PatchEmbed(config), params, x, label), expected, 1e-5)
    mixed = np.array([1003, 1000, 1003, 1001])
    tokens = np.asarray(applied(PatchEmbed(config), params, x, mixed))
    for row, task in enumerate(mixed):
        plain = dataclasses.replace(config, routed=False)
        own = {"kernel": params["kernel"][task - 1000], "bias": params["bias"][task - 1000]}
        close(tokens[row], applied(PatchEmbed(plain), own, x, mixed)[row], 1e-5)


def test_labels_outside_the_tasks_embed_to_zero_without_bias(router):
    config, params, x, _, _ = router
    tokens = applied(PatchEmbed(config), params, x, np.array([999, 1004, 0, 1000]))
    assert not np.any(tokens[:3]) and np.all(np.any(tokens[3], axis=-1))


def test_router_trains_only_the_patch_embedding_that_was_used(router):
    config, params, x, _, _ = router
    label = np.array([1002, 1002, 1004, 1000])

    def loss(params):
        return jnp.sum(jnp.square(PatchEmbed(config).apply({"params": params}, x, label)))

    gradient = jax.grad(loss)(params)
    used = [bool(np.any(gradient["kernel"][i])) and bool(np.any(gradient["bias"][i])) for i in range(4)]
    assert used == [True, False, True, False]
    assert not np.any(gradient["kernel"][1::2]) and not np.any(gradient["bias"][1::2])


def test_new_model_answers_zero_and_is_drawn_as_the_reference_says():
    config = get_preset("nano", dim=64)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(3))
    x, t, label = np.random.default_rng(1).normal(size=(2, 16, 16, 12)), np.array([5, 900]), np.array([0, 3])
    assert not np.any(jax.jit(DiT(config).apply)({"params": params}, x.astype(np.float32), t, label))

    assert frozen_paths(config) == ("pos_embed",)
    np.testing.assert_array_equal(params["pos_embed"], position_table(64, 8))
    kernel = params["patch_embed"]["kernel"]
    bound = np.sqrt(6 / (12 * 4 + 64))  # Xavier of the (D, C p p) matrix
    for task in range(4):
        assert 0.95 * bound < np.abs(kernel[task]).max() <= bound
    assert not np.array_equal(kernel[0], kernel[1])
    block = params["blocks"]
    for layer in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2"):
        part, name = layer.split("/")
        weight = block[part][name]["kernel"]
        bound = np.sqrt(6 / (weight.shape[1] + weight.shape[2]))
        assert 0.95 * bound < np.abs(weight).max() <= bound
        assert not np.array_equal(weight[0], weight[1])  # layers differ
        assert not np.any(block[part][name]["bias"])
    assert not np.any(block["modulation"]["kernel"]) and not np.any(params["final"]["linear"]["kernel"])
    assert np.std(params["time_embed"]["fc1"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(params["label_embed"]) == pytest.approx(0.02, rel=0.2)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_bfloat16_computes_near_float32_and_answers_float32(reference):
    config, params, arrays = reference
    x, t, label = nhwc(arrays["in/x"]), arrays["in/t"].astype(np.int32), arrays["in/y"].astype(np.int32)
    out, state = DiT(config, dtype=jnp.bfloat16).apply(
        {"params": params}, x, t, label, capture_intermediates=True, mutable="intermediates"
    )
    assert out.dtype == jnp.float32
    inside = state["intermediates"]
    assert inside["blocks"]["__call__"][0][0].dtype == jnp.bfloat16
    assert inside["blocks"]["modulation"]["__call__"][0].dtype == jnp.float32
    expected = nhwc(arrays["out/forward"])
    error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < 2e-2


def test_remat_stores_less_for_the_gradient():
    config = get_preset("nano", depth=8)

    def temporary(remat):
        def loss(params, x, t, label):
            return jnp.sum(DiT(config, remat=remat).apply({"params": params}, x, t, label))

        shapes = (jax.ShapeDtypeStruct((4, 16, 16, 12), jnp.float32),) + (jax.ShapeDtypeStruct((4,), jnp.int32),) * 2
        analysis = jax.jit(jax.grad(loss)).lower(abstract_params(config), *shapes).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    assert temporary(True) < 0.7 * temporary(False)


def test_one_timestep_serves_the_whole_batch(reference):
    config, params, arrays = reference
    x, label = nhwc(arrays["in/x"]), arrays["in/y"].astype(np.int32)
    one = applied(DiT(config), params, x, jnp.array([321]), label)
    every = applied(DiT(config), params, x, jnp.full((5,), 321), label)
    close(one, every, 1e-6)


def test_patches_are_those_of_a_strided_convolution():
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 3)).astype(np.float32)
    kernel = np.random.default_rng(1).standard_normal((2, 2, 3, 5)).astype(np.float32)
    convolved = jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    close(patchify(jnp.asarray(x), 2) @ kernel.reshape(-1, 5), convolved.reshape(2, 9, 5), 1e-5)
    np.testing.assert_array_equal(unpatchify(patchify(jnp.asarray(x), 2), 2, 3), x)


def test_counting_builds_no_array():
    config = get_preset("XL/2", depth=280)  # 6 billion parameters would not fit
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract_params(config)))
    assert count_params(config) == 675129632 + 252 * (18 * 1152**2 + 15 * 1152)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"heads": 5}, "multiple of heads"),
        ({"dim": 0}, "dim=0"),
        ({"input_size": 15}, "patch_size"),
        ({"task_labels": 0}, "routed"),
        ({"depth": "3"}, "expected a value of type int"),
        ({"learn_sigma": 1}, "expected a value of type bool"),
        ({"head": 2}, "did you mean 'heads'"),
    ],
)
def test_impossible_sizes_are_the_users_mistake(changes, words):
    with pytest.raises(UserError, match=words):
        get_preset("nano", **changes)


def test_config_survives_json_and_names_a_missing_field():
    config = get_preset("mini")
    fields = dataclasses.asdict(config)
    assert config_from_dict(fields) == config
    del fields["depth"]
    with pytest.raises(UserError, match="'depth' is missing"):
        config_from_dict(fields)


def test_labels_follow_the_released_numbering():
    generalist = get_preset("XL/2", task_labels=4, cond_channels=8, routed=True)
    assert (generalist.label_rows, generalist.null_label, generalist.task_label(0)) == (1005, 1004, 1000)
    assert get_preset("XL/2").task_label(2) == get_preset("XL/2").null_label == 1000
    with pytest.raises(UserError, match="knows 4 tasks"):
        generalist.task_label(4)


def test_wrong_input_names_both_shapes():
    config = get_preset("nano")
    with pytest.raises(UserError, match=r"takes latents \(B, 16, 16, 12\), got \(2, 16, 16, 4\)"):
        DiT(config).apply({"params": {}}, jnp.zeros((2, 16, 16, 4)), jnp.zeros(2), jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize("changes", [{}, {"routed": False, "context_dim": 3}, {"experts": 4}, {"cond_channels": 0}])
def test_what_does_not_change_while_sampling_can_be_computed_ahead(changes):
    config = get_preset("nano", input_size=8, **changes)
    t, label = jnp.asarray([999.0, 20.0]), jnp.asarray([0, 3])
    rows = jnp.asarray([1, 0, 1])  # which label each sample has

    @jax.jit
    def outputs(key):
        """Of both timesteps, with parts computed ahead and without."""
        params = jax.tree.map(lambda leaf: leaf + 0.05, fresh(config, key))
        latents = jax.random.normal(key, (3, 8, 8, config.input_channels))
        conditions, noisy = jnp.split(latents, [config.cond_channels], axis=-1)
        blocks, final = modulations(config, params, t, label)
        tokens = embed_conditions(config, params, conditions, label[rows])
        found = []
        for step in range(2):
            fixed = PrecomputedConditioning(tokens, blocks[step][:, rows], final[step][rows])
            ahead = DiT(config).apply({"params": params}, noisy, t[:1], label[rows], fixed=fixed)
            found.append((ahead, applied(DiT(config), params, latents, t[step : step + 1], label[rows])))
        return found

    for ahead, whole in outputs(jax.random.key(0)):
        close(ahead, whole, 1e-5)


def test_a_float32_stream_rounds_less_and_weighs_the_same():
    """The tokens between blocks in float32 under bfloat16 matmuls: about half the error of the output."""
    config = get_preset("nano", depth=12)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(leaf.size).normal(0, 0.1, leaf.shape), jnp.float32),
        abstract_params(config),
    )
    x = jax.random.normal(jax.random.key(0), (4, config.input_size, config.input_size, config.input_channels))
    t, label = jnp.asarray([10, 300, 600, 990]), jnp.arange(4) + config.num_classes

    def run(**how):
        return np.asarray(jax.jit(DiT(config, **how).apply)({"params": params}, x, t, label), np.float64)

    exact = run()
    errors = [np.sqrt(np.mean((run(dtype=jnp.bfloat16, stream=stream) - exact) ** 2)) for stream in (None, jnp.float32)]
    assert 0 < errors[1] < 0.75 * errors[0], errors
