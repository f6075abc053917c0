"""What convolutional backbones ask of images, checked in one place."""

import jax
import jax.numpy as jnp

from jaxsem.errors import InputError


def check_images(images: jax.Array, smallest: int, called: str) -> None:
    """Refuses what a backbone cannot take.

    Args:
      images: Normalised images, floats [b, h, w, 3].
      smallest: The fewest pixels a side.
      called: The backbone, with its article.

    Raises:
      InputError: Images of another kind, or with a side below the smallest.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(
            f"{called} takes normalised images of shape [batch, height, width, 3], floats, not {images.dtype} of shape "
            f"{list(images.shape)}"
        )
    height, width = images.shape[1:3]
    if min(height, width) < smallest:
        raise InputError(f"an image of {width}x{height} is too small for {called}: each side takes at least {smallest}")
