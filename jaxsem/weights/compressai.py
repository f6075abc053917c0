"""Checkpoints of CompressAI and of the ELIC re-implementation, in both directions.

Which codecs there are and how their keys read: `jaxsem.weights.compressai_layouts`. The authors of Transform-Neck save a dict with
`state_dict` for the codec, in the layout of the ELIC re-implementation, and `adapter` for the neck.
"""

import os
from collections.abc import Mapping
from typing import Any

from jaxsem.codecs import SYSTEMS, HyperpriorCodec, param_shapes
from jaxsem.codecs.single_rate import at_one_rate
from jaxsem.errors import InputError
from jaxsem.files import write_file
from jaxsem.weights.compressai_layouts import LAYOUTS, State, buffers_of, class_of, family_of, table_of
from jaxsem.weights.convert import convert, invert, strip_prefixes
from jaxsem.weights.huggingface import read_safetensors
from jaxsem.weights.torch_files import read_torch, state_dict_of

__all__ = [
    "LAYOUTS",
    "class_of",
    "load_compressai",
    "split_neck_checkpoint",
    "table_of",
    "to_compressai",
    "write_compressai",
]

_WRAPPERS = ("module.", "base_coder.")


def load_compressai(
    source: str | os.PathLike | Mapping[str, Any], codec: str, config: Any
) -> tuple[HyperpriorCodec, dict[str, Any]]:
    """Loads a checkpoint of ELIC or of a codec that CompressAI publishes.

    Args:
      source: A torch or safetensors file, or its state dict as NumPy arrays.
      codec: Name of the family in `jaxsem.codecs.SYSTEMS`, such as "elic" or "hyperprior".
      config: The codec's config; nothing is guessed from the shapes.

    Returns:
      The Flax module and its parameters, nested, NumPy float32.

    Raises:
      InputError: An unknown codec, a config of another codec, or one of several rates.
      WeightsError: The file is damaged or does not fit; lists every key that does not.
    """
    module = _module(codec, config)
    state, _ = split_neck_checkpoint(source)
    layouts = family_of(config).layouts
    layout = layouts[0] if any(key.startswith("latent_codec.") for key in state) else layouts[-1]
    return module, convert(table_of(config, layout), state, param_shapes(module), _name(source))


def split_neck_checkpoint(source: str | os.PathLike | Mapping[str, Any]) -> tuple[State, State | None]:
    """The two models in a file of the transform-neck authors, or the one in any other.

    Args:
      source: A torch or safetensors file, or what it holds.

    Returns:
      The codec's state dict, and the neck's where the file has an `adapter`, both without wrappers' prefixes.

    Raises:
      InputError: The file is missing or not readable.
      WeightsError: It is damaged, or holds no state dict.
    """
    name = _name(source)
    if isinstance(source, Mapping):
        tree = source
    else:
        tree = read_safetensors(source) if name.endswith(".safetensors") else read_torch(source)
    codec = strip_prefixes(state_dict_of(tree, name), _WRAPPERS)
    adapter = tree.get("adapter")
    if adapter is None or "state_dict" not in tree:
        return codec, None
    return codec, strip_prefixes(state_dict_of(adapter, f"the adapter of {name}"), _WRAPPERS)


def to_compressai(
    module: HyperpriorCodec, params: Mapping[str, Any], layout: str = "compressai", quality: float | None = None
) -> State:
    """Writes parameters as a state dict that CompressAI 1.2.8 loads strictly.

    Args:
      module: The codec.
      params: Its parameters.
      layout: "compressai", or "elicre" for ELIC's other layout, with the old names of the prior.
      quality: Of a codec of several rates, the one to write: its gains go into the convolutions beside them.

    Returns:
      Arrays by key, buffers included; the coder's tables are empty, so call `update()` there.

    Raises:
      InputError: An unknown layout, or a codec of several rates, which CompressAI does not have, without a quality.
      WeightsError: Parameters that no key can hold.
    """
    if quality is not None:
        module, params = at_one_rate(module, params, quality)
    _check_rates(module.config, "name the quality to write")
    state = invert(table_of(module.config, layout), params)
    return {**state, **buffers_of(state, module.config, layout)}


def write_compressai(
    path: str | os.PathLike,
    module: HyperpriorCodec,
    params: Mapping[str, Any],
    layout: str = "compressai",
    quality: float | None = None,
    force: bool = False,
) -> None:
    """Writes parameters as a safetensors file with CompressAI's keys; see `to_compressai`.

    It loads there in three lines, the first of which is what `class_of` says:

        net = compressai.models.ScaleHyperprior(128, 192)
        net.load_state_dict(safetensors.torch.load_file(path))
        net.update()

    Raises:
      InputError: As `to_compressai`.
      WeightsError: As `to_compressai`.
      OutputError: The file exists and `force` is not given, or it cannot be written.
    """
    from safetensors.numpy import save

    state = to_compressai(module, params, layout, quality)
    write_file(path, save(state, metadata={"format": "pt", "layout": layout}), force)


def _name(source: str | os.PathLike | Mapping[str, Any]) -> str:
    return "the state dict" if isinstance(source, Mapping) else os.fspath(source)


def _module(codec: str, config: Any) -> HyperpriorCodec:
    if codec not in SYSTEMS:
        raise InputError(f"there is no codec {codec!r}; there are {', '.join(sorted(SYSTEMS))}")
    module, record = SYSTEMS[codec]
    if type(config) is not record:
        raise InputError(f"the config of {codec} is a {record.__name__}, not a {type(config).__name__}")
    _check_rates(config, "use lambdas=()")
    return module(config)


def _check_rates(config: Any, way_out: str) -> None:
    if config.lambdas:
        raise InputError(f"CompressAI's codecs serve one rate; this config has {len(config.lambdas)}: {way_out}")
