"""The mesh: four Auto axes over however many devices there are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from scaling_perception.parallel.mesh import AXES, batch_sharding, make_mesh, replicated, split_batch
from scaling_perception.support.errors import UserError


def test_data_takes_the_devices_that_are_left():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "expert": 1, "tensor": 1}
    mesh = make_mesh(fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    assert mesh.axis_names == AXES and set(mesh.axis_types) == {AxisType.Auto}
    assert set(mesh.devices.flat) == set(jax.devices())


def test_some_devices_only():
    mesh = make_mesh(data=2, fsdp=-1, devices=jax.devices()[:4])
    assert dict(mesh.shape)["fsdp"] == 2 and set(mesh.devices.flat) == set(jax.devices()[:4])
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("sizes", [{"data": 3}, {"fsdp": 3}, {"data": -1, "fsdp": -1}, {"tensor": 0}, {"data": -2}])
def test_sizes_that_fit_no_machine(sizes):
    with pytest.raises(UserError, match="mesh"):
        make_mesh(**sizes)


def test_batch_is_split_over_data_fsdp_and_expert():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp", "expert"))
    assert batch_sharding(mesh).shard_shape((8, 16, 16, 4)) == (2, 16, 16, 4)
    assert replicated(mesh).shard_shape((8, 3)) == (8, 3)


def test_a_batch_is_kept_split_where_the_weights_are_split_too():
    mesh = make_mesh(data=1, fsdp=8)
    weights = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=batch_sharding(mesh))

    def apply(x, w):
        return split_batch(jnp.tanh(split_batch(x, mesh) @ w), mesh)

    text = jax.jit(apply, out_shardings=replicated(mesh)).lower(x, weights).compile().as_text()
    assert "f32[2,64]" in text and "f32[16,8]" not in text  # two rows a device, not an eighth of the columns
    assert split_batch(x, None) is x and split_batch(np.zeros((3, 4)), mesh).shape == (3, 4)
