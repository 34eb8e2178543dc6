"""Grouped matmuls and MLPs against their oracles: the CPU's loop, the TPU's kernel interpreted, which one is chosen."""

import importlib.util
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_perception.ops import grouped_matmul as ops
from scaling_perception.ops.by_platform import by_platform
from scaling_perception.ops.grouped_mlp import Rows, backward_whole, forward_whole, mlp_backward, mlp_forward

EXPERTS, WIDTH, HIDDEN = 4, 24, 40


def draw(rows, width=WIDTH, hidden=HIDDEN, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (rows, width), (EXPERTS, width, hidden), (EXPERTS, hidden), (rows, hidden)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def oracle_matmul(x, kernel, sizes, bias=None):
    """Every row times every expert's matrix, of which one is kept."""
    owner = jax.nn.one_hot(ops.row_expert(sizes, x.shape[0]), kernel.shape[0], dtype=jnp.float32)
    every = jnp.einsum("md,edf->emf", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    if bias is not None:
        every = every + bias.astype(jnp.float32)[:, None]
    return jnp.einsum("me,emf->mf", owner, every).astype(x.dtype)


def grouped_matmul(x, kernel, sizes, bias=None):
    """The package's kernels as one product with gradients."""
    out = _matmul(x, kernel, sizes)
    return out if bias is None else out + ops.rows_of(bias.astype(x.dtype), sizes, x.shape[0])


@jax.custom_vjp
def _matmul(x, kernel, sizes):
    return ops.times(x, kernel.astype(x.dtype), sizes)


def _backward(kept, gradient):
    x, kernel, sizes = kept
    outer = ops.outer(x, gradient, sizes).astype(kernel.dtype)
    return ops.times(gradient, kernel.astype(x.dtype), sizes, transpose=True), outer, None


_matmul.defvjp(lambda x, kernel, sizes: (_matmul(x, kernel, sizes), (x, kernel, sizes)), _backward)


def close(mine, theirs, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.max(np.abs(a - b)) <= tolerance * max(np.max(np.abs(b)), 1e-3)


SIZES = ([23, 0, 61, 6], [0, 0, 0, 0], [96, 0, 0, 0], [0, 0, 0, 96], [1, 1, 1, 1], [24, 24, 24, 24], [95, 0, 1, 0])


def test_values_and_gradients_equal_the_oracle_for_any_sizes():
    x, kernel, bias, target = draw(96)

    def both(multiply):
        def loss(x, kernel, bias, sizes):
            out = multiply(x, kernel, sizes, bias)
            return jnp.sum(out * target), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))

    mine, oracle = both(grouped_matmul), both(oracle_matmul)
    for sizes in SIZES:
        sizes = jnp.asarray(sizes, jnp.int32)
        found, expected = mine(x, kernel, bias, sizes), oracle(x, kernel, bias, sizes)
        close(found, expected)
        assert not np.asarray(found[1])[int(sizes.sum()) :].any()  # rows past the last expert's
        assert not np.asarray(found[0][0])[int(sizes.sum()) :].any()


def test_bfloat16_has_float32_sums():
    x, kernel, _, target = draw(96)
    sizes = jnp.asarray([50, 0, 40, 6], jnp.int32)
    half = x.astype(jnp.bfloat16), kernel, sizes
    out, back = jax.vjp(lambda x, kernel: grouped_matmul(x, kernel, sizes), half[0], kernel)
    assert out.dtype == jnp.bfloat16
    close(out.astype(jnp.float32), oracle_matmul(x, kernel, sizes), 0.02)
    grads = back(jnp.ones_like(out))
    assert grads[0].dtype == jnp.bfloat16 and grads[1].dtype == jnp.float32
    sums = np.asarray(x.astype(jnp.bfloat16), np.float32)[:50].sum(axis=0)  # exact but for the order of the sum
    np.testing.assert_allclose(grads[1][0], np.tile(sums[:, None], HIDDEN), atol=1e-5)


@pytest.mark.parametrize(("width", "hidden"), [(24, 40), (256, 384)])
def test_megablox_interpreted(width, hidden):
    """Sizes that are one tile and sizes that are several; garbage past the last row is masked."""
    x, kernel, _, target = draw(150, width, hidden)
    for sizes in ([33, 0, 100, 7], [0, 10, 0, 0]):
        sizes = jnp.asarray(sizes, jnp.int32)
        out = ops.times_megablox(x, kernel, sizes, transpose=False, interpret=True)
        close(out, ops.times(x, kernel, sizes))
        assert not np.asarray(out)[int(sizes.sum()) :].any()
        back = ops.times_megablox(target, kernel, sizes, transpose=True, interpret=True)
        close(back, ops.times(target, kernel, sizes, transpose=True))
        outer = ops.outer(x, target, sizes)
        close(ops.outer_megablox(x, target, sizes, interpret=True), outer)
        half = ops.outer(x, target, sizes, jnp.bfloat16)  # summed in float32, rounded once
        assert half.dtype == jnp.bfloat16
        close(half.astype(jnp.float32), outer, 2**-8)


def test_tiles_divide_their_dimension_and_blocks_follow_the_load():
    assert [ops.tile_of(size) for size in (1152, 4608, 384, 640, 192, 48)] == [384, 512, 384, 128, 192, 48]
    assert ops.tile_of(1100) == 0  # no tile divides it and the whole is too large: XLA's own lowering then
    assert [ops.block_rows(rows, 8) for rows in (8, 128, 8192, 10**6)] == [16, 16, 512, 512]
    assert ops.block_rows(0, 8) == 16


def loss(x, kernel, sizes):
    return jnp.sum(grouped_matmul(x, kernel, sizes) ** 2)


def lowered(platform, width=WIDTH):
    x, kernel, _, _ = draw(64, width)
    run = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x, kernel, jnp.asarray([10, 20, 0, 30], jnp.int32))
    return run.lower(lowering_platforms=(platform,)).as_text()


def test_the_platform_is_chosen_when_a_program_is_lowered():
    """A program for a TPU has the TPU's kernels though no TPU is here, and only then."""
    tpu, cpu = lowered("tpu"), lowered("cpu")
    assert tpu.count("tpu_custom_call") == 3 and "tpu_custom_call" not in cpu  # forward, and both gradients
    assert "stablehlo.while" in cpu and "ragged_dot" not in tpu + cpu
    odd = lowered("tpu", 1100)
    assert "tpu_custom_call" not in odd and "ragged_dot" in odd


def test_one_warning_on_a_gpu_without_its_kernels(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tokamax" else find(name, *rest)
    )
    ops._warn_of_dense_lowering.cache_clear()
    with pytest.warns(UserWarning, match=r"pip install 'scaling-perception\[gpu-kernels\]'") as seen:
        text = lowered("cuda")
    assert len(seen) == 1 and "ragged_dot" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowered("cuda")


def test_by_platform_outside_jit_and_for_several_platforms():
    def shape(x, factor):
        return {"out": jax.ShapeDtypeStruct(x.shape, x.dtype)}

    scale = by_platform(
        "scale",
        shape,
        lambda x, factor: {"out": -x},
        cpu=lambda x, factor: {"out": factor * x},
        tpu=lambda x, factor: 0,
    )
    np.testing.assert_array_equal(scale(jnp.ones(3), factor=2.0)["out"], 2.0)
    text = (
        jax.jit(lambda x: scale(x, factor=2.0)).trace(jnp.ones(3)).lower(lowering_platforms=("cpu", "cuda")).as_text()
    )
    assert "stablehlo.negate" in text and "stablehlo.multiply" in text


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_the_mlp_in_blocks_equals_the_mlp_as_a_chain_of_grouped_matmuls(kind):
    """The first runs on CPUs, the second elsewhere; forward, and every gradient."""
    x, kernel, bias, _ = draw(30)
    narrow = 0.2 * kernel.swapaxes(1, 2)
    experts = {"gate": {"kernel": kernel}, "up": {"kernel": 0.5 * kernel}, "down": {"kernel": narrow}}
    if kind == "gelu":
        experts = {"fc1": {"kernel": kernel, "bias": bias}, "fc2": {"kernel": narrow, "bias": bias[:, :WIDTH]}}
    rng = np.random.default_rng(0)
    token = jnp.asarray(rng.integers(0, 30, 64), jnp.int32)
    scale, gradient = jnp.asarray(rng.uniform(0, 1, 64), jnp.float32), jnp.asarray(rng.standard_normal((30, WIDTH)))
    gradient = gradient.astype(jnp.float32)
    for sizes in ([20, 0, 17, 7], [0, 48, 0, 0]):
        rows = Rows(token, scale, jnp.asarray(sizes, jnp.int32))
        used = sum(sizes)
        out, hidden = mlp_forward(x, rows, experts, kind, 16, True)
        whole, kept = forward_whole(x, rows, experts, kind, 16, True)
        close((out, [part[:used] for part in hidden]), (whole, [part[:used] for part in kept]))
        assert not np.asarray(out)[used:].any() and not np.asarray(whole)[used:].any()
        np.testing.assert_array_equal(mlp_forward(x, rows, experts, kind, 16, False)[0], out)
        found = mlp_backward(x, rows, experts, hidden, gradient, kind, 16)
        close(found, backward_whole(x, rows, experts, kept, gradient, kind, 16))
