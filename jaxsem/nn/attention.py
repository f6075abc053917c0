"""Multi-head attention over tokens.

Source: Vaswani et al., Attention Is All You Need (2017), section 3.2.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsem.errors import InputError


class MultiHeadAttention(nn.Module):
    """Self-attention with separate projections `query`, `key`, `value` and `out`, all with biases.

    The softmax is computed in float32 whatever the type of the tokens.

    Attributes:
      heads: Number of heads; divides the width of the tokens.
      causal: Whether a token sees only itself and those before it.
      out_std: Standard deviation of `out` at initialisation; None is 1 / sqrt(width), as for the other three.
      dtype: Of the computation.
      param_dtype: Of the parameters.
    """

    heads: int
    causal: bool = False
    out_std: float | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Maps tokens to tokens of the same shape.

        Args:
          x: [b, n, width].
          mask: Booleans that broadcast to [b, heads, n, n]; where False, the token of the third axis does not see that of the
            last. With `causal` both must allow it.

        Returns:
          [b, n, width].

        Raises:
          InputError: The heads do not divide the width.
        """
        width = x.shape[-1]
        check_heads(width, self.heads)
        std = width**-0.5
        shape = (*x.shape[:-1], self.heads, width // self.heads)
        query, key, value = (self._dense(name, width, std)(x).reshape(shape) for name in ("query", "key", "value"))
        y = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=self.causal)
        return self._dense("out", width, std if self.out_std is None else self.out_std)(y.reshape(x.shape))

    def _dense(self, name: str, width: int, std: float) -> nn.Dense:
        init = nn.initializers.normal(std)
        return nn.Dense(width, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=init, name=name)


def check_heads(width: int, heads: int) -> None:
    """Refuses a number of heads that does not divide the width.

    Raises:
      InputError: It does not.
    """
    if heads < 1 or width % heads:
        raise InputError(f"a width of {width} cannot be split into {heads} attention heads: choose a divisor of it")
