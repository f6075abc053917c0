"""Guidance: how strongly samples follow their context, and what lets a guided step be repeated.

    denoise = classifier_free(unet, context, null_context, scale=7.5)
    z_0 = ddim.sample(denoise, schedule, z_T, steps=50)

Scales may be traced: another one runs the program that is compiled already.

Source: Ho and Salimans, Classifier-free diffusion guidance (2022); Lin et al., Common diffusion noise schedules and sample steps
are flawed (2023), section 3.4, for the rescaling; Bansal et al., Universal guidance for diffusion models (2023), for
self-recurrence.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsem.diffusion.ddim import Denoise, fresh_variance, paired
from jaxsem.diffusion.schedule import NoiseSchedule, levels_like
from jaxsem.errors import InputError

ContextDenoise = Callable[[jax.Array, jax.Array, Any], jax.Array]
"""Maps latents z [b, ...], timesteps int32 [b] and a context, arrays [b, ...] in any pytree, to a prediction of z's shape."""

Scale = float | Float[Array, "..."]


def guided(
    conditional: Float[Array, "b ..."], unconditional: Float[Array, "b ..."], scale: Scale, rescale: Scale | None = None
) -> Float[Array, "b ..."]:
    """Goes from the prediction without context towards the one with it, and on: u + scale (c - u).

    Args:
      conditional: c, the prediction with the context.
      unconditional: u, the one without it.
      scale: 0 gives u, 1 gives c, and above 1 follows the context more than the model does. One number; one for each image [b];
        or a map that broadcasts to [b, h, w, 1], for places that follow it more than others.
      rescale: phi of Lin et al., in [0, 1], one number or [b]: how far each image's standard deviation is brought back to that of
        the conditional prediction. None leaves it as it is, as 0 does.

    Returns:
      float32, of the shape of the predictions.

    Raises:
      InputError: Predictions of two shapes, or a scale of none of the shapes above.
    """
    conditional, unconditional = paired(conditional, unconditional)
    mixed = unconditional + _shaped("scale", scale, conditional.shape) * (conditional - unconditional)
    if rescale is None:
        return mixed
    # Between phi of the rescaled and 1 - phi of the mixed prediction.
    phi = _shaped("rescale", rescale, conditional.shape)
    return mixed * (1 + phi * (_ratio_of_deviations(conditional, mixed) - 1))


def classifier_free(
    denoise: ContextDenoise, context: Any, null_context: Any, scale: Scale, rescale: Scale | None = None
) -> Denoise:
    """Makes a guided network: it runs the given one once, on a batch twice as large.

    With a scale of 1 throughout, the network with its context alone gives the same at half the cost.

    Args:
      denoise: The network.
      context: What it sees beside the latents, arrays [b, ...] in any pytree; a leading axis of 1 is for all images.
      null_context: The same without content (an empty or a negative prompt), of the same shapes but for the leading axes.
      scale: See `guided`.
      rescale: See `guided`.

    Returns:
      A function (z, t) -> prediction, float32. It raises InputError for contexts of two structures or shapes.
    """

    def both(z: jax.Array, t: jax.Array) -> jax.Array:
        doubled = jnp.concatenate([z, z]), jnp.tile(jnp.broadcast_to(t, len(z)), 2)
        conditional, unconditional = jnp.split(denoise(*doubled, _stacked(context, null_context, len(z))), 2)
        return guided(conditional, unconditional, scale, rescale)

    return both


def renoise(
    schedule: NoiseSchedule,
    z: Float[Array, "b ..."],
    t: int | Int[Array, "*b"],
    t_noisier: int | Int[Array, "*b"],
    noise: Float[Array, "b ..."],
) -> Float[Array, "b ..."]:
    """Adds the noise that the training's process adds from one timestep to a later one.

    With s = t and t = t_noisier, z_t = sqrt(abar_t / abar_s) z_s + sqrt(1 - abar_t / abar_s) noise. It undoes a sampler step, so
    that a guided one can be taken again from other noise: self-recurrence.

    Args:
      schedule: The schedule.
      z: Latents at the level of t.
      t: Their timestep, for all or for each image; negative for the clean level.
      t_noisier: The later timestep; NaN comes back for an earlier one.
      noise: Standard normal, of z's shape.

    Returns:
      float32 of z's shape.

    Raises:
      InputError: Noise or timesteps that do not fit.
    """
    z, noise = paired(z, noise)
    kept = levels_like(z, schedule, t_noisier)[0] / levels_like(z, schedule, t)[0]
    return jnp.sqrt(kept) * z + jnp.sqrt(fresh_variance(z, schedule, t, t_noisier)) * noise


def _shaped(name: str, scale: Any, shape: tuple[int, ...]) -> jax.Array:
    """A scale, ready to multiply a prediction of this shape."""
    scale = jnp.asarray(scale)
    if scale.shape == shape[:1]:
        return scale.reshape(shape[:1] + (1,) * (len(shape) - 1))
    target = (*shape[:-1], 1)
    # A map has every axis but perhaps the first: [h, w] would broadcast along the wrong ones.
    if scale.ndim and scale.ndim < len(shape) - 1:
        fits = False
    else:
        fits = _broadcasts(scale.shape, target)
    if not fits:
        raise InputError(
            f"{name} of {list(scale.shape)} fits no prediction of {list(shape)}: give one number, one for each image "
            f"({list(shape[:1])}), or a map that broadcasts to {list(target)}"
        )
    return scale


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    try:
        return jnp.broadcast_shapes(shape, target) == target
    except ValueError:
        return False


def _ratio_of_deviations(conditional: jax.Array, mixed: jax.Array) -> jax.Array:
    """Standard deviation of each image's conditional prediction over that of the mixed one; 1 where that is constant."""
    axes = tuple(range(1, mixed.ndim))
    ours, theirs = (jnp.var(part, axis=axes, keepdims=True) for part in (mixed, conditional))
    return jnp.sqrt(jnp.where(ours > 0, theirs, 1.0) / jnp.where(ours > 0, ours, 1.0))


def _stacked(context: Any, null_context: Any, batch: int) -> Any:
    """Both contexts, one after the other along the batch."""

    def stack(ours: Any, theirs: Any) -> jax.Array:
        ours, theirs = jnp.asarray(ours), jnp.asarray(theirs)
        if {len(ours.shape[:1]), len(theirs.shape[:1])} != {1} or ours.shape[1:] != theirs.shape[1:]:
            raise InputError(f"a context of {list(ours.shape)} and a null context of {list(theirs.shape)} do not fit")
        if not {ours.shape[0], theirs.shape[0]} <= {1, batch}:
            raise InputError(
                f"contexts of {list(ours.shape)} and {list(theirs.shape)} fit no batch of {batch}: give 1 or {batch}"
            )
        return jnp.concatenate([jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in (ours, theirs)])

    if jax.tree.structure(context) != jax.tree.structure(null_context):
        raise InputError(
            f"the context is {jax.tree.structure(context)} and the null context {jax.tree.structure(null_context)}: give "
            "the same arrays of both"
        )
    return jax.tree.map(stack, context, null_context)
