"""DISTS: how different two images look, where one texture may stand for another of its kind.

Source: Ding, Ma, Wang and Simoncelli, Image Quality Assessment: Unifying Structure and Texture Similarity (TPAMI 2020),
and its published PyTorch code and weights, with whose figures this agrees.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsem.backbones.vgg import Vgg, VggConfig
from jaxsem.errors import InputError
from jaxsem.metrics._images import Images, comparable

CONFIG = VggConfig(pool="l2")
"""The network of the published weights."""

_MEAN = np.float32([0.485, 0.456, 0.406])
_STD = np.float32([0.229, 0.224, 0.225])
_C1, _C2 = 1e-6, 1e-6


class Dists(nn.Module):
    """The distance: one minus a weighted mean, over all channels, of two similarities between their global statistics.

    The channels are those of the image itself and of the five taps of a VGG. Of each, texture compares the means and
    structure the covariance; `alpha` and `beta` are their weights.

    Attributes:
      config: Sizes of the network, with L2 pools.
      dtype: Of the network; the distance is float32 all the same.
      param_dtype: Of the parameters.
      precision: Of the convolutions, as in `jaxsem.metrics.lpips.Lpips`.
    """

    config: VggConfig = CONFIG
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: Any = jax.lax.Precision.HIGHEST

    def setup(self) -> None:
        """Declares the network and the weights of the channels, spread at first as in the authors' code."""
        if self.config.pool != "l2":
            raise InputError(f"DISTS takes a VGG with L2 pools, not {self.config.pool!r}: that one is of LPIPS")
        self.network = Vgg(self.config, self.dtype, self.param_dtype, self.precision)
        channels = 3 + sum(self.config.widths)
        self.alpha, self.beta = (
            self.param(name, _around_a_tenth, (channels,), self.param_dtype) for name in ("alpha", "beta")
        )

    def __call__(self, x: Images, y: Images) -> Float[jax.Array, "..."]:
        """The distance of each pair of images: see `dists`."""
        shape = np.shape(x)[:-3]
        x, y, data_range = comparable(x, y)
        if x.shape[-1] != 3:
            raise InputError(f"DISTS compares images of 3 channels, but these have {x.shape[-1]}: repeat a grey one")
        pair = [images.reshape(-1, *images.shape[-3:]) / data_range for images in (x, y)]
        taps = [[images, *self.network((images - _MEAN) / _STD)] for images in pair]
        textures, structures = (
            jnp.concatenate(parts, axis=-1) for parts in zip(*(_similarities(*channels) for channels in zip(*taps)))
        )
        alpha, beta = (jnp.asarray(weights, jnp.float32) for weights in (self.alpha, self.beta))
        # A sum and not a matrix product, whose precision would be the device's.
        similarity = (textures * alpha + structures * beta).sum(axis=-1) / (alpha.sum() + beta.sum())
        return (1 - similarity).reshape(shape)


def _similarities(x: Float[Array, "b h w c"], y: Float[Array, "b h w c"]) -> tuple[jax.Array, jax.Array]:
    """Texture and structure [b, c] of each channel, at most 1."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    mean_x, mean_y = (z.mean(axis=(1, 2), keepdims=True) for z in (x, y))
    # Of differences from the mean: a mean of products less the product of means would lose most digits in float32.
    x, y = x - mean_x, y - mean_y
    variances = jnp.square(x).mean(axis=(1, 2)) + jnp.square(y).mean(axis=(1, 2))
    mean_x, mean_y = mean_x[:, 0, 0], mean_y[:, 0, 0]
    texture = (2 * mean_x * mean_y + _C1) / (jnp.square(mean_x) + jnp.square(mean_y) + _C1)
    return texture, (2 * (x * y).mean(axis=(1, 2)) + _C2) / (variances + _C2)


def _around_a_tenth(rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return 0.1 + 0.01 * jax.random.normal(rng, shape, dtype)


@partial(jax.jit, static_argnames="module")
def dists(module: Dists, params: Any, x: Images, y: Images) -> Float[jax.Array, "..."]:
    """DISTS of each pair of images, a pure and differentiable function of (params, x, y).

    Images are compared at the size they have. The authors' script first reduces those above 256 pixels to a shorter
    side of 256 and their module does not; papers differ, so say which it was.

    Args:
        module: the distance, as `jaxsem.weights.perceptual.load_dists` gives it.
        params: its parameters; put them on the device once (`jax.device_put`) if it is called often.
        x: images `[..., height, width, 3]`, uint8 in 0..255 or floating point in 0..1.
        y: images of the same shape and kind; the order of the two does not matter.

    Returns:
        float32 of shape `[...]`, 0 for equal images and larger the more they differ.

    Raises:
        InputError: if the two cannot be compared or are not of three channels.
    """
    return module.apply({"params": params}, x, y)


def param_shapes(module: Dists) -> dict[str, Any]:
    """Shapes and types of the parameters, without memory or arithmetic."""
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), images, images)["params"]
