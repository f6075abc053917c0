"""The text encoder of latent diffusion, a text tower of CLIP, in the layout of a diffusers pipeline.

    folder/text_encoder/config.json, folder/text_encoder/model.safetensors

Stable Diffusion 1.x has the text tower of CLIP ViT-L/14. 2.x has that of OpenCLIP ViT-H/14 without its last layer, so that the
23 layers of the folder end with the penultimate one, and the final normalisation comes after it.

The encoder's own folder will do as well, and so will that of a whole CLIP, of which only the text tower is taken. A projection is
passed over, by name: what latent diffusion sees comes before it.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxsem.backbones.clip import TextTower
from jaxsem.backbones.clip_config import ClipConfig, TextConfig
from jaxsem.errors import InputError, WeightsError
from jaxsem.weights.clip import config_from_transformers, load_clip
from jaxsem.weights.huggingface import find, read_config

# The first that is there is taken: those of full precision, then those of half.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.fp16.safetensors", "pytorch_model.fp16.bin")


def text_tower_config(source: str | os.PathLike) -> TextConfig:
    """The sizes of the tower that `load_text_tower` loads; no weights are read.

    Raises:
      InputError: Nothing is there.
      WeightsError: The config.json is that of another architecture.
    """
    return _find_config(source)[1].text


def load_text_tower(
    source: str | os.PathLike, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
) -> tuple[TextTower, dict[str, Any]]:
    """Loads the text tower of a diffusers pipeline.

    Args:
      source: A folder or Hugging Face id of a whole pipeline, of its text encoder, or of a CLIP.
      dtype: Of the computation.
      param_dtype: Of the parameters; bfloat16 halves the memory of a frozen model.

    Returns:
      The Flax module and its parameters, nested NumPy arrays.

    Raises:
      InputError: Nothing is there.
      WeightsError: The files are damaged, of another architecture, or do not fit; lists every key that does not.
    """
    part, config = _find_config(source)
    weights = next(filter(None, (find(source, part + file) for file in _WEIGHTS)), None)
    if weights is None:
        raise InputError(
            f"{os.fspath(source)} has {part}config.json, but none of {', '.join(_WEIGHTS)} beside it: download its weights"
        )
    module, params = load_clip(weights, config, dtype, param_dtype)
    return TextTower(module.config.text, dtype, param_dtype), params["text"]


def _find_config(source: str | os.PathLike) -> tuple[str, ClipConfig]:
    """Where in a folder the text encoder lies, "" or "text_encoder/", and its sizes."""
    name = os.fspath(source)
    part = next((part for part in ("text_encoder/", "") if find(source, f"{part}config.json")), None)
    if part is None:
        raise InputError(
            f"{name} holds neither text_encoder/config.json nor config.json: give the folder of a diffusers pipeline or of its "
            "text encoder"
        )
    place = f"{part}config.json"
    return part, _text_config(read_config(source, place), os.path.join(name, place))


def _text_config(fields: Mapping[str, Any], name: str) -> ClipConfig:
    """The text tower alone, without its projection, from a config.json."""
    kind = fields.get("model_type")
    if kind not in ("clip_text_model", "clip"):
        raise WeightsError(
            f"{name} is one of {kind!r:.200}, not of 'clip_text_model' or 'clip': give the text encoder of Stable Diffusion 1.x or "
            "2.x, or another text tower of CLIP"
        )
    if fields.get("use_attention_mask"):
        raise WeightsError(f"{name} says use_attention_mask, and only text encoders that see the padding are known")
    # The class would only tell whether there is a projection, and older files do not name it.
    config = config_from_transformers({**fields, "architectures": ["CLIPTextModel"]}, name)
    return ClipConfig(None, config.text, None)
