"""The TPU's attention kernel, run by an interpreter, against the oracle; and that the compilers take it."""

import contextlib
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from scaling_perception.models.presets import at_resolution, get_preset
from scaling_perception.ops import flash
from scaling_perception.ops.attention import _warn, attention, attention_einsum, split_heads
from scaling_perception.ops.flash import flash_backward, flash_forward, local_plan, plan
from scaling_perception.parallel.mesh import make_mesh

DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"


# Attention of a4, XL/2 and a6 at 512 pixels, of two heads at 720, and of XL/2 at 1024
SHAPES = [(1024, 16, 64), (1024, 16, 72), (1024, 16, 112), (2048, 2, 64), (4096, 16, 72)]


def draw(shape, dtype):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(4))


def check(shape, dtype, mesh=None):
    """Values and gradients of the kernel are the oracle's; returns the kernel's."""
    *inputs, gradient = draw(shape, dtype)

    @jax.jit
    def kernel(*arrays):
        return flash_forward(*arrays[:3], mesh, True), *flash_backward(*arrays, mesh, True)

    @jax.jit
    def oracle(*arrays):
        out, pull = jax.vjp(attention_einsum, *(array.astype(jnp.float32) for array in arrays[:3]))
        return out, *pull(arrays[3].astype(jnp.float32))

    found = kernel(*inputs, gradient)
    for name, own, true in zip(("out", "dq", "dk", "dv"), found, oracle(*inputs, gradient), strict=True):
        own, true = np.asarray(own, np.float64), np.asarray(true, np.float64)
        tolerance = 2e-6 if dtype == jnp.float32 else 0.02
        assert np.abs(own - true).max() < tolerance * np.abs(true).max(), name
    assert all(array.dtype == dtype for array in found)
    return found


@pytest.mark.parametrize(
    "shape, dtype, lanes",
    [
        ((1, 130, 2, 64), jnp.bfloat16, 128),  # two heads in a tile; keys that are padding
        ((1, 256, 16, 16), jnp.float32, 128),  # two visits
        ((1, 130, 2, 72), jnp.float32, 144),  # a head in two tiles
    ],
)
def test_values_and_gradients(shape, dtype, lanes):
    assert plan(*shape[1:], dtype, flash.SMALL).lanes == lanes
    check(shape, dtype)


@pytest.mark.parametrize(
    "heads, size, visits", [(16, 16, 2), (4, 32, 1)], ids=["heads of two visits", "gradients in one array"]
)
def test_query_key_and_value_are_read_out_of_the_projection(heads, size, visits):
    shape, rng = (2, 128, heads, size), np.random.default_rng(0)
    qkv, gradient = (jnp.asarray(rng.standard_normal((2, 128, n * heads * size)), jnp.float32) for n in (3, 1))
    assert flash.fits_projection(None, shape, jnp.float32)
    assert heads * size // local_plan(None, shape, jnp.float32).lanes == visits
    mesh = make_mesh(data=2, devices=jax.devices()[:2]) if visits == 1 else None
    own = flash.projection_forward(qkv, heads=heads, mesh=mesh, interpret=True)
    back = flash.projection_backward(qkv, gradient, heads=heads, mesh=mesh, interpret=True)
    true, pull = jax.vjp(lambda qkv: attention_einsum(*split_heads(qkv, heads)).reshape(2, 128, -1), qkv)
    np.testing.assert_allclose(own, true, atol=2e-6)
    np.testing.assert_allclose(back, pull(gradient)[0], atol=4e-6)


def test_a_projection_that_would_be_padded_or_whose_heads_are_split_is_cut_up():
    bfloat16 = jnp.bfloat16
    assert not flash.fits_projection(None, (2, 130, 2, 64), bfloat16)  # tokens
    assert not flash.fits_projection(None, (2, 4096, 16, 72), bfloat16)  # heads
    assert not flash.fits_projection(make_mesh(data=4, tensor=2), (8, 128, 4, 32), bfloat16)
    assert flash.fits_projection(make_mesh(data=4, fsdp=2), (8, 128, 4, 32), bfloat16)


def test_padded_heads_and_queries_in_parts(monkeypatch):
    too_few = flash._taken(7, 384, 144, 128, 4) - 1  # a byte too few for the heads as they are
    monkeypatch.setattr(flash, "SMALL", too_few)  # of a kind of device that is not in the table
    assert plan(384, 2, 72, jnp.float32, too_few) == local_plan(None, (1, 384, 2, 72), jnp.float32)
    assert plan(384, 2, 72, jnp.float32, too_few) == (128, 128, 384, 128)
    check((1, 384, 2, 72), jnp.float32)


def test_on_a_mesh():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shape = (4, 128, 4, 32)
    assert local_plan(mesh, shape, jnp.float32).lanes == 64  # each device has two of the four heads
    for array in check(shape, jnp.float32, mesh):
        assert array.sharding.shard_shape(shape) == (1, 128, 2, 32)
    assert flash.mesh_spec(mesh, (3, 128, 3, 32)) == jax.sharding.PartitionSpec(None, None, None)


def test_where_the_kernel_is_not_for_the_arrays():
    large = flash.LARGE
    assert plan(96, 4, 32, jnp.float32, large) is None  # few tokens
    assert plan(256, 1, 64, jnp.float32, large) is None  # an autoencoder's head
    assert plan(256, 8, 136, jnp.float32, large) is None and plan(256, 8, 20, jnp.float32, large) is None
    assert plan(256, 8, 64, jnp.float16, large) is None
    assert plan(4096, 16, 72, jnp.bfloat16, large).size == 128  # sixteen heads at once are too much for the chip
    assert plan(4096, 16, 72, jnp.bfloat16, flash.SMALL) is None  # not even one head fits on a v4
    assert plan(256, 16, 64, jnp.bfloat16, 0) is None


def test_blocks_follow_the_devices_of_the_mesh(monkeypatch):
    """Not those of this process: a program may be compiled for chips that are not here."""

    def planned(kind):
        monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
        return local_plan(None, (8, 1024, 16, 72), jnp.bfloat16)

    large, small = planned("TPU v5 lite"), planned("TPU v4")
    assert large == (72, 1152, 1024, 256) and small == (128, 256, 1024, 256)
    assert planned("TPU v9") == small and planned("TPU v3") is None
    monkeypatch.undo()
    mesh = make_mesh(devices=jax.devices()[:1])  # a CPU: no kind of the table
    monkeypatch.setitem(flash.MEMORY, jax.devices()[0].device_kind, flash.LARGE)
    assert local_plan(mesh, (8, 1024, 16, 72), jnp.bfloat16) == large
    monkeypatch.setattr(jax, "devices", lambda: pytest.fail("the mesh says which devices"))
    assert flash.device_memory(mesh) == flash.LARGE


def test_each_platform_gets_its_program():
    def text(platform, tokens):
        shape = jax.ShapeDtypeStruct((2, tokens, 4, 32), jnp.bfloat16)
        gradient = jax.grad(lambda *arrays: attention(*arrays).astype(jnp.float32).sum(), argnums=(0, 1, 2))
        return jax.jit(gradient).trace(shape, shape, shape).lower(lowering_platforms=(platform,)).as_text()

    assert text("tpu", 256).count("@tpu_custom_call") == 1  # backward alone: nobody asks for the result
    assert "x256x256" not in text("tpu", 256)
    for platform, tokens in (("tpu", 64), ("cpu", 128), ("cuda", 128)):
        assert "custom_call @tpu" not in text(platform, tokens)


def test_heads_are_split_alike_everywhere():
    qkv = jnp.arange(2 * 3 * 24.0).reshape(2, 3, 24)
    query, key, value = split_heads(qkv, 2)
    np.testing.assert_array_equal(query, qkv[..., :8].reshape(2, 3, 2, 4))
    np.testing.assert_array_equal(key, qkv[..., 8:16].reshape(2, 3, 2, 4))
    np.testing.assert_array_equal(value, qkv[..., 16:].reshape(2, 3, 2, 4))
    text = jax.jit(split_heads, static_argnums=1).trace(qkv, 2).lower(lowering_platforms=("tpu",)).as_text()
    assert "transpose" not in text


def test_the_table_of_the_docs():
    rows = re.findall(r"^\| ([\w/, -]+) \| (\d+) \| (\d+) \| (\d+) in (\d+) \|", DOCS.read_text(), re.MULTILINE)
    told = {name.strip() for row in rows for name in row[0].split(",")}
    assert told == {"a1", "a2", "a3", "a4", "a5", "a6", "S/2", "B/2", "L/2", "XL/2"}
    for names, heads, head_dim, together, lanes in rows:
        for name in names.split(","):
            for pixels in (256, 512):
                config = at_resolution(get_preset(name.strip()), pixels)
                size = config.dim // config.heads
                how = plan(config.tokens, config.heads, size, jnp.bfloat16, flash.LARGE)
                assert (config.heads, size) == (int(heads), int(head_dim))
                assert how.size == size and (how.lanes // size, how.lanes) == (int(together), int(lanes))


def topology(name):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install 'scaling-perception[tpu]'")
    from scaling_perception.scaling.topologies import prepare_environment

    prepare_environment("v5e:2x2")  # the same variables for every chip
    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except Exception as error:  # libtpu raises several kinds
        pytest.skip(f"this libtpu has no {name}: {str(error)[:80]}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "chip", ["v2:2x2", "v3:2x2", "v4:2x2x1", "v4 lite:2x2", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_generation_compiles_its_blocks(chip, shape):
    """`pytest -m slow -k generation tests/ops/test_flash.py`, where libtpu is: the kernel where the chip has room,
    else plain attention; never a program that does not compile."""
    mesh = make_mesh(devices=topology(chip)[:1])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    array = jax.ShapeDtypeStruct((2, *shape), jnp.bfloat16, sharding=place)
    gradient = jax.grad(
        lambda *arrays: jnp.square(attention(*arrays, mesh).astype(jnp.float32)).sum(), argnums=(0, 1, 2)
    )
    fits = local_plan(mesh, array.shape, array.dtype) is not None
    with contextlib.nullcontext() if fits else pytest.warns(UserWarning, match="is not fused"):
        _warn.cache_clear()
        text = jax.jit(gradient).lower(array, array, array).compile().as_text()
    assert bool(re.search(r"attention_backward.*tpu_custom_call", text)) == fits
    assert fits == (flash.device_memory(mesh) > flash.SMALL or bool(flash.device_memory(mesh) and shape[0] < 4096))


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("preset, pixels", [("a1", 256), ("a3", 256), ("XL/2", 512)])
def test_compilers_take_it(chip, preset, pixels):
    """`pytest -m slow tests/ops/test_flash.py` where libtpu is; on one device and on four, under remat and the scan of
    layers. Nothing but weights is gathered, and there is no array of logits."""
    import dataclasses

    from scaling_perception.models.dit import DiT, abstract_params
    from scaling_perception.parallel.mesh import batch_sharding, replicated

    devices = topology(chip)[:4]
    config = dataclasses.replace(at_resolution(get_preset(preset), pixels), depth=2)
    for mesh in (make_mesh(devices=devices[:1]), make_mesh(data=1, fsdp=4, devices=devices)):
        whole, split = replicated(mesh), batch_sharding(mesh)
        model, size = DiT(config, dtype=jnp.bfloat16, remat=True, mesh=mesh), config.input_size

        def shape(sizes, dtype=jnp.float32, place=split):
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

        def loss(params, x, t, label, model=model):
            return jnp.square(model.apply({"params": params}, x, t, label)).mean()

        params = jax.tree.map(lambda leaf, at=whole: shape(leaf.shape, leaf.dtype, at), abstract_params(config))
        given = shape((8, size, size, config.input_channels)), shape((8,)), shape((8,), jnp.int32)
        text = jax.jit(jax.grad(loss)).lower(params, *given).compile().as_text()
        assert re.search(r"attention_forward.*tpu_custom_call", text), (preset, chip)
        assert re.search(r"attention_backward.*tpu_custom_call", text)
        assert f",{config.tokens},{config.tokens}]" not in text
        moved = [line for line in text.splitlines() if re.search(r" all-(gather|to-all)(-start)?\(", line)]
        assert not [line for line in moved if "attn" in line]


@pytest.mark.device
@pytest.mark.parametrize("head_dim", [16, 64, 72])
def test_on_an_accelerator(head_dim):
    """`pytest -m device tests/ops/test_flash.py` on a machine with a GPU or TPU: what runs there is the oracle's."""
    if jax.default_backend() == "cpu":
        pytest.skip("needs an accelerator")
    *inputs, gradient = draw((2, 256, 16, head_dim), jnp.bfloat16)

    @jax.jit
    def fused(*arrays):
        out, pull = jax.vjp(attention, *arrays[:3])
        return out, *pull(arrays[3])

    @jax.jit
    def oracle(*arrays):
        with jax.default_matmul_precision("float32"):
            out, pull = jax.vjp(attention_einsum, *(array.astype(jnp.float32) for array in arrays[:3]))
            return out, *pull(arrays[3].astype(jnp.float32))

    text = fused.lower(*inputs, gradient).compile().as_text()
    assert "cudnn" in text or "tpu_custom_call" in text
    for own, true in zip(fused(*inputs, gradient), oracle(*inputs, gradient), strict=True):
        own, true = np.asarray(own, np.float64), np.asarray(true, np.float64)
        assert np.abs(own - true).max() < 0.02 * np.abs(true).max()
