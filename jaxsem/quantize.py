"""Quantisers for training and for coding, as pure functions.

Rounding has no useful gradient, so training replaces it: by the identity in the backward pass (straight-through), or by
uniform noise of the same width, whose density is the discrete probability's smooth twin. The same trick carries gradients
through the choice of a codeword in product quantisation.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


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


# -- product quantisation with one shared codebook --------------------------------------------------------------------


def product_quantise(
    z: Float[Array, "*batch n d"], codebook: Float[Array, "k d"]
) -> tuple[Int[Array, "*batch n"], Float[Array, "*batch n d"]]:
    """Replaces each sub-vector by the nearest codeword of a codebook that all positions share.

    The distance is the squared Euclidean one; of equally near codewords the lowest index wins. Its part that depends on
    the codeword, |c|^2 - 2 z.c, is one matrix product in full precision, so that devices agree on the indices as far as
    float32 lets them.

    Args:
      z: Sub-vectors.
      codebook: Codewords.

    Returns:
      The indices in [0, k), int32, and exactly the chosen codewords. The gradient of the latter with respect to `z` is
      the identity's (straight-through), and with respect to the codebook zero: it learns by `codebook_losses`.

    Source: van den Oord et al., Neural discrete representation learning (NeurIPS 2017), section 3.1; the shared codebook
    of PQVAE-shared, section 3.2.
    """
    products = jnp.matmul(z, codebook.T, precision=jax.lax.Precision.HIGHEST)
    distances = jnp.square(codebook).sum(-1) - 2.0 * products
    indices = jnp.argmin(jax.lax.stop_gradient(distances), axis=-1).astype(jnp.int32)
    # The codeword plus zero, not z plus a difference: a decoder, which never sees z, gets the very same numbers.
    return indices, jax.lax.stop_gradient(codebook[indices]) + (z - jax.lax.stop_gradient(z))


def codebook_losses(
    z: Float[Array, "*batch n d"], codebook: Float[Array, "k d"], indices: Int[Array, "*batch n"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The two terms that bring codewords and sub-vectors together; means over all elements.

    Args:
      z: Sub-vectors.
      codebook: Codewords.
      indices: The codeword of each sub-vector, from `product_quantise`.

    Returns:
      The codebook term mean|sg(z) - c|^2, whose gradient moves the codewords only, and the commitment term
      mean|z - sg(c)|^2, whose gradient moves the sub-vectors only. Their values are equal.

    Source: van den Oord et al., Neural discrete representation learning (NeurIPS 2017), equation 3.
    """
    chosen = codebook[indices]
    codewords = jnp.square(jax.lax.stop_gradient(z) - chosen).mean()
    commitment = jnp.square(z - jax.lax.stop_gradient(chosen)).mean()
    return codewords, commitment


def codebook_counts(indices: Int[Array, "*batch"], k: int) -> Int[Array, " {k}"]:
    """How often each of `k` codewords occurs; counts of several batches may be added."""
    return jnp.zeros(k, jnp.int32).at[indices.reshape(-1)].add(1)


def codebook_usage(indices: Int[Array, "*batch"], k: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How much of a codebook is in use.

    Args:
      indices: Any number of indices in [0, k), at least one.
      k: Size of the codebook.

    Returns:
      The share of codewords that occur at all, in (0, 1], and the perplexity 2^H of the indices, in [1, k]: the size of
      a codebook with even use that would cost the same H bits for an index.
    """
    counts = codebook_counts(indices, k)
    shares = counts / counts.sum()
    entropy = jax.scipy.special.entr(shares).sum()
    return (counts > 0).mean(), jnp.exp(entropy)


def revive_dead_codes(
    codebook: Float[Array, "k d"],
    counts: Int[Array, " k"] | Float[Array, " k"],
    candidates: Float[Array, "m d"],
    rng: PRNGKeyArray,
    threshold: float = 1.0,
) -> Float[Array, "k d"]:
    """Replaces codewords that are hardly used by sub-vectors that the encoder makes now.

    Args:
      codebook: Codewords.
      counts: How often each was used since the last revival.
      candidates: Sub-vectors to draw from, such as those of the last batch; each is given at most once where there are
        enough of them.
      rng: Key of the draw.
      threshold: Codewords used fewer times than this are replaced.

    Returns:
      The new codebook; the codewords in use are untouched.

    Source: the random restarts of Dhariwal et al., Jukebox (2020), section 3.
    """
    k, m = codebook.shape[0], candidates.shape[0]
    drawn = jax.random.choice(rng, m, (k,), replace=m < k)
    return jnp.where((counts < threshold)[:, None], candidates[drawn], codebook)
