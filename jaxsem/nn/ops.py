"""Convolutions as plain functions of (input, kernel, bias), channels last.

Two habits make them fast on every device. A 1x1 convolution is a matrix product. A stride-2 transposed convolution is a
stride-1 convolution followed by depth-to-space, which is the same function without the zeros that a dilated input
multiplies.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv2d(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k k i o"], stride: int = 1, padding: int | None = None
) -> Float[Array, "b p q o"]:
    """Cross-correlates with zero padding, as `torch.nn.Conv2d` does.

    Args:
      x: Input, channels last.
      kernel: Square kernel, (row, column, in, out).
      stride: Step in both directions.
      padding: Zeros on each side; `None` is half the kernel.

    Returns:
      Output of height (h + 2 padding - k) // stride + 1.
    """
    size = kernel.shape[0]
    if size == 1 and stride == 1 and not padding:
        return jnp.einsum("bhwi,io->bhwo", x, kernel[0, 0])
    pad = size // 2 if padding is None else padding
    return lax.conv_general_dilated(x, kernel, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=_LAYOUT)


def conv_transpose2d(x: Float[Array, "b h w i"], kernel: Float[Array, "k k i o"]) -> Float[Array, "b h*2 w*2 o"]:
    """Doubles height and width: `torch.nn.ConvTranspose2d` of stride 2, padding k // 2 and output padding 1.

    Output row 2m + r sums x[m + d] * kernel[r + k // 2 - 2 d] over d, so each of the two row phases is an ordinary
    convolution with every other kernel row; phases that are shorter are filled with zeros.

    Args:
      x: Input, channels last.
      kernel: Square kernel of odd size in the transposed convolution's own order (row, column, in, out), not flipped.

    Returns:
      Output of twice the height and width.
    """
    size, half = kernel.shape[0], kernel.shape[0] // 2
    low = -((size - 1 - half) // 2)  # smallest d with r + half - 2 d < size
    high = (half + 1) // 2  # largest d with r + half - 2 d >= 0
    taps = jnp.array([[r + half - 2 * d for r in (0, 1)] for d in range(low, high + 1)])
    taps = jnp.where((taps >= 0) & (taps < size), taps, size)
    padded = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    rows = padded[taps]  # d, r, k, i, o
    phases = rows[:, :, taps]  # d, r, e, s, i, o
    span, channels = high - low + 1, kernel.shape[-1]
    phases = phases.transpose(0, 2, 4, 1, 3, 5).reshape(span, span, kernel.shape[2], 4 * channels)
    pad = ((-low, high), (-low, high))
    y = lax.conv_general_dilated(x, phases, (1, 1), pad, dimension_numbers=_LAYOUT)
    b, h, w, _ = y.shape
    return y.reshape(b, h, w, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, channels)


def pixel_shuffle(x: Float[Array, "b h w c"]) -> Float[Array, "b h*2 w*2 c//4"]:
    """Depth to space by 2, in PyTorch's channel order (out, row, column)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, 2 * h, 2 * w, c // 4)
