"""TIC: convolutions and Swin blocks in turns, and an attention over the decoded neighbours as context model.

    x --conv /2, Swin--conv /2, Swin--conv /2, Swin--conv /2--> y --conv, Swin--conv /2, Swin--conv /2--> z

and back the same way with transposed convolutions. Nothing but Swin blocks stands between convolutions: no GDN, no activation.

Source: Lu et al., Transformer-based Image Compression (DCC 2022), in the form of the authors' code. It differs from the paper in
two things: no activations follow the convolutions, and the context model masks what goes into it. It fails on maps that its windows
do not divide, so for images with a side that is an odd multiple of 64; here any will do (see `jaxsem.nn.swin`).
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsem.codecs.hyperprior import check_scale_rule
from jaxsem.codecs.serial import SerialCodec
from jaxsem.errors import InputError
from jaxsem.nn.attention import check_heads
from jaxsem.nn.conv import Conv, Deconv, Dense
from jaxsem.nn.swin import ResidualSwinBlocks, WindowAttention
from jaxsem.nn.transformer import LayerNorm, Mlp, gelu

CONTEXT_SIDE = 5  # of the square of neighbours that the context model sees


@dataclass(frozen=True)
class TicConfig:
    """Sizes of TIC; the defaults are the published model for low rates, and (192, 320) channels that for high ones.

    Depths, heads and windows are those of the encoder's five groups of Swin blocks, at 1/2, 1/4, 1/8, 1/16 and 1/32 of the image's
    size; the decoder has the same ones in reverse.

    Attributes:
      channels: N, width of the transforms and of the hyper-latent.
      latent: M, channels of y.
      depths: Blocks of each group.
      heads: Attention heads of each group.
      windows: Side of the windows of each group.
      context_heads: Attention heads of the context model.
      drop_path: Highest rate of stochastic depth: it grows linearly from 0 over the blocks of the encoder, and again over those of
        the decoder. Used in training, and there only where random numbers are given (`jaxsem.nn.swin`).
      lambdas: See `jaxsem.codecs.hyperprior`.
      scale_rule: See `jaxsem.codecs.hyperprior.HyperpriorConfig`.

    Raises:
      InputError: Not five groups, sizes below 1, heads that do not divide their width, a rate outside [0, 1), or an unknown rule.
    """

    channels: int = 128
    latent: int = 192
    depths: tuple[int, ...] = (2, 4, 6, 2, 2)
    heads: tuple[int, ...] = (4, 8, 16, 16, 16)
    windows: tuple[int, ...] = (8, 8, 8, 4, 4)
    context_heads: int = 16
    drop_path: float = 0.2
    lambdas: tuple[float, ...] = ()
    scale_rule: str = "nearest"

    def __post_init__(self) -> None:
        for name in ("depths", "heads", "windows"):
            sizes = getattr(self, name)
            if len(sizes) != 5 or min(sizes) < 1:
                raise InputError(f"TIC's {name} are five numbers from 1 on, not {sizes}")
        for heads in self.heads:
            check_heads(self.channels, heads)
        check_heads(self.latent, self.context_heads)
        if not 0 <= self.drop_path < 1:
            raise InputError(f"TIC's drop_path is a rate in [0, 1), not {self.drop_path}")
        check_scale_rule(self.scale_rule)

    @property
    def hyper(self) -> int:
        """Channels of the hyper-latent z."""
        return self.channels

    @property
    def aggregation(self) -> tuple[int, int, int]:
        """Output widths of the three layers that join hyper parameters and context: 10M/3, 8M/3 and 2M."""
        return 10 * self.latent // 3, 8 * self.latent // 3, 2 * self.latent


class Tic(SerialCodec):
    """The TIC codec; see `SerialCodec` and `HyperpriorCodec` for its methods."""

    config: TicConfig
    exactable = False  # softmax and layer normalisation are not integers

    def transforms(self) -> None:
        """Builds the transforms, the context model and the aggregation."""
        cfg, t = self.config, self.dtype
        n, m = cfg.channels, cfg.latent
        half, quarter, eighth, *hyper = _groups(cfg, t)
        self.g_a = nn.Sequential(
            [Conv(n, 5, 2, t), half, Conv(n, 3, 2, t), quarter, Conv(n, 3, 2, t), eighth, Conv(m, 3, 2, t)]
        )
        self.h_a = nn.Sequential([Conv(n, 3, 1, t), hyper[0], Conv(n, 3, 2, t), hyper[1], Conv(n, 3, 2, t)])
        *hyper, eighth, quarter, half = _groups(cfg, t, reverse=True)
        self.h_s = nn.Sequential([Deconv(n, 3, t), hyper[0], Deconv(n, 3, t), hyper[1], Conv(2 * m, 3, 1, t)])
        self.g_s = nn.Sequential(
            [Deconv(n, 3, t), eighth, Deconv(n, 3, t), quarter, Deconv(n, 3, t), half, Deconv(3, 5, t)]
        )
        self.context_prediction = CausalAttention(cfg.context_heads, 2 * m, t)
        first, second, last = (Dense(width, t) for width in cfg.aggregation)
        self.entropy_parameters = nn.Sequential([first, gelu, second, gelu, last])

    def context(self, window: jax.Array) -> jax.Array:
        """What the decoded neighbours say: [n, 5, 5, m] to [n, 2 m], float32; the middle and what follows it has no effect."""
        return self.context_prediction(window).astype(jnp.float32)

    def parameters(self, psi: jax.Array, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scale and mean [n, m] from hyper parameters [n, 2 m] and contexts [n, 2 m]."""
        joined = self.entropy_parameters(jnp.concatenate([psi, context], axis=-1)).astype(jnp.float32)
        scale, mean = jnp.split(joined, 2, axis=-1)
        return scale, mean


class CausalAttention(nn.Module):
    """The causal attention module: self-attention over the neighbours, those not decoded yet as zeros, summed up, then an MLP.

    Zeros are tokens too: they are normalised to the norm's bias, attend and are attended to.

    Attributes:
      heads: Attention heads.
      features: Of what comes out.
      dtype: Of the computation.
    """

    heads: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, window: jax.Array) -> jax.Array:
        """Maps squares [n, s, s, m] around n positions, s odd, to [n, features]."""
        positions, side, _, width = window.shape
        t = {"dtype": self.dtype}
        decoded = np.arange(side**2) < side**2 // 2
        tokens = jnp.where(decoded[:, None], window.reshape(positions, side**2, width), 0).astype(self.dtype)
        y = LayerNorm(name="norm1", **t)(tokens)
        y = WindowAttention(self.heads, side, project=False, name="attention", **t)(y)
        total = (y + tokens).sum(axis=1)
        total += Mlp(4 * width, name="mlp", **t)(LayerNorm(name="norm2", **t)(total))
        return nn.Dense(self.features, name="proj", **t)(total)


def _groups(config: TicConfig, dtype: Any, reverse: bool = False) -> list[ResidualSwinBlocks]:
    """Five groups of Swin blocks in the order of the data, with rates of stochastic depth that grow along it."""
    sizes = list(zip(config.depths, config.heads, config.windows, strict=True))[:: -1 if reverse else 1]
    rates = np.linspace(0.0, config.drop_path, sum(config.depths)).tolist()
    groups = []
    for depth, heads, window in sizes:
        groups.append(ResidualSwinBlocks(depth, heads, window, drop=tuple(rates[:depth]), dtype=dtype))
        rates = rates[depth:]
    return groups
