"""Losses of latent diffusion and of the codec of its latents, for `jaxsem.training`: pure functions of what networks gave."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxsem.codecs.hsvlc import lambda_of
from jaxsem.diffusion.schedule import NoiseSchedule, levels_like
from jaxsem.nn.sft import repeated

Metrics = dict[str, jax.Array]


def autoencoder_loss(
    images: Float[Array, "b h w c"],
    decoded: Float[Array, "b h w c"],
    mean: Float[Array, "b p q l"],
    logvar: Float[Array, "b p q l"],
    weight: float,
) -> tuple[jax.Array, Metrics]:
    """The squared error of images in [-1, 1] from a drawn latent, and `weight` times the divergence from N(0, 1) of a number of it.

    Source: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models (CVPR 2022), appendix G, without the
    perceptual and adversarial terms, which need networks of their own.
    """
    error = jnp.square(decoded - images).mean()
    divergence = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).mean()
    psnr = 10.0 * jnp.log10(4.0 / error)
    return error + weight * divergence, {"mse": error, "divergence": divergence, "psnr": psnr}


def noisy(
    schedule: NoiseSchedule, z: Float[Array, "b ..."], t: Int[Array, " b"], noise: Float[Array, "b ..."]
) -> Float[Array, "b ..."]:
    """sqrt(abar_t) z + sqrt(1 - abar_t) noise."""
    alpha, beta = levels_like(z, schedule, t)
    return jnp.sqrt(alpha) * z + jnp.sqrt(beta) * noise


def target_of(
    schedule: NoiseSchedule, z: Float[Array, "b ..."], t: Int[Array, " b"], noise: Float[Array, "b ..."]
) -> Float[Array, "b ..."]:
    """What a network of the schedule's `prediction_type` is to predict."""
    alpha, beta = levels_like(z, schedule, t)
    if schedule.prediction_type == "epsilon":
        return noise
    return z if schedule.prediction_type == "sample" else jnp.sqrt(alpha) * noise - jnp.sqrt(beta) * z


def denoising_draws(
    schedule: NoiseSchedule, z: Float[Array, "b ..."], rng: PRNGKeyArray
) -> tuple[Int[Array, " b"], Float[Array, "b ..."]]:
    """Timesteps, spread evenly over a batch, and noise.

    Each image gets a timestep from a stratum of its own, so that a small batch's loss does not depend on luck.
    """
    first, second = jax.random.split(rng)
    count = schedule.num_train_timesteps
    places = (jnp.arange(len(z)) + jax.random.uniform(first, (len(z),))) / len(z)
    t = jnp.minimum((places * count).astype(jnp.int32), count - 1)
    return t, jax.random.normal(second, z.shape)


def spatial_rate_distortion(
    z: Float[Array, "b h w l"],
    z_hat: Float[Array, "b h w l"],
    bits: Float[Array, "b s"],
    weight: Float[Array, "b p q"],
    pixels: int,
) -> tuple[jax.Array, Metrics]:
    """Bits per pixel, and the squared error weighted by lambda(M) position by position; papers/5, equation 1.

    Args:
      z: What was coded.
      z_hat: What comes back.
      bits: Of each image and scale.
      weight: M, a whole number of positions of z a cell.
      pixels: Of the image to a position of z.
    """
    positions = z.shape[1] * z.shape[2]
    rate = bits.sum(axis=1) / (positions * pixels)
    error = jnp.square(z - z_hat).mean(axis=-1)
    local = repeated(lambda_of(weight)[..., None], z.shape[1] // weight.shape[1])[..., 0]
    distortion = (local * error).mean(axis=(1, 2))
    metrics = {"bpp": rate.mean(), "mse": error.mean(), "weighted": distortion.mean()}
    return (rate + distortion).mean(), metrics
