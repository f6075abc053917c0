"""Checkpoints of CompressAI and of the ELIC re-implementation, in both directions.

Layouts of ELIC's keys:

* `compressai`: the classes `Elic2022Official` and `Elic2022Chandelier` (`latent_codec.hyper.h_a.0.weight`, ...).
* `elicre`: the re-implementation of Chandelier, which the authors of Transform-Neck use too
  (`cc_transforms.0.0.weight`, ...); their files are a dict with `state_dict` for the codec and `adapter` for the neck.

The factorised prior's parameters load under their present names (`matrices.0`) and under those of CompressAI 1.1
(`_matrix0`). GDN's beta and gamma are stored reparametrised there and here.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxsem.codecs import SYSTEMS, ElicConfig, HyperpriorCodec, param_shapes
from jaxsem.errors import InputError
from jaxsem.nn.priors import LIKELIHOOD_FLOOR, SCALE_FLOOR
from jaxsem.weights.convert import (
    CONV,
    DECONV,
    STRIDE1_DECONV,
    Entry,
    Ignored,
    Table,
    Transform,
    convert,
    invert,
    strip_prefixes,
)
from jaxsem.weights.torch_files import read_torch, state_dict_of

LAYOUTS = ("compressai", "elicre")
_WRAPPERS = ("module.", "base_coder.")


def load_compressai(
    source: str | os.PathLike | Mapping[str, np.ndarray], codec: str, config: Any
) -> tuple[HyperpriorCodec, dict[str, Any]]:
    """Loads a checkpoint of `mbt2018-mean` or ELIC.

    Args:
      source: A torch file, or its state dict as NumPy arrays.
      codec: "elic" or "hyperprior".
      config: The codec's config; nothing is guessed from the shapes.

    Returns:
      The Flax module and its parameters, nested, NumPy float32.

    Raises:
      InputError: An unknown codec, a config of another codec, or one of several rates.
      WeightsError: The file is damaged or does not fit; lists every key that does not.
    """
    module = _module(codec, config)
    if isinstance(source, Mapping):
        name, tree = "the state dict", source
    else:
        name, tree = os.fspath(source), read_torch(source)
    state = strip_prefixes(state_dict_of(tree, name), _WRAPPERS)
    layout = "compressai" if any(key.startswith("latent_codec.") for key in state) else "elicre"
    return module, convert(table_of(config, layout), state, param_shapes(module), name)


def to_compressai(
    module: HyperpriorCodec, params: Mapping[str, Any], layout: str = "compressai"
) -> dict[str, np.ndarray]:
    """Writes parameters as a state dict that CompressAI 1.2.8 loads strictly.

    Args:
      module: The codec.
      params: Its parameters.
      layout: "compressai", or "elicre" for ELIC's other layout, with the old names of the prior.

    Returns:
      Arrays by key, buffers included; the coder's tables are empty, so call `update()` there.

    Raises:
      InputError: An unknown layout, or a codec of several rates, which CompressAI does not have.
      WeightsError: Parameters that no key can hold.
    """
    if layout not in LAYOUTS:
        raise InputError(f"the layout is {' or '.join(map(repr, LAYOUTS))}, not {layout!r}")
    _check_rates(module.config)
    state = invert(table_of(module.config, layout), params)
    return {**state, **_buffers(state, layout)}


def table_of(config: Any, layout: str) -> Table:
    """The converter table of a codec's config in one of the `LAYOUTS` (the hyperprior has one only)."""
    if not isinstance(config, ElicConfig):
        return (*_hyperprior_rules(), *_prior_rules("", old_first=False), *_buffer_rules())
    inside = "latent_codec.hyper." if layout == "compressai" else ""
    context = _context_rules(config) if layout == "compressai" else _context_rules_elicre()
    return (
        *_transform_rules(),
        *_conv(inside + "h_a.{i}", "h_a/layers_{i}"),
        *_conv(inside + "h_s.{i:0|2}", "h_s/layers_{i}", DECONV),
        *_conv(inside + "h_s.4", "h_s/layers_4", STRIDE1_DECONV if config.official else CONV),
        *context,
        *_prior_rules(inside, old_first=layout == "elicre"),
        *_buffer_rules(),
    )


def _module(codec: str, config: Any) -> HyperpriorCodec:
    if codec not in SYSTEMS:
        raise InputError(f"there is no codec {codec!r}; there are {', '.join(sorted(SYSTEMS))}")
    module, record = SYSTEMS[codec]
    if not isinstance(config, record):
        raise InputError(f"the config of {codec} is a {record.__name__}, not a {type(config).__name__}")
    _check_rates(config)
    return module(config)


def _check_rates(config: Any) -> None:
    if config.lambdas:
        raise InputError(f"CompressAI's codecs serve one rate; this config has {len(config.lambdas)}: use lambdas=()")


# -- rules ------------------------------------------------------------------------------------------------------------


def _conv(source: str, target: str, transform: Transform = CONV) -> Iterator[Entry]:
    yield Entry(f"{source}.weight", f"{target}/kernel", transform)
    yield Entry(f"{source}.bias", f"{target}/bias")


def _hyperprior_rules() -> Iterator[Entry]:
    yield from _conv("g_a.{i}", "g_a/layers_{i}")
    yield from _conv("g_s.{i}", "g_s/layers_{i}", DECONV)
    yield from _conv("h_a.{i}", "h_a/layers_{i}")
    yield from _conv("h_s.{i:0|2}", "h_s/layers_{i}", DECONV)
    yield from _conv("h_s.4", "h_s/layers_4")
    for part in ("beta", "gamma"):
        yield Entry(f"{{net:g_a|g_s}}.{{i}}.{part}", f"{{net}}/layers_{{i}}/{part}")


def _transform_rules() -> Iterator[Entry]:
    """ELIC's g_a and g_s: convolutions, residual bottlenecks (conv1 to conv3) and attention blocks (conv_a, conv_b)."""
    yield from _conv("g_a.{i}", "g_a/layers_{i}")
    yield from _conv("g_s.{i}", "g_s/layers_{i}", DECONV)
    block = "{net:g_a|g_s}.{i}", "{net}/layers_{i}"
    yield from _conv(f"{block[0]}.conv{{j}}", f"{block[1]}/conv{{j}}")
    for place, name in ((0, "conv1"), (2, "conv2"), (4, "conv3")):
        unit = "{branch:a|b}.{unit}", "{branch}_{unit}"
        yield from _conv(f"{block[0]}.conv_{unit[0]}.conv.{place}", f"{block[1]}/conv_{unit[1]}/{name}")
    yield from _conv(f"{block[0]}.conv_b.3", f"{block[1]}/conv_b_3")


def _context_rules(config: ElicConfig) -> Iterator[Entry]:
    for k in range(1, len(config.groups)):
        yield from _conv(f"latent_codec.y.channel_context.y{k}.{{i}}", f"channel_context_{k - 1}/layers_{{i}}")
    group = "latent_codec.y.latent_codec.y{k}"
    yield from _conv(f"{group}.context_prediction", "spatial_context_{k}")
    yield from _conv(f"{group}.entropy_parameters.{{i}}", "aggregation_{k}/layers_{i}")


def _context_rules_elicre() -> Iterator[Entry | Ignored]:
    yield from _conv("cc_transforms.{k}.{i}", "channel_context_{k}/layers_{i}")
    yield from _conv("context_prediction.{k}", "spatial_context_{k}")
    yield from _conv("ParamAggregation.{k}.{i}", "aggregation_{k}/layers_{i}")
    yield Ignored("{rest:llm_trans_encoder\\..*}", "the neck, a model of its own")
    yield Ignored("{rest:(?:.*\\.)?(?:SemanticLoss|clip_model)\\..*}", "a frozen CLIP that the training loss used")


def _prior_rules(inside: str, old_first: bool) -> Iterator[Entry]:
    """The factorised prior under both generations of names."""
    parts = (("matrices", "matrix"), ("biases", "bias"), ("factors", "factor"))
    new = [Entry(f"{inside}entropy_bottleneck.{name}.{{i}}", f"entropy_bottleneck/{our}_{{i}}") for name, our in parts]
    old = [Entry(f"{inside}entropy_bottleneck._{our}{{i}}", f"entropy_bottleneck/{our}_{{i}}") for _, our in parts]
    yield from old + new if old_first else new + old
    yield Entry(f"{inside}entropy_bottleneck.quantiles", "entropy_bottleneck/quantiles")


def _buffer_rules() -> Iterator[Ignored]:
    tables = "_offset|_quantized_cdf|_cdf_length"
    yield Ignored(
        f"{{rest:(?:.*\\.)?entropy_bottleneck\\.(?:{tables}|target|likelihood_lower_bound\\.bound)}}",
        "the coder's tables, rebuilt from the prior, and constants",
    )
    yield Ignored(
        f"{{rest:(?:.*\\.)?gaussian_conditional\\.(?:{tables}|scale_table|scale_bound|\\w+\\.bound)}}",
        "the coder's tables, rebuilt from the scales, and constants",
    )
    yield Ignored("{rest:(?:.*\\.)?context_prediction\\.(?:\\d+\\.)?mask}", "the checkerboard, a constant")
    yield Ignored("{rest:.*\\.(?:beta|gamma)_reparam\\..*}", "constants of GDN's reparametrisation")


# -- buffers, which CompressAI expects in a state dict ----------------------------------------------------------------


def _buffers(state: Mapping[str, np.ndarray], layout: str) -> dict[str, np.ndarray]:
    """The buffers that belong to the written parameters, with CompressAI's own values."""
    buffers: dict[str, np.ndarray] = {}
    for key, value in state.items():
        name, _, part = key.rpartition(".")
        if "context_prediction" in name and part == "weight":
            odd = np.indices(value.shape[2:]).sum(0) % 2
            buffers[f"{name}.mask"] = np.broadcast_to(odd, value.shape).astype(np.float32)
            if layout == "compressai":
                buffers |= _gaussian_buffers(name.replace("context_prediction", "y.gaussian_conditional"))
        elif part in ("beta", "gamma"):
            buffers[f"{key}_reparam.pedestal"] = np.float32([2.0**-36])
            minimum = 1e-6 if part == "beta" else 0.0
            buffers[f"{key}_reparam.lower_bound.bound"] = np.float32([(minimum + 2.0**-36) ** 0.5])
        elif part == "quantiles":
            t = np.log(2 / 1e-9 - 1)
            buffers |= _table_buffers(name)
            buffers[f"{name}.target"] = np.float32([-t, 0, t])
    if not any("gaussian_conditional" in key for key in buffers):
        buffers |= _gaussian_buffers("gaussian_conditional")
    return buffers


def _table_buffers(name: str) -> dict[str, np.ndarray]:
    tables = {f"{name}.{part}": np.zeros(0, np.int32) for part in ("_offset", "_quantized_cdf", "_cdf_length")}
    return {**tables, f"{name}.likelihood_lower_bound.bound": np.float32([LIKELIHOOD_FLOOR])}


def _gaussian_buffers(name: str) -> dict[str, np.ndarray]:
    bound = np.float32([SCALE_FLOOR])
    scales = {"scale_table": np.zeros(0, np.float32), "scale_bound": bound, "lower_bound_scale.bound": bound}
    return {**_table_buffers(name), **{f"{name}.{part}": value for part, value in scales.items()}}
