"""Convolutions as plain functions of (input, kernel), channels last, and other small operations.

Two habits make convolutions fast on every device. A 1x1 convolution is a matrix product. A stride-2 transposed convolution is a
stride-1 convolution followed by depth-to-space, which is the same function without the zeros that a dilated input
multiplies.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_SMALLEST_NORM = 1e-12  # below it a vector has no direction

Padding = int | tuple[int, int] | None


def both_sides(padding: Padding, size: int) -> tuple[int, int]:
    """Zeros before and after each row and column; None is half the kernel's `size` on both sides."""
    if padding is None:
        padding = size // 2
    return padding if isinstance(padding, tuple) else (padding, padding)


def conv2d(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "k k i o"],
    stride: int = 1,
    padding: Padding = None,
    result: Any = None,
) -> Float[Array, "b p q o"]:
    """Cross-correlates with zero padding, as `torch.nn.Conv2d` does.

    Args:
      x: Input, channels last.
      kernel: Square kernel, (row, column, in, out).
      stride: Step in both directions.
      padding: Zeros on each side, or (before, after); `None` is half the kernel.
      result: Type of the sums and of the output; `None` is the operands' type.

    Returns:
      Output of height (h + 2 padding - k) // stride + 1.
    """
    size = kernel.shape[0]
    if size == 1 and stride == 1 and not padding:
        return jnp.einsum("bhwi,io->bhwo", x, kernel[0, 0], preferred_element_type=result)
    pad = both_sides(padding, size)
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), (pad, pad), dimension_numbers=_LAYOUT, preferred_element_type=result
    )


def transposed_taps(kernel: Float[Array, "k k i o"]) -> Float[Array, "d d i o*4"]:
    """The kernel of the stride-1 convolution that, followed by `depth_to_space`, is a transposed one of stride 2.

    Output row 2m + r of the transposed convolution sums x[m + d] * kernel[r + k // 2 - 2 d] over d, so each of the two row
    phases is an ordinary convolution with every other kernel row; phases that are shorter are filled with zeros.

    Args:
      kernel: Square kernel of odd size in the transposed convolution's own order (row, column, in, out), not flipped.
    """
    size = kernel.shape[0]
    low, high = transposed_padding(size)
    taps = np.array([[r + size // 2 - 2 * d for r in (0, 1)] for d in range(-low, high + 1)])
    taps = np.where((taps >= 0) & (taps < size), taps, size)
    padded = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    phases = padded[taps][:, :, taps]  # d, r, e, s, i, o
    span, (channels, features) = low + high + 1, kernel.shape[2:]
    return phases.transpose(0, 2, 4, 1, 3, 5).reshape(span, span, channels, 4 * features)


def transposed_padding(size: int) -> tuple[int, int]:
    """Zeros before and after that the convolution with `transposed_taps` of a kernel of this size needs."""
    return (size - 1 - size // 2) // 2, (size // 2 + 1) // 2


def depth_to_space(x: Float[Array, "b h w c"]) -> Float[Array, "b h*2 w*2 c//4"]:
    """Depth to space by 2, in the channel order (row, column, out) of `transposed_taps`."""
    b, h, w, c = x.shape
    return x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, c // 4)


def pixel_shuffle(x: Float[Array, "b h w c"]) -> Float[Array, "b h*2 w*2 c//4"]:
    """Depth to space by 2, in PyTorch's channel order (out, row, column)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, 2 * h, 2 * w, c // 4)


def unit(x: ArrayLike) -> jax.Array:
    """Scales the last axis to length 1; a zero vector stays zero, and its gradient is zero too."""
    square = jnp.square(x).sum(-1, keepdims=True)
    known = ~(square <= _SMALLEST_NORM**2)  # NaN is not zero
    return jnp.where(known, x / jnp.sqrt(jnp.where(known, square, 1.0)), 0.0)
