"""Residual blocks that several codecs share.

Source: He et al., ELIC (CVPR 2022), and Cheng et al., Learned Image Compression with Discretized Gaussian Mixture
Likelihoods and Attention Modules (CVPR 2020), in the form of their published implementations.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsem.nn.conv import Conv


class ResidualBottleneck(nn.Module):
    """1x1 to half the width, 3x3, 1x1 back, plus the identity; ReLU between, none after the sum.

    With `relu_after` it is the residual unit of the attention block.
    """

    features: int
    relu_after: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, features] to the same shape."""
        half = self.features // 2
        y = nn.relu(Conv(half, 1, dtype=self.dtype, name="conv1")(x))
        y = nn.relu(Conv(half, 3, dtype=self.dtype, name="conv2")(y))
        y = Conv(self.features, 1, dtype=self.dtype, name="conv3")(y) + x
        return nn.relu(y) if self.relu_after else y


class AttentionBlock(nn.Module):
    """x + A(x) * sigmoid(B(x)): A is three residual units, B three more and a 1x1 convolution."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, features] to the same shape."""
        a = b = x
        for i in range(3):
            a = ResidualBottleneck(self.features, True, self.dtype, name=f"conv_a_{i}")(a)
            b = ResidualBottleneck(self.features, True, self.dtype, name=f"conv_b_{i}")(b)
        b = Conv(self.features, 1, dtype=self.dtype, name="conv_b_3")(b)
        return x + a * nn.sigmoid(b)
