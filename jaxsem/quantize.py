"""Quantisers for training and for coding, as pure functions.

Rounding has no useful gradient, so training replaces it: by the identity in the backward pass (straight-through), or by
uniform noise of the same width, whose density is the discrete probability's smooth twin.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def straight_through_round(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Rounds to the nearest integer, half to even; the gradient is that of the identity.

    Source: Theis et al., Lossy image compression with compressive autoencoders (ICLR 2017).
    """
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def round_about(x: Float[Array, "*shape"], mean: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
    """Rounds the distance from the mean, straight through: the value a decoder sees, symbol + mean."""
    return straight_through_round(x - mean) + mean


def add_uniform_noise(x: Float[Array, "*shape"], rng: PRNGKeyArray) -> Float[Array, "*shape"]:
    """Adds noise from U(-1/2, 1/2): the continuous relaxation of rounding.

    Source: Balle et al., End-to-end optimized image compression (ICLR 2017).
    """
    return x + jax.random.uniform(rng, x.shape, x.dtype, -0.5, 0.5)


def mixed(
    x: Float[Array, "*shape"], mean: Float[Array, "*#shape"], rng: PRNGKeyArray | None
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The mixture used in two-pass training: noise for the rate, straight-through rounding for what is decoded.

    Args:
      x: Latent.
      mean: Predicted mean; it may broadcast against the latent.
      rng: Key of the noise; `None` is evaluation, where the rate sees the rounded value too.

    Returns:
      The value whose likelihood is the rate, and the value that contexts and the synthesis see.

    Source: Minnen and Singh, Channel-wise autoregressive entropy models (ICIP 2020), section 3.3.
    """
    rounded = round_about(x, mean)
    return (rounded if rng is None else add_uniform_noise(x, rng)), rounded
