"""Sampling along a path: every step is pulled towards latents of its own level, and may be taken again from other noise.

    path = ddim.invert(denoise, schedule, z_hat, steps, max_steps, convention="matched")
    z_0 = sample_along(denoise, distance, schedule, path, steps, recurrences=8, pull=0.06, rng=key)

Source: Wu et al., Your Demands Deserve More Bits (papers/5), Algorithm 1, which differs from universal guidance (Bansal et al.,
2023) in that it compares the noisy latents themselves, so that no gradient goes through the network. Three things in it as printed
are read as follows.

* The gradient is subtracted: added, it would raise the distortion that the text says is minimised.
* The distance is between C(z_t) and the path's latents at t, not z_t itself, as the text has it.
* The factors of the DDIM steps are those of DDIM; printed as a short form, one has a negative number under the root.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxsem.diffusion.ddim import Denoise, ddim_step
from jaxsem.diffusion.guidance import renoise
from jaxsem.diffusion.schedule import NoiseSchedule, levels
from jaxsem.diffusion.spacing import next_timestep, timesteps
from jaxsem.errors import InputError

Distance = Callable[[jax.Array, jax.Array], jax.Array]
"""How far latents [b, ...] are from others of the same level: [b], differentiable in the first."""


def sample_along(
    denoise: Denoise,
    distance: Distance,
    schedule: NoiseSchedule,
    path: Float[Array, "n b ..."],
    steps: int | Int[Array, ""],
    recurrences: int | Int[Array, ""],
    pull: float | Float[Array, ""],
    rng: Key[Array, ""] | Key[Array, " b"],
) -> Float[Array, "b ..."]:
    """Denoises latents from the noisy end of a path to the clean level, pulled towards the path.

    Steps, recurrences, pull and keys may be traced: other ones run the program that is compiled already. Nothing but the step at
    hand is kept, whatever their number: the path is the only memory that grows with the steps.

    Args:
      denoise: The network, called once a recurrence.
      distance: What pulls: its gradient is taken at the noisy latents.
      schedule: The schedule.
      path: From `ddim.invert` with the convention "matched": path[k] lies where k sampler steps are left.
      steps: Of the sampler; at most as many as the path has.
      recurrences: How often each step is taken, at least 1: after all but the last its noise is added again, drawn anew.
      pull: gamma without its factor sqrt(abar_{t-1} / abar_t), which is put to it here.
      rng: One key, the same for each image whatever its place in a batch, or one for each.

    Returns:
      float32 [b, ...].

    Raises:
      InputError: A number of steps that the path does not have, no recurrence, or keys for another batch.
    """
    batch = path.shape[1]
    for name, value, most in (("steps", steps, len(path) - 1), ("recurrences", recurrences, None)):
        if not isinstance(value, jax.core.Tracer) and (value < 1 or (most is not None and value > most)):
            raise InputError(f"{name}={value}: take at least 1" + (f", and at most the path's {most}" if most else ""))
    if rng.shape not in ((), (batch,)):
        raise InputError(f"keys of {list(rng.shape)} for a batch of {batch}: give one, or one for each image")
    keys = jnp.broadcast_to(rng, (batch,))
    steps, recurrences = jnp.asarray(steps, jnp.int32), jnp.asarray(recurrences, jnp.int32)
    gradient = jax.grad(lambda z, reference: distance(z, reference).sum())

    def step(i: jax.Array, z: jax.Array) -> jax.Array:
        t, t_next = timesteps(schedule, steps, i), next_timestep(schedule, steps, i, "matched")
        reference = path[steps - i]
        factor = pull * jnp.sqrt(levels(schedule, t_next)[0] / levels(schedule, t)[0])
        times = jnp.broadcast_to(t, batch)

        def once(r: jax.Array, z: jax.Array) -> jax.Array:
            cleaner = ddim_step(schedule, denoise(z, times), z, t, t_next) - factor * gradient(z, reference)
            noise = _noise(keys, i, r, z)
            return jnp.where(r + 1 < recurrences, renoise(schedule, cleaner, t_next, t, noise), cleaner)

        return jax.lax.fori_loop(0, recurrences, once, z)

    return jax.lax.fori_loop(0, steps, step, path[steps].astype(jnp.float32))


def _noise(keys: jax.Array, i: jax.Array, r: jax.Array, z: jax.Array) -> jax.Array:
    def draw(key: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, i), r), z.shape[1:], z.dtype)

    return jax.vmap(draw)(keys)
