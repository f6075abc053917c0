"""GDN and its inverse against the formula and against CompressAI, stored values below their bounds included."""

import compressai_reference as reference
import jax
import numpy as np
import pytest

from jaxsem.nn.gdn import GDN

RANDOM = np.random.RandomState(4)
X = RANDOM.standard_normal((2, 3, 4, 5)).astype(np.float32) * 2
BETA = np.array([1.2, 0.7, 1e-9, -0.3, 0.9], np.float32)
GAMMA = (0.3 * np.eye(5) + 0.1 * RANDOM.standard_normal((5, 5))).astype(np.float32)


def ours(inverse, x=X):
    return jax.jit(GDN(inverse).apply)({"params": {"beta": BETA, "gamma": GAMMA}}, x)


@pytest.mark.parametrize("inverse", [False, True])
def test_formula(inverse):
    beta = np.maximum(BETA.astype(np.float64), (1e-6 + 2.0**-36) ** 0.5) ** 2 - 2.0**-36
    gamma = np.maximum(GAMMA.astype(np.float64), 2.0**-18) ** 2 - 2.0**-36
    root = np.sqrt(beta + np.square(X.astype(np.float64)) @ gamma.T)
    np.testing.assert_allclose(ours(inverse), X * root if inverse else X / root, rtol=1e-5, atol=1e-5)


def test_fresh_parameters_are_beta_1_and_gamma_a_tenth_of_the_identity():
    y = GDN().init_with_output(jax.random.key(0), X)[0]
    np.testing.assert_allclose(y, X / np.sqrt(1 + 0.1 * X**2), rtol=1e-5)


@pytest.mark.parametrize("inverse", [False, True])
def test_value_and_gradient_equal_compressai(inverse):
    torch, compressai = reference.import_compressai()
    layer = compressai.layers.GDN(5, inverse)
    with torch.no_grad():
        layer.beta.copy_(torch.from_numpy(BETA))
        layer.gamma.copy_(torch.from_numpy(GAMMA))
    x = torch.from_numpy(np.moveaxis(X, -1, 1).copy()).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    np.testing.assert_allclose(ours(inverse), np.moveaxis(y.detach().numpy(), 1, -1), rtol=1e-5, atol=1e-5)

    def loss(params):
        return (GDN(inverse).apply({"params": params}, X) ** 2).sum()

    gradients = jax.jit(jax.grad(loss))({"beta": BETA, "gamma": GAMMA})
    for name in ("beta", "gamma"):
        expected = getattr(layer, name).grad.numpy()
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
