"""Peak signal-to-noise ratio."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxsem.metrics._images import Images, comparable


def psnr(x: Images, y: Images) -> Float[jax.Array, "..."]:
    """PSNR of each image, `10 log10(peak^2 / MSE)` in dB, with the MSE over all pixels and channels of that image.

    The PSNR of a data set is the mean of these values, as papers on learned codecs report it; it is not the PSNR of the
    pooled error. A pure function: `jit`, `vmap` and `grad` apply.

    Args:
        x: images `[..., height, width, channels]`, uint8 in 0..255 or floating point in 0..1.
        y: images of the same shape and kind; the order of the two does not matter.

    Returns:
        float32 of shape `[...]`. Identical images give `inf`.

    Raises:
        InputError: if the two cannot be compared (see `comparable`).

    Example:
        >>> import numpy as np
        >>> round(float(psnr(np.full((4, 4, 3), 10, np.uint8), np.full((4, 4, 3), 11, np.uint8))), 4)
        48.1308
    """
    x, y, data_range = comparable(x, y)
    mean_squared_error = jnp.mean(jnp.square(x - y), axis=(-3, -2, -1))
    return 10.0 * jnp.log10(data_range**2 / mean_squared_error)
