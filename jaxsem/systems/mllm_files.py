"""A small multimodal language model as one weights file of ours: sizes, words and parameters.

Published models stay the folders that they came in (`jaxsem.systems.mllm.load_mllm`); this is for those whose tokenizer is a
list of words.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxsem.backbones.clip_config import VisionConfig
from jaxsem.backbones.llama import LlamaConfig
from jaxsem.backbones.llava import Llava, LlavaConfig, param_shapes
from jaxsem.configs import record_of
from jaxsem.data.words import WordTokenizer
from jaxsem.errors import InputError, WeightsError
from jaxsem.systems.mllm import Mllm
from jaxsem.systems.mllm_prompts import TEMPLATES, Words
from jaxsem.weights.native import WeightsFile, check_shapes, half_kernels, write_weights

SYSTEM = "llava"
"""What a weights file calls the family."""


def make_mllm(
    name: str, config: LlavaConfig, params: Any, words: tuple[str, ...], marks: str, template: str = "plain"
) -> Mllm:
    """A small model with its parameters on the default device.

    Args:
      name: What errors call it.
      config: Sizes.
      params: Parameters of `Llava`.
      words: The language of its tokenizer.
      marks: Its marks; see `WordTokenizer`.
      template: A name in `jaxsem.systems.mllm_prompts.TEMPLATES`.

    Raises:
      InputError: No such template, or an image token that is a word's.
    """
    if template not in TEMPLATES:
        raise InputError(f"there is no template {template!r}; there are {', '.join(TEMPLATES)}")
    tokenizer = Words(WordTokenizer(words, marks), config.image_token)
    return Mllm(name, Llava(config), jax.device_put(params), tokenizer, TEMPLATES[template], batch=32)


def save_mllm(
    model: Mllm, path: str | Path, card: Mapping[str, Any], template: str = "plain", force: bool = False
) -> str:
    """Writes a model with a tokenizer of words, matrices in float16, and returns the file's SHA-256.

    Raises:
      InputError: The tokenizer is a published one.
      OutputError: The file exists, or it cannot be written.
    """
    if not isinstance(model.tokenizer, Words):
        raise InputError(f"{model.name} has a published tokenizer: its folder is its own file")
    words = model.tokenizer.tokenizer
    config = {
        **dataclasses.asdict(model.module.config),
        "words": list(words.words),
        "marks": words.marks,
        "template": template,
    }
    return write_weights(path, SYSTEM, config, card, half_kernels(jax.device_get(model.params)), force=force)


def from_file(name: str, file: WeightsFile) -> Mllm:
    """The model of a weights file.

    Raises:
      WeightsError: Its parts do not fit together.
    """
    try:
        fields = dict(file.config)
        words, marks, template = tuple(map(str, fields.pop("words"))), str(fields.pop("marks")), fields.pop("template")
        config = parse_config(fields)
        check_shapes(param_shapes(Llava(config)), file.params, f"the weights of {name}")
        return make_mllm(name, config, file.params, words, marks, template)
    except (KeyError, TypeError, ValueError, InputError) as error:
        raise WeightsError(f"the weights of {name} do not fit together: {error}") from error


def parse_config(fields: Mapping[str, Any]) -> LlavaConfig:
    """The config in a weights file, from JSON; KeyError, TypeError or InputError where it is none."""
    parts = {"vision": record_of(VisionConfig, fields["vision"]), "text": record_of(LlamaConfig, fields["text"])}
    return record_of(LlavaConfig, {**fields, **parts})
