"""Checkpoints of latent diffusion in diffusers' layout, in both directions.

    folder/vae/config.json, folder/vae/diffusion_pytorch_model.safetensors       the autoencoder
    folder/unet/config.json, folder/unet/diffusion_pytorch_model.safetensors     the U-Net

Either part's own folder will do as well. The weights may also be those of the variant fp16, or a torch file (.bin). The
autoencoder's attention is called `to_q`, `to_k`, `to_v` and `to_out.0` in newer files, and `query`, `key`, `value` and
`proj_attn` in older ones.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsem.backbones import autoencoder_kl, unet_2d_condition
from jaxsem.backbones.autoencoder_kl import AutoencoderKl, AutoencoderKlConfig
from jaxsem.backbones.unet_2d_condition import UnetCondition, UnetConditionConfig
from jaxsem.errors import InputError, WeightsError
from jaxsem.weights.convert import CONV, LINEAR, Entry, Table, Transform, convert, invert, strip_prefixes
from jaxsem.weights.huggingface import choose_config, find, open_state, read_config

Source = str | os.PathLike | Mapping[str, Any]

# The first that is there is taken: those of full precision, then those of half.
_WEIGHTS = tuple(
    f"diffusion_pytorch_model{kind}" for kind in (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin")
)
_POINTWISE = Transform("1x1 convolution to linear", lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None])


def autoencoder_config(source: Source, config: AutoencoderKlConfig | str | None = None) -> AutoencoderKlConfig:
    """The sizes that `load_autoencoder_kl` takes; no weights are read.

    Raises:
      InputError: No config can be told.
      WeightsError: The config.json is that of another architecture.
    """
    parse = partial(_parse, AutoencoderKlConfig)
    return _choose(source, config, "vae", "autoencoder", autoencoder_kl.CONFIGS, parse)


def unet_config(source: Source, config: UnetConditionConfig | str | None = None) -> UnetConditionConfig:
    """The sizes that `load_unet_condition` takes; no weights are read.

    Raises:
      InputError: No config can be told.
      WeightsError: The config.json is that of another architecture.
    """
    parse = partial(_parse, UnetConditionConfig)
    return _choose(source, config, "unet", "U-Net", unet_2d_condition.CONFIGS, parse)


def load_autoencoder_kl(
    source: Source,
    config: AutoencoderKlConfig | str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> tuple[AutoencoderKl, dict[str, Any]]:
    """Loads the autoencoder of latent diffusion.

    Args:
      source: A folder or Hugging Face id of a whole diffusers pipeline or of its autoencoder, a file of weights, or a state dict.
      config: Sizes, or the name of a published autoencoder (`jaxsem.backbones.autoencoder_kl.CONFIGS`); None reads the
        folder's config.json.
      dtype: Of the computation.
      param_dtype: Of the parameters; bfloat16 halves the memory of a frozen model.
      remat: Whether to recompute each block in the backward pass.

    Returns:
      The Flax module and its parameters, nested NumPy arrays.

    Raises:
      InputError: Nothing is there, or no config can be told.
      WeightsError: The files are damaged or do not fit; lists every key that does not.
    """
    config = autoencoder_config(source, config)
    state, name = _open(source, "vae")
    module = AutoencoderKl(config, dtype, param_dtype, remat)
    return module, convert(autoencoder_table(config), state, autoencoder_kl.param_shapes(module), name)


def load_unet_condition(
    source: Source,
    config: UnetConditionConfig | str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> tuple[UnetCondition, dict[str, Any]]:
    """Loads the U-Net of Stable Diffusion 1.x or 2.x.

    Args:
      source: A folder or Hugging Face id of a whole diffusers pipeline or of its U-Net, a file of weights, or a state dict.
      config: Sizes, or the name of a published U-Net (`jaxsem.backbones.unet_2d_condition.CONFIGS`); None reads the folder's
        config.json.
      dtype: Of the computation.
      param_dtype: Of the parameters; bfloat16 halves the memory of a frozen model.
      remat: Whether to recompute each block in the backward pass.

    Returns:
      The Flax module and its parameters, nested NumPy arrays.

    Raises:
      InputError: Nothing is there, or no config can be told.
      WeightsError: The files are damaged or do not fit; lists every key that does not.
    """
    config = unet_config(source, config)
    state, name = _open(source, "unet")
    module = UnetCondition(config, dtype, param_dtype, remat)
    return module, convert(unet_table(config), state, unet_2d_condition.param_shapes(module), name)


def autoencoder_to_diffusers(config: AutoencoderKlConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Writes parameters as a state dict that diffusers' `AutoencoderKL` loads strictly.

    Args:
      config: Of the parameters.
      params: Parameters of `AutoencoderKl`, as arrays.

    Raises:
      WeightsError: Parameters that no key can hold.
    """
    return invert(autoencoder_table(config), params)


def unet_to_diffusers(config: UnetConditionConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Writes parameters as a state dict that diffusers' `UNet2DConditionModel` loads strictly.

    Args:
      config: Of the parameters.
      params: Parameters of `UnetCondition`, as arrays.

    Raises:
      WeightsError: Parameters that no key can hold.
    """
    return invert(unet_table(config), params)


# -- folders ----------------------------------------------------------------------------------------------------------


def _choose(
    source: Source, config: Any, part: str, kind: str, known: Mapping[str, Any], parse: Callable[..., Any]
) -> Any:
    """As `choose_config`, for a folder of which the model is a part."""
    if config is not None or isinstance(source, Mapping) or os.path.isfile(source):
        return choose_config(source, config, kind, known, parse)
    inside = f"{part}/config.json"
    place = inside if find(source, inside) else "config.json"
    return parse(read_config(source, place), os.path.join(source, place))


def _parse(kind: Any, fields: Mapping[str, Any], name: str) -> Any:
    try:
        return kind.from_json(fields)
    except InputError as error:
        raise WeightsError(f"{name}: {error}") from error


def _open(source: Source, part: str) -> tuple[dict[str, np.ndarray], str]:
    """The state dict of a folder of which the model is a part, or of anything that `open_state` knows; and its name."""
    if not isinstance(source, Mapping) and not os.path.isfile(source):
        places = [f"{folder}{name}" for folder in (f"{part}/", "") for name in _WEIGHTS]
        found = next(filter(None, (find(source, place) for place in places)), None)
        if found is None:
            raise InputError(
                f"{os.fspath(source)} holds neither {places[0]} nor {_WEIGHTS[0]}, nor those of fp16 or .bin: name the weights "
                f"file itself"
            )
        source = found
    state, name = open_state(source)
    return strip_prefixes(state, ("module.",)), name


# -- tables -----------------------------------------------------------------------------------------------------------


def autoencoder_table(config: AutoencoderKlConfig) -> Table:
    """The table of diffusers' `AutoencoderKL`."""
    return tuple(_autoencoder_rules(config))


def unet_table(config: UnetConditionConfig) -> Table:
    """The table of diffusers' `UNet2DConditionModel`."""
    return tuple(_unet_rules(config))


def _autoencoder_rules(config: AutoencoderKlConfig) -> Iterator[Entry]:
    side = "{side:encoder|decoder}"
    yield from _layer(f"{side}.conv_in", f"{side}/conv_in", CONV)
    for blocks, stage, resample, ours in (
        ("down_blocks", "down", "downsamplers", "downsample"),
        ("up_blocks", "up", "upsamplers", "upsample"),
    ):
        block, stage = f"{side}.{blocks}.{{s}}", f"{side}/{stage}_{{s}}"
        yield from _resnet(f"{block}.resnets.{{i}}", f"{stage}/resnet_{{i}}", time=False)
        yield from _layer(f"{block}.{resample}.0.conv", f"{stage}/{ours}/conv", CONV)
    yield from _resnet(f"{side}.mid_block.resnets.{{i}}", f"{side}/middle/resnet_{{i}}", time=False)
    theirs, ours = f"{side}.mid_block.attentions.0", f"{side}/middle/attention"
    yield from _norm(f"{theirs}.group_norm", f"{ours}/norm")
    for new, old, name in (
        ("to_q", "query", "query"),
        ("to_k", "key", "key"),
        ("to_v", "value", "value"),
        ("to_out.0", "proj_attn", "out"),
    ):
        yield from _layer(f"{theirs}.{new}", f"{ours}/attention/{name}")
        yield from _layer(f"{theirs}.{old}", f"{ours}/attention/{name}")
    yield from _norm(f"{side}.conv_norm_out", f"{side}/out/norm")
    yield from _layer(f"{side}.conv_out", f"{side}/out/conv", CONV)
    if config.quant:
        yield from _layer("quant_conv", "quant", _POINTWISE)
    if config.post_quant:
        yield from _layer("post_quant_conv", "post_quant", _POINTWISE)


def _unet_rules(config: UnetConditionConfig) -> Iterator[Entry]:
    for i in (1, 2):
        yield from _layer(f"time_embedding.linear_{i}", f"encoder/time/fc{i}")
    yield from _layer("conv_in", "encoder/conv_in", CONV)
    for block, stage in (
        ("down_blocks.{s}", "encoder/down_{s}"),
        ("mid_block", "encoder/middle"),
        ("up_blocks.{s}", "decoder/up_{s}"),
    ):
        yield from _resnet(f"{block}.resnets.{{i}}", f"{stage}/resnet_{{i}}", time=True)
        yield from _transformer(config, f"{block}.attentions.{{i}}", f"{stage}/transformer_{{i}}")
    yield from _layer("down_blocks.{s}.downsamplers.0.conv", "encoder/down_{s}/downsample/conv", CONV)
    yield from _layer("up_blocks.{s}.upsamplers.0.conv", "decoder/up_{s}/upsample/conv", CONV)
    yield from _norm("conv_norm_out", "decoder/out/norm")
    yield from _layer("conv_out", "decoder/out/conv", CONV)


def _resnet(source: str, target: str, time: bool) -> Iterator[Entry]:
    for i in (1, 2):
        yield from _norm(f"{source}.norm{i}", f"{target}/norm{i}")
        yield from _layer(f"{source}.conv{i}", f"{target}/conv{i}", CONV)
    yield from _layer(f"{source}.conv_shortcut", f"{target}/shortcut", _POINTWISE)
    if time:
        yield from _layer(f"{source}.time_emb_proj", f"{target}/time")


def _transformer(config: UnetConditionConfig, source: str, target: str) -> Iterator[Entry]:
    yield from _norm(f"{source}.norm", f"{target}/norm")
    for name in ("proj_in", "proj_out"):
        yield from _layer(f"{source}.{name}", f"{target}/{name}", LINEAR if config.linear_projection else _POINTWISE)
    layer, block = f"{source}.transformer_blocks.{{k}}", f"{target}/blocks[{{k}}]"
    for i in (1, 2, 3):
        yield from _norm(f"{layer}.norm{i}", f"{block}/norm{i}")
    for theirs, ours in (("attn1", "self_attention"), ("attn2", "cross_attention")):
        for part, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
            yield Entry(f"{layer}.{theirs}.{part}.weight", f"{block}/{ours}/{name}/kernel", LINEAR)
        yield from _layer(f"{layer}.{theirs}.to_out.0", f"{block}/{ours}/out")
    yield from _layer(f"{layer}.ff.net.0.proj", f"{block}/mlp/fc1")
    yield from _layer(f"{layer}.ff.net.2", f"{block}/mlp/fc2")


def _layer(source: str, target: str, transform: Transform = LINEAR) -> Iterator[Entry]:
    yield Entry(f"{source}.weight", f"{target}/kernel", transform)
    yield Entry(f"{source}.bias", f"{target}/bias")


def _norm(source: str, target: str) -> Iterator[Entry]:
    yield Entry(f"{source}.weight", f"{target}/scale")
    yield Entry(f"{source}.bias", f"{target}/bias")
