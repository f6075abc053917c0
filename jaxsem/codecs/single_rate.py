"""A codec of several rates at one of them, as a codec of one rate: its gains go into the layers beside them.

    y = gain * g_a(x)           the last layer of g_a takes the gain
    g_s(inverse * y_hat)        the first layer of g_s takes the inverse

and likewise z with h_a and h_s. Between the two nothing changes: rates, means and tables are those of the gained latents. An
attention block at the end of a network is moved to the gained units as a whole; its ReLUs let a positive factor through.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsem.codecs.hyperprior import HyperpriorCodec
from jaxsem.errors import InputError
from jaxsem.nn.blocks import AttentionBlock
from jaxsem.nn.conv import Conv, Deconv

Params = dict[str, Any]
_KERNELS = (Conv, Deconv)


def at_one_rate(module: HyperpriorCodec, params: Mapping[str, Any], quality: float) -> tuple[HyperpriorCodec, Params]:
    """The codec of one rate that does what a codec of several does at `quality`, but for float rounding.

    Args:
      module: A codec with `lambdas`.
      params: Its parameters; they stay as they are.
      quality: In [0, len(lambdas) - 1].

    Returns:
      The module of the same family without `lambdas`, and its parameters, NumPy float32.

    Raises:
      InputError: The codec has one rate, no such quality, or ends of networks that a gain cannot go into.
    """
    top = len(module.config.lambdas) - 1
    if top < 0:
        raise InputError("the codec has one rate: leave the quality out")
    if not 0 <= quality <= top:
        raise InputError(f"the codec has qualities 0 to {top}, not {quality:g}")
    flat = flatten_dict(dict(jax.device_get(params)))
    changed = unflatten_dict({path: np.array(leaf) for path, leaf in flat.items() if not path[0].startswith("gain_")})
    bound = module.bind({"params": params})
    for latent, before, after in (("y", "g_a", "g_s"), ("z", "h_a", "h_s")):
        gains = getattr(bound, f"gain_{latent}")
        forward, inverse = (np.asarray(gains.at(np.float32([quality]), side)[0], np.float64) for side in (False, True))
        _scale_output(before, _layers(bound, before), changed[before], forward)
        _scale_input(after, _layers(bound, after), changed[after], inverse)
    config = dataclasses.replace(module.config, lambdas=())
    return type(module)(config, module.dtype), jax.tree.map(np.float32, changed)


def _layers(bound: HyperpriorCodec, name: str) -> list[Any]:
    network = getattr(bound, name)
    return list(network.layers) if isinstance(network, nn.Sequential) else [network]


def _scale_output(name: str, layers: list[Any], params: Params, factor: np.ndarray) -> None:
    """Makes a network give `factor` times as much."""
    last = len(layers) - 1
    if isinstance(layers[last], AttentionBlock):
        _rescale(params[f"layers_{last}"], factor)
        last -= 1
    weights = _weights(name, layers, params, last)
    weights["kernel"] = weights["kernel"] * factor
    weights["bias"] = weights["bias"] * factor


def _scale_input(name: str, layers: list[Any], params: Params, factor: np.ndarray) -> None:
    """Makes a network take `factor` times its input."""
    first = 0
    if isinstance(layers[first], AttentionBlock):
        _rescale(params[f"layers_{first}"], 1 / factor)
        first += 1
    weights = _weights(name, layers, params, first)
    weights["kernel"] = weights["kernel"] * factor[:, None]


def _weights(name: str, layers: list[Any], params: Params, place: int) -> Params:
    if not isinstance(layers[place], _KERNELS):
        kind = getattr(layers[place], "__name__", type(layers[place]).__name__)
        raise InputError(
            f"one rate of this codec cannot be taken out: at the end of {name} stands {kind}, no convolution"
        )
    return params[f"layers_{place}"]


def _rescale(block: Params, factor: np.ndarray) -> None:
    """Turns an attention block A into factor * A(x / factor)."""
    for name, part in block.items():
        if name == "conv_b_3":
            part["kernel"] = part["kernel"] / factor[:, None]
        else:
            part["conv1"]["kernel"] = part["conv1"]["kernel"] / factor[:, None]
            part["conv3"]["kernel"] = part["conv3"]["kernel"] * factor
            part["conv3"]["bias"] = part["conv3"]["bias"] * factor
