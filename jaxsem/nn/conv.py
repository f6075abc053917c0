"""Convolution layers with parameters: ordinary, transposed, sub-pixel and masked.

Kernels are kept in the order (row, column, in, out). Initialisation is uniform in +-1/sqrt(fan-in), the habit of the
published codecs, with zero biases. Each layer also computes exactly where it is given a grid: see `jaxsem.nn.exact`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsem.nn import exact, ops

kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def draw_kernel(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """What `kernel_init` draws, on the host: float32 from U(-b, b) with b = 1 / sqrt(fan-in).

    Kernels have two or four axes; one more in front is that of a stack of layers (`nn.scan`).
    """
    fan_in = np.prod(shape[len(shape) % 2 : -1])
    return (rng.uniform(-1.0, 1.0, shape) / np.sqrt(fan_in)).astype(np.float32)


class Conv(nn.Module):
    """Convolution with zero padding of half the kernel (`torch.nn.Conv2d` with `padding=size // 2`)."""

    features: int
    size: int = 5
    stride: int = 1
    dtype: Any = jnp.float32

    @staticmethod
    def taps(kernel: jax.Array) -> jax.Array:
        """The kernel as it is convolved."""
        return kernel

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, i] to [b, ceil(h / stride), ceil(w / stride), features]."""
        y, bias = _convolve(self, x, self.stride)
        return y + bias


class Deconv(nn.Module):
    """Transposed convolution of stride 2: exactly twice the height and width.

    `torch.nn.ConvTranspose2d` of stride 2, padding size // 2 and output padding 1.
    """

    features: int
    size: int = 5
    dtype: Any = jnp.float32

    @staticmethod
    def taps(kernel: jax.Array) -> jax.Array:
        """The kernel as it is convolved."""
        return ops.transposed_taps(kernel)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, i] to [b, 2 h, 2 w, features]."""
        y, bias = _convolve(self, x, padding=ops.transposed_padding(self.size))
        return ops.depth_to_space(y) + bias


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
    """Convolution that sees only the other colour of the checkerboard: taps with (row + column) odd.

    Source: He et al., Checkerboard Context Model (CVPR 2021); FACTS of ELIC's spatial context.
    """

    features: int
    size: int = 5
    dtype: Any = jnp.float32

    @staticmethod
    def taps(kernel: jax.Array) -> jax.Array:
        """The kernel as it is convolved: every other tap zero."""
        row, column = np.indices(kernel.shape[:2])
        return kernel * ((row + column) % 2 == 1)[:, :, None, None]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, i] to [b, h, w, features]."""
        y, bias = _convolve(self, x)
        return y + bias


class MaskedConv(nn.Module):
    """Convolution that sees only what comes before in raster order: the rows above, and the same row's left part.

    Source: van den Oord et al., Pixel recurrent neural networks (ICML 2016), mask A.
    """

    features: int
    size: int = 5
    dtype: Any = jnp.float32

    @staticmethod
    def taps(kernel: jax.Array) -> jax.Array:
        """The kernel as it is convolved: zero from the middle on."""
        seen = np.arange(kernel.shape[0] * kernel.shape[1]) < kernel.shape[0] * kernel.shape[1] // 2
        return kernel * seen.reshape(*kernel.shape[:2], 1, 1)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, i] to [b, h, w, features]."""
        y, bias = _convolve(self, x)
        return y + bias

    @nn.nowrap
    def at(self, window: jax.Array) -> jax.Array:
        """What `__call__` gives in the middle of windows [n, size, size, i]: [n, features].

        In float arithmetic it may differ from that in the last bit.
        """
        kernel, bias = (jnp.asarray(self.get_variable("params", name)) for name in ("kernel", "bias"))
        half = self.size**2 // 2
        n, _, _, channels = window.shape
        # Channel by channel, so that equal groups of channels stay together.
        x = window.reshape(n, -1, channels)[:, :half].swapaxes(1, 2).reshape(1, 1, n, -1)
        taps = kernel.reshape(-1, channels, self.features)[:half].swapaxes(0, 1).reshape(1, 1, -1, self.features)
        if (grid := exact.grid_of(self)) is not None:
            grid = {**grid, "inputs": jnp.repeat(grid["inputs"], half, axis=1)}
            return exact.convolve(x, taps, grid, 1, None)[0, 0] + bias
        return (x[0, 0].astype(self.dtype) @ taps[0, 0].astype(self.dtype)) + bias.astype(self.dtype)


class Dense(nn.Module):
    """A matrix product over the last axis: a 1x1 convolution of any number of axes."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., i] to [..., features]."""
        y = Conv(self.features, 1, dtype=self.dtype, name="conv")(x.reshape(1, 1, -1, x.shape[-1]))
        return y.reshape(*x.shape[:-1], self.features)


LAYERS = (Conv, Deconv, CheckerboardConv, MaskedConv)  # those with a kernel of their own


def _convolve(
    layer: nn.Module, x: jax.Array, stride: int = 1, padding: ops.Padding = None
) -> tuple[jax.Array, jax.Array]:
    """The layer's convolution, and its bias."""
    kernel = layer.param("kernel", kernel_init, (layer.size, layer.size, x.shape[-1], layer.features))
    bias = layer.param("bias", nn.initializers.zeros, (layer.features,))
    if (grid := exact.grid_of(layer)) is not None:
        return exact.convolve(x, layer.taps(kernel), grid, stride, padding), bias
    kernel, bias = jnp.asarray(kernel, layer.dtype), jnp.asarray(bias, layer.dtype)
    return ops.conv2d(jnp.asarray(x, layer.dtype), layer.taps(kernel), stride, padding), bias
