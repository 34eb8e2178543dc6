"""Bounds of a step against sums by hand, on tori and nodes that are not here."""

import types

import numpy as np
import pytest
from jax.sharding import PartitionSpec

from scaling_perception.scaling import partition
from scaling_perception.scaling.collectives import Collective, carried, parameters_of, purpose
from scaling_perception.scaling.costs import Kernel, Matmul
from scaling_perception.scaling.hlo import Array, Loop, parse
from scaling_perception.scaling.roofline import estimate, padded_flops, padding
from scaling_perception.scaling.topologies import CHIPS, Topology, get_topology, route, transfer_seconds
from scaling_perception.support.errors import UserError

GIGA = 10**9


def torus(chip, *shape, slices=1):
    """A slice of that shape, as libtpu describes its devices."""
    devices = [
        types.SimpleNamespace(coords=list(at), slice_index=part) for part in range(slices) for at in np.ndindex(*shape)
    ]
    return Topology("stand-in", CHIPS[chip], devices, shape)


def along(topology, dimension):
    """The devices of the first slice that differ in one coordinate alone."""
    return [
        device
        for device in topology.devices
        if not device.slice_index and not any(at for d, at in enumerate(device.coords) if d != dimension)
    ]


def test_links_of_a_torus():
    cube, plane, pod = torus("v5p", 4, 4, 4), torus("v6e", 8, 8), torus("v5e", 16, 16)
    assert route(cube, along(cube, 1)) == (1, 4, 200e9, 2, 4, True)  # closes to a ring: both directions
    assert route(cube, along(cube, 1)[:2]) == (1, 2, 100e9, 1, 2, False)
    assert route(cube, cube.devices) == (1, 64, 600e9, 6, 4, True)
    assert route(plane, along(plane, 0)) == (1, 8, 100e9, 7, 8, False)  # v6e closes at 16 alone
    assert route(pod, along(pod, 0)) == (1, 16, 100e9, 8, 16, True)


@pytest.mark.parametrize(
    "kind, seconds",
    [
        ("all-gather", 3 / 4 / 200),
        ("reduce-scatter", 3 / 4 / 200),
        ("all-reduce", 2 * 3 / 4 / 200),
        ("all-to-all", 4 / 8 / 100),
    ],
)
def test_seconds_of_a_gigabyte_around_a_ring_of_four(kind, seconds):
    cube = torus("v5p", 4, 4, 4)
    assert np.isclose(transfer_seconds(cube, kind, GIGA, along(cube, 0)), seconds)


def test_seconds_over_lines_hops_slices_and_nodes():
    plane = torus("v6e", 8, 8)
    line = along(plane, 0)
    assert np.isclose(transfer_seconds(plane, "all-to-all", GIGA, line), 8 / 4 / 100)
    assert np.isclose(transfer_seconds(plane, "collective-permute", GIGA, [line[0], line[3]]), 3 / 100)
    two = torus("v5e", 4, 4, slices=2)  # first inside the slices, then a sixteenth across the network of 3.125 GB/s
    inside, across = 2 * 15 / 16 / 100, 2 / 16 / 2 / 3.125
    assert np.isclose(transfer_seconds(two, "all-reduce", GIGA, two.devices), inside + across)
    assert np.isclose(transfer_seconds(two, "collective-permute", GIGA, [two.devices[0], two.devices[16]]), 1 / 3.125)
    gpus = Topology("cpu:16", CHIPS["h100"], list(range(16)), ())
    assert np.isclose(transfer_seconds(gpus, "all-gather", GIGA, list(range(8))), 7 / 8 / 450)
    assert np.isclose(transfer_seconds(gpus, "all-gather", GIGA, [0, 8]), 1 / 2 / 50)
    assert transfer_seconds(Topology("cpu:2", None, [0, 1], ()), "all-gather", GIGA, [0, 1]) == 0.0


def test_short_sides_are_padded_to_the_matrix_unit():
    logits, values = Matmul(1024, 1024, 72, 1000, 1), Matmul(1024, 72, 1024, 1000, 1)
    assert padded_flops(logits, 128) == padded_flops(values, 128) == pytest.approx(1000 * 128 / 72)
    assert padded_flops(Matmul(16384, 1152, 4608, 1000, 1), 128) == 1000
    assert padding(72, 128) == 128 / 72 and padding(128, 128) == 1


def test_bounds_of_a_step():
    chip = CHIPS["v5p"]
    products = [Matmul(4096, 4096, 4096, int(459e9), 3)]
    kernels = [(Kernel("gmm", int(459e9), 8, 2), 0.5), (Kernel("of unknown cost", None, 1, 12), 1.0)]
    found = estimate(chip, products, kernels, int(2765e6), {"fsdp": 0.002, "data": 0.0005})
    assert found.compute == pytest.approx(0.004) and found.memory == pytest.approx(0.001)
    assert found.best == pytest.approx(0.004) and found.worst == pytest.approx(0.0075)
    assert found.links == {"fsdp": 0.002, "data": 0.0005}


# --- what collectives are for --------------------------------------------------------------------------------------

MESH = {"data": 2, "fsdp": 4, "expert": 2, "tensor": 1}
SHAPES = {
    "params/blocks/mlp/fc1/kernel": (12, 512, 2048),
    "params/blocks/moe/experts/fc1/kernel": (12, 8, 512, 1536),
    "params/pos_embed": (256, 512),
}
SPECS = {
    "params/blocks/mlp/fc1/kernel": PartitionSpec(None, "fsdp", "tensor"),
    "params/blocks/moe/experts/fc1/kernel": PartitionSpec(None, "expert", "fsdp", "tensor"),
    "params/pos_embed": PartitionSpec(),
}
KNOWN = parameters_of(SHAPES, SPECS, MESH)
LOOP = (Loop("while.1", "jit(step)/while", 12, True),)


def collective(kind, *shapes, loops=LOOP, op_name="jit(step)/while/body/dot_general", dtype="bf16"):
    arrays = tuple(Array(dtype, shape) for shape in shapes)
    size = sum(array.bytes for array in arrays) * (4 if kind == "all-gather" else 1)
    groups = np.arange(16).reshape(4, 4)
    return Collective(kind, kind, arrays, size, groups, loops, 12 if loops else 1, op_name)


@pytest.mark.parametrize(
    "one, axes, meant",
    [
        (collective("all-gather", (128, 2048)), ("fsdp",), "weights"),
        (collective("reduce-scatter", (512, 2048)), ("fsdp",), "kept"),
        (collective("collective-permute", (64, 2048)), ("fsdp",), "ring"),  # half of a part: both directions
        (collective("collective-permute", (48, 2048)), ("fsdp",), "ring"),  # what padding moved over a part's end
        (collective("collective-permute", (256, 2048)), ("fsdp",), "reshard"),  # more than a part
        (collective("reduce-scatter", (640, 2048), dtype="f32"), ("fsdp",), "kept"),  # 512 rows padded
        (collective("all-reduce", (1, 128, 2048), (2048,)), ("data",), "gradients"),
        (collective("all-reduce", (), dtype="f32"), ("data",), "scalars"),
        (collective("all-gather", (8192, 512), op_name="jit(step)/moe/shard_map/all_gather"), ("expert",), "tokens"),
        (collective("reduce-scatter", (16384, 512), op_name="a/shard_map/reduce_scatter"), ("expert",), "results"),
        (collective("reduce-scatter", (16384, 512), op_name=""), ("expert",), "results"),
        (collective("reduce-scatter", (4, 512, 1536), op_name="a/shard_map/reduce_scatter"), ("fsdp",), "kept"),
        (collective("all-reduce", (8192, 512)), ("tensor",), "partial"),
        (collective("all-to-all", (8192, 512)), ("fsdp",), "reshard"),
        (collective("all-gather", (8192, 512), loops=()), ("data",), "rows"),
    ],
)
def test_purpose_of_a_collective(one, axes, meant):
    assert purpose(one, axes, KNOWN) == meant


def test_parameters_are_known_by_their_sizes():
    assert carried(collective("all-gather", (128, 2048)), KNOWN) == ("params/blocks/mlp/fc1/kernel",)
    assert carried(collective("all-gather", (8192, 512)), KNOWN) == ()


def test_warnings_of_experts_and_of_layers_that_change_how_they_are_split():
    experts, tokens = collective("all-gather", (4, 512, 1536)), collective("all-to-all", (8192, 512))
    found = [(experts, ("expert",), "weights"), (tokens, ("fsdp",), "reshard")]
    (line,) = partition.gathered_experts(found, KNOWN)
    assert "all-gather of experts" in line and "over expert, 302.0 MB" in line
    assert not list(partition.gathered_experts([(experts, ("fsdp",), "weights")], KNOWN))
    (line,) = partition.resharded_layers(found)
    assert "all-to-all of activations bf16[8192, 512] over fsdp inside a loop, 12 times" in line
    assert not list(partition.resharded_layers([(tokens._replace(loops=()), ("fsdp",), "reshard")]))


def test_warnings_of_gradients_that_are_whole():
    split, whole = collective("all-reduce", (512, 2048), (2048,)), collective("all-reduce", (1, 128, 2048))
    (line,) = partition.whole_gradients([(split, ("fsdp",), "gradients")], KNOWN)
    assert "(params/blocks/mlp/fc1/kernel) over fsdp, 25.2 MB a step" in line
    assert not list(partition.whole_gradients([(whole, ("data",), "gradients")], KNOWN))
    assert not list(partition.whole_gradients([(split, ("data", "fsdp"), "gradients")], KNOWN))
    assert not list(partition.whole_gradients([(split, ("fsdp",), "kept")], KNOWN))


def test_warnings_of_activations_that_are_whole():
    """Four samples of 80 tokens on each of 16 devices; each token meets two experts."""
    text = """HloModule jit_step, num_partitions=16

ENTRY %main (x: bf16[320,512]) -> s32[1280,300] {
  %x = bf16[320,512]{1,0} parameter(0)
  %all = bf16[2560,512]{1,0} all-gather(%x), replica_groups={}, metadata={op_name="jit(step)/blocks/mlp/dot"}
  ROOT %pairs = s32[1280,300]{1,0} iota(), iota_dimension=0, metadata={op_name="jit(step)/blocks/moe/shard_map/eq"}
}
"""

    def told(expert_rows):
        program = types.SimpleNamespace(batch=64, tokens=80, expert_rows=expert_rows)
        return list(partition.unsharded_activations(parse(text), MESH, program, KNOWN))

    (line,) = told(640.0)  # 1280 rows are those of two experts, of the tokens of two devices
    assert "whole over data × fsdp: bf16[2560, 512] at jit(step)/blocks/mlp/dot, 2.6 MB" in line
    assert len(told(0.0)) == 2


def test_warnings_of_state_and_of_repeated_work():
    given = {**SPECS, "params/blocks/mlp/fc1/kernel": PartitionSpec(None, None, None)}
    (line,) = partition.replicated_state(SHAPES, SPECS, given, MESH)
    assert "blocks/mlp/fc1/kernel [12, 512, 2048] is whole over fsdp (4)" in line
    assert not list(partition.replicated_state(SHAPES, SPECS, SPECS, MESH))
    assert not list(partition.repeated_work(1.4, 1.0, 0.0, 4))
    assert not list(partition.repeated_work(8.0, 1.0, 0.0, 1))  # one device has all of the work
    assert not list(partition.repeated_work(8.0, 1.0, 6.0, 4))
    (line,) = partition.repeated_work(8.0, 1.0, 0.0, 4)
    assert "8.0 times its share" in line
    (line,) = partition.repeated_work(8.0, 1.0, 2.0, 4)
    assert "6.0 times its share" in line


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("v9:4x4", {}, "give a TPU slice"),
        ("v5p", {}, "give a TPU slice"),
        ("cpu:9000", {}, "XLA_FLAGS"),
        ("cpu:8", {"chip": "h1000"}, "did you mean 'h100'"),
        ("v5e:2x2", {"chip": "h100"}, "says its chip itself"),
        ("cpu:8", {"slices": 2}, "--slices 2"),
        ("v3:2x2", {"slices": 2}, "--slices 2: v3 slices cannot be joined"),
    ],
)
def test_topologies_that_there_are_not(name, options, message):
    with pytest.raises(UserError, match=message):
        get_topology(name, **options)
