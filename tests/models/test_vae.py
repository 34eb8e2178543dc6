"""Stable Diffusion's autoencoder: the original's outputs, published counts, and memory bounds that change no result."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from scaling_perception.models import tiny_vae, vae
from scaling_perception.models.vae_tiles import (
    WHOLE,
    VAELimits,
    blended,
    fade,
    sliced,
    tile_starts,
    tiled_decode,
    tiled_encode,
)
from scaling_perception.models.vae_torch import vae_config_from_json, vae_from_torch
from scaling_perception.support.errors import UserError

NARROW = vae.VAEConfig((8, 16), layers_per_block=1, norm_num_groups=4)
LARGER = ("l1_64x64", "l1_64x96", "l2_64x64")  # too large to travel with the tests


def nhwc(array):
    return np.moveaxis(array, 1, -1)


def apart(got, expected):
    """Largest difference, relative to the largest value."""
    return float(np.max(np.abs(np.asarray(got) - expected)) / np.max(np.abs(expected)))


@pytest.fixture(scope="module")
def narrow():
    """A small network whose biases and norms do something."""
    rng = np.random.default_rng(0)
    params = {}
    for part in vae.PARTS:
        flat = {}
        for name, shape in vae.part_shapes(part, NARROW).items():
            spread = math.prod(shape[:-1]) ** -0.5 if name.endswith("kernel") else 0.1
            flat[name] = (rng.normal(0, spread, shape) + name.endswith("scale")).astype(np.float32)
        params[part] = tiny_vae.unflatten(flat)
    return params


@pytest.mark.parametrize("name", ["small_32x32", *(pytest.param(n, marks=pytest.mark.shared) for n in LARGER)])
def test_the_original_s_outputs(name, golden, request):
    folder = request.getfixturevalue("shared_dir") / "golden" if name in LARGER else golden
    file = folder / "vae" / f"{name}.safetensors"
    with safe_open(file, "np") as handle:
        config = vae_config_from_json(json.loads(handle.metadata()["config"]))
    arrays = load_file(file)
    weights = {k.removeprefix("weights/"): v for k, v in arrays.items() if k.startswith("weights/")}
    params = vae_from_torch(weights, config)
    expected = {k.removeprefix("out/"): nhwc(v) for k, v in arrays.items() if k.startswith("out/")}

    @jax.jit
    def encode(params, images):
        """The network's own moments, and what its last 3x3 convolution gave."""
        made, inside = vae.Encoder(config).apply(
            {"params": params["encoder"]}, images, capture_intermediates=lambda module, _: module.name == "conv_out"
        )
        return made, inside["intermediates"]["conv_out"]["__call__"][0]

    decode = jax.jit(lambda params, z: vae.decode(params, config, z))
    moments, raw = encode(params, nhwc(arrays["in/image"]))
    mean, logvar = vae.split_moments(moments)
    scaled, scaled_logvar = vae.scale_moments(config, mean, logvar)
    attention = vae.Attention(config.norm_num_groups)
    got = {
        "encoder_raw": raw,
        "moments": moments,
        "mean": mean,
        "logvar": logvar,
        "std": np.exp(0.5 * logvar),
        "latent_mode": mean,
        "latent_mode_scaled": scaled,
        "decode_of_mode": decode(params, mean),
        "decode_of_z": decode(params, nhwc(arrays["in/z"])),
        "roundtrip_scaled": decode(params, scaled / config.scaling_factor),
        "mid_attention": attention.apply(
            {"params": params["encoder"]["mid_attention"]}, nhwc(arrays["in/mid_attention"])
        ),
    }
    assert got.keys() == expected.keys()
    for output, value in got.items():
        assert value.shape == expected[output].shape, output
        assert apart(value, expected[output]) < 1e-5, output  # 2e-6; the reference's own noise is up to 6e-6 absolute
    np.testing.assert_allclose(np.exp(0.5 * scaled_logvar), 0.18215 * expected["std"], rtol=1e-5)


def test_log_variances_are_clamped_and_means_are_not():
    both = jnp.asarray([[-99.0, 99.0, -31.0, 21.0], [1.0, 2.0, -30.0, 3.0]])
    mean, logvar = vae.split_moments(both)
    np.testing.assert_array_equal(mean, [[-99, 99], [1, 2]])
    np.testing.assert_array_equal(logvar, [[-30, 20], [-30, 3]])


def test_a_sample_has_the_units_of_its_moments():
    mean, logvar = jnp.full((2, 50, 50, 4), 3.0), jnp.full((2, 50, 50, 4), math.log(4.0))
    drawn = vae.sample(mean, logvar, jax.random.key(0))
    assert abs(drawn.mean() - 3) < 0.05 and abs(drawn.std() - 2) < 0.05
    scaled = vae.sample(*vae.scale_moments(NARROW, mean, logvar), jax.random.key(0))
    np.testing.assert_allclose(scaled, 0.18215 * drawn, rtol=1e-5, atol=1e-6)


def test_published_counts():
    sizes = [sum(map(math.prod, vae.part_shapes(part, vae.VAEConfig()).values())) for part in vae.PARTS]
    assert sizes == [34_163_664, 49_490_199] and sum(sizes) == 83_653_863
    gmacs = [[round(vae.macs(part, vae.VAEConfig(), side, side) / 1e9) for part in vae.PARTS] for side in (256, 512)]
    assert gmacs == [[136, 311], [558, 1257]]


@pytest.mark.parametrize("config", [NARROW, vae.VAEConfig((8, 8, 16), 2, norm_num_groups=8, use_quant_conv=False)])
def test_macs_are_those_of_the_traced_network(config):
    def traced(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            out = equation.outvars[0].aval.shape
            if equation.primitive.name == "conv_general_dilated":
                total += math.prod(out) * math.prod(equation.invars[1].aval.shape[:3])
            elif equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                total += math.prod(out) * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
            inner = [traced(value) for value in inner if hasattr(value, "eqns")]
            branches = [traced(branch.jaxpr) for branch in equation.params.get("branches", ())]  # one for each platform
            total += (sum(inner) + max(branches, default=0)) * equation.params.get("length", 1)
        return total

    params = {part: jax.eval_shape(lambda p=part: vae.init_part(p, config, jax.random.key(0))) for part in vae.PARTS}
    image, side = jnp.zeros((1, 16, 24, 3)), config.factor
    encode = jax.make_jaxpr(lambda p: vae.moments(p, config, image))(params)
    decode = jax.make_jaxpr(lambda p: vae.decode(p, config, jnp.zeros((1, 16 // side, 24 // side, 4))))(params)
    assert traced(encode.jaxpr) == vae.macs("encoder", config, 16, 24)
    assert traced(decode.jaxpr) == vae.macs("decoder", config, 16, 24)


def test_bfloat16_computes_close_by_and_answers_in_float32(narrow):
    images = np.random.default_rng(1).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    trip = jax.jit(
        lambda dtype: vae.decode(narrow, NARROW, vae.encode_moments(narrow, NARROW, images, dtype)[0], dtype),
        static_argnums=0,
    )
    exact, rough = trip("float32"), trip("bfloat16")
    assert exact.dtype == rough.dtype == jnp.float32
    assert 1e-4 < apart(rough, np.asarray(exact)) < 0.05


def test_statistics_of_the_norm_are_exact_over_many_pixels():
    x = np.random.default_rng(0).normal(3, 1, (2, 256, 192, 8)).astype(np.float32)
    params = {"scale": np.full(8, 2, np.float32), "bias": np.full(8, 0.5, np.float32)}
    got = jax.jit(vae.GroupNorm(4).apply)({"params": params}, x)
    wide = x.astype(np.float64).reshape(2, -1, 4, 2)
    unit = (wide - wide.mean((1, 3), keepdims=True)) / np.sqrt(wide.var((1, 3), keepdims=True) + 1e-6)
    np.testing.assert_allclose(got, 2 * unit.reshape(x.shape) + 0.5, atol=1e-5)


def test_attention_in_blocks_of_queries_is_the_same():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 21, 8))
    attend = jax.jit(vae.blockwise_attention, static_argnums=3)
    whole = attend(query, key, value, 21**2)
    for logits in (21, 100):  # one query at a time, blocks with a rest
        np.testing.assert_allclose(attend(query, key, value, logits), whole, atol=1e-6)


def test_few_samples_at_a_time_give_the_whole_batch(narrow):
    z = np.random.default_rng(2).normal(size=(4, 4, 6, 4)).astype(np.float32)
    decode = jax.jit(lambda limits: tiled_decode(narrow, NARROW, z, limits), static_argnums=0)
    whole = decode(WHOLE)
    np.testing.assert_allclose(decode(VAELimits(decode_pixels=2 * 24)), whole, atol=1e-5)
    seen = []

    def network(x):
        seen.append(x.shape[0])
        return 2 * x

    x = np.arange(6 * 4 * 4 * 1, dtype=np.float32).reshape(6, 4, 4, 1)
    for pixels, count in ((0, 6), (1, 1), (4, 1), (8, 2), (16, 3), (20, 3), (24, 6), (99, 6)):  # 4 latent pixels each
        np.testing.assert_array_equal(sliced(network, jnp.asarray(x), pixels, 2), 2 * x)
        assert seen.pop() == count, pixels
        seen.clear()


def test_slices_of_a_batch_on_several_devices_stay_there():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), "data")
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.device_put(np.arange(8 * 4, dtype=np.float32).reshape(8, 2, 2, 1), split)
    run = jax.jit(lambda x: sliced(lambda part: part**2, x, 4 * 4, 1), in_shardings=split, out_shardings=split)
    program = run.lower(x).compile()
    assert "while" in program.as_text()
    assert not any(word in program.as_text() for word in ("all-gather", "all-to-all", "collective-permute"))
    np.testing.assert_array_equal(program(x), np.square(x))


def test_slicing_bounds_the_memory_of_a_batch():
    config = vae.VAEConfig((32, 32, 32, 32), layers_per_block=1)
    decoder = jax.eval_shape(lambda: vae.init_part("decoder", config, jax.random.key(0)))
    z = jax.ShapeDtypeStruct((4, 24, 24, 4), jnp.float32)

    def temporary(limits):
        run = jax.jit(lambda decoder, z: tiled_decode({"decoder": decoder}, config, z, limits))
        return run.lower(decoder, z).compile().memory_analysis().temp_size_in_bytes

    assert temporary(VAELimits(decode_pixels=24**2)) < 0.4 * temporary(WHOLE)  # 0.26


def test_tiles_cover_a_side_and_share_enough():
    for length in range(1, 60):
        for tile, overlap in ((8, 0), (8, 2), (9, 5), (16, 15)):
            starts = tile_starts(length, tile, overlap)
            size = min(tile, length)
            assert starts[0] == 0 and starts[-1] + size == length
            assert all(0 < b - a <= tile - overlap for a, b in zip(starts, starts[1:], strict=False))
            total = np.zeros(2 * length)
            for start, row in zip(starts, fade(starts, size, 2), strict=True):
                assert (row >= 0).all()
                total[2 * start : 2 * (start + size)] += row
            np.testing.assert_allclose(total, 1, atol=1e-6)


def test_a_network_of_single_pixels_does_not_see_the_tiles():
    x = np.random.default_rng(3).normal(size=(2, 13, 22, 3)).astype(np.float32)
    limits = VAELimits(tile=6, overlap=2)
    up = lambda z: jnp.repeat(jnp.repeat(z * 3 + 1, 2, axis=1), 2, axis=2)  # noqa: E731
    np.testing.assert_allclose(blended(up, jnp.asarray(x), limits, 1, 2), up(jnp.asarray(x)), atol=1e-5)
    down = lambda z: z.reshape(2, z.shape[1] // 2, 2, z.shape[2] // 2, 2, 3).mean((2, 4))  # noqa: E731
    big = jnp.asarray(np.repeat(x, 2, axis=1))[:, :, :20]
    np.testing.assert_allclose(blended(down, big, limits, 2, 1), down(big), atol=1e-5)


def test_tiles_of_the_network(narrow):
    """One tile is the whole picture, exactly; several differ where they meet, and elsewhere as far as their norms do.

    The picture repeats itself, so that each tile's statistics are the whole's up to the edges.
    """
    rng = np.random.default_rng(4)
    z = np.tile(rng.normal(size=(1, 4, 4, 4)), (1, 8, 12, 1)).astype(np.float32)
    images = np.tile(rng.uniform(-1, 1, (1, 8, 8, 3)), (1, 8, 12, 1)).astype(np.float32)
    decode = jax.jit(lambda limits: tiled_decode(narrow, NARROW, z, limits), static_argnums=0)
    encode = jax.jit(lambda limits: jnp.stack(tiled_encode(narrow, NARROW, images, limits)), static_argnums=0)
    two = VAELimits(tile=32, overlap=16)  # side by side; they share the latent columns 16 to 32
    one = dataclasses.replace(WHOLE, tile=48)
    for code, side in ((decode, 2), (encode, 1)):
        whole, tiled = np.asarray(code(WHOLE)), np.asarray(code(two))
        assert str(jax.make_jaxpr(lambda c=code: c(one))()) == str(jax.make_jaxpr(lambda c=code: c(WHOLE))())
        assert tiled.shape == whole.shape
        assert 1e-3 < apart(tiled, whole) < 0.07
        for alone in (slice(16 * side), slice(32 * side, None)):
            assert apart(tiled[..., alone, :], whole[..., alone, :]) < 0.03


def test_sizes_that_make_no_network_are_refused(narrow):
    with pytest.raises(UserError, match="image size 20x15 is no multiple of 2"):
        tiled_encode(narrow, NARROW, jnp.zeros((1, 15, 20, 3)))
    with pytest.raises(UserError, match="has 20, which is no multiple of norm_num_groups=32"):
        vae.VAEConfig((20, 64))
    with pytest.raises(UserError, match="layers_per_block has 0"):
        vae.VAEConfig(layers_per_block=0)
    with pytest.raises(UserError, match="block_out_channels is empty"):
        vae.VAEConfig(())
    with pytest.raises(UserError, match="scaling_factor=0"):
        vae.VAEConfig(scaling_factor=0)
    with pytest.raises(UserError, match="overlap=16 is no less than tile=16"):
        VAELimits(tile=16)
    with pytest.raises(UserError, match="decode_pixels=-1"):
        VAELimits(decode_pixels=-1)


def test_a_config_survives_json():
    assert vae.VAEConfig(**json.loads(json.dumps(NARROW.to_dict()))) == NARROW
    assert vae.VAEConfig().factor == 8 and NARROW.factor == 2
