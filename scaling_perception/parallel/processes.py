"""Several processes as one program: joining, handing out batches, bringing results back to where they are written.

A run has one process for each host. Every process runs the same code on its own share of the data; only the first one
writes files and talks, and checkpoints are written by all together.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from scaling_perception.parallel.mesh import replicated
from scaling_perception.support.errors import UserError

COORDINATOR, PROCESSES, PROCESS = (f"SCALING_PERCEPTION_{name}" for name in ("COORDINATOR", "PROCESSES", "PROCESS"))
# Variables by which JAX recognises a cluster that it can join without being told how.
_CLUSTERS = ("SLURM_JOB_ID", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS", "OMPI_COMM_WORLD_SIZE")


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes of this run, if the environment says that there are any. Call before any computation.

    ``SCALING_PERCEPTION_COORDINATOR`` (host:port), ``_PROCESSES`` and ``_PROCESS`` say it outright; in a Slurm step or
    on a TPU slice of several hosts JAX finds out by itself.

    Raises:
        UserError: the three variables are incomplete or no numbers.
    """
    given = [name for name in (COORDINATOR, PROCESSES, PROCESS) if environment.get(name)]
    if given:
        missing = [name for name in (COORDINATOR, PROCESSES, PROCESS) if name not in given]
        if missing:
            raise UserError(f"{given[0]} is set but {missing[0]} is not: set all three or none")
        try:
            count, index = int(environment[PROCESSES]), int(environment[PROCESS])
        except ValueError:
            raise UserError(f"{PROCESSES} and {PROCESS} must be whole numbers") from None
        if not 0 <= index < count:
            raise UserError(f"{PROCESS}={index} is not in 0..{count - 1} ({PROCESSES}={count})")
        if count > 1:
            jax.distributed.initialize(environment[COORDINATOR], count, index)
        return
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    tasks = environment.get("SLURM_NTASKS", environment.get("OMPI_COMM_WORLD_SIZE", "1"))
    several = len(hosts.split(",")) > 1 or (tasks.isdigit() and int(tasks) > 1)
    if several and any(name in environment for name in _CLUSTERS):
        jax.distributed.initialize()


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
        print(told, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)


def is_first() -> bool:
    """Whether this process is the one that writes and talks."""
    return jax.process_index() == 0


def put_batch(batch: Mapping[str, Any], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's share of a batch (arrays (B / P, ...)) as global arrays (B, ...)."""
    if jax.process_count() == 1:
        return jax.device_put({name: np.asarray(value) for name, value in batch.items()}, sharding)
    return {name: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for name, v in batch.items()}


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
