"""How CompressAI and the ELIC re-implementation lay out their state dicts: every codec family has a `Family` here.

ELIC has two layouts, the others have the first:

* `compressai`: CompressAI's own classes (for ELIC `latent_codec.hyper.h_a.0.weight`, ...).
* `elicre`: the re-implementation of ELIC's variant Chandelier, which the authors of Transform-Neck use too
  (`cc_transforms.0.0.weight`, ...).

The factorised prior's parameters load under their present names (`matrices.0`), those of CompressAI 1.1 (`_matrix0`) and those of
the oldest published files (`_matrices.0`). GDN's beta and gamma are stored reparametrised there and here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxsem.codecs import (
    SYSTEMS,
    ElicConfig,
    FactorizedConfig,
    HyperpriorConfig,
    JointConfig,
    ScaleHyperpriorConfig,
    TicConfig,
)
from jaxsem.errors import InputError
from jaxsem.nn.priors import LIKELIHOOD_FLOOR, SCALE_FLOOR
from jaxsem.weights.convert import CONV, DECONV, STRIDE1_DECONV, Entry, Ignored, Table, Transform
from jaxsem.weights.tic import tic_buffers, tic_rules

LAYOUTS = ("compressai", "elicre")
Rules = Iterator[Entry | Ignored]
State = dict[str, np.ndarray]


# -- rules ---------------------------------------------------------------------------------------------------------------


def _conv(source: str, target: str, transform: Transform = CONV) -> Iterator[Entry]:
    yield Entry(f"{source}.weight", f"{target}/kernel", transform)
    yield Entry(f"{source}.bias", f"{target}/bias")


def _gdn_rules() -> Iterator[Entry]:
    """g_a and g_s with GDN."""
    yield from _conv("g_a.{i}", "g_a/layers_{i}")
    yield from _conv("g_s.{i}", "g_s/layers_{i}", DECONV)
    for part in ("beta", "gamma"):
        yield Entry(f"{{net:g_a|g_s}}.{{i}}.{part}", f"{{net}}/layers_{{i}}/{part}")


def _hyper_rules(inside: str = "", last: Transform = CONV) -> Iterator[Entry]:
    """h_a and h_s with two transposed convolutions and a `last` layer."""
    yield from _conv(inside + "h_a.{i}", "h_a/layers_{i}")
    yield from _conv(inside + "h_s.{i:0|2}", "h_s/layers_{i}", DECONV)
    yield from _conv(inside + "h_s.4", "h_s/layers_4", last)


def _factorized_rules(config: FactorizedConfig, layout: str) -> Rules:
    yield from _gdn_rules()
    yield from _prior_rules()


def _hyperprior_rules(config: HyperpriorConfig, layout: str) -> Rules:
    yield from _gdn_rules()
    yield from _hyper_rules()
    yield from _prior_rules()


def _joint_rules(config: JointConfig, layout: str) -> Rules:
    yield from _hyperprior_rules(config, layout)
    yield from _conv("context_prediction", "context_prediction")
    yield from _conv("entropy_parameters.{i}", "entropy_parameters/layers_{i}/conv")


def _elic_rules(config: ElicConfig, layout: str) -> Rules:
    inside = "latent_codec.hyper." if layout == "compressai" else ""
    yield from _elic_transforms()
    yield from _hyper_rules(inside, STRIDE1_DECONV if config.official else CONV)
    yield from _context_rules(config) if layout == "compressai" else _context_rules_elicre()
    yield from _prior_rules(inside, old_first=layout == "elicre")


def _elic_transforms() -> Iterator[Entry]:
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


def _context_rules_elicre() -> Rules:
    yield from _conv("cc_transforms.{k}.{i}", "channel_context_{k}/layers_{i}")
    yield from _conv("context_prediction.{k}", "spatial_context_{k}")
    yield from _conv("ParamAggregation.{k}.{i}", "aggregation_{k}/layers_{i}")
    yield Ignored("{rest:llm_trans_encoder\\..*}", "the neck, a model of its own")
    yield Ignored("{rest:(?:.*\\.)?(?:SemanticLoss|clip_model)\\..*}", "a frozen CLIP that the training loss used")


def _tic_rules(config: TicConfig, layout: str) -> Rules:
    yield from tic_rules()
    yield from _prior_rules(old_first=True)


def _prior_rules(inside: str = "", old_first: bool = False) -> Iterator[Entry]:
    """The factorised prior under all generations of names."""
    parts = (("matrices", "matrix"), ("biases", "bias"), ("factors", "factor"))
    bottleneck = f"{inside}entropy_bottleneck"
    new, old, oldest = (
        [Entry(f"{bottleneck}.{form.format(many, one)}{{i}}", f"entropy_bottleneck/{one}_{{i}}") for many, one in parts]
        for form in ("{0}.", "_{1}", "_{0}.")
    )
    yield from [*old, *new, *oldest] if old_first else [*new, *old, *oldest]
    yield Entry(f"{bottleneck}.quantiles", "entropy_bottleneck/quantiles")


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
    yield Ignored("{rest:(?:.*\\.)?context_prediction\\.(?:\\d+\\.)?mask}", "the seen taps, a constant")
    yield Ignored("{rest:.*\\.(?:beta|gamma)_reparam\\..*}", "constants of GDN's reparametrisation")


# -- families ------------------------------------------------------------------------------------------------------------


def checkerboard_mask(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The taps that a context on the checkerboard sees."""
    return (rows + columns) % 2 == 1


def raster_mask(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The taps that a context in raster order sees."""
    places = rows * (columns.max() + 1) + columns
    return places < places.max() // 2


@dataclass(frozen=True)
class Family:
    """How CompressAI keeps a family of codecs.

    Attributes:
      rules: rules(config, layout) for all keys but those of buffers.
      constructor: constructor(config) is the call of CompressAI's class with these sizes, or None.
      gaussians: gaussians(config, layout) names its Gaussian conditionals, which have buffers only.
      mask: mask(rows, columns) are the taps that its `context_prediction` sees, where it has one.
      buffers: buffers(state, config) are those that only this family has.
      layouts: Of `LAYOUTS`; where there are two, the one of `latent_codec.` first.
    """

    rules: Callable[[Any, str], Rules]
    constructor: Callable[[Any], str | None]
    gaussians: Callable[[Any, str], Sequence[str]] = lambda config, layout: ("gaussian_conditional",)
    mask: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    buffers: Callable[[Mapping[str, np.ndarray], Any], State] = lambda state, config: {}
    layouts: tuple[str, ...] = ("compressai",)


def _widths(name: str) -> Callable[[Any], str]:
    return lambda config: f"{name}({config.channels}, {config.latent})"


def _elic_class(config: ElicConfig) -> str | None:
    """CompressAI fixes the context networks' hidden widths, the chandelier variant's as those of M = 320."""
    fits = {*config.widths, config.hyper} == {config.hyper} and config.context == (224, 128)
    if not fits or not (config.official or config.latent == 320):
        return None
    name = "Elic2022Official" if config.official else "Elic2022Chandelier"
    return f"{name}({config.hyper}, {config.latent}, {list(config.groups)})"


def _elic_gaussians(config: ElicConfig, layout: str) -> Sequence[str]:
    if layout == "elicre":
        return ("gaussian_conditional",)
    return [f"latent_codec.y.latent_codec.y{k}.y.gaussian_conditional" for k in range(len(config.groups))]


FAMILIES: Mapping[type, Family] = {
    FactorizedConfig: Family(_factorized_rules, _widths("FactorizedPrior"), gaussians=lambda *_: ()),
    ScaleHyperpriorConfig: Family(_hyperprior_rules, _widths("ScaleHyperprior")),
    HyperpriorConfig: Family(_hyperprior_rules, _widths("MeanScaleHyperprior")),
    JointConfig: Family(_joint_rules, _widths("JointAutoregressiveHierarchicalPriors"), mask=raster_mask),
    ElicConfig: Family(_elic_rules, _elic_class, _elic_gaussians, checkerboard_mask, layouts=LAYOUTS),
    TicConfig: Family(_tic_rules, lambda config: None, buffers=tic_buffers),
}


def family_of(config: Any) -> Family:
    """The family of a codec's config.

    Raises:
      InputError: CompressAI has no such codec.
    """
    if type(config) not in FAMILIES:
        known = ", ".join(name for name, (_, record) in SYSTEMS.items() if record in FAMILIES)
        raise InputError(f"CompressAI has no codec of {type(config).__name__}; converted are {known}")
    return FAMILIES[type(config)]


def table_of(config: Any, layout: str) -> Table:
    """The converter table of a codec's config in one of its family's layouts.

    Raises:
      InputError: CompressAI has no such codec, or it has no such layout.
    """
    family = family_of(config)
    if layout not in family.layouts:
        raise InputError(f"the layout is {' or '.join(map(repr, family.layouts))}, not {layout!r}")
    return (*family.rules(config, layout), *_buffer_rules())


def class_of(config: Any) -> str | None:
    """The model of CompressAI that has these sizes, such as "ScaleHyperprior(128, 192)"; None if none can have them."""
    return family_of(config).constructor(config)


# -- buffers, which CompressAI expects in a state dict ----------------------------------------------------------------


def buffers_of(state: Mapping[str, np.ndarray], config: Any, layout: str) -> State:
    """The buffers that belong to the written parameters, with CompressAI's own values."""
    family = family_of(config)
    buffers: State = {**family.buffers(state, config)}
    for key, value in state.items():
        name, _, part = key.rpartition(".")
        if family.mask and "context_prediction" in name and part == "weight":
            seen = np.broadcast_to(family.mask(*np.indices(value.shape[2:])), value.shape)
            buffers[f"{name}.mask"] = np.array(seen, np.float32, order="C")
        elif part in ("beta", "gamma"):
            buffers[f"{key}_reparam.pedestal"] = np.float32([2.0**-36])
            minimum = 1e-6 if part == "beta" else 0.0
            buffers[f"{key}_reparam.lower_bound.bound"] = np.float32([(minimum + 2.0**-36) ** 0.5])
        elif part == "quantiles":
            t = np.log(2 / 1e-9 - 1)
            buffers |= _table_buffers(name)
            buffers[f"{name}.target"] = np.float32([-t, 0, t])
    for name in family.gaussians(config, layout):
        bound = np.float32([SCALE_FLOOR])
        scales = {"scale_table": np.zeros(0, np.float32), "scale_bound": bound, "lower_bound_scale.bound": bound}
        buffers |= {**_table_buffers(name), **{f"{name}.{part}": value for part, value in scales.items()}}
    return buffers


def _table_buffers(name: str) -> State:
    tables = {f"{name}.{part}": np.zeros(0, np.int32) for part in ("_offset", "_quantized_cdf", "_cdf_length")}
    return {**tables, f"{name}.likelihood_lower_bound.bound": np.float32([LIKELIHOOD_FLOOR])}
