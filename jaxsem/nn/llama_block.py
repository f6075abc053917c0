"""The transformer block of Llama: RMS normalisation, rotary positions, grouped queries, and a gated MLP, without biases.

A block knows nothing of positions or of what is seen: both are computed once for all layers, as the rotation of its queries
and keys, and as its mask.

Source: Touvron et al., LLaMA (2023), section 2.2; Su et al., RoFormer (2021), for the positions, with channel i paired with
i + d/2 as in transformers; Ainslie et al., GQA (2023); Shazeer, GLU Variants Improve Transformer (2020).
"""

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsem.errors import InputError
from jaxsem.nn.attention import KVCache
from jaxsem.nn.quantised import Dense

# -- positions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RopeScaling:
    """How positions are stretched to a longer context than the one that a model was first trained with.

    Attributes:
      kind: "linear" stretches all of them; "llama3" only the slow rotations, those of wavelengths beyond the old context.
      factor: By how much.
      low: llama3: wavelengths above context / low are stretched in full.
      high: llama3: wavelengths below context / high stay; between the two, it goes over smoothly.
      context: llama3: tokens of the old context.

    Raises:
      InputError: Another kind, or numbers that cannot be.
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    context: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise InputError(f"positions are scaled by kind={self.kind!r}; there are linear and llama3")
        factor, low, high = (_number(name, getattr(self, name)) for name in ("factor", "low", "high"))
        if factor < 1 or not low < high or type(self.context) is not int or self.context < 1:
            raise InputError(
                f"positions are scaled with factor={factor}, low={low}, high={high} and context={self.context!r}; they take a "
                f"factor of at least 1, low below high, and a context of at least 1 token"
            )


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e9:
        raise InputError(f"positions are scaled with {name}={value!r}; it takes a number above 0")
    return value


def rope_frequencies(width: int, base: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Gives the radians by which each pair of a head's channels turns from one token to the next, float32 [width / 2].

    Args:
      width: Channels of a head, an even number.
      base: Of the wavelengths: 2 pi for the first pair, almost 2 pi base for the last.
      scaling: For longer contexts.
    """
    turns = base ** (-np.arange(0, width, 2) / width)
    if scaling is not None and scaling.kind == "linear":
        turns = turns / scaling.factor
    elif scaling is not None:
        waves = scaling.context * turns / (2 * math.pi)  # in the old context
        kept = np.clip((waves - scaling.low) / (scaling.high - scaling.low), 0, 1)
        turns = turns * (kept + (1 - kept) / scaling.factor)
    return turns.astype(np.float32)


def rope_rotation(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Gives the cosines and sines, float32 [b, n, width / 2], of positions [b, n]."""
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the heads [b, n, heads, width] of tokens, channel i with i + width / 2; computed in float32."""
    cosine, sine = (part[:, :, None] for part in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)


# -- layers -----------------------------------------------------------------------------------------------------------


class GroupedQueryAttention(nn.Module):
    """Self-attention in which `heads / kv_heads` heads of queries share one of keys and values.

    The softmax is computed in float32 whatever the type of the tokens. There are no biases.

    Attributes:
      heads: Heads of queries.
      kv_heads: Heads of keys and values; divides `heads`.
      head_width: Channels of a head.
      dtype: Of the computation.
      param_dtype: Of the parameters.
      weights: "float" or "int8" (`jaxsem.nn.quantised`).
    """

    heads: int
    kv_heads: int
    head_width: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    weights: str = "float"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        cache: KVCache | None = None,
        layer: jax.Array | int | None = None,
    ) -> Any:
        """Maps tokens to tokens of the same shape.

        Args:
          x: [b, n, width].
          mask: Booleans that broadcast to [b, heads, n, n], with a cache [b, heads, n, length]; where False, the token of the third
            axis does not see that of the last. It alone decides: nothing here is causal.
          rotation: Of the tokens' positions (`rope_rotation`).
          cache: Keys and values of earlier tokens, with slots admitted for these.
          layer: Which one of the cache's layers this is.

        Returns:
          [b, n, width]; with a cache, this and the cache with the tokens written into the layer.
        """
        query, key, value = (
            self._dense(name, heads * self.head_width)(x).reshape(*x.shape[:-1], heads, self.head_width)
            for name, heads in (("query", self.heads), ("key", self.kv_heads), ("value", self.kv_heads))
        )
        query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            cache, key, value = cache.write(layer, key, value)
        y = jax.nn.dot_product_attention(query, key, value, mask=mask)
        y = self._dense("out", x.shape[-1])(y.reshape(*x.shape[:-1], -1))
        return y if cache is None else (y, cache)

    def _dense(self, name: str, features: int) -> Dense:
        return _dense(name, features, self.dtype, self.param_dtype, self.weights)


class SwiGlu(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases.

    Attributes:
      hidden: Width between the layers.
      dtype: Of the computation.
      param_dtype: Of the parameters.
      weights: "float" or "int8" (`jaxsem.nn.quantised`).
    """

    hidden: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    weights: str = "float"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., width] to the same shape."""
        options = self.dtype, self.param_dtype, self.weights
        gate, up = (_dense(name, self.hidden, *options)(x) for name in ("gate", "up"))
        return _dense("down", x.shape[-1], *options)(nn.silu(gate) * up)


class LlamaBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)).

    Attributes:
      heads: Heads of queries.
      kv_heads: Heads of keys and values.
      head_width: Channels of a head.
      hidden: Width inside the MLP.
      epsilon: Of the two normalisations.
      dtype: Of the computation.
      param_dtype: Of the parameters.
      weights: "float" or "int8" (`jaxsem.nn.quantised`); the scales of the normalisations are floats in any case.
    """

    heads: int
    kv_heads: int
    head_width: int
    hidden: int
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    weights: str = "float"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        cache: KVCache | None = None,
        layer: jax.Array | int | None = None,
    ) -> Any:
        """Maps [b, n, width] to the same shape; for the other arguments and what a cache adds see `GroupedQueryAttention`."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        options = {**types, "weights": self.weights}
        x = x.astype(self.dtype)
        y = nn.RMSNorm(self.epsilon, name="norm1", **types)(x)
        attention = GroupedQueryAttention(self.heads, self.kv_heads, self.head_width, name="attention", **options)
        y = attention(y, mask, rotation, cache, layer)
        if cache is not None:
            y, cache = y
        x = x + y
        y = nn.RMSNorm(self.epsilon, name="norm2", **types)(x)
        x = x + SwiGlu(self.hidden, name="mlp", **options)(y)
        return x if cache is None else (x, cache)


def _dense(name: str, features: int, dtype: Any, param_dtype: Any, weights: str) -> Dense:
    return Dense(features, False, dtype, param_dtype, nn.initializers.normal(0.02), weights, name=name)
