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
    return one.flops * padding(one.k, side) * padding(short, side)


def padding(size: int, side: int) -> float:
    """How many times longer a matrix unit of ``side`` takes for a short side of ``size`` than for its share."""
    return math.ceil(size / side) * side / max(size, 1)


def estimate(
    chip: Chip,
    matmuls: Iterable[Matmul],
    kernels: Iterable[tuple[Kernel, float]],
    traffic: int,
    links: Mapping[str, float],
) -> Estimate:
    """The bounds of a step.

    Args:
        kernels: hand-written kernels, and how many times the FLOPs that they state they take: less, where rows are not
            computed, and more, where short sides are padded. What states nothing counts nothing.
        traffic: bytes to and from main memory. links: seconds by axes.
    """
    flops = sum(padded_flops(one, chip.matrix) * one.trips for one in matmuls)
    flops += sum((one.flops or 0) * one.trips * share for one, share in kernels)
    compute, memory = flops / chip.flops, traffic / chip.bandwidth
    together = sum(links.values())
    return Estimate(compute, memory, dict(links), max(compute, memory, together), compute + memory + together)
