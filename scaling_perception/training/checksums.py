"""A checksum of every leaf that does not depend on how the leaf is spread: over devices, processes or meshes.

Each number's bits are mixed with its index by a bijection (two rounds of a multiply-xorshift mixer), and the results
are added up modulo 2^32, twice with different constants. Sums do not care about order, so that every device adds up
what it has, and the total is the same on any mesh. A changed, moved or missing number changes it (one changed number
surely, the rest with odds of 2^64 to 1). It guards against damage, not against malice.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scaling_perception.training.state import named_leaves

_CONSTANTS = ((0x9E3779B1, 0x85EBCA77), (0xC2B2AE3D, 0x27D4EB2F))
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def describe_leaves(tree: Any) -> dict[str, list[Any]]:
    """Leaf name -> [dtype, shape, checksum as 16 hexadecimal digits], the same in every process and on every mesh.

    Args:
        tree: arrays of numbers of 1, 2, 4 or 8 bytes, on devices, in their host memory, or numpy.

    Raises:
        TypeError: a leaf is of another dtype, such as a random key, complex numbers or half bytes.
    """
    leaves = named_leaves(tree)
    together, alone = {}, {}
    for name, leaf in leaves.items():
        _refuse_odd(name, leaf)
        (alone if isinstance(leaf, jax.Array) and is_off_device(leaf) else together)[name] = leaf
    meshes = [
        leaf.sharding.mesh for leaf in leaves.values() if isinstance(getattr(leaf, "sharding", None), NamedSharding)
    ]
    add_up = _adder(meshes[0] if meshes else None)
    sums = dict(zip(together, np.asarray(add_up([_as_words(leaf) for leaf in together.values()])), strict=True))
    for name, leaf in alone.items():  # one by one, so that no device ever holds more than one of them
        sums[name] = np.asarray(add_up([on_device(leaf)]))[0]
    return {
        name: [str(leaf.dtype), list(leaf.shape), "".join(f"{int(word):08x}" for word in sums[name])]
        for name, leaf in leaves.items()
    }


@functools.cache
def _adder(mesh: Mesh | None) -> Callable[[list[Any]], jax.Array]:
    """Arrays -> (their number, 2) uint32, whole on every device, so that every process can read it."""
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    nothing = jnp.zeros((0, 2), jnp.uint32)
    return jax.jit(
        lambda leaves: jnp.stack([word_sums(leaf) for leaf in leaves]) if leaves else nothing, out_shardings=whole
    )


def word_sums(leaf: jax.Array) -> jax.Array:
    """The two sums of a leaf's bits, (2,) uint32; pure."""
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    if leaf.dtype.itemsize == 8:  # as two words, the lower one first
        leaf = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(leaf, _WORDS[leaf.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):  # a mixed-radix number, modulo 2^32
        place = place * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    totals = [
        jnp.sum(_mix(bits ^ _mix(place * jnp.uint32(a) + jnp.uint32(b))), dtype=jnp.uint32) for a, b in _CONSTANTS
    ]
    return jnp.stack(totals)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _refuse_odd(name: str, leaf: Any) -> None:
    bits = 8 if leaf.dtype == jnp.bool_ else 0
    for kind, info in ((jnp.integer, jnp.iinfo), (jnp.floating, jnp.finfo)):
        if jnp.issubdtype(leaf.dtype, kind):
            bits = info(leaf.dtype).bits
    if bits not in (8, 16, 32, 64):
        what = "checksums are for real numbers of whole bytes; instead of a random key, save jax.random.key_data of it"
        raise TypeError(f"{name} is {leaf.dtype}: {what}")


def _as_words(leaf: Any) -> Any:
    """numpy's 8-byte numbers as two words, since JAX would make them 4-byte numbers."""
    if isinstance(leaf, jax.Array) or leaf.dtype.itemsize < 8:
        return leaf
    return np.ascontiguousarray(leaf).reshape(-1).view(np.uint32).reshape((*leaf.shape, 2))


def is_off_device(leaf: jax.Array) -> bool:
    """Whether the leaf lies in host memory that belongs to its devices."""
    kind = leaf.sharding.memory_kind
    return kind is not None and kind != next(iter(leaf.sharding.device_set)).default_memory().kind


def on_device(leaf: jax.Array) -> jax.Array:
    """A copy in the devices' own memory."""
    kind = next(iter(leaf.sharding.device_set)).default_memory().kind
    return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))
