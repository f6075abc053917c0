"""What PSNR, SSIM and MS-SSIM ask of a pair of images, checked in one place."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Num

from jaxsem.errors import InputError

Images = Num[jax.Array | np.ndarray, "..."]
"""Images of shape `[..., height, width, channels]`: uint8 in 0..255, or floating point in 0..1."""


def comparable(x: Images, y: Images) -> tuple[Float[jax.Array, "..."], Float[jax.Array, "..."], float]:
    """Bring two image arrays to float32 without changing their scale.

    Args:
        x: images `[..., height, width, channels]`, uint8 or floating point.
        y: images of the same shape and kind.

    Returns:
        Both arrays in float32, and the range of their values: 255 for uint8, 1 for floating point.

    Raises:
        InputError: if the shapes differ, have fewer than three axes or no pixels, or if the two are not both uint8 or
            both floating point. A uint8 array beside one in 0..1 is a mistake that no value could reveal.
    """
    if np.shape(x) != np.shape(y):
        raise InputError(f"Two images to compare need one shape, but these have {np.shape(x)} and {np.shape(y)}.")
    if np.ndim(x) < 3 or 0 in np.shape(x):
        raise InputError(
            f"Images are [..., height, width, channels] with at least one pixel, but this is {np.shape(x)}."
        )
    x, y = jnp.asarray(x), jnp.asarray(y)
    if x.dtype == jnp.uint8 and y.dtype == jnp.uint8:
        data_range = 255.0
    elif jnp.issubdtype(x.dtype, jnp.floating) and jnp.issubdtype(y.dtype, jnp.floating):
        data_range = 1.0
    else:
        raise InputError(
            f"Images to compare are both uint8 (0..255) or both floating point (0..1), "
            f"but these are {x.dtype} and {y.dtype}; convert one of them."
        )
    return x.astype(jnp.float32), y.astype(jnp.float32), data_range
