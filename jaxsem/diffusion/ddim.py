"""DDIM, and its inversion: sampling from noise to latents and back.

    denoise = lambda z, t: unet.apply({"params": params}, z, t, context)             # z [b, ...], t int32 [b]
    path = ddim.invert(denoise, schedule, z_0, steps, max_steps=50)                  # [51, b, ...]
    z_0 = ddim.sample(denoise, schedule, path[steps], steps)

All are pure functions, to be called inside `jax.jit`. Steps, eta and keys are traced values there: another number runs the program
that is compiled already. Latents are float32 whatever the network computes in, since a path of fifty steps collects rounding.

Sampler step i of T goes from timestep `timesteps(i)` to `next_timestep(i)`, by one of two conventions: see `spacing`. Inversion
takes the same steps backwards: its step k goes from `next_timestep(T - 1 - k)` to `timesteps(T - 1 - k)`, and tells the network the
timestep at which it lands, the one that sampler step T - 1 - k tells it. So both visit the same timesteps in opposite order, and by
the convention "matched" (under "leading" spacing by either) the entry `path[k]` lies at the level where k sampler steps are left:
sampler step i starts where `path[T - i]` lies and ends where `path[T - i - 1]` does. That is what the guided decoding of RSIC
compares with. Its inversion, as printed, tells the network the timestep that a step leaves; under "leading" spacing, inverting with
`lambda z, t: denoise(z, jnp.maximum(t - schedule.num_train_timesteps // steps, 0))` does so.

Source: Song et al., Denoising diffusion implicit models (2021), equations 12 and 16.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxsem.diffusion.schedule import NoiseSchedule, levels, levels_like
from jaxsem.diffusion.spacing import check_steps, next_timestep, timesteps
from jaxsem.errors import InputError

Denoise = Callable[[jax.Array, jax.Array], jax.Array]
"""Maps latents z [b, ...] and their timesteps int32 [b] to a prediction of z's shape, of the schedule's `prediction_type`."""

# -- one step ---------------------------------------------------------------------------------------------------------


def predict_clean(
    schedule: NoiseSchedule, prediction: Float[Array, "b ..."], z: Float[Array, "b ..."], t: int | Int[Array, "*b"]
) -> Float[Array, "b ..."]:
    """The clean latents that a prediction means, clipped where the schedule says so: diffusers' `pred_original_sample`.

    Args:
      schedule: The schedule.
      prediction: What the network gave, of the schedule's `prediction_type`.
      z: What it saw.
      t: Timestep of z, for all or for each image; negative for the clean level.

    Returns:
      float32; NaN where z is pure noise and the prediction is of the noise.

    Raises:
      InputError: A prediction of another shape than z, or t of another one than [] or [b].
    """
    prediction, z = paired(prediction, z)
    alpha, beta = levels_like(z, schedule, t)
    if schedule.prediction_type == "sample":
        clean = prediction
    elif schedule.prediction_type == "v_prediction":
        clean = jnp.sqrt(alpha) * z - jnp.sqrt(beta) * prediction
    else:
        # A division by 0 could give an infinity, which clipping would turn into something that looks like an image.
        clean = (z - jnp.sqrt(beta) * prediction) / jnp.sqrt(jnp.where(alpha > 0, alpha, jnp.nan))
    if schedule.clip_sample:
        clean = jnp.clip(clean, -schedule.clip_sample_range, schedule.clip_sample_range)
    return clean


def predict_noise(
    schedule: NoiseSchedule, prediction: Float[Array, "b ..."], z: Float[Array, "b ..."], t: int | Int[Array, "*b"]
) -> Float[Array, "b ..."]:
    """The noise that a prediction means, whether or not the clean latents are clipped; arguments as `predict_clean`.

    Returns:
      float32; NaN where z is clean (an alpha-bar of 1) and the prediction is of the clean latents.
    """
    prediction, z = paired(prediction, z)
    alpha, beta = levels_like(z, schedule, t)
    if schedule.prediction_type == "epsilon":
        return prediction
    if schedule.prediction_type == "v_prediction":
        return jnp.sqrt(alpha) * prediction + jnp.sqrt(beta) * z
    return (z - jnp.sqrt(alpha) * prediction) / jnp.sqrt(jnp.where(beta > 0, beta, jnp.nan))


def ddim_step(
    schedule: NoiseSchedule,
    prediction: Float[Array, "b ..."],
    z: Float[Array, "b ..."],
    t: int | Int[Array, "*b"],
    t_next: int | Int[Array, "*b"],
    eta: float | Float[Array, ""] = 0.0,
    noise: Float[Array, "b ..."] | None = None,
) -> Float[Array, "b ..."]:
    """Takes latents from the level of timestep t to the cleaner one of t_next.

    Args:
      schedule: The schedule.
      prediction: What the network gave for z and t.
      z: The latents.
      t: Their timestep, for all or for each image.
      t_next: Where they go; negative for the clean level.
      eta: From 0, the same at every call, to 1, as noisy as the training's process (DDPM).
      noise: Standard normal, of z's shape; needed unless eta is the number 0.

    Returns:
      float32 of z's shape.

    Raises:
      InputError: Shapes that do not fit, an eta out of its range, or one without noise.
    """
    _check_eta(eta, noise is not None)
    clean = predict_clean(schedule, prediction, z, t)
    direction = predict_noise(schedule, prediction, z, t)
    alpha, beta = levels_like(clean, schedule, t_next)
    if noise is None:
        return jnp.sqrt(alpha) * clean + jnp.sqrt(beta) * direction
    noise, clean = paired(noise, clean)
    # sigma^2 = eta^2 beta share. The rest is a product, since 1 - alpha - sigma^2 may fall below 0 by rounding.
    share = fresh_variance(clean, schedule, t_next, t) / levels_like(clean, schedule, t)[1]
    eta = jnp.asarray(eta, clean.dtype)
    kept, sigma = jnp.sqrt(beta * (1 - eta**2 * share)), eta * jnp.sqrt(beta * share)
    return jnp.sqrt(alpha) * clean + kept * direction + sigma * noise


def invert_step(
    schedule: NoiseSchedule,
    prediction: Float[Array, "b ..."],
    z: Float[Array, "b ..."],
    t: int | Int[Array, "*b"],
    t_next: int | Int[Array, "*b"],
) -> Float[Array, "b ..."]:
    """Takes latents from the level of timestep t to the noisier one of t_next, as `DDIMInverseScheduler.step` of diffusers.

    It is the step of DDIM with eta 0, which knows no direction. Which timestep the network is told is the caller's choice: `invert`
    tells t_next, and diffusers' `timestep` is t_next too.

    Args:
      schedule: The schedule.
      prediction: What the network gave for z.
      z: The latents.
      t: Timestep of their level, negative for the clean one, for all or for each image.
      t_next: Where they go.

    Returns:
      float32 of z's shape.

    Raises:
      InputError: Shapes that do not fit.
    """
    return ddim_step(schedule, prediction, z, t, t_next)


def fresh_variance(z: jax.Array, schedule: NoiseSchedule, t: int | jax.Array, t_noisier: int | jax.Array) -> jax.Array:
    """1 - abar_{t_noisier} / abar_t, the variance of the noise that the training's process adds from t on, shaped for z."""
    alpha, beta = levels_like(z, schedule, t)
    alpha_noisier, beta_noisier = levels_like(z, schedule, t_noisier)
    # So written it keeps its digits where both alpha-bars are near 1, and is exactly 0 between equal levels.
    return beta_noisier - alpha_noisier / alpha * beta


# -- loops ------------------------------------------------------------------------------------------------------------


def sample(
    denoise: Denoise,
    schedule: NoiseSchedule,
    z_T: Float[Array, "b ..."],
    steps: int | Int[Array, ""],
    *,
    eta: float | Float[Array, ""] = 0.0,
    rng: Key[Array, "..."] | None = None,
    convention: str = "diffusers",
    max_steps: int | None = None,
) -> Float[Array, "b ..."]:
    """Denoises latents from the first timestep to the clean level.

    Args:
      denoise: The network, called once a step.
      schedule: The schedule.
      z_T: Latents at the level of `timesteps(schedule, steps, 0)`: standard normal, or an inversion's `path[steps]`.
      steps: Sampler steps, traced or not.
      eta: From 0, no noise is added, to 1.
      rng: One key, or one for each image; needed unless eta is the number 0.
      convention: Where each step leads; see the module. "diffusers" is `DDIMScheduler`.
      max_steps: Most steps, for a loop that can be differentiated backwards: it is a scan over so many, which skips those beyond
        `steps`. None is a loop of `steps`, which can be differentiated forwards only.

    Returns:
      float32 of z_T's shape. NaN for traced steps that `check_steps` would refuse.

    Raises:
      InputError: Steps or arguments that cannot be used, as far as they are not traced, or a prediction that does not fit.
    """
    _check_eta(eta, rng is not None)
    z_T, steps, possible = _start(schedule, z_T, steps, max_steps)
    keys = None if rng is None else _keys_of_images(rng, len(z_T))

    def step(index: jax.Array, z: jax.Array) -> jax.Array:
        t = timesteps(schedule, steps, index)
        t_next = next_timestep(schedule, steps, index, convention)
        noise = None if keys is None else _draw(keys, index, z)
        return ddim_step(schedule, denoise(z, _of_batch(t, z)), z, t, t_next, eta, noise)

    if max_steps is None:
        z_0 = jax.lax.fori_loop(0, steps, step, z_T)
    else:
        z_0, _ = jax.lax.scan(lambda z, i: (_step_if(i < steps, step, i, z), None), z_T, jnp.arange(max_steps))
    return jnp.where(possible, z_0, jnp.nan)


def invert(
    denoise: Denoise,
    schedule: NoiseSchedule,
    z_0: Float[Array, "b ..."],
    steps: int | Int[Array, ""],
    max_steps: int,
    *,
    convention: str = "diffusers",
) -> Float[Array, "n b ..."]:
    """Finds the noise from which `sample` would lead to given latents, and all that lies between.

    Args:
      denoise: The network, called once a step.
      schedule: The schedule.
      z_0: Clean latents.
      steps: Steps of the sampler to be inverted, traced or not.
      max_steps: Most of them; the program depends on it.
      convention: Where each step starts; see the module. "diffusers" is `DDIMInverseScheduler`; "matched" is for those who compare
        the path with a sampler's latents, under any spacing.

    Returns:
      float32 [max_steps + 1, b, ...]: path[0] is z_0, path[k] the latents after k steps, at timestep
      `timesteps(schedule, steps, steps - k)`, and path[steps] where sampling starts; the entries after it repeat it. NaN for
      traced steps that `check_steps` would refuse.

    Raises:
      InputError: Steps that cannot be used, as far as they are not traced; "linspace" spacing, unknown to `DDIMInverseScheduler`,
        under its convention; or a network that predicts clean latents where the clean level has no noise at all.
    """
    if convention == "diffusers" and schedule.timestep_spacing == "linspace":
        raise InputError("diffusers inverts 'leading' and 'trailing' spacing only: take the convention 'matched'")
    if schedule.prediction_type == "sample" and schedule.set_alpha_to_one:
        raise InputError(
            "the noise of latents without any cannot be told from a prediction of the clean ones: invert with "
            "set_alpha_to_one=False"
        )
    if max_steps < 1:
        raise InputError(f"max_steps={max_steps} leaves no step: take at least 1")
    z_0, steps, possible = _start(schedule, z_0, steps, max_steps)

    def step(k: jax.Array, z: jax.Array) -> jax.Array:
        index = steps - 1 - k
        t_next = timesteps(schedule, steps, index)
        t = next_timestep(schedule, steps, index, convention)
        return invert_step(schedule, denoise(z, _of_batch(t_next, z)), z, t, t_next)

    def entry(z: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = _step_if(k < steps, step, k, z)
        return z, z

    _, path = jax.lax.scan(entry, z_0, jnp.arange(max_steps))
    return jnp.where(possible, jnp.concatenate([z_0[None], path]), jnp.nan)


# -- shared -----------------------------------------------------------------------------------------------------------


def _start(
    schedule: NoiseSchedule, z: Any, steps: Any, max_steps: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The latents as float32, the steps as int32, and whether one can sample with so many."""
    if not isinstance(steps, jax.core.Tracer):
        check_steps(schedule, steps, max_steps)
    steps = jnp.asarray(steps, jnp.int32)
    if steps.ndim:
        raise InputError(f"steps is one integer for the whole batch, not {list(steps.shape)}")
    most = min(schedule.num_train_timesteps, max_steps or schedule.num_train_timesteps)
    alpha, _ = levels(schedule, timesteps(schedule, steps, 0))
    starts = alpha > 0 if schedule.prediction_type == "epsilon" else alpha >= 0  # neither holds for NaN
    return paired(z, z)[0], steps, (steps >= 1) & (steps <= most) & starts


def _step_if(condition: jax.Array, step: Callable, index: jax.Array, z: jax.Array) -> jax.Array:
    return jax.lax.cond(condition, lambda z: step(index, z), lambda z: z, z)


def _of_batch(t: jax.Array, z: jax.Array) -> jax.Array:
    return jnp.broadcast_to(t, len(z))


def paired(a: Any, z: Any) -> tuple[jax.Array, jax.Array]:
    """Two arrays [b, ...] of one shape, both in the precision of the second, float32 at least.

    Raises:
      InputError: They are of two shapes.
    """
    a, z = jnp.asarray(a), jnp.asarray(z)
    if a.shape != z.shape or z.ndim < 1:
        raise InputError(
            f"arrays of {list(a.shape)} and {list(z.shape)} do not fit: noise and predictions have the shape of the latents"
        )
    dtype = jnp.promote_types(z.dtype, jnp.float32)
    return a.astype(dtype), z.astype(dtype)


def _check_eta(eta: Any, has_noise: bool) -> None:
    traced = isinstance(eta, jax.core.Tracer)
    if not traced and not 0 <= eta <= 1:
        raise InputError(f"eta is from 0 to 1, not {eta}")
    if not has_noise and (traced or eta != 0):
        raise InputError("an eta that is traced or above 0 adds noise: give the noise, or the key to draw it with")


def _keys_of_images(rng: jax.Array, batch: int) -> jax.Array:
    if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) or rng.shape not in ((), (batch,)):
        raise InputError(
            f"rng is one key (jax.random.key) or one for each of {batch} images, not {rng.dtype} of {list(rng.shape)}"
        )
    return jax.random.split(rng, batch) if rng.shape == () else rng


def _draw(keys: jax.Array, index: jax.Array, z: jax.Array) -> jax.Array:
    """Noise of a step for z [b, ...], image by image, so that one's does not depend on the others."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), z.shape[1:], z.dtype))(keys)
