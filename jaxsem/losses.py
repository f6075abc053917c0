"""Training losses as pure functions of a model's outputs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def lambda_at(lambdas: Sequence[float], quality: jax.Array) -> jax.Array:
    """The distortion weight of real-valued qualities [b], log-linear between the listed ones."""
    return jnp.exp(jnp.interp(quality, jnp.arange(len(lambdas)), jnp.log(jnp.asarray(lambdas))))


def rate_distortion(
    x: jax.Array, outputs: dict[str, jax.Array], weight: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Bpp + weight * 255^2 * MSE, the mean over the images of a batch.

    Args:
      x: Images [b, h, w, 3] in [0, 1].
      outputs: What a codec's forward pass gives: `x_hat`, `bits_y`, `bits_z`.
      weight: lambda, a scalar or one for each image [b].

    Returns:
      The loss and its parts: `bpp`, `bpp_z`, `mse` (on the 0..255 scale), `psnr` (of the mean MSE, dB).
    """
    pixels = x.shape[1] * x.shape[2]
    bpp = (outputs["bits_y"] + outputs["bits_z"]) / pixels
    mse = jnp.square((outputs["x_hat"] - x) * 255.0).mean(axis=(1, 2, 3))
    metrics = {"bpp": bpp.mean(), "bpp_z": outputs["bits_z"].mean() / pixels, "mse": mse.mean()}
    metrics["psnr"] = 10 * jnp.log10(255.0**2 / metrics["mse"])
    return (bpp + weight * mse).mean(), metrics


def contrastive(image: jax.Array, text: jax.Array, scale: jax.Array, names: jax.Array) -> jax.Array:
    """The symmetric contrastive loss of CLIP, where texts that are equal are right for each other's images.

    Args:
      image: Unit features [b, width].
      text: Unit features [b, width] of the images' texts.
      scale: Factor of the similarities, a scalar.
      names: Integers [b], equal for equal texts.

    Returns:
      The mean over both directions and the batch of the cross-entropy to an even share for every right partner.

    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021); several right partners as
    in Yang et al., Unified Contrastive Learning in Image-Text-Label Space (CVPR 2022), equation 3.
    """
    logits = scale * image @ text.T
    right = (names[:, None] == names).astype(logits.dtype)
    right /= right.sum(axis=1, keepdims=True)  # symmetric before, and b of both directions agree after
    losses = [-(right * jax.nn.log_softmax(side, axis=1)).sum(axis=1).mean() for side in (logits, logits.T)]
    return (losses[0] + losses[1]) / 2
