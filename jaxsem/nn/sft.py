"""Spatial feature transforms: features scaled and shifted, position by position, by what a condition says.

Source: Song, Choi and Han, Variable-rate deep image compression through spatially-adaptive feature transform (ICCV 2021).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsem.nn.conv import Conv

_SLOPE = 0.2


class Sft(nn.Module):
    """x (1 + gamma(c)) + beta(c), both of one hidden layer of 3x3 convolutions.

    Attributes:
      hidden: Channels of the hidden layer.
      dtype: Of the computation.
    """

    hidden: int = 128
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w n"], condition: Float[Array, "b h w c"]) -> Float[Array, "b h w n"]:
        """Maps features to the same shape; the condition is on their grid."""
        y = nn.relu(Conv(self.hidden, 3, dtype=self.dtype, name="hidden")(condition))
        gamma = Conv(x.shape[-1], 3, dtype=self.dtype, name="gamma")(y)
        beta = Conv(x.shape[-1], 3, dtype=self.dtype, name="beta")(y)
        return x * (1.0 + gamma) + beta


class SftResidual(nn.Module):
    """x + conv(act(sft(conv(act(sft(x)))))): the residual block of that paper.

    Attributes:
      hidden: Of the transforms.
      dtype: Of the computation.
    """

    hidden: int = 128
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w n"], condition: Float[Array, "b h w c"]) -> Float[Array, "b h w n"]:
        """Maps features to the same shape."""
        y = x
        for i in range(2):
            y = nn.leaky_relu(Sft(self.hidden, self.dtype, name=f"sft_{i}")(y, condition), _SLOPE)
            y = Conv(x.shape[-1], 3, dtype=self.dtype, name=f"conv_{i}")(y)
        return x + y


def pooled(condition: jax.Array, factor: int) -> jax.Array:
    """The means over squares of a map [b, h, w, c] whose sides are multiples of `factor`."""
    b, h, w, c = condition.shape
    return condition.reshape(b, h // factor, factor, w // factor, factor, c).mean(axis=(2, 4))


def repeated(condition: jax.Array, factor: int) -> jax.Array:
    """Every position of a map [b, h, w, c] as a square."""
    return jnp.repeat(jnp.repeat(condition, factor, axis=1), factor, axis=2)
