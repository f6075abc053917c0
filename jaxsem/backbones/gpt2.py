"""GPT-2: a causal transformer over tokens, whole or token by token with a cache of keys and values.

```
ids [b, n] ── embed_tokens ─▶ embeddings [b, n, width] ─┬─ __call__ ───────▶ logits [b, n, vocabulary]
prefix from elsewhere ──────▶ embeddings [b, m, width] ─┴─ extend + cache ─▶ logits, cache
```

It takes embeddings, not ids, so that what comes from an image can stand before the words (ClipCap). Positions are added
here. The output layer is the token embedding again.

Everything is pure: `Gpt2(config).apply({"params": params}, embeddings)`; for texts see `jaxsem.generation`.

Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019), and transformers' GPT2LMHeadModel, with
whose weights this one agrees. Fresh parameters are drawn as for CLIP's text tower, and there is no dropout.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsem.errors import InputError
from jaxsem.nn.attention import KVCache, check_heads
from jaxsem.nn.tokens import check_embeddings, last_tokens, look_up
from jaxsem.nn.transformer import Block, LayerNorm, extend_layers, scan_layers

# -- sizes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpt2Config:
    """Sizes; the defaults are those of the small one.

    Attributes:
      width: Channels of a token.
      layers: Transformer layers.
      heads: Attention heads.
      hidden: Width inside the MLPs.
      vocabulary: Number of token ids.
      context: Most tokens of a text, prefix included.
      epsilon: Of the layer normalisations.

    Raises:
      InputError: A size below 1, heads that do not divide the width, or an epsilon that is not a small positive number.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    vocabulary: int = 50257
    context: int = 1024
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "hidden", "vocabulary", "context"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"GPT-2 has {name}={value!r}; it takes an integer of at least 1")
        if not (isinstance(self.epsilon, float) and 0 < self.epsilon < 1):
            raise InputError(f"GPT-2 has epsilon={self.epsilon!r}; it takes a number between 0 and 1, such as 1e-5")
        check_heads(self.width, self.heads)


GPT2 = Gpt2Config()
GPT2_MEDIUM = Gpt2Config(width=1024, layers=24, heads=16, hidden=4096)
GPT2_LARGE = Gpt2Config(width=1280, layers=36, heads=20, hidden=5120)
GPT2_XL = Gpt2Config(width=1600, layers=48, heads=25, hidden=6400)

# By the names of the published models.
CONFIGS = {"gpt2": GPT2, "gpt2-medium": GPT2_MEDIUM, "gpt2-large": GPT2_LARGE, "gpt2-xl": GPT2_XL}

# -- the model --------------------------------------------------------------------------------------------------------


class Gpt2(nn.Module):
    """The language model.

    Attributes:
      config: Sizes.
      dtype: Of the computation; logits are float32 all the same.
      param_dtype: Of the parameters.
      remat: Whether to recompute each layer in the backward pass: less memory, more time.
    """

    config: Gpt2Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Declares the parameters."""
        c, types = self.config, (self.dtype, self.param_dtype)
        self.token_embedding = self._param("token_embedding", 0.02, c.vocabulary, c.width)
        self.positions = self._param("positions", 0.01, c.context, c.width)
        self.blocks = Block(c.heads, c.hidden, "gelu_new", True, c.epsilon, c.layers, *types)
        self.final_norm = LayerNorm(c.epsilon, dtype=self.dtype, param_dtype=self.param_dtype)

    def _param(self, name: str, std: float, *shape: int) -> jax.Array:
        # Loaded parameters are NumPy arrays, which would compute on the host outside of `jax.jit`.
        return jnp.asarray(self.param(name, nn.initializers.normal(std), shape, self.param_dtype))

    def embed_tokens(self, ids: Int[Array, "b n"]) -> Float[Array, "b n width"]:
        """The embeddings of token ids, without positions; ids outside the vocabulary give NaN.

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
        check_embeddings("GPT-2", embeddings, self.config.width, self.config.context)
        if mask is not None and mask.shape != embeddings.shape[:2]:
            raise InputError(f"a mask of {list(mask.shape)} does not fit embeddings of {list(embeddings.shape)}")
        x = embeddings.astype(self.dtype) + self.positions[: embeddings.shape[1]].astype(self.dtype)
        keys = None if mask is None else mask[:, None, None, :]
        x, _ = scan_layers(self.blocks, x, keys, layers=self.config.layers, remat=self.remat)
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
        check_embeddings("GPT-2", embeddings, self.config.width, self.config.context)
        batch, n = embeddings.shape[:2]
        cache, visible, places = cache.admit(batch, n, mask)
        # Where a traced position ran out of the cache, the place is its length, which may lie in the context.
        places = jnp.where(places < cache.length, places, self.config.context)
        positions = jnp.take(self.positions, places, axis=0, mode="fill", fill_value=jnp.nan)
        x = embeddings.astype(self.dtype) + positions.astype(self.dtype)
        x, cache = extend_layers(self.blocks, x, cache, visible, layers=self.config.layers)
        if last_only:
            x = last_tokens(x, mask)
        return self._logits(x), cache

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> KVCache:
        """`init_cache` in the module's own type."""
        return init_cache(self.config, batch, length, self.dtype)

    def _logits(self, x: jax.Array) -> jax.Array:
        table = self.token_embedding.astype(self.dtype)
        return jnp.einsum("bnw,vw->bnv", self.final_norm(x), table, preferred_element_type=jnp.float32)


def init_cache(config: Gpt2Config, batch: int, length: int, dtype: Any = jnp.float32) -> KVCache:
    """An empty cache for `length` tokens.

    Raises:
      InputError: A size below 1, or more tokens than the context.
    """
    if length > config.context:
        raise InputError(f"a cache of {length} tokens is longer than the context of {config.context}: make it shorter")
    return KVCache.empty(config.layers, batch, length, config.heads, config.width // config.heads, dtype)


def param_shapes(module: Gpt2) -> dict[str, Any]:
    """Shapes and types of the parameters, without memory or arithmetic."""
    embeddings = jax.ShapeDtypeStruct((1, 1, module.config.width), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), embeddings)["params"]
