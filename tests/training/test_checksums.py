"""The checksum of a leaf: its definition again in numpy, on any mesh the same, and blind to nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from scaling_perception.parallel.mesh import make_mesh
from scaling_perception.training.checksums import describe_leaves

M32 = 2**32 - 1


def plain_mix(x):
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & M32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & M32
    return x ^ (x >> 16)


def plain_sum(array):
    """The checksum with Python's integers, one number at a time."""
    array = np.asarray(array)
    size = min(array.dtype.itemsize, 4)
    words = np.frombuffer(array.tobytes(), {1: np.uint8, 2: np.uint16, 4: np.uint32}[size])
    told = ""
    for a, b in ((0x9E3779B1, 0x85EBCA77), (0xC2B2AE3D, 0x27D4EB2F)):
        total = sum(plain_mix(int(word) ^ plain_mix((place * a + b) & M32)) for place, word in enumerate(words))
        told += f"{total & M32:08x}"
    return told


def code(leaf):
    return describe_leaves({"leaf": leaf})["leaf"][2]


RNG = np.random.default_rng(0)
LEAVES = {
    "f32": RNG.normal(size=(4, 6)).astype(np.float32),
    "f16": RNG.normal(size=(3, 1, 5)).astype(np.float16),
    "bf16": np.asarray(jnp.asarray(RNG.normal(size=(7,)), jnp.bfloat16)),
    "f8": np.asarray(jnp.asarray(RNG.normal(size=(9,)), jnp.float8_e4m3fn)),
    "f64": RNG.normal(size=(2, 3)),
    "i64": RNG.integers(-(2**62), 2**62, (5,)),
    "i64_scalar": np.int64(-3),
    "i32": RNG.integers(-9, 9, (2, 2, 2)).astype(np.int32),
    "i8": RNG.integers(-128, 127, (11,)).astype(np.int8),
    "bool": RNG.random(13) > 0.5,
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.float32(np.nan),
    "odd": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
}


def test_the_sums_are_what_they_are_said_to_be():
    rows = describe_leaves(LEAVES)
    assert list(rows) == sorted(LEAVES)
    for name, leaf in LEAVES.items():
        assert rows[name] == [str(leaf.dtype), list(leaf.shape), plain_sum(leaf)], name
    assert rows["empty"][2] == "0" * 16 and describe_leaves({}) == {}


def test_arrays_on_devices_and_numpy_have_one_checksum():
    narrow = {name: leaf for name, leaf in LEAVES.items() if leaf.dtype.itemsize < 8}
    assert describe_leaves(jax.device_put(narrow)) == describe_leaves(narrow)
    with jax.enable_x64(True):
        assert describe_leaves({"f64": jnp.asarray(LEAVES["f64"])})["f64"][2] == plain_sum(LEAVES["f64"])


def test_the_same_on_every_mesh():
    leaf, low = RNG.normal(size=(8, 16, 4)).astype(np.float32), np.asarray(jnp.arange(64, dtype=jnp.bfloat16))
    expected = describe_leaves({"leaf": leaf, "low": low})
    places = [({}, P()), ({"data": 1, "fsdp": 8}, P("fsdp")), ({"data": 1, "fsdp": 8}, P(None, "fsdp"))]
    places += [
        ({"data": 1, "fsdp": 2, "expert": 4}, P("expert", "fsdp")),
        ({"fsdp": 2, "tensor": 2}, P("tensor", "fsdp")),
    ]
    places += [({"fsdp": 2, "tensor": 2}, P(("fsdp", "tensor")))]
    for sizes, spec in places:
        mesh = make_mesh(**sizes)
        tree = {
            "leaf": jax.device_put(leaf, NamedSharding(mesh, spec)),
            "low": jax.device_put(low, NamedSharding(mesh, P())),
        }
        assert describe_leaves(tree) == expected, (sizes, spec)
    alone = SingleDeviceSharding(jax.devices()[5])
    assert describe_leaves(jax.device_put({"leaf": leaf, "low": low}, alone)) == expected


def test_leaves_in_host_memory_beside_leaves_on_devices():
    mesh = make_mesh(data=1, fsdp=8)
    place = NamedSharding(mesh, P("fsdp"))
    on_device = jax.device_put({"a": np.arange(16.0, dtype=np.float32), "b": np.arange(8, dtype=np.int32)}, place)
    mixed = {**on_device, "a": jax.device_put(on_device["a"], place.with_memory_kind("pinned_host"))}
    assert mixed["a"].sharding.memory_kind == "pinned_host"
    assert describe_leaves(mixed) == describe_leaves(on_device)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float64"])
def test_every_flipped_bit_shows(dtype):
    leaf = np.asarray(jnp.asarray(RNG.normal(size=6) * 50, jnp.dtype(dtype) if dtype != "float64" else None))
    leaf = leaf.astype(np.float64) if dtype == "float64" else leaf
    seen = {code(leaf)}
    for byte in range(leaf.nbytes):
        for bit in range(8):
            other = bytearray(leaf.tobytes())
            other[byte] ^= 1 << bit
            seen.add(code(np.frombuffer(bytes(other), leaf.dtype)))
    assert len(seen) == 1 + 8 * leaf.nbytes


def test_what_moved_shows():
    leaf = RNG.normal(size=(4, 5)).astype(np.float32)
    flat = leaf.reshape(-1)
    seen = {code(leaf), code(leaf[::-1]), code(leaf[:, ::-1])}
    for i in range(flat.size):
        for j in range(i):
            other = flat.copy()
            other[[i, j]] = other[[j, i]]
            seen.add(code(other.reshape(leaf.shape)))
    assert len(seen) == 3 + flat.size * (flat.size - 1) // 2
    assert code(np.zeros(7, np.float32)) != code(np.zeros(8, np.float32))  # zeros that are missing


@pytest.mark.parametrize(
    "leaf",
    [jax.random.key(0), np.complex64(1j), jnp.zeros(2, jnp.int4), np.array(["x"])],
    ids=["key", "complex", "int4", "text"],
)
def test_other_kinds_of_leaf_are_refused_by_name(leaf):
    with pytest.raises(TypeError, match=r"^table/leaf is .*: checksums are for real numbers of whole bytes"):
        describe_leaves({"table": {"leaf": leaf}})
