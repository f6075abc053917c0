"""LLaVA's checkpoints in transformers' layouts, in both directions.

    language_model.model.…, language_model.lm_head.weight, vision_tower.vision_model.…      files
    model.language_model.…, lm_head.weight, model.vision_tower.…                            state dicts since transformers 5

The image tower may or may not have its `vision_model.` in either. Files are mapped, not read, and each layer is converted by
itself; with `weights="int8"` the language model's kernels are quantised while they are read.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxsem.backbones.clip_config import ClipConfig, VisionConfig
from jaxsem.backbones.llama import LlamaConfig
from jaxsem.backbones.llava import Llava, param_shapes
from jaxsem.backbones.llava_config import CONFIGS, LLAVA_15_7B, LLAVA_16_VICUNA_7B, LlavaConfig
from jaxsem.errors import InputError, WeightsError
from jaxsem.weights import clip, llama
from jaxsem.weights.convert import LINEAR, Entry, Ignored, Table, convert, invert, strip_prefixes
from jaxsem.weights.huggingface import choose_config, open_state


def load_llava(
    source: str | os.PathLike | Mapping[str, Any],
    config: LlavaConfig | str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    weights: str = "float",
) -> tuple[Llava, dict[str, Any]]:
    """Loads LLaVA 1.5 or 1.6.

    Args:
      source: A folder or Hugging Face id ("llava-hf/llava-1.5-7b-hf"), a file of weights, or a state dict.
      config: Sizes, or the name of a published model (`jaxsem.backbones.llava_config.CONFIGS`); None reads the folder's
        config.json.
      dtype: Of the computation.
      param_dtype: Of the parameters that are floats; bfloat16 halves the memory of a frozen model.
      weights: "float", or "int8" to quantise the kernels of the language model's layers while they are read.

    Returns:
      The Flax module and its parameters, nested NumPy arrays.

    Raises:
      InputError: Nothing is there, no config can be told, or there are no such weights.
      WeightsError: The files are damaged or do not fit, and lists every key that does not.
    """
    config = choose_config(source, config, "LLaVA", CONFIGS, parse_config)
    module = Llava(config, dtype, param_dtype, weights=weights)
    shapes = param_shapes(module)
    state, name = open_state(source)
    state = strip_prefixes(state, ("module.",))
    layout = _layout_of(state)
    llama.check_tied(state, config.text, name, layout.language, layout.head)
    if weights == "int8":
        state = llama.split_kernels(state, name, layout.language)
    return module, convert(_table(config, layout, weights), state, shapes, name)


def to_transformers(params: Mapping[str, Any], config: LlavaConfig) -> dict[str, np.ndarray]:
    """Writes parameters as the published files have them; transformers' `from_pretrained` loads them.

    Args:
      params: Parameters of `Llava` with float weights, as arrays.
      config: Their config.

    Returns:
      Arrays by key; with a tied output layer, the token embedding is there twice, as one array.

    Raises:
      WeightsError: Parameters that no key can hold.
    """
    state = invert(_table(config, _FILE), params)
    if config.text.tied:
        state[_FILE.head] = state[f"{_FILE.language}embed_tokens.weight"]
    return state


# -- configs ----------------------------------------------------------------------------------------------------------

# What changes the result, and the only value of it that is known; also transformers' default.
_FIXED = {"quantization_config": None, "use_image_newline_parameter": True}
_STRATEGIES = {"default": False, "full": True}


def parse_config(fields: Mapping[str, Any], name: str = "the config") -> LlavaConfig:
    """The sizes in a `config.json` of transformers; absent fields have its defaults.

    Args:
      fields: Of a Llava or LlavaNext model; `model_type` says which.
      name: What errors call it.

    Raises:
      WeightsError: It is no such config, asks for what this model does not do, or holds values that none can have.
    """
    try:
        return _parse(fields, name)
    except InputError as error:
        raise WeightsError(f"{name}: {error}") from error


def _parse(fields: Mapping[str, Any], name: str) -> LlavaConfig:
    kind = fields.get("model_type")
    if kind not in ("llava", "llava_next"):
        raise InputError(f"the config is one of {kind!r}, not of 'llava' or 'llava_next'")
    for key, only in _FIXED.items():
        if fields.get(key, only) != only:
            raise InputError(f"it has {key}={fields[key]!r:.200}, and only {only!r} is known")
    strategy = fields.get("vision_feature_select_strategy", "default")
    if not isinstance(strategy, str) or strategy not in _STRATEGIES:
        raise InputError(f"it takes visual tokens by {strategy!r}; there are {', '.join(_STRATEGIES)}")
    return LlavaConfig(
        vision=_vision(fields, name),
        text=_text(fields, name),
        image_token=fields.get("image_token_index", fields.get("image_token_id", 32000)),
        feature_layer=fields.get("vision_feature_layer", -2),
        keep_class=_STRATEGIES[strategy],
        activation=fields.get("projector_hidden_act", "gelu"),
        projector_bias=fields.get("multimodal_projector_bias", True),
        grid_pinpoints=_pinpoints(fields) if kind == "llava_next" else (),
    )


def _vision(fields: Mapping[str, Any], name: str) -> VisionConfig:
    section = _section(fields, "vision_config")
    if section is None:
        return LLAVA_15_7B.vision
    kind = section.get("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise InputError(f"its image tower is a {kind!r}, and only 'clip_vision_model' is known")
    # The class matters for a projection alone, which LLaVA does not use.
    section = {**section, "model_type": kind, "architectures": ["CLIPVisionModel"]}
    return clip.config_from_transformers(section, f"{name}, vision_config").vision


def _text(fields: Mapping[str, Any], name: str) -> LlamaConfig:
    section = {"model_type": "llama", **(_section(fields, "text_config") or {})}
    # Older files say it of the language model, newer ones of the whole.
    tied = section.get("tie_word_embeddings") or fields.get("tie_word_embeddings", False)
    return llama.parse_config({**section, "tie_word_embeddings": tied}, f"{name}, text_config")


def _pinpoints(fields: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    points = fields.get("image_grid_pinpoints")
    if points is None:
        return LLAVA_16_VICUNA_7B.grid_pinpoints
    if not isinstance(points, list) or not points or not all(isinstance(point, list | tuple) for point in points):
        raise InputError(f"its image_grid_pinpoints are {points!r:.200}, not a list of [height, width]")
    return tuple(map(tuple, points))


def _section(fields: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    section = fields.get(key)
    if section is not None and not isinstance(section, Mapping):
        raise InputError(f"its {key} is a {type(section).__name__}, not an object")
    return section


# -- tables -----------------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """What the keys of the parts begin with, and the key of the output layer."""

    root: str
    vision: str
    language: str
    head: str


_FILE = _Layout("", "vision_tower.vision_model.", "language_model.model.", "language_model.lm_head.weight")


def _layout_of(state: Mapping[str, Any]) -> _Layout:
    """The layout told by the names of the keys."""
    layout = _FILE
    if any(key.startswith("model.") for key in state):
        layout = _Layout("model.", "model.vision_tower.vision_model.", "model.language_model.", "lm_head.weight")
    if not any(key.startswith(layout.vision) for key in state):
        layout = layout._replace(vision=f"{layout.root}vision_tower.")
    return layout


def _table(config: LlavaConfig, layout: _Layout, weights: str = "float") -> Table:
    return tuple(_rules(config, layout, weights))


def _rules(config: LlavaConfig, layout: _Layout, weights: str) -> Iterator[Entry | Ignored]:
    tower = clip.transformers_table(ClipConfig(config.vision, None, None), layout.vision)
    # The others are of a CLIP's text tower and projections, which are not here to be passed over.
    yield from (rule for rule in tower if rule.source.startswith(layout.vision))
    yield from llama.llama_table(config.text, weights, layout.language, layout.head, "language/")
    for i in (1, 2):
        theirs, ours = f"{layout.root}multi_modal_projector.linear_{i}", f"projector/fc{i}"
        yield Entry(f"{theirs}.weight", f"{ours}/kernel", LINEAR)
        if config.projector_bias:
            yield Entry(f"{theirs}.bias", f"{ours}/bias")
    if config.grid_pinpoints:
        yield Entry(f"{layout.root}image_newline", "image_newline")
