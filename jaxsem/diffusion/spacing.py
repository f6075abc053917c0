"""Which timesteps a sampler visits: fewer than the model was trained on, spaced as diffusers spaces them.

Sampler step i of T goes from timestep `timesteps(i)` to `next_timestep(i)`, which has two conventions:

    "diffusers"   t - num_train_timesteps // T, as `DDIMScheduler` and `DDIMInverseScheduler` of diffusers do whatever the next
                  timestep is. It is the next timestep under "leading" spacing. Under the others it often is not: there a step may
                  land beside the level from which the next one starts.
    "matched"     the next timestep itself, and the clean level after the last.

The number of steps is a traced value, and the timesteps are exact integers on every device.

Source: Lin et al., Common diffusion noise schedules and sample steps are flawed (2023), table 2; diffusers, for the roundings.
"""

import operator
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxsem.diffusion.schedule import NoiseSchedule
from jaxsem.errors import InputError

CONVENTIONS = ("diffusers", "matched")


def timesteps(schedule: NoiseSchedule, steps: int | Int[Array, ""], index: int | Int[Array, "*n"]) -> Int[Array, "*n"]:
    """The timestep of the index-th of so many sampler steps, from the noisiest on: diffusers' `DDIMScheduler.timesteps[index]`.

    Under "trailing" spacing diffusers lists, for a few numbers of steps such as 61 of 1000, one timestep more than asked for: a
    last one of -1, which comes of rounding and is not taken here.

    Args:
      schedule: The schedule.
      steps: Sampler steps, from 1 to `num_train_timesteps` (see `check_steps`).
      index: From 0 to steps - 1; one, or several at once.
    """
    steps, index = jnp.asarray(steps, jnp.int32), jnp.asarray(index, jnp.int32)
    count, spacing = schedule.num_train_timesteps, schedule.timestep_spacing
    if spacing == "leading":
        return (steps - 1 - index) * (count // steps) + schedule.steps_offset
    numerator, denominator, less = _ratio(spacing, count, steps, index)
    quotient, rest = numerator // denominator, numerator % denominator
    tie_is_up = (quotient % 2 == 1) ^ jnp.isin(steps * count + index, _ties_to_odd(spacing, count))
    up = (2 * rest > denominator) | ((2 * rest == denominator) & tie_is_up)
    return quotient + up.astype(jnp.int32) - less


def next_timestep(
    schedule: NoiseSchedule,
    steps: int | Int[Array, ""],
    index: int | Int[Array, "*n"],
    convention: str = "diffusers",
) -> Int[Array, "*n"]:
    """The timestep to which a sampler step leads, negative for the clean level; see the module for the two conventions.

    Args:
      schedule: The schedule.
      steps: Sampler steps.
      index: Which step, from 0 to steps - 1.
      convention: "diffusers" or "matched".

    Raises:
      InputError: Another convention.
    """
    if convention not in CONVENTIONS:
        raise InputError(f"there is no convention {convention!r} of steps; there are {', '.join(CONVENTIONS)}")
    steps, index = jnp.asarray(steps, jnp.int32), jnp.asarray(index, jnp.int32)
    if convention == "diffusers":
        return timesteps(schedule, steps, index) - schedule.num_train_timesteps // steps
    return jnp.where(index + 1 < steps, timesteps(schedule, steps, index + 1), -1)


def check_steps(schedule: NoiseSchedule, steps: Any, max_steps: int | None = None) -> None:
    """Refuses numbers of steps with which one cannot sample; host code calls it before it passes them to a jitted function.

    `sample` and `invert` call it for steps that are not traced. Traced ones that it would refuse give NaN.

    Raises:
      InputError: Steps below 1, above `num_train_timesteps` or above max_steps; an offset that leads beyond the last timestep; or
        a first timestep of pure noise, of which a prediction of noise says nothing.
    """
    count = schedule.num_train_timesteps
    try:
        steps = operator.index(steps)
    except TypeError as error:
        raise InputError(f"steps is one integer, not {steps!r:.80}") from error
    if not 1 <= steps <= count:
        raise InputError(f"{steps} steps of a model trained on {count} timesteps: take from 1 to {count}")
    if max_steps is not None and steps > max_steps:
        raise InputError(f"{steps} steps do not fit max_steps={max_steps}: take fewer, or raise it")
    first = _first_timestep(schedule, steps)
    if first >= count:
        raise InputError(
            f"{steps} steps with steps_offset={schedule.steps_offset} start at timestep {first}, beyond the last, {count - 1}: "
            "take fewer steps"
        )
    if schedule.prediction_type == "epsilon" and not schedule.alpha_bars[first] > 0:
        raise InputError(
            f"{steps} steps start at pure noise (timestep {first}), where a network that predicts the noise says nothing of the "
            "image: take fewer steps with 'leading' spacing, or a model of 'v_prediction'"
        )


def _first_timestep(schedule: NoiseSchedule, steps: int) -> int:
    count = schedule.num_train_timesteps
    if schedule.timestep_spacing == "leading":
        return (steps - 1) * (count // steps) + schedule.steps_offset
    return 0 if schedule.timestep_spacing == "linspace" and steps == 1 else count - 1


def _ratio(spacing: str, count: int, steps: Any, index: Any) -> tuple[Any, Any, int]:
    """Integers a, b, c such that the timestep is a / b, rounded, less c; of arrays of JAX or of NumPy."""
    if spacing == "trailing":
        return count * (steps - index), steps, 1
    # A single step stands at 0, whatever it is divided by.
    return (count - 1) * (steps - 1 - index), steps - 1 + (steps == 1), 0


@lru_cache(maxsize=16)
def _ties_to_odd(spacing: str, count: int) -> np.ndarray:
    """int32, steps * count + index, of the timesteps halfway between two integers that NumPy's float64 rounds to the odd one.

    Exact halves go to the even integer. diffusers gets many of them by a product or a sum that is a last digit off and then rounds
    up or down; a device without float64 cannot repeat it. For 1000 timesteps they are a few hundred.
    """
    found = []
    for steps in range(1, count + 1):
        index = np.arange(steps)
        if spacing == "trailing":
            theirs = np.round(np.arange(count, 0, -(count / steps)))[:steps]
        else:
            theirs = np.linspace(0, count - 1, steps).round()[::-1]
        numerator, denominator, _ = _ratio(spacing, count, steps, index)
        tie = 2 * (numerator % denominator) == denominator
        found.append(steps * count + index[tie & (theirs % 2 == 1)])
    return np.concatenate(found).astype(np.int32)
