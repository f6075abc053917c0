"""The lower bound: its value, and the gradient that lets a value climb back."""

import compressai_reference as reference
import jax
import jax.numpy as jnp
import numpy as np

from jaxsem.nn.bounds import lower_bound

X = np.array([-2.0, 0.5, 1.0, 3.0, -2.0, 0.5, 1.0, 3.0], np.float32)
# What flows back from above: a step against a negative gradient raises x.
INCOMING = np.array([1.0, 2.0, 3.0, 4.0, -1.0, -2.0, -3.0, -4.0], np.float32)


def gradient(x):
    return jax.vjp(lambda v: lower_bound(v, 1.0), jnp.asarray(x))[1](jnp.asarray(INCOMING))[0]


def test_value():
    np.testing.assert_array_equal(lower_bound(jnp.asarray(X), 1.0), [1, 1, 1, 3, 1, 1, 1, 3])


def test_gradient_stops_only_what_would_push_further_down():
    np.testing.assert_array_equal(gradient(X), [0, 0, 3, 4, -1, -2, -3, -4])


def test_gradient_equals_compressai():
    torch, compressai = reference.import_compressai()
    x = torch.from_numpy(X.copy()).requires_grad_()
    compressai.ops.LowerBound(1.0)(x).backward(torch.from_numpy(INCOMING))
    np.testing.assert_array_equal(gradient(X), x.grad.numpy())
