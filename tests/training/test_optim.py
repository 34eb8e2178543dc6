import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from applying import fresh
from optax import contrib
from toys import config_of

from scaling_perception.models.dit import abstract_params
from scaling_perception.models.presets import get_preset
from scaling_perception.training.optim import decay_mask, make_optimizer, make_schedule, muon_axes
from scaling_perception.training.state import named_leaves


def optim(**fields):
    config = config_of().optim.copy_and_resolve_references()
    config.update({"schedule": "constant", "warmup": 0, "grad_clip": 0.0, **fields})
    return config


def test_exponential_schedule_is_marigolds():
    rate = make_schedule(optim(schedule="exponential", lr=3e-5, lr_final=3e-7, warmup=100), 30_000)
    for n, expected in [(0, 0.0), (50, 1.5e-5), (100, 3e-5), (30_000, 3e-7), (40_000, 3e-7)]:
        assert float(rate(n)) == pytest.approx(expected, rel=1e-5, abs=1e-12)
    for n in (1000, 17_345):
        expected = 3e-5 * math.exp(math.log(0.01) * (n - 100) / (30_000 - 100))
        assert float(rate(n)) == pytest.approx(expected, rel=1e-5)


def test_cosine_and_constant_schedules():
    cosine = make_schedule(optim(schedule="cosine", lr=1e-3, lr_final=1e-4, warmup=10), 110)
    assert float(cosine(5)) == pytest.approx(5e-4)
    assert float(cosine(60)) == pytest.approx(5.5e-4)
    assert float(cosine(35)) == pytest.approx(1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi / 4)), rel=1e-5)
    assert float(cosine(110)) == pytest.approx(1e-4, rel=1e-4)
    constant = make_schedule(optim(lr=1e-3, warmup=4), 100)
    assert [float(constant(n)) for n in (2, 4, 99)] == pytest.approx([5e-4, 1e-3, 1e-3])


def test_warm_up_takes_at_most_half_of_a_short_run():
    rate = make_schedule(optim(lr=1.0, warmup=100), 6)
    assert [float(rate(n)) for n in range(6)] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1])


def test_weight_decay_reaches_kernels_only():
    params = {"blocks": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))}, "label_embed": jnp.ones((4, 3))}
    tx, _ = make_optimizer(optim(lr=0.1, weight_decay=0.5), 10)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after["blocks"]["kernel"], 1 - 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(after["blocks"]["bias"], 1)
    np.testing.assert_array_equal(after["label_embed"], 1)


def test_decay_mask_of_the_network_names_every_kernel_and_nothing_else():
    params = abstract_params(get_preset("nano"))
    mask = named_leaves(decay_mask(params))
    assert {name for name, on in mask.items() if on} == {name for name in mask if name.endswith("kernel")}
    assert not mask["pos_embed"] and not mask["label_embed"] and mask["blocks/attn/qkv/kernel"]


def test_frozen_leaves_have_no_update_no_moments_and_no_part_in_clipping():
    params = {"a": {"kernel": jnp.ones((2, 2))}, "table": jnp.ones(5)}
    gradient = {"a": {"kernel": jnp.full((2, 2), 0.5)}, "table": jnp.full(5, 1e6)}
    tx, _ = make_optimizer(optim(name="adam", lr=0.1, grad_clip=1.0), 10, frozen=("table",))
    state = tx.init(params)
    assert not any(getattr(leaf, "shape", ()) == (5,) for leaf in jax.tree.leaves(state))
    updates, after = tx.update(gradient, state, params)
    np.testing.assert_array_equal(updates["table"], 0)
    moments = [leaf for leaf in jax.tree.leaves(after) if leaf.shape == (2, 2)]
    # norm 1 is just not clipped: the first moment is 0.1 x 0.5, which a table in the norm would have crushed
    np.testing.assert_allclose(moments[0], 0.05, rtol=1e-6)


def test_clipping_scales_to_the_norm():
    params = {"kernel": jnp.zeros((2, 2))}
    tx, _ = make_optimizer(optim(name="adam", grad_clip=1.0), 10)
    _, state = tx.update({"kernel": jnp.full((2, 2), 3.0)}, tx.init(params), params)
    first = next(leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2, 2))
    np.testing.assert_allclose(first, 0.1 * 0.5, rtol=1e-6)  # norm 6 becomes 1: each entry 0.5


def test_muon_treats_each_layer_of_a_stack_by_itself():
    rng = np.random.default_rng(0)
    stack = rng.normal(size=(3, 4, 6)).astype(np.float32)
    gradient = rng.normal(size=(3, 4, 6)).astype(np.float32) * np.array([1, 10, 100], np.float32)[:, None, None]
    tx, _ = make_optimizer(optim(name="muon", lr=0.02), 10)
    params = {"blocks": {"mlp": {"kernel": jnp.asarray(stack)}}}
    updates, _ = tx.update({"blocks": {"mlp": {"kernel": jnp.asarray(gradient)}}}, tx.init(params), params)
    own = contrib.muon(0.02, consistent_rms=0.2)
    update = jax.jit(own.update)
    for layer in range(3):
        one = {"kernel": jnp.asarray(stack[layer])}
        expected, _ = update({"kernel": jnp.asarray(gradient[layer])}, own.init(one), one)
        np.testing.assert_allclose(updates["blocks"]["mlp"]["kernel"][layer], expected["kernel"], rtol=1e-4, atol=1e-6)
        values = np.linalg.svd(np.asarray(updates["blocks"]["mlp"]["kernel"][layer]), compute_uv=False)
        assert values.max() / values.min() < 2.5  # close to orthogonal, although the gradient is not


def test_muon_treats_each_expert_by_itself_and_leaves_the_router_to_adamw():
    config = get_preset("nano", experts=3, context_dim=5)
    whole = fresh(config, jax.random.key(0))
    params = {"blocks": {"moe": whole["blocks"]["moe"]}, "context": whole["context"]}  # the others: the next test
    gradient = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    muon, _ = make_optimizer(optim(name="muon", lr=0.01), 10)
    adamw, _ = make_optimizer(optim(name="adamw", lr=0.01), 10)
    ours, theirs = (named_leaves(jax.jit(tx.update)(gradient, tx.init(params), params)[0]) for tx in (muon, adamw))
    for name in ("blocks/moe/router/kernel", "context/kernel", "blocks/moe/experts/fc1/bias"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6)
    name = "blocks/moe/experts/fc1/kernel"
    one = jax.tree.map(lambda leaf: leaf[1, 2], {"w": named_leaves(gradient)[name]})
    alone = contrib.muon(0.01, consistent_rms=0.2)
    expected = jax.jit(alone.update)(one, alone.init(one), one)[0]["w"]
    got = np.asarray(ours[name][1, 2])
    assert np.abs(got - np.asarray(theirs[name][1, 2])).max() > 1e-4
    cosine = np.sum(got * expected) / np.linalg.norm(got) / np.linalg.norm(expected)
    assert cosine > 0.999


def test_muon_leaves_the_ends_biases_and_tables_to_adamw():
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract_params(get_preset("nano")))
    axes = {name: value for name, value in _named_axes(params).items() if value is not None}
    assert set(axes) == {
        f"blocks/{name}/kernel" for name in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2", "modulation")
    }
    assert all(value == contrib.MuonDimensionNumbers(1, 2) for value in axes.values())
    config = optim(name="muon", lr=0.01)
    gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.3), params)
    muon, _ = make_optimizer(config, 10)
    adamw, _ = make_optimizer(optim(name="adamw", lr=0.01), 10)
    ours, theirs = (named_leaves(jax.jit(tx.update)(gradient, tx.init(params), params)[0]) for tx in (muon, adamw))
    for name in ours:
        same = np.allclose(ours[name], theirs[name], rtol=1e-5)
        assert same == (name not in axes), name


def _named_axes(params):
    leaf = lambda value: value is None or isinstance(value, contrib.MuonDimensionNumbers)  # noqa: E731
    flat = jax.tree_util.tree_flatten_with_path(muon_axes(params), is_leaf=leaf)[0]
    return {"/".join(part.key for part in path): value for path, value in flat}
