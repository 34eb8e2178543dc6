"""Sharding rules: they cover every parameter, split what is large, and do not change the gradient."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from scaling_perception.models.dit import DiT, abstract_params
from scaling_perception.models.presets import get_preset
from scaling_perception.parallel.mesh import batch_sharding, make_mesh
from scaling_perception.parallel.rules import DIT_RULES, gathered, gathered_place, spec_for, tree_shardings


def test_each_rule_is_the_first_match_of_some_parameter():
    presets = ("XL/2", "XL-8E2A", "S/2-8E2A")  # dense, GELU experts, SwiGLU experts and a shared one
    known = [abstract_params(get_preset(name, context_dim=8)) for name in presets]
    trees = [jax.tree_util.tree_flatten_with_path(tree)[0] for tree in known]
    names = ["/".join(str(part.key) for part in path) for leaves in trees for path, _ in leaves]
    first = {next(pattern for pattern, _ in DIT_RULES if re.fullmatch(pattern, name)) for name in names}
    assert first == {pattern for pattern, _ in DIT_RULES}
    assert spec_for("blocks/mlp/fc1/kernel") == PartitionSpec(None, "fsdp", "tensor")
    assert spec_for("ema/blocks/mlp/fc1/kernel") == PartitionSpec(None, "fsdp", "tensor")
    assert spec_for("opt_state/0/mu/blocks/attn/proj/kernel") == PartitionSpec(None, "tensor", "fsdp")
    assert spec_for("blocks/moe/experts/fc2/kernel") == PartitionSpec(None, "expert", "tensor", "fsdp")
    assert spec_for("blocks/modulation/kernel") == PartitionSpec(None, None, ("fsdp", "tensor"))
    assert spec_for("step") == spec_for("pos_embed") == PartitionSpec()
    with pytest.raises(ValueError, match="no sharding rule"):
        spec_for("step", DIT_RULES[:-1])
    for name in ("blocks/mixer/kernel", "ema/head/kernel", "opt_state/0/mu/blocks/attn/gate/kernel", "kernel"):
        with pytest.raises(ValueError, match=f"no sharding rule for {name}: add one"):
            spec_for(name)


@pytest.mark.parametrize("fsdp, tensor", [(8, 1), (1, 8), (4, 2)])
def test_large_models_are_spread_over_the_devices(fsdp, tensor):
    params = abstract_params(get_preset("XL/2"))
    shardings = tree_shardings(params, make_mesh(fsdp=fsdp, tensor=tensor))
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True)
    each = sum(math.prod(sharding.shard_shape(leaf.shape)) for leaf, sharding in pairs)
    assert each < 1.1 * 675129632 / 8


def test_dimension_that_does_not_divide_stays_whole():
    mesh = make_mesh(data=1, fsdp=8)
    name = "time_embed/fc1/kernel"
    shapes = {name: jax.ShapeDtypeStruct((5, 12), jnp.float32), "x": jax.ShapeDtypeStruct((), jnp.int32)}
    specs = {leaf: sharding.spec for leaf, sharding in tree_shardings(shapes, mesh).items()}
    assert specs == {name: PartitionSpec(None, None), "x": PartitionSpec()}
    factored = {name: jax.ShapeDtypeStruct((16,), jnp.float32)}  # an optimiser's row statistic
    assert tree_shardings(factored, mesh)[name].spec == PartitionSpec()


def test_what_is_gathered_once_a_step():
    """Large kernels in the dtype that layers round them to, the rest as it is; not what is never gathered."""
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    params = abstract_params(get_preset("XL-8E2A"))["blocks"] | {
        "mlp": abstract_params(get_preset("XL/2"))["blocks"]["mlp"]
    }
    flat = jax.tree_util.tree_flatten_with_path({"blocks": params})[0]
    found = {}
    for path, leaf in flat:
        name = "/".join(part.key for part in path)
        place = tree_shardings({name: leaf}, mesh)[name]
        there, kind = gathered_place(name, place, jnp.bfloat16, False)
        found[name.removeprefix("blocks/")] = (None if there is None else there.spec, kind)
    assert found["attn/qkv/kernel"] == (PartitionSpec(None, None, "tensor"), jnp.bfloat16)
    assert found["mlp/fc2/kernel"] == (PartitionSpec(None, "tensor", None), jnp.bfloat16)
    assert found["moe/experts/fc1/kernel"] == (PartitionSpec(None, "expert", None, "tensor"), jnp.bfloat16)
    for name in ("modulation/kernel", "moe/experts/fc1/bias", "moe/router/kernel", "mlp/fc1/bias"):
        assert found[name] == (None, None)
    name = "blocks/modulation/kernel"
    place = tree_shardings({name: params["modulation"]["kernel"]}, mesh)[name]
    assert gathered_place(name, place, jnp.bfloat16, True)[0].spec == PartitionSpec(None, None, ("tensor",))


def test_gathered_weights_are_those_of_the_layers():
    mesh = make_mesh(data=2, fsdp=4)
    name, values = "kernel", np.random.default_rng(0).standard_normal((2, 16, 8), np.float32)
    tree = {"blocks": {"mlp": {"fc1": {name: values}}}, "final": {"linear": {name: values[0]}}}
    places = tree_shardings(tree, mesh)
    placed = jax.device_put(tree, places)
    found = jax.jit(lambda tree: gathered(tree, places, jnp.bfloat16))(placed)
    wide, last = found["blocks"]["mlp"]["fc1"][name], found["final"]["linear"][name]
    assert wide.sharding.is_fully_replicated and last.sharding.is_fully_replicated
    assert not placed["blocks"]["mlp"]["fc1"][name].sharding.is_fully_replicated
    np.testing.assert_array_equal(wide, values.astype(jnp.bfloat16))
    np.testing.assert_array_equal(last, values[0])


def test_split_over_three_axes_gives_the_gradient_of_one_device():
    config = get_preset("nano")
    rng = np.random.default_rng(0)  # drawn here, for at the start of training adaLN-Zero makes most gradients vanish
    params = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), abstract_params(config))
    x = rng.standard_normal((8, 16, 16, 12), np.float32)
    t, label = np.arange(8) * 100, np.arange(8) % 4

    @jax.jit
    @jax.value_and_grad
    def loss(params, x, t, label):
        return jnp.mean(jnp.square(DiT(config).apply({"params": params}, x, t, label) - x[..., 8:]))

    expected_value, expected = loss(params, x, t, label)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params, tree_shardings(params, mesh))
    assert placed["blocks"]["mlp"]["fc1"]["kernel"].sharding.shard_shape((2, 32, 128)) == (2, 16, 64)
    batch = [jax.device_put(array, batch_sharding(mesh)) for array in (x, t, label)]
    value, gradient = loss(placed, *batch)
    assert value == pytest.approx(float(expected_value), rel=1e-6)
    for mine, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-6, rtol=1e-4)
