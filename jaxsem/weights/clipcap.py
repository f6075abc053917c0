"""ClipCap's checkpoints as its authors publish them, in both directions: `coco_weights.pt` and its like.

    gpt.transformer.h.0.attn.c_attn.weight, gpt.lm_head.weight        GPT-2, see `jaxsem.weights.gpt2`
    clip_project.model.0.weight                                       the MLP mapper
    clip_project.transformer.layers.0.attn.to_queries.weight          the transformer mapper

A file holds GPT-2 whether it was trained or frozen.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsem.errors import WeightsError
from jaxsem.systems.clipcap import ClipCap, ClipCapConfig, param_shapes
from jaxsem.weights.convert import LINEAR, Entry, Table, convert, invert, strip_prefixes
from jaxsem.weights.gpt2 import load_gpt2, to_transformers
from jaxsem.weights.huggingface import open_state

_FUSED, _FUSED_PARTS = "to_keys_values.weight", ("key", "value")


def load_clipcap(
    source: str | os.PathLike | Mapping[str, Any],
    config: ClipCapConfig,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
) -> tuple[ClipCap, dict[str, Any]]:
    """Loads a checkpoint.

    Args:
      source: A file of weights, or its state dict.
      config: Its sizes, such as `jaxsem.systems.clipcap.MLP_COCO`; nothing is guessed from the file.
      dtype: Of the computation.
      param_dtype: Of the parameters.

    Returns:
      The Flax module and its parameters, nested NumPy arrays.

    Raises:
      InputError: The file is missing or not readable.
      WeightsError: The file is damaged or does not fit; lists every key that does not, of the mapper and of GPT-2.
    """
    state, name = open_state(source)
    state = strip_prefixes(state, ("module.",))
    module = ClipCap(config, dtype, param_dtype)
    language = {key.removeprefix("gpt."): value for key, value in state.items() if key.startswith("gpt.")}
    mapping = {key: value for key, value in state.items() if not key.startswith("gpt.")}
    parts = {
        "mapper": lambda: _load_mapper(mapping, module),
        "gpt2": lambda: load_gpt2(language, config.gpt2, dtype, param_dtype)[1],
    }
    params, faults = {}, []
    for part, load in parts.items():
        try:
            params[part] = load()
        except WeightsError as error:
            keys = "without 'gpt.'" if part == "gpt2" else "as they are"
            faults.append(f"{name}, its {part}, keys {keys}: {error}")
    if faults:
        raise WeightsError("\n".join(faults))
    return module, params


def to_torch(params: Mapping[str, Any], config: ClipCapConfig) -> dict[str, np.ndarray]:
    """Writes parameters as a state dict that the authors' class loads strictly.

    Args:
      params: Parameters of `ClipCap`, as arrays.
      config: Their config.

    Returns:
      Arrays by key.

    Raises:
      WeightsError: Parameters that no key can hold.
    """
    mapper = _join_fused(invert(TABLES[config.mapper], params["mapper"]))
    language = to_transformers(params["gpt2"], config.gpt2)
    return dict(sorted({**mapper, **{f"gpt.{key}": value for key, value in language.items()}}.items()))


def _load_mapper(state: Mapping[str, np.ndarray], module: ClipCap) -> dict[str, Any]:
    shapes = param_shapes(module)["mapper"]
    return convert(TABLES[module.config.mapper], _split_fused(state), shapes, "the state dict")


# -- tables -----------------------------------------------------------------------------------------------------------


def _mlp() -> Iterator[Entry]:
    for i, ours in ((0, "fc1"), (2, "fc2")):
        yield from _linear(f"clip_project.model.{i}", ours)


def _transformer() -> Iterator[Entry]:
    yield from _linear("clip_project.linear", "linear")
    yield Entry("clip_project.prefix_const", "constants")
    layer, block = "clip_project.transformer.layers.{i}", "blocks[{i}]"
    yield Entry(f"{layer}.attn.to_queries.weight", f"{block}/attention/query/kernel", LINEAR)
    for part in _FUSED_PARTS:
        yield Entry(f"{layer}.attn.{_FUSED}[{part}]", f"{block}/attention/{part}/kernel", LINEAR)
    yield from _linear(f"{layer}.attn.project", f"{block}/attention/out")
    for i in (1, 2):
        yield Entry(f"{layer}.norm{i}.weight", f"{block}/norm{i}/scale")
        yield Entry(f"{layer}.norm{i}.bias", f"{block}/norm{i}/bias")
        yield from _linear(f"{layer}.mlp.fc{i}", f"{block}/mlp/fc{i}")


def _linear(source: str, target: str) -> Iterator[Entry]:
    yield Entry(f"{source}.weight", f"{target}/kernel", LINEAR)
    yield Entry(f"{source}.bias", f"{target}/bias")


def _split_fused(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Takes `to_keys_values` apart: rows of keys, then of values."""
    parts: dict[str, np.ndarray] = {}
    for key, value in state.items():
        if not key.endswith(_FUSED):
            parts[key] = value
        elif value.ndim == 0 or len(value) % 2:
            raise WeightsError(f"{key} is {value.shape}, which is not keys and values in equal parts")
        else:
            parts |= {f"{key}[{part}]": rows for part, rows in zip(_FUSED_PARTS, np.split(value, 2))}
    return parts


def _join_fused(parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Undoes `_split_fused`."""
    state = {key: value for key, value in parts.items() if not key.endswith("]")}
    for fused in {key.partition("[")[0] for key in parts.keys() - state.keys()}:
        state[fused] = np.concatenate([parts[f"{fused}[{part}]"] for part in _FUSED_PARTS])
    return state


# Of the keys of the mapper, `to_keys_values` taken apart.
TABLES: dict[str, Table] = {"mlp": tuple(_mlp()), "transformer": tuple(_transformer())}
