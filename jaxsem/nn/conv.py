"""Convolution layers with parameters: ordinary, transposed, sub-pixel and checkerboard-masked.

Kernels are kept in the order (row, column, in, out). Initialisation is uniform in +-1/sqrt(fan-in), the habit of the
published codecs, with zero biases.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsem.nn import ops

kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def draw_kernel(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """What `kernel_init` draws, on the host: float32 from U(-b, b) with b = 1 / sqrt(fan-in)."""
    return (rng.uniform(-1.0, 1.0, shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)


class Conv(nn.Module):
    """Convolution with zero padding of half the kernel (`torch.nn.Conv2d` with `padding=size // 2`)."""

    features: int
    size: int = 5
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, i] to [b, ceil(h / stride), ceil(w / stride), features]."""
        kernel, bias = _parameters(self, x.shape[-1])
        return ops.conv2d(jnp.asarray(x, self.dtype), kernel, self.stride) + bias


class Deconv(nn.Module):
    """Transposed convolution of stride 2: exactly twice the height and width."""

    features: int
    size: int = 5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, i] to [b, 2 h, 2 w, features]."""
        kernel, bias = _parameters(self, x.shape[-1])
        return ops.conv_transpose2d(jnp.asarray(x, self.dtype), kernel) + bias


class SubpelConv(nn.Module):
    """Sub-pixel convolution: 3x3 to four times the channels, then pixel shuffle by 2."""

    features: int
    size: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, i] to [b, 2 h, 2 w, features]."""
        return ops.pixel_shuffle(Conv(4 * self.features, self.size, dtype=self.dtype, name="conv")(x))


class CheckerboardConv(nn.Module):
    """5x5 convolution that sees only the other colour of the checkerboard: taps with (row + column) odd.

    Source: He et al., Checkerboard Context Model (CVPR 2021); FACTS of ELIC's spatial context.
    """

    features: int
    size: int = 5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, i] to [b, h, w, features]."""
        kernel, bias = _parameters(self, x.shape[-1])
        row, column = np.indices((self.size, self.size))
        mask = ((row + column) % 2 == 1)[:, :, None, None]
        return ops.conv2d(jnp.asarray(x, self.dtype), kernel * mask) + bias


def _parameters(layer: nn.Module, channels: int) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias of a layer, in the type that it computes in."""
    kernel = layer.param("kernel", kernel_init, (layer.size, layer.size, channels, layer.features))
    bias = layer.param("bias", nn.initializers.zeros, (layer.features,))
    return jnp.asarray(kernel, layer.dtype), jnp.asarray(bias, layer.dtype)
