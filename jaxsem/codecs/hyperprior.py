r"""The mean-scale hyperprior codec, and the frame that every hyperprior codec of the house fills in.

    x --g_a--> y --round(y - mean)--> symbols --+ mean--> y_hat --g_s--> x_hat
               |                         ^
              h_a                  (mean, scale)
               v                         |
               z --round(z - median)--> z_hat --h_s--> psi --slices of y, one after the other

Source: Minnen, Balle and Toderici, Joint Autoregressive and Hierarchical Priors (NeurIPS 2018), without the
autoregressive part (`mbt2018-mean` in the published zoo). `x` is in [0, 1].

Beyond the paper, `lambdas` in the config makes one set of weights serve several rates: each quality scales every channel of
y and z by learned gains before rounding, and back after it (Cui et al., Asymmetric Gained Deep Image Compression, CVPR
2021). Gains are kept as logarithms and interpolated between neighbouring qualities, so a quality may be any number in
[0, len(lambdas) - 1].
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsem import quantize, shapes
from jaxsem.entropy.tables import scale_thresholds
from jaxsem.errors import InputError
from jaxsem.nn import exact
from jaxsem.nn.conv import Conv, Deconv
from jaxsem.nn.gdn import GDN
from jaxsem.nn.priors import FactorizedPrior, gaussian_likelihood

# Tables of a codec: the Gaussians by scale, then one for each channel of z.
SCALE_THRESHOLDS = {rule: scale_thresholds(rule=rule) for rule in ("nearest", "above")}
GAUSSIAN_TABLES = len(SCALE_THRESHOLDS["nearest"]) + 1
QUALITY_STEPS = 16  # of a quality, as packets hold it and exact gains are tabulated
Y_STRIDE = 16  # pixels between neighbours of y
_CELL = shapes.STRIDE
_MEAN_LIMIT = 1 << 20  # in units of the grid of means

Latents = dict[str, jax.Array]
State = dict[str, jax.Array]


def check_scale_rule(rule: str) -> None:
    """Refuses a rule for scales that is not in `SCALE_THRESHOLDS`."""
    if rule not in SCALE_THRESHOLDS:
        raise InputError(f"the rule for scales is {' or '.join(map(repr, SCALE_THRESHOLDS))}, not {rule!r}")


@dataclass(frozen=True)
class HyperpriorConfig:
    """Widths of the mean-scale hyperprior.

    Attributes:
      channels: N, width of the transforms and of the hyper-latent.
      latent: M, channels of y.
      lambdas: Weight of the distortion 255^2 MSE for each quality of a variable-rate model; empty for a single rate.
      scale_rule: Which table codes a scale: the "nearest" in the logarithm, or the next "above" it (CompressAI's).

    Raises:
      InputError: The rule for scales is unknown.
    """

    channels: int = 128
    latent: int = 192
    lambdas: tuple[float, ...] = ()
    scale_rule: str = "nearest"

    def __post_init__(self) -> None:
        check_scale_rule(self.scale_rule)

    @property
    def hyper(self) -> int:
        """Channels of the hyper-latent z."""
        return self.channels


class Gains(nn.Module):
    """Per-quality, per-channel gains before rounding and after it, as logarithms."""

    qualities: int
    channels: int

    def setup(self) -> None:
        """Makes the two tables; a gain of 1 everywhere to begin with."""
        shape = (self.qualities, self.channels)
        self.forward = self.param("forward", nn.initializers.zeros, shape)
        self.inverse = self.param("inverse", nn.initializers.zeros, shape)

    def __call__(self, x: jax.Array, quality: jax.Array, inverse: bool = False) -> jax.Array:
        """Scales [b, h, w, c] by the gains of `quality` [b], a real number in [0, qualities - 1]."""
        if inverse and self.has_variable(exact.COLLECTION, "inverse"):
            table = self.get_variable(exact.COLLECTION, "inverse")
            return x * table[(quality * QUALITY_STEPS).astype(jnp.int32)][:, None, None, :]
        return x * self.at(quality, inverse)[:, None, None, :]

    def at(self, quality: jax.Array, inverse: bool) -> jax.Array:
        """The gains [b, c] at qualities [b]."""
        table = self.inverse if inverse else self.forward
        low = jnp.clip(jnp.floor(quality), 0, max(self.qualities - 2, 0)).astype(jnp.int32)
        weight = (quality - low)[:, None]
        return jnp.exp((1 - weight) * table[low] + weight * table[jnp.minimum(low + 1, self.qualities - 1)])


def gdn_transforms(channels: int, latent: int, dtype: Any) -> tuple[nn.Sequential, nn.Sequential]:
    """g_a and g_s of Balle et al. (ICLR 2018) and after: four layers of stride 2, GDN between them."""
    wide = [layer for _ in range(3) for layer in (Conv(channels, 5, 2, dtype), GDN(dtype=dtype))]
    analysis = nn.Sequential([*wide, Conv(latent, 5, 2, dtype)])
    wide = [layer for _ in range(3) for layer in (Deconv(channels, 5, dtype), GDN(True, dtype))]
    return analysis, nn.Sequential([*wide, Deconv(3, 5, dtype)])


class HyperpriorCodec(nn.Module):
    """The frame: transforms, hyper path, gains, and y coded in one or several slices after z.

    A subclass sets `g_a, g_s, h_a, h_s` in `transforms()`, and says how y is cut into slices: `y_slices`, `pick`,
    `place_y` and `predict_y`. The slice driver sees z as slice 0.
    """

    config: Any
    dtype: Any = jnp.float32
    serial = False  # whether y is coded position by position: see `jaxsem.codecs.serial`
    exactable = True  # whether its slices can be computed in exact arithmetic: see `jaxsem.nn.exact`
    float_networks = ("g_a", "g_s", "h_a")  # decide no table: what a decoder's slices do not run
    gaussian_from = 1  # the slices before it have tables of their own

    def setup(self) -> None:
        """Builds all parts."""
        self.transforms()
        self.entropy_bottleneck = FactorizedPrior(self.config.hyper)
        if self.config.lambdas:
            self.gain_y = Gains(len(self.config.lambdas), self.config.latent)
            self.gain_z = Gains(len(self.config.lambdas), self.config.hyper)

    # -- to be given by a subclass --------------------------------------------------------------------------------

    def transforms(self) -> None:
        """Builds g_a, g_s, h_a and h_s."""
        cfg, t = self.config, self.dtype
        n, m = cfg.channels, cfg.latent
        self.g_a, self.g_s = gdn_transforms(n, m, t)
        act = exact.LeakyRelu
        self.h_a = nn.Sequential([Conv(n, 3, 1, t), act(), Conv(n, 5, 2, t), act(), Conv(n, 5, 2, t)])
        self.h_s = nn.Sequential([Deconv(m, 5, t), act(), Deconv(m * 3 // 2, 5, t), act(), Conv(2 * m, 3, 1, t)])

    @property
    def y_slices(self) -> int:
        """Number of slices of y."""
        return 1

    @property
    def z_stride(self) -> int:
        """Pixels between neighbours of z, the latent under the factorised prior."""
        return _CELL

    def channels_of(self, i: int) -> tuple[int, int]:
        """First and past-last channel of y that slice i codes."""
        return 0, self.config.latent

    def positions_of(self, i: int, grid: jax.Array) -> jax.Array:
        """The positions of a map [b, h, w, c] on y's grid that slice i codes, as a smaller map; NumPy maps stay NumPy."""
        return grid

    def pick(self, i: int, y: jax.Array) -> jax.Array:
        """The part of y [b, h, w, m] that slice i codes."""
        low, high = self.channels_of(i)
        return self.positions_of(i, y[..., low:high])

    def place_y(self, i: int, state: State, values: jax.Array) -> State:
        """The state with the decoded values of slice i in `y_hat`, and whatever the next slice needs computed from them."""
        return {**state, "y_hat": values}

    def predict_y(self, i: int, state: State) -> tuple[jax.Array, jax.Array]:
        """Scale and mean of slice i from the state: `psi`, `y_hat` as decoded so far, and what `place_y` left."""
        scale, mean = jnp.split(state["psi"], 2, axis=-1)
        return scale, mean

    def known(self, y: jax.Array, rng: jax.Array | None) -> jax.Array:
        """What `predict_y` finds in `y_hat` before the first slice, in the forward pass: nothing."""
        return jnp.zeros_like(y)

    # -- the frame ------------------------------------------------------------------------------------------------

    def analysis(self, x: jax.Array, quality: jax.Array) -> jax.Array:
        """Y [b, h/16, w/16, m] of images [b, h, w, 3] in [0, 1], h and w multiples of 64, at qualities [b]."""
        y = self.g_a(x).astype(jnp.float32)
        return self.gain_y(y, quality) if self.config.lambdas else y

    def hyper_analysis(self, y: jax.Array, quality: jax.Array) -> jax.Array:
        """Z [b, h/64, w/64, n] of y."""
        z = self.h_a(y).astype(jnp.float32)
        return self.gain_z(z, quality) if self.config.lambdas else z

    def analyze(self, x: jax.Array, quality: jax.Array) -> Latents:
        """Latents of images, ready to be rounded: `y` by `analysis` and `z` by `hyper_analysis`, float32."""
        y = self.analysis(x, quality)
        return {"y": y, "z": self.hyper_analysis(y, quality)}

    def hyper_synthesis(self, z_hat: jax.Array, quality: jax.Array) -> jax.Array:
        """Psi = h_s(z_hat), on the grid of y."""
        if self.config.lambdas:
            z_hat = self.gain_z(z_hat, quality, inverse=True)
        return self.h_s(z_hat).astype(jnp.float32)

    def synthesize(self, y_hat: jax.Array, quality: jax.Array) -> jax.Array:
        """Images [b, 16 h, 16 w, 3] about [0, 1], not clipped, from y_hat [b, h, w, m]."""
        return self.g_s(self.without_gains(y_hat, quality)).astype(jnp.float32)

    def without_gains(self, y_hat: jax.Array, quality: jax.Array) -> jax.Array:
        """Y_hat [b, h, w, m] in the units that g_a gives and g_s takes, alike at all qualities."""
        return self.gain_y(y_hat, quality, inverse=True) if self.config.lambdas else y_hat

    def median(self) -> jax.Array:
        """Medians of z [n], on the grid of means where there is one."""
        return self._on_grid(self.entropy_bottleneck.median())

    def prediction(self, i: int, state: State) -> tuple[jax.Array, jax.Array]:
        """Scale and mean of slice i of y, the mean on its grid where there is one."""
        scale, mean = self.predict_y(i, state)
        return scale, self._on_grid(mean)

    def _on_grid(self, mean: jax.Array) -> jax.Array:
        if not self.has_variable(exact.COLLECTION, "mean"):
            return mean
        return exact.snap(mean, self.get_variable(exact.COLLECTION, "mean"), _MEAN_LIMIT)

    def quantile_loss(self) -> jax.Array:
        """The auxiliary loss of the factorised prior's quantiles."""
        return self.entropy_bottleneck.quantile_loss()

    def __call__(self, x: jax.Array, quality: jax.Array, rng: jax.Array | None = None) -> dict[str, jax.Array]:
        """The forward pass of training (with `rng`) or of evaluation (without).

        Args:
          x: [b, h, w, 3] in [0, 1].
          quality: [b].
          rng: Key of the rounding noise; `None` rounds.

        Returns:
          `x_hat` [b, h, w, 3]; `bits_y`, `bits_z` [b]: estimated bits an image; `y_hat` and `z_hat`.
        """
        rng_z, rng_y = (None, None) if rng is None else jax.random.split(rng)
        latents = self.analyze(x, quality)
        median = self.median()
        noisy, z_hat = quantize.mixed(latents["z"], median, rng_z)
        bits_z = _bits(self.entropy_bottleneck(noisy))
        state = self.place(0, {"quality": quality, "y_hat": self.known(latents["y"], rng_y)}, z_hat)
        bits_y = jnp.zeros(x.shape[0])
        for i in range(self.y_slices):
            scale, mean = self.prediction(i, state)
            key = None if rng is None else jax.random.fold_in(rng_y, i)
            noisy, rounded = quantize.mixed(self.pick(i, latents["y"]), mean, key)
            bits_y += _bits(gaussian_likelihood(noisy, mean, scale))
            state = self.place_y(i, state, rounded)
        x_hat = self.synthesize(state["y_hat"], quality)
        return {"x_hat": x_hat, "bits_y": bits_y, "bits_z": bits_z, "y_hat": state["y_hat"], "z_hat": z_hat}

    # -- the slice driver's view: z is slice 0, y follows ------------------------------------------------------------

    @property
    def slices(self) -> int:
        """Number of slices of the whole latent."""
        return 1 + self.y_slices

    @staticmethod
    def grid_of(latents: Latents) -> tuple[int, int]:
        """Height and width, in cells of 64 pixels, of the images that latents belong to."""
        height, width = latents["y"].shape[1:3]
        return height * Y_STRIDE // _CELL, width * Y_STRIDE // _CELL

    @staticmethod
    def opened(i: int, quality: jax.Array) -> bool:
        """Which positions of slice i are coded, as far as both sides know before: all."""
        return True

    def begin(self, batch: int, grid: tuple[int, int], quality: jax.Array) -> State:
        """The state before anything is decoded; `grid` is the height and width of the images in cells of 64 pixels."""

        def zeros(stride: int, channels: int) -> jax.Array:
            return jnp.zeros((batch, *(n * _CELL // stride for n in grid), channels))

        z_hat, y_hat = zeros(self.z_stride, self.config.hyper), zeros(Y_STRIDE, self.config.latent)
        return {"quality": quality, "z_hat": z_hat, "y_hat": y_hat}

    def predict(self, i: int, state: State) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of every symbol of slice i: its integer table, its mean, and its scale (0 for z, whose tables need none)."""
        if i == 0:
            shape = state["z_hat"].shape
            table = jnp.broadcast_to(GAUSSIAN_TABLES + jnp.arange(self.config.hyper, dtype=jnp.int32), shape)
            return table, jnp.broadcast_to(self.median(), shape), jnp.zeros(shape)
        scale, mean = self.prediction(i - 1, state)
        return self.table_of(scale), mean, scale

    def table_of(self, scale: jax.Array) -> jax.Array:
        """The Gaussian table, int32, of each scale."""
        thresholds = jnp.asarray(SCALE_THRESHOLDS[self.config.scale_rule], jnp.float32)
        if self.has_variable(exact.COLLECTION, "thresholds"):
            thresholds = self.get_variable(exact.COLLECTION, "thresholds")
        return jnp.searchsorted(thresholds, scale, method="compare_all").astype(jnp.int32)

    def values_of(self, i: int, latents: Latents) -> jax.Array:
        """The part of the latents that slice i codes."""
        return latents["z"] if i == 0 else self.pick(i - 1, latents["y"])

    def inside(self, i: int, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        """Which positions of slice i belong to an image of true `size` (height, width), not to its padding: host, [1, h, w, 1]."""
        stride = self.z_stride if i == 0 else Y_STRIDE
        rows, columns = (
            np.arange(n * _CELL // stride) < -(-side // stride) for n, side in zip(grid, size, strict=True)
        )
        mask = (rows[:, None] & columns[None, :])[None, :, :, None]
        return mask if i == 0 else self.positions_of(i - 1, mask)

    def likelihood_of(self, i: int, values: jax.Array, mean: jax.Array, scale: jax.Array) -> jax.Array:
        """The model's own probability of rounded values of slice i: the estimate beside the real bytes."""
        return self.entropy_bottleneck(values) if i == 0 else gaussian_likelihood(values, mean, scale)

    def place(self, i: int, state: State, values: jax.Array) -> State:
        """The state after slice i."""
        if i == 0:
            return {**state, "z_hat": values, "psi": self.hyper_synthesis(values, state["quality"])}
        return self.place_y(i - 1, state, values)


class MeanScaleHyperprior(HyperpriorCodec):
    """`mbt2018-mean`: GDN transforms, one Gaussian slice."""


def _bits(likelihood: jax.Array) -> jax.Array:
    """Bits of each image of a batch."""
    return -jnp.log2(likelihood).sum(axis=tuple(range(1, likelihood.ndim)))
