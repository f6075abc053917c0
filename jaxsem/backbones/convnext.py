"""ConvNeXt: a convolutional image encoder, alone or as the image side of a CLIP.

```
images [b, h, w, 3] ─ embed ─▶ [b, h/4, w/4, 128] ─ run_stages ─▶ [b, h/32, w/32, 1024] ─ image_feature ─▶ [b, projection]
                                     stage 0: blocks
                                     stage 1: halve, blocks
                                     ...
```

All but the first stage begin by halving the grid. A stack of equal blocks is one scan: its parameters have a leading axis.

Features from elsewhere enter before any stage, or before any block inside one, so that what comes first is neither run nor needed:

    net.apply(variables, x, 2, method="run_stages")             # x as stage 1 gives it: [b, h/8, w/8, 256]
    net.apply(variables, x, 2, block=0, method="run_stages")    # x as stage 2 has it after halving: [b, h/16, w/16, 512]

Images enter normalised (those of a CLIP as `jaxsem.backbones.clip_inputs` does); any size will do. Features leave in float32 and
not of unit length.

Source: Liu et al., A ConvNet for the 2020s (CVPR 2022), and the implementations in transformers, timm and open_clip, with whose
weights this one agrees.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsem.errors import InputError
from jaxsem.nn.transformer import ACTIVATIONS, LayerNorm, Mlp, check_activation, scan_layers


@dataclass(frozen=True)
class ConvNextConfig:
    """Sizes of a ConvNeXt.

    Attributes:
      widths: Channels in each stage.
      depths: Blocks in each stage.
      patch: Pixels along the side of a position of the first stage.
      activation: In the blocks and between the layers of a projection.
      epsilon: Of all layer normalisations but the one of the pooled feature.
      pool_epsilon: Of that one.
      projection: Width of the features; None takes the pooled ones without projecting them.
      hidden: Width inside a projection of two layers; None is one layer.

    Raises:
      InputError: No stage, a size below 1, as many widths as not depths, an unknown activation, or a hidden layer without a
        projection.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    patch: int = 4
    activation: str = "gelu"
    epsilon: float = 1e-6
    pool_epsilon: float = 1e-6
    projection: int | None = None
    hidden: int | None = None

    def __post_init__(self) -> None:
        if not self.widths or len(self.widths) != len(self.depths):
            raise InputError(
                f"a ConvNeXt of widths {list(self.widths)} and depths {list(self.depths)}: give one of each for every stage"
            )
        sizes = (*self.widths, *self.depths, self.patch, *(n for n in (self.projection, self.hidden) if n is not None))
        if min(sizes) < 1:
            raise InputError(f"a ConvNeXt with a size of {min(sizes)} in {self}: every size is at least 1")
        if self.hidden is not None and self.projection is None:
            raise InputError(
                f"a hidden layer of {self.hidden} without a projection: give its width, or no hidden layer"
            )
        check_activation(self.activation)

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.widths)

    def stride(self, stage: int) -> int:
        """Pixels along the side of a position of a stage's output."""
        return self.patch << range(self.stages)[stage]


# -- parts ------------------------------------------------------------------------------------------------------------


class ConvNextBlock(nn.Module):
    """x + scale * mlp(norm(depthwise(x))): a 7x7 convolution in each channel, then an MLP across channels."""

    width: int
    activation: str = "gelu"
    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w width"]) -> Float[Array, "b h w width"]:
        """Maps features to the same shape."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = nn.Conv(self.width, (7, 7), padding=3, feature_group_count=self.width, name="depthwise", **types)(x)
        y = LayerNorm(self.epsilon, name="norm", **types)(y)
        y = Mlp(4 * self.width, self.activation, name="mlp", **types)(y)
        scale = self.param("scale", nn.initializers.constant(1e-6), (self.width,), self.param_dtype)
        return x + jnp.asarray(scale, self.dtype) * y


class Stage(nn.Module):
    """Blocks of one width, after halving the grid in all stages but the first."""

    config: ConvNextConfig
    index: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Declares the parameters."""
        c, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = c.widths[self.index]
        if self.index:
            self.norm = LayerNorm(c.epsilon, **types)
            self.halve = nn.Conv(width, (2, 2), 2, "VALID", **types)
        self.blocks = ConvNextBlock(width, c.activation, c.epsilon, **types)

    def __call__(self, x: Float[Array, "b h w i"], block: int | None = None) -> Float[Array, "b p q o"]:
        """Runs the stage from `block` on; None halves the grid before, and drops an odd last row or column."""
        if block is None and self.index:
            x = self.halve(self.norm(x))
        depth = self.config.depths[self.index]
        return scan_layers(self.blocks, x, layers=depth, first=block or 0, remat=self.remat)[0]


# -- the encoder ------------------------------------------------------------------------------------------------------


class ConvNext(nn.Module):
    """The image encoder.

    Attributes:
      config: Sizes.
      dtype: Of the computation; features are float32 all the same.
      param_dtype: Of the parameters.
      remat: Whether to recompute each block in the backward pass: less memory, more time.
    """

    config: ConvNextConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Declares the parameters."""
        c, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.stem = nn.Conv(c.widths[0], (c.patch, c.patch), c.patch, "VALID", **types)
        self.stem_norm = LayerNorm(c.epsilon, **types)
        self.stages = [Stage(c, i, remat=self.remat, **types) for i in range(c.stages)]
        self.pool_norm = LayerNorm(c.pool_epsilon, **types)
        # Projects in float32: it costs next to nothing and is what features are compared by.
        if c.hidden is not None:
            self.hidden = nn.Dense(c.hidden, True, jnp.float32, self.param_dtype)
        if c.projection is not None:
            self.projection = nn.Dense(c.projection, False, jnp.float32, self.param_dtype)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b projection"]:
        """The features of normalised images: `encode_image`."""
        return self.encode_image(images)

    def encode_image(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b projection"]:
        """The features of normalised images, not of unit length."""
        return self.image_feature(self.run_stages(self.embed(images)))

    def embed(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b p q width"]:
        """What the first stage takes.

        Args:
          images: Normalised; rows and columns that do not fill a patch, or a pair of positions later, are dropped.

        Raises:
          InputError: Images of another kind, or too small for the last stage.
        """
        least = self.config.stride(-1)
        if images.ndim != 4 or images.shape[-1] != 3 or not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(
                f"a ConvNeXt takes normalised images of shape [batch, height, width, 3], floats, not {images.dtype} of shape "
                f"{list(images.shape)}"
            )
        if min(images.shape[1:3]) < least:
            raise InputError(
                f"an image of {images.shape[1]}x{images.shape[2]} is too small for this ConvNeXt: each side takes at least {least}"
            )
        return self.stem_norm(self.stem(images.astype(self.dtype)))

    def run_stages(
        self, x: Float[Array, "b h w i"], first: int = 0, last: int | None = None, block: int | None = None
    ) -> Float[Array, "b p q o"]:
        """Runs the stages [first:last] on features that come from `embed`, from an earlier stage, or from elsewhere.

        Args:
          x: What the stage `first` takes, with the channels of the stage before it; with `block`, with its own.
          first: The first stage, counted as in a Python slice.
          last: One past the last stage, counted as in a Python slice: -1 leaves out the last one.
          block: The block of the first stage to begin with, its grid halved already; None begins by halving it.

        Raises:
          InputError: Features that do not fit, or a block that the stage does not have.
        """
        c, span = self.config, range(self.config.stages)[first:last]
        if not span:
            return x.astype(self.dtype)
        start = span.start
        if block is not None and not 0 <= block < c.depths[start]:
            raise InputError(f"stage {start} has the blocks 0 to {c.depths[start] - 1}, and no block {block}")
        width = c.widths[max(start - 1, 0) if block is None else start]
        if x.ndim != 4 or x.shape[-1] != width:
            place = f"stage {start}" if block is None else f"block {block} of stage {start}"
            raise InputError(f"{place} takes features [batch, height, width, {width}], not {list(x.shape)}")
        x = x.astype(self.dtype)
        for i in span:
            x = self.stages[i](x, block if i == start else None)
        return x

    def hidden_states(self, images: Float[Array, "b h w 3"]) -> list[jax.Array]:
        """The features before the first stage and after every one, stages + 1 in all: the `hidden_states` of transformers."""
        states = [self.embed(images)]
        for i in range(self.config.stages):
            states.append(self.run_stages(states[-1], i, i + 1))
        return states

    def pool(self, x: Float[Array, "b h w width"]) -> Float[Array, "b width"]:
        """The mean over the positions of the last stage's output, normalised."""
        return self.pool_norm(x.mean((1, 2), dtype=jnp.float32).astype(self.dtype))

    def image_feature(self, x: Float[Array, "b h w width"]) -> Float[Array, "b projection"]:
        """The feature from the last stage's output."""
        c, y = self.config, self.pool(x).astype(jnp.float32)
        if c.hidden is not None:
            y = ACTIVATIONS[c.activation](self.hidden(y))
        return y if c.projection is None else self.projection(y)


def param_shapes(module: ConvNext) -> dict[str, Any]:
    """Shapes and types of the parameters, without memory or arithmetic."""
    side = module.config.stride(-1)
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), images)["params"]


# -- published models -------------------------------------------------------------------------------------------------

_TINY = (96, 192, 384, 768), (3, 3, 9, 3)
_SMALL = (96, 192, 384, 768), (3, 3, 27, 3)
_BASE = (128, 256, 512, 1024), (3, 3, 27, 3)
_LARGE = (192, 384, 768, 1536), (3, 3, 27, 3)
_XLARGE = (256, 512, 1024, 2048), (3, 3, 27, 3)
_XXLARGE = (384, 768, 1536, 3072), (3, 4, 30, 3)

# The image sides of open_clip's models, by its names. The number at the end of some is the side of their images, which changes no
# parameter. A trunk alone is the same config without projection and hidden layer.
CONFIGS = {
    "convnext_tiny": ConvNextConfig(*_TINY, projection=1024),
    "convnext_small": ConvNextConfig(*_SMALL, projection=512),
    "convnext_base": ConvNextConfig(*_BASE, projection=512),
    "convnext_base_w": ConvNextConfig(*_BASE, projection=640),
    "convnext_base_w_320": ConvNextConfig(*_BASE, projection=640),
    "convnext_large": ConvNextConfig(*_LARGE, projection=768),
    "convnext_large_d": ConvNextConfig(*_LARGE, projection=768, hidden=1536),
    "convnext_large_d_320": ConvNextConfig(*_LARGE, projection=768, hidden=1536),
    "convnext_xlarge": ConvNextConfig(*_XLARGE, projection=1024),
    "convnext_xxlarge": ConvNextConfig(*_XXLARGE, epsilon=1e-5, pool_epsilon=1e-5, projection=1024),
    "convnext_xxlarge_320": ConvNextConfig(*_XXLARGE, epsilon=1e-5, pool_epsilon=1e-5, projection=1024),
}
