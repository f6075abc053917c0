"""Training of PQVAE-shared: batches, the first codebook, resampled features, revival, evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem import quantize
from jaxsem.data.batching import ArrayBatches
from jaxsem.errors import InputError
from jaxsem.systems.pqvae import Pqvae, PqvaeConfig, pqvae_loss
from jaxsem.training import OptimizerConfig
from jaxsem.training.fit import fit
from jaxsem.training.pqvae import (
    augmented,
    first_params,
    make_evaluation,
    resampled,
    revival,
    training_loss,
)

CONFIG = PqvaeConfig(width=12, channels=4, hidden=(12, 8), residual=4, residual_layers=1, codeword=4, codebook=3)
MODULE = Pqvae(CONFIG)


def unit_features(count, seed=0):
    points = np.random.default_rng(seed).normal(size=(count, 12)) * np.geomspace(1, 0.1, 12) + 0.3
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    return first_params(MODULE, unit_features(64))


# -- batches ---------------------------------------------------------------------------------------------------------------


def rows(count=10):
    return {"features": np.arange(count)[:, None], "labels": np.arange(count)}


def test_a_batch_is_a_function_of_seed_and_position():
    first, again, other = (ArrayBatches(rows(), 4, seed) for seed in (0, 0, 1))
    parts = [next(first)["labels"] for _ in range(5)]
    np.testing.assert_array_equal(parts, [next(again)["labels"] for _ in range(5)])
    assert not np.array_equal(parts, [next(other)["labels"] for _ in range(5)])
    again.set_state({"batches": 2})
    np.testing.assert_array_equal(next(again)["labels"], parts[2])
    assert first.get_state() == {"batches": 5}


def test_a_batch_repeats_no_row_and_keeps_rows_together():
    for _, batch in zip(range(20), ArrayBatches(rows(), 7)):
        assert len(set(batch["labels"])) == 7
        np.testing.assert_array_equal(batch["features"][:, 0], batch["labels"])


@pytest.mark.parametrize("arrays", [rows(3), {"a": np.zeros(5), "b": np.zeros(6)}])
def test_too_few_rows_and_unequal_arrays_are_refused(arrays):
    with pytest.raises(InputError, match="batches of 4 need arrays of one length"):
        ArrayBatches(arrays, 4)


# -- the first codebook ----------------------------------------------------------------------------------------------------


def test_the_first_codewords_are_sub_vectors_of_the_features(params):
    z = MODULE.apply({"params": params}, unit_features(64), method="encode").reshape(-1, 4)
    distances = jnp.abs(z[:, None] - params["codebook"]).sum(-1).min(0)
    np.testing.assert_allclose(distances, 0, atol=1e-5)
    assert len(np.unique(np.round(params["codebook"], 4), axis=0)) == 3


def test_too_few_features_for_the_codebook_are_refused():
    config = PqvaeConfig(width=12, channels=4, hidden=(12, 8), residual=4, codeword=100, codebook=6)
    with pytest.raises(InputError, match="5 features give 5 sub-vectors, too few for 6 codewords"):
        first_params(Pqvae(config), unit_features(5))


# -- resampled features ----------------------------------------------------------------------------------------------------


def test_resampled_features_have_mean_and_covariance_of_the_batch():
    """Before they are made unit: features near a far centre, whose lengths are nearly the same."""
    features = unit_features(40) * 0.01 + np.eye(12, dtype=np.float32)[0]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    keys = jax.random.split(jax.random.key(0), 1000)
    drawn = np.asarray(jax.vmap(lambda key: resampled(features, key))(keys)).reshape(-1, 12)
    deviation = features.std(0)
    np.testing.assert_allclose((drawn.mean(0) - features.mean(0)) / deviation.max(), 0, atol=0.02)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(features.T), atol=0.03 * deviation.max() ** 2)


def test_resampled_features_are_unit_and_within_the_span_of_the_batch():
    features = np.zeros((6, 12), np.float32)
    features[:, :3] = unit_features(6)[:, :3]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    drawn = np.asarray(resampled(features, jax.random.key(1)))
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(drawn[:, 3:], 0, atol=1e-6)
    assert np.abs(drawn[:, None] - features).sum(-1).min() > 1e-3


@pytest.mark.parametrize(("mixing", "least", "most"), [(0.0, 0, 0), (0.3, 40, 80), (1.0, 200, 200)])
def test_the_share_of_features_that_is_replaced(mixing, least, most):
    features = unit_features(200)
    changed = np.abs(np.asarray(augmented(features, mixing, jax.random.key(2))) - features).max(1) > 1e-4
    assert least <= changed.sum() <= most


@pytest.mark.parametrize("mixing", [-0.1, 1.5, float("nan")])
def test_a_share_outside_0_to_1_is_refused(mixing):
    with pytest.raises(InputError, match="mixing is a share of the features between 0 and 1"):
        training_loss(CONFIG, mixing)


# -- loss and training -----------------------------------------------------------------------------------------------------


def test_without_mixing_the_loss_is_that_of_the_model(params):
    features = 3 * unit_features(9)
    expected, _ = pqvae_loss(CONFIG, features, MODULE.apply({"params": params}, features))
    loss, metrics = training_loss(CONFIG)(params, {"features": features}, jax.random.key(0))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert {"cosine", "codebook", "commitment", "usage", "perplexity"} <= metrics.keys()


def test_training_brings_decoded_features_closer(params):
    features, others = unit_features(64), unit_features(50, seed=1)
    evaluate = make_evaluation(CONFIG, others)
    optimizer = OptimizerConfig(learning_rate=3e-3)
    trained = fit(
        training_loss(CONFIG, 0.5), params, {"features": features}, optimizer, 150, 32, renew_fn=revival(CONFIG)
    )
    before, after = evaluate(params)["cosine"], evaluate(trained)["cosine"]
    assert after < 0.6 * before, (before, after)


def test_revival_moves_the_codewords_that_nothing_uses_and_no_others(params):
    batch = {"features": unit_features(32)}
    far = {**params, "codebook": params["codebook"].at[1].set(50.0)}
    renewed = jax.jit(revival(CONFIG))(far, batch, jax.random.key(0))
    np.testing.assert_array_equal(renewed["codebook"][np.array([0, 2])], far["codebook"][np.array([0, 2])])
    z = MODULE.apply({"params": params}, batch["features"], method="encode").reshape(-1, 4)
    np.testing.assert_allclose(jnp.abs(z - renewed["codebook"][1]).sum(-1).min(), 0, atol=1e-5)
    for name in ("encoder", "decoder"):
        for new, old in zip(jax.tree.leaves(renewed[name]), jax.tree.leaves(far[name])):
            np.testing.assert_array_equal(new, old)


def test_the_evaluation_counts_over_all_features(params):
    features = unit_features(21)
    outputs = MODULE.apply({"params": params}, features)
    usage, perplexity = quantize.codebook_usage(outputs["indices"], CONFIG.codebook)
    found = make_evaluation(CONFIG, features, batch=8)(params)
    assert found["cosine"] == pytest.approx(1 - float((features * outputs["x_hat"]).sum(-1).mean()), abs=1e-5)
    assert found["usage"] == pytest.approx(float(usage))
    assert found["perplexity"] == pytest.approx(float(perplexity), rel=1e-4)
