import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from scaling_perception.diffusion import noise
from scaling_perception.support.errors import UserError


@pytest.mark.parametrize("strategy", noise.STRATEGIES)
def test_ladder_and_sum_agree_with_the_reference(golden, strategy):
    data = load_file(golden / "ddim" / "multi_res_noise.safetensors")
    case = f"{strategy}_0.9"
    sizes = noise.ladder(strategy, 24, 32, data.get(f"in/{case}/uniform", ()))
    np.testing.assert_array_equal(sizes, data[f"out/{case}/sizes"])
    draws = [data[f"in/{case}/draw{i}"].transpose(0, 2, 3, 1) for i in range(len(sizes) + 1)]
    got = noise.combine_levels(draws, 0.9)
    np.testing.assert_allclose(got, data[f"out/{case}/noise"].transpose(0, 2, 3, 1), atol=1e-5)


def test_per_sample_strength_and_per_sample_deviation():
    rng = np.random.default_rng(0)
    draws = [rng.standard_normal((2, h, w, 3)).astype(np.float32) for h, w in ((8, 8), (4, 4), (2, 2))]
    both = noise.combine_levels(draws, np.array([0.0, 0.7]), per_sample=True)
    for i, strength in enumerate((0.0, 0.7)):
        alone = noise.combine_levels([draw[i : i + 1] for draw in draws], strength)
        np.testing.assert_allclose(both[i : i + 1], alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(both.std(axis=(1, 2, 3), ddof=1), 1, rtol=1e-5)
    # The published division by one deviation of the batch leaves the samples unequal.
    batch = noise.combine_levels(draws, np.array([0.0, 0.7])).std(axis=(1, 2, 3))
    assert batch[0] < 0.99 < 1.01 < batch[1]


def test_annealed_strength_is_plain_noise_at_zero():
    np.testing.assert_allclose(noise.annealed_strength(np.array([0, 500, 1000])), [0, 0.45, 0.9])


def test_pyramid_noise_under_jit():
    make = jax.jit(noise.pyramid_noise, static_argnums=1)
    shape = (4, 8, 8, 64)
    strength = jnp.array([0.0, 0.3, 0.6, 0.9])
    got = make(jax.random.key(0), shape, strength)
    np.testing.assert_allclose(got.std(axis=(1, 2, 3), ddof=1), 1, rtol=1e-5)
    assert not np.allclose(got, make(jax.random.key(1), shape, strength))
    # More strength, more of the low frequencies: neighbours look alike.
    smooth = np.asarray((got[:, :, 1:] * got[:, :, :-1]).mean(axis=(1, 2, 3)))
    assert (np.diff(smooth) > 0).all() and abs(smooth[0]) < 0.1 and smooth[-1] > 0.3


def test_unknown_strategy_is_a_user_error():
    with pytest.raises(UserError, match="every_layer"):
        noise.ladder("every_layr", 8, 8)
