r"""HSVLC: the latent of an autoencoder at four scales, of which a weight map opens the finer ones where bits are wanted.

    z_0 [b, h, w, 4] ─ SftResidual, conv /2 ─┬─▶ f_0 at 1/2 ─ SftResidual, conv /2 ─┬─▶ f_1 at 1/4 ─ ... ─▶ f_3 at 1/16
           M in every block                  └ where M > 7/8                        └ where M > 3/4         everywhere

    f_3 ─▶ prior of f_2 ─▶ f_2 ─▶ prior of f_1 ─▶ f_1 ─▶ prior of f_0 ─▶ f_0        coarse to fine, with M
    f_3 ─ SftResidual, deconv x2 ─ + f_2 ─ SftResidual, deconv x2 ─ ... ─▶ ẑ_0

Source: Wu et al., Your Demands Deserve More Bits (papers/5), section II.B and Figure 2.
What the paper leaves open, and what is done here:

* Which region takes which scale. Low M means few bits, so the coarsest scale is coded everywhere, and each finer one where M
  exceeds its boundary: 1/2, 3/4 and 7/8. A region's scales thus nest, and a decoder of a coarse one refines it.
* What stands where nothing is coded: the prior's mean, which the decoder knows. A zero would be a value like any other.
* The prior: a Gaussian for each symbol from convolutions over M and all coarser scales, decoded. The coarsest has M alone. None
  of its layers is more than a convolution or a leaky ReLU, so that it can be computed in exact arithmetic (`jaxsem.nn.exact`).
* The widths; and the condition, which is made from M alone on both sides, since M is sent. Song et al., who send no map,
  condition their encoder on the image besides, and their decoder on the hyper-latent.
* The unit of lambda = 0.01 exp(7 M): rate in bits per pixel of the image, distortion as the mean squared error of z_0 in units
  where its variance is about 1, without a factor 255^2. Then M = 0 spends next to nothing, and M = 1 reaches some hundredths.

With one entry in `channels` and no boundary it is the codec of one scale of the paper's ablation: SFT alone varies the rate.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxsem import quantize
from jaxsem.codecs.hyperprior import SCALE_THRESHOLDS, check_scale_rule
from jaxsem.errors import InputError
from jaxsem.nn import exact
from jaxsem.nn.conv import Conv, Deconv
from jaxsem.nn.priors import gaussian_likelihood
from jaxsem.nn.sft import SftResidual, pooled, repeated

State = dict[str, Any]

_MEAN_LIMIT = 1 << 20  # in units of the grid of means


@dataclass(frozen=True)
class HsvlcConfig:
    """Sizes of the codec.

    Attributes:
      latent: Channels of z_0.
      width: N, channels of the transforms.
      channels: Of the representation at each scale, the finest first.
      boundaries: What M must exceed for each scale but the last to be coded, falling.
      condition: Channels of what the transforms are told of M.
      hidden: Of the SFT's hidden layers.
      prior: Channels of the priors' layers.
      map_stride: Positions of z_0 along the side of one cell of M.
      pixels: Pixels of the image to a position of z_0, in which rates are counted.
      scale_rule: See `jaxsem.codecs.hyperprior.HyperpriorConfig`.

    Raises:
      InputError: A size below 1, another number of boundaries than of scales but one, boundaries that do not fall in (0, 1), or
        cells of M that do not divide into positions of a scale or the other way round.
    """

    latent: int = 4
    width: int = 128
    channels: tuple[int, ...] = (32, 32, 32, 32)
    boundaries: tuple[float, ...] = (7 / 8, 3 / 4, 1 / 2)
    condition: int = 64
    hidden: int = 128
    prior: int = 96
    map_stride: int = 8
    pixels: int = 64
    scale_rule: str = "nearest"

    def __post_init__(self) -> None:
        sizes = (self.latent, self.width, self.condition, self.hidden, self.prior, self.map_stride, self.pixels)
        if not self.channels or min(*sizes, *self.channels) < 1:
            raise InputError(f"a codec without scales or with a size below 1 in {self}: every size is at least 1")
        edges = (1.0, *self.boundaries, 0.0)
        if len(self.boundaries) != self.scales - 1 or any(a <= b for a, b in pairwise(edges)):
            raise InputError(
                f"boundaries={self.boundaries} for {self.scales} scales: give one less than scales, falling between 1 and 0"
            )
        if self.map_stride & (self.map_stride - 1):
            raise InputError(f"map_stride={self.map_stride}: grids halve, so it takes a power of two")
        check_scale_rule(self.scale_rule)

    @property
    def scales(self) -> int:
        """How many there are."""
        return len(self.channels)

    @property
    def stride(self) -> int:
        """Positions of z_0 of which the sides must be multiples: those of the coarsest scale and of M."""
        return max(2**self.scales, self.map_stride)

    def stride_of(self, scale: int) -> int:
        """Positions of z_0 along the side of a position of a scale."""
        return 2 ** (scale + 1)


class Frame(NamedTuple):
    """What opens positions of one image.

    Attributes:
      rows: True height of z_0.
      columns: Its true width.
      weight: M, float32 [p, q], over the padded grid.
    """

    rows: int
    columns: int
    weight: np.ndarray


class Hsvlc(nn.Module):
    """The codec, for `jaxsem.slices`. Slice i is scale `scales - 1 - i`: the coarsest comes first.

    Attributes:
      config: Sizes.
      dtype: Of the transforms; priors are float32 or exact.
    """

    config: HsvlcConfig
    dtype: Any = jnp.float32

    serial = False
    exactable = True
    float_networks = (
        "enter",
        "leave",
        "told_",
        "down",
        "head",
        "tail",
        "up",
    )  # decide no table, by how their names begin
    gaussian_from = 0

    def setup(self) -> None:
        """Builds the transforms and the priors, one of each for every scale."""
        c, t, scales = self.config, self.dtype, range(self.config.scales)
        self.enter, self.leave = Conv(c.width, 3, 1, t), Conv(c.latent, 3, 1, t)
        self.told_encoder = [self._teller() for _ in scales]
        self.told_decoder = [self._teller() for _ in scales]
        self.down_block = [SftResidual(c.hidden, t) for _ in scales]
        self.down = [Conv(c.width, 3, 2, t) for _ in scales]
        self.head = [Conv(channels, 1, 1, t) for channels in c.channels]
        self.tail = [Conv(c.width, 1, 1, t) for _ in scales]
        self.up_block = [SftResidual(c.hidden, t) for _ in scales]
        self.up = [Deconv(c.width, 5, t) for _ in scales]
        act = exact.LeakyRelu
        self.seen = [nn.Sequential([Conv(c.prior, 3), act(), Conv(c.prior, 3), act()]) for _ in scales]
        self.guess = [nn.Sequential([Conv(c.prior, 1), act(), Conv(2 * channels, 1)]) for channels in c.channels]
        self.refine = [nn.Sequential([Deconv(c.prior, 5), act()]) for _ in scales[1:]]

    def _teller(self) -> nn.Module:
        c, t = self.config, self.dtype
        return nn.Sequential([Conv(c.condition, 3, 1, t), nn.leaky_relu, Conv(c.condition, 3, 1, t)])

    # -- transforms ---------------------------------------------------------------------------------------------------

    def analyze(self, z: Float[Array, "b h w l"], weight: Float[Array, "b p q"]) -> dict[str, jax.Array]:
        """What is to be rounded: `f_i` of every scale i, float32, the finest first.

        Args:
          z: z_0, of variance about 1; sides multiples of the config's `stride`.
          weight: M in [0, 1], one value for each `map_stride` x `map_stride` positions.
        """
        x, latents = self.enter(z), {}
        for i in range(self.config.scales):
            told = self.told_encoder[i](self._map_at(weight, self.config.stride_of(i) // 2))
            x = self.down[i](self.down_block[i](x, told))
            latents[f"f_{i}"] = self.head[i](x).astype(jnp.float32)
        return latents

    def synthesize(self, values: dict[str, jax.Array], weight: Float[Array, "b p q"]) -> Float[Array, "b h w l"]:
        """ẑ_0, float32, from the decoded values of every scale and M."""
        x = 0.0
        for i in reversed(range(self.config.scales)):
            x = x + self.tail[i](values[f"f_{i}"])
            told = self.told_decoder[i](self._map_at(weight, self.config.stride_of(i)))
            x = self.up[i](self.up_block[i](x, told))
        return self.leave(x).astype(jnp.float32)

    def _map_at(self, weight: Float[Array, "b p q"], stride: int) -> Float[Array, "b h w 1"]:
        """M on the grid of positions that are `stride` apart: repeated, or the mean."""
        weight, cell = weight[..., None], self.config.map_stride
        return repeated(weight, cell // stride) if stride <= cell else pooled(weight, stride // cell)

    # -- slices -------------------------------------------------------------------------------------------------------

    @property
    def slices(self) -> int:
        """One for each scale."""
        return self.config.scales

    def scale_of(self, i: int) -> int:
        """The scale that slice i codes."""
        return self.config.scales - 1 - i

    def is_open(self, scale: int, weight: Float[Array, "b p q"] | np.ndarray) -> Any:
        """Which positions of a scale are coded, bool [b, h, w, 1]; NumPy maps stay NumPy.

        Where a position covers several cells of M, the largest decides: a referred object loses nothing to its neighbours.
        """
        xp = np if isinstance(weight, np.ndarray) else jnp
        stride, cell = self.config.stride_of(scale), self.config.map_stride
        weight = weight[..., None]
        if stride > cell:
            b, p, q, _ = weight.shape
            factor = stride // cell
            weight = weight.reshape(b, p // factor, factor, q // factor, factor, 1).max(axis=(2, 4))
        else:
            weight = xp.repeat(xp.repeat(weight, cell // stride, axis=1), cell // stride, axis=2)
        if scale == self.config.scales - 1:
            return xp.ones(weight.shape, bool)
        return weight > self.config.boundaries[scale]

    def inside(self, i: int, grid: tuple[int, int], frame: Frame) -> np.ndarray:
        """Which positions of slice i are coded, bool [1, h, w, 1]: those that are open and not padding."""
        scale = self.scale_of(i)
        stride = self.config.stride_of(scale)
        rows, columns = (
            np.arange(n * self.config.stride // stride) * stride < side
            for n, side in zip(grid, (frame.rows, frame.columns), strict=True)
        )
        return self.is_open(scale, frame.weight[None]) & (rows[:, None] & columns)[None, :, :, None]

    def grid_of(self, latents: dict[str, jax.Array]) -> tuple[int, int]:
        """Height and width of z_0 in units of the config's `stride`."""
        rows, columns = latents["f_0"].shape[1:3]
        return tuple(n * self.config.stride_of(0) // self.config.stride for n in (rows, columns))

    def opened(self, i: int, weight: Float[Array, "b p q"]) -> jax.Array:
        """Which positions of slice i M opens, bool [b, h, w, 1]."""
        return self.is_open(self.scale_of(i), weight)

    def begin(self, batch: int, grid: tuple[int, int], weight: Float[Array, "b p q"]) -> State:
        """The state before anything is decoded; `grid` is the height and width of z_0 in units of the config's `stride`."""
        values = {}
        for i, channels in enumerate(self.config.channels):
            sides = (n * self.config.stride // self.config.stride_of(i) for n in grid)
            values[f"f_{i}"] = jnp.zeros((batch, *sides, channels))
        return {"weight": weight, "features": self._features(self.scale_of(0), weight), **values}

    def _features(self, scale: int, weight: jax.Array, coarser: jax.Array | None = None) -> jax.Array:
        """What is known at a scale before it is coded: M, and what was found at coarser scales."""
        known = self._map_at(weight, self.config.stride_of(scale))
        if coarser is not None:
            known = jnp.concatenate([known, self.refine[scale](coarser)], axis=-1)
        return self.seen[scale](known)

    def predict(self, i: int, state: State) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of every symbol of slice i: its integer table, its mean, and its scale."""
        scale, mean = self.prediction(i, state)
        return self.table_of(scale), mean, scale

    def prediction(self, i: int, state: State) -> tuple[jax.Array, jax.Array]:
        """Scale and mean of slice i, the mean on its grid where there is one."""
        spread, mean = jnp.split(self.guess[self.scale_of(i)](state["features"]), 2, axis=-1)
        if self.has_variable(exact.COLLECTION, "mean"):
            mean = exact.snap(mean, self.get_variable(exact.COLLECTION, "mean"), _MEAN_LIMIT)
        return spread, mean

    def table_of(self, scale: jax.Array) -> jax.Array:
        """The Gaussian table, int32, of each scale."""
        thresholds = jnp.asarray(SCALE_THRESHOLDS[self.config.scale_rule], jnp.float32)
        if self.has_variable(exact.COLLECTION, "thresholds"):
            thresholds = self.get_variable(exact.COLLECTION, "thresholds")
        return jnp.searchsorted(thresholds, scale, method="compare_all").astype(jnp.int32)

    def values_of(self, i: int, latents: dict[str, jax.Array]) -> jax.Array:
        """The part of the latents that slice i codes."""
        return latents[f"f_{self.scale_of(i)}"]

    def likelihood_of(self, i: int, values: jax.Array, mean: jax.Array, scale: jax.Array) -> jax.Array:
        """The model's own probability of rounded values: the estimate beside the real bytes."""
        return gaussian_likelihood(values, mean, scale)

    def place(self, i: int, state: State, values: jax.Array) -> State:
        """The state after slice i, whose decoded values are the means where nothing is coded."""
        scale = self.scale_of(i)
        state = {**state, f"f_{scale}": values}
        if scale:
            coarser = jnp.concatenate([state["features"], values], axis=-1)
            state["features"] = self._features(scale - 1, state["weight"], coarser)
        return state

    # -- training -----------------------------------------------------------------------------------------------------

    def __call__(
        self, z: Float[Array, "b h w l"], weight: Float[Array, "b p q"], rng: PRNGKeyArray | None = None
    ) -> dict[str, jax.Array]:
        """The forward pass of training (with `rng`) or of evaluation (without).

        Args:
          z: z_0 [b, h, w, latent].
          weight: M [b, h / map_stride, w / map_stride], in [0, 1].
          rng: Key of the rounding noise; None rounds.

        Returns:
          `z_hat` [b, h, w, latent]; `bits` [b, scales], the finest first; and the decoded `f_i`.
        """
        latents = self.analyze(z, weight)
        stride = self.config.stride
        state = self.begin(z.shape[0], (z.shape[1] // stride, z.shape[2] // stride), weight)
        bits = {}
        for i in range(self.slices):
            scale = self.scale_of(i)
            spread, mean = self.prediction(i, state)
            key = None if rng is None else jax.random.fold_in(rng, i)
            noisy, rounded = quantize.mixed(self.values_of(i, latents), mean, key)
            opened = self.is_open(scale, weight)
            cost = -jnp.log2(gaussian_likelihood(noisy, mean, spread))
            bits[scale] = jnp.where(opened, cost, 0.0).sum(axis=(1, 2, 3))
            state = self.place(i, state, jnp.where(opened, rounded, mean))
        values = {name: state[name] for name in latents}
        all_bits = jnp.stack([bits[scale] for scale in range(self.slices)], axis=1)
        return {"z_hat": self.synthesize(values, weight), "bits": all_bits, **values}


def lambda_of(weight: jax.Array) -> jax.Array:
    """The weight of the distortion at M: 0.01 exp(7 M); papers/5, section III.A."""
    return 0.01 * jnp.exp(7.0 * weight)
