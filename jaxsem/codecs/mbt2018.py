"""The joint autoregressive and hierarchical prior: the mean-scale hyperprior with a masked convolution over what is decoded.

Source: Minnen, Balle and Toderici, Joint Autoregressive and Hierarchical Priors (NeurIPS 2018), `mbt2018` in the published zoo.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsem.codecs.hyperprior import HyperpriorConfig
from jaxsem.codecs.serial import SerialCodec
from jaxsem.nn import exact
from jaxsem.nn.conv import Dense, MaskedConv


@dataclass(frozen=True)
class JointConfig(HyperpriorConfig):
    """Widths; the fields are those of `HyperpriorConfig`, N = M = 192 at the four lower published qualities."""

    channels: int = 192


class JointHyperprior(SerialCodec):
    """`mbt2018`: GDN transforms, a 5x5 context in raster order."""

    config: JointConfig

    def transforms(self) -> None:
        """Builds the transforms, the context and the parameter network."""
        super().transforms()
        m, t, act = self.config.latent, self.dtype, exact.LeakyRelu
        self.context_prediction = MaskedConv(2 * m, dtype=t)
        widths = 10 * m // 3, 8 * m // 3, 2 * m
        first, second, third = (Dense(width, t) for width in widths)
        self.entropy_parameters = nn.Sequential([first, act(), second, act(), third])

    def context(self, window: jax.Array) -> jax.Array:
        """See `SerialCodec`."""
        return self.context_prediction.at(window)

    def context_map(self, y_hat: jax.Array) -> jax.Array:
        """See `SerialCodec`."""
        return self.context_prediction(y_hat)

    def parameters(self, psi: jax.Array, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `SerialCodec`."""
        inputs = jnp.concatenate([psi, context], axis=-1)
        scale, mean = jnp.split(self.entropy_parameters(inputs).astype(jnp.float32), 2, axis=-1)
        return scale, mean
