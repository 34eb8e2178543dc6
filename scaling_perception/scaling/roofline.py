"""How long a step takes at least: what the chip, its memory and its links would need if each ran at its full rate.

Assumptions, stated because everything depends on them. Matrix products run at the chip's peak bfloat16 rate, their
short sides padded to the side of its matrix unit. Every instruction that is not fused reads and writes main memory
once, at full bandwidth. Collectives use the best known algorithm on the links between their devices, one at a time. At
best the three overlap wholly and the slowest decides; at worst they come one after the other.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from scaling_perception.scaling.costs import Kernel, Matmul
from scaling_perception.scaling.topologies import Chip


class Estimate(NamedTuple):
    """Seconds of one step on each device.

    Attributes:
        compute: matrix products. memory: main memory. links: by axes of the mesh, such as ``fsdp`` or ``data × fsdp``.
        best: they overlap wholly. worst: not at all.
    """

    compute: float
    memory: float
    links: dict[str, float]
    best: float
    worst: float


def padded_flops(one: Matmul, side: int) -> float:
    """FLOPs that a matrix unit of ``side`` × ``side`` spends on one product: the summed side and the shorter of the
    others are padded to it, the third streams through."""
    short = max(min(one.m, one.n), 1)
    waste = math.ceil(one.k / side) * side / max(one.k, 1) * math.ceil(short / side) * side / short
    return one.flops * waste


def estimate(
    chip: Chip,
    matmuls: Iterable[Matmul],
    kernels: Iterable[tuple[Kernel, float]],
    traffic: int,
    links: Mapping[str, float],
) -> Estimate:
    """The bounds of a step.

    Args:
        kernels: hand-written kernels, and which share of their rows is really computed.
        traffic: bytes to and from main memory. links: seconds by axes.
    """
    flops = sum(padded_flops(one, chip.matrix) * one.trips for one in matmuls)
    flops += sum(one.flops * one.trips * share for one, share in kernels)
    compute, memory = flops / chip.flops, traffic / chip.bandwidth
    together = sum(links.values())
    return Estimate(compute, memory, dict(links), max(compute, memory, together), compute + memory + together)
