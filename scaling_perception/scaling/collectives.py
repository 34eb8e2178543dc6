"""Collectives of a compiled program: which arrays move along which axes of the mesh, how often, and what they are."""

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from scaling_perception.models.exchange import BACK
from scaling_perception.scaling.hlo import Array, Instruction, Loop, Module, arrays_of, numbers, places

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


class Collective(NamedTuple):
    """Data that moves between devices.

    Attributes:
        kind: one of ``KINDS``; an all-reduce of which each device keeps a part, fused, is a reduce-scatter.
        arrays: what one device puts in.
        bytes: what is gathered, reduced, exchanged or passed on: the larger side, on one device, each time; of a
            ragged-all-to-all the rows if all devices have equally many.
        groups: (G, S) device numbers that act together; of a collective-permute (S, 2) pairs of source and target.
        loops: around it, outermost first. trips: how often it runs.
        op_name: where it comes from.
    """

    kind: str
    name: str
    arrays: tuple[Array, ...]
    bytes: int
    groups: np.ndarray
    loops: tuple[Loop, ...]
    trips: int
    op_name: str


def collectives(module: Module) -> list[Collective]:
    """Every collective that runs. Groups of one device are left out, and so are the repetitions of one that a TPU
    carries out piece by piece inside other fusions (they share a channel)."""
    found: list[Collective] = []
    seen: set[tuple[str, tuple[Loop, ...]]] = set()
    for place in places(module):
        computation = module.computations[place.computation]
        for one in computation.values():
            kind = one.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            channel = re.search(r"channel_id=(\d+)", one.rest)
            if channel and place.fused:
                if (channel.group(1), place.loops) in seen:
                    continue
                seen.add((channel.group(1), place.loops))
            groups = _groups(one, module.partitions)
            if groups.shape[1] < 2 or not len(groups):
                continue
            arrays = tuple(array for name in one.operands for array in arrays_of(computation, name))
            arrays = arrays or one.arrays
            size = _size(kind, arrays, groups.shape[1])
            if place.fused and kind == "all-reduce" and place.computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            told = one.op_name or _caller_op(module, place.computation)
            found.append(Collective(kind, one.name, arrays, size, groups, place.loops, place.trips, told))
    return found


def _size(kind: str, arrays: tuple[Array, ...], group: int) -> int:
    if kind == "ragged-all-to-all":  # rows, and where they go, of which one is a buffer with room to spare
        return min(array.bytes for array in arrays[:2])
    return sum(array.bytes for array in arrays) * (group if kind == "all-gather" else 1)


def _caller_op(module: Module, fused: str) -> str:
    """Where a fused computation comes from, as its caller says."""
    for computation in module.computations.values():
        for one in computation.values():
            if one.opcode == "fusion" and one.op_name and one.named("calls") == fused:
                return one.op_name
    return ""


# --- Groups --------------------------------------------------------------------------------------------------------


def _groups(one: Instruction, partitions: int) -> np.ndarray:
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", one.rest)
    if pairs:
        found = [[int(n) for n in pair] for pair in re.findall(r"\{(\d+),(\d+)\}", pairs.group(1))]
        return np.array([pair for pair in found if pair[0] != pair[1]], int).reshape(-1, 2)
    text = re.search(r"replica_groups=(.*)", one.rest)
    return replica_groups(text.group(1) if text else "{}", partitions)


def replica_groups(text: str, partitions: int) -> np.ndarray:
    """(G, S) device numbers of ``replica_groups=…``, in any of XLA's forms: ``{{0,1},{2,3}}``, ``{}`` (all),
    ``[2,2]<=[4]``, ``[4,2]<=[2,4]T(1,0)``, ``mesh['a'=2,'b'=4] {'b'}``, the last also with ``device_ids=(…)`` and with
    parts of an axis (``'b':(1)2``).

    Raises:
        ValueError: none of these.
    """
    text = text.strip()
    if text.startswith("{"):
        groups = re.match(r"\{((?:\{[\d,]*\},?)*)\}", text)
        rows = re.findall(r"\{([\d,]+)\}", groups.group(1)) if groups else []
        if not rows:
            return np.arange(partitions)[None]
        found = [numbers(row) for row in rows]
        width = max(map(len, found))
        return np.array([row + row[-1:] * (width - len(row)) for row in found])  # uneven ones: the last repeated
    if text.startswith("["):
        found = re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
        if found:
            return _iota(found.group(2)).reshape(numbers(found.group(1)))
    if text.startswith("mesh["):
        found = re.match(r"mesh\[([^\]]*)\](?:,\s*device_ids=\((.*?)\)\s)?\s*\{([^}]*)\}", text)
        if found:
            return _mesh_groups(*found.groups())
    raise ValueError(f"replica groups of an unknown form: {text[:80]}")


def _iota(text: str) -> np.ndarray:
    """``[2,4]`` or ``[2,4]T(1,0)``: the numbers from 0 in that shape, transposed."""
    shape, _, order = text.partition("T")
    sizes = numbers(shape.strip("[]"))
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(numbers(order.strip("()"))) if order else ids


def _mesh_groups(axes: str, devices: str | None, chosen: str) -> np.ndarray:
    """Groups along ``chosen`` axes of a mesh, ``'a'`` or ``'a':(before)size``, which is a part of one."""
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", axes)}
    if devices is None:
        ids = np.arange(math.prod(sizes.values()))
    elif "[" in devices:
        ids = _iota(devices.strip().removeprefix("<="))
    else:
        ids = np.array(numbers(re.sub(r"[^\d,]", "", devices)))
    wanted = []
    for name, before, size in re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", chosen):
        low = int(before or 1)
        wanted.append((name, low, low * int(size or sizes[name])))
    pieces: list[tuple[str, int]] = []  # every axis, cut where a part begins or ends; major first
    shape: list[int] = []
    for name, size in sizes.items():
        cuts = {1, size} | {cut for axis, *ends in wanted if axis == name for cut in ends}
        for low, high in pairwise(sorted(cuts)):
            pieces.append((name, low))
            shape.append(high // low)
    grouped = [
        at
        for name, low, high in wanted
        for at, (axis, start) in enumerate(pieces)
        if axis == name and low <= start < high
    ]
    rest = [at for at in range(len(shape)) if at not in grouped]
    return ids.reshape(shape).transpose(*rest, *grouped).reshape(-1, math.prod(shape[at] for at in grouped))


def mesh_axes(groups: np.ndarray, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh of ``sizes`` along which the devices of a group differ; device n is the n-th of the mesh."""
    coordinates = np.unravel_index(groups, tuple(sizes.values()))
    return tuple(name for name, at in zip(sizes, coordinates, strict=True) if bool((at != at[:, :1]).any()))


# --- What they carry -----------------------------------------------------------------------------------------------


class Parameters(NamedTuple):
    """How parameters look on their way.

    Attributes:
        sizes: number of elements to names. layers: a layer's shape to name. axes: name to the axes that split it.
        parts: name to the number of devices that share it.
    """

    sizes: dict[int, tuple[str, ...]]
    layers: dict[tuple[int, ...], str]
    axes: dict[str, tuple[str, ...]]
    parts: dict[str, int]

    def names(self, array: Array) -> tuple[str, ...]:
        """Those that ``array`` may be, by its size; or by its shape, if a compiler padded one side by up to a
        quarter."""
        if array.size in self.sizes:
            return self.sizes[array.size]
        shape = tuple(size for size in array.shape if size > 1)
        return tuple(name for layer, name in self.layers.items() if 1 < _side(shape, layer) <= _PADDED)

    def pieces(self, array: Array) -> tuple[str, ...]:
        """Those of which ``array`` may be a piece of a device's part, as a ring passes on."""
        shape = tuple(size for size in array.shape if size > 1)
        return tuple(
            name for layer, name in self.layers.items() if 0 < _side(shape, layer) * self.parts[name] <= _PADDED
        )


_PADDED = 1.25


def _side(shape: tuple[int, ...], layer: tuple[int, ...]) -> float:
    """The one side in which ``shape`` differs from a layer's, as a multiple of it; 0 where they differ in more."""
    if len(shape) != len(layer) or len(shape) < 2:
        return 0.0
    other = [have / own for have, own in zip(shape, layer, strict=True) if have != own]
    return other[0] if len(other) == 1 else 0.0


def parameters_of(shapes: Mapping[str, Any], specs: Mapping[str, Any], mesh: Mapping[str, int]) -> Parameters:
    """Every form in which parameters may travel.

    Args:
        shapes: name -> shape. specs: name -> the PartitionSpec of its rule (none: whole). mesh: axis -> size.

    A stacked parameter (under ``blocks``) travels layer by layer or whole; whole, or split over some of its axes; and
    in halves, where a ring passes it on in both directions.
    """
    found: dict[int, dict[str, None]] = {}
    layers: dict[tuple[int, ...], str] = {}
    split: dict[str, tuple[str, ...]] = {}
    for name, shape in shapes.items():
        entries = ((entry,) if isinstance(entry, str) else entry or () for entry in specs.get(name, ()))
        axes = split[name] = tuple(axis for entry in entries for axis in entry)
        stacked = "blocks/" in name
        layers.setdefault(tuple(size for size in shape[stacked:] if size > 1), name)
        for whole in [math.prod(shape)] + ([math.prod(shape[1:])] if stacked else []):
            for chosen in range(2 ** len(axes)):
                parts = math.prod(mesh[axis] for at, axis in enumerate(axes) if chosen >> at & 1)
                for size in (whole // parts, whole // parts // 2 if parts > 1 else 0):
                    if size > 1:
                        found.setdefault(size, {})[name] = None
    parts = {name: math.prod(mesh[axis] for axis in axes) for name, axes in split.items()}
    return Parameters({size: tuple(names) for size, names in found.items()}, layers, split, parts)


SMALL = 64 * 1024  # bytes: scalars, norms, statistics
PURPOSES = {
    "weights": "weights that are split at rest, gathered where a layer is computed",
    "ring": "weights or their gradients, passed around a ring while the product with them is computed",
    "kept": "gradients, summed over the batch; each device keeps the part of the weights that it has",
    "gradients": "gradients, summed over the batch; each device gets the whole sum",
    "tokens": "tokens and their routing, to the devices that have their experts",
    "results": "what the experts made, back to the devices that have the tokens",
    "partial": "partial sums of a product with a matrix that is split",
    "scalars": "loss, norms, statistics and other small arrays",
    "rows": "rows of all devices, gathered on each",
    "reshard": "activations that change how they are split",
}


def purpose(one: Collective, axes: tuple[str, ...], parameters: Parameters) -> str:
    """A key of ``PURPOSES``: what a collective is there for, judged by sizes, kind and where it comes from."""
    own = one.kind == "reduce-scatter" and "expert" not in axes  # gradients of experts, along the other axes
    if "shard_map" in one.op_name and "psum" not in one.op_name and not own:
        return "results" if one.kind == "reduce-scatter" or BACK in one.op_name else "tokens"
    large = [array for array in one.arrays if array.size > 1]
    # combined collectives carry several: what weighs most decides
    of_weights = sum(array.bytes for array in large if _may_be(array, one.kind, axes, parameters))
    if large and 2 * of_weights > sum(array.bytes for array in large):
        return _OF_WEIGHTS[one.kind]
    if one.bytes <= SMALL:
        return "scalars"
    if axes == ("expert",) and one.kind == "reduce-scatter":
        return "results"  # a TPU may drop the name
    if axes == ("tensor",) and one.kind in ("all-reduce", "reduce-scatter", "all-gather"):
        return "partial"
    return "rows" if one.kind == "all-gather" and not one.loops else "reshard"


_OF_WEIGHTS = {
    "all-gather": "weights",
    "collective-permute": "ring",
    "reduce-scatter": "kept",
    "all-reduce": "gradients",
}


def _may_be(array: Array, kind: str, axes: tuple[str, ...], parameters: Parameters) -> bool:
    """Whether an array is a parameter or its gradient: what is gathered or scattered must be split along those axes."""
    if kind not in _OF_WEIGHTS:
        return False
    names = parameters.names(array)
    if kind == "collective-permute":
        names += parameters.pieces(array)
    return bool(names) if kind == "all-reduce" else any(set(axes) <= set(parameters.axes[name]) for name in names)


def carried(one: Collective, parameters: Parameters) -> tuple[str, ...]:
    """Names of the parameters that a collective may carry."""
    return tuple(dict.fromkeys(name for array in one.arrays for name in parameters.names(array)))
