"""Models with experts against the reference implementations (DiT-MoE, the released generalist): values, routing,
balance loss, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from applying import applied, fresh
from safetensors.numpy import load_file

from scaling_perception.interop.torch_dit import dit_from_torch, dit_to_torch
from scaling_perception.models.dit import DiT, DiTConfig, PatchEmbed, frozen_paths, guide
from scaling_perception.models.moe import MoE, route, routing_stats
from scaling_perception.models.presets import get_preset

SCRATCH = DiTConfig(
    "scratch", input_size=8, dim=48, depth=2, heads=4, num_classes=10, experts=8, expert_mlp="swiglu", shared_experts=2
)
GENERALIST = DiTConfig(
    "generalist", input_size=8, dim=48, depth=2, heads=4, cond_channels=8, task_labels=4, routed=True, experts=8
)
SHARED = dataclasses.replace(GENERALIST, name="shared", dim=32, heads=2, shared_experts=2)
CASES = {
    "scratch": (SCRATCH, "dit_moe/e8_top2_s2"),
    "generalist": (GENERALIST, "generalist/uc_e8_top2"),
    "shared": (SHARED, "generalist/uc_e8_top2_shared"),
}


def nhwc(array):
    return jnp.asarray(array.transpose(0, 2, 3, 1))


def close(mine, theirs, tolerance):
    """Largest difference over the largest reference value."""
    theirs = np.asarray(theirs)
    assert mine.shape == theirs.shape
    assert np.max(np.abs(np.asarray(mine) - theirs)) <= tolerance * np.max(np.abs(theirs))


@pytest.fixture(scope="module", params=CASES)
def case(request, golden):
    """(config, parameters, reference arrays, our output, routing) of one model."""
    config, name = CASES[request.param]
    arrays = load_file(golden / f"{name}.safetensors")
    weights = {key.removeprefix("weights/"): value for key, value in arrays.items() if key.startswith("weights/")}
    params = dit_from_torch(weights, config)
    x, t, y = nhwc(arrays["in/x"]), jnp.asarray(arrays["in/t"], jnp.float32), jnp.asarray(arrays["in/y"], jnp.int32)
    run = jax.jit(lambda p: DiT(config).apply({"params": p}, x, t, y, with_stats=True, mutable="intermediates"))
    (out, stats), seen = run(params)
    return config, params, arrays, (out, stats), seen["intermediates"]["blocks"]["moe"]


def test_forward_equals_the_reference(case):
    _, _, arrays, (out, _), _ = case
    close(out.transpose(0, 3, 1, 2), arrays["out/forward"], 1e-5)


def test_every_token_goes_to_the_same_experts(case):
    config, _, arrays, (_, stats), seen = case
    for layer in range(config.depth):
        index, weight = np.asarray(seen["index"][0][layer]), np.asarray(seen["weight"][0][layer])
        np.testing.assert_array_equal(index, arrays[f"out/router{layer}/topk_idx"])
        np.testing.assert_allclose(weight, arrays[f"out/router{layer}/topk_weight"], rtol=1e-5)
        counts = np.bincount(arrays[f"out/router{layer}/topk_idx"].reshape(-1), minlength=config.experts)
        np.testing.assert_allclose(stats["load"][layer], counts / counts.sum(), rtol=1e-6)


def test_one_layer_equals_the_reference(case):
    config, params, arrays, _, _ = case
    first = jax.tree.map(lambda leaf: leaf[0], params["blocks"]["moe"])
    inputs = jnp.asarray(arrays["out/router0/hidden_in"])
    for dispatch in ("dense", "ragged"):
        mixed, _ = applied(MoE(config, dispatch=dispatch), first, inputs)
        close(mixed, arrays["out/moe0_out"], 1e-5)


def test_mixed_tasks_one_timestep_and_foreign_labels(case):
    config, params, arrays, _, _ = case
    if not config.routed:
        scale = float(arrays["in/cfg_scale"])
        x, t, y = nhwc(arrays["in/cfg_x"]), jnp.asarray(arrays["in/cfg_t"]), jnp.asarray(arrays["in/cfg_y"])
        out = applied(DiT(config), params, jnp.concatenate([x[:2], x[:2]]), t, y)
        guided = guide(out[:2, ..., :4], out[2:, ..., :4], scale)
        close(guided.transpose(0, 3, 1, 2), arrays["out/forward_with_cfg"][:2, :4], 1e-5)
        return
    y = jnp.asarray(arrays["in/y_b"], jnp.int32)
    out = applied(DiT(config), params, nhwc(arrays["in/x_b"]), jnp.asarray(arrays["in/t_b"]), y)
    close(out.transpose(0, 3, 1, 2), arrays["out/forward_broadcast_t"], 1e-5)
    y, t = jnp.asarray(arrays["in/y_other"], jnp.int32), jnp.asarray(arrays["in/t_other"])
    out = applied(DiT(config), params, nhwc(arrays["in/x"])[:2], t, y)
    close(out.transpose(0, 3, 1, 2), arrays["out/forward_other_labels"], 1e-5)
    y = jnp.asarray(arrays["in/y"], jnp.int32)
    embedded = applied(PatchEmbed(config), params["patch_embed"], nhwc(arrays["in/x"]), y)
    close(embedded, arrays["out/patch_embed"], 1e-5)


def test_balance_loss_and_all_gradients_equal_the_reference(golden):
    arrays = load_file(golden / "dit_moe/e8_top2_s2.safetensors")
    weights = {key.removeprefix("weights/"): value for key, value in arrays.items() if key.startswith("weights/")}
    x, t, y = nhwc(arrays["in/x"]), jnp.asarray(arrays["in/t"]), jnp.asarray(arrays["in/y"], jnp.int32)
    target = nhwc(arrays["in/eps_target"])

    @jax.jit
    def gradient(params):
        def loss(params):
            out, stats = DiT(SCRATCH).apply({"params": params}, x, t, y, with_stats=True)
            mse = jnp.mean(jnp.square(out[..., :4] - target))
            return mse + 0.01 * stats["balance"].sum(), (mse, 0.01 * stats["balance"])

        return jax.grad(loss, has_aux=True)(params)

    grads, (mse, balance) = gradient(dit_from_torch(weights, SCRATCH))
    np.testing.assert_allclose(mse, arrays["out/train/mse"], rtol=1e-5)
    np.testing.assert_allclose(balance, arrays["out/train/aux_loss_per_layer"], atol=1e-6)
    mine = dit_to_torch(jax.tree.map(np.asarray, grads), SCRATCH)
    for name in weights:
        if name == "pos_embed":
            assert not mine[name].any() and frozen_paths(SCRATCH) == ("pos_embed",)
            continue
        expected = arrays[f"out/train/grad_norm/{name}"]
        np.testing.assert_allclose(np.linalg.norm(mine[name].astype(np.float64)), expected, rtol=1e-4, atol=1e-9)
    full = "blocks.0.moe.gate.weight"
    close(mine[full], arrays[f"out/train/grad/{full}"], 1e-4)


def test_balance_is_one_when_balanced_and_its_gradient_moves_scores_to_idle_experts():
    kernel = jnp.zeros((4, 4))
    even = route(jnp.zeros((8, 4)), kernel, 4, "paper")
    assert routing_stats(even)["balance"] == pytest.approx(1.0)
    np.testing.assert_allclose(routing_stats(even)["load"], 0.25)
    assert routing_stats(even)["entropy"] == pytest.approx(np.log(4))
    x = jnp.ones((8, 4))  # all tokens alike: they crowd on the first expert
    crowded = kernel.at[:, 0].set(0.1)
    gradient = jax.jit(jax.grad(lambda k: routing_stats(route(x, k, 1, "paper"))["balance"]))(crowded)
    assert (gradient[:, 0] > 0).all() and (gradient[:, 1:] < 0).all()


def test_gating_and_ties():
    x, kernel = jax.random.normal(jax.random.key(0), (32, 8)), jax.random.normal(jax.random.key(1), (8, 4))
    raw, shared = route(x, kernel, 2, "paper"), route(x, kernel, 2, "renormalised")
    np.testing.assert_array_equal(raw.index, shared.index)
    np.testing.assert_allclose(shared.weight.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(raw.weight, jnp.take_along_axis(raw.scores, raw.index, axis=1))
    assert (route(x, kernel, 1, "renormalised").weight == 1).all()
    np.testing.assert_array_equal(route(x, jnp.zeros((8, 4)), 2, "paper").index, np.tile([0, 1], (32, 1)))


def test_router_stays_float32_when_the_rest_is_bfloat16():
    config = get_preset("nano", experts=4)
    params = fresh(config, jax.random.key(0))
    assert params["blocks"]["moe"]["router"]["kernel"].shape == (2, 32, 4)
    bound = 32**-0.5
    spread = np.abs(params["blocks"]["moe"]["router"]["kernel"])
    assert spread.max() <= bound and spread.mean() == pytest.approx(bound / 2, rel=0.2)
    first = jax.tree.map(lambda leaf: leaf[0], params["blocks"]["moe"])
    x = jax.random.normal(jax.random.key(1), (2, 16, 32))
    layers = [MoE(config, dtype) for dtype in ("float32", "bfloat16")]
    run = [jax.jit(lambda p, moe=moe: moe.apply({"params": p}, x, mutable="intermediates"))(first) for moe in layers]
    np.testing.assert_array_equal(*(seen["intermediates"]["index"][0] for _, seen in run))
    (full, _), (half, _) = (out for out, _ in run)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), full, atol=0.03 * float(jnp.abs(full).max()))


def test_task_context_starts_as_nothing_and_reaches_the_output():
    plain, config = get_preset("nano"), get_preset("nano", context_dim=6)
    params = fresh(config, jax.random.key(0))
    assert params["context"]["table"].shape == (4, 6) and params["context"]["kernel"].shape == (6, 32)
    assert frozen_paths(config) == ("pos_embed", "context/table")
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # adaLN-Zero would hide everything
    params["context"]["kernel"] = jnp.zeros((6, 32))
    x, t, y = jnp.ones((2, 16, 16, 12)), jnp.full((2,), 9.0), jnp.asarray([1, 3])
    without = {name: leaf for name, leaf in params.items() if name != "context"}
    out = applied(DiT(config), params, x, t, y)
    np.testing.assert_array_equal(out, applied(DiT(plain), without, x, t, y))
    params["context"]["kernel"] = jnp.ones((6, 32))
    params["context"]["table"] = jnp.zeros((4, 6)).at[1].set(1.0)  # amodal alone has a prompt
    moved = applied(DiT(config), params, x, t, y)
    assert float(jnp.abs(moved - out)[0].max()) > 1e-3
    np.testing.assert_array_equal(moved[1], out[1])
