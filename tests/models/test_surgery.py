"""Surgery on parameter trees: values of the released code, functions that are kept, memory, and what is refused."""

import dataclasses
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from applying import applied
from safetensors.numpy import load_file

from scaling_perception.models.dit import DiT, DiTConfig, Mlp, PatchEmbed, abstract_params, position_table
from scaling_perception.models.moe import MoE, route
from scaling_perception.models.presets import get_preset
from scaling_perception.models.surgery import (
    adapt,
    add_context,
    change_resolution,
    drop_classes,
    drop_variance,
    extend_labels,
    split_patch_embed,
    upcycle,
    widen_input,
)
from scaling_perception.support.errors import UserError

CLASSES = DiTConfig("classes", input_size=8, dim=16, depth=2, heads=2, num_classes=8)  # a class-conditional DiT
WANTED = dataclasses.replace(
    CLASSES, name="wanted", input_size=4, cond_channels=8, task_labels=4, routed=True, experts=4, gating="renormalised"
)


def weights(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = abstract_params(config)
    params = jax.tree.map(lambda leaf: rng.normal(0.01, 0.2, leaf.shape).astype(np.float32), shapes)
    return {**params, "pos_embed": position_table(config.dim, config.grid)}


def hollow(config):
    """Parameters of any size that take no memory."""
    return jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0.5), leaf.shape), abstract_params(config))


def shapes(params):
    return jax.tree.map(lambda leaf: tuple(leaf.shape), params)


def output(params, config, latents, label):
    """Of a batch of two, where the latents (2, side, side, 4) are repeated for the conditions."""
    x = np.concatenate([latents] * (config.input_channels // 4), axis=-1)
    return np.asarray(applied(DiT(config), params, x, jnp.array([10.0, 800.0]), jnp.asarray(label)))


@pytest.fixture(scope="module")
def start():
    return weights(CLASSES)


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(1).normal(size=(2, 8, 8, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def reference(golden):
    return load_file(golden / "generalist" / "uc_e8_top2.safetensors")


def test_widened_kernel_of_the_released_code(reference):
    config = DiTConfig("golden", input_size=8, dim=48, depth=1, heads=4)
    kernel = reference["in/update_model/conv_weight_4ch"].transpose(2, 3, 1, 0)
    params = {"patch_embed": {"kernel": kernel, "bias": np.ones(48, np.float32)}}
    wide, new = widen_input(params, config, 8, "released")
    expected = reference["out/update_model/conv_weight_12ch"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(wide["patch_embed"]["kernel"], expected)
    assert new.cond_channels == 8 and wide["patch_embed"]["bias"] is params["patch_embed"]["bias"]
    half, _ = widen_input(params, config, 4, "released")
    np.testing.assert_array_equal(half["patch_embed"]["kernel"], np.concatenate([kernel / 2, kernel / 2], axis=2))


@pytest.mark.parametrize("cond", [4, 8])
def test_widened_input_of_equal_latents_is_the_old_input(start, latents, cond):
    wide, config = widen_input(start, CLASSES, cond)
    label = np.array([3, 8])
    np.testing.assert_allclose(
        output(wide, config, latents, label), output(start, CLASSES, latents, label), rtol=1e-4, atol=1e-5
    )
    whole = wide["patch_embed"]["kernel"].reshape(2, 2, -1, 4, 16).sum(axis=2)
    np.testing.assert_allclose(whole, start["patch_embed"]["kernel"], rtol=1e-6)


def test_extended_table_of_the_released_code(reference):
    config = DiTConfig("golden", input_size=8, dim=48, depth=1, heads=4)
    table = reference["in/extend/embedding_table"]
    longer, new = extend_labels({"label_embed": table}, config)
    got, expected = longer["label_embed"], reference["out/extend/embedding_table"]
    assert new.label_rows == 1005 and got.dtype == np.float32
    np.testing.assert_array_equal(got[:1000], table[:1000])
    np.testing.assert_array_equal(got[1004], table[1000])
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-8)


def test_groups_of_other_numbers_of_classes():
    def tasks(classes):
        config = dataclasses.replace(CLASSES, num_classes=classes)
        table = np.arange(1, classes + 2, dtype=np.float32)[:, None] * np.ones(16, np.float32)
        longer, new = extend_labels({"label_embed": table}, config)
        assert longer["label_embed"].shape[0] == new.label_rows
        return longer["label_embed"][classes : classes + 4, 0].tolist()

    assert tasks(8) == [1.5, 3.5, 5.5, 7.5]
    assert tasks(10) == [1.5, 4.0, 6.5, 9.0]  # 2, 3, 2 and 3 of them
    assert tasks(2) == [3.0, 1.0, 3.0, 2.0]  # an empty group: the null row
    assert tasks(0) == [1.0] * 4


def test_split_patch_embedding_is_the_same_for_every_task(start, latents):
    params, config = extend_labels(start, CLASSES)
    split, routed = split_patch_embed(params, config)
    assert shapes(split) == shapes(abstract_params(routed))
    plain = applied(PatchEmbed(config), params["patch_embed"], latents, jnp.array([0, 0]))
    for labels in ([8, 9], [10, 11]):
        got = applied(PatchEmbed(routed), split["patch_embed"], latents, jnp.asarray(labels))
        np.testing.assert_allclose(got, plain, rtol=1e-6, atol=1e-6)


def test_resolution_classes_variance_and_context(start, latents):
    params, config = change_resolution(start, CLASSES, 128)
    np.testing.assert_array_equal(params["pos_embed"], position_table(16, 8))
    assert config.input_size == 16 and params["blocks"] is start["blocks"]

    tasks, known = extend_labels(start, CLASSES)
    few, small = drop_classes(tasks, known)
    label = np.array([2, 4])  # task 2, null
    before = output(tasks, known, latents, label + 8)
    np.testing.assert_array_equal(output(few, small, latents, label), before)
    less, plain = drop_variance(few, small)
    assert shapes(less) == shapes(abstract_params(plain))
    np.testing.assert_allclose(output(less, plain, latents, label), before[..., :4], rtol=1e-5, atol=1e-6)
    told, config = add_context(less, plain, 6, np.ones((4, 6)))
    assert shapes(told) == shapes(abstract_params(config))
    np.testing.assert_allclose(output(told, config, latents, label), before[..., :4], rtol=1e-5, atol=1e-6)
    alone, config = add_context(start, CLASSES, 6, np.ones((1, 6)))
    alone, config = extend_labels(alone, config)
    np.testing.assert_array_equal(alone["context"]["table"], np.ones((4, 6)))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(2).normal(size=(2, 16, 16)).astype(np.float32)


@pytest.mark.parametrize("experts", [2, pytest.param(16, marks=pytest.mark.slow)])
def test_renormalised_experts_are_the_dense_mlp(start, tokens, experts):
    mlp = jax.tree.map(lambda leaf: leaf[1], start["blocks"]["mlp"])
    dense = np.asarray(applied(Mlp(CLASSES.hidden), mlp, tokens))
    for active in (1, 2, 4):
        if active > experts:
            continue
        params, config = upcycle(start, CLASSES, experts, active)
        assert shapes(params) == shapes(abstract_params(config)) and config.gating == "renormalised"
        layer = jax.tree.map(lambda leaf: leaf[1], params["blocks"]["moe"])
        mixed, _ = applied(MoE(config), layer, tokens)
        assert np.abs(mixed - dense).max() <= 1e-6 * np.abs(dense).max()
        # as published, each token's output is the dense one times the sum S of the chosen experts' scores
        weight = route(tokens.reshape(-1, 16), layer["router"]["kernel"], active, "paper").weight.sum(axis=-1)
        shrunk, _ = applied(MoE(dataclasses.replace(config, gating="paper")), layer, tokens)
        expected = dense * np.asarray(weight).reshape(2, 16, 1)
        assert np.abs(shrunk - expected).max() <= 1e-6 * np.abs(dense).max()
        assert (float(weight.max()) < 0.99) == (active < experts)


def test_shrink_that_the_documentation_tells():
    x = np.random.default_rng(0).normal(size=(2000, 64)).astype(np.float32)
    config = dataclasses.replace(CLASSES, dim=64)
    for experts, told in ((4, 0.68), (8, 0.43), (16, 0.27)):
        params, _ = upcycle(hollow(config), config, experts, 2)
        weight = route(x, params["blocks"]["moe"]["router"]["kernel"][0], 2, "paper").weight
        assert float(weight.sum(axis=-1).mean()) == pytest.approx(told, abs=0.02)


def test_router_is_drawn_by_key_within_its_bound(start):
    routers = [upcycle(start, CLASSES, 8, 2, key=key)[0] for key in (None, jax.random.key(0), jax.random.key(1))]
    kernels = [params["blocks"]["moe"]["router"]["kernel"] for params in routers]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.all(kernels[0] != kernels[2]) and kernels[0].dtype == np.float32
    assert 0.24 < np.abs(kernels[0]).max() <= 0.25  # 1 / sqrt(16)
    noisy, _ = upcycle(start, CLASSES, 8, 2, noise=0.1, drop=0.5)
    np.testing.assert_array_equal(noisy["blocks"]["moe"]["router"]["kernel"], kernels[0])


def test_noise_is_relative_to_each_kernel(start):
    start = {**start, "blocks": {**start["blocks"], "mlp": dict(start["blocks"]["mlp"])}}
    fc1 = start["blocks"]["mlp"]["fc1"]
    start["blocks"]["mlp"]["fc1"] = {**fc1, "kernel": fc1["kernel"] * np.array([1, 5], np.float32)[:, None, None]}
    before, after = start["blocks"]["mlp"], upcycle(start, CLASSES, 4, 2, noise=0.1)[0]["blocks"]["moe"]["experts"]
    for name in ("fc1", "fc2"):
        np.testing.assert_array_equal(after[name]["bias"][:, 3], before[name]["bias"])
        change = after[name]["kernel"] - before[name]["kernel"][:, None]
        for layer in range(2):
            scale = 0.1 * before[name]["kernel"][layer].std()
            assert change[layer].std() == pytest.approx(scale, rel=0.05) and abs(change[layer].mean()) < 0.1 * scale
        assert abs(np.corrcoef(change[0, 0].ravel(), change[0, 1].ravel())[0, 1]) < 0.1


def test_dropped_units_are_drawn_anew_and_the_others_stay(start):
    before, after = start["blocks"]["mlp"], upcycle(start, CLASSES, 4, 2, drop=0.25)[0]["blocks"]["moe"]["experts"]
    changed = []
    for layer in range(2):
        for expert in range(4):
            fc1, fc2 = ({n: leaf[layer, expert] for n, leaf in after[name].items()} for name in ("fc1", "fc2"))
            new = [
                np.all(fc1["kernel"] != before["fc1"]["kernel"][layer], axis=0),
                fc1["bias"] != before["fc1"]["bias"][layer],
                np.all(fc2["kernel"] != before["fc2"]["kernel"][layer], axis=1),
            ]
            assert new[0].sum() == 16 and np.array_equal(new[0], new[1]) and np.array_equal(new[0], new[2])
            stays = ~new[0]
            np.testing.assert_array_equal(fc1["kernel"][:, stays], before["fc1"]["kernel"][layer][:, stays])
            np.testing.assert_array_equal(fc2["kernel"][stays], before["fc2"]["kernel"][layer][stays])
            assert fc1["kernel"][:, new[0]].std() == pytest.approx(before["fc1"]["kernel"][layer].std(), rel=0.25)
            changed.append(tuple(np.flatnonzero(new[0])))
    assert len(set(changed)) == 8  # other units in each expert and layer


def test_all_units_dropped_keep_mean_and_deviation(start):
    moved = jax.tree.map(lambda leaf: leaf + np.float32(0.3), start)
    experts = upcycle(moved, CLASSES, 8, 2, drop=1.0)[0]["blocks"]["moe"]["experts"]
    for name, leaf in (("fc1", "kernel"), ("fc1", "bias"), ("fc2", "kernel")):
        was, now = moved["blocks"]["mlp"][name][leaf][0], experts[name][leaf][0]
        assert now.mean() == pytest.approx(was.mean(), abs=0.04) and now.std() == pytest.approx(was.std(), rel=0.1)


def test_half_precision_and_device_leaves(start):
    for dtype in (jnp.float16, jnp.bfloat16):
        halves = jax.tree.map(lambda leaf, dtype=dtype: jnp.asarray(leaf, dtype), start)
        params, steps = adapt(halves, CLASSES, WANTED, noise=0.1, drop=0.5)
        kept = {"pos_embed", "router"}
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
            names = {part.key for part in path}
            assert leaf.dtype == (np.float32 if names & kept else dtype), path
        assert len(steps) == 5


def test_nothing_is_changed_in_place(start):
    before = jax.tree.map(np.copy, start)
    adapt(start, CLASSES, WANTED, noise=0.1, drop=0.5)
    drop_classes(*drop_variance(start, CLASSES))
    jax.tree.map(np.testing.assert_array_equal, start, before)


def test_exact_copies_take_no_memory_and_others_only_their_own():
    """Of the largest model, 675 M parameters become 2.76 G without a copy of one kernel."""
    params = hollow(get_preset("XL/2"))
    wanted = get_preset("XL-8E2A", gating="renormalised")
    abstract = shapes(abstract_params(wanted))
    tracemalloc.start()
    big, steps = adapt(params, get_preset("XL/2"), wanted)
    assert tracemalloc.get_traced_memory()[1] < 80e6  # the label table in float64, the position table
    assert shapes(big) == abstract and len(steps) == 5

    config = dataclasses.replace(CLASSES, dim=128, depth=4, heads=4)
    params = hollow(config)
    for options in ({"noise": 0.1}, {"drop": 0.5}, {"noise": 0.1, "drop": 0.5}):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        result, _ = upcycle(params, config, 8, 2, **options)
        own = sum(leaf.nbytes for leaf in jax.tree.leaves(result["blocks"]["moe"]))
        assert tracemalloc.get_traced_memory()[1] - before < own + 4 * 128 * 512 * 4  # a few kernels of one expert
        del result
    tracemalloc.stop()


def test_adapt_goes_all_the_way_and_tells_each_step(start, latents):
    params, steps = adapt(start, CLASSES, WANTED)
    assert shapes(params) == shapes(abstract_params(WANTED))
    assert steps == [
        "position table made for 32 x 32 pixels",
        "input widened from 4 to 12 channels (gain exact)",
        "label table extended from 9 to 13 rows (tasks start as means of groups of classes)",
        "patch embedding copied for each of 4 tasks",
        "MLPs upcycled to 4 experts, 2 active (gating renormalised: same function)",
    ]
    # a task starts as the class-conditional model does with the mean of its classes
    mean = {**start, "label_embed": start["label_embed"].reshape(9, 16)[:8].reshape(4, 2, 16).mean(1)[[1, 3]]}
    same = dataclasses.replace(CLASSES, input_size=4, num_classes=1)
    small = {**mean, "pos_embed": position_table(16, 2)}
    expected = output(small, same, latents[:, :4, :4], [0, 1])
    np.testing.assert_allclose(output(params, WANTED, latents[:, :4, :4], [9, 11]), expected, rtol=1e-4, atol=1e-5)

    plain, steps = adapt(start, CLASSES, dataclasses.replace(WANTED, num_classes=0, learn_sigma=False, context_dim=3))
    assert steps[3:4] == ["8 class rows dropped from the label table"] and len(steps) == 8
    assert shapes(plain)["context"] == {"kernel": (3, 16), "table": (4, 3)}


def test_adapt_does_nothing_to_the_same_model_and_tells_other_gating(start):
    assert adapt(start, CLASSES, dataclasses.replace(CLASSES, name="mine")) == (start, [])
    params = {"blocks": {}}
    other = dataclasses.replace(WANTED, gating="paper", active_experts=1)
    assert adapt(params, WANTED, other) == (
        params,
        [
            "active_experts changed from 2 to 1: same weights, another function",
            "gating changed from renormalised to paper: same weights, another function",
        ],
    )
    _, steps = adapt(start, CLASSES, dataclasses.replace(CLASSES, experts=4, gating="paper"), noise=0.5)
    assert steps == ["MLPs upcycled to 4 experts, 2 active (gating paper, noise 0.5: another function at first)"]


TASKS = dataclasses.replace(CLASSES, task_labels=4)


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (get_preset("XL/2"), {"dim": 1024}, "dim is 1152 in model XL/2 and 1024 in wanted,.* choose model=XL/2"),
        (CLASSES, {"depth": 3}, "depth is 2 .* choose the preset that it was made with"),
        (CLASSES, {"heads": 4}, "heads is 2"),
        (CLASSES, {"mlp_ratio": 2.0}, "mlp_ratio is 4.0"),
        (CLASSES, {"qk_norm": True}, "qk_norm is False .* set model_changes.qk_norm=False"),
        (dataclasses.replace(CLASSES, cond_channels=4), {"cond_channels": 8}, "cond_channels is 4 .* and 8"),
        (TASKS, {"task_labels": 0}, "task_labels is 4"),
        (CLASSES, {"num_classes": 1000}, "num_classes is 8"),
        (dataclasses.replace(TASKS, routed=True), {"routed": False}, "routed is True"),
        (dataclasses.replace(CLASSES, learn_sigma=False), {"learn_sigma": True}, "learn_sigma is False"),
        (WANTED, {"experts": 8}, "experts is 4 in model wanted and 8"),
        (WANTED, {"experts": 0}, "experts is 4 in model wanted and 0"),
        (CLASSES, {"experts": 8, "expert_mlp": "swiglu"}, "expert_mlp is gelu .* set model_changes.expert_mlp=gelu"),
        (CLASSES, {"experts": 8, "shared_experts": 2}, "shared_experts is 0"),
    ],
)
def test_what_no_surgery_bridges(config, changes, words):
    with pytest.raises(UserError, match=words) as told:
        adapt({}, config, dataclasses.replace(config, name="wanted", **changes))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("operate", "words"),
    [
        (lambda p: widen_input(p, dataclasses.replace(CLASSES, cond_channels=4), 8), "cond_channels=4: its input"),
        (lambda p: widen_input(p, CLASSES, 6), "cond_channels=6: give a multiple of 4"),
        (lambda p: widen_input(p, CLASSES, 8, "exakt"), "did you mean 'exact'"),
        (lambda p: widen_input(p, CLASSES, 12, "released"), "use 'exact'"),
        (lambda p: extend_labels(p, TASKS), "task_labels=4: start from"),
        (lambda p: extend_labels(p, CLASSES, 0), "task_labels=0: give"),
        (lambda p: split_patch_embed(p, CLASSES), "needs task_labels above 0"),
        (lambda p: split_patch_embed(p, dataclasses.replace(TASKS, routed=True)), "routed=True"),
        (lambda p: drop_variance(p, dataclasses.replace(CLASSES, learn_sigma=False)), "no variance to drop"),
        (lambda p: change_resolution(p, CLASSES, 100), "resolution 100 is not a multiple of 16"),
        (lambda p: add_context(p, CLASSES, 3, np.ones((4, 3))), r"needs \(1, 3\)"),
        (lambda p: upcycle(p, WANTED, 8, 2), "experts=4 already: upcycle a dense model"),
        (lambda p: upcycle(p, CLASSES, 0, 2), "experts=0: give"),
        (lambda p: upcycle(p, CLASSES, 2, 4), "active_experts=4: give 1 to experts=2"),
        (lambda p: upcycle(p, CLASSES, 4, 2, "renormalized"), "did you mean 'renormalised'"),
        (lambda p: upcycle(p, CLASSES, 4, 2, noise=-1.0), "upcycle.noise is -1.0"),
        (lambda p: upcycle(p, CLASSES, 4, 2, drop=1.5), "upcycle.drop is 1.5"),
    ],
)
def test_mistakes_are_told(start, operate, words):
    with pytest.raises(UserError, match=words):
        operate(start)
