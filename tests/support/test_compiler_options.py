"""Options that the compiler is given for graphs with convolutions: only where it knows them, and never a user's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_perception.support import compiler_options


def convolved(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.fixture
def fresh():
    compiler_options.convolving.cache_clear()
    yield
    compiler_options.convolving.cache_clear()


@pytest.mark.parametrize("window_sums", [False, True])
def test_convolutions_are_the_compilers_own_and_as_exact(fresh, window_sums):
    options = compiler_options.convolving("cpu", window_sums)
    assert options  # of the versions that this package takes
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 9, 7, 5)).astype(np.float32), rng.normal(size=(3, 3, 5, 6)).astype(np.float32)
    compiled = jax.jit(convolved).lower(x, kernel).compile(options)
    assert "ynn" not in compiled.as_text()
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + 9, j : j + 7] @ kernel[i, j].astype(np.float64) for i in range(3) for j in range(3)]
    np.testing.assert_allclose(compiled(x, kernel), sum(shifted), rtol=0, atol=1e-5)


def test_window_sums_are_the_compilers_own_where_asked_and_reductions_the_librarys(fresh):
    x = jnp.ones((2, 64, 64, 8))

    def text(function, window_sums):
        return jax.jit(function).lower(x).compile(compiler_options.convolving("cpu", window_sums)).as_text()

    assert "ynn" in text(lambda x: x.max(axis=(1, 2)), False)
    assert "ynn" not in text(lambda x: x.max(axis=(1, 2)), True)


def test_other_platforms_and_a_users_own_choice_are_left_alone(fresh, monkeypatch):
    assert compiler_options.convolving("gpu") == compiler_options.convolving("tpu") == {}
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT")
    assert compiler_options.convolving("cpu") == {}


def test_a_compiler_that_does_not_know_the_option_goes_without(fresh, monkeypatch):
    monkeypatch.setattr(compiler_options, "_LIBRARY", "xla_cpu_no_such_option")
    assert compiler_options.convolving("cpu") == {}
    assert jax.jit(jnp.sin).lower(0.0).compile(compiler_options.convolving("cpu"))(0.0) == 0.0
