r"""The first codecs with a learned prior: the factorised one, and the scale hyperprior.

    factorised:        x --g_a--> y --round(y - median)--> symbols --+ median--> y_hat --g_s--> x_hat

    scale hyperprior:  as the frame in `jaxsem.codecs.hyperprior`, with z = h_a(|y|), scale = h_s(z_hat) and mean = 0

Source: Balle, Minnen, Singh, Hwang and Johnston, Variational image compression with a scale hyperprior (ICLR 2018):
`bmshj2018-factorized` and `bmshj2018-hyperprior` in the published zoo, where N = 128 and M = 192 at qualities 1 to 5, 192 and 320
at 6 to 8.
"""

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsem.codecs.hyperprior import Y_STRIDE, HyperpriorCodec, HyperpriorConfig, State, gdn_transforms
from jaxsem.nn.conv import Conv, Deconv


@dataclass(frozen=True)
class ScaleHyperpriorConfig(HyperpriorConfig):
    """Widths of the scale hyperprior; the fields are those of `HyperpriorConfig`."""


class ScaleHyperprior(HyperpriorCodec):
    """`bmshj2018-hyperprior`: GDN transforms, one Gaussian slice of zero mean."""

    config: ScaleHyperpriorConfig

    def transforms(self) -> None:
        """Builds the transforms, and the hyper path with its ReLUs."""
        n, m, t, relu = self.config.channels, self.config.latent, self.dtype, nn.relu
        self.g_a, self.g_s = gdn_transforms(n, m, t)
        self.h_a = nn.Sequential([Conv(n, 3, 1, t), relu, Conv(n, 5, 2, t), relu, Conv(n, 5, 2, t)])
        self.h_s = nn.Sequential([Deconv(n, 5, t), relu, Deconv(n, 5, t), relu, Conv(m, 3, 1, t), relu])

    def hyper_analysis(self, y: jax.Array, quality: jax.Array) -> jax.Array:
        """Z of y, of which it sees the magnitudes."""
        return super().hyper_analysis(jnp.abs(y), quality)

    def predict_y(self, i: int, state: State) -> tuple[jax.Array, jax.Array]:
        """Psi is the scale."""
        return state["psi"], jnp.zeros_like(state["psi"])


@dataclass(frozen=True)
class FactorizedConfig:
    """Widths of the factorised codec.

    Attributes:
      channels: N, width of the transforms.
      latent: M, channels of y.
    """

    channels: int = 128
    latent: int = 192
    lambdas: ClassVar[tuple[float, ...]] = ()  # one density a channel fits one rate

    @property
    def hyper(self) -> int:
        """Channels under the factorised prior."""
        return self.latent


class Factorized(HyperpriorCodec):
    """`bmshj2018-factorized`: y is its own z, coded under the factorised prior, and nothing follows it."""

    config: FactorizedConfig

    def transforms(self) -> None:
        """Builds the transforms."""
        self.g_a, self.g_s = gdn_transforms(self.config.channels, self.config.latent, self.dtype)

    @property
    def y_slices(self) -> int:
        """None after z."""
        return 0

    @property
    def z_stride(self) -> int:
        """That of y."""
        return Y_STRIDE

    def hyper_analysis(self, y: jax.Array, quality: jax.Array) -> jax.Array:
        """Z = y."""
        return y

    def place(self, i: int, state: State, values: jax.Array) -> State:
        """The state after the only slice."""
        return {**state, "z_hat": values, "y_hat": values}

    def __call__(self, x: jax.Array, quality: jax.Array, rng: jax.Array | None = None) -> dict[str, jax.Array]:
        """See `HyperpriorCodec`; all bits are y's."""
        outputs = super().__call__(x, quality, rng)
        return {**outputs, "bits_y": outputs["bits_z"], "bits_z": outputs["bits_y"]}
