"""Structural similarity at one scale (SSIM) and at five (MS-SSIM).

Sources: Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity",
IEEE TIP 2004; Wang, Simoncelli and Bovik, "Multi-scale structural similarity for image quality assessment", Asilomar
2003. Where the papers leave a choice (windows at the border, odd sizes, colour) this module chooses as pytorch-msssim
1.0 does, the implementation behind most published learned-codec figures, and equals it to 1e-5.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxsem.errors import InputError
from jaxsem.metrics._images import Images, comparable

WINDOW = 11
SIGMA = 1.5
K1, K2 = 0.01, 0.03
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)

SMALLEST_SSIM_SIDE = WINDOW
"""A window must fit into the image."""

SMALLEST_MS_SSIM_SIDE = (WINDOW - 1) * 2 ** (len(SCALE_WEIGHTS) - 1) + 1
"""161: from here on a window still fits after halving four times."""


def ssim(x: Images, y: Images) -> Float[jax.Array, "..."]:
    """SSIM of each image: Gaussian windows of 11x11, sigma 1.5, fully inside the image, mean over pixels and channels.

    Args:
        x: images `[..., height, width, channels]`, uint8 in 0..255 or floating point in 0..1.
        y: images of the same shape and kind.

    Returns:
        float32 of shape `[...]`, at most 1, and 1 for identical images.

    Raises:
        InputError: if the two cannot be compared, or a side is shorter than 11 pixels.
    """
    x, y, data_range = comparable(x, y)
    require_side(x.shape, SMALLEST_SSIM_SIDE, "SSIM")
    return _ssim(x, y, data_range)


def ms_ssim(x: Images, y: Images) -> Float[jax.Array, "..."]:
    """MS-SSIM of each image: contrast and structure at five scales, luminance at the coarsest, mean over channels.

    Negative terms count as zero before they are raised to the weight of their scale; their gradient is zero too.

    Images with a side below 161 pixels have no MS-SSIM: fewer scales or padding would give a number that cannot be
    compared with any other. This function says so with an error; an evaluation records null for such an image
    (`jaxsem.results.compare`).

    Args:
        x: images `[..., height, width, channels]`, uint8 in 0..255 or floating point in 0..1.
        y: images of the same shape and kind.

    Returns:
        float32 of shape `[...]` in 0..1, and 1 for identical images.

    Raises:
        InputError: if the two cannot be compared, or a side is shorter than 161 pixels.
    """
    x, y, data_range = comparable(x, y)
    require_side(x.shape, SMALLEST_MS_SSIM_SIDE, "MS-SSIM")
    return _ms_ssim(x, y, data_range)


def require_side(shape: tuple[int, ...], smallest: int, name: str) -> None:
    """Refuses images `[..., height, width, channels]` with a side below `smallest`, for the metric `name`."""
    height, width = shape[-3:-1]
    if min(height, width) < smallest:
        raise InputError(
            f"{name} needs images of at least {smallest} pixels a side, but this one is {width}x{height}: "
            f"leave it out, or take PSNR."
        )


@jax.jit
def _ssim(x, y, data_range):
    similarity, _ = _similarity(planes(x), planes(y), data_range)
    return jnp.mean(similarity, axis=-1)


@jax.jit
def _ms_ssim(x, y, data_range):
    x, y = planes(x), planes(y)
    product = 1.0
    for scale, weight in enumerate(SCALE_WEIGHTS):
        similarity, contrast_structure = _similarity(x, y, data_range)
        coarsest = scale == len(SCALE_WEIGHTS) - 1
        product = product * _power(similarity if coarsest else contrast_structure, weight)
        x, y = _halve(x), _halve(y)
    return jnp.mean(product, axis=-1)


def _similarity(x, y, data_range):
    """SSIM and its contrast-structure factor, averaged over each plane: two arrays of shape `[..., channels]`."""
    similarity, contrast_structure = ssim_maps(x, y, data_range)
    return jnp.mean(similarity, axis=(-2, -1)), jnp.mean(contrast_structure, axis=(-2, -1))


def ssim_maps(x, y, data_range):
    """SSIM and its contrast-structure factor at the middle of every window that lies inside the image.

    Args:
        x: planes `[..., height, width]`, floating point; see `planes`.
        y: planes of the same shape.
        data_range: the peak of their values.

    Returns:
        two arrays `[..., height - 10, width - 10]`.
    """
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    # One blur of the five moments compiles three times as fast as five blurs.
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _blur(jnp.stack([x, y, x * x, y * y, x * y]))
    variance_x = mean_xx - mean_x * mean_x
    variance_y = mean_yy - mean_y * mean_y
    covariance = mean_xy - mean_x * mean_y
    contrast_structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    return luminance * contrast_structure, contrast_structure


def planes(x):
    """`[..., height, width, channels]` to `[..., channels, height, width]`: rows of one channel lie together."""
    return jnp.moveaxis(x, -1, -3)


def _gaussian() -> list[float]:
    kernel = np.exp(-((np.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    return [float(weight) for weight in kernel / kernel.sum()]


def _blur(x):
    """The Gaussian window at every position where it fits, one axis after the other.

    Eleven shifted copies instead of a convolution: XLA fuses them, which is three times as fast on a CPU (768x512, two
    cores: 0.07 s against 0.23 s for the five blurs), and stays in float32 on GPUs whose convolutions default to TF32.
    """
    for axis in (-2, -1):
        length = x.shape[axis] - WINDOW + 1
        x = sum(
            weight * jax.lax.slice_in_dim(x, start, start + length, axis=axis)
            for start, weight in enumerate(_gaussian())
        )
    return x


def _halve(x):
    """Mean over 2x2 pixels; an odd side first gets a line of zeros in front, as pytorch-msssim pads it."""
    height, width = x.shape[-2:]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(height % 2, 0), (width % 2, 0)])
    x = (x[..., 0::2, :] + x[..., 1::2, :]) / 2
    return (x[..., 0::2] + x[..., 1::2]) / 2


def _power(x, exponent):
    """`max(x, 0) ** exponent` whose gradient is 0, not NaN, where x is not positive."""
    positive = x > 0
    return jnp.where(positive, jnp.where(positive, x, 1.0) ** exponent, 0.0)
