"""LPIPS: how different two images look, by the features of a network for recognition.

    module, params = load_lpips("vgg16.pth", "lpips_vgg.pth", "vgg")
    lpips(module, params, x, y)                                        # [...], 0 for equal images
    jax.grad(lambda y: lpips(module, params, x, y).mean())(y)          # a training loss

Source: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (CVPR 2018), version 0.1 of
its published weights, with whose figures this agrees.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxsem.backbones.alexnet import AlexNet, AlexNetConfig
from jaxsem.backbones.vgg import Vgg, VggConfig
from jaxsem.errors import InputError
from jaxsem.metrics._images import Images, comparable

CONFIGS = {"alex": AlexNetConfig(), "vgg": VggConfig()}
"""The networks of the published weights. Figures are of "alex" unless a paper says otherwise; losses take "vgg"."""

# ImageNet's mean and deviation, for values from -1 to 1.
_SHIFT = np.float32([-0.030, -0.088, -0.188])
_SCALE = np.float32([0.458, 0.448, 0.450])
_EPSILON = 1e-10


class Lpips(nn.Module):
    """The distance: channel-weighted squared differences of unit features, averaged over positions and added over taps.

    Attributes:
      config: Sizes of the network; a VGG has max pools.
      dtype: Of the network; the distance is float32 all the same.
      param_dtype: Of the parameters.
      precision: Of the convolutions. The highest gives the same figures on every device; None is the device's own
        choice, which is faster on GPUs and TPUs and good enough for a loss.
    """

    config: AlexNetConfig | VggConfig = AlexNetConfig()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: Any = jax.lax.Precision.HIGHEST

    def setup(self) -> None:
        """Declares the network and the weight of every channel of its taps."""
        c, vgg = self.config, isinstance(self.config, VggConfig)
        if vgg and c.pool != "max":
            raise InputError(f"LPIPS takes a VGG with max pools, not {c.pool!r}: that one is of DISTS")
        self.network = (Vgg if vgg else AlexNet)(c, self.dtype, self.param_dtype, self.precision)
        self.channel_weights = [
            self.param(f"channel_weights_{i}", nn.initializers.constant(1 / width), (width,), self.param_dtype)
            for i, width in enumerate(c.widths)
        ]

    def __call__(self, x: Images, y: Images) -> Float[jax.Array, "..."]:
        """The distance of each pair of images: see `lpips`."""
        differences = self._differences(x, y)
        total = sum(difference.mean(axis=(1, 2)) for difference in differences)
        return total.reshape(np.shape(x)[:-3])

    def distance_map(self, x: Images, y: Images) -> Float[jax.Array, "... h w"]:
        """The distance at each pixel: see `lpips_map`."""
        shape = np.shape(x)[:-1]
        total = 0.0
        for difference in self._differences(x, y):
            size = len(difference), *shape[-2:]
            total += jax.image.resize(difference, size, "bilinear", antialias=False)
        return total.reshape(shape)

    def _differences(self, x: Images, y: Images) -> list[jax.Array]:
        """The weighted squared differences [b, rows, columns] of each tap."""
        x, y, data_range = comparable(x, y)
        if x.shape[-1] != 3:
            raise InputError(f"LPIPS compares images of 3 channels, but these have {x.shape[-1]}: repeat a grey one")
        # One run of the network for each image: a loss then goes back through that of the reconstruction alone.
        taps = [self.network(_normalised(images, data_range)) for images in (x, y)]
        # A sum and not a matrix product, whose precision would be the device's.
        return [
            (jnp.square(_unit(first) - _unit(second)) * jnp.asarray(weights, jnp.float32)).sum(axis=-1)
            for first, second, weights in zip(*taps, self.channel_weights)
        ]


def _normalised(images: jax.Array, data_range: float) -> jax.Array:
    images = images.reshape(-1, *images.shape[-3:])
    return (images * (2 / data_range) - 1 - _SHIFT) / _SCALE


def _unit(tap: jax.Array) -> jax.Array:
    """Features of length 1 along the channels; where all are zero they stay so, and so does their gradient."""
    tap = tap.astype(jnp.float32)
    square = jnp.square(tap).sum(-1, keepdims=True)
    known = square != 0  # NaN is known too, and stays
    return jnp.where(known, tap / (jnp.sqrt(jnp.where(known, square, 1.0)) + _EPSILON), 0.0)


@partial(jax.jit, static_argnames="module")
def lpips(module: Lpips, params: Any, x: Images, y: Images) -> Float[jax.Array, "..."]:
    """LPIPS of each pair of images, a pure and differentiable function of (params, x, y).

    Args:
        module: the distance, as `jaxsem.weights.perceptual.load_lpips` gives it.
        params: its parameters; put them on the device once (`jax.device_put`) if it is called often.
        x: images `[..., height, width, 3]`, uint8 in 0..255 or floating point in 0..1.
        y: images of the same shape and kind; the order of the two does not matter.

    Returns:
        float32 of shape `[...]`, 0 for equal images and larger the more they differ.

    Raises:
        InputError: if the two cannot be compared, are not of three channels, or are too small for the network: a side
            below 31 pixels for AlexNet, 16 for VGG.
    """
    return module.apply({"params": params}, x, y)


@partial(jax.jit, static_argnames="module")
def lpips_map(module: Lpips, params: Any, x: Images, y: Images) -> Float[jax.Array, "... h w"]:
    """LPIPS at each pixel: the difference of every tap, interpolated to the image (bilinear), added over taps.

    Its mean over an image is close to `lpips`, and not equal: interpolation weighs the border differently.

    Args and errors as for `lpips`.

    Returns:
        float32 of shape `[..., height, width]`.
    """
    return module.apply({"params": params}, x, y, method="distance_map")


def param_shapes(module: Lpips) -> dict[str, Any]:
    """Shapes and types of the parameters, without memory or arithmetic."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), images, images)["params"]
