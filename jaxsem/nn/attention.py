"""Multi-head attention over tokens, and the keys and values that a causal stack keeps of the tokens it has seen.

Source: Vaswani et al., Attention Is All You Need (2017), section 3.2.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsem.errors import InputError


class KVCache(NamedTuple):
    """Keys and values of a stack of causal layers: a pytree, made once at its full length and filled from the front.

    All layers lie in one array, written in place where XLA can: a loop over layers or tokens needs no second copy.

    Attributes:
      keys: [layers, b, length, heads, d]; with grouped queries, fewer heads than there are of queries.
      values: As the keys.
      position: int32 (), the slots in use.
      seen: bool [b, length], True where a slot holds a token and no padding.
    """

    keys: jax.Array
    values: jax.Array
    position: jax.Array
    seen: jax.Array

    @classmethod
    def empty(cls, layers: int, batch: int, length: int, heads: int, width: int, dtype: Any = jnp.float32) -> "KVCache":
        """A cache for `length` tokens, without one; `width` is that of a head.

        Raises:
          InputError: A size below 1.
        """
        if min(layers, batch, length, heads, width) < 1:
            raise InputError(f"a cache of {layers}x{batch}x{length}x{heads}x{width} is empty: every size is at least 1")
        # Two arrays, not one twice: whoever donates the cache gives both away.
        keys, values = (jnp.zeros((layers, batch, length, heads, width), dtype) for _ in range(2))
        return cls(keys, values, jnp.zeros((), jnp.int32), jnp.zeros((batch, length), bool))

    @property
    def length(self) -> int:
        """Slots in all."""
        return self.seen.shape[1]

    def admit(self, batch: int, tokens: int, mask: jax.Array | None = None) -> tuple["KVCache", jax.Array, jax.Array]:
        """Takes the next slots for tokens whose keys and values every layer is going to `write`.

        While tracing, the position is not known; if the cache then turns out too short, every place is `length`.

        Args:
          batch: Rows of the tokens.
          tokens: How many, the same in every row.
          mask: bool [b, tokens], False for padding, which no token sees and which takes no place; None for all True.

        Returns:
          The cache with these slots counted; bool [b, 1, tokens, length], the slots that each token sees; and int32
          [b, tokens], each token's place among its row's tokens without padding, counted from 0.

        Raises:
          InputError: Another batch than the cache's, a mask of another shape, or more tokens than there is room for.
        """
        first, rows = self.position, len(self.seen)
        if batch != rows or (mask is not None and mask.shape != (batch, tokens)):
            shown = "no mask" if mask is None else f"a mask of {list(mask.shape)}"
            raise InputError(f"tokens of [{batch}, {tokens}] with {shown} do not fit a cache of {rows} rows")
        known = 0 if isinstance(first, jax.core.Tracer) else int(first)
        if known + tokens > self.length:
            raise InputError(
                f"{tokens} tokens after {known} do not fit a cache of {self.length}: make it longer, or give fewer"
            )
        mask = jnp.ones((batch, tokens), bool) if mask is None else mask
        before = jnp.sum(self.seen, axis=1, keepdims=True, dtype=jnp.int32)
        place = jnp.maximum(before + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        slots = first + jnp.arange(tokens)
        seen = jax.lax.dynamic_update_slice(self.seen, mask, (0, first))
        visible = seen[:, None, None] & (jnp.arange(self.length) <= slots[:, None])
        fits = first + tokens <= self.length
        return self._replace(position=first + tokens, seen=seen), visible, jnp.where(fits, place, self.length)

    def write(self, layer: jax.Array, keys: jax.Array, values: jax.Array) -> tuple["KVCache", jax.Array, jax.Array]:
        """Writes one layer's [b, n, heads, d] into the n slots admitted last.

        Returns:
          The cache, and all keys and values of the layer, [b, length, heads, d], in the type of those given.
        """
        start = (layer, 0, self.position - keys.shape[1], 0, 0)
        arrays, rows = [], []
        for old, new in ((self.keys, keys), (self.values, values)):
            arrays.append(jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), start))
            rows.append(jax.lax.dynamic_index_in_dim(arrays[-1], layer, keepdims=False).astype(new.dtype))
        return self._replace(keys=arrays[0], values=arrays[1]), *rows

    def take(self, rows: jax.Array) -> "KVCache":
        """The cache of the rows [m] of the batch, in that order, perhaps repeated."""
        keys, values = self.keys[:, rows], self.values[:, rows]
        return self._replace(keys=keys, values=values, seen=self.seen[rows])


class MultiHeadAttention(nn.Module):
    """Self-attention with separate projections `query`, `key`, `value` and `out`.

    The softmax is computed in float32 whatever the type of the tokens.

    Attributes:
      heads: Number of heads; divides the width of the tokens.
      causal: Whether a token sees only itself and those before it.
      out_std: Standard deviation of `out` at initialisation; None is 1 / sqrt(width), as for the other three.
      dtype: Of the computation.
      param_dtype: Of the parameters.
      qkv_bias: Whether `query`, `key` and `value` have biases; `out` has one in any case.
    """

    heads: int
    causal: bool = False
    out_std: float | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    qkv_bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        cache: KVCache | None = None,
        layer: jax.Array | int | None = None,
    ) -> Any:
        """Maps tokens to tokens of the same shape.

        Args:
          x: [b, n, width].
          mask: Booleans that broadcast to [b, heads, n, n]; where False, the token of the third axis does not see that of the
            last. With `causal` both must allow it.
          cache: Keys and values of earlier tokens, with slots admitted for these. The mask is then [b, 1, n, length], as
            `KVCache.admit` gives it, and alone decides what is seen.
          layer: Which one of the cache's layers this is.

        Returns:
          [b, n, width]; with a cache, this and the cache with the tokens written into the layer.

        Raises:
          InputError: The heads do not divide the width.
        """
        width = x.shape[-1]
        check_heads(width, self.heads)
        std = width**-0.5
        shape = (*x.shape[:-1], self.heads, width // self.heads)
        query, key, value = (
            self._dense(name, width, std, self.qkv_bias)(x).reshape(shape) for name in ("query", "key", "value")
        )
        if cache is not None:
            cache, key, value = cache.write(layer, key, value)
        causal = self.causal and cache is None
        y = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal)
        y = self._dense("out", width, std if self.out_std is None else self.out_std)(y.reshape(x.shape))
        return y if cache is None else (y, cache)

    def _dense(self, name: str, width: int, std: float, bias: bool = True) -> nn.Dense:
        init = nn.initializers.normal(std)
        return nn.Dense(width, bias, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=init, name=name)


def check_heads(width: int, heads: int) -> None:
    """Refuses a number of heads that does not divide the width.

    Raises:
      InputError: It does not.
    """
    if heads < 1 or width % heads:
        raise InputError(f"a width of {width} cannot be split into {heads} attention heads: choose a divisor of it")
