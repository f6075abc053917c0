"""Llama's and Mistral's checkpoints in transformers' layout, in both directions.

    model.layers.0.self_attn.q_proj.weight      LlamaForCausalLM, MistralForCausalLM, and the published files
    layers.0.self_attn.q_proj.weight            LlamaModel, MistralModel

A larger model names them with a prefix of its own: see `llama_table`. Kernels are (out, in). The files are mapped, not read, and
each layer is converted by itself, so that the host holds the parameters in the type asked for and little else: with
`weights="int8"`, a byte for each.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsem.backbones.llama import CONFIGS, Llama, LlamaConfig, param_shapes
from jaxsem.errors import InputError, WeightsError
from jaxsem.nn.llama_block import RopeScaling
from jaxsem.nn.quantised import channel_scales, quantise
from jaxsem.weights.convert import LINEAR, Entry, Ignored, Table, convert, invert, strip_prefixes
from jaxsem.weights.huggingface import choose_config, open_state

_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_KERNELS = {
    "self_attn.q_proj": "attention/query",
    "self_attn.k_proj": "attention/key",
    "self_attn.v_proj": "attention/value",
    "self_attn.o_proj": "attention/out",
    "mlp.gate_proj": "mlp/gate",
    "mlp.up_proj": "mlp/up",
    "mlp.down_proj": "mlp/down",
}


def load_llama(
    source: str | os.PathLike | Mapping[str, Any],
    config: LlamaConfig | str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    weights: str = "float",
) -> tuple[Llama, dict[str, Any]]:
    """Loads Llama or Mistral, or a model of their sizes such as Vicuna.

    Args:
      source: A folder or Hugging Face id ("lmsys/vicuna-7b-v1.5"), a file of weights, or a state dict.
      config: Sizes, or the name of a published model (`jaxsem.backbones.llama.CONFIGS`); None reads the folder's config.json.
      dtype: Of the computation.
      param_dtype: Of the parameters that are floats; bfloat16 halves the memory of a frozen model.
      weights: "float", or "int8" to quantise the kernels of the layers while they are read.

    Returns:
      The Flax module and its parameters, nested NumPy arrays.

    Raises:
      InputError: Nothing is there, no config can be told, or there are no such weights.
      WeightsError: The files are damaged or do not fit, and lists every key that does not; or a config says the output layer is
        the token embedding, and the checkpoint holds another.
    """
    config = choose_config(source, config, "Llama", CONFIGS, parse_config)
    module = Llama(config, dtype, param_dtype, weights=weights)
    shapes = param_shapes(module)
    state, name = open_state(source)
    state = strip_prefixes(state, ("module.", "model."))
    check_tied(state, config, name)
    if weights == "int8":
        state = split_kernels(state, name)
    return module, convert(llama_table(config, weights), state, shapes, name)


def to_transformers(params: Mapping[str, Any], config: LlamaConfig) -> dict[str, np.ndarray]:
    """Writes parameters as a state dict that transformers' LlamaForCausalLM and MistralForCausalLM load.

    Args:
      params: Parameters of `Llama` with float weights, as arrays.
      config: Their config.

    Returns:
      Arrays by key; with a tied output layer, the token embedding is there twice, as one array.

    Raises:
      WeightsError: Parameters that no key can hold.
    """
    state = invert(llama_table(config, prefix="model."), params)
    return {**state, _HEAD: state[f"model.{_EMBEDDING}"]} if config.tied else state


# -- configs ----------------------------------------------------------------------------------------------------------

# transformers' defaults where a file does not say, as far as the two kinds differ.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 11008, "num_key_value_heads": None, "max_position_embeddings": 2048},
    "mistral": {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072},
}
# What changes the result, and the only value of it that is known; also transformers' default.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}


def parse_config(fields: Mapping[str, Any], name: str = "the config") -> LlamaConfig:
    """The sizes in a `config.json` of transformers, or in the `text_config` of one; absent fields have its defaults.

    Args:
      fields: Of a Llama or Mistral model; `model_type` says which.
      name: What errors call it.

    Raises:
      WeightsError: It is no such config, asks for what this model does not do, or holds values that none can have.
    """
    try:
        return _parse(fields)
    except InputError as error:
        raise WeightsError(f"{name}: {error}") from error


def _parse(fields: Mapping[str, Any]) -> LlamaConfig:
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise InputError(f"the config is one of {kind!r}, not of 'llama' or 'mistral'")
    for key, only in _FIXED.items():
        if fields.get(key, only) != only:
            raise InputError(f"it has {key}={fields[key]!r:.200}, and only {only!r} is known")
    defaults = _DEFAULTS[kind]
    width, heads = _count(fields, "hidden_size", 4096), _count(fields, "num_attention_heads", 32)
    head_width = _count(fields, "head_dim", None, optional=True)
    kv_heads = _count(fields, "num_key_value_heads", defaults["num_key_value_heads"], optional=True)
    context = _count(fields, "max_position_embeddings", defaults["max_position_embeddings"], most=1 << 24)
    base, scaling = _rope(fields, context)
    return LlamaConfig(
        width=width,
        layers=_count(fields, "num_hidden_layers", 32, most=1000),
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        hidden=_count(fields, "intermediate_size", defaults["intermediate_size"]),
        vocabulary=_count(fields, "vocab_size", 32000),
        context=context,
        head_width=None if head_width is not None and head_width * heads == width else head_width,
        rope_base=base,
        rope_scaling=scaling,
        window=_count(fields, "sliding_window", 4096, optional=True, most=1 << 24) if kind == "mistral" else None,
        epsilon=fields.get("rms_norm_eps", 1e-6),
        tied=fields.get("tie_word_embeddings", False),
    )


def _count(
    fields: Mapping[str, Any], key: str, default: int | None, optional: bool = False, most: int = 1 << 20
) -> Any:
    value = fields.get(key, default)
    if value is None and optional:
        return None
    if type(value) is not int or not 1 <= value <= most:
        raise InputError(f"it has {key}={value!r}; a number from 1 to {most} is wanted")
    return value


def _rope(fields: Mapping[str, Any], context: int) -> tuple[float, RopeScaling | None]:
    """The base and the scaling of positions: since transformers 5 both in `rope_parameters`, before in two fields."""
    section = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(section, Mapping) or any(isinstance(value, Mapping) for value in section.values()):
        raise InputError(f"its positions are {section!r:.200}, and only one plain object of settings is known")
    part = section.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1))
    if part != 1:
        raise InputError(f"it has partial_rotary_factor={part!r}, and only 1 is known")
    base = section.get("rope_theta", fields.get("rope_theta", 10000.0))
    if type(base) not in (int, float) or not 1 < base < 1e12:
        raise InputError(f"it has rope_theta={base!r}; a number above 1 is wanted")
    kind, scaling = section.get("rope_type", section.get("type", "default")), None
    if kind == "linear":
        scaling = RopeScaling("linear", section.get("factor"))
    elif kind == "llama3":
        numbers = (section.get(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        old = fields.get("original_max_position_embeddings", section.get("original_max_position_embeddings", context))
        scaling = RopeScaling("llama3", *numbers, old)
    elif kind != "default":
        raise InputError(f"its positions are scaled by {kind!r}, and only 'default', 'linear' and 'llama3' are known")
    return float(base), scaling


# -- tables -----------------------------------------------------------------------------------------------------------


def llama_table(
    config: LlamaConfig, weights: str = "float", prefix: str = "", head: str = _HEAD, target: str = ""
) -> Table:
    """The table of transformers' layout, perhaps as a part of a larger model.

    Args:
      config: Tells whether there is an output layer of its own.
      weights: "float", or "int8" for a state dict that `split_kernels` took apart.
      prefix: What the keys begin with: "model." alone, in LLaVA "model.language_model." or, before transformers 5,
        "language_model.model.".
      head: The key of the output layer, which has other prefixes: "language_model.lm_head.weight" in older LLaVA.
      target: Path in front of the parameters in a larger tree, such as "language/".
    """
    return tuple(_rules(config, weights, prefix, head, target))


def _rules(config: LlamaConfig, weights: str, prefix: str, head: str, target: str) -> Iterator[Entry | Ignored]:
    layer, block = f"{prefix}layers.{{i}}", f"{target}blocks[{{i}}]"
    yield Entry(f"{prefix}{_EMBEDDING}", f"{target}token_embedding")
    yield Entry(f"{prefix}norm.weight", f"{target}final_norm/scale")
    yield Entry(f"{layer}.input_layernorm.weight", f"{block}/norm1/scale")
    yield Entry(f"{layer}.post_attention_layernorm.weight", f"{block}/norm2/scale")
    for theirs, ours in _KERNELS.items():
        if weights == "int8":
            for part in ("kernel", "scale"):
                yield Entry(f"{layer}.{theirs}.weight[{part}]", f"{block}/{ours}/{part}")
        else:
            yield Entry(f"{layer}.{theirs}.weight", f"{block}/{ours}/kernel", LINEAR)
    yield Ignored(f"{layer}.self_attn.rotary_emb.inv_freq", "the frequencies of positions, which the config gives")
    yield Ignored(head, "the token embedding again") if config.tied else Entry(head, f"{target}head")


def check_tied(
    state: Mapping[str, np.ndarray], config: LlamaConfig, name: str, prefix: str = "", head: str = _HEAD
) -> None:
    """Refuses an output layer of its own where the config says that it is the token embedding.

    Raises:
      WeightsError: It is there.
    """
    embedding = f"{prefix}{_EMBEDDING}"
    if config.tied and head in state and embedding in state and not np.array_equal(state[head], state[embedding]):
        raise WeightsError(f"{name}: {head} is not {embedding} again, though the config says so (tie_word_embeddings)")


# -- int8 -------------------------------------------------------------------------------------------------------------


def split_kernels(state: Mapping[str, Any], name: str, prefix: str = "") -> dict[str, Any]:
    """Replaces every kernel of the layers by its int8 values and its scales, computed when they are read.

    Args:
      state: Arrays by key.
      name: What errors call it.
      prefix: As for `llama_table`.

    Returns:
      The same with `KEY[kernel]` and `KEY[scale]` in the place of each; both only for `convert`.
    """
    kernels = re.compile(rf"{re.escape(prefix)}layers\.\d+\.(?:{'|'.join(map(re.escape, _KERNELS))})\.weight")
    parts: dict[str, Any] = {}
    for key, value in state.items():
        if kernels.fullmatch(key) and value.ndim == 2 and jnp.issubdtype(value.dtype, jnp.floating):
            parts |= {f"{key}[{part}]": _Part(value, part, f"{name}: {key}") for part in ("kernel", "scale")}
        else:
            parts[key] = value
    return parts


@dataclass(frozen=True)
class _Part:
    """One half of a quantised (out, in) kernel, an array only while somebody reads it."""

    weight: np.ndarray
    part: str
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape[::-1] if self.part == "kernel" else self.weight.shape[:1]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.int8 if self.part == "kernel" else np.float32)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        kernel = self.weight.T
        try:
            array = quantise(kernel)[0] if self.part == "kernel" else channel_scales(kernel)
        except InputError as error:
            raise WeightsError(f"{self.name}: {error}") from error
        return np.asarray(array, dtype)
