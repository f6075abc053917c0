"""Guided generative decoding: what a file says of a latent and a text, completed by a diffusion model.

    ẑ_0, c ─ DDIM inversion under c ─▶ ẑ_1 ... ẑ_T, kept on the device
    z_T = ẑ_T ─ each step: denoised under c, less where M is high; pulled until C(z_t) is ẑ_t ─▶ z_0 ─ decoder ─▶ image

The whole loop is one compiled program for a batch of images of one size. Steps, recurrences, scales and seeds are numbers in it.

Source: Wu et al., Your Demands Deserve More Bits (papers/5), section II.C and Algorithm 1; see `jaxsem.diffusion.along` for how it
is read. Inversion is under the caption with a scale of 1, which the paper leaves open: with more, DDIM does not find its way back.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxsem.backbones.autoencoder_kl import AutoencoderKl
from jaxsem.backbones.unet_2d_condition import UnetCondition
from jaxsem.codecs.hsvlc import Hsvlc
from jaxsem.diffusion import NoiseSchedule, classifier_free, invert, sample_along
from jaxsem.nn.sft import repeated

Params = dict[str, Any]


@partial(jax.jit, static_argnames=("unet", "codec", "schedule", "max_steps"))
def guided_latents(
    unet: UnetCondition,
    codec: Hsvlc,
    schedule: NoiseSchedule,
    max_steps: int,
    params: Params,
    z_hat: Float[Array, "b h w l"],
    weight: Float[Array, "b p q"],
    context: Float[Array, "b n d"],
    null: Float[Array, "1 n d"],
    numbers: dict[str, jax.Array],
    keys: Key[Array, " b"],
) -> Float[Array, "b h w l"]:
    """z_0 of files, by Algorithm 1.

    Args:
      unet: The diffusion model.
      codec: C.
      schedule: Of the diffusion model.
      max_steps: Room for the inverted path.
      params: Of `unet` and `codec`, by these names.
      z_hat: What the codec decoded.
      weight: M.
      context: Of the texts.
      null: Of the empty text.
      numbers: `steps` and `recurrences`, integers; `pull`, `scale` and `relax`, as in `GuidanceConfig`.
      keys: Of the noise, one for each image.
    """

    def denoise(z: jax.Array, t: jax.Array, context: jax.Array) -> jax.Array:
        return unet.apply({"params": params["unet"]}, z, t, context)

    def distance(z: jax.Array, reference: jax.Array) -> jax.Array:
        found = codec.apply({"params": params["codec"]}, z, weight)["z_hat"]  # rounding lets gradients pass
        return 0.5 * jnp.square(found - reference).sum(axis=(1, 2, 3))

    def conditional(z: jax.Array, t: jax.Array) -> jax.Array:
        return denoise(z, t, context)

    path = invert(conditional, schedule, z_hat, numbers["steps"], max_steps, convention="matched")
    local = repeated(weight[..., None], codec.config.map_stride)
    guided = classifier_free(denoise, context, null, numbers["scale"] * (1.0 - numbers["relax"] * local))
    return sample_along(
        guided, distance, schedule, path, numbers["steps"], numbers["recurrences"], numbers["pull"], keys
    )


@partial(jax.jit, static_argnames="autoencoder")
def run_decoder(autoencoder: AutoencoderKl, params: Params, z: Float[Array, "b h w l"]) -> jax.Array:
    """uint8 images [b, s h, s w, c] of scaled latents."""
    images = autoencoder.apply({"params": params}, autoencoder.config.unscale(z), method="decode")
    return jnp.round(jnp.clip(images * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)


@partial(jax.jit, static_argnames="autoencoder")
def run_encoder(autoencoder: AutoencoderKl, params: Params, images: jax.Array) -> Float[Array, "b h w l"]:
    """Scaled latents, the means, of uint8 images [b, h, w, c] whose sides are multiples of the stride."""
    mean, _ = autoencoder.apply({"params": params}, images.astype(jnp.float32) / 127.5 - 1.0, method="encode")
    return autoencoder.config.scale(mean)


def keys_of(seed: int | Int[Array, ""], batch: int) -> Key[Array, " b"]:
    """The same key for each image: what a file decodes to depends on the file and the seed, and on nothing beside it."""
    return jnp.broadcast_to(jax.random.key(seed), (batch,))
