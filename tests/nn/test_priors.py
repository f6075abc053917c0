"""Densities: probabilities that add up, their formulas, and CompressAI's values."""

import math

import compressai_reference as reference
import jax
import jax.numpy as jnp
import numpy as np

from jaxsem.nn.priors import FactorizedPrior, gaussian_likelihood
from jaxsem.weights.compressai import table_of
from jaxsem.weights.convert import convert

PRIOR = FactorizedPrior(8)
Z = np.round(np.random.RandomState(8).standard_normal((2, 3, 4, 8)) * 4).astype(np.float32)


def params():
    """The prior of the small seeded hyperprior."""
    state = reference.random_state_dict("hyperprior")
    rules = [r for r in table_of(reference.CONFIGS["hyperprior"], "compressai") if "entropy_bottleneck" in r.source]
    shapes = jax.eval_shape(PRIOR.init, jax.random.key(0), Z)["params"]
    state = {key: value for key, value in state.items() if key.startswith("entropy_bottleneck")}
    return convert(rules, state, {"entropy_bottleneck": shapes})["entropy_bottleneck"]


def test_gaussian_likelihood_is_the_mass_of_the_unit_interval():
    values = np.array([0.0, 1.0, -3.0, 10.0, 2.0])
    mean, scale = np.array([0.2, -0.5, -2.6, 1.0, 2.0]), np.array([0.5, 2.0, 0.11, 4.0, 0.01])
    sigma = np.maximum(scale, 0.11)  # the floor of scales
    expected = [
        0.5 * (math.erf((v - m + 0.5) / s / math.sqrt(2)) - math.erf((v - m - 0.5) / s / math.sqrt(2)))
        for v, m, s in zip(values, mean, sigma)
    ]
    np.testing.assert_allclose(gaussian_likelihood(*map(jnp.asarray, (values, mean, scale))), expected, rtol=2e-5)


def test_gaussian_likelihood_adds_up_to_one_and_has_a_floor():
    values = jnp.arange(-40.0, 41.0)
    for scale in (0.11, 0.7, 5.0):
        probability = np.asarray(gaussian_likelihood(values, jnp.full(81, 0.3), jnp.full(81, scale)))
        np.testing.assert_allclose(probability.sum(), 1, rtol=1e-5)
        assert probability.min() >= np.float32(1e-9)


def test_factorised_likelihood_adds_up_to_one():
    integers = jnp.broadcast_to(jnp.arange(-200.0, 201.0)[None, :, None, None], (1, 401, 1, 8))
    probability = np.asarray(jax.jit(PRIOR.apply)({"params": params()}, integers))
    np.testing.assert_allclose(probability.sum(axis=1).ravel(), 1, atol=1e-5)


def test_fresh_prior_is_about_ten_wide():
    fresh = jax.jit(PRIOR.init)(jax.random.key(0), Z)["params"]
    logits = PRIOR.apply({"params": fresh}, jnp.tile(jnp.array([[-10.0, 0.0, 10.0]]), (8, 1, 1)), method="logits")
    assert np.all(np.diff(np.asarray(logits)) > 0)
    np.testing.assert_allclose(np.asarray(logits[:, 0, 2] - logits[:, 0, 0]), 2.0, rtol=0.2)


def test_the_quantile_loss_moves_the_quantiles_only():
    gradients = jax.jit(jax.grad(lambda p: PRIOR.apply({"params": p}, method="quantile_loss")))(params())
    assert np.all(np.asarray(gradients.pop("quantiles")) != 0)
    for name, gradient in gradients.items():
        assert not np.any(np.asarray(gradient)), name


class TestAgainstCompressAI:
    def bottleneck(self):
        torch, _ = reference.import_compressai()
        return torch, reference.reference_model("hyperprior").entropy_bottleneck

    def test_likelihood(self):
        torch, bottleneck = self.bottleneck()
        with torch.no_grad():
            _, expected = bottleneck(torch.from_numpy(np.moveaxis(Z, -1, 1).copy()))
        medians = params()["quantiles"][:, 0, 1]
        values = np.round(Z - medians) + medians
        actual = jax.jit(PRIOR.apply)({"params": params()}, values)
        # CompressAI subtracts two sigmoids near 1 on the right tail and loses digits there: hence an absolute part.
        np.testing.assert_allclose(actual, np.moveaxis(expected.numpy(), 1, -1), rtol=1e-5, atol=2e-7)

    def test_quantile_loss_and_its_gradient(self):
        _, bottleneck = self.bottleneck()
        loss = bottleneck.loss()
        loss.backward()
        value, gradients = jax.value_and_grad(lambda p: PRIOR.apply({"params": p}, method="quantile_loss"))(params())
        np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
        np.testing.assert_allclose(gradients["quantiles"], bottleneck.quantiles.grad.numpy(), rtol=1e-5, atol=1e-6)

    def test_gaussian(self):
        torch, compressai = reference.import_compressai()
        random = np.random.RandomState(9)
        values = np.round(random.standard_normal((2, 3, 4, 5)) * 6).astype(np.float32)
        mean, scale = random.standard_normal((2, *values.shape)).astype(np.float32)
        layer = compressai.entropy_models.GaussianConditional(None).eval()
        with torch.no_grad():
            _, expected = layer(
                *(torch.from_numpy(a) for a in (values + mean, 4 * scale)), means=torch.from_numpy(mean)
            )
        actual = gaussian_likelihood(jnp.asarray(np.round(values) + mean), jnp.asarray(mean), jnp.asarray(4 * scale))
        np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-4)
