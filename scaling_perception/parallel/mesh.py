"""The one place that builds a mesh: four named axes, of size 1 where unused."""

import re
from collections.abc import Sequence
from math import prod
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from scaling_perception.parallel.torus import arranged
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.own_samples import OWN, inside_own

AXES = ("data", "fsdp", "expert", "tensor")
# The batch is split over all of these: what is not an expert is computed data-parallel over the expert axis too.
# Parameters are split over fsdp (and tensor), experts over expert.
BATCH_AXES = ("data", "fsdp", "expert")
# The columns of weights that meet one row of a sample, and not its tokens, are split over these (`spreads_columns`).
COLUMN_AXES = ("fsdp", "tensor")


def make_mesh(
    data: int = -1, fsdp: int = 1, expert: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with axes data, fsdp, expert, tensor, all of type Auto: the compiler places what is not annotated.

    Args:
        data, fsdp, expert, tensor: sizes; one of them may be -1, which takes the devices that are left.
        devices: None = all of this run's, over every process.

    Neighbours on the mesh are neighbours on the devices' torus. Where the devices are several TPU slices (or hosts of
    GPUs), which only the data-centre network joins, ``data`` spans them, or else ``fsdp``.

    Raises:
        UserError: the sizes do not multiply to the number of devices, or neither data nor fsdp can span the slices.
    """
    sizes: dict[str, int] = dict(zip(AXES, (data, fsdp, expert, tensor), strict=True))
    chosen = list(jax.devices() if devices is None else devices)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh {_text(sizes)}: give sizes of 1 or more, and -1 (what is left) at most once")
    fixed = prod(size for size in sizes.values() if size != -1)
    if free and len(chosen) % fixed == 0:
        sizes[free[0]] = len(chosen) // fixed
    if prod(sizes.values()) != len(chosen):
        number = f"{len(chosen)} device" + ("" if len(chosen) == 1 else "s")
        raise UserError(f"mesh {_text(sizes)} does not fit {number}: the sizes must multiply to that number")
    grid = _arrange(tuple(sizes.values()), chosen)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(shape: tuple[int, ...], devices: list[Any]) -> Any:
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    if slices == 1:
        found = arranged(shape, devices) if shape[AXES.index("expert")] > 1 else None
        if found is not None:
            return found
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    spanning = next((at for at in (0, 1) if shape[at] % slices == 0), None)
    if spanning is None:
        raise UserError(f"mesh of {slices} slices: make data (now {shape[0]}) or fsdp ({shape[1]}) a multiple of them")
    across = tuple(slices if at == spanning else 1 for at in range(len(shape)))
    inside = tuple(size // parts for size, parts in zip(shape, across, strict=True))
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


def _text(sizes: dict[str, int]) -> str:
    """``data=-1,fsdp=4``: what is not 1."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "of one device"


def mesh_sizes(text: str) -> dict[str, int]:
    """``fsdp=4,expert=2`` as sizes of axes.

    Raises:
        UserError: no such axis, one that is given twice, or no number.
    """
    sizes = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES:
            raise UserError(f"--mesh: unknown axis '{axis}'{did_you_mean(axis, AXES)}")
        if axis in sizes:
            raise UserError(f"--mesh {text}: {axis} is given twice: leave one out")
        if not re.fullmatch(r"-?\d{1,9}", size):
            raise UserError(f"--mesh {part}: give a whole number, such as {axis}=4")
        sizes[axis] = int(size)
    return sizes


def local_mesh(text: str | None) -> Mesh | None:
    """The mesh of ``--mesh`` over the devices of this process, ``data`` taking what is left; None without the flag.

    Raises:
        UserError: as `mesh_sizes`, or the sizes do not multiply to the number of devices.
    """
    return None if text is None else make_mesh(**mesh_sizes(text), devices=jax.local_devices())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays (B, ...): the batch over data, fsdp and expert, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def on_own(function: Any, in_axes: Any) -> Any:
    """``function`` for each device of the batch axes on its own samples: results (devices, ...), nothing reduced.

    Its mapped arguments are (devices, samples, ...), their first axis split over ``BATCH_AXES``. Inside, the batch axes
    are taken (``free_batch_axes``); ``tensor`` remains.
    """
    return jax.vmap(function, in_axes=in_axes, axis_name=OWN, spmd_axis_name=BATCH_AXES)


def free_batch_axes() -> tuple[str, ...]:
    """The axes that samples are to be split over where this is traced: ``BATCH_AXES``, or none inside ``on_own``."""
    return () if inside_own() else BATCH_AXES


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(x: Any, mesh: Mesh | None, axis: int = 0) -> Any:
    """x (B, ...), or with B at ``axis``, with its batch split over the devices, which the compiler then keeps to; x as
    it is where B does not divide, or without a mesh.

    Left alone, the compiler may split features instead, as the weights are, and give every device the whole batch.
    """
    axes = free_batch_axes()
    if mesh is None or x.shape[axis] % prod(mesh.shape[name] for name in axes):
        return x
    return _constrained(x, mesh, *[None] * axis, axes or None)


def spreads_columns(mesh: Mesh | None, batch: int) -> bool:
    """Whether a product of few rows, one for each of ``batch`` samples, is computed where its columns are: each device
    takes the rows of all devices along ``fsdp``, and gives back its columns of them. The weights are not gathered."""
    if mesh is None or inside_own() or batch % prod(mesh.shape[name] for name in BATCH_AXES):
        return False
    # along expert the devices of a row of fsdp hold samples that do not follow each other
    return mesh.shape["fsdp"] > 1 and mesh.shape["expert"] == 1


def gather_samples(x: Any, mesh: Any) -> Any:
    """x (B, D) with the samples of the devices along ``fsdp`` on each of them, where ``spreads_columns``."""
    return _constrained(x, mesh, "data")


def split_columns(x: Any, mesh: Any) -> Any:
    """x (L, B, N) with its samples split over ``data`` and its columns over ``COLUMN_AXES`` (if they divide)."""
    divides = x.shape[2] % prod(mesh.shape[name] for name in COLUMN_AXES) == 0
    return _constrained(x, mesh, None, "data", COLUMN_AXES if divides else None)


def _constrained(x: Any, mesh: Mesh, *spec: Any) -> Any:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))
