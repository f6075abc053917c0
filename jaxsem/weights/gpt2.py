"""GPT-2's checkpoints in transformers' layout, in both directions.

    transformer.h.0.attn.c_attn.weight      GPT2LMHeadModel
    h.0.attn.c_attn.weight                  GPT2Model, and the published files

Kernels are (in, out) already. Queries, keys and values are one array, in this order. `lm_head.weight` is the token embedding
again; older files also hold the causal mask of every layer.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxsem.backbones.gpt2 import CONFIGS, Gpt2, Gpt2Config, param_shapes
from jaxsem.errors import InputError, WeightsError
from jaxsem.weights.convert import Entry, Ignored, convert, invert, strip_prefixes
from jaxsem.weights.huggingface import choose_config, open_state

_FUSED_PARTS = ("query", "key", "value")
_HEAD, _EMBEDDING = "lm_head.weight", "wte.weight"


def load_gpt2(
    source: str | os.PathLike | Mapping[str, Any],
    config: Gpt2Config | str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
) -> tuple[Gpt2, dict[str, Any]]:
    """Loads GPT-2.

    Args:
      source: A folder or Hugging Face id ("openai-community/gpt2"), a file of weights, or a state dict.
      config: Sizes, or the name of a published model (`jaxsem.backbones.gpt2.CONFIGS`); None reads the folder's config.json.
      dtype: Of the computation.
      param_dtype: Of the parameters; bfloat16 halves the memory of a frozen model.

    Returns:
      The Flax module and its parameters, nested NumPy arrays.

    Raises:
      InputError: Nothing is there, or no config can be told.
      WeightsError: The files are damaged or do not fit, and lists every key that does not; or the output layer is not the token
        embedding.
    """
    config = choose_config(source, config, "GPT-2", CONFIGS, config_from_transformers)
    state, name = open_state(source)
    state = strip_prefixes(state, ("module.", "transformer."))
    if _HEAD in state and _EMBEDDING in state and not np.array_equal(state[_HEAD], state[_EMBEDDING]):
        raise WeightsError(
            f"{name}: {_HEAD} is not {_EMBEDDING} again, and only a GPT-2 whose output layer is its token embedding is known"
        )
    module = Gpt2(config, dtype, param_dtype)
    return module, convert(TABLE, _split_fused(state, name), param_shapes(module), name)


def to_transformers(params: Mapping[str, Any], config: Gpt2Config) -> dict[str, np.ndarray]:
    """Writes parameters as a state dict that transformers' GPT2LMHeadModel loads strictly.

    Args:
      params: Parameters of `Gpt2`, as arrays.
      config: Their config.

    Returns:
      Arrays by key; the token embedding is there twice, as one array.

    Raises:
      WeightsError: They are not those of the config; lists every parameter that differs.
    """
    found, wanted = (
        {path: np.shape(leaf) for path, leaf in flatten_dict(dict(tree), sep="/").items()}
        for tree in (params, param_shapes(Gpt2(config)))
    )
    if faults := sorted(path for path in found | wanted if found.get(path) != wanted.get(path)):
        lines = [f"\n  {path} is {found.get(path, 'missing')}, not {wanted.get(path, 'there')}" for path in faults]
        raise WeightsError("the parameters are not those of the config:" + "".join(lines))
    theirs = _join_fused(invert(TABLE, params))
    return {**{f"transformer.{key}": value for key, value in theirs.items()}, _HEAD: theirs[_EMBEDDING]}


# -- configs ----------------------------------------------------------------------------------------------------------


_SIZES = {
    "width": ("n_embd", 768),
    "layers": ("n_layer", 12),
    "heads": ("n_head", 12),
    "vocabulary": ("vocab_size", 50257),
    "context": ("n_positions", 1024),
}
# What changes the result, and the only value of it that is known; transformers' default where a file does not say.
_FIXED = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def config_from_transformers(fields: Mapping[str, Any], name: str = "the config") -> Gpt2Config:
    """The sizes in a `config.json` of transformers; fields that are absent have its defaults, those of the small GPT-2.

    Args:
      fields: Of a GPT2Model or GPT2LMHeadModel.
      name: What errors call it.

    Raises:
      WeightsError: It is no config of GPT-2, or asks for what this one does not do.
    """
    if fields.get("model_type") != "gpt2":
        raise WeightsError(f"{name}: the config is one of {fields.get('model_type')!r}, not of 'gpt2'")
    for key, only in _FIXED.items():
        if fields.get(key, only) != only:
            raise WeightsError(f"{name}: it has {key}={fields[key]!r}, and only {only!r} is known")
    sizes = {ours: fields.get(theirs, default) for ours, (theirs, default) in _SIZES.items()}
    sizes["hidden"] = fields.get("n_inner")
    if sizes["hidden"] is None and type(sizes["width"]) is int:
        sizes["hidden"] = 4 * sizes["width"]
    for key, value in sizes.items():
        most = 1000 if key == "layers" else 1 << 20
        if type(value) is not int or not 1 <= value <= most:
            theirs = "n_inner" if key == "hidden" else _SIZES[key][0]
            raise WeightsError(f"{name}: it has {theirs}={value!r}; a number from 1 to {most} is wanted")
    try:
        return Gpt2Config(**sizes, epsilon=fields.get("layer_norm_epsilon", 1e-5))
    except InputError as error:
        raise WeightsError(f"{name}: {error}") from error


# -- tables -----------------------------------------------------------------------------------------------------------


def _rules() -> Iterator[Entry | Ignored]:
    yield Entry(_EMBEDDING, "token_embedding")
    yield Entry("wpe.weight", "positions")
    yield from _norm("ln_f", "final_norm")
    layer, block = "h.{i}", "blocks[{i}]"
    for i in (1, 2):
        yield from _norm(f"{layer}.ln_{i}", f"{block}/norm{i}")
    for part in _FUSED_PARTS:
        yield from _linear(f"{layer}.attn.c_attn", f"{block}/attention/{part}", f"[{part}]")
    yield from _linear(f"{layer}.attn.c_proj", f"{block}/attention/out")
    yield from _linear(f"{layer}.mlp.c_fc", f"{block}/mlp/fc1")
    yield from _linear(f"{layer}.mlp.c_proj", f"{block}/mlp/fc2")
    yield Ignored(f"{layer}.attn.{{name:bias|masked_bias}}", "the causal mask, a constant")
    yield Ignored(_HEAD, "the token embedding again")


def _linear(source: str, target: str, part: str = "") -> Iterator[Entry]:
    yield Entry(f"{source}.weight{part}", f"{target}/kernel")
    yield Entry(f"{source}.bias{part}", f"{target}/bias")


def _norm(source: str, target: str) -> Iterator[Entry]:
    yield Entry(f"{source}.weight", f"{target}/scale")
    yield Entry(f"{source}.bias", f"{target}/bias")


def _split_fused(state: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Takes `c_attn` apart: columns of queries, of keys, of values."""
    parts: dict[str, np.ndarray] = {}
    for key, value in state.items():
        if not key.endswith((".c_attn.weight", ".c_attn.bias")):
            parts[key] = value
        elif value.ndim == 0 or value.shape[-1] % 3:
            raise WeightsError(f"{name}: {key} is {value.shape}, which is not queries, keys and values in equal parts")
        else:
            parts |= {f"{key}[{part}]": columns for part, columns in zip(_FUSED_PARTS, np.split(value, 3, axis=-1))}
    return parts


def _join_fused(parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Undoes `_split_fused`."""
    state = {key: value for key, value in parts.items() if not key.endswith("]")}
    for fused in {key.partition("[")[0] for key in parts.keys() - state.keys()}:
        state[fused] = np.concatenate([parts[f"{fused}[{part}]"] for part in _FUSED_PARTS], axis=-1)
    return dict(sorted(state.items()))


# Of the keys without prefix, `c_attn` taken apart.
TABLE = tuple(_rules())
