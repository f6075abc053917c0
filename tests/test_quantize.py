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


# -- product quantisation ---------------------------------------------------------------------------------------------

CODEBOOK = jax.random.normal(jax.random.key(1), (7, 3))
Z = jax.random.normal(jax.random.key(2), (5, 4, 3))


def test_each_sub_vector_gets_its_nearest_codeword():
    indices, z_q = quantize.product_quantise(Z, CODEBOOK)
    distances = np.square(np.asarray(Z)[..., None, :] - np.asarray(CODEBOOK)).sum(-1)
    np.testing.assert_array_equal(indices, distances.argmin(-1))
    np.testing.assert_array_equal(z_q, CODEBOOK[indices])
    assert indices.dtype == jnp.int32
    assert len(np.unique(indices)) > 4


def test_of_equally_near_codewords_the_lowest_index_wins():
    codebook = jnp.array([[9.0, 9.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    indices, _ = quantize.product_quantise(jnp.array([[0.0, 2.0], [3.0, 0.0]]), codebook)
    np.testing.assert_array_equal(indices, [1, 1])


def test_the_choice_of_a_codeword_has_the_gradient_of_the_identity():
    weights = jax.random.normal(KEY, Z.shape)
    to_z, to_codebook = jax.grad(lambda z, c: (weights * quantize.product_quantise(z, c)[1]).sum(), (0, 1))(Z, CODEBOOK)
    np.testing.assert_array_equal(to_z, weights)
    np.testing.assert_array_equal(to_codebook, 0)


def test_the_codebook_term_moves_codewords_only_and_commitment_sub_vectors_only():
    indices, z_q = quantize.product_quantise(Z, CODEBOOK)
    values = quantize.codebook_losses(Z, CODEBOOK, indices)
    np.testing.assert_allclose(values, 2 * [np.square(Z - z_q).mean()], rtol=1e-6)
    moves = jax.jit(jax.jacobian(lambda z, c: jnp.stack(quantize.codebook_losses(z, c, indices)), (0, 1)))(Z, CODEBOOK)
    np.testing.assert_array_equal(moves[0][0], 0)
    np.testing.assert_array_equal(moves[1][1], 0)
    np.testing.assert_allclose(moves[0][1], 2 * (Z - z_q) / Z.size, rtol=1e-5)
    pulled = np.zeros(CODEBOOK.shape, np.float32)
    np.add.at(pulled, np.asarray(indices), np.asarray(2 * (z_q - Z) / Z.size))
    np.testing.assert_allclose(moves[1][0], pulled, atol=1e-6)


def test_usage_and_perplexity_of_known_indices():
    measured = jax.jit(lambda indices: quantize.codebook_usage(indices, 4))
    np.testing.assert_allclose(measured(jnp.array([[0, 0], [3, 3]])), [0.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(measured(jnp.array([[2, 2], [2, 2]])), [0.25, 1.0], rtol=1e-6)
    np.testing.assert_allclose(measured(jnp.array([[3, 1], [2, 0]])), [1.0, 4.0], rtol=1e-6)
    uneven = 2 ** (0.75 * np.log2(4 / 3) + 0.25 * 2)
    np.testing.assert_allclose(measured(jnp.array([[0, 0], [1, 0]])), [0.5, uneven], rtol=1e-6)


def test_revival_replaces_dead_codewords_by_different_candidates_and_no_others():
    counts = jnp.array([5, 0, 2, 1, 0, 9, 3])
    candidates = 100 + jax.random.normal(KEY, (20, 3))
    revived = np.asarray(quantize.revive_dead_codes(CODEBOOK, counts, candidates, KEY, threshold=2.0))
    alive = np.asarray(counts) >= 2
    np.testing.assert_array_equal(revived[alive], CODEBOOK[alive])
    rows = {tuple(row) for row in np.asarray(candidates)}
    drawn = {tuple(row) for row in revived[~alive]}
    assert drawn <= rows
    assert len(drawn) == 3


def test_revival_makes_do_with_fewer_candidates_than_codewords():
    revived = quantize.revive_dead_codes(CODEBOOK, jnp.zeros(7), jnp.ones((2, 3)), KEY)
    np.testing.assert_array_equal(revived, 1)
