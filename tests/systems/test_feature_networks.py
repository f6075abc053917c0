"""Trained quantisers of features: PQVAE, VQ-VAE and learned levels, and the choice of a model for a rate."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem.errors import InputError
from jaxsem.systems.feature_networks import (
    PqvaeQuantizer,
    Recipe,
    VqvaeQuantizer,
    _nearest,
    config_at,
    configs_of_latent,
    learn_scalar_quantizer,
)
from jaxsem.systems.feature_quantizers import ScalarQuantizer
from jaxsem.systems.pqvae import PqvaeConfig, bits_per_image
from jaxsem.systems.zero_shot import cosine

WIDTH = 12
CONFIG = PqvaeConfig(width=WIDTH, channels=4, hidden=(12, 8), residual=4, residual_layers=1, codeword=4, codebook=4)
RECIPE = Recipe(steps=120, batch=32)
FASTER = dataclasses.replace(RECIPE, optimizer=dataclasses.replace(RECIPE.optimizer, learning_rate=3e-3))


def unit_features(count, seed=0):
    points = np.random.default_rng(seed).normal(size=(count, WIDTH)) * np.geomspace(1, 0.1, WIDTH) + 0.3
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


TRAIN, TEST = unit_features(200), unit_features(300, seed=1)


@pytest.fixture(scope="module", params=[PqvaeQuantizer, VqvaeQuantizer])
def fitted(request):
    return request.param.fit(TRAIN, CONFIG, recipe=FASTER)


def test_round_trip_shapes_types_and_ranges(fitted):
    indices = fitted.indices(TEST.astype(np.float16))
    decoded = fitted.features(indices)
    assert fitted.table_sizes == (4,) * 25
    assert fitted.bits == 50
    assert (indices.dtype, indices.shape) == (np.int32, (300, 25))
    assert set(np.unique(indices)) <= set(range(4))
    assert (decoded.dtype, decoded.shape) == (np.float32, (300, WIDTH))
    np.testing.assert_allclose(np.linalg.norm(decoded, axis=1), 1, atol=1e-5)


def test_what_was_not_seen_is_decoded_close(fitted):
    """Far closer than the mean of the train features, which takes no bits."""
    found = cosine(TEST, fitted.features(fitted.indices(TEST)))["mean"]
    mean = cosine(TEST, np.broadcast_to(TRAIN.mean(0), TEST.shape))["mean"]
    assert 1 - found < 0.5 * (1 - mean), (found, mean)


def test_a_feature_is_coded_alone_as_among_others(fitted):
    whole = fitted.indices(TEST)
    np.testing.assert_array_equal(fitted.indices(TEST[257:258]), whole[257:258])
    np.testing.assert_allclose(fitted.features(whole[257:258]), fitted.features(whole)[257:258], atol=1e-5)


def test_only_the_direction_of_a_feature_counts(fitted):
    np.testing.assert_array_equal(fitted.indices(4 * TEST), fitted.indices(TEST))


def test_no_features_are_no_mistake(fitted):
    assert fitted.indices(TEST[:0]).shape == (0, 25)
    assert fitted.features(np.zeros((0, 25), np.int32)).shape == (0, WIDTH)


def test_what_does_not_fit_is_refused(fitted):
    with pytest.raises(InputError, match=r"features are \[images, 12\]"):
        fitted.indices(TEST[:, 1:])
    with pytest.raises(InputError, match="index 4 at"):
        fitted.features(np.full((1, 25), 4))
    with pytest.raises(InputError, match=r"features are \[images, 12\]"):
        type(fitted).fit(TEST[:, 1:], CONFIG, recipe=RECIPE)


@pytest.mark.parametrize("kind", [PqvaeQuantizer, VqvaeQuantizer])
def test_the_seed_decides_the_training(kind):
    short = Recipe(steps=4, batch=8)
    first, again, other = (kind.fit(TRAIN, CONFIG, recipe=short, seed=seed).indices(TEST) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_vqvae_has_a_codebook_for_every_sub_space():
    quantizer = VqvaeQuantizer.fit(TRAIN, CONFIG, recipe=Recipe(steps=2, batch=8))
    books = quantizer.product.codebooks
    assert books.shape == (25, 4, 4)
    assert np.abs(books[0] - books[1:]).max((1, 2)).min() > 1e-3


def test_a_vqvae_codes_with_the_codewords_that_its_decoder_was_trained_on():
    rng = np.random.default_rng(0)
    quantizer = VqvaeQuantizer.fit(TRAIN, CONFIG, recipe=Recipe(steps=2, batch=8))
    z = rng.normal(size=(7, 25, 4)).astype(np.float32) / 3
    product = quantizer.product
    expected = product.features(product.indices(z.reshape(7, 100))).reshape(7, 25, 4)
    np.testing.assert_array_equal(_nearest(jnp.asarray(z), jnp.asarray(product.codebooks)), expected)


def test_a_vqvae_needs_a_step_for_each_of_its_two_parts():
    with pytest.raises(InputError, match="at least 2 steps, not 1"):
        VqvaeQuantizer.fit(TRAIN, CONFIG, recipe=Recipe(steps=1))


def test_a_recipe_mixes_a_share():
    with pytest.raises(InputError, match="mixing is a share"):
        Recipe(mixing=2.0)


# -- learned levels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 3])
def test_learned_levels_are_nearly_as_good_as_the_best(bits):
    found, best = learn_scalar_quantizer(TRAIN, bits=bits, steps=500), ScalarQuantizer.fit(TRAIN, bits=bits)
    errors = [float(((q.features(q.indices(TRAIN)) - TRAIN) ** 2).mean()) for q in (found, best)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
    assert found.table_sizes == (2**bits,) * WIDTH
    assert found.levels.shape == (1, 2**bits)


def test_learned_levels_stay_within_the_limit_and_ascend():
    levels = learn_scalar_quantizer(TRAIN, bits=2, limit=0.25, steps=300).levels[0]
    assert np.abs(levels).max() <= 0.25
    assert levels[-1] == pytest.approx(0.25)  # the best level is beyond it
    assert (np.diff(levels) > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "1 to 8 bits"),
        ({"bits": 2, "limit": 0}, "limit must be above 0"),
        ({"bits": 1, "steps": 0}, "steps=0"),
    ],
)
def test_levels_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        learn_scalar_quantizer(TRAIN, **options)


# -- the model for a rate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "bits", "codebook", "count"),
    [(768, 0.52 * 768, 4, 200), (768, 800, 4, 400), (768, 2.604 * 768, 16, 500), (192, 100, 4, 50), (512, 256, 16, 64)],
)
def test_models_for_the_rates_of_the_paper_and_others(width, bits, codebook, count):
    config = config_at(width, bits, codebook)
    assert (config.width, config.codewords, config.codebook) == (width, count, codebook)


def test_a_model_keeps_to_its_budget_and_its_latent_to_its_size():
    found = 0
    for width in (40, 192, 512, 768):
        for rate in (0.25, 0.5, 0.9, 1, 2, 3):
            for codebook in (2, 3, 4, 16, 64, 256):
                if config := config_at(width, rate * width, codebook):
                    found += 1
                    assert 0.95 * rate * width <= bits_per_image(config) <= 1.005 * rate * width
                    assert 2 * width <= config.latent_size <= 4 * width
    assert found > 60


@pytest.mark.parametrize(("width", "bits", "codebook"), [(16, 16, 4), (768, 1, 4), (192, 100, 2**30)])
def test_there_is_not_a_model_for_everything(width, bits, codebook):
    assert config_at(width, bits, codebook) is None


def test_sizes_are_passed_on():
    assert config_at(192, 100, 4, hidden=(10, 9)).hidden == (10, 9)
    assert {config.residual for config in configs_of_latent(192, 100, 16, residual=7)} == {7}


def test_one_latent_is_cut_in_all_ways():
    """The sub-vectors of the paper's figure 5, at its lowest rate."""
    found = {config.codeword: config.codebook for config in configs_of_latent(768, 400, 128)}
    assert {8: 2, 16: 4, 32: 16, 64: 256}.items() <= found.items()
    for config in configs_of_latent(768, 400, 128):
        assert config.channels == 128
        assert config.codebook <= 1024
        assert abs(bits_per_image(config) - 400) <= 20
