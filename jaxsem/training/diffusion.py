"""Losses of latent diffusion and of the codec of its latents, for `jaxsem.training`, and what calibrates the codec afterwards."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxsem.codecs.hsvlc import Hsvlc, lambda_of
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


def codec_loss(module: Hsvlc) -> Callable[..., tuple[jax.Array, Metrics]]:
    """The loss of a codec of latents.

    Returns:
      loss_of(params, z, weight, rng) -> (loss, metrics), pure: z [b, h, w, l] under M [b, p, q]. The metrics are those of
      `spatial_rate_distortion` and the loss itself, `objective`; without `rng` there is no noise, but rounding.
    """

    def loss_of(params: Any, z: jax.Array, weight: jax.Array, rng: jax.Array | None) -> tuple[jax.Array, Metrics]:
        outputs = module.apply({"params": params}, z, weight, rng)
        loss, metrics = spatial_rate_distortion(z, outputs["z_hat"], outputs["bits"], weight, module.config.pixels)
        return loss, {"objective": loss, **metrics}

    return loss_of


def calibration_samples(
    module: Hsvlc, params: Any, pairs: Iterable[tuple[Any, np.ndarray]], values: Float[np.ndarray, " levels"]
) -> list[tuple[dict[str, jax.Array], np.ndarray]]:
    """What `jaxsem.calibration.calibrate_module` tries: latents that are to be rounded, under maps as files hold them.

    Args:
      module: The codec.
      params: Its parameters.
      pairs: z [1, h, w, l] and M [1, p, q] in [0, 1], all of the same sizes.
      values: M of each level, to the nearest of which maps are rounded.
    """
    run = jax.jit(lambda z, weight: module.apply({"params": params}, z, weight, method="analyze"))
    found = []
    for z, weight in pairs:
        weight = values[np.rint(weight * (len(values) - 1)).astype(np.int64)]
        found.append((run(jnp.asarray(z, jnp.float32), weight), weight))
    return found
