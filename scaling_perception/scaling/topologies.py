"""Devices that are not here: TPU slices by name for ahead-of-time compilation, and the limits of each chip.

Programs for a TPU are compiled by ``libtpu`` (``pip install 'scaling-perception[tpu]'``), which needs no TPU for it.
"""

import math
import os
import re
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from scaling_perception.support.chips import PEAKS, RINGS
from scaling_perception.support.errors import UserError, did_you_mean

GIB = 2**30


class Chip(NamedTuple):
    """What a chip can do at most; all rates one way, per chip and per second. A core of TPU v2 and v3 is a
    device, with half of what the chip has, and stands here as one.

    Attributes:
        name: as in a topology.
        flops: dense bfloat16 FLOPs. matrix: side of the unit that multiplies: shorter sides are padded to it.
        memory: bytes that a program may use. bandwidth: bytes to or from main memory.
        link: bytes over one link of the torus, or, where ``node`` is given, over the chip's port to its node's switch.
        ring: a dimension of the torus closes to a ring where its length is a multiple of this; 0 = no torus.
        network: bytes over the data-centre network; 0 = its slices cannot be joined by it.
        node: chips that share a switch, 0 = a torus.
        source: where the numbers are from.
    """

    name: str
    flops: float
    matrix: int
    memory: int
    bandwidth: float
    link: float
    ring: int
    network: float
    node: int
    source: str


_TPU = "Google Cloud TPU system architecture pages; usable memory as XLA states it"
_V4 = f"{_TPU}; its link from the pod's bisection (24 TB/s), its network taken to be v5p's"
_OLDER = (
    "Jouppi et al. 2020, A domain-specific supercomputer for training deep neural networks; memory as XLA states it"
)
_GPU = "NVIDIA data sheets: dense bf16, NVLink and one 400 Gb/s (A100: 200 Gb/s) port a GPU"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v2", PEAKS["v2"], 128, int(7.48 * GIB), 350e9, 62e9, RINGS["v2"], 0, 0, _OLDER),
        Chip("v3", PEAKS["v3"], 128, int(15.48 * GIB), 450e9, 82e9, RINGS["v3"], 0, 0, _OLDER),
        Chip("v4", PEAKS["v4"], 128, int(30.75 * GIB), 1228e9, 50e9, RINGS["v4"], 6.25e9, 0, _V4),
        Chip("v5e", PEAKS["v5e"], 128, int(15.75 * GIB), 819e9, 50e9, RINGS["v5e"], 3.125e9, 0, _TPU),
        Chip("v5p", PEAKS["v5p"], 128, int(95.74 * GIB), 2765e9, 100e9, RINGS["v5p"], 6.25e9, 0, _TPU),
        Chip("v6e", PEAKS["v6e"], 256, int(31.25 * GIB), 1638e9, 100e9, RINGS["v6e"], 12.5e9, 0, _TPU),
        Chip("a100", PEAKS["a100"], 16, 80 * 10**9, 2039e9, 300e9, 0, 25e9, 8, _GPU),
        Chip("h100", PEAKS["h100"], 16, 80 * 10**9, 3350e9, 450e9, 0, 50e9, 8, _GPU),
        Chip("h200", PEAKS["h200"], 16, 141 * 10**9, 4800e9, 450e9, 0, 50e9, 8, _GPU),
    )
}
_NAME = re.compile(r"(v2|v3|v4|v5e|v5p|v6e):(\d+(?:x\d+)+)|cpu:(0*[1-9]\d*)")


class Topology(NamedTuple):
    """Devices to compile for.

    Attributes:
        name: as it was asked for. chip: None for fake CPU devices whose limits nobody stated.
        devices: in the order of their numbers. shape: of one slice's torus, () where there is none.
    """

    name: str
    chip: Chip | None
    devices: list[Any]
    shape: tuple[int, ...]


def prepare_environment(name: str) -> None:
    """Let this process compile for ``name``: call before JAX starts, which reads its environment once.

    The host itself only traces, on its CPU; ``libtpu`` must not look for TPUs, nor lock out a second compilation.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        return
    if "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = "cpu"
        if found.group(3) and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            flag = f"--xla_force_host_platform_device_count={found.group(3)}"
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    quiet = {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TPU_ACCELERATOR_TYPE": "v5p-8"}
    alone = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    for variable, value in {**quiet, **alone}.items():
        os.environ.setdefault(variable, value)


def get_topology(name: str, slices: int = 1, chip: str = "") -> Topology:
    """The devices of ``v5p:4x4x4``, ``v5e:8x8``, ``v6e:16x16``, or ``cpu:8``, fake ones in place of GPUs.

    Args:
        slices: TPU slices of that shape, joined by the data-centre network.
        chip: for ``cpu:N``, whose limits the estimate uses: a100, h100 or h200.

    Raises:
        UserError: no such topology, no libtpu, or not enough fake devices.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise UserError(
            f"--topology '{name}': give a TPU slice such as v5e:8x8, v5p:4x4x4 or v6e:16x16, or cpu:N with "
            "N >= 1 for fake devices"
        )
    kind, shape, fake = found.groups()
    if slices < 1 or (fake and slices > 1):
        raise UserError(f"--slices {slices}: give 1 or more, and 1 for fake devices")
    if fake:
        return Topology(name, _gpu(chip), _fake_devices(int(fake)), ())
    if slices > 1 and not CHIPS[kind].network:
        raise UserError(f"--slices {slices}: {kind} slices cannot be joined by the data-centre network: give 1")
    if chip:
        raise UserError(f"--chip {chip} goes with cpu:N; {name} says its chip itself")
    sizes = tuple(int(size) for size in shape.split("x"))
    return Topology(name, CHIPS[kind], _tpu_devices(name, slices), sizes)


def _gpu(name: str) -> Chip | None:
    known = [chip.name for chip in CHIPS.values() if chip.node]
    if name and name not in known:
        raise UserError(f"--chip {name}{did_you_mean(name, known)}")
    return CHIPS[name] if name else None


def _fake_devices(count: int) -> list[Any]:
    import jax

    devices = jax.devices("cpu")
    if count > len(devices):
        raise UserError(
            f"--topology cpu:{count}: JAX has {len(devices)} CPU device(s) here; unset XLA_FLAGS, or set it to "
            f"--xla_force_host_platform_device_count={count}"
        )
    return devices[:count]


def _tpu_devices(name: str, slices: int) -> list[Any]:
    import importlib.util

    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {name} needs libtpu, which compiles for TPUs: pip install 'scaling-perception[tpu]'"
        )
    try:
        several: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
        if name.startswith("v4:"):  # both cores of a chip are one device, as JAX has them on a machine
            several["chip_config_name"] = "megacore"
        return list(topologies.get_topology_desc(name, platform="tpu", **several).devices)
    except Exception as error:  # libtpu raises several kinds
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(f"--topology {name}: libtpu knows no such slice ({reason})") from None


# --- How far apart devices are -------------------------------------------------------------------------------------


class Route(NamedTuple):
    """What the devices of a group share.

    Attributes:
        parts: slices (or nodes) that the group spans. size: devices of it in each.
        bandwidth: bytes a second, one way, out of a device to the others of its part. hops: links to the farthest.
        longest: devices along the longest dimension. closed: whether that one is a ring.
    """

    parts: int
    size: int
    bandwidth: float
    hops: int
    longest: int
    closed: bool


def route(topology: Topology, devices: Iterable[Any]) -> Route:
    """How a group of ``devices`` is connected: along each dimension of the torus in which they differ there is one
    link, or two where the group spans a dimension that closes to a ring."""
    group, chip = list(devices), topology.chip
    if chip is None or chip.node:
        node = chip.node if chip else len(topology.devices)
        numbers = [topology.devices.index(device) // node for device in group]
        parts = len(set(numbers))
        return Route(parts, max(len(group) // parts, 1), chip.link if chip else math.inf, 1, 1, False)
    parts = len({getattr(device, "slice_index", None) or 0 for device in group})
    at = np.array([device.coords[: len(topology.shape)] for device in group])
    bandwidth, hops, longest, closed = 0.0, 0, 1, False
    for dimension, size in enumerate(topology.shape):
        extent = len(np.unique(at[:, dimension]))
        if extent == 1:
            continue
        ring = extent == size > 2 and size % chip.ring == 0
        bandwidth += chip.link * (2 if ring else 1)
        distance = np.abs(at[:, None, dimension] - at[None, :, dimension])
        hops += int((np.minimum(distance, size - distance) if size % chip.ring == 0 else distance).max())
        if extent > longest:
            longest, closed = extent, ring
    return Route(parts, max(len(group) // parts, 1), bandwidth or chip.link, max(hops, 1), longest, closed)


def transfer_seconds(topology: Topology, kind: str, size: int, devices: list[Any]) -> float:
    """Seconds that a collective takes at the links' full rate, nothing else under way.

    Args:
        kind, size: as of ``hlo.Collective``. devices: one group, or source and target of a permutation.

    Bandwidth-optimal algorithms: with n devices, an all-gather or reduce-scatter moves (n - 1) / n of the array through
    each device's links, an all-reduce twice that; an all-to-all crosses an eighth of a ring (a quarter of a line) for
    each device in it; a permutation takes as many links as its devices are apart. Over several slices or nodes the
    part inside them comes first, and what is left crosses the network.
    """
    chip = topology.chip
    if chip is None:
        return 0.0
    way = route(topology, devices)
    if kind == "collective-permute":
        return size / chip.network if way.parts > 1 else size * way.hops / chip.link
    twice = 2 if kind == "all-reduce" else 1
    if kind in ("all-to-all", "ragged-all-to-all") and not chip.node:
        inside = size * way.longest / ((8 if way.closed else 4) * chip.link)
    else:
        inside = twice * size * (way.size - 1) / way.size / way.bandwidth
    across = twice * size / way.size * (way.parts - 1) / way.parts / chip.network
    return (inside if way.size > 1 else 0.0) + (across if way.parts > 1 else 0.0)
