"""Llama and Mistral: causal transformers over tokens, whole or token by token with a cache of keys and values.

```
ids [b, n] ── embed_tokens ─▶ embeddings [b, n, width] ─┬─ __call__ ───────▶ logits [b, n, vocabulary]
prefix from elsewhere ──────▶ embeddings [b, m, width] ─┴─ extend + cache ─▶ logits, cache
```

It takes embeddings, not ids, so that what comes from an image can stand among the words (LLaVA). Positions turn the queries
and keys of every layer. The two models are one network: Mistral's heads of keys and values are fewer, and in its first
version a token sees a window of those before it.

Everything is pure: `Llama(config).apply({"params": params}, embeddings)`; for texts see `jaxsem.generation`. Models of these
sizes come in bfloat16 (`param_dtype`), in int8 (`weights="int8"`), or split over devices:

    params = place(params, make_mesh(model=8), partition_rules(module))        # of jaxsem.training

Source: Touvron et al., LLaMA and Llama 2 (2023), Jiang et al., Mistral 7B (2023), and transformers' LlamaForCausalLM and
MistralForCausalLM, with whose weights this one agrees. Fresh parameters are drawn as there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxsem.errors import InputError
from jaxsem.nn.attention import KVCache, check_heads
from jaxsem.nn.llama_block import LlamaBlock, RopeScaling, rope_frequencies, rope_rotation
from jaxsem.nn.quantised import check_weights, quantise_kernels
from jaxsem.nn.tokens import check_embeddings, last_tokens, look_up
from jaxsem.nn.transformer import extend_layers, scan_layers

# -- sizes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes; the defaults are those of Llama 2 7B, which Vicuna 1.5 and LLaVA 1.5 share but for the vocabulary.

    Attributes:
      width: Channels of a token.
      layers: Transformer layers.
      heads: Heads of queries.
      kv_heads: Heads of keys and values; divides `heads`.
      hidden: Width inside the MLPs.
      vocabulary: Number of token ids.
      context: Most tokens of a text, prefix included.
      head_width: Channels of a head, an even number; None divides the width among the heads.
      rope_base: Base of the wavelengths of positions, theta in other places.
      rope_scaling: Stretches positions for longer contexts.
      window: A token sees itself and the window - 1 tokens before it; None is all of them.
      epsilon: Of the RMS normalisations.
      tied: Whether the output layer is the token embedding again.

    Raises:
      InputError: A size below 1, heads that do not divide, an odd head, or another number out of its range.
    """

    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    hidden: int = 11008
    vocabulary: int = 32000
    context: int = 4096
    head_width: int | None = None
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    window: int | None = None
    epsilon: float = 1e-5
    tied: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "kv_heads", "hidden", "vocabulary", "context", "head_width", "window"):
            value = getattr(self, name)
            optional = name in ("head_width", "window") and value is None
            if not optional and (type(value) is not int or value < 1):
                raise InputError(f"Llama has {name}={value!r}; it takes an integer of at least 1")
        if not (isinstance(self.epsilon, float) and 0 < self.epsilon < 1):
            raise InputError(f"Llama has epsilon={self.epsilon!r}; it takes a number between 0 and 1, such as 1e-5")
        if not (isinstance(self.rope_base, float) and 1 < self.rope_base < 1e12):
            raise InputError(f"Llama has rope_base={self.rope_base!r}; it takes a number above 1, such as 10000.0")
        if type(self.tied) is not bool or not isinstance(self.rope_scaling, RopeScaling | None):
            raise InputError(
                f"Llama has tied={self.tied!r} and rope_scaling={self.rope_scaling!r}; they take a bool and a RopeScaling or None"
            )
        if self.head_width is None:
            check_heads(self.width, self.heads)
        if self.channels % 2:
            raise InputError(f"heads of {self.channels} channels cannot turn, which takes pairs: choose an even number")
        if self.heads % self.kv_heads:
            raise InputError(
                f"{self.heads} heads of queries cannot share {self.kv_heads} of keys and values: choose a divisor"
            )

    @property
    def channels(self) -> int:
        """Channels of a head."""
        return self.width // self.heads if self.head_width is None else self.head_width


LLAMA_7B = LlamaConfig()
LLAMA_13B = LlamaConfig(width=5120, layers=40, heads=40, kv_heads=40, hidden=13824)
MISTRAL_7B = LlamaConfig(kv_heads=8, hidden=14336, context=32768, window=4096)
MISTRAL_7B_V02 = LlamaConfig(kv_heads=8, hidden=14336, context=32768, rope_base=1e6)

# By the names of the published models; each is the size of many others.
CONFIGS = {
    "llama-2-7b": LLAMA_7B,
    "llama-2-13b": LLAMA_13B,
    "mistral-7b-v0.1": MISTRAL_7B,
    "mistral-7b-v0.2": MISTRAL_7B_V02,
}

# -- the model --------------------------------------------------------------------------------------------------------


class Llama(nn.Module):
    """The language model.

    Attributes:
      config: Sizes.
      dtype: Of the computation; logits are float32 all the same.
      param_dtype: Of the parameters.
      remat: Whether to recompute each layer in the backward pass: less memory, more time.
      weights: "float", or "int8" for the kernels of the layers (`quantise_weights`); embeddings and output layer stay floats.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False
    weights: str = "float"

    def setup(self) -> None:
        """Declares the parameters."""
        c, types = self.config, (self.dtype, self.param_dtype)
        check_weights(self.weights)
        self.token_embedding = self._table("token_embedding")
        if not c.tied:
            self.head = self._table("head")
        self.blocks = LlamaBlock(c.heads, c.kv_heads, c.channels, c.hidden, c.epsilon, *types, self.weights)
        self.final_norm = nn.RMSNorm(c.epsilon, dtype=self.dtype, param_dtype=self.param_dtype)

    def _table(self, name: str) -> jax.Array:
        shape = self.config.vocabulary, self.config.width
        # Loaded parameters are NumPy arrays, which would compute on the host outside of `jax.jit`.
        return jnp.asarray(self.param(name, nn.initializers.normal(0.02), shape, self.param_dtype))

    def embed_tokens(self, ids: Int[Array, "b n"]) -> Float[Array, "b n width"]:
        """The embeddings of token ids; ids outside the vocabulary give NaN.

        Raises:
          InputError: Other than [batch, n] integers.
        """
        return look_up(self.token_embedding, ids, self.dtype)

    def __call__(
        self, embeddings: Float[Array, "b n width"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b n vocabulary"]:
        """The logits of the token that follows each one, float32.

        Args:
          embeddings: Of tokens, or of anything else in their place; those of a row have the positions from 0 on, padding
            included.
          mask: False for padding, which no token sees; what comes out at padding means nothing.

        Raises:
          InputError: Embeddings or a mask of another shape, or more tokens than the context.
        """
        check_embeddings("Llama", embeddings, self.config.width, self.config.context)
        if mask is not None and mask.shape != embeddings.shape[:2]:
            raise InputError(f"a mask of {list(mask.shape)} does not fit embeddings of {list(embeddings.shape)}")
        places = jnp.arange(embeddings.shape[1])[None]
        visible = (places[:, None, None] <= places[:, None, :, None]) & self._near(places, places)
        if mask is not None:
            visible &= mask[:, None, None]
        inputs = embeddings.astype(self.dtype), visible, self._rotation(places)
        x, _ = scan_layers(self.blocks, *inputs, layers=self.config.layers, remat=self.remat)
        return self._logits(x)

    def extend(
        self,
        embeddings: Float[Array, "b n width"],
        cache: KVCache,
        mask: Bool[Array, "b n"] | None = None,
        last_only: bool = False,
    ) -> tuple[Float[Array, "b n vocabulary"], KVCache]:
        """Appends tokens to those of a cache.

        While tracing, the room that is left is not known: where it is too little, the logits are NaN.

        Args:
          embeddings: Of the new tokens.
          cache: From `init_cache`, or as the last call gave it.
          mask: False for padding, on whichever side: no token sees it, and it takes no position, unlike in `__call__`. So rows
            of unequal length get what each of them gets alone.
          last_only: Whether to give only the logits of each row's last token that is no padding, [b, 1, vocabulary].

        Returns:
          The logits of the token that follows each new one, float32, and the cache with all of them.

        Raises:
          InputError: Embeddings or a mask that do not fit, or more tokens than the cache or the context has room for.
        """
        check_embeddings("Llama", embeddings, self.config.width, self.config.context)
        batch, n = embeddings.shape[:2]
        cache, visible, places = cache.admit(batch, n, mask)
        visible &= self._near(places, jnp.cumsum(cache.seen, axis=1, dtype=jnp.int32) - 1)
        # Where a traced position ran out of the cache, the place is its length.
        room = min(cache.length, self.config.context)
        rotation = self._rotation(jnp.where(places < room, places.astype(jnp.float32), jnp.nan))
        inputs = embeddings.astype(self.dtype), cache, visible, rotation
        x, cache = extend_layers(self.blocks, *inputs, layers=self.config.layers)
        if last_only:
            x = last_tokens(x, mask)
        return self._logits(x), cache

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> KVCache:
        """`init_cache` in the module's own type."""
        return init_cache(self.config, batch, length, self.dtype)

    def _near(self, places: jax.Array, others: jax.Array) -> jax.Array | bool:
        """Whether others [b, m] lie in the window of tokens [b, n], bool [b, 1, n, m]; padding takes no place in it."""
        if self.config.window is None:
            return True
        return places[:, None, :, None] - others[:, None, None] < self.config.window

    def _rotation(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = self.config
        return rope_rotation(positions, rope_frequencies(c.channels, c.rope_base, c.rope_scaling))

    def _logits(self, x: jax.Array) -> jax.Array:
        table = (self.token_embedding if self.config.tied else self.head).astype(self.dtype)
        return jnp.einsum("bnw,vw->bnv", self.final_norm(x), table, preferred_element_type=jnp.float32)


def init_cache(config: LlamaConfig, batch: int, length: int, dtype: Any = jnp.float32) -> KVCache:
    """An empty cache for `length` tokens, whatever the window.

    Raises:
      InputError: A size below 1, or more tokens than the context.
    """
    if length > config.context:
        raise InputError(f"a cache of {length} tokens is longer than the context of {config.context}: make it shorter")
    return KVCache.empty(config.layers, batch, length, config.kv_heads, config.channels, dtype)


# -- parameters -------------------------------------------------------------------------------------------------------


def param_shapes(module: Llama) -> dict[str, Any]:
    """Shapes and types of the parameters, without memory or arithmetic."""
    embeddings = jax.ShapeDtypeStruct((1, 1, module.config.width), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), embeddings)["params"]


def quantise_weights(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters for `weights="int8"` of those for "float"; what is quantised, and how, says `jaxsem.nn.quantised`.

    Raises:
      InputError: They are int8 already, or (on the host) hold inf or NaN.
    """
    return {**params, "blocks": quantise_kernels(params["blocks"])}


def partition_rules(module: Llama, prefix: str = "") -> tuple[tuple[str, PartitionSpec], ...]:
    """Rules for `jaxsem.training.tree_shardings` that split the model over the mesh axis `model`.

    What opens a layer (queries, keys, values, gate, up) is split along its outputs, what closes it (out, down) along its
    inputs, so that a layer communicates twice; embeddings and output layer along the vocabulary.

    Args:
      module: Says which parameters there are.
      prefix: Path in front of the parameters in a larger tree, such as "language/".
    """
    layer = rf"(^|/){prefix}blocks/(attention|mlp)"
    opening, closing = rf"{layer}/(query|key|value|gate|up)", rf"{layer}/(out|down)"
    rules = [
        (rf"{opening}/kernel$", PartitionSpec(None, None, "model")),
        (rf"{closing}/kernel$", PartitionSpec(None, "model", None)),
        (rf"(^|/){prefix}token_embedding$", PartitionSpec("model")),
    ]
    if module.weights == "int8":
        rules.append((rf"{opening}/scale$", PartitionSpec(None, "model")))
    if not module.config.tied:
        rules.append((rf"(^|/){prefix}head$", PartitionSpec("model")))
    return tuple(rules)
