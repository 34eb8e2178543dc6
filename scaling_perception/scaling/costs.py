"""What a compiled program costs one device: FLOPs and memory traffic, each instruction as often as its loops run."""

import math
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from scaling_perception.scaling.hlo import (
    Array,
    Computation,
    Instruction,
    Module,
    Place,
    arrays_of,
    numbers,
    places,
    root_of,
)

_NO_MEMORY = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional"}
_NO_MEMORY |= {"after-all", "partition-id", "replica-id", "iota", "optimization-barrier", "async-start", "async-update"}
_SLICES = {"dynamic-slice", "slice", "gather"}


class Matmul(NamedTuple):
    """A matrix product or convolution, m x k times k x n in each of a batch: FLOPs each time, and how often it runs."""

    m: int
    n: int
    k: int
    flops: int
    trips: int


# --- FLOPs ---------------------------------------------------------------------------------------------------------


def matmuls(module: Module) -> list[Matmul]:
    """Every matrix product and convolution, in fusions too. What custom calls compute is not seen."""
    found = []
    for place in places(module):
        computation = module.computations[place.computation]
        for one in computation.values():
            if one.opcode == "dot":
                found.append(_dot(one, computation, place.trips))
            elif one.opcode == "convolution":
                found.append(_convolution(one, computation, place.trips))
    return found


def _dims(text: str, name: str) -> list[int]:
    found = re.search(rf"{name}=\{{([\d,]*)\}}", text)
    return numbers(found.group(1)) if found else []


def _dot(one: Instruction, computation: Computation, trips: int) -> Matmul:
    left, right = (arrays_of(computation, name)[0].shape for name in one.operands[:2])
    batch, contract = _dims(one.rest, "lhs_batch_dims"), _dims(one.rest, "lhs_contracting_dims")
    b, k = math.prod(left[at] for at in batch), math.prod(left[at] for at in contract)
    m, n = math.prod(left) // max(b * k, 1), math.prod(right) // max(b * k, 1)
    return Matmul(m, n, k, 2 * b * m * n * k, trips)


def _convolution(one: Instruction, computation: Computation, trips: int) -> Matmul:
    """A TPU writes products of matrices as convolutions, and batch axes as spatial ones that are dilated."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    left, right = (arrays_of(computation, name)[0].shape for name in one.operands[:2])
    out = one.arrays[0].shape
    if labels is None:
        return Matmul(1, 1, 1, 0, trips)
    of_left, of_right, of_out = labels.groups()
    rows, n, k = out[of_out.index("b")], out[of_out.index("f")], right[of_right.index("i")]
    window = re.search(r"window=\{([^}]*)\}", one.rest)
    fields = dict(part.split("=") for part in window.group(1).split()) if window else {}
    spatial = sorted(label for label in of_out if label.isdigit())
    met, inner = 1, 1
    for place, label in enumerate(spatial):
        size = out[of_out.index(label)]

        def field(name: str, default: str, place: int = place) -> str:
            return fields[name].split("x")[place] if name in fields else default

        low = int(field("pad", "0_0").split("_")[0])
        setting = (int(field("size", "1")), int(field("stride", "1")), low)
        dilated = (int(field("lhs_dilate", "1")), int(field("rhs_dilate", "1")))
        valid = _valid(left[of_left.index(label)], size, *setting, *dilated)
        met *= valid
        if dilated[0] == 1:
            rows, inner = rows * size, inner * max(round(valid / size), 1)
    return Matmul(rows, n, k * inner, 2 * out[of_out.index("b")] * n * k * met, trips)


@lru_cache(maxsize=4096)
def _valid(given: int, out: int, window: int, stride: int, low: int, base: int, dilation: int) -> int:
    """Pairs of output and window positions that meet an element, not padding or a hole."""
    at = np.arange(out)[:, None] * stride + np.arange(window)[None] * dilation - low
    return int(((at >= 0) & (at <= (given - 1) * base) & (at % base == 0)).sum())


class Kernel(NamedTuple):
    """A kernel that XLA did not write (Pallas), by its own account: FLOPs each time (None: it does not say), most rows
    that it is given."""

    op_name: str
    flops: int | None
    rows: int
    trips: int


def kernels(module: Module) -> list[Kernel]:
    """Every call of a hand-written TPU kernel. Grouped matmuls state their cost for all rows that there is room for."""
    found = []
    for place in places(module):
        computation = module.computations[place.computation]
        for one in computation.values():
            if one.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in one.rest:
                told = re.search(r'"cost_estimate":\{"flops":"(\d+)"', one.rest)
                shapes = [array.shape for name in one.operands for array in arrays_of(computation, name)]
                rows = [1, *(shape[0] for shape in shapes if len(shape) == 2)][
                    -1
                ]  # (rows, in); (in, rows), (rows, out)
                found.append(Kernel(one.op_name, int(told.group(1)) if told else None, rows, place.trips))
    return found


# --- Memory --------------------------------------------------------------------------------------------------------


def buffers(module: Module) -> Iterator[tuple[Instruction, Array, Place]]:
    """Every array that lies in main memory, where it is made."""
    for place in places(module):
        if not place.fused:
            for one in module.computations[place.computation].values():
                if one.opcode not in ("get-tuple-element", "tuple", "bitcast", "while"):
                    yield from ((one, array, place) for array in one.arrays if array.space == 0)


def traffic(module: Module) -> dict[str, int]:
    """Bytes that one device reads from and writes to its main memory, by the ``op_name`` of what does so: the operands
    and results of every instruction that is not fused into another, slices by what they take. What lies on the chip
    (TPU) costs nothing; on a CPU or GPU, whose text does not say what stays in a cache, this is an upper bound."""
    found: dict[str, int] = {}
    for place in places(module):
        if place.fused:
            continue
        computation = module.computations[place.computation]
        for one in computation.values():
            if one.opcode not in _NO_MEMORY:
                moved = place.trips * _moved(module, computation, one)
                found[one.op_name] = found.get(one.op_name, 0) + moved
    return found


def _source(computation: Computation, name: str) -> str:
    """The value that ``name`` is, perhaps seen as another shape."""
    while name in computation and computation[name].opcode == "bitcast":
        name = computation[name].operands[0]
    return name


def _moved(module: Module, computation: Computation, one: Instruction) -> int:
    if one.opcode == "custom-call" and "AllocateBuffer" in one.rest:
        return 0
    if one.opcode == "ragged-all-to-all":  # from one buffer into the other, as many rows as the smaller has
        return 2 * min(array.bytes for name in one.operands[:2] for array in arrays_of(computation, name))
    if one.opcode == "slice-start":  # (whole, slice, …); what it writes is counted where it is done
        return one.arrays[1].bytes if one.arrays[0].space == 0 else 0
    inner = module.computations.get(one.named("calls")) if one.opcode == "fusion" else None
    operands = one.operands
    if one.opcode == "custom-call":  # given an array more than once (query, key and value in one), it reads parts of it
        operands = {_source(computation, name): name for name in operands}.values()
    read = 0
    for index, name in enumerate(operands):
        given = sum(array.bytes for array in arrays_of(computation, name) if array.space == 0)
        if not given or one.opcode.endswith("-done"):
            continue
        if inner is not None:
            given = min(given, _read(module, inner, index))
        elif one.opcode in _SLICES and index == 0:
            given = min(given, sum(array.bytes for array in one.arrays))
        elif one.opcode == "dynamic-update-slice" and index == 0:
            given = 0
        read += given
    if one.opcode.endswith("-start"):
        return read  # what it writes is counted where it is done
    written = sum(array.bytes for array in one.arrays if array.space == 0)
    if inner is not None:
        written = min(written, _written(inner, root_of(inner)))
    elif one.opcode == "dynamic-update-slice":
        written = sum(array.bytes for array in arrays_of(computation, one.operands[1]))
    return read + written


# A TPU carries a collective out piece by piece, in fusions with other work: the first takes what goes in, the last
# gives what comes out, and those between hand both on.
_COLLECTIVES = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}


def _handed_on(inner: Computation, one: Instruction) -> bool:
    """Whether a value of a fused computation is a collective that others begin or end."""
    root = root_of(inner)
    return one.opcode in _COLLECTIVES and (
        "AsyncCollectiveDone" in root.rest or (root.opcode == "tuple" and one.name in root.operands)
    )


def _read(module: Module, inner: Computation, index: int) -> int:
    """Bytes that a fused computation takes of its parameter ``index``."""
    parameter = next((p for p in inner.values() if p.opcode == "parameter" and p.inside.strip() == str(index)), None)
    return 0 if parameter is None else _used(module, inner, parameter)


def _used(module: Module, inner: Computation, value: Instruction) -> int:
    whole, total = sum(array.bytes for array in value.arrays), 0
    for user in inner.values():
        for at, name in enumerate(user.operands):
            if name != value.name or (user.root and user.opcode == "tuple") or _handed_on(inner, user):
                continue
            if user.root and "AsyncCollective" in user.rest:
                continue
            if user.opcode in _SLICES and at == 0:
                total += sum(array.bytes for array in user.arrays)
            elif user.opcode == "bitcast":
                total += _used(module, inner, user)
            elif user.opcode == "fusion" and user.named("calls") in module.computations:
                total += _read(module, module.computations[user.named("calls")], at)
            elif not (user.opcode == "dynamic-update-slice" and at == 0):
                return whole
    return min(total, whole)


def _written(inner: Computation, root: Instruction) -> int:
    """Bytes that a fused computation writes: of an array that is updated in place, the update."""
    if root.opcode == "parameter" or _handed_on(inner, root) or "AsyncCollectiveStart" in root.rest:
        return 0
    if root.opcode == "tuple":
        return sum(_written(inner, inner[name]) for name in root.operands if name in inner)
    if root.opcode == "bitcast" and root.operands and root.operands[0] in inner:
        return _written(inner, inner[root.operands[0]])
    if root.opcode == "dynamic-update-slice":
        return sum(array.bytes for array in arrays_of(inner, root.operands[1]))
    return sum(array.bytes for array in root.arrays)
