"""The noise of a diffusion model at each timestep, as its checkpoint's `scheduler/scheduler_config.json` describes it.

    z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise,    abar_t = (1 - beta_0) (1 - beta_1) ... (1 - beta_t)

Timesteps count from 0, which is noisy already, to `num_train_timesteps` - 1; every negative one stands for the clean level, where
sampling ends and inversion starts.

Source: Ho et al., Denoising diffusion probabilistic models (2020), for linear betas; Rombach et al., High-resolution image
synthesis with latent diffusion models (2022), scaled_linear; Nichol and Dhariwal, Improved denoising diffusion probabilistic models
(2021), squaredcos_cap_v2; Lin et al., Common diffusion noise schedules and sample steps are flawed (2023), for betas rescaled to
end in pure noise and for the names of the spacings.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsem.errors import InputError, WeightsError
from jaxsem.files import describe, read_bytes

MOST_TIMESTEPS = 10_000
"""Published models have 1000 or 4000; the limit keeps the arithmetic of timesteps within int32."""

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True)
class NoiseSchedule:
    """A noise schedule, and how a sampler uses it; names and defaults are those of diffusers' `DDIMScheduler`.

    It is static and hashes by its values: a jitted function takes it as a static argument or closes over it.

    Attributes:
      num_train_timesteps: Timesteps of the training, at most `MOST_TIMESTEPS`.
      beta_start: The first beta of "linear" and "scaled_linear", in (0, 1].
      beta_end: Their last one.
      beta_schedule: "linear"; "scaled_linear", linear in the roots; or "squaredcos_cap_v2", which needs no ends.
      trained_betas: One beta a timestep, in place of a schedule of the three.
      prediction_type: What the network gives: "epsilon", the noise; "sample", the clean latents; or "v_prediction",
        sqrt(abar) noise - sqrt(1 - abar) clean.
      timestep_spacing: Which timesteps fewer steps visit: "leading", "trailing" or "linspace".
      steps_offset: Added to the timesteps of "leading".
      set_alpha_to_one: The clean level has an alpha-bar of 1; otherwise that of timestep 0.
      clip_sample: Predictions of clean latents are cut to `clip_sample_range` on both sides of 0.
      clip_sample_range: At most their magnitude.
      rescale_betas_zero_snr: The last timestep is made pure noise, an alpha-bar of 0.

    Raises:
      InputError: A value of another kind or out of its range, or betas that do not make each timestep noisier than the one before.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        count = self.num_train_timesteps
        _check_integer("num_train_timesteps", count, 1, MOST_TIMESTEPS)
        _check_integer("steps_offset", self.steps_offset, 0, count - 1)
        _check_choice("beta_schedule", self.beta_schedule, tuple(_BETAS))
        _check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        _check_choice("timestep_spacing", self.timestep_spacing, SPACINGS)
        for name in ("set_alpha_to_one", "clip_sample", "rescale_betas_zero_snr"):
            _check_choice(name, getattr(self, name), (False, True))
        _check_real("beta_start", self.beta_start, 1.0)
        _check_real("beta_end", self.beta_end, 1.0)
        _check_real("clip_sample_range", self.clip_sample_range, float(np.finfo(np.float32).max))
        if self.trained_betas is not None:
            _check_trained(self.trained_betas, count)
        if self.rescale_betas_zero_snr and count == 1:
            raise InputError("rescale_betas_zero_snr keeps the first of the timesteps and needs 2 of them, not 1")
        _check_noisier(_alpha_bars(self))

    @cached_property
    def alpha_bars(self) -> np.ndarray:
        """float32 [num_train_timesteps], read-only: the alpha-bar of each timestep, computed in float64."""
        return _frozen(_alpha_bars(self))

    @cached_property
    def table(self) -> np.ndarray:
        """float32 [2, 1 + num_train_timesteps], read-only: alpha-bar and 1 - alpha-bar, of the clean level first.

        Both are rounded from float64: 1 - alpha-bar, taken in float32, would lose half of its digits at the first timesteps.
        """
        bars = _alpha_bars(self)
        bars = np.concatenate([[1.0 if self.set_alpha_to_one else bars[0]], bars])
        return _frozen(np.stack([bars, 1 - bars]))


def levels(schedule: NoiseSchedule, t: int | Int[Array, "*b"]) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """Alpha-bar and 1 - alpha-bar at timesteps.

    Args:
      schedule: The schedule.
      t: Timesteps, traced or not; a negative one is the clean level. NaN comes back for one beyond the last, which an index
        would silently take for the last itself.
    """
    row = jnp.maximum(jnp.asarray(t), -1) + 1
    alpha, beta = (jnp.take(jnp.asarray(part), row, mode="fill", fill_value=jnp.nan) for part in schedule.table)
    return alpha, beta


def levels_like(z: jax.Array, schedule: NoiseSchedule, t: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """`levels` at a timestep for all of a batch, or at one for each image [b], shaped to multiply latents z [b, ...].

    Raises:
      InputError: Timesteps of another shape.
    """
    shape = jnp.shape(t)
    if shape not in ((), z.shape[:1]):
        raise InputError(f"t is one timestep, or {len(z)} for latents of {list(z.shape)}, not {list(shape)}")
    alpha, beta = (part.reshape(shape + (1,) * (z.ndim - 1) * len(shape)) for part in levels(schedule, t))
    return alpha, beta


# -- betas ------------------------------------------------------------------------------------------------------------


def _linear(start: float, end: float, count: int) -> np.ndarray:
    return np.linspace(start, end, count)


def _scaled_linear(start: float, end: float, count: int) -> np.ndarray:
    return np.linspace(start**0.5, end**0.5, count) ** 2


def _squared_cosine(start: float, end: float, count: int) -> np.ndarray:
    bars = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - bars[1:] / bars[:-1], 0.999)


_BETAS: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _squared_cosine,
}


def _alpha_bars(schedule: NoiseSchedule) -> np.ndarray:
    """float64 [num_train_timesteps]."""
    if schedule.trained_betas is not None:
        betas = np.array(schedule.trained_betas, np.float64)
    else:
        draw = _BETAS[schedule.beta_schedule]
        betas = draw(float(schedule.beta_start), float(schedule.beta_end), schedule.num_train_timesteps)
    bars = np.cumprod(1 - betas)
    if not schedule.rescale_betas_zero_snr:
        return bars
    roots = np.sqrt(bars)
    # The first keeps its value, the last becomes 0.
    return ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2


def _frozen(array: np.ndarray) -> np.ndarray:
    array = array.astype(np.float32)
    array.flags.writeable = False
    return array


# -- checks -----------------------------------------------------------------------------------------------------------


def _check_integer(name: str, value: Any, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InputError(f"{name} is an integer from {least} to {most}, not {_shown(value)}")


def _check_real(name: str, value: Any, most: float) -> None:
    # Comparing refuses NaN, and takes integers too large for a float.
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= most:
        raise InputError(f"{name} is a number above 0 and at most {most:g}, not {_shown(value)}")


def _check_choice(name: str, value: Any, choices: tuple) -> None:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise InputError(f"{name} is one of {', '.join(map(repr, choices))}, not {_shown(value)}")


def _check_trained(betas: Any, count: int) -> None:
    if not isinstance(betas, tuple):
        raise InputError(f"trained_betas is a tuple of numbers, not {_shown(betas)}")
    if len(betas) != count:
        raise InputError(f"trained_betas holds {len(betas)} numbers for {count} num_train_timesteps: give one each")
    for place, beta in enumerate(betas):
        _check_real(f"trained_betas[{place}]", beta, 1.0)


def _check_noisier(bars: np.ndarray) -> None:
    """In float32 too, no timestep but the last may drown the image entirely: nothing could be predicted at the others."""
    before = np.concatenate([[1.0], bars[:-1]])
    wrong = ~(bars < before) | (before < np.finfo(np.float32).tiny)
    if wrong.any():
        place = int(np.argmax(wrong))
        raise InputError(
            f"alpha-bar goes from {before[place]:.4g} to {bars[place]:.4g} at timestep {place}, and has to fall at each, to 0 at "
            "the last at the earliest: choose other betas"
        )


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__} of very many digits"
    return text if len(text) <= 80 else f"{text[:80]}..."


STABLE_DIFFUSION = NoiseSchedule(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    set_alpha_to_one=False,
    clip_sample=False,
)
"""Stable Diffusion 1.x and the noise-predicting 2.x (2-base, 2.1-base)."""


# -- diffusers' files -------------------------------------------------------------------------------------------------

# What a file leaves out of the noise process has the default of the class that wrote it, and so has clip_sample: a class that
# never clips writes nothing about it. Here is where those differ from DDIM's.
_UNCLIPPED = {"clip_sample": False}
_LATENT = {"clip_sample": False, "beta_start": 0.00085, "beta_end": 0.012}
_CLASSES: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "DDIMParallelScheduler": {},
    "DDPMScheduler": {},
    "DDPMParallelScheduler": {},
    "PNDMScheduler": _UNCLIPPED,
    "LMSDiscreteScheduler": _UNCLIPPED,
    "EulerDiscreteScheduler": _UNCLIPPED,
    "EulerAncestralDiscreteScheduler": _UNCLIPPED,
    "DPMSolverMultistepScheduler": _UNCLIPPED,
    "DPMSolverSinglestepScheduler": _UNCLIPPED,
    "UniPCMultistepScheduler": _UNCLIPPED,
    "DEISMultistepScheduler": _UNCLIPPED,
    "SASolverScheduler": _UNCLIPPED,
    "HeunDiscreteScheduler": _LATENT,
    "KDPM2DiscreteScheduler": _LATENT,
    "KDPM2AncestralDiscreteScheduler": _LATENT,
    "LCMScheduler": {**_LATENT, "beta_schedule": "scaled_linear"},
    "TCDScheduler": {**_LATENT, "beta_schedule": "scaled_linear"},
}

# What would change the predictions or the noise process, and is not done here.
_REFUSED = {
    "thresholding": "dynamic thresholding of the predictions",
    "use_flow_sigmas": "the noise of a rectified flow",
}


def schedule_from_json(source: str | os.PathLike | Mapping[str, Any]) -> NoiseSchedule:
    """Reads the schedule of a checkpoint from the JSON file of a scheduler of diffusers.

    The file may have been written by any scheduler whose betas describe the same noise process; what only that class's way of
    sampling needs (`skip_prk_steps`, `solver_order`, `use_karras_sigmas`, ...) is left aside. Absent betas and an absent
    `clip_sample` have the defaults of the class that wrote the file, all other absent fields those of `DDIMScheduler`.

    Args:
      source: The path of `scheduler_config.json`, or its fields.

    Raises:
      InputError: The file cannot be read.
      WeightsError: It is no JSON object, not of a known class, or describes a schedule that cannot be or is not known.
    """
    if isinstance(source, Mapping):
        return _parse(source, "the scheduler's config")
    try:
        tree = json.loads(read_bytes(source))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise WeightsError(f"{source} is no JSON file ({describe(error)}): download it again") from error
    if not isinstance(tree, dict):
        raise WeightsError(f"{source} holds a {type(tree).__name__}, not a JSON object: give a scheduler_config.json")
    return _parse(tree, os.fspath(source))


def _parse(tree: Mapping[str, Any], name: str) -> NoiseSchedule:
    kind = tree.get("_class_name")
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise WeightsError(
            f"{name} has the _class_name {_shown(kind)}, and the schedulers known to share DDIM's noise are {', '.join(_CLASSES)}"
        )
    for key, what in _REFUSED.items():
        if tree.get(key) not in (None, False):
            raise WeightsError(f"{name} asks for {what} ({key}={_shown(tree[key])}), which is not done here")
    known = {field.name for field in fields(NoiseSchedule)}
    values = {**_CLASSES[kind], **{key: value for key, value in tree.items() if key in known}}
    if isinstance(betas := values.get("trained_betas"), list):
        values["trained_betas"] = tuple(betas)
    try:
        return NoiseSchedule(**values)
    except InputError as error:
        raise WeightsError(f"{name}: {error}") from error
