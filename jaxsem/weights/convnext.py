"""ConvNeXt's checkpoints: transformers' layout in both directions, timm's and open_clip's.

* transformers: `encoder.stages.0.layers.0.dwconv.weight`, with `convnext.` before it in a model with a classifier.
* timm: `stages.0.blocks.0.conv_dw.weight`. open_clip keeps such a trunk under `visual.trunk.`, or `trunk.` in an image side
  alone, and its projection beside it, under `visual.head.`. Such files have no config, so one must be given.

The classifier, the text tower of a CLIP, and a projection that the config does not have are passed over, by name.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsem.backbones.convnext import CONFIGS, ConvNext, ConvNextConfig, param_shapes
from jaxsem.errors import InputError, WeightsError
from jaxsem.weights.convert import CONV, LINEAR, Entry, Ignored, Table, Transform, convert, invert, strip_prefixes
from jaxsem.weights.huggingface import choose_config, open_state

_TIMM_STEM = "stem.0.weight"


def load_convnext(
    source: str | os.PathLike | Mapping[str, Any],
    config: ConvNextConfig | str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
) -> tuple[ConvNext, dict[str, Any]]:
    """Loads a ConvNeXt, such as the image side of a CLIP.

    Args:
      source: A folder or Hugging Face id in transformers' layout, a file of weights in any layout, or a state dict.
      config: Sizes, or the name of a published CLIP (`jaxsem.backbones.convnext.CONFIGS`); None reads the folder's
        config.json. With a config without projection, only the trunk is taken.
      dtype: Of the computation.
      param_dtype: Of the parameters; bfloat16 halves the memory of a frozen model.

    Returns:
      The Flax module and its parameters, nested NumPy arrays.

    Raises:
      InputError: Nothing is there, or no config can be told.
      WeightsError: The files are damaged or do not fit; lists every key that does not.
    """
    config = choose_config(source, config, "ConvNeXt", CONFIGS, config_from_transformers)
    state, name = open_state(source)
    state = strip_prefixes(state, ("module.", "convnext."))
    module = ConvNext(config, dtype, param_dtype)
    return module, convert(_table_for(config, state), state, param_shapes(module), name)


def to_transformers(config: ConvNextConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Writes parameters as a state dict that transformers' `ConvNextModel` loads.

    Args:
      config: Of the parameters.
      params: Parameters of `ConvNext` without a projection, which that model does not have.

    Returns:
      Arrays by key.

    Raises:
      WeightsError: Parameters that no key can hold.
    """
    return invert(transformers_table(config), params)


# -- configs ----------------------------------------------------------------------------------------------------------


def config_from_transformers(fields: Mapping[str, Any], name: str = "the config") -> ConvNextConfig:
    """The sizes in a `config.json` of transformers.

    Fields that are absent have transformers' defaults, those of ConvNeXt-T.

    Args:
      fields: Of a ConvNextModel, with or without a classifier.
      name: What errors call it.

    Raises:
      WeightsError: It is no config of ConvNeXt, or holds values that this ConvNeXt cannot have.
    """
    try:
        return _from_transformers(fields)
    except InputError as error:
        raise WeightsError(f"{name}: {error}") from error


def _from_transformers(fields: Mapping[str, Any]) -> ConvNextConfig:
    if fields.get("model_type") != "convnext":
        raise InputError(f"the config is one of {fields.get('model_type')!r}, not of 'convnext'")
    if fields.get("num_channels", 3) != 3:
        raise InputError(f"its images have {fields['num_channels']!r} channels, and only 3 are known")
    scale, epsilon = fields.get("layer_scale_init_value", 1e-6), fields.get("layer_norm_eps", 1e-12)
    if not (isinstance(scale, int | float) and scale > 0):
        raise InputError(f"it has layer_scale_init_value={scale!r}; only blocks with a scale are known")
    activation = fields.get("hidden_act", "gelu")
    if not (isinstance(epsilon, float) and 0 < epsilon < 1) or not isinstance(activation, str):
        raise InputError(
            f"it has layer_norm_eps={epsilon!r} and hidden_act={activation!r}: a small number and a name are wanted"
        )
    widths = _counts(fields, "hidden_sizes", (96, 192, 384, 768))
    patch = fields.get("patch_size", 4)
    patch = _counts({"patch_size": patch if isinstance(patch, list) else [patch]}, "patch_size", ())
    if len(set(patch)) != 1:
        raise InputError(f"it has patch_size={list(patch)}, and only squares are known")
    # Its other normalisations have 1e-6 whatever the config says.
    config = ConvNextConfig(widths, _counts(fields, "depths", (3, 3, 9, 3)), patch[0], activation, pool_epsilon=epsilon)
    if fields.get("num_stages", 4) != config.stages:
        raise InputError(f"it has num_stages={fields.get('num_stages', 4)!r} and sizes of {config.stages}")
    return config


def _counts(fields: Mapping[str, Any], key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = fields.get(key, default)
    if not isinstance(value, list | tuple) or not all(type(n) is int and 1 <= n <= 1 << 20 for n in value):
        raise InputError(f"it has {key}={value!r}; numbers from 1 to {1 << 20} are wanted")
    return tuple(value)


# -- tables -----------------------------------------------------------------------------------------------------------


def transformers_table(config: ConvNextConfig) -> Table:
    """The table of transformers' layout, without the `convnext.` of a model with a classifier."""
    stage, block = "encoder.stages.{s}", "encoder.stages.{s}.layers.{i}"
    return (
        *_trunk(
            stem=("embeddings.patch_embeddings", "embeddings.layernorm"),
            halve=(f"{stage}.downsampling_layer.0", f"{stage}.downsampling_layer.1"),
            block=(f"{block}.dwconv", f"{block}.layernorm", f"{block}.pwconv1", f"{block}.pwconv2"),
            scale=f"{block}.layer_scale_parameter",
            pool="layernorm",
        ),
        Ignored("classifier.{part:weight|bias}", "the classifier, which is not in the config"),
    )


def timm_table(config: ConvNextConfig, trunk: str = "") -> Table:
    """The table of timm's layout, and of open_clip's around it.

    Args:
      config: Whether there is a projection, and of how many layers.
      trunk: What the keys of the trunk begin with: "" in timm's files, "trunk." or "visual.trunk." in open_clip's.
    """
    stage, block = f"{trunk}stages.{{s}}", f"{trunk}stages.{{s}}.blocks.{{i}}"
    return (
        *_trunk(
            stem=(f"{trunk}stem.0", f"{trunk}stem.1"),
            halve=(f"{stage}.downsample.0", f"{stage}.downsample.1"),
            block=(f"{block}.conv_dw", f"{block}.norm", f"{block}.mlp.fc1", f"{block}.mlp.fc2"),
            scale=f"{block}.gamma",
            pool=f"{trunk}head.norm",
        ),
        Ignored(f"{trunk}head.fc.{{part:weight|bias}}", "the classifier, which is not in the config"),
        *(_projection(config, trunk.removesuffix("trunk.")) if trunk else ()),
    )


def _table_for(config: ConvNextConfig, state: Mapping[str, Any]) -> Table:
    """The layout told by the names of the keys."""
    for trunk in ("visual.trunk.", "trunk.", ""):
        if f"{trunk}{_TIMM_STEM}" in state:
            return timm_table(config, trunk)
    return transformers_table(config)


def _trunk(
    stem: tuple[str, str], halve: tuple[str, str], block: tuple[str, str, str, str], scale: str, pool: str
) -> Iterator[Entry]:
    """What all layouts hold, by the names of its parts."""
    ours = "stages_{s}/blocks[{i}]"
    yield from _linear(stem[0], "stem", CONV)
    yield from _norm(stem[1], "stem_norm")
    yield from _norm(halve[0], "stages_{s}/norm")
    yield from _linear(halve[1], "stages_{s}/halve", CONV)
    yield from _linear(block[0], f"{ours}/depthwise", CONV)
    yield from _norm(block[1], f"{ours}/norm")
    yield from _linear(block[2], f"{ours}/mlp/fc1")
    yield from _linear(block[3], f"{ours}/mlp/fc2")
    yield Entry(scale, f"{ours}/scale")
    yield from _norm(pool, "pool_norm")


def _projection(config: ConvNextConfig, side: str) -> Iterator[Entry | Ignored]:
    """open_clip's projection of an image side whose keys begin with `side`, and its other half."""
    if config.projection is None:
        yield Ignored(f"{side}head.{{key:(?:proj|mlp)\\..*}}", "not in the config")
    elif config.hidden is None:
        yield Entry(f"{side}head.proj.weight", "projection/kernel", LINEAR)
    else:
        yield from _linear(f"{side}head.mlp.fc1", "hidden")
        yield Entry(f"{side}head.mlp.fc2.weight", "projection/kernel", LINEAR)
    text = r"(?:text|transformer|token_embedding|ln_final)\..*|positional_embedding|text_projection|attn_mask"
    yield Ignored(f"{{key:{text}}}", "the text tower")
    yield Ignored("{key:logit_scale|logit_bias}", "of the loss")


def _linear(source: str, target: str, transform: Transform = LINEAR) -> Iterator[Entry]:
    yield Entry(f"{source}.weight", f"{target}/kernel", transform)
    yield Entry(f"{source}.bias", f"{target}/bias")


def _norm(source: str, target: str) -> Iterator[Entry]:
    yield Entry(f"{source}.weight", f"{target}/scale")
    yield Entry(f"{source}.bias", f"{target}/bias")
