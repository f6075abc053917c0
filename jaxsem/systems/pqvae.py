r"""PQVAE-shared: an image's CLIP feature as a few hundred bits.

    feature --encoder--> 5 x 5 x channels --cut--> n sub-vectors --nearest codeword--> n indices
                                                                                          |
    feature_hat <--decoder-- 5 x 5 x channels <--join-- n codewords <--look up in the shared codebook

The feature is made unit, the latent is unit over the channels of each of its 25 positions, and so is what the decoder
gives. The latent is flattened channels last and then cut, so a sub-vector may straddle two positions: its width must
divide 25 * channels, not the channels.

Source: Shen et al., Compression beyond pixels: semantic compression with multimodal foundation models, sections 3.1 to
3.3, and the authors' released class for what the paper leaves open: layers, means instead of sums in the loss, and where
vectors are normalised.
"""

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsem import quantize
from jaxsem.errors import InputError
from jaxsem.nn.conv import kernel_init
from jaxsem.nn.ops import unit

GRID = 5  # rows and columns of the latent


@dataclass(frozen=True)
class PqvaeConfig:
    """Sizes of PQVAE-shared and the weights of its loss; the defaults are the released `dim_16 size_4`.

    Attributes:
      width: Width of the features (CLIP ViT-L/14: 768, ViT-B/32: 512).
      channels: Channels of the latent.
      hidden: Channels of the 3x3 and of the 5x5 stage of the encoder; the decoder mirrors them.
      residual: Channels inside a residual layer.
      residual_layers: Residual layers of the encoder and of the decoder.
      codeword: Width of a sub-vector; it divides 25 * channels.
      codebook: Codewords in the one shared codebook, at least 2.
      cosine_weight: Weight of 1 - cosine similarity.
      codebook_weight: Weight of the term that moves the codewords.
      commitment_weight: Weight of the term that moves the latent.

    Raises:
      InputError: A size below its least, a codeword that does not divide, or a weight that is negative or not finite.
    """

    width: int = 768
    channels: int = 128
    hidden: tuple[int, int] = (512, 256)
    residual: int = 128
    residual_layers: int = 3
    codeword: int = 16
    codebook: int = 4
    cosine_weight: float = 10.0
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25

    def __post_init__(self) -> None:
        if len(self.hidden) != 2:
            raise InputError(f"hidden is two widths, of the 3x3 and of the 5x5 stage, not {self.hidden}")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} is at least {least}, not {getattr(self, name)}")
        if min(self.hidden) < 1:
            raise InputError(f"both widths of hidden are at least 1, not {self.hidden}")
        if self.latent_size % self.codeword:
            raise InputError(
                f"sub-vectors of {self.codeword} do not divide a latent of {GRID}*{GRID}*{self.channels} = "
                f"{self.latent_size} numbers: choose a divisor of it"
            )
        for name in ("cosine_weight", "codebook_weight", "commitment_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is a finite number of at least 0, not {value}")

    @property
    def latent_size(self) -> int:
        """Numbers in the latent of one image."""
        return GRID * GRID * self.channels

    @property
    def codewords(self) -> int:
        """n, indices of one image."""
        return self.latent_size // self.codeword


_LEAST = {"width": 1, "channels": 1, "residual": 1, "residual_layers": 0, "codeword": 1, "codebook": 2}

RELEASED = PqvaeConfig()
"""The authors' training script: alpha = 10 weighs the cosine term, beta = 0.25 the commitment."""

PAPER = PqvaeConfig(cosine_weight=1.0, codebook_weight=10.0)
"""Equation 7 as printed: alpha weighs the codebook term. The paper gives no values; alpha and beta are the script's."""


def bits_per_image(config: PqvaeConfig) -> float:
    """Bits of one image's indices before entropy coding, n log2 k (400 for 16 x 4)."""
    return config.codewords * math.log2(config.codebook)


def bits_per_dimension(config: PqvaeConfig) -> float:
    """Bits before entropy coding for each number of the feature, the paper's bpd (0.52 for 16 x 4)."""
    return bits_per_image(config) / config.width


class ResidualStack(nn.Module):
    """Layers x + conv1(relu(conv3(relu(x)))), each followed by a ReLU, all of the same width."""

    layers: int
    residual: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, c] to the same shape."""
        for i in range(self.layers):
            y = _conv(self.residual, f"conv3_{i}", self.dtype, use_bias=False)(nn.relu(x))
            y = _conv(x.shape[-1], f"conv1_{i}", self.dtype, size=1, use_bias=False)(nn.relu(y))
            x = nn.relu(x + y)
        return x


class Encoder(nn.Module):
    """Spreads a feature over the grid: 1x1 to 3x3 to 5x5 by transposed convolutions of stride 2."""

    config: PqvaeConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Maps unit features [b, width] to a latent [b, 5, 5, channels], not yet unit."""
        c = self.config
        # A transposed convolution of stride s is one over its input with s - 1 zeros between the samples. Torch's
        # padding p is kernel - 1 - p here: 0 there is 2, and 1 is 1.
        x = features[:, None, None, :]
        x = nn.relu(_conv(c.hidden[0], "initial_conv1", self.dtype, padding=2, input_dilation=2)(x))
        x = nn.relu(_conv(c.hidden[1], "initial_conv2", self.dtype, padding=1, input_dilation=2)(x))
        x = ResidualStack(c.residual_layers, c.residual, self.dtype, name="residual_stack")(x)
        return _conv(c.channels, "pre_quant_conv", self.dtype)(x)


class Decoder(nn.Module):
    """Gathers the grid into a feature again: 5x5 to 3x3 to 1x1 by convolutions of stride 2."""

    config: PqvaeConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, latent: jax.Array) -> jax.Array:
        """Maps a quantised latent [b, 5, 5, channels] to features [b, width], not yet unit."""
        c = self.config
        x = _conv(c.hidden[1], "post_quant_conv", self.dtype)(latent)
        x = ResidualStack(c.residual_layers, c.residual, self.dtype, name="residual_stack")(x)
        x = nn.relu(_conv(c.hidden[0], "final_conv1", self.dtype, strides=2)(x))
        return _conv(c.width, "final_conv2", self.dtype, padding=0, strides=2)(x)[:, 0, 0, :]


class Pqvae(nn.Module):
    """The autoencoder of features with product quantisation by one shared codebook.

    Attributes:
      config: Sizes.
      dtype: Of the convolutions; normalising and quantising are float32.
    """

    config: PqvaeConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Makes the networks and the codebook, drawn from U(-1, 1)."""
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        shape = self.config.codebook, self.config.codeword
        self.codebook = jnp.asarray(self.param("codebook", _draw_codebook, shape))

    def encode(self, features: jax.Array) -> jax.Array:
        """Maps features [b, width] of any length to sub-vectors [b, n, codeword].

        Raises:
          InputError: Features of another width.
        """
        _check_last(features.shape, 2, self.config.width, "features are [images, {}]")
        latent = unit(self.encoder(unit(jnp.asarray(features, jnp.float32))).astype(jnp.float32))
        return latent.reshape(-1, self.config.codewords, self.config.codeword)

    def quantise(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gives the indices [b, n] and the codewords [b, n, codeword], straight through, of sub-vectors."""
        return quantize.product_quantise(jnp.asarray(z), self.codebook)

    def decode(self, z_q: jax.Array) -> jax.Array:
        """Maps codewords [b, n, codeword] to unit features [b, width]."""
        latent = z_q.reshape(-1, GRID, GRID, self.config.channels)
        return unit(self.decoder(latent).astype(jnp.float32))

    def __call__(self, features: jax.Array) -> dict[str, jax.Array]:
        """The pass of training.

        Args:
          features: [b, width], of any length.

        Returns:
          `x_hat` [b, width], unit; `z` [b, n, codeword], candidates for `quantize.revive_dead_codes`; `indices` [b, n];
          `codebook_loss` and `commitment_loss`, scalars for `pqvae_loss`.
        """
        z = self.encode(features)
        indices, z_q = self.quantise(z)
        codebook_loss, commitment_loss = quantize.codebook_losses(z, self.codebook, indices)
        losses = {"codebook_loss": codebook_loss, "commitment_loss": commitment_loss}
        return {"x_hat": self.decode(z_q), "z": z, "indices": indices, **losses}

    def indices_of(self, features: jax.Array) -> jax.Array:
        """What is sent: indices [b, n], int32 in [0, codebook), of features [b, width]."""
        return self.quantise(self.encode(features))[0]

    def features_of(self, indices: jax.Array) -> jax.Array:
        """What is received: unit features [b, width] of indices [b, n] in [0, codebook).

        The caller sees to the range; an index of `codebook` or more gives NaN.

        Raises:
          InputError: Another number of indices.
        """
        _check_last(indices.shape, 2, self.config.codewords, "indices are [images, {}]")
        return self.decode(self.codebook.at[indices].get(mode="fill", fill_value=jnp.nan))


def param_shapes(module: Pqvae) -> dict[str, Any]:
    """Shapes and types of the parameters, without memory or arithmetic."""
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, module.config.width)))["params"]


def pqvae_loss(
    config: PqvaeConfig, features: jax.Array, outputs: dict[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of equation 7, with the weights of the config.

    Args:
      config: Sizes and weights.
      features: What went in, [b, width], of any length.
      outputs: What `Pqvae` made of it.

    Returns:
      The loss and, unweighted, its terms: `cosine` (1 - similarity, the mean over the batch, in [0, 2]), `codebook` and
      `commitment`; with them `usage` and `perplexity` of the codebook within the batch.
    """
    cosine = 1.0 - (unit(jnp.asarray(features, jnp.float32)) * outputs["x_hat"]).sum(-1).mean()
    terms = {"cosine": cosine, "codebook": outputs["codebook_loss"], "commitment": outputs["commitment_loss"]}
    loss = sum(getattr(config, f"{name}_weight") * term for name, term in terms.items())
    usage, perplexity = quantize.codebook_usage(outputs["indices"], config.codebook)
    return loss, {**terms, "usage": usage, "perplexity": perplexity}


def _draw_codebook(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


def _conv(features: int, name: str, dtype: Any, size: int = 3, padding: int | None = None, **options: Any) -> nn.Conv:
    """A square convolution with zero padding of half the kernel, or `padding` on each side."""
    pad = size // 2 if padding is None else padding
    return nn.Conv(
        features, (size, size), padding=((pad, pad),) * 2, dtype=dtype, kernel_init=kernel_init, name=name, **options
    )


def _check_last(shape: tuple[int, ...], rank: int, last: int, what: str) -> None:
    if len(shape) != rank or shape[-1] != last:
        raise InputError(f"{what.format(last)} for this model, not of shape {tuple(shape)}")
