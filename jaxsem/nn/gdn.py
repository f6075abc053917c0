"""Generalised divisive normalisation.

Source: Balle, Laparra and Simoncelli, Density modeling of images using a generalized normalization transformation
(ICLR 2016); the reparametrisation is that of the published checkpoints, so that their values load unchanged.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsem.nn.bounds import lower_bound

_PEDESTAL = 2.0**-36


def _reparametrise(stored: jax.Array, minimum: float) -> jax.Array:
    return lower_bound(stored, (minimum + _PEDESTAL) ** 0.5) ** 2 - _PEDESTAL


class GDN(nn.Module):
    """y_i = x_i / sqrt(beta_i + sum_j gamma_ij x_j^2); the inverse multiplies instead.

    Parameters `beta` [c] and `gamma` [c, c] (row i is output i) are stored as sqrt(value + 2^-36).
    """

    inverse: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., c] to [..., c]."""
        channels = x.shape[-1]
        beta = self.param("beta", lambda _, shape: jnp.sqrt(jnp.ones(shape) + _PEDESTAL), (channels,))
        gamma = self.param("gamma", lambda _, c: jnp.sqrt(0.1 * jnp.eye(c) + _PEDESTAL), channels)
        beta = _reparametrise(beta, 1e-6).astype(self.dtype)
        gamma = _reparametrise(gamma, 0.0).astype(self.dtype)
        x = x.astype(self.dtype)
        norm = jnp.square(x) @ gamma.T + beta
        return x * (jnp.sqrt(norm) if self.inverse else jax.lax.rsqrt(norm))
