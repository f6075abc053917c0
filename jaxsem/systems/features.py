"""What all that takes features shares: their check."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsem.errors import InputError


def check_features(features: Any, width: int | None = None) -> np.ndarray:
    """Refuses what is not a batch of usable features.

    Args:
      features: [b, width], any floating-point type.
      width: Width that the model takes; None takes any.

    Returns:
      The features as float32 on the host.

    Raises:
      InputError: Another rank or width, no real numbers, or numbers that are NaN or infinite.
    """
    array = np.asarray(features)
    wanted = "width" if width is None else width
    if array.ndim != 2 or array.shape[1] == 0 or (width is not None and array.shape[1] != width):
        raise InputError(f"features are [images, {wanted}] for this model, not of shape {array.shape}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(f"features are real numbers, not {array.dtype}: pass float32 or float16")
    array = array.astype(np.float32, copy=False)
    if faulty := np.flatnonzero(~np.isfinite(array).all(axis=1)).tolist():
        raise InputError(
            f"{len(faulty)} of {len(array)} features hold NaN or infinity, the first is number {faulty[0]}: "
            "extract them again or leave them out"
        )
    return array
