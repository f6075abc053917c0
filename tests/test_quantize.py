"""The quantisers: what they give, and what their gradients are."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsem import quantize

X = jnp.array([-2.5, -1.2, -0.5, 0.0, 0.49, 0.5, 1.5, 7.9])
KEY = jax.random.key(3)


def test_straight_through_rounds_half_to_even():
    np.testing.assert_array_equal(quantize.straight_through_round(X), [-2, -1, 0, 0, 0, 0, 2, 8])


def test_straight_through_has_the_gradient_of_the_identity():
    weights = jnp.arange(1.0, 9.0)
    gradient = jax.grad(lambda x: (weights * quantize.straight_through_round(x)).sum())(X)
    np.testing.assert_array_equal(gradient, weights)


def test_round_about_leaves_an_integer_distance_from_the_mean():
    mean = jnp.linspace(-0.7, 0.7, 8)
    values = quantize.round_about(X, mean)
    np.testing.assert_allclose(values - mean, jnp.round(X - mean), atol=1e-6)
    assert float(jnp.abs(values - X).max()) <= 0.5 + 1e-6


def test_round_about_passes_the_gradient_to_the_value_and_none_to_the_mean():
    to_value, to_mean = jax.grad(lambda x, m: quantize.round_about(x, m).sum(), (0, 1))(X, 0.3 * jnp.ones(8))
    np.testing.assert_array_equal(to_value, 1)
    np.testing.assert_array_equal(to_mean, 0)


def test_noise_fills_the_unit_interval_evenly():
    noise = np.asarray(quantize.add_uniform_noise(jnp.zeros(40_000), KEY))
    assert -0.5 <= noise.min() < -0.499
    assert 0.499 < noise.max() < 0.5
    assert abs(noise.mean()) < 4 / np.sqrt(12 * noise.size)
    np.testing.assert_allclose(noise.var(), 1 / 12, rtol=0.02)


def test_noise_depends_on_the_key_only():
    first, again = quantize.add_uniform_noise(X, KEY), quantize.add_uniform_noise(X, KEY)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, quantize.add_uniform_noise(X, jax.random.key(4)))


def test_mixed_gives_noise_to_the_rate_and_rounding_to_the_decoder():
    mean = 0.25 * jnp.ones(8)
    noisy, rounded = quantize.mixed(X, mean, KEY)
    np.testing.assert_array_equal(noisy, quantize.add_uniform_noise(X, KEY))
    np.testing.assert_array_equal(rounded, quantize.round_about(X, mean))


def test_mixed_without_a_key_rounds_for_both():
    noisy, rounded = quantize.mixed(X, 0.25 * jnp.ones(8), None)
    np.testing.assert_array_equal(noisy, rounded)


def test_mixed_trains_through_both_values():
    def total(x, key):
        noisy, rounded = quantize.mixed(x, jnp.zeros(8), key)
        return (2 * noisy + 3 * rounded).sum()

    np.testing.assert_array_equal(jax.grad(total)(X, KEY), 5)
