"""SAM's checkpoints: transformers' layout in both directions, and Meta's.

* transformers: `vision_encoder.layers.0.attn.qkv.weight`. The frequencies of the prompt encoder are stored once or, by
  older versions, twice.
* Meta: `image_encoder.blocks.0.attn.qkv.weight`, as in sam_vit_h_4b8939.pth. Such a file has no config, so one must be given.

Both count the layers of the image encoder from the first to the last. `Sam` keeps those that attend in windows apart from
those that attend to the whole image, so a table leads to a tree by layers, which is then sorted into groups.
"""

import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsem.backbones.sam import Sam, param_shapes
from jaxsem.backbones.sam_config import CONFIGS, DecoderConfig, EncoderConfig, SamConfig
from jaxsem.errors import InputError, WeightsError
from jaxsem.weights.convert import (
    CONV,
    DECONV,
    LINEAR,
    Entry,
    Ignored,
    Table,
    Transform,
    convert,
    invert,
    strip_prefixes,
)
from jaxsem.weights.huggingface import choose_config, open_state

_ONE = Transform("the only row", lambda a: a[0], lambda a: a[None])
_POINTWISE = Transform("1x1 convolution to linear", lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None])

# What transformers calls the frequencies, first where it reads them from when both are there.
_FREQUENCIES = "shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding"


def load_sam(
    source: str | os.PathLike | Mapping[str, Any],
    config: SamConfig | str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
) -> tuple[Sam, dict[str, Any]]:
    """Loads SAM.

    Args:
      source: A folder or Hugging Face id in transformers' layout, a file of weights in either layout, or a state dict.
      config: Sizes, or the name of a published model (`jaxsem.backbones.sam_config.CONFIGS`); None reads the folder's
        config.json.
      dtype: Of the computation.
      param_dtype: Of the parameters; bfloat16 halves the memory of a frozen model.

    Returns:
      The Flax module and its parameters, nested NumPy arrays.

    Raises:
      InputError: Nothing is there, or no config can be told.
      WeightsError: The files are damaged or do not fit; lists every key that does not.
    """
    config = choose_config(source, config, "SAM", CONFIGS, config_from_transformers)
    state, name = open_state(source)
    state = _untied(strip_prefixes(state, ("module.",)), name)
    module = Sam(config, dtype, param_dtype)
    meta = any(key.startswith("image_encoder.") for key in state)
    table = meta_table(config) if meta else transformers_table(config)
    shapes = jax.eval_shape(partial(_by_layer, config.encoder, xp=jnp), param_shapes(module))
    return module, _by_group(config.encoder, convert(table, state, shapes, name))


def to_transformers(config: SamConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Writes parameters as a state dict that transformers' `SamModel` loads strictly.

    Args:
      config: Of the parameters.
      params: Parameters of `Sam`, as arrays.

    Returns:
      Arrays by key.

    Raises:
      WeightsError: Parameters that no key can hold.
    """
    state = invert(transformers_table(config), _by_layer(config.encoder, params))
    state[_FREQUENCIES[1]] = state[_FREQUENCIES[0]]
    return dict(sorted(state.items()))


def _untied(state: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The state dict with the frequencies once."""
    first, second = (state.get(key) for key in _FREQUENCIES)
    if first is None or second is None:
        return state
    if not np.array_equal(first, second):
        raise WeightsError(f"{name}: {' and '.join(_FREQUENCIES)} differ, and are the same parameter")
    return {key: value for key, value in state.items() if key != _FREQUENCIES[1]}


# -- layers and groups ------------------------------------------------------------------------------------------------

_TABLES = "rows", "columns"  # of relative positions: their size differs between the two kinds of layer


def _by_group(config: EncoderConfig, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of `Sam` from a tree by layers: stacks `encoder/layers/...`, and tables `encoder/rows/7`."""
    encoder = dict(tree["encoder"])
    layers, tables = encoder.pop("layers"), {name: encoder.pop(name) for name in _TABLES}
    grouped = jax.tree.map(lambda a: a.reshape(config.groups, config.global_every, *a.shape[1:]), layers)
    window, whole = jax.tree.map(lambda a: a[:, :-1], grouped), jax.tree.map(lambda a: a[:, -1], grouped)
    for name, table in tables.items():
        windows = np.stack([table[str(i)] for i in range(config.layers) if i not in config.global_layers])
        window["attention"][name] = windows.reshape(config.groups, -1, *windows.shape[1:])
        whole["attention"][name] = np.stack([table[str(i)] for i in config.global_layers])
    return {**tree, "encoder": {**encoder, "groups": {"window_layers": window, "global_layer": whole}}}


def _by_layer(config: EncoderConfig, params: Mapping[str, Any], xp: Any = np) -> dict[str, Any]:
    """The inverse of `_by_group`; `xp` is NumPy, or its namesake in JAX for shapes alone."""
    encoder = dict(params["encoder"])
    groups = encoder.pop("groups")
    (window, windows), (whole, wholes) = (_without_tables(groups[key]) for key in ("window_layers", "global_layer"))

    def in_order(a: Any, b: Any) -> Any:
        return xp.concatenate([xp.asarray(a), xp.asarray(b)[:, None]], axis=1).reshape(config.layers, *b.shape[1:])

    for name in _TABLES:
        encoder[name] = {}
        for i in range(config.layers):
            group, place = divmod(i, config.global_every)
            last = place == config.global_every - 1
            encoder[name][str(i)] = xp.asarray(wholes[name][group] if last else windows[name][group, place])
    return {**params, "encoder": {**encoder, "layers": jax.tree.map(in_order, window, whole)}}


def _without_tables(block: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    attention = dict(block["attention"])
    tables = {name: attention.pop(name) for name in _TABLES}
    return {**block, "attention": attention}, tables


# -- configs ----------------------------------------------------------------------------------------------------------


def config_from_transformers(fields: Mapping[str, Any], name: str = "the config") -> SamConfig:
    """The sizes in a `config.json` of transformers.

    Fields that are absent have transformers' defaults, those of SAM-B.

    Args:
      fields: Of a SamModel.
      name: What errors call it.

    Raises:
      WeightsError: It is no config of SAM, or holds values that this SAM cannot have.
    """
    try:
        return _from_transformers(fields)
    except InputError as error:
        raise WeightsError(f"{name}: {error}") from error


def _from_transformers(fields: Mapping[str, Any]) -> SamConfig:
    if fields.get("model_type") != "sam":
        raise InputError(f"the config is one of {fields.get('model_type')!r}, not of 'sam'")
    vision, prompts, decoder = (
        _section(fields, f"{part}_config") for part in ("vision", "prompt_encoder", "mask_decoder")
    )
    encoder = _encoder(vision)
    channels = _count(vision, "output_channels", 256)
    for section, key, value, default in (
        (vision, "num_pos_feats", channels // 2, 128),
        (prompts, "hidden_size", channels, 256),
        (prompts, "image_size", encoder.image_size, 1024),
        (prompts, "patch_size", encoder.patch, 16),
        (prompts, "num_point_embeddings", 4, 4),
        (prompts, "hidden_act", "gelu", "gelu"),
        (prompts, "layer_norm_eps", 1e-6, 1e-6),
        (decoder, "hidden_size", channels, 256),
        (decoder, "hidden_act", "relu", "relu"),
    ):
        _fixed(section, key, value, default)
    return SamConfig(encoder, _decoder(decoder), channels, _count(prompts, "mask_input_channels", 16))


def _encoder(fields: Mapping[str, Any]) -> EncoderConfig:
    flags = (
        ("qkv_bias", True),
        ("use_abs_pos", True),
        ("use_rel_pos", True),
        ("num_channels", 3),
        ("hidden_act", "gelu"),
    )
    for key, value in flags:
        _fixed(fields, key, value, value)
    width, layers = _count(fields, "hidden_size", 768), _count(fields, "num_hidden_layers", 12, most=1000)
    ratio = fields.get("mlp_ratio", 4.0)
    if not (isinstance(ratio, int | float) and 0 < ratio <= 64):
        raise InputError(f"it has mlp_ratio={ratio!r}; a number from 0 to 64 is wanted")
    hidden = int(width * ratio) if fields.get("mlp_dim") is None else _count(fields, "mlp_dim", 0)
    found = fields.get("global_attn_indexes", [2, 5, 8, 11])
    every = found[0] + 1 if isinstance(found, list) and found and type(found[0]) is int and found[0] > 0 else layers
    config = EncoderConfig(
        width,
        layers,
        _count(fields, "num_attention_heads", 12),
        hidden,
        every,
        _count(fields, "window_size", 14),
        _count(fields, "patch_size", 16),
        _count(fields, "image_size", 1024),
        _epsilon(fields),
    )
    if found != list(config.global_layers):
        raise InputError(
            f"it has global_attn_indexes={found!r} in {layers} layers; only equal groups of layers whose last one is global are "
            f"known, such as {list(config.global_layers)}"
        )
    return config


def _decoder(fields: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(
        _count(fields, "num_hidden_layers", 2, most=1000),
        _count(fields, "num_attention_heads", 8),
        _count(fields, "mlp_dim", 2048),
        _count(fields, "attention_downsample_rate", 2),
        _count(fields, "num_multimask_outputs", 3),
        _count(fields, "iou_head_depth", 3, most=1000),
        _count(fields, "iou_head_hidden_dim", 256),
        _epsilon(fields),
    )


def _section(fields: Mapping[str, Any], key: str) -> dict[str, Any]:
    section = fields.get(key) or {}
    if not isinstance(section, dict):
        raise InputError(f"its {key} is a {type(section).__name__}, not an object")
    return section


def _fixed(fields: Mapping[str, Any], key: str, value: Any, default: Any) -> None:
    if fields.get(key, default) != value:
        raise InputError(f"it has {key}={fields.get(key, default)!r}, and only {value!r} is known here")


def _epsilon(fields: Mapping[str, Any]) -> float:
    epsilon = fields.get("layer_norm_eps", 1e-6)
    if not (isinstance(epsilon, float) and 0 < epsilon < 1):
        raise InputError(f"it has layer_norm_eps={epsilon!r}; a small positive number is wanted")
    return epsilon


def _count(fields: Mapping[str, Any], key: str, default: int, most: int = 1 << 20) -> int:
    value = fields.get(key, default)
    if isinstance(value, list) and value and all(side == value[0] for side in value):  # [1024, 1024]
        value = value[0]
    if type(value) is not int or not 1 <= value <= most:
        raise InputError(f"it has {key}={value!r}; a number from 1 to {most} is wanted")
    return value


# -- tables -----------------------------------------------------------------------------------------------------------


def transformers_table(config: SamConfig) -> Table:
    """The table of transformers' layout, for a tree by layers."""
    return tuple(_rules(config, meta=False))


def meta_table(config: SamConfig) -> Table:
    """The table of Meta's layout, for a tree by layers."""
    return tuple(_rules(config, meta=True))


def _rules(config: SamConfig, meta: bool) -> Iterator[Entry | Ignored]:
    yield from _encoder_rules(config.encoder.patch, meta)
    yield from _prompt_rules(meta)
    yield from _decoder_rules(config.decoder, meta)
    if meta:
        yield Ignored("{key:pixel_mean|pixel_std}", "constants of the normalisation")


def _encoder_rules(patch: int, meta: bool) -> Iterator[Entry]:
    encoder = "image_encoder" if meta else "vision_encoder"
    layer, ours = f"{encoder}.{'blocks' if meta else 'layers'}.{{i}}", "encoder/layers[{i}]"
    norm = "norm" if meta else "layer_norm"
    patches = Transform(
        "convolution over patches to linear",
        lambda a: CONV.forward(a).reshape(-1, a.shape[0]),
        lambda a: CONV.inverse(a.reshape(patch, patch, 3, -1)),
    )
    yield from _linear(f"{encoder}.patch_embed.{'proj' if meta else 'projection'}", "encoder/patch_embedding", patches)
    yield Entry(f"{encoder}.pos_embed", "encoder/positions", _ONE)
    for theirs, part in (("qkv", "qkv"), ("proj", "out")):
        yield from _linear(f"{layer}.attn.{theirs}", f"{ours}/attention/{part}")
    for theirs, part in (("rel_pos_h", "rows"), ("rel_pos_w", "columns")):
        yield Entry(f"{layer}.attn.{theirs}", f"encoder/{part}/{{i}}")
    for i in (1, 2):
        yield from _norm(f"{layer}.{norm}{i}", f"{ours}/norm{i}")
        yield from _linear(f"{layer}.mlp.lin{i}", f"{ours}/mlp/fc{i}")
    neck = ("0", "1", "2", "3") if meta else ("conv1", "layer_norm1", "conv2", "layer_norm2")
    yield Entry(f"{encoder}.neck.{neck[0]}.weight", "encoder/neck1/kernel", _POINTWISE)
    yield from _norm(f"{encoder}.neck.{neck[1]}", "encoder/neck_norm1")
    yield Entry(f"{encoder}.neck.{neck[2]}.weight", "encoder/neck2/kernel", CONV)
    yield from _norm(f"{encoder}.neck.{neck[3]}", "encoder/neck_norm2")


def _prompt_rules(meta: bool) -> Iterator[Entry]:
    names = ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",) if meta else _FREQUENCIES
    for name in names:
        yield Entry(name, "prompts/frequencies")
    points = "point_embeddings" if meta else "point_embed"
    yield Entry(f"prompt_encoder.{points}.{{i}}.weight", "prompts/kinds[{i}]", _ONE)
    yield Entry("prompt_encoder.not_a_point_embed.weight", "prompts/not_a_point", _ONE)
    yield Entry("prompt_encoder.no_mask_embed.weight", "prompts/no_mask", _ONE)
    masks = f"prompt_encoder.{'mask_downscaling' if meta else 'mask_embed'}"
    parts = ("0", "1", "3", "4", "6") if meta else ("conv1", "layer_norm1", "conv2", "layer_norm2", "conv3")
    for theirs, ours in zip(parts, ("conv1", "norm1", "conv2", "norm2")):
        rules = _norm if ours.startswith("norm") else partial(_linear, transform=CONV)
        yield from rules(f"{masks}.{theirs}", f"prompts/masks/{ours}")
    yield from _linear(f"{masks}.{parts[-1]}", "prompts/masks/conv3", _POINTWISE)


def _decoder_rules(config: DecoderConfig, meta: bool) -> Iterator[Entry]:
    theirs, ours = "mask_decoder.transformer", "decoder/transformer"
    norm = "norm" if meta else "layer_norm"
    for i in range(config.layers):
        layer, block = f"{theirs}.layers.{i}", f"{ours}/layers_{i}"
        yield from _attention(f"{layer}.self_attn", f"{block}/self_attention")
        yield from _attention(f"{layer}.cross_attn_token_to_image", f"{block}/token_to_image")
        yield from _attention(f"{layer}.cross_attn_image_to_token", f"{block}/image_to_token")
        for j in (1, 2):
            yield from _linear(f"{layer}.mlp.lin{j}", f"{block}/mlp/fc{j - 1}")
        for j in (1, 2, 3, 4):
            yield from _norm(f"{layer}.{norm}{j}", f"{block}/norm{j}")
    yield from _attention(f"{theirs}.final_attn_token_to_image", f"{ours}/final")
    yield from _norm(f"{theirs}.{norm}_final_attn", f"{ours}/final_norm")
    yield Entry("mask_decoder.iou_token.weight", "decoder/iou_token", _ONE)
    yield Entry("mask_decoder.mask_tokens.weight", "decoder/mask_tokens")
    upscale = ("output_upscaling.0", "output_upscaling.1", "output_upscaling.3")
    upscale = upscale if meta else ("upscale_conv1", "upscale_layer_norm", "upscale_conv2")
    yield from _linear(f"mask_decoder.{upscale[0]}", "decoder/upscale1", DECONV)
    yield from _norm(f"mask_decoder.{upscale[1]}", "decoder/upscale_norm")
    yield from _linear(f"mask_decoder.{upscale[2]}", "decoder/upscale2", DECONV)
    heads = "mask_decoder.output_hypernetworks_mlps.{i}", "decoder/mask_heads[{i}]", 3
    for source, target, layers in (heads, ("mask_decoder.iou_prediction_head", "decoder/iou_head", config.iou_layers)):
        for j in range(layers):
            between = "proj_in" if j == 0 else "proj_out" if j == layers - 1 else f"layers.{j - 1}"
            yield from _linear(f"{source}.{f'layers.{j}' if meta else between}", f"{target}/fc{j}")


def _attention(source: str, target: str) -> Iterator[Entry]:
    for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out")):
        yield from _linear(f"{source}.{theirs}", f"{target}/{ours}")


def _linear(source: str, target: str, transform: Transform = LINEAR) -> Iterator[Entry]:
    yield Entry(f"{source}.weight", f"{target}/kernel", transform)
    yield Entry(f"{source}.bias", f"{target}/bias")


def _norm(source: str, target: str) -> Iterator[Entry]:
    yield Entry(f"{source}.weight", f"{target}/scale")
    yield Entry(f"{source}.bias", f"{target}/bias")
