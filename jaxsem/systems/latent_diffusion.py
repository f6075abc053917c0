"""A whole published model of latent diffusion: what a folder of diffusers holds, loaded together.

    folder/vae  folder/unet  folder/text_encoder  folder/tokenizer  folder/scheduler/scheduler_config.json

Source: Rombach et al., High-resolution image synthesis with latent diffusion models (2022); the folders are those of diffusers'
StableDiffusionPipeline.
"""

import os
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxsem.backbones.autoencoder_kl import AutoencoderKl, AutoencoderKlConfig
from jaxsem.backbones.clip_config import TextConfig
from jaxsem.backbones.unet_2d_condition import UnetCondition, UnetConditionConfig
from jaxsem.diffusion.schedule import NoiseSchedule, schedule_from_json
from jaxsem.errors import InputError, WeightsError
from jaxsem.systems.text_condition import TextCondition, load_text_condition
from jaxsem.weights.diffusion import autoencoder_config, load_autoencoder_kl, load_unet_condition, unet_config
from jaxsem.weights.huggingface import find
from jaxsem.weights.text_encoder import text_tower_config

_SCHEDULER = "scheduler/scheduler_config.json"
_NEEDED = (_SCHEDULER, "vae/config.json", "unet/config.json", "text_encoder/config.json")


@dataclass(frozen=True)
class PipelineConfig:
    """The sizes of the parts of a pipeline.

    Attributes:
      autoencoder: Images to latents.
      unet: The denoiser.
      schedule: Its noise, and whether it predicts noise or velocity.
      text: The text tower.
    """

    autoencoder: AutoencoderKlConfig
    unet: UnetConditionConfig
    schedule: NoiseSchedule
    text: TextConfig


@dataclass(frozen=True, eq=False)
class LatentDiffusion:
    """The parts of a pipeline; parameters are NumPy arrays, not yet on a device.

    Attributes:
      name: Where it comes from.
      autoencoder: Images to latents.
      unet: The denoiser.
      schedule: Its noise, and whether it predicts noise or velocity.
      text: The text tower.
      params: Of `autoencoder` and `unet`, by these names.
    """

    name: str
    autoencoder: AutoencoderKl
    unet: UnetCondition
    schedule: NoiseSchedule
    text: TextCondition
    params: dict[str, Any]


def read_pipeline_config(source: str | os.PathLike) -> PipelineConfig:
    """Reads what a pipeline of Stable Diffusion 1.x or 2.x says of itself; no weights are read, nor downloaded.

    Args:
      source: Its folder, or its Hugging Face id.

    Raises:
      InputError: A part is missing.
      WeightsError: A part is of another architecture, or does not fit the others.
    """
    name = os.fspath(source)
    missing = [part for part in _NEEDED if find(source, part) is None]
    if missing:
        raise InputError(f"{name} holds no {missing[0]}: give the folder of a whole pipeline of Stable Diffusion")
    schedule = schedule_from_json(find(source, _SCHEDULER))
    autoencoder, unet, text = autoencoder_config(source), unet_config(source), text_tower_config(source)
    if unet.in_channels != autoencoder.latent_channels or text.width != unet.context_width:
        raise WeightsError(
            f"the parts of {name} do not fit together: latents of {autoencoder.latent_channels} and {unet.in_channels} channels, "
            f"texts of {text.width} and {unet.context_width} numbers a token; give a text-to-image pipeline"
        )
    return PipelineConfig(autoencoder, unet, schedule, text)


def load_latent_diffusion(
    source: str | os.PathLike, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
) -> LatentDiffusion:
    """Loads a pipeline of Stable Diffusion 1.x or 2.x.

    Args:
      source: Its folder, or its Hugging Face id.
      dtype: Of the networks' computation.
      param_dtype: Of the parameters.

    Raises:
      InputError: A part is missing.
      WeightsError: A part is damaged, of another architecture, or does not fit the others.
    """
    config = read_pipeline_config(source)
    autoencoder, first = load_autoencoder_kl(source, config.autoencoder, dtype, param_dtype)
    unet, second = load_unet_condition(source, config.unet, dtype, param_dtype)
    text = load_text_condition(source, dtype, param_dtype)
    params = {"autoencoder": first, "unet": second}
    return LatentDiffusion(os.fspath(source), autoencoder, unet, config.schedule, text, params)
