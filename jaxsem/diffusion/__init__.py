"""Diffusion: noise schedules of published checkpoints, DDIM and its inversion, guidance."""

from jaxsem.diffusion.along import Distance, sample_along
from jaxsem.diffusion.ddim import (
    Denoise,
    ddim_step,
    invert,
    invert_step,
    predict_clean,
    predict_noise,
    sample,
)
from jaxsem.diffusion.guidance import ContextDenoise, classifier_free, guided, renoise
from jaxsem.diffusion.schedule import STABLE_DIFFUSION, NoiseSchedule, levels, schedule_from_json
from jaxsem.diffusion.spacing import check_steps, next_timestep, timesteps

__all__ = [
    "STABLE_DIFFUSION",
    "ContextDenoise",
    "Denoise",
    "Distance",
    "NoiseSchedule",
    "check_steps",
    "classifier_free",
    "ddim_step",
    "guided",
    "invert",
    "invert_step",
    "levels",
    "next_timestep",
    "predict_clean",
    "predict_noise",
    "renoise",
    "sample",
    "sample_along",
    "schedule_from_json",
    "timesteps",
]
