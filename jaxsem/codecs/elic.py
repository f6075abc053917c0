"""ELIC: uneven channel groups, each coded on a checkerboard, with channel and spatial context.

Source: He et al., ELIC (CVPR 2022). Two published variants differ in the context networks and the hyper-decoder
(`official`, 32,074,200 parameters, and `chandelier`, 33,792,771, at the published widths); both are here in full.

Slices of y: for every group its anchors (row + column even), then the others. For the anchors the spatial context is zero (not even
its bias); for the others it is the checkerboard convolution of the group's anchors. Parameter aggregation is 1x1, so it runs on the
packed half grid of its slice only: the same values at half the cost.
"""

from dataclasses import dataclass
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsem.codecs.hyperprior import HyperpriorCodec, State, check_scale_rule
from jaxsem.errors import InputError
from jaxsem.nn import checkerboard
from jaxsem.nn.blocks import AttentionBlock, ResidualBottleneck
from jaxsem.nn.conv import CheckerboardConv, Conv, Deconv


@dataclass(frozen=True)
class ElicConfig:
    """Widths of ELIC; the defaults are the published model.

    Attributes:
      widths: Channels of the transforms at 1/2, 1/4 and 1/8 of the image's size (N, N, N in the paper).
      latent: M, channels of y.
      hyper: Channels of the hyper-latent z and of the hyper path.
      groups: Channels of each group; their sum is `latent`.
      context: Hidden widths of the channel-context networks.
      variant: "official" or "chandelier".
      lambdas: See `jaxsem.codecs.hyperprior`.
      scale_rule: See `jaxsem.codecs.hyperprior.HyperpriorConfig`.

    Raises:
      InputError: The groups do not add up to the latent's channels, or the variant or the rule for scales is unknown.
    """

    widths: tuple[int, int, int] = (192, 192, 192)
    latent: int = 320
    hyper: int = 192
    groups: tuple[int, ...] = (16, 16, 32, 64, 192)
    context: tuple[int, int] = (224, 128)
    variant: str = "chandelier"
    lambdas: tuple[float, ...] = ()
    scale_rule: str = "nearest"

    def __post_init__(self) -> None:
        if sum(self.groups) != self.latent:
            raise InputError(f"ELIC's groups {self.groups} add up to {sum(self.groups)}, not to latent={self.latent}")
        if self.variant not in ("official", "chandelier"):
            raise InputError(f"ELIC's variant is 'official' or 'chandelier', not {self.variant!r}")
        check_scale_rule(self.scale_rule)

    @property
    def official(self) -> bool:
        """Whether this is the official variant."""
        return self.variant == "official"

    @property
    def parameters(self) -> int:
        """Channels that the hyper-decoder gives the aggregation: 2N, or 2M in the chandelier variant."""
        return 2 * self.hyper if self.official else 2 * self.latent

    @property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """First and past-last channel of each group."""
        edges = np.cumsum((0, *self.groups)).tolist()
        return tuple(pairwise(edges))

    def aggregation(self, group: int) -> tuple[int, ...]:
        """Output widths of the three aggregation layers of a group.

        Official: a linear ramp from input to output width, floored, hidden widths at least 2N. Chandelier: 2M and 8M/5.
        """
        out = 2 * self.groups[group]
        if not self.official:
            return 2 * self.latent, 8 * self.latent // 5, out
        first = self.parameters + out * (2 if group else 1)
        hidden = [max(2 * self.hyper, int(first + (out - first) * i / 3)) for i in (1, 2)]
        return *hidden, out


class Elic(HyperpriorCodec):
    """The ELIC codec; see `HyperpriorCodec` for its methods."""

    config: ElicConfig

    def transforms(self) -> None:
        """Builds the transforms and the context networks."""
        cfg, t = self.config, self.dtype
        n1, n2, n3 = cfg.widths
        m, n = cfg.latent, cfg.hyper

        def bottlenecks(features: int) -> list[nn.Module]:
            return [ResidualBottleneck(features, dtype=t) for _ in range(3)]

        self.g_a = nn.Sequential(
            [
                *(Conv(n1, 5, 2, t), *bottlenecks(n1)),
                *(Conv(n2, 5, 2, t), *bottlenecks(n2), AttentionBlock(n2, t)),
                *(Conv(n3, 5, 2, t), *bottlenecks(n3)),
                *(Conv(m, 5, 2, t), AttentionBlock(m, t)),
            ]
        )
        self.g_s = nn.Sequential(
            [
                *(AttentionBlock(m, t), Deconv(n3, 5, t), *bottlenecks(n3)),
                *(Deconv(n2, 5, t), AttentionBlock(n2, t), *bottlenecks(n2)),
                *(Deconv(n1, 5, t), *bottlenecks(n1)),
                Deconv(3, 5, t),
            ]
        )
        relu = nn.relu
        self.h_a = nn.Sequential([Conv(n, 3, 1, t), relu, Conv(n, 5, 2, t), relu, Conv(n, 5, 2, t)])
        # The official last layer is a transposed convolution of stride 1: an ordinary one with a flipped kernel.
        last = Conv(cfg.parameters, 3, 1, t)
        self.h_s = nn.Sequential([Deconv(n, 5, t), relu, Deconv(3 * n // 2, 5, t), relu, last])
        self.channel_context = [
            nn.Sequential(
                [Conv(cfg.context[0], 5, 1, t), relu, Conv(cfg.context[1], 5, 1, t), relu, Conv(2 * g, 5, 1, t)]
            )
            for g in cfg.groups[1:]
        ]
        self.spatial_context = [CheckerboardConv(2 * g, dtype=t) for g in cfg.groups]
        aggregation = [[Conv(width, 1, dtype=t) for width in cfg.aggregation(k)] for k in range(len(cfg.groups))]
        self.aggregation = [nn.Sequential([a, relu, b, relu, c]) for a, b, c in aggregation]

    @property
    def y_slices(self) -> int:
        """Two for each group."""
        return 2 * len(self.config.groups)

    def channels_of(self, i: int) -> tuple[int, int]:
        """The channels of group i // 2."""
        return self.config.bounds[i // 2]

    def positions_of(self, i: int, grid: jax.Array) -> jax.Array:
        """Anchors (even i) or the others of [b, h, w, c], packed to [b, h, w / 2, c]."""
        return checkerboard.pack(grid, anchor=i % 2 == 0)

    def place_y(self, i: int, state: State, values: jax.Array) -> State:
        """Adds slice i to `y_hat`, whose places are still zero there; after a whole group, the next one's channel context."""
        group, anchor = i // 2, i % 2 == 0
        low, high = self.config.bounds[group]
        y_hat = state["y_hat"].at[..., low:high].add(checkerboard.unpack(values, anchor))
        state = {**state, "y_hat": y_hat}
        if not anchor and high < self.config.latent:
            known = y_hat[..., :high]
            if not self.config.official and group:
                known = jnp.concatenate([y_hat[..., : self.config.groups[0]], y_hat[..., low:high]], axis=-1)
            state["context"] = self.channel_context[group](known).astype(jnp.float32)
        return state

    def predict_y(self, i: int, state: State) -> tuple[jax.Array, jax.Array]:
        """Scale and mean of slice i, packed; the aggregation's input is [spatial context, channel context, psi]."""
        group, anchor = i // 2, i % 2 == 0
        low, high = self.config.bounds[group]
        psi = checkerboard.pack(state["psi"], anchor)
        if anchor:
            spatial = jnp.zeros((*psi.shape[:-1], 2 * (high - low)), psi.dtype)
        else:
            spatial = checkerboard.pack(self.spatial_context[group](state["y_hat"][..., low:high]), anchor)
        channel = [checkerboard.pack(state["context"], anchor)] if group else []
        inputs = jnp.concatenate([spatial, *channel, psi], axis=-1)
        first, second = jnp.split(self.aggregation[group](inputs).astype(jnp.float32), 2, axis=-1)
        return (first, second) if self.config.official else (second, first)
