"""Which devices of a TPU slice stand along which axis of a mesh with experts.

Rows of tokens go from every device of the axis ``expert`` to every other, which takes as long as the group is wide: 4
devices in a square take half as long as 4 in a line, 4 x 2 half as long as a ring of 8. JAX's own arrangement prefers
whole dimensions of the torus, which is best for rings of gathers and sums.
"""

import itertools
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from scaling_perception.support.chips import closes

_Factors = tuple[int, ...]  # of one axis along each dimension of the torus


def arranged(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray | None:
    """The devices of one slice as an array of ``sizes`` (data, fsdp, expert, tensor); None where they are not one to a
    place of a whole torus.

    Along each dimension neighbours are first those of ``tensor``, then of ``expert``, ``fsdp``, ``data``. Of all ways
    the one whose ``tensor`` has most links, then whose ``expert`` is narrowest, ``fsdp`` and ``data`` have most links.
    """
    places = _places(devices)
    if places is None:
        return None
    torus = places.shape
    rings = [closes(devices[0].device_kind, size) for size in torus]
    best = min(_ways(tuple(sizes)[::-1], torus), key=lambda way: _cost(way, torus, rings), default=None)
    if best is None:
        return None
    outer_first = best[::-1]
    cut = places.reshape([factors[at] for at in range(len(torus)) for factors in outer_first])
    order = [at * len(sizes) + axis for axis in range(len(sizes)) for at in range(len(torus))]
    return cut.transpose(order).reshape(tuple(sizes))


def _places(devices: Sequence[Any]) -> np.ndarray | None:
    """The devices by their coordinates."""
    coords = [getattr(device, "coords", None) for device in devices]
    if any(at is None for at in coords):
        return None
    at = np.array(coords)
    at -= at.min(axis=0)
    shape = tuple(int(size) for size in at.max(axis=0) + 1)
    if prod(shape) != len(devices) or len(np.unique(at, axis=0)) != len(devices):
        return None
    found = np.empty(shape, object)
    for place, device in zip(at, devices, strict=True):
        found[tuple(place)] = device
    return found


def _ways(sizes: Sequence[int], room: _Factors) -> list[tuple[_Factors, ...]]:
    """Every way to cut the dimensions ``room`` into axes of ``sizes``: the factors of each."""
    if not sizes:
        return [()] if prod(room) == 1 else []
    options = itertools.product(*([part for part in range(1, of + 1) if of % part == 0] for of in room))
    found = []
    for own in options:
        if prod(own) == sizes[0]:
            left = tuple(of // part for of, part in zip(room, own, strict=True))
            found += [(own, *rest) for rest in _ways(sizes[1:], left)]
    return found


def _cost(way: tuple[_Factors, ...], torus: _Factors, rings: Sequence[bool]) -> tuple[float, ...]:
    """What ``arranged`` minimises. Groups that lie between each other along a dimension share its links."""
    stride = [1] * len(torus)
    links, widths = [], []
    for factors in way:
        along, wide = 0.0, 0.0
        for at, factor in enumerate(factors):
            if factor > 1:
                ring = rings[at] and factor > 2 and factor * stride[at] == torus[at]
                along += (2 if ring else 1) / stride[at]
                wide = max(wide, factor * stride[at] / (2 if ring else 1))
            stride[at] *= factor
        links.append(along)
        widths.append(wide)
    tensor, _, fsdp, data = links
    cuts = sum(factor > 1 for factors in way for factor in factors)
    return -tensor, widths[1], -fsdp, -data, cuts
