"""Several processes as one program: which rows of a batch each reads, bringing results back to where they are written.

A run has one process for each host. Every process runs the same code on its own share of the data; only the first one
writes files and talks, and checkpoints are written by all together.
"""

import contextlib
import functools
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from scaling_perception.parallel.joining import COORDINATOR as COORDINATOR
from scaling_perception.parallel.joining import PROCESS as PROCESS
from scaling_perception.parallel.joining import PROCESSES as PROCESSES
from scaling_perception.parallel.joining import join as join
from scaling_perception.parallel.mesh import BATCH_AXES, replicated
from scaling_perception.support.errors import UserError
from scaling_perception.support.failures import explain


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Among several processes an error in the block ends this one there and then, with the exit code it would have had.

    Otherwise it would wait minutes for the others to end, who may be gone, or be waiting for this one. Alone, and for
    SystemExit, nothing is different.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not jax.distributed.is_initialized():
            raise
        code, told = 1, traceback.format_exc().rstrip()
        if isinstance(error, UserError):
            code, told = 2, f"scaling-perception: {error}"
        elif isinstance(error, KeyboardInterrupt):
            code, told = 130, "scaling-perception: interrupted"
        elif line := explain(error):
            code, told = 2, f"scaling-perception: {line}"
        print(told, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)


def is_first() -> bool:
    """Whether this process is the one that writes and talks."""
    return jax.process_index() == 0


def places_of(
    sharding: NamedSharding, size: int, process_of: Callable[[Any], int] = lambda device: device.process_index
) -> dict[int, np.ndarray]:
    """Process -> the places of a batch of ``size`` that its devices hold, int64, ascending, each once.

    They come from the sharding alone: on a torus the devices of one host need not follow each other along the batch,
    and where the mesh splits a sample's work over hosts (``tensor``) several processes hold the same places.

    Args:
        sharding: of arrays (B, ...), as ``mesh.batch_sharding`` makes it. process_of: the process of a device.

    Raises:
        UserError: the devices cannot share ``size`` samples.
    """
    shares = math.prod(sharding.mesh.shape[axis] for axis in BATCH_AXES)
    if size < 1 or size % shares:
        raise UserError(f"a batch of {size} cannot be shared by {shares} device(s): choose a multiple of {shares}")
    found: dict[int, set[int]] = {}
    for device, (rows,) in sharding.devices_indices_map((size,)).items():
        found.setdefault(process_of(device), set()).update(range(size)[rows])
    return {process: np.array(sorted(places), np.int64) for process, places in found.items()}


@functools.lru_cache(maxsize=16)
def own_places(sharding: NamedSharding, size: int) -> np.ndarray:
    """The places of a batch of ``size`` that this process reads: those of its own devices, see :func:`places_of`."""
    return places_of(sharding, size)[jax.process_index()]


def part_of(values: np.ndarray, places: np.ndarray, index: tuple[slice, ...] | None, size: int) -> np.ndarray:
    """What a device holds: the part ``index`` of an array (B, ...), of which ``values`` are the rows at ``places``.

    Args:
        places: ascending; those of ``index`` are among them. size: B.
    """
    index = (slice(None),) if index is None else index
    rows = range(size)[index[0]]
    first = int(np.searchsorted(places, rows.start))
    return values[(slice(first, first + len(rows)), *index[1:])]


def put_batch(batch: Mapping[str, Any], sharding: NamedSharding, size: int | None = None) -> dict[str, jax.Array]:
    """A batch as global arrays (B, ...), of which each device gets its part.

    Args:
        batch: arrays of this process's rows alone, those at :func:`own_places`, in that order.
        size: B; None: this process holds all of them.

    Raises:
        ValueError: the batch has another number of rows.
    """
    host = {name: np.asarray(value) for name, value in batch.items()}
    rows = {len(value) for value in host.values()}
    size = max(rows) if size is None else size
    places = own_places(sharding, size)
    if rows != {len(places)}:
        raise ValueError(f"a batch of {size} has {len(places)} rows in this process, not {sorted(rows)}")
    if jax.process_count() == 1:
        return jax.device_put(host, sharding)

    def put(values: np.ndarray) -> jax.Array:
        shape = (size, *values.shape[1:])
        return jax.make_array_from_callback(shape, sharding, lambda index: part_of(values, places, index, size))

    return {name: put(values) for name, values in host.items()}


def put_tree(tree: Any, shardings: Any) -> Any:
    """A tree of host arrays, the same in every process, with the given shardings; each device gets its part alone."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, shardings)


def to_host(tree: Any, mesh: Mesh) -> Any:
    """Every leaf whole, as numpy, leaf by leaf, so that no device ever holds more than one whole leaf."""

    def gather(leaf: jax.Array) -> np.ndarray:
        if not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            leaf = jax.jit(lambda x: x, out_shardings=replicated(mesh))(leaf)
        return np.asarray(leaf)

    return jax.tree.map(gather, tree)
