"""Metrics inside a mask: f-PSNR, f-SSIM and f-LPIPS, f for foreground.

A mask is boolean, or floating point in 0..1 where pixels belong to it in part. Papers name these metrics and seldom
define them, so each docstring says what is computed.

Source: f-PSNR as image harmonisation has it (Cong et al., DoveNet, CVPR 2020; Guo et al., Image Harmonization with
Transformer, ICCV 2021). The other two have no settled definition.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxsem.errors import InputError
from jaxsem.metrics._images import Images, comparable
from jaxsem.metrics.lpips import Lpips, lpips_map
from jaxsem.metrics.ms_ssim import SMALLEST_SSIM_SIDE, WINDOW, planes, require_side, ssim_maps

Mask = Bool[jax.Array | np.ndarray, "... h w"] | Float[jax.Array | np.ndarray, "... h w"]


def f_psnr(x: Images, y: Images, mask: Mask) -> Float[jax.Array, "..."]:
    """PSNR inside a mask, `10 log10(255^2 / (sum m (x - y)^2 / (3 sum m)))` in dB, for each image.

    The sums are over pixels and channels (3 in the formula is their number); for floats the peak is 1, not 255. With
    a mask of ones it is `psnr`.

    Args:
        x: images `[..., height, width, channels]`, uint8 in 0..255 or floating point in 0..1.
        y: images of the same shape and kind.
        mask: `[..., height, width]`, boolean or floating point in 0..1.

    Returns:
        float32 of shape `[...]`. Images that are identical inside the mask give `inf`.

    Raises:
        InputError: if the images cannot be compared, or the mask is of another shape or kind, holds other values, or is
            empty for an image. Under `jit` the values are not known, and an empty mask gives NaN.
    """
    x, y, data_range = comparable(x, y)
    return _f_psnr(x, y, _weights(mask, x.shape), data_range)


@jax.jit
def _f_psnr(x, y, weights, data_range):
    return 10.0 * jnp.log10(data_range**2 / _weighted_mean(jnp.mean(jnp.square(x - y), axis=-1), weights))


def f_ssim(x: Images, y: Images, mask: Mask) -> Float[jax.Array, "..."]:
    """SSIM inside a mask, `sum m SSIM / sum m` over the map of SSIM, mean over channels, for each image.

    The map is that of `ssim`: Gaussian windows of 11x11, sigma 1.5, fully inside the image. Each window counts by the
    mask at its middle, so the mask's outermost 5 pixels have no part; windows at the mask's edge see pixels outside of
    it. With a mask of ones it is `ssim`.

    Args:
        x: images `[..., height, width, channels]`, uint8 in 0..255 or floating point in 0..1.
        y: images of the same shape and kind.
        mask: `[..., height, width]`, boolean or floating point in 0..1.

    Returns:
        float32 of shape `[...]`, at most 1, and 1 for identical images.

    Raises:
        InputError: as for `f_psnr`; also if a side is shorter than 11 pixels, or a mask lies within 5 pixels of the
            border.
    """
    x, y, data_range = comparable(x, y)
    require_side(x.shape, SMALLEST_SSIM_SIDE, "SSIM")
    margin = WINDOW // 2
    return _f_ssim(x, y, _weights(mask, x.shape, margin), data_range)


@jax.jit
def _f_ssim(x, y, weights, data_range):
    similarity, _ = ssim_maps(planes(x), planes(y), data_range)
    return _weighted_mean(jnp.mean(similarity, axis=-3), weights)


def f_lpips(module: Lpips, params: Any, x: Images, y: Images, mask: Mask) -> Float[jax.Array, "..."]:
    """LPIPS inside a mask, `sum m d / sum m` over the map of distances (`lpips_map`), for each image.

    The network sees the whole images, so features at the mask's edge know what lies outside of it.

    Args:
        module: the distance, as `jaxsem.weights.perceptual.load_lpips` gives it.
        params: its parameters.
        x: images `[..., height, width, 3]`, uint8 in 0..255 or floating point in 0..1.
        y: images of the same shape and kind.
        mask: `[..., height, width]`, boolean or floating point in 0..1.

    Returns:
        float32 of shape `[...]`.

    Raises:
        InputError: as for `f_psnr` and `jaxsem.metrics.lpips.lpips`.
    """
    weights = _weights(mask, comparable(x, y)[0].shape)
    return _f_lpips(module, params, x, y, weights)


@partial(jax.jit, static_argnames="module")
def _f_lpips(module, params, x, y, weights):
    return _weighted_mean(lpips_map(module, params, x, y), weights)


def _weighted_mean(values, weights):
    return jnp.sum(values * weights, axis=(-2, -1)) / jnp.sum(weights, axis=(-2, -1))


def _weights(mask: Mask, shape: tuple[int, ...], margin: int = 0) -> Float[jax.Array, "... h w"]:
    """The mask of images of this shape as float32, less a margin on all sides."""
    if np.shape(mask) != shape[:-1]:
        raise InputError(
            f"Images of shape {list(shape)} need a mask of shape {list(shape[:-1])}, but this is "
            f"{list(np.shape(mask))}."
        )
    if not isinstance(mask, jax.core.Tracer):
        mask = np.asarray(mask)
    if mask.dtype != bool and not jnp.issubdtype(mask.dtype, jnp.floating):
        raise InputError(
            f"A mask is boolean or floating point in 0..1, but this is {mask.dtype}: compare it, as in m > 0."
        )
    inside = mask[..., margin : shape[-3] - margin, margin : shape[-2] - margin]
    if not isinstance(mask, jax.core.Tracer):
        if not ((mask >= 0) & (mask <= 1)).all():  # NaN is neither
            raise InputError("A mask has values in 0..1, but this one has others: divide it by its largest value.")
        empty = np.flatnonzero(~inside.any(axis=(-2, -1)))
        if len(empty):
            where = f" farther than {margin} pixels from the border" if margin else ""
            which = f"mask {empty[0] + 1} of {inside.size // (inside.shape[-2] * inside.shape[-1])}"
            raise InputError(f"There is nothing to measure: {which} has no pixel{where}; leave that image out.")
    return jnp.asarray(inside, jnp.float32)
