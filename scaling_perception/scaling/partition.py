"""What a partitioned program does that it need not: copies between devices, and arrays that are whole where they should
be split."""

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from scaling_perception.parallel.mesh import BATCH_AXES
from scaling_perception.scaling.collectives import Collective, Parameters, carried
from scaling_perception.scaling.costs import buffers
from scaling_perception.scaling.hlo import Module

Found = tuple[Collective, tuple[str, ...], str]  # a collective, its axes, its purpose
_MEGABYTE = 1e6


def gathered_experts(found: Sequence[Found], parameters: Parameters) -> Iterator[str]:
    """Experts that leave the devices that they are split over: under expert parallelism tokens travel instead."""
    for one, axes, purpose in found:
        names = [name for name in carried(one, parameters) if "experts/" in name]
        if names and "expert" in axes and purpose in ("weights", "ring"):
            size = one.bytes * one.trips / _MEGABYTE
            yield (
                f"{one.kind} of experts ({names[0]}) over {' × '.join(axes)}, {size:.1f} MB a step on each device: "
                "the dispatcher is neither 'ring' nor 'exchange', or a sharding rule differs from its layout"
            )


def whole_gradients(found: Sequence[Found], parameters: Parameters) -> Iterator[str]:
    """Gradients of split weights that every device gets whole, and then drops all but its part of."""
    for one, axes, purpose in found:
        if purpose != "gradients":
            continue
        split = {
            name: array
            for array in one.arrays
            for name in parameters.names(array)
            if axes and set(axes) <= set(parameters.axes[name])
        }
        size = sum(array.bytes for array in dict.fromkeys(split.values())) * one.trips / _MEGABYTE
        if size >= 1:
            yield (
                f"all-reduce of gradients ({next(iter(split))}) over {' × '.join(axes)}, {size:.1f} MB a step on each "
                "device, though each keeps a part alone: a reduce-scatter sends half (the compiler has none for parts "
                "that are no whole tiles: a smaller axis, perhaps)"
            )


def resharded_layers(found: Sequence[Found]) -> Iterator[str]:
    """Activations that change how they are split inside a loop, so once for every layer."""
    for one, axes, purpose in found:
        if purpose == "reshard" and one.loops:
            shapes = ", ".join(f"{array.dtype}{list(array.shape)}" for array in one.arrays[:3])
            yield (
                f"{one.kind} of activations {shapes} over {' × '.join(axes)} inside a loop, {one.trips} times a step, "
                f"{one.bytes * one.trips / _MEGABYTE:.1f} MB on each device, at {_tail(one.op_name)}"
            )


def unsharded_activations(
    module: Module, mesh: Mapping[str, int], program: Any, parameters: Parameters
) -> Iterator[str]:
    """The largest array that holds the tokens of more samples than a device should have, for each set of batch axes
    over which it is not split.

    Args:
        program: whose ``batch`` samples of ``tokens`` are computed together. parameters: what is none of them.
    """
    batch, tokens = program.batch, program.tokens
    axes = [axis for axis in BATCH_AXES if mesh.get(axis, 1) > 1]
    parts = math.prod(mesh[axis] for axis in axes)
    if not axes or batch % parts:
        return
    own = batch // parts
    whole: dict[int, tuple[str, ...]] = {}
    for count in range(1, len(axes) + 1):
        for held in combinations(axes, count):
            if "expert" not in held:  # the tokens of this axis are gathered where experts are split over it
                whole.setdefault(own * math.prod(mesh[axis] for axis in held), held)
    widths = {size for layer in parameters.layers for size in layer}
    widths |= {int(program.expert_rows), int(program.expert_rows) * mesh.get("expert", 1)}  # a token for each expert
    worst: dict[tuple[str, ...], tuple[int, str]] = {}
    for one, array, _ in buffers(module):
        if parameters.names(array) or _holds(array.shape, own, own, tokens, widths):
            continue
        rows = next((size for size in whole if _holds(array.shape, size, own, tokens, widths)), 0)
        if rows and array.bytes > worst.get(whole[rows], (0, ""))[0]:
            told = f"{array.dtype}{list(array.shape)} at {_tail(one.op_name) or one.name}"
            worst[whole[rows]] = (array.bytes, told)
    for held, (size, told) in worst.items():
        if size >= _MEGABYTE:
            yield f"an activation is whole over {' × '.join(held)}: {told}, {size / _MEGABYTE:.1f} MB on each device"


def _holds(shape: tuple[int, ...], rows: int, own: int, tokens: int, widths: Container[int]) -> bool:
    """Whether an array has an axis of ``rows`` samples' tokens, or one of samples before one of tokens; an axis as long
    as one in ``widths`` is taken for that."""
    if rows * tokens in shape and rows * tokens not in widths:
        return True
    together = rows != tokens and own != tokens  # else a square of tokens by tokens would look like it
    return together and any(pair == (rows, tokens) for pair in zip(shape, shape[1:], strict=False))


def repeated_work(program: float, model: float, update: float, devices: int) -> Iterator[str]:
    """Whether a device computes much more than its share: a train step that recomputes everything needs 4/3 of it.

    Args:
        program: FLOPs on one device. model: those of the model's formula, over the devices. update: those of the
            optimizer on all weights, which a device that holds them all computes by itself.
    """
    if devices > 1 and model and program > 2 * (model + update):
        times = (program - update) / model
        yield f"each device computes {times:.1f} times its share of the model: several do the same work"


def replicated_state(shapes: Mapping[str, Any], wanted: Mapping[str, Any], given: Mapping[str, Any], mesh: Any) -> Any:
    """Arrays that stay whole on an axis of the mesh that their rule names, because it does not divide them.

    Args:
        shapes: name -> shape. wanted, given: name -> the rule's PartitionSpec and the array's own.
    """
    kept: dict[str, int] = {}
    for name, shape in shapes.items():
        for entry in wanted.get(name, ()):
            for axis in (entry,) if isinstance(entry, str) else entry or ():
                split = any(axis == have or axis in (have or ()) for have in given[name])
                if mesh[axis] > 1 and not split:
                    what = f"{_short(name)} {list(shape)} is whole over {axis} ({mesh[axis]})"
                    kept[what] = kept.get(what, 0) + 1
    for what, count in kept.items():
        yield f"state: {what}, although a rule splits it there ({count} arrays): the axis does not divide it"


def _short(name: str) -> str:
    """The parameter of which ``name`` is the value, an average or a moment."""
    parts = name.split("/")
    for known in ("blocks", "patch_embed", "time_embed", "final", "label_embed", "pos_embed", "context"):
        if known in parts:
            return "/".join(parts[parts.index(known) :])
    return name


def _tail(op_name: str) -> str:
    return "/".join(op_name.split("/")[-4:])
