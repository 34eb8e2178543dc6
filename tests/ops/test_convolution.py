"""The kernels for CPUs against formulas in float64 and XLA's programs, and where they are used."""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_perception.models import lite0, vae
from scaling_perception.models.autoencoders import load_autoencoder
from scaling_perception.models.compute import graph_macs
from scaling_perception.ops import convolution as ops
from scaling_perception.ops.convolution import How, conv_general_dilated, convolution, inverted_bottleneck
from scaling_perception.support import native

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="needs a C++ compiler")
# (B, H, W, C, O), side, stride, padding, activation, residual. Winograd's: sides of 3 at stride 1 with whole vectors of
# channels (16 are whole on every processor); odd sides, one pixel, more tiles than are taken at a time
CASES = [
    ((2, 6, 8, 16, 32), 3, 1, ((1, 1), (1, 1)), "relu", True),
    ((1, 7, 5, 48, 16), 3, 1, ((1, 1), (1, 1)), "none", False),
    ((1, 1, 1, 16, 16), 3, 1, ((1, 1), (1, 1)), "relu6", False),
    ((1, 3, 150, 16, 16), 3, 1, ((0, 1), (2, 0)), "none", True),
    ((3, 40, 4, 32, 64), 3, 1, ((1, 1), (1, 1)), "relu", False),
    ((2, 6, 9, 3, 20), 3, 1, ((1, 1), (1, 1)), "relu", True),
    ((1, 9, 6, 16, 16), 3, 2, ((1, 1), (1, 1)), "none", False),
    ((2, 8, 8, 5, 7), 3, 2, ((0, 1), (0, 1)), "relu6", True),
    ((1, 5, 6, 8, 4), 1, 1, ((0, 0), (0, 0)), "none", True),
    ((1, 6, 7, 4, 16), 5, 1, ((2, 2), (2, 2)), "relu", False),
]
# (B, H, W, C, inner, O), side, stride, residual; inner = C: nothing expands
BOTTLENECKS = [
    ((1, 8, 8, 16, 96, 24), 3, 2, False),
    ((2, 9, 7, 24, 48, 24), 3, 1, True),
    ((3, 6, 11, 40, 80, 40), 5, 1, True),
    ((1, 7, 10, 8, 32, 20), 5, 2, False),
    ((2, 5, 4, 32, 32, 16), 3, 1, False),
    ((1, 1, 1, 16, 16, 16), 5, 1, True),
    ((1, 3, 200, 8, 16, 8), 3, 1, True),
]


@pytest.fixture
def used(monkeypatch):
    """On whatever processor, as in a process with one device."""
    monkeypatch.setenv(native.NATIVE, str(native.folder() or Path(tempfile.gettempdir()) / "scaling-perception-native"))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    native._registered.cache_clear()
    yield
    native._registered.cache_clear()


def draw(case):
    (batch, height, width, ins, outs), side, stride, padding, activation, adds = case
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((batch, height, width, ins)), rng.standard_normal((side, side, ins, outs))
    kernel, bias = kernel * 2 / np.sqrt(kernel[..., 0].size), rng.standard_normal(outs)
    shape = [batch] + [
        (length + sum(pad) - side) // stride + 1 for length, pad in zip((height, width), padding, strict=True)
    ]
    residual = rng.standard_normal((*shape, outs)) if adds else None
    gradient = rng.standard_normal((*shape, outs))
    arrays = [None if array is None else jnp.asarray(array, jnp.float32) for array in (x, kernel, bias, residual)]
    return arrays, jnp.asarray(gradient, jnp.float32), How(stride, padding, activation)


def in_double(x, kernel, bias, residual, how):
    x, kernel, bias = (np.asarray(array, np.float64) for array in (x, kernel, bias))
    x = np.pad(x, ((0, 0), *how.padding, (0, 0)))
    sides = kernel.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(x, sides, (1, 2))[:, :: how.stride, :: how.stride]
    out = np.einsum("bhwcij,ijco->bhwo", windows, kernel) + bias + (0 if residual is None else np.asarray(residual))
    return np.clip(out, {"none": -np.inf}.get(how.activation, 0), {"relu6": 6}.get(how.activation, np.inf))


def both(function, gradient, *arrays):
    out, pull = jax.vjp(function, *arrays)
    return out, pull(gradient)


def assert_close(found, wanted, tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for own, true in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(own, true, atol=tolerance * max(1.0, np.abs(true).max()))


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_are_those_of_the_formula_and_gradients_those_of_xla(case, used):
    arrays, gradient, how = draw(case)
    way = functools.partial(convolution, how=how)
    assert "convolution_" in jax.jit(way).lower(*arrays).as_text()
    found = jax.jit(functools.partial(both, way))(gradient, *arrays)
    np.testing.assert_allclose(found[0], in_double(*arrays, how), atol=5e-6 * max(1.0, np.abs(found[0]).max()))
    assert_close(found[1], both(functools.partial(ops._by_xla, how=how), gradient, *arrays)[1], 5e-6)


def test_xla_s_program_is_the_formula():
    for case in CASES[:2] + CASES[-3:]:
        arrays, _, how = draw(case)
        np.testing.assert_allclose(convolution(*arrays, how=how), in_double(*arrays, how), atol=2e-5)


def draw_bottleneck(case):
    (batch, height, width, ins, inner, outs), side, stride, residual = case
    rng = np.random.default_rng(1)

    def layer(*shape):
        kernel = rng.standard_normal(shape) * 2 / np.sqrt(np.prod(shape[:-1]))
        return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(rng.random(shape[-1]), jnp.float32)}

    weights = {"depth": layer(side, side, inner), "project": layer(inner, outs)}
    weights |= {} if ins == inner else {"expand": layer(ins, inner)}
    x = jnp.asarray(3 * rng.standard_normal((batch, height, width, ins)), jnp.float32)
    return x, weights, {"stride": stride, "residual": residual}


@needs_compiler
@pytest.mark.parametrize("case", BOTTLENECKS, ids=str)
def test_a_bottleneck_is_that_of_xla(case, used):
    x, weights, how = draw_bottleneck(case)
    way = functools.partial(inverted_bottleneck, **how)
    assert "inverted_bottleneck_" in jax.jit(way).lower(x, weights).as_text()
    wanted = jax.jit(functools.partial(ops._bottleneck_by_xla, **how))(x, weights)
    gradient = jnp.asarray(np.random.default_rng(2).standard_normal(wanted.shape), jnp.float32)
    found = jax.jit(functools.partial(both, way))(gradient, x, weights)
    assert_close(found[0], wanted, 5e-6)
    assert_close(found[1], both(functools.partial(ops._bottleneck_by_xla, **how), gradient, x, weights)[1], 1e-5)


@needs_compiler
def test_samples_do_not_depend_on_their_batch(used):
    for case in (CASES[0], CASES[5]):
        arrays, _, how = draw(((5, *case[0][1:]), *case[1:]))
        x, kernel, bias, residual = arrays
        whole = convolution(*arrays, how=how)
        np.testing.assert_array_equal(whole[2:3], convolution(x[2:3], kernel, bias, residual[2:3], how))
        mapped = jax.vmap(lambda x, r, k=kernel, b=bias, how=how: convolution(x[None], k, b, r[None], how)[0])
        np.testing.assert_array_equal(whole, mapped(x, residual))
    x, weights, how = draw_bottleneck(((4, *BOTTLENECKS[1][0][1:]), *BOTTLENECKS[1][1:]))
    np.testing.assert_array_equal(
        inverted_bottleneck(x, weights, **how)[1:2], inverted_bottleneck(x[1:2], weights, **how)
    )


@needs_compiler
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_no_number_is_not_limited_away(wrong, used):
    for case in (CASES[2], CASES[7]):
        arrays, _, how = draw(case)
        found = convolution(arrays[0].at[0, 0, 0, 0].set(np.nan), *arrays[1:], how)
        assert np.isnan(found[0]).any()
    x, weights, how = draw_bottleneck(BOTTLENECKS[1])
    found = inverted_bottleneck(x.at[0, 0, 0, 0].set(wrong), weights, **how)
    wanted = ops._bottleneck_by_xla(x.at[0, 0, 0, 0].set(wrong), weights, **how)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(wanted))


@needs_compiler
def test_where_they_are_used(used, monkeypatch):
    arrays, _, how = draw(CASES[0])
    way = functools.partial(convolution, how=how)

    def lowered(*arrays, platform="cpu"):
        fresh = jax.jit(lambda *arrays: way(*arrays))  # nothing traced before
        return fresh.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()

    target = native.targets()["convolution"]
    assert target in lowered(*arrays)
    for platform in ("tpu", "cuda"):
        assert target not in lowered(*arrays, platform=platform)
    assert target not in lowered(*(array.astype(jnp.bfloat16) for array in arrays))
    # multiply-accumulates are counted in either program
    macs = 9 * 16 * arrays[3].size
    assert graph_macs(lambda *arrays: way(*arrays), *arrays) == macs
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert target not in lowered(*arrays) and graph_macs(lambda *arrays: way(*arrays), *arrays) == macs
    x, weights, how = draw_bottleneck(((1, 4, 4, 8, 24, 8), 3, 1, True))  # no whole vectors inside
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert (
        "inverted_bottleneck_" not in jax.jit(functools.partial(inverted_bottleneck, **how)).lower(x, weights).as_text()
    )


def test_flax_s_convolution_is_the_same():
    arrays, _, _ = draw(CASES[6])
    found = conv_general_dilated(arrays[0], arrays[1], (2, 2), ((1, 1), (1, 1)), lhs_dilation=(1, 1))
    np.testing.assert_array_equal(found, convolution(arrays[0], arrays[1], how=How(2)))


@needs_compiler
def test_the_shipped_autoencoder_and_its_features(used, monkeypatch):
    autoencoder = load_autoencoder("tiny+lite0")
    picture = np.random.default_rng(0).uniform(-1, 1, (1, 32, 64, 3)).astype(np.float32)

    def run(picture):
        latents = autoencoder.encode(autoencoder.params, picture)[0]
        return latents, autoencoder.decode(autoencoder.params, latents[..., :4])

    text = jax.jit(run).lower(picture).as_text()
    assert text.count("inverted_bottleneck_") >= len(lite0.blocks()) and text.count("convolution_") > 40
    found = jax.jit(run)(picture)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert_close(found, jax.jit(lambda picture: run(picture))(picture), 1e-5)


@needs_compiler
def test_stable_diffusion_s_autoencoder(used, monkeypatch):
    config = vae.VAEConfig(block_out_channels=(32, 48), norm_num_groups=8, layers_per_block=1)
    params = {part: vae.init_part(part, config, jax.random.key(0)) for part in ("encoder", "decoder")}
    picture = np.random.default_rng(0).uniform(-1, 1, (1, 16, 24, 3)).astype(np.float32)

    def run(picture):
        moments = vae.moments(params, config, picture)
        return moments, vae.decode(params, config, moments[..., : config.latent_channels])

    assert jax.jit(run).lower(picture).as_text().count("convolution_") > 20
    found = jax.jit(run)(picture)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert_close(found, jax.jit(lambda picture: run(picture))(picture), 2e-5)


@pytest.mark.parametrize(("side", "kernel", "stride"), [(8, 3, 1), (8, 3, 2), (9, 5, 2), (7, 5, 1)])
def test_a_sum_of_shifted_products_is_the_depthwise_convolution(side, kernel, stride):
    rng = np.random.default_rng(side)
    x, weights = rng.normal(size=(2, side, side + 1, 3)), rng.normal(size=(kernel, kernel, 3))
    wanted = jax.lax.conv_general_dilated(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(weights[:, :, None], jnp.float32),
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
    )
    found = ops._depthwise(jnp.asarray(x, jnp.float32), weights.astype(np.float32), stride)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
