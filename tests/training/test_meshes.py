"""The same numbers on every mesh: losses, weights; the same update from a batch in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import LatentBatches, config_of

from scaling_perception.models.dit import abstract_params
from scaling_perception.models.presets import get_preset, preset_names
from scaling_perception.parallel.mesh import batch_sharding, make_mesh, replicated
from scaling_perception.parallel.processes import put_batch, put_tree, to_host
from scaling_perception.parallel.rules import DIT_RULES, spec_for, tree_shardings
from scaling_perception.training.checkpoints import Checkpoints
from scaling_perception.training.diffusion import diffusion_objective
from scaling_perception.training.optim import make_optimizer
from scaling_perception.training.state import abstract_state, named_leaves, new_state
from scaling_perception.training.step import make_step

STEPS = 50


class Longer(LatentBatches):
    """Batches of 16 latents."""

    def at(self, step):
        one, two = super().at(2 * step), super().at(2 * step + 1)
        return {
            name: one[name] + two[name] if name == "key" else np.concatenate([one[name], two[name]]) for name in one
        }


def run(sizes, steps=STEPS, accumulate=1, start=0, checkpoints=None, gather=None, **changes):
    """Losses and final state of a short run on a mesh of ``sizes``: steps ``start`` to ``steps``.

    With a ``start`` it goes on from the newest of ``checkpoints``; one is left there at its end.
    """
    overrides = [f"{name}={value}" for name, value in changes.items()]
    config = config_of("train.steps=50", "optim.schedule=constant", "optim.grad_clip=1.0", *overrides)
    count = int(np.prod(list(sizes.values()))) if sizes else 1
    mesh = make_mesh(**{"data": 1, **sizes}, devices=jax.devices()[:count])
    batches = Longer()
    objective = diffusion_objective(config, batches, mesh)
    tx, _ = make_optimizer(config.optim, 50, objective.frozen)
    shapes = abstract_state(objective.init, tx)
    places = tree_shardings(shapes, mesh)
    key = jax.device_put(jax.random.key(7), replicated(mesh))
    state = jax.jit(lambda k: new_state(objective.init(k), tx), out_shardings=places)(key)
    if start:
        abstract = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
        )
        state = checkpoints.restore(abstract, lambda identity: None, pytest.fail)
        assert int(state.step) == start
    step = make_step(objective, tx, 0.9, accumulate, shardings=places, gather=gather)
    step = jax.jit(step, donate_argnums=0, out_shardings=(places, replicated(mesh)))
    losses = []
    for number in range(start, steps):
        fields = {name: value for name, value in batches.at(number).items() if name != "key"}
        state, metrics = step(state, put_batch(fields, batch_sharding(mesh)), key)
        losses.append(metrics["loss"])
    if checkpoints is not None:
        checkpoints.save(state, {}, wait=True)
    return np.asarray(jax.device_get(losses)), state, mesh


DENSE, EXPERTS = {"model_changes.dim": 32}, {"model_changes.dim": 32, "model_changes.experts": 4}
_known = {}


def alone(steps, **changes):
    """What one device gives: losses and weights, computed once for each set of changes."""
    key = (steps, *sorted(changes.items()))
    if key not in _known:
        losses, state, _ = run({}, steps, **changes)
        _known[key] = losses, named_leaves(jax.device_get(state.params))
    return _known[key]


def held(sizes, changes, steps):
    losses, params = alone(steps, **changes)
    found, state, mesh = run(sizes, steps, **changes)
    print(f"largest relative difference of {steps} losses: {np.abs(found / losses - 1).max():.1e}")
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    for name, leaf in named_leaves(to_host(state.params, mesh)).items():
        np.testing.assert_allclose(leaf, params[name], atol=2e-4, err_msg=name)
    for name, leaf in named_leaves(state).items():  # weights, moments and average are really split
        if name.endswith("blocks/attn/qkv/kernel") and "fsdp" in sizes:
            assert leaf.addressable_shards[0].data.size < leaf.size and "fsdp" in str(leaf.sharding.spec), name
        if "experts/fc1/kernel" in name and "expert" in sizes:
            assert "expert" in str(leaf.sharding.spec), name


MESHES = [{"data": 8}, {"fsdp": 8}, {"fsdp": 2, "expert": 4}, {"tensor": 2, "fsdp": 4}]
COMBINATIONS = [(sizes, changes) for sizes in MESHES for changes in (DENSE, EXPERTS)]


def name_of(value):
    return " ".join(f"{key.rsplit('.')[-1]}{number}" for key, number in value.items())


@pytest.mark.parametrize(("sizes", "changes"), [COMBINATIONS[5]], ids=name_of)  # the rest: with -m slow
def test_losses_are_those_of_one_device(sizes, changes):
    held(sizes, changes, 12)


@pytest.mark.parametrize(
    ("sizes", "changes", "accumulate"),
    [
        ({"fsdp": 2}, DENSE, 1),
        pytest.param({"fsdp": 2}, DENSE, 2, marks=pytest.mark.slow),
        pytest.param({"fsdp": 2, "expert": 2}, EXPERTS, 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_weights_gathered_once_a_step_give_the_same_losses(sizes, changes, accumulate):
    losses, params = alone(6, **changes)
    found, state, mesh = run(sizes, 6, accumulate, gather=jnp.float32, **changes)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    for name, leaf in named_leaves(to_host(state.params, mesh)).items():
        np.testing.assert_allclose(leaf, params[name], atol=2e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "changes", "accumulate"),
    [
        ({"data": 2, "fsdp": 4}, DENSE, 1),
        ({"data": 2, "fsdp": 4}, DENSE, 2),
        ({"data": 2, "fsdp": 2, "expert": 2}, EXPERTS, 1),
    ],
    ids=str,
)
def test_weights_gathered_in_bfloat16_are_those_that_bfloat16_layers_use(sizes, changes, accumulate):
    losses, _ = alone(12, **changes)
    half = {**changes, "train.dtype": "bfloat16"}
    layer, step = (run(sizes, 12, accumulate, gather=gather, **half)[0] for gather in (None, jnp.bfloat16))
    off, between = np.abs(layer / losses - 1).max(), np.abs(step / layer - 1).max()
    print(f"bfloat16 to float32 {off:.1e}, gathered once to by layer {between:.1e}")
    assert between <= off and np.all(np.isfinite(step))


@pytest.mark.slow
def test_gradients_summed_in_bfloat16_hardly_change_the_loss():
    """As a TPU sums those of bfloat16 products: eight devices in a ring, each sum rounded. A CPU sums in float32."""
    config = config_of("train.steps=50", "optim.schedule=constant", "model_changes.dim=32")
    objective = diffusion_objective(config, Longer(), None)
    tx, _ = make_optimizer(config.optim, 50, objective.frozen)

    def train(dtype):
        def step(state, fields, key):
            def own(part, index):
                given = {**part, "index": index}
                return jax.value_and_grad(lambda params: objective.loss(params, given, key)[0])(state.params)

            parts = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), (dict(fields), jnp.arange(16)))
            losses, gradients = jax.vmap(own)(*parts)
            gradients = jax.tree.map(lambda x: x.astype(dtype), gradients)
            total, _ = jax.lax.scan(
                lambda so_far, part: (jax.tree.map(jnp.add, so_far, part), None),
                jax.tree.map(lambda x: x[0], gradients),
                jax.tree.map(lambda x: x[1:], gradients),
            )
            gradient = jax.tree.map(lambda x: x.astype(jnp.float32) / 8, total)
            updates, opt_state = tx.update(gradient, state.opt_state, state.params)
            return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state), losses.mean()

        state, step, losses = new_state(jax.jit(objective.init)(jax.random.key(0)), tx), jax.jit(step), []
        for number in range(STEPS):
            fields = {name: value for name, value in Longer().at(number).items() if name != "key"}
            state, loss = step(state, fields, jax.random.fold_in(jax.random.key(7), number))
            losses.append(float(loss))
        return np.asarray(losses)

    full, half = train(jnp.float32), train(jnp.bfloat16)
    off = np.abs(half / full - 1).max()
    print(f"losses of {STEPS} steps: {full[0]:.3f} to {full[-1]:.3f}, largest difference {off:.1e}")
    assert 0 < off < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "changes"), COMBINATIONS, ids=name_of)
def test_fifty_losses_are_those_of_one_device(sizes, changes):
    """``pytest -m slow tests/training/test_meshes.py -s`` (four minutes)."""
    held(sizes, changes, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [DENSE, EXPERTS], ids=name_of)
def test_from_mesh_to_mesh_the_curve_is_that_of_one_device(tmp_path, changes):
    """Every ten steps the state is saved, and restored on the next mesh."""
    losses, params = alone(STEPS, **changes)
    checkpoints, found = Checkpoints(tmp_path / "checkpoints", keep=2), []
    for number, sizes in enumerate([MESHES[0], MESHES[3], {}, MESHES[2], MESHES[1]]):
        part, state, mesh = run(sizes, 10 * (number + 1), start=10 * number, checkpoints=checkpoints, **changes)
        found.extend(part)
    checkpoints.close()
    print(f"largest relative difference of {STEPS} losses: {np.abs(found / losses - 1).max():.1e}")
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    for name, leaf in named_leaves(to_host(state.params, mesh)).items():
        np.testing.assert_allclose(leaf, params[name], atol=2e-4, err_msg=name)


@pytest.mark.slow  # test_accumulation.py compares losses and gradients of parts unasked
@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        ({}, DENSE),
        ({"data": 4}, DENSE),
        ({"data": 2, "fsdp": 2}, DENSE),
        ({"fsdp": 2, "tensor": 2}, DENSE),
        ({"data": 2, "fsdp": 2}, EXPERTS),
    ],
    ids=name_of,
)
def test_a_batch_in_parts_gives_the_update_of_the_whole(sizes, changes):
    if changes is EXPERTS:
        changes = {**changes, "balance_loss": 0.0}  # a product of means over the batch: the one thing that differs
    losses, params = alone(6, **changes)
    found, state, mesh = run(sizes, 6, accumulate=4, **changes)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    for name, leaf in named_leaves(to_host(state.params, mesh)).items():
        np.testing.assert_allclose(leaf, params[name], atol=2e-4, err_msg=name)


def test_a_step_that_is_not_finite_changes_nothing_when_skipped():
    config = config_of()
    batches = LatentBatches()
    objective = diffusion_objective(config, batches)
    tx, _ = make_optimizer(config.optim, 12, objective.frozen)
    state = new_state(jax.jit(objective.init)(jax.random.key(0)), tx)
    step = jax.jit(make_step(objective, tx, 0.9, skip=True))
    good = {name: value for name, value in batches.at(0).items() if name != "key"}
    state, metrics = step(state, good, jax.random.key(1))
    assert metrics["skipped"] == 0
    bad = {**good, "image": np.full_like(good["image"], np.nan)}
    after, metrics = step(state, bad, jax.random.key(1))
    assert metrics["skipped"] == 1 and int(after.step) == int(state.step) + 1
    for name, leaf in named_leaves(after).items():
        if name != "step":
            np.testing.assert_array_equal(leaf, named_leaves(state)[name], err_msg=name)


@pytest.mark.parametrize("name", preset_names())
def test_every_leaf_of_every_preset_is_matched_by_one_rule(name):
    import re

    for leaf, shape in named_leaves(abstract_params(get_preset(name, context_dim=8))).items():
        found = [pattern for pattern, _ in DIT_RULES[:-1] if re.search(rf"(^|/)({pattern})$", leaf)]
        assert len(found) <= 1, (leaf, found)
        large = int(np.prod(shape.shape)) > 2 * 10**5 and "pos_embed" not in leaf
        whole = any(name in leaf for name in ("patch_embed", "router", "bias", "label_embed"))  # on purpose
        assert found or not large or whole, f"{leaf} stays whole"
        assert len(spec_for(leaf)) <= len(shape.shape)


def test_trees_travel_to_a_mesh_and_back():
    mesh = make_mesh(fsdp=4, tensor=2, data=1)
    tree = {"blocks": {"mlp": {"fc1": {"kernel": np.arange(2 * 8 * 16, dtype=np.float32).reshape(2, 8, 16)}}}}
    placed = put_tree(tree, tree_shardings(tree, mesh))
    leaf = placed["blocks"]["mlp"]["fc1"]["kernel"]
    assert leaf.addressable_shards[0].data.shape == (2, 2, 8)
    np.testing.assert_array_equal(to_host(placed, mesh)["blocks"]["mlp"]["fc1"]["kernel"], leaf)
    assert jnp.shape(leaf) == (2, 8, 16)
