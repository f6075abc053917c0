"""Training of PQVAE-shared on features that were extracted once: batches, loss, evaluation, and a codebook that stays alive.

The authors' script fine-tunes weights whose origin it does not tell. From scratch, codewords drawn from U(-1, 1) lie far from a
latent of unit length and most are never used; so training starts from sub-vectors that the fresh encoder makes, and codewords
that hardly serve are moved to sub-vectors of the present batch from time to time (`quantize.revive_dead_codes`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsem import quantize
from jaxsem.errors import InputError
from jaxsem.nn.ops import unit
from jaxsem.systems.features import check_features
from jaxsem.systems.pqvae import Pqvae, PqvaeConfig, pqvae_loss

_DEAD = 0.02  # of an even share of the uses
_FIRST = 1024  # features that the first codebook is drawn from


def first_params(module: Pqvae, features: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Fresh parameters whose codewords are sub-vectors that the fresh encoder makes of features [b, width].

    Raises:
      InputError: Features of another width or not finite, or too few for the codebook.
    """
    features = check_features(features[:_FIRST], module.config.width)
    rng, draw = jax.random.split(jax.random.key(seed))
    params = jax.jit(module.init)(rng, features)["params"]
    z = jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode"))(params, features)
    points = z.reshape(-1, module.config.codeword)
    if len(points) < module.config.codebook:
        raise InputError(
            f"{len(features)} features give {len(points)} sub-vectors, too few for {module.config.codebook} codewords"
        )
    picked = jax.random.choice(draw, points, (module.config.codebook,), replace=False)
    return {**params, "codebook": picked}


def training_loss(config: PqvaeConfig, mixing: float = 0.0, dtype: Any = jnp.float32) -> Callable:
    """The loss for `jaxsem.training`.

    Args:
      config: Sizes and weights.
      mixing: Share of features that `resampled` features replace, in [0, 1]; it keeps a few hundred training features from being
        learned by heart.
      dtype: Of the convolutions.

    Returns:
      loss_fn(params, batch, rng) -> (loss, metrics), for batches {"features": [b, width]}; see `pqvae_loss`.

    Raises:
      InputError: A share outside [0, 1].
    """
    check_mixing(mixing)
    module = Pqvae(config, dtype)

    def loss_fn(params, batch, rng):
        features = augmented(batch["features"], mixing, rng)
        outputs = module.apply({"params": params}, features)
        return pqvae_loss(config, features, outputs)

    return loss_fn


def check_mixing(mixing: float) -> None:
    """Refuses what is no share.

    Raises:
      InputError: It is outside [0, 1].
    """
    if not 0 <= mixing <= 1:
        raise InputError(f"mixing is a share of the features between 0 and 1, not {mixing}")


def augmented(features: ArrayLike, mixing: float, rng: jax.Array) -> jax.Array:
    """Unit features [b, width] of which a random share `mixing` is replaced by `resampled` ones."""
    features = unit(jnp.asarray(features, jnp.float32))
    if not mixing:
        return features
    which, how = jax.random.split(rng)
    replaced = jax.random.bernoulli(which, mixing, (len(features), 1))
    return jnp.where(replaced, resampled(features, how), features)


def resampled(features: ArrayLike, rng: jax.Array) -> jax.Array:
    """As many unit features as a batch has, from the normal distribution with its mean and covariance.

    Each is the batch's mean and a random combination of all deviations from it, so that a few hundred features give endlessly
    many. With 800 features of CLIP ViT-B/32, 800 steps and 0.49 bits a dimension, the cosine of 200 others was 0.874 without them
    and 0.901 with nothing else; mixtures of two features, which lie closer to the mean than features do, gave 0.890.

    Args:
      features: [b, width], unit.
      rng: Key of the draw.
    """
    features = jnp.asarray(features)
    count = len(features)
    centre = features.mean(axis=0)
    weights = jax.random.normal(rng, (count, count)) / max(count - 1, 1) ** 0.5
    return unit(centre + weights @ (features - centre))


def revival(config: PqvaeConfig) -> Callable:
    """The `renew_fn` of `jaxsem.training.train`: moves codewords that a batch hardly uses onto sub-vectors of that batch."""
    module = Pqvae(config)

    def renew_fn(params, batch, rng):
        z = module.apply({"params": params}, batch["features"], method="encode")
        indices, _ = quantize.product_quantise(z, params["codebook"])
        counts = quantize.codebook_counts(indices, config.codebook)
        least = _DEAD * indices.size / config.codebook
        points = z.reshape(-1, config.codeword)
        return {**params, "codebook": quantize.revive_dead_codes(params["codebook"], counts, points, rng, least)}

    return renew_fn


def make_evaluation(config: PqvaeConfig, features: np.ndarray, batch: int = 512) -> Callable:
    """An evaluation for `jaxsem.training` on features [b, width] that training does not see.

    Returns:
      eval_fn(params) -> `cosine` (1 - mean similarity), `usage` and `perplexity` of the codebook over all of them.
    """
    features = check_features(features, config.width)
    module = Pqvae(config)

    @jax.jit
    def measure(params, x):
        outputs = module.apply({"params": params}, x)
        return (unit(x) * outputs["x_hat"]).sum(-1), quantize.codebook_counts(outputs["indices"], config.codebook)

    def eval_fn(params):
        parts = [measure(params, features[i : i + batch]) for i in range(0, len(features), batch)]
        counts = sum(np.asarray(count, np.int64) for _, count in parts)
        shares = counts[counts > 0] / counts.sum()
        return {
            "cosine": 1 - float(np.concatenate([part for part, _ in parts]).mean()),
            "usage": float((counts > 0).mean()),
            "perplexity": float(np.exp(-(shares * np.log(shares)).sum())),
        }

    return eval_fn
