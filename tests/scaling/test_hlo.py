"""Compiled programs read back: loops, collectives, FLOPs and traffic of real ones, and the forms that XLA writes."""

import importlib.util
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from scaling_perception.models.exchange import BACK, OVERFLOW
from scaling_perception.parallel.mesh import make_mesh
from scaling_perception.scaling import collectives, costs, hlo
from scaling_perception.scaling.topologies import get_topology, prepare_environment
from scaling_perception.support.executables import without_jax_cache

SIZES = {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1}


def compiled(function, *arrays, mesh=None, **options):
    shapes = [jax.ShapeDtypeStruct(*array) for array in arrays]
    return hlo.parse(jax.jit(function, **options).lower(*shapes).compile().as_text())


@pytest.fixture(scope="module")
def moved():
    """One of each collective, in two loops of 3 and 5."""
    mesh = make_mesh(**SIZES)

    def body(x, _):
        x = x + jax.lax.all_gather(x, "expert", axis=0, tiled=True).mean()
        x = x + jax.lax.psum(x, ("data", "expert"))
        x = x + jnp.tile(jax.lax.psum_scatter(x, "expert", scatter_dimension=0, tiled=True), (4, 1))
        x = x + jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)
        return x + jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), None

    def local(x):
        def outer(x, _):
            return jax.lax.scan(body, x, None, 5)[0], None

        return jax.lax.scan(outer, x, None, 3)[0]

    spec = PartitionSpec(("data", "expert"))
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=NamedSharding(mesh, spec))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return hlo.parse(jax.jit(mapped).lower(x).compile().as_text())


def test_collectives_of_a_real_program(moved):
    found = {one.kind: one for one in collectives.collectives(moved)}
    axes = {kind: collectives.mesh_axes(one.groups, SIZES) for kind, one in found.items()}
    assert axes == {
        "all-gather": ("expert",),
        "all-reduce": ("data", "expert"),
        "reduce-scatter": ("expert",),
        "all-to-all": ("expert",),
        "collective-permute": ("data",),
    }
    each = 8 * 16 * 4  # bytes of a device's (8, 16) float32
    sizes = {kind: one.bytes for kind, one in found.items()}
    assert sizes == {**dict.fromkeys(axes, each), "all-gather": 4 * each}
    for one in found.values():
        assert (
            one.trips == 15 and [loop.trips for loop in one.loops] == [3, 5] and all(loop.known for loop in one.loops)
        )
    assert "shard_map" in found["all-gather"].op_name
    assert sorted(found["collective-permute"].groups.tolist()) == [[n, (n + 4) % 8] for n in range(8)]


def test_loops_of_unknown_length_are_counted_once_and_told():
    def doubled(x, limit):
        return jax.lax.while_loop(lambda s: s.sum() < limit, lambda s: s @ s, x)

    module = compiled(doubled, ((8, 8), jnp.float32), ((), jnp.float32))
    (loop,) = {loop for place in hlo.places(module) for loop in place.loops}
    assert not loop.known and loop.trips == 1
    assert sum(one.flops * one.trips for one in costs.matmuls(module)) == 2 * 8**3


@pytest.mark.parametrize("unroll", [1, 2])
def test_flops_count_a_loop_as_often_as_it_runs(unroll):
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w, unroll=unroll)[0].sum()

    module = compiled(jax.grad(layers, argnums=(0, 1)), ((32, 48), jnp.float32), ((6, 48, 48), jnp.float32))
    products = costs.matmuls(module)
    assert sum(one.flops * one.trips for one in products) == 3 * 6 * 2 * 32 * 48 * 48
    assert {tuple(sorted((one.m, one.n, one.k))) for one in products} == {(32, 48, 48)}


def test_flops_of_batched_products_and_convolutions():
    attend = compiled(lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k), *[((2, 16, 4, 24), jnp.float32)] * 2)
    assert sum(one.flops for one in costs.matmuls(attend)) == 2 * 2 * 4 * 16 * 16 * 24

    def convolve(x, w):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (2, 2), ((1, 1), (1, 1)), dimension_numbers=dims)

    module = compiled(convolve, ((2, 16, 16, 8), jnp.float32), ((3, 3, 8, 24), jnp.float32))
    (one,) = costs.matmuls(module)
    # along a side 8 outputs meet 3 pixels each, but the first of them 2
    assert one.flops == 2 * 2 * 24 * 8 * (8 * 3 - 1) ** 2 and (one.n, one.k) == (24, 8 * 9)


def test_traffic_takes_of_a_stack_the_layer_that_is_used():
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    layer, rows = 4 * 256 * 256, 4 * 8 * 256
    module = compiled(layers, ((8, 256), jnp.float32), ((32, 256, 256), jnp.float32))
    moved = sum(costs.traffic(module).values())
    assert 32 * layer < moved < 32 * (3 * layer + 8 * rows)  # not 32 times the stack


@pytest.mark.parametrize(
    "text, groups",
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{}, dimensions={0}", [[0, 1, 2, 3]]),
        ("[2,2]<=[4], dimensions={0}", [[0, 1], [2, 3]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, use_global_device_ids=true", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=1,'c'=2] {'a','b'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b','a'}", [[0, 2, 1, 3]]),
        ("mesh['a'=2,'b'=3], device_ids=([3,2]T(1,0)) {'b'}", [[0, 2, 4], [1, 3, 5]]),
        ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", [[0, 2], [1, 3]]),
        ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=2,'b'=4] {'a','b':(1)2}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ],
)
def test_forms_of_replica_groups(text, groups):
    assert collectives.replica_groups(text, 4).tolist() == groups


def test_groups_of_an_unknown_form():
    with pytest.raises(ValueError, match="unknown form"):
        collectives.replica_groups("rings(0,1)", 4)


# As a TPU's program looks: no trip count, the bound handed down from the loop outside, a collective that is carried out
# piece by piece in two fusions, a reduce-scatter that is an all-reduce in a fusion, arrays on the chip (S(1)).
TPU = """HloModule jit_step, is_scheduled=true, num_partitions=4

%all-reduce-scatter.1 (input: f32[8,128]) -> f32[2,128] {
  %input = f32[8,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[8,128]{1,0:T(8,128)} all-reduce(%input), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = f32[2,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={2,128}
}

%piece.1 (a: bf16[64,128]) -> bf16[128,128] {
  %a = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%a), channel_id=5, replica_groups=[2,2]<=[4], dimensions={0}, metadata={op_name="jit(step)/while/body/dot_general"}
}

%piece.2 (a: bf16[64,128]) -> bf16[128,128] {
  %a.1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%a.1), channel_id=5, replica_groups=[2,2]<=[4], dimensions={0}
}

%condition.1 (state: (s32[], s32[], bf16[64,128])) -> pred[] {
  %state = (s32[]{:T(128)}, s32[]{:T(128)}, /*index=2*/bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%state), index=0
  %bound = s32[]{:T(128)} get-tuple-element(%state), index=1
  ROOT %less = pred[]{:T(512)} compare(%n, %bound), direction=LT
}

%body.1 (state: (s32[], s32[], bf16[64,128])) -> (s32[], s32[], bf16[64,128]) {
  %state.1 = (s32[]{:T(128)}, s32[]{:T(128)}, /*index=2*/bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %n.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %bound.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=1
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%state.1), index=2
  %gathered = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kCustom, calls=%piece.1
  %again = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kOutput, calls=%piece.2
  %y = bf16[64,128]{1,0:T(8,128)(2,1)} convolution(%x, %gathered), dim_labels=bf_oi->bf
  %one = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%n.1, %one)
  ROOT %result = (s32[]{:T(128)}, s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%next, %bound.1, %y)
}

ENTRY %main (x: bf16[64,128], g: f32[8,128]) -> (bf16[64,128], f32[2,128]) {
  %x.1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %g = f32[8,128]{1,0:T(8,128)} parameter(1)
  %start = s32[]{:T(128)} constant(0)
  %end = s32[]{:T(128)} constant(9)
  %begin = (s32[]{:T(128)}, s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%start, %end, %x.1)
  %while.1 = (s32[]{:T(128)}, s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) while(%begin), condition=%condition.1, body=%body.1, metadata={op_name="jit(step)/while"}
  %y.1 = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=2
  %part = f32[2,128]{1,0:T(8,128)S(1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(step)/transpose(jvp)/add"}
  ROOT %out = (bf16[64,128]{1,0:T(8,128)(2,1)}, f32[2,128]{1,0:T(8,128)S(1)}) tuple(%y.1, %part)
}
"""  # noqa: E501


def test_what_a_tpu_program_looks_like():
    module = hlo.parse(TPU)
    assert module.partitions == 4 and module.entry == "main"
    gather, scatter = sorted(collectives.collectives(module), key=lambda one: one.kind)
    assert (gather.kind, gather.trips, gather.bytes) == ("all-gather", 5, 128 * 128 * 2)  # 0, 2, 4, 6, 8
    assert gather.loops[0].op_name == "jit(step)/while" and gather.groups.shape == (2, 2)
    assert (scatter.kind, scatter.bytes, scatter.op_name) == (
        "reduce-scatter",
        8 * 128 * 4,
        "jit(step)/transpose(jvp)/add",
    )
    (product,) = costs.matmuls(module)
    assert product == (64, 128, 128, 2 * 64 * 128 * 128, 5)
    # in the loop x is read by both pieces and the product, y is written; outside g is read; the rest is on the chip
    counting = 5 * 3 * 4
    assert sum(costs.traffic(module).values()) == 5 * 4 * (64 * 128 * 2) + 8 * 128 * 4 + counting


_SLICES = "%i, %i, %i, /*index=5*/%i), channel_id=1, replica_groups={{0,1,2,3}}"
_SENT = 'metadata={op_name="jit(step)/shard_map/PLACEragged_all_to_all"}'
EXCHANGE = f"""HloModule jit_step, is_scheduled=true, num_partitions=4

%body.1 (state: (s32[], bf16[64,2,128], bf16[80,2,128])) -> (s32[], bf16[64,2,128], bf16[80,2,128]) {{
  %state = (s32[], bf16[64,2,128], bf16[80,2,128]) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %i = s32[4] broadcast(%n), dimensions={{}}
  %rows = bf16[64,2,128] get-tuple-element(%state), index=1
  %room = bf16[80,2,128] get-tuple-element(%state), index=2
  %more = bf16[80,2,128] ragged-all-to-all(%rows, %room, {_SLICES}, {_SENT.replace("PLACE", "")}
  ROOT %result = (s32[], bf16[64,2,128], bf16[80,2,128]) tuple(%n, %rows, %more)
}}

ENTRY %main (x: bf16[64,2,128], room: bf16[80,2,128], i: s32[4]) -> bf16[64,2,128] {{
  %x = bf16[64,2,128] parameter(0)
  %room = bf16[80,2,128] parameter(1)
  %i = s32[4] parameter(2)
  %there = bf16[80,2,128] ragged-all-to-all(%x, %room, {_SLICES}, {_SENT.replace("PLACE", "")}
  %one = s32[] constant(1)
  %begin = (s32[], bf16[64,2,128], bf16[80,2,128]) tuple(%one, %x, %there)
  %while.1 = (s32[], bf16[64,2,128], bf16[80,2,128]) while(%begin), condition=%condition.1, body=%body.1, metadata={{op_name="jit(step)/shard_map/{OVERFLOW}/while"}}
  %all = bf16[80,2,128] get-tuple-element(%while.1), index=2
  ROOT %back = bf16[64,2,128] ragged-all-to-all(%all, %x, {_SLICES}, {_SENT.replace("PLACE", BACK + "/")}
}}
"""  # noqa: E501


def test_rows_that_are_exchanged():
    """Both ways count the rows of an even load, not the room for more, and not what only an uneven load needs."""
    module = hlo.parse(EXCHANGE)
    there, back = collectives.collectives(module)
    rows = 64 * 2 * 128 * 2
    assert there.kind == back.kind == "ragged-all-to-all" and there.bytes == back.bytes == rows
    nothing = collectives.Parameters({}, {}, {}, {})
    assert [collectives.purpose(one, ("expert",), nothing) for one in (there, back)] == ["tokens", "results"]
    assert sum(costs.traffic(module).values()) == 2 * 2 * rows


KERNELS = """HloModule jit_step, is_scheduled=true, num_partitions=1

ENTRY %main (x: bf16[96,128], w: bf16[4,128,256]) -> bf16[96,256] {
  %x = bf16[96,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[4,128,256]{2,1,0:T(8,128)(2,1)} parameter(1)
  %gmm.1 = bf16[96,256]{1,0:T(8,128)(2,1)} custom-call(%x, %w), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/moe/jit(gmm)/pallas_call"}, backend_config={"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"6291456","transcendentals":"0","bytes_accessed":"4096"}}}
  %other = bf16[96,256]{1,0:T(8,128)(2,1)} custom-call(%gmm.1), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/attn/pallas_call"}, backend_config={"custom_call_config":{"body":"TUzv"}}
  ROOT %room = bf16[96,256]{1,0:T(8,128)(2,1)} custom-call(%other), custom_call_target="ConcatBitcast"
}
"""  # noqa: E501


# An all-gather that begins, goes on beside a product, and ends; a slice that is fetched to the chip ahead of its use.
PIECES = """HloModule jit_step, is_scheduled=true, num_partitions=4

%first (p.0: bf16[64,128]) -> (bf16[64,128], bf16[256,128], u32[]) {
  %p.0 = bf16[64,128]{1,0} parameter(0)
  %all-gather.1 = bf16[256,128]{1,0} all-gather(%p.0), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %start = (bf16[64,128]{1,0}, bf16[256,128]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%between (p.1: bf16[64,128], p.2: bf16[256,128], y: bf16[32,32]) -> (bf16[32,32], bf16[64,128], bf16[256,128]) {
  %p.1 = bf16[64,128]{1,0} parameter(0)
  %p.2 = bf16[256,128]{1,0} parameter(1)
  %y = bf16[32,32]{1,0} parameter(2)
  %all-gather.2 = bf16[256,128]{1,0} all-gather(%p.1), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
  %product = bf16[32,32]{1,0} convolution(%y, %y), dim_labels=bf_io->bf
  ROOT %both = (bf16[32,32]{1,0}, bf16[64,128]{1,0}, bf16[256,128]{1,0}) tuple(%product, %p.1, %all-gather.2)
}

%last (p.3: bf16[64,128], p.4: bf16[256,128]) -> bf16[256,128] {
  %p.3 = bf16[64,128]{1,0} parameter(0)
  %p.4 = bf16[256,128]{1,0} parameter(1)
  %all-gather.3 = bf16[256,128]{1,0} all-gather(%p.3), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %done = bf16[256,128]{1,0} custom-call(%p.3, %p.4, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: bf16[64,128], z: bf16[32,32]) -> bf16[256,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  %z = bf16[32,32]{1,0} parameter(1)
  %one = (bf16[64,128]{1,0}, bf16[256,128]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%first
  %a = bf16[64,128]{1,0} get-tuple-element(%one), index=0
  %b = bf16[256,128]{1,0} get-tuple-element(%one), index=1
  %two = (bf16[32,32]{1,0}, bf16[64,128]{1,0}, bf16[256,128]{1,0}) fusion(%a, %b, %z), kind=kOutput, calls=%between
  %c = bf16[64,128]{1,0} get-tuple-element(%two), index=1
  %d = bf16[256,128]{1,0} get-tuple-element(%two), index=2
  %e = bf16[256,128]{1,0} fusion(%c, %d), kind=kCustom, calls=%last
  %ahead = (bf16[256,128]{1,0}, bf16[16,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%e), slice={[0:16], [0:128]}
  %there = bf16[16,128]{1,0:S(1)} slice-done(%ahead)
  ROOT %out = bf16[256,128]{1,0} bitcast(%e)
}
"""  # noqa: E501


def test_what_is_carried_out_in_pieces_moves_once():
    module = hlo.parse(PIECES)
    (gather,) = collectives.collectives(module)
    assert gather.bytes == 256 * 128 * 2
    gathered, product, slice_ = (64 + 256) * 128 * 2, 2 * 32 * 32 * 2, 16 * 128 * 2
    assert sum(costs.traffic(module).values()) == gathered + product + slice_


def test_kernels_and_what_they_say_they_cost():
    assert costs.kernels(hlo.parse(KERNELS)) == [
        ("jit(step)/moe/jit(gmm)/pallas_call", 2 * 96 * 128 * 256, 96, 1),
        ("jit(step)/attn/pallas_call", None, 96, 1),
    ]
    # an array that is given twice, for two parts of it, is read once
    seen = "  %seen = bf16[96,256]{1,0:T(8,128)(2,1)} bitcast(%gmm.1)\n"
    twice = KERNELS.replace("(%gmm.1)", "(%gmm.1, %gmm.1, %seen)").replace("  %other", f"{seen}  %other")
    assert costs.traffic(hlo.parse(twice)) == costs.traffic(hlo.parse(KERNELS))


def test_text_that_is_none():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("module @jit_step attributes {}")


def test_a_tpu_slice_that_is_not_here(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install 'scaling-perception[tpu]'")
    prepare_environment("v5e:2x2")
    topology = get_topology("v5e:2x2")
    mesh = make_mesh(fsdp=4, devices=topology.devices)
    sharding = partial(NamedSharding, mesh)
    w = jax.ShapeDtypeStruct((12, 512, 512), jnp.bfloat16, sharding=sharding(PartitionSpec(None, "fsdp")))
    x = jax.ShapeDtypeStruct((64, 512), jnp.bfloat16, sharding=sharding(PartitionSpec("fsdp")))

    def layers(x, w):
        def layer(x, w):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), sharding(PartitionSpec("fsdp"))), None

        return jax.lax.scan(layer, x, w)[0]

    lowered = jax.jit(layers, out_shardings=sharding(PartitionSpec("fsdp"))).lower(x, w)
    with without_jax_cache():
        module = hlo.parse(lowered.compile().as_text())
    loops = {loop for place in hlo.places(module) for loop in place.loops}
    assert math.prod(loop.trips for loop in loops) == 12 and all(loop.known for loop in loops)
    done = sum(one.flops * one.trips for one in costs.matmuls(module))
    assert 12 * 2 * 16 * 512 * 512 <= done < 1.1 * 12 * 2 * 16 * 512 * 512
    found = collectives.collectives(module)
    sizes = dict(mesh.shape)
    assert found and all(collectives.mesh_axes(one.groups, sizes) == ("fsdp",) for one in found)
    received = {"all-gather": 3 / 4, "collective-permute": 1.0}
    moved = sum(one.bytes * one.trips * received[one.kind] for one in found)
    assert np.isclose(
        moved, 12 * 512 * 512 * 2 * 3 / 4, rtol=0.01
    )  # the three quarters of each layer that are elsewhere
