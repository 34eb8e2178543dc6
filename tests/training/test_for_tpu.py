"""Programs beside the step, compiled for TPUs without one. Slow: ``pytest -m slow tests/training/test_for_tpu.py``."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from scaling_perception.parallel.mesh import make_mesh
from scaling_perception.scaling.topologies import get_topology, prepare_environment
from scaling_perception.training import averaging, replicas

SHAPE = (28, 1152, 6912)  # XL/2's modulation, the largest leaf


@pytest.fixture(autouse=True)
def no_cache():
    """What was compiled for no device cannot be read back from the cache."""
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it is asked once whether there is one
    yield
    jax.config.update("jax_enable_compilation_cache", cached)
    compilation_cache.reset_cache()


def mesh_of(**sizes):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install 'scaling-perception[tpu]'")
    prepare_environment("v5e:2x2")
    return make_mesh(**sizes, devices=get_topology("v5e:2x2").devices)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_average_in_host_memory_takes_no_device_memory_and_no_exchange(dtype):
    mesh = mesh_of(data=1, fsdp=4)
    place = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    kept, whole = place.with_memory_kind(averaging.HOST), NamedSharding(mesh, PartitionSpec())
    apart, key = averaging.EmaConfig(0.9999, 10, dtype, True), jax.eval_shape(lambda: jax.random.key(0))
    given = ((SHAPE, dtype, kept), (SHAPE, jnp.float32, place), (key.shape, key.dtype, whole))
    arrays = [jax.ShapeDtypeStruct(shape, kind, sharding=where) for shape, kind, where in given]
    compiled = averaging.leaf_program(apart, kept, 0.999).lower(*arrays).compile()
    memory, own = compiled.memory_analysis(), math.prod(SHAPE) // 4 * jnp.dtype(dtype).itemsize
    assert memory.host_argument_size_in_bytes == memory.host_output_size_in_bytes == own
    assert memory.output_size_in_bytes == 0
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "collective-permute"))


@pytest.mark.slow
def test_comparing_copies_reads_each_number_once_and_sends_sums_alone():
    mesh = mesh_of(data=4)
    leaf = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    compiled = replicas._adder(mesh, (PartitionSpec(),)).lower(leaf).compile()
    cost, count = compiled.cost_analysis(), math.prod(SHAPE)
    assert cost["bytes accessed"] < 4.1 * count and cost["flops"] < 50 * count
    assert compiled.memory_analysis().temp_size_in_bytes < 10**6
    exchanges = [line for line in compiled.as_text().splitlines() if " all-" in line]
    assert exchanges and all("= u32[" in line and "f32[" not in line for line in exchanges)
