"""Copies of one array on several devices must be bit for bit the same; hardware that errs makes them differ silently.

A device that computed one wrong number goes on with weights of its own: the loss of the whole looks healthy for long,
and what is saved is one device's opinion. So now and then every device adds up the bits of what it holds
(``checksums.py``), the sums (8 bytes for each leaf and device) are gathered, and those of equal parts are compared.

Cost: the state is read once, and each number takes some forty integer operations; nothing but the sums travels, and
the host looks at them a step later. Leaves that no two devices share, as under full fsdp, are left out. An average in
host memory comes to the devices for it, leaf by leaf, and the host waits.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scaling_perception.training.checksums import is_off_device, on_device, word_sums
from scaling_perception.training.state import named_leaves


class Table(NamedTuple):
    """Sums that are on their way: ``parts`` of (devices, leaves, 2) uint32, whole on every device.

    ``parts``: (names of the leaves, for each leaf which devices hold the same part, the sums).
    """

    mesh: Mesh | None
    parts: list[tuple[list[str], list[list[list[int]]], jax.Array]]


def replica_sums(tree: Any) -> Table:
    """Start to add up every leaf of ``tree`` that several devices hold the same part of. Does not wait.

    Args:
        tree: arrays of one mesh (NamedSharding); leaves of another kind or with no copies are left out. Where several
            processes run, all must call this alike.
    """
    found: dict[str, tuple[jax.Array, list[list[int]]]] = {}
    mesh = None
    for name, leaf in named_leaves(tree).items():
        if isinstance(getattr(leaf, "sharding", None), NamedSharding):
            copies = _copies(leaf)
            if copies:
                found[name], mesh = (leaf, copies), leaf.sharding.mesh
    if mesh is None:
        return Table(None, [])
    together = {name: pair for name, pair in found.items() if not is_off_device(pair[0])}
    alone = [{name: pair} for name, pair in found.items() if name not in together]  # one at a time on the device
    parts = []
    for group in [together, *alone]:
        if group:
            leaves = [on_device(leaf) if is_off_device(leaf) else leaf for leaf, _ in group.values()]
            specs = tuple(leaf.sharding.spec for leaf in leaves)  # type: ignore[attr-defined]
            sums = _adder(mesh, specs)(*leaves)
            if group is not together:
                sums.block_until_ready()  # or room for all of them would be taken at once
            parts.append(([*group], [copies for _, copies in group.values()], sums))
    return Table(mesh, parts)


def differing(table: Table) -> str:
    """What differs, in words: the first such leaf and the devices that hold something else; "" if nothing does."""
    for names, shared, sums in table.parts:
        values = np.asarray(sums)
        for at, (name, groups) in enumerate(zip(names, shared, strict=True)):
            for group in groups:
                found = {place: tuple(values[place, at].tolist()) for place in group}
                if len(set(found.values())) > 1:
                    return _difference_text(name, found, table.mesh)
    return ""


def _difference_text(name: str, found: dict[int, tuple[int, ...]], mesh: Any) -> str:
    counts = Counter(found.values()).most_common()
    devices = mesh.devices.flat

    def listed(places: list[int]) -> str:
        words = [f"{devices[place].id} (process {devices[place].process_index})" for place in places]
        return ", ".join(words[:8]) + (f" and {len(words) - 8} more" if len(words) > 8 else "")

    usual = counts[0][0]
    odd = [place for place, value in found.items() if value != usual]
    rest = [place for place, value in found.items() if value == usual]
    return f"{name} differs between device {listed(odd)} and device {listed(rest)}"


def _copies(leaf: jax.Array) -> list[list[int]]:
    """Places in the mesh (as ``mesh.devices.flat``) that hold the same part of ``leaf``, where there are several."""
    where = leaf.sharding.devices_indices_map(leaf.shape)
    groups: dict[str, list[int]] = {}
    for place, device in enumerate(leaf.sharding.mesh.devices.flat):  # type: ignore[attr-defined]
        groups.setdefault(str(where[device]), []).append(place)
    return [group for group in groups.values() if len(group) > 1]


@functools.cache
def _adder(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Callable[..., jax.Array]:
    """Leaves -> (devices, leaves, 2) uint32. Each device adds up its own part, whatever the others hold."""

    def own(*parts: jax.Array) -> jax.Array:
        sums = jnp.stack([word_sums(part) for part in parts])
        return jax.lax.all_gather(sums, mesh.axis_names)

    # check_vma would hold that copies are equal, which is the question
    return jax.jit(jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False))
