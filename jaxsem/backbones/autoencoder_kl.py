"""The autoencoder of latent diffusion: images to Gaussians over latents of an eighth of the side, and latents to images.

```
images [b, h, w, 3] ─ encoder ─ quant ─▶ mean, logvar [b, h/8, w/8, 4]     z ─ post_quant ─ decoder ─▶ images [b, h, w, 3]
```

    net = AutoencoderKl(SD_VAE)
    mean, logvar = net.apply(variables, images, method="encode")
    latents = SD_VAE.scale(mean)                                               # what a diffusion model takes
    images = net.apply(variables, SD_VAE.unscale(latents), method="decode")

Images have values in [-1, 1]; what is decoded may exceed that a little.

Source: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models (CVPR 2022), appendix G, and the
implementation in diffusers, with whose weights this one agrees.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsem.backbones.diffusers_config import MOST_LAYERS, Fields
from jaxsem.errors import InputError
from jaxsem.nn.attention import MultiHeadAttention
from jaxsem.nn.diffusion import DownStage, GroupNorm, Head, Stage, Typed, UpStage, conv3x3, dense

_EPSILON = 1e-6
_LOGVAR_RANGE = -30.0, 20.0

# What changes the result, and the only value of it that is known.
_FIXED = {"act_fn": "silu", "latents_mean": None, "latents_std": None}


@dataclass(frozen=True)
class AutoencoderKlConfig:
    """Sizes of an autoencoder.

    Attributes:
      channels: Of an image.
      latent_channels: Of a latent.
      widths: Channels at each level; all but the last one halve the grid.
      layers: ResNet blocks at each level of the encoder; the decoder has one more.
      groups: Of the normalisations; divides the widths.
      scaling_factor: What latents are multiplied with for a diffusion model, after
      shift_factor: is taken away from them.
      quant: Whether there is a 1x1 convolution after the encoder.
      post_quant: Whether there is one before the decoder.
      middle_attention: Whether positions attend to each other at the coarsest level.

    Raises:
      InputError: A size below 1, groups that do not divide a width, or a scaling factor that is not above 0.
    """

    channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    quant: bool = True
    post_quant: bool = True
    middle_attention: bool = True

    def __post_init__(self) -> None:
        if not self.widths or min(*self.widths, self.channels, self.latent_channels, self.layers, self.groups) < 1:
            raise InputError(f"an autoencoder with no level or a size below 1 in {self}: every size is at least 1")
        if any(width % self.groups for width in self.widths):
            raise InputError(
                f"widths of {list(self.widths)} cannot be split into {self.groups} groups: choose multiples of it"
            )
        if not self.scaling_factor > 0:
            raise InputError(f"a scaling_factor of {self.scaling_factor}: it takes a number above 0")

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "AutoencoderKlConfig":
        """The sizes in a `config.json` of diffusers.

        Fields that are absent have diffusers' defaults.

        Raises:
          InputError: It is no config of an AutoencoderKL, or holds values that this one cannot have.
        """
        read = Fields(fields, "AutoencoderKL")
        read.only(_FIXED, "this is the autoencoder of Stable Diffusion and FLUX")
        widths = read.counts("block_out_channels", (64,))
        for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            read.kinds(key, (kind,), {kind: True}, len(widths))
        channels = read.count("in_channels", 3)
        if (found := read.count("out_channels", 3)) != channels:
            raise InputError(f"it has in_channels={channels} and out_channels={found}, and only equal ones are known")
        return cls(
            channels=channels,
            latent_channels=read.count("latent_channels", 4),
            widths=widths,
            layers=read.count("layers_per_block", 1, MOST_LAYERS),
            groups=read.count("norm_num_groups", 32),
            scaling_factor=read.number("scaling_factor", 0.18215),
            shift_factor=read.number("shift_factor", 0.0),
            quant=read.flag("use_quant_conv", True),
            post_quant=read.flag("use_post_quant_conv", True),
            middle_attention=read.flag("mid_block_add_attention", True),
        )

    @property
    def stride(self) -> int:
        """Pixels along the side of a position of a latent."""
        return 2 ** (len(self.widths) - 1)

    def scale(self, latents: jax.Array) -> jax.Array:
        """Latents as a diffusion model takes them, about of variance 1, from those of `AutoencoderKl`."""
        return (latents - self.shift_factor) * self.scaling_factor

    def unscale(self, latents: jax.Array) -> jax.Array:
        """The inverse of `scale`."""
        return latents / self.scaling_factor + self.shift_factor


# -- parts ------------------------------------------------------------------------------------------------------------


class SpatialAttention(Typed):
    """x + attention(norm(x)) of one head as wide as x, the positions by rows as tokens."""

    groups: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Maps features to the same shape."""
        y = GroupNorm(self.groups, epsilon=_EPSILON, name="norm", **self.types)(x)
        tokens = y.reshape(len(x), -1, x.shape[-1])
        return x + MultiHeadAttention(1, name="attention", **self.types)(tokens).reshape(x.shape)


class Middle(Stage):
    """The stage at the coarsest grid.

    Attributes:
      attention: Whether positions attend to each other.
    """

    attention: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Maps features to the same shape."""
        x = self.resnet(0)(x)
        if self.attention:
            block = nn.remat(SpatialAttention) if self.remat else SpatialAttention
            x = block(self.groups, name="attention", **self.types)(x)
        return self.resnet(1)(x)


class Coder(Typed):
    """What encoder and decoder share: the config, and whether each block is recomputed in the backward pass."""

    config: AutoencoderKlConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    @property
    def stage(self) -> dict[str, Any]:
        """What all stages are made with."""
        return {"groups": self.config.groups, "epsilon": _EPSILON, "remat": self.remat, **self.types}

    def middle(self) -> Middle:
        """The stage between; call it while the coder runs."""
        c = self.config
        return Middle(c.widths[-1], attention=c.middle_attention, name="middle", **self.stage)

    def out(self, features: int) -> Head:
        """What ends the coder; call it while the coder runs."""
        return Head(features, self.config.groups, _EPSILON, name="out", **self.types)


class Encoder(Coder):
    """Images to means and logarithms of variances, concatenated."""

    @nn.compact
    def __call__(self, images: Float[Array, "b h w channels"]) -> Float[Array, "b h/s w/s l*2"]:
        """Encodes."""
        c = self.config
        x = conv3x3(c.widths[0], "conv_in", **self.types)(images)
        for i, width in enumerate(c.widths):
            halve = (0, 1) if i < len(c.widths) - 1 else None
            x = DownStage(width, c.layers, downsample=halve, name=f"down_{i}", **self.stage)(x)[-1]
        return self.out(2 * c.latent_channels)(self.middle()(x))


class Decoder(Coder):
    """Latents to images; its first stage is the coarsest."""

    @nn.compact
    def __call__(self, latents: Float[Array, "b h w l"]) -> Float[Array, "b h*s w*s channels"]:
        """Decodes."""
        c = self.config
        x = self.middle()(conv3x3(c.widths[-1], "conv_in", **self.types)(latents))
        for i, width in enumerate(reversed(c.widths)):
            double = i < len(c.widths) - 1
            x = UpStage(width, c.layers + 1, upsample=double, name=f"up_{i}", **self.stage)(x)
        return self.out(c.channels)(x)


# -- the model --------------------------------------------------------------------------------------------------------


class AutoencoderKl(Typed):
    """The autoencoder.

    Attributes:
      config: Sizes.
      dtype: Of the computation; what comes out is float32 all the same.
      param_dtype: Of the parameters.
      remat: Whether to recompute each block in the backward pass: less memory, more time.
    """

    config: AutoencoderKlConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Declares the parts."""
        c, fields = self.config, (self.config, self.dtype, self.param_dtype, self.remat)
        self.encoder, self.decoder = Encoder(*fields), Decoder(*fields)
        if c.quant:
            self.quant = dense(2 * c.latent_channels, **self.types)
        if c.post_quant:
            self.post_quant = dense(c.latent_channels, **self.types)

    def __call__(self, images: Float[Array, "b h w channels"]) -> Float[Array, "b h w channels"]:
        """Images from the means of images."""
        return self.decode(self.encode(images)[0])

    def encode(self, images: Float[Array, "b h w channels"]) -> tuple[Float[Array, "b p q l"], Float[Array, "b p q l"]]:
        """The Gaussians over an image's latents, not scaled.

        Args:
          images: With values in [-1, 1], and sides that are multiples of the config's `stride`.

        Returns:
          Means, and logarithms of variances in [-30, 20], [b, h / stride, w / stride, latent_channels].

        Raises:
          InputError: Images of another shape, or integers.
        """
        c = self.config
        if _is_unfit(images, c.channels) or any(side % c.stride for side in images.shape[1:3]):
            raise InputError(
                f"this autoencoder takes images [batch, h, w, {c.channels}], floats in [-1, 1] with sides that are multiples of "
                f"{c.stride}, not {images.dtype} of shape {list(images.shape)}: pad them"
            )
        moments = self.encoder(images)
        moments = (self.quant(moments) if c.quant else moments).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *_LOGVAR_RANGE)

    def decode(self, latents: Float[Array, "b p q l"]) -> Float[Array, "b h w channels"]:
        """Images of latents, which are not scaled.

        Raises:
          InputError: Latents of another shape, or integers.
        """
        c = self.config
        if _is_unfit(latents, c.latent_channels):
            raise InputError(
                f"this autoencoder takes latents [batch, h, w, {c.latent_channels}], floats, not {latents.dtype} of shape "
                f"{list(latents.shape)}"
            )
        return self.decoder(self.post_quant(latents) if c.post_quant else latents).astype(jnp.float32)


def _is_unfit(x: jax.Array, channels: int) -> bool:
    return x.ndim != 4 or x.shape[-1] != channels or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating)


def param_shapes(module: AutoencoderKl) -> dict[str, Any]:
    """Shapes and types of the parameters, without memory or arithmetic."""
    side = module.config.stride
    images = jax.ShapeDtypeStruct((1, side, side, module.config.channels), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), images)["params"]


# -- published models -------------------------------------------------------------------------------------------------

SD_VAE = AutoencoderKlConfig()  # of Stable Diffusion 1.x and 2.x
FLUX_VAE = AutoencoderKlConfig(
    latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, quant=False, post_quant=False
)

CONFIGS = {"sd": SD_VAE, "flux": FLUX_VAE}
