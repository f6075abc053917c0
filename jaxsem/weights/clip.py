"""CLIP's checkpoints: transformers' layout in both directions, and OpenAI's.

* transformers: `vision_model.encoder.layers.0.self_attn.q_proj.weight`. One tower alone is written without its
  `vision_model.` or `text_model.` since transformers 5, with it before; both load.
* OpenAI and open_clip: `visual.transformer.resblocks.0.attn.in_proj_weight`, where queries, keys and values are one
  array. Such a file has no config, so one must be given.

What a config does not have (a tower, the projection) is passed over in the checkpoint, by name.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsem.backbones.clip import Clip, param_shapes
from jaxsem.backbones.clip_config import CONFIGS, ClipConfig, TextConfig, VisionConfig
from jaxsem.errors import InputError, WeightsError
from jaxsem.weights.convert import CONV, LINEAR, Entry, Ignored, Table, convert, invert, strip_prefixes
from jaxsem.weights.huggingface import choose_config, open_state

_FUSED_PARTS = ("query", "key", "value")


def load_clip(
    source: str | os.PathLike | Mapping[str, Any],
    config: ClipConfig | str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
) -> tuple[Clip, dict[str, Any]]:
    """Loads CLIP, or one tower of it.

    Args:
      source: A folder or Hugging Face id in transformers' layout, a file of weights in either layout, or a state dict.
      config: Sizes, or the name of a published model (`jaxsem.backbones.clip_config.CONFIGS`); None reads the folder's
        config.json. With a config of one tower, only that is taken from a checkpoint of both.
      dtype: Of the computation.
      param_dtype: Of the parameters; bfloat16 halves the memory of a frozen model.

    Returns:
      The Flax module and its parameters, nested NumPy arrays.

    Raises:
      InputError: Nothing is there, or no config can be told.
      WeightsError: The files are damaged or do not fit; lists every key that does not.
    """
    config = choose_config(source, config, "CLIP", CONFIGS, config_from_transformers)
    state, name = open_state(source)
    state = split_fused(strip_prefixes(state, ("module.",)), name)
    module = Clip(config, dtype, param_dtype)
    return module, convert(_table_for(config, state), state, param_shapes(module), name)


def to_transformers(config: ClipConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Writes parameters as a state dict that transformers' CLIP classes load.

    Args:
      config: Of the parameters.
      params: Parameters of `Clip`, as arrays.

    Returns:
      Arrays by key, with the towers' prefixes.

    Raises:
      WeightsError: Parameters that no key can hold.
    """
    return invert(transformers_table(config), params)


# -- configs ----------------------------------------------------------------------------------------------------------


def config_from_transformers(fields: Mapping[str, Any], name: str = "the config") -> ClipConfig:
    """The sizes in a `config.json` of transformers.

    Fields that are absent have transformers' defaults, those of ViT-B/32. An `eos_token_id` of 2 stands for the place of the
    largest id, as there.

    Args:
      fields: Of a CLIPModel, or of a tower with or without projection.
      name: What errors call it.

    Raises:
      WeightsError: It is no config of CLIP, or holds values that no CLIP can have.
    """
    try:
        return _from_transformers(fields)
    except InputError as error:
        raise WeightsError(f"{name}: {error}") from error


def _from_transformers(fields: Mapping[str, Any]) -> ClipConfig:
    kind = fields.get("model_type")
    if kind == "clip":
        projection = _count(fields, "projection_dim", 512)
        return ClipConfig(_vision(_section(fields, "vision")), _text(_section(fields, "text")), projection)
    if kind not in ("clip_vision_model", "clip_text_model"):
        raise InputError(f"the config is one of {kind!r}, not of 'clip', 'clip_vision_model' or 'clip_text_model'")
    # Both kinds of a tower alone state a projection_dim; only the class tells whether the projection is there.
    classes = fields.get("architectures")
    if not (isinstance(classes, list) and classes and isinstance(classes[0], str)):
        raise InputError("the config does not name its class in 'architectures': give a ClipConfig instead")
    projection = _count(fields, "projection_dim", 512) if classes[0].endswith("WithProjection") else None
    if kind == "clip_vision_model":
        return ClipConfig(_vision(fields), None, projection)
    return ClipConfig(None, _text(fields), projection)


def _section(fields: Mapping[str, Any], tower: str) -> dict[str, Any]:
    """A tower's fields; older files give them a second time in `..._config_dict`, which then decides, defaults and all."""
    for key in (f"{tower}_config_dict", f"{tower}_config"):
        section = fields.get(key)
        if isinstance(section, dict):
            return section
        if section is not None:
            raise InputError(f"its {key} is a {type(section).__name__}, not an object")
    return {}


def _vision(fields: Mapping[str, Any]) -> VisionConfig:
    if _count(fields, "num_channels", 3) != 3:
        raise InputError(f"its images have {fields['num_channels']} channels, and only 3 are known")
    return VisionConfig(
        **_tower(fields, width=768, heads=12, hidden=3072),
        patch=_count(fields, "patch_size", 32),
        image_size=_count(fields, "image_size", 224),
    )


def _text(fields: Mapping[str, Any]) -> TextConfig:
    end = fields.get("eos_token_id", 49407)
    if not isinstance(end, int):
        raise InputError(f"its eos_token_id is {end!r}, and only one number is known")
    return TextConfig(
        **_tower(fields, width=512, heads=8, hidden=2048),
        vocabulary=_count(fields, "vocab_size", 49408),
        context=_count(fields, "max_position_embeddings", 77),
        end_of_text=None if end == 2 else end,
    )


def _tower(fields: Mapping[str, Any], width: int, heads: int, hidden: int) -> dict[str, Any]:
    epsilon, activation = fields.get("layer_norm_eps", 1e-5), fields.get("hidden_act", "quick_gelu")
    if not (isinstance(epsilon, float) and 0 < epsilon < 1) or not isinstance(activation, str):
        raise InputError(
            f"it has layer_norm_eps={epsilon!r} and hidden_act={activation!r}: a small number and a name are wanted"
        )
    return {
        "width": _count(fields, "hidden_size", width),
        "layers": _count(fields, "num_hidden_layers", 12, most=1000),
        "heads": _count(fields, "num_attention_heads", heads),
        "hidden": _count(fields, "intermediate_size", hidden),
        "activation": activation,
        "epsilon": epsilon,
    }


def _count(fields: Mapping[str, Any], key: str, default: int, most: int = 1 << 20) -> int:
    value = fields.get(key, default)
    if isinstance(value, list) and value and all(side == value[0] for side in value):  # [224, 224]
        value = value[0]
    if type(value) is not int or not 1 <= value <= most:
        raise InputError(f"it has {key}={value!r}; a number from 1 to {most} is wanted")
    return value


# -- tables -----------------------------------------------------------------------------------------------------------


def transformers_table(config: ClipConfig, vision: str = "vision_model.", text: str = "text_model.") -> Table:
    """The table of transformers' layout.

    Args:
      config: Which towers and projections there are.
      vision: What the keys of the image tower begin with.
      text: What the keys of the text tower begin with.
    """
    towers = (
        ("image", config.vision, _transformers_image, vision, "visual_projection.weight"),
        ("text", config.text, _transformers_text, text, "text_projection.weight"),
    )
    rules: list[Entry | Ignored] = []
    for name, tower, rules_of, prefix, projection in towers:
        rules += rules_of(prefix) if tower else [_other(f"{re.escape(prefix)}.*")]
        if tower and config.projection is not None:
            rules.append(Entry(projection, f"{name}_projection/kernel", LINEAR))
        else:
            rules.append(_other(projection))
    return (*rules, _scale(config))


def openai_table(config: ClipConfig) -> Table:
    """The table of OpenAI's and open_clip's layout, its fused projections split by `split_fused`."""
    return (
        *(_openai_image(config.projection is not None) if config.vision else [_other(r"visual\..*")]),
        *(_openai_text(config.projection is not None) if config.text else [_other(_OPENAI_TEXT)]),
        _scale(config),
        Ignored("{name:input_resolution|context_length|vocab_size}", "sizes, which the config has"),
        Ignored("attn_mask", "the causal mask, a constant"),
    )


def _table_for(config: ClipConfig, state: Mapping[str, Any]) -> Table:
    """The layout told by the names of the keys."""
    if "positional_embedding" in state or any(key.startswith("visual.") for key in state):
        return openai_table(config)
    towers = {"vision": config.vision, "text": config.text}
    prefixes = {tower: f"{tower}_model." for tower in towers}
    alone = [tower for tower in towers if towers[tower]]
    # A tower alone may have been written without its name.
    if len(alone) == 1 and not any(key.startswith(prefixes[alone[0]]) for key in state):
        prefixes[alone[0]] = ""
    return transformers_table(config, **prefixes)


def _transformers_image(prefix: str) -> Iterator[Entry | Ignored]:
    yield from _transformers_common("vision", prefix)
    yield Entry(f"{prefix}embeddings.class_embedding", "vision/class_embedding")
    yield Entry(f"{prefix}embeddings.patch_embedding.weight", "vision/patch_kernel", CONV)
    yield from _norm(f"{prefix}pre_layrnorm", "vision/pre_norm")  # spelt so
    yield from _norm(f"{prefix}post_layernorm", "vision/post_norm")


def _transformers_text(prefix: str) -> Iterator[Entry | Ignored]:
    yield from _transformers_common("text", prefix)
    yield Entry(f"{prefix}embeddings.token_embedding.weight", "text/token_embedding")
    yield from _norm(f"{prefix}final_layer_norm", "text/final_norm")


def _transformers_common(tower: str, prefix: str) -> Iterator[Entry | Ignored]:
    yield Entry(f"{prefix}embeddings.position_embedding.weight", f"{tower}/positions")
    yield Ignored(f"{prefix}embeddings.position_ids", "the numbers from 0 on")
    layer, block = f"{prefix}encoder.layers.{{i}}", f"{tower}/blocks[{{i}}]"
    for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out")):
        yield from _linear(f"{layer}.self_attn.{theirs}", f"{block}/attention/{ours}")
    for i in (1, 2):
        yield from _norm(f"{layer}.layer_norm{i}", f"{block}/norm{i}")
        yield from _linear(f"{layer}.mlp.fc{i}", f"{block}/mlp/fc{i}")


def _openai_image(projected: bool) -> Iterator[Entry | Ignored]:
    yield from openai_block("visual.transformer.resblocks.{i}", "vision/blocks[{i}]")
    yield Entry("visual.class_embedding", "vision/class_embedding")
    yield Entry("visual.conv1.weight", "vision/patch_kernel", CONV)
    yield Entry("visual.positional_embedding", "vision/positions")
    yield from _norm("visual.ln_pre", "vision/pre_norm")
    yield from _norm("visual.ln_post", "vision/post_norm")
    yield Entry("visual.proj", "image_projection/kernel") if projected else _other("visual.proj")


def _openai_text(projected: bool) -> Iterator[Entry | Ignored]:
    yield from openai_block("transformer.resblocks.{i}", "text/blocks[{i}]")
    yield Entry("token_embedding.weight", "text/token_embedding")
    yield Entry("positional_embedding", "text/positions")
    yield from _norm("ln_final", "text/final_norm")
    yield Entry("text_projection", "text_projection/kernel") if projected else _other("text_projection")


_OPENAI_TEXT = r"(?:transformer|token_embedding|ln_final)\..*|positional_embedding|text_projection"


def openai_block(layer: str, block: str) -> Iterator[Entry]:
    """One residual block in OpenAI's layout, fused projections split by `split_fused`, as our `Block` at a path."""
    for part in _FUSED_PARTS:
        yield Entry(f"{layer}.attn.in_proj_weight[{part}]", f"{block}/attention/{part}/kernel", LINEAR)
        yield Entry(f"{layer}.attn.in_proj_bias[{part}]", f"{block}/attention/{part}/bias")
    yield from _linear(f"{layer}.attn.out_proj", f"{block}/attention/out")
    for i, theirs in ((1, "c_fc"), (2, "c_proj")):
        yield from _norm(f"{layer}.ln_{i}", f"{block}/norm{i}")
        yield from _linear(f"{layer}.mlp.{theirs}", f"{block}/mlp/fc{i}")


def split_fused(state: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Takes `in_proj_weight` and `in_proj_bias` apart: rows of queries, of keys, of values."""
    parts: dict[str, np.ndarray] = {}
    for key, value in state.items():
        if not key.endswith(("in_proj_weight", "in_proj_bias")):
            parts[key] = value
        elif value.ndim == 0 or len(value) % 3:
            raise WeightsError(f"{name}: {key} is {value.shape}, which is not queries, keys and values in equal parts")
        else:
            parts |= {f"{key}[{part}]": rows for part, rows in zip(_FUSED_PARTS, np.split(value, 3))}
    return parts


def _linear(source: str, target: str) -> Iterator[Entry]:
    yield Entry(f"{source}.weight", f"{target}/kernel", LINEAR)
    yield Entry(f"{source}.bias", f"{target}/bias")


def _norm(source: str, target: str) -> Iterator[Entry]:
    yield Entry(f"{source}.weight", f"{target}/scale")
    yield Entry(f"{source}.bias", f"{target}/bias")


def _scale(config: ClipConfig) -> Entry | Ignored:
    return Entry("logit_scale", "logit_scale") if config.vision and config.text else _other("logit_scale")


def _other(pattern: str) -> Ignored:
    return Ignored(f"{{key:{pattern}}}", "not in the config")
