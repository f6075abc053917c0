"""Blocks of latent diffusion: what its autoencoder, its U-Net and the control branches of that are put together from.

Feature maps are [b, h, w, c]. The stages are made of the blocks, and the networks of the stages:

    DownStage      (ResnetBlock, SpatialTransformer or none) x layers, Downsample or none
    MiddleStage     ResnetBlock, SpatialTransformer, ResnetBlock
    UpStage        (join a skip or none, ResnetBlock, SpatialTransformer or none) x layers, Upsample or none

1x1 convolutions are matrix products here (`nn.Dense`), however a checkpoint keeps them.

Source: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models (CVPR 2022), in the form of diffusers, with
whose modules these agree.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsem.errors import InputError
from jaxsem.nn.attention import check_heads
from jaxsem.nn.conv import kernel_init
from jaxsem.nn.transformer import LayerNorm, gelu, scan_layers

_PERIOD = 10_000  # of the slowest wave, over 2 pi
_TRANSFORMER_EPSILON = 1e-6  # of the group normalisation before a transformer, whatever that of the network


def timestep_embedding(
    timesteps: jax.Array, width: int, cosine_first: bool = True, frequency_shift: float = 0.0
) -> Float[Array, "b width"]:
    """The sines and cosines that tell a network the time, float32; diffusers' `Timesteps`.

    Args:
      timesteps: [b], integers or floats.
      width: Channels, an even number.
      cosine_first: Whether the cosines come before the sines: `flip_sin_to_cos`.
      frequency_shift: The slowest frequency is 1 / 10000 to the power of (half - 1) / (half - shift), half the width:
        `downscale_freq_shift`.

    Raises:
      InputError: Timesteps of another shape, an odd width, or a shift of half the width or more.
    """
    half = width // 2
    if timesteps.ndim != 1 or width % 2 or not 0 <= frequency_shift < half:
        raise InputError(
            f"timesteps {list(timesteps.shape)} in {width} channels with a frequency shift of {frequency_shift}: give [batch], an "
            f"even number, and a shift below half of it"
        )
    # Exponents are rounded as in PyTorch, and their powers once: where t is 999, a frequency's last bit moves its wave by 6e-5.
    exponents = np.float32(-math.log(_PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half - frequency_shift)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    waves = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate(waves[::-1] if cosine_first else waves, axis=-1)


def conv3x3(
    features: int, name: str | None = None, stride: int = 1, padding: tuple[int, int] = (1, 1), **types: Any
) -> nn.Conv:
    """A 3x3 convolution with `padding` zeros before and after each row and column."""
    return nn.Conv(features, (3, 3), stride, (padding, padding), kernel_init=kernel_init, name=name, **types)


def dense(features: int, name: str | None = None, use_bias: bool = True, **types: Any) -> nn.Dense:
    """A matrix product over the last axis."""
    return nn.Dense(features, use_bias, kernel_init=kernel_init, name=name, **types)


class Typed(nn.Module):
    """A module with fields `dtype`, of the computation, and `param_dtype`, of the parameters."""

    @property
    def types(self) -> dict[str, Any]:
        """Both, for the modules inside."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


class GroupNorm(nn.GroupNorm):
    """Group normalisation whose variance is that of the centred values, as PyTorch computes it; in float32."""

    use_fast_variance: bool = False


# -- blocks -----------------------------------------------------------------------------------------------------------


class TimeEmbedding(Typed):
    """The MLP after `timestep_embedding`: `fc1`, SiLU, `fc2`; both `width` wide."""

    width: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b width"]:
        """Maps the waves of timesteps to what the ResNet blocks take."""
        x = nn.silu(dense(self.width, "fc1", **self.types)(x))
        return dense(self.width, "fc2", **self.types)(x)


class ResnetBlock(Typed):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + time(silu(time))))), with a 1x1 `shortcut` for x where its width changes.

    Attributes:
      width: Channels of the output.
      groups: Of the normalisations; divides both widths.
      epsilon: Of the normalisations.
    """

    width: int
    groups: int = 32
    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w i"], time: Float[Array, "b t"] | None = None
    ) -> Float[Array, "b h w width"]:
        """Maps features to features; a network without time has no parameters for it."""
        x = x.astype(self.dtype)
        y = nn.silu(GroupNorm(self.groups, epsilon=self.epsilon, name="norm1", **self.types)(x))
        y = conv3x3(self.width, "conv1", **self.types)(y)
        if time is not None:
            y = y + dense(self.width, "time", **self.types)(nn.silu(time))[:, None, None]
        y = nn.silu(GroupNorm(self.groups, epsilon=self.epsilon, name="norm2", **self.types)(y))
        y = conv3x3(self.width, "conv2", **self.types)(y)
        if x.shape[-1] != self.width:
            x = dense(self.width, "shortcut", **self.types)(x)
        return x + y


class Downsample(Typed):
    """A 3x3 convolution of stride 2.

    Attributes:
      padding: Zeros before and after each row and column: (1, 1) in the U-Net, (0, 1) in the autoencoder.
    """

    padding: tuple[int, int] = (1, 1)
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q c"]:
        """Halves the grid: up with an odd side where both ends are padded, else down."""
        return conv3x3(x.shape[-1], "conv", 2, self.padding, **self.types)(x)


class Upsample(Typed):
    """Every position four times, then a 3x3 convolution."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], size: tuple[int, int] | None = None) -> Float[Array, "b p q c"]:
        """Doubles the grid; `size` (rows, columns) cuts it, before the convolution, where it was halved from odd sides."""
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        if size is not None:
            x = x[:, : size[0], : size[1]]
        return conv3x3(x.shape[-1], "conv", **self.types)(x)


class Head(Typed):
    """What ends a network: normalisation, SiLU, and a 3x3 convolution to its outputs."""

    features: int
    groups: int = 32
    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w features"]:
        """Maps features to outputs."""
        x = nn.silu(GroupNorm(self.groups, epsilon=self.epsilon, name="norm", **self.types)(x))
        return conv3x3(self.features, "conv", **self.types)(x)


# -- transformers -----------------------------------------------------------------------------------------------------


class ContextAttention(Typed):
    """Attention of tokens to a context, or to themselves; `query`, `key` and `value` have no biases, `out` has one.

    The softmax is computed in float32 whatever the type of the tokens.

    Attributes:
      heads: Number of heads; divides the width of the tokens.
      upcast: Whether its weights stay float32 while they weigh the values: `upcast_attention`.
    """

    heads: int
    upcast: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n width"], context: Float[Array, "b m d"] | None = None
    ) -> Float[Array, "b n width"]:
        """Maps tokens to tokens of the same shape.

        Raises:
          InputError: The heads do not divide the width.
        """
        width = x.shape[-1]
        check_heads(width, self.heads)
        context = x if context is None else context
        query, key, value = (
            dense(width, name, False, **self.types)(source).reshape(*source.shape[:-1], self.heads, -1)
            for name, source in (("query", x), ("key", context), ("value", context))
        )
        if self.upcast:
            query, key, value = (part.astype(jnp.float32) for part in (query, key, value))
        y = jax.nn.dot_product_attention(query, key, value).astype(self.dtype)
        return dense(width, "out", **self.types)(y.reshape(x.shape))


class GatedMlp(Typed):
    """`fc1` to values and gates of four times the width each, values * gelu(gates), and `fc2` back: GEGLU.

    Source: Shazeer, GLU Variants Improve Transformer (2020).
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n width"]) -> Float[Array, "b n width"]:
        """Maps tokens to the same shape."""
        width = x.shape[-1]
        values, gates = jnp.split(dense(8 * width, "fc1", **self.types)(x), 2, axis=-1)
        return dense(width, "fc2", **self.types)(values * gelu(gates))


class TransformerBlock(Typed):
    """Self-attention, attention to the context, and a gated MLP, each of what is normalised before and added after."""

    heads: int
    upcast: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n width"], context: Float[Array, "b m d"]) -> Float[Array, "b n width"]:
        """Maps tokens to the same shape."""
        y = LayerNorm(name="norm1", **self.types)(x)
        x = x + ContextAttention(self.heads, self.upcast, name="self_attention", **self.types)(y)
        y = LayerNorm(name="norm2", **self.types)(x)
        x = x + ContextAttention(self.heads, self.upcast, name="cross_attention", **self.types)(y, context)
        y = LayerNorm(name="norm3", **self.types)(x)
        return x + GatedMlp(name="mlp", **self.types)(y)


class SpatialTransformer(Typed):
    """x + proj_out(blocks(proj_in(norm(x)))), the positions by rows as tokens.

    Attributes:
      heads: Attention heads.
      depth: Transformer blocks, a stack on the leading axis of the parameters.
      groups: Of the normalisation.
      upcast: As in `ContextAttention`.
    """

    heads: int
    depth: int = 1
    groups: int = 32
    upcast: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], context: Float[Array, "b m d"]) -> Float[Array, "b h w c"]:
        """Maps features to the same shape."""
        batch, height, width, channels = x.shape
        y = GroupNorm(self.groups, epsilon=_TRANSFORMER_EPSILON, name="norm", **self.types)(x)
        y = dense(channels, "proj_in", **self.types)(y).reshape(batch, height * width, channels)
        blocks = TransformerBlock(self.heads, self.upcast, name="blocks", **self.types)
        y, _ = scan_layers(blocks, y, context.astype(self.dtype), layers=self.depth)
        return x + dense(channels, "proj_out", **self.types)(y.reshape(x.shape))


# -- stages -----------------------------------------------------------------------------------------------------------


class Stage(Typed):
    """What the stages share.

    Attributes:
      width: Channels.
      layers: ResNet blocks, each followed by a transformer if there are heads.
      heads: Attention heads; None has no transformers.
      depth: Blocks of each transformer.
      upcast: As in `ContextAttention`.
      groups: Of all normalisations over groups.
      epsilon: Of those in the ResNet blocks.
      remat: Whether to recompute each ResNet block and transformer in the backward pass: less memory, more time.
    """

    width: int
    layers: int = 2
    heads: int | None = None
    depth: int = 1
    upcast: bool = False
    groups: int = 32
    epsilon: float = 1e-6
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def resnet(self, index: int) -> ResnetBlock:
        """One of its ResNet blocks; call it while the stage runs."""
        block = nn.remat(ResnetBlock) if self.remat else ResnetBlock
        return block(self.width, self.groups, self.epsilon, name=f"resnet_{index}", **self.types)

    def transformer(self, index: int) -> SpatialTransformer:
        """One of its transformers; call it while the stage runs."""
        # Around the scan and not inside of it: XLA inlines a scan of one block, and there nothing keeps the recomputation apart.
        block = nn.remat(SpatialTransformer) if self.remat else SpatialTransformer
        return block(self.heads, self.depth, self.groups, self.upcast, name=f"transformer_{index}", **self.types)

    def layer(self, index: int, x: jax.Array, time: jax.Array | None, context: jax.Array | None) -> jax.Array:
        """A ResNet block, and the transformer after it."""
        x = self.resnet(index)(x, time)
        return x if self.heads is None else self.transformer(index)(x, context)


class DownStage(Stage):
    """A stage on the way to the coarsest grid.

    Attributes:
      downsample: Padding of the `Downsample` at its end; None has none.
    """

    downsample: tuple[int, int] | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w i"], time: jax.Array | None = None, context: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        """The features after every layer and, last, after halving the grid: the skips of a U-Net; the next stage takes the last."""
        states = []
        for i in range(self.layers):
            x = self.layer(i, x, time, context)
            states.append(x)
        if self.downsample is not None:
            states.append(Downsample(self.downsample, name="downsample", **self.types)(x))
        return tuple(states)


class MiddleStage(Stage):
    """The stage at the coarsest grid of a U-Net; `layers` is not used."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], time: jax.Array, context: jax.Array) -> Float[Array, "b h w width"]:
        """Maps features to features."""
        return self.resnet(1)(self.layer(0, x, time, context), time)


class UpStage(Stage):
    """A stage on the way back.

    Attributes:
      upsample: Whether there is an `Upsample` at its end.
    """

    upsample: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w i"],
        time: jax.Array | None = None,
        context: jax.Array | None = None,
        skips: tuple[jax.Array, ...] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Float[Array, "b p q width"]:
        """Maps features to features.

        Args:
          x: What the stage before gives.
          time: Of the ResNet blocks.
          context: Of the transformers.
          skips: One for each layer, in the order in which they were made; the last is joined to x first. None joins none.
          size: Of the output, where the grid was halved from odd sides.
        """
        for i in range(self.layers):
            if skips is not None:
                x = jnp.concatenate([x, skips[-1 - i]], axis=-1)
            x = self.layer(i, x, time, context)
        return Upsample(name="upsample", **self.types)(x, size) if self.upsample else x
