"""Densities of latents: the factorised prior of hyper-latents and the conditional Gaussian of latents.

These are the differentiable twins of the integer tables in `jaxsem.entropy.tables`: training sees them, coding does not.
Source: Balle et al., Variational image compression with a scale hyperprior (ICLR 2018), appendix 6.1 and equation 9.
"""

import math
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.scipy.special import erfc

from jaxsem.nn.bounds import lower_bound

LIKELIHOOD_FLOOR = 1e-9
SCALE_FLOOR = 0.11
_WIDTHS = (1, 3, 3, 3, 3, 1)


def gaussian_likelihood(values: jax.Array, mean: jax.Array, scale: jax.Array) -> jax.Array:
    """Probability of the unit interval about each value under N(mean, scale^2), at least 1e-9.

    Args:
      values: Rounded or noisy latent, any shape.
      mean: Mean, same shape.
      scale: Standard deviation, same shape; below 0.11 it counts as 0.11.

    Returns:
      Probabilities in [1e-9, 1], same shape.
    """
    distance = jnp.abs(values - mean)
    scale = lower_bound(scale, SCALE_FLOOR) * math.sqrt(2)
    # Both tails are taken on the side away from zero, where erfc keeps its relative precision.
    upper, lower = erfc((distance - 0.5) / scale), erfc((distance + 0.5) / scale)
    return lower_bound(0.5 * (upper - lower), LIKELIHOOD_FLOOR)


class FactorizedPrior(nn.Module):
    """One learned univariate density a channel, given by its cumulative's logits.

    Per channel a network of widths 1-3-3-3-3-1: u <- softplus(H) u + b, then u <- u + tanh(a) tanh(u) except at the end.
    `quantiles` [c, 1, 3] are the two tails and the median, learned by `quantile_loss` or set by bisection; the coded
    symbol is round(z - median).
    """

    channels: int

    def setup(self) -> None:
        """Makes the parameters of all channels, stacked on the first axis."""
        for i, (fan_in, fan_out) in enumerate(pairwise(_WIDTHS)):
            # Chosen so that the composed slopes make the initial density about 10 wide.
            value = math.log(math.expm1(1 / (10 ** (1 / 5) * fan_out)))
            shape = (self.channels, fan_out, fan_in)
            setattr(self, f"matrix_{i}", self.param(f"matrix_{i}", nn.initializers.constant(value), shape))
            noise = nn.initializers.uniform(1.0)
            bias = self.param(f"bias_{i}", lambda key, s, f=noise: f(key, s) - 0.5, (self.channels, fan_out, 1))
            setattr(self, f"bias_{i}", bias)
            if i < len(_WIDTHS) - 2:
                factor = self.param(f"factor_{i}", nn.initializers.zeros, (self.channels, fan_out, 1))
                setattr(self, f"factor_{i}", factor)
        tails = jnp.array([-10.0, 0.0, 10.0])
        self.quantiles = self.param("quantiles", lambda _, c: jnp.tile(tails, (c, 1, 1)), self.channels)

    def median(self) -> jax.Array:
        """Medians [c]; the rate's gradient does not reach them."""
        return jax.lax.stop_gradient(self.quantiles[:, 0, 1])

    def logits(self, values: jax.Array, frozen: bool = False) -> jax.Array:
        """Logits of the cumulative at [c, 1, n] points; `frozen` stops the gradient at the network's weights."""
        stop = jax.lax.stop_gradient if frozen else lambda p: p
        for i in range(len(_WIDTHS) - 1):
            matrix, bias = stop(getattr(self, f"matrix_{i}")), stop(getattr(self, f"bias_{i}"))
            values = jnp.einsum("coi,cin->con", nn.softplus(matrix), values) + bias
            if i < len(_WIDTHS) - 2:
                values = values + jnp.tanh(stop(getattr(self, f"factor_{i}"))) * jnp.tanh(values)
        return values

    def __call__(self, z: jax.Array) -> jax.Array:
        """Probabilities in [1e-9, 1] of the unit intervals about `z` [b, h, w, c], same shape."""
        points = jnp.moveaxis(z, -1, 0).reshape(self.channels, 1, -1)
        lower, upper = self.logits(points - 0.5), self.logits(points + 0.5)
        # On the right tail both sigmoids are near 1: mirror it, so that their difference keeps its precision.
        sign = jax.lax.stop_gradient(-jnp.sign(lower + upper))
        likelihood = jnp.abs(nn.sigmoid(sign * upper) - nn.sigmoid(sign * lower))
        likelihood = lower_bound(likelihood, LIKELIHOOD_FLOOR)
        return jnp.moveaxis(likelihood.reshape(self.channels, *z.shape[:-1]), 0, -1)

    def quantile_loss(self, tail_mass: float = 1e-9) -> jax.Array:
        """Sum of |logits(quantiles) - (-t, 0, t)| with t = ln(2 / tail_mass - 1): moves the quantiles only."""
        t = math.log(2 / tail_mass - 1)
        return jnp.abs(self.logits(self.quantiles, frozen=True) - jnp.array([-t, 0.0, t])).sum()
