"""InceptionV3 as FID and KID use it: the network of TensorFlow's release of December 2015, up to its pooled features.

```
images [b, 299, 299, 3] ─ stem ─▶ [b, 35, 35, 192] ─ mixed_5b to 5d ─▶ [b, 35, 35, 288] ─ mixed_6a to 6e ─▶
                        [b, 17, 17, 768] ─ mixed_7a to 7c ─▶ [b, 8, 8, 2048] ─ mean over positions ─▶ [b, 2048]
```

It is not torchvision's InceptionV3, and its figures are not comparable with that one's: the weights are others, average
pools leave padding out of the mean, and the pool of the last block takes the maximum.

Source: Szegedy et al., Rethinking the Inception Architecture for Computer Vision (CVPR 2016), and the layers and names
of pytorch-fid and torch-fidelity, with whose converted weights this one agrees.
"""

from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsem.backbones._images import check_images
from jaxsem.errors import InputError

SMALLEST_SIDE = 75
"""From here on something is left after halving five times."""

EPSILON = 1e-3

# A convolution: its channels in the published network, and the rows and columns of its kernel.
Layer = tuple[int, int, int]
# One layer after the other; a list of layers is a fork, all on the same input, whose outputs are joined.
Branch = tuple[Layer | list[Layer], ...]


@dataclass(frozen=True)
class Block:
    """Branches on the same input, whose outputs are joined.

    Attributes:
      branches: By their names in the published weights; "branch_pool" comes after a pool.
      pool: "average" or "max" of 3x3 positions, before the layers of "branch_pool".
      halve: Whether the last layer of each branch takes every other position; a maximum is then one more branch,
        without layers.
    """

    branches: dict[str, Branch] = field(hash=False)
    pool: str = "average"
    halve: bool = False


def _block_a(pool: int) -> Block:
    return Block(
        {
            "branch1x1": ((64, 1, 1),),
            "branch5x5": ((48, 1, 1), (64, 5, 5)),
            "branch3x3dbl": ((64, 1, 1), (96, 3, 3), (96, 3, 3)),
            "branch_pool": ((pool, 1, 1),),
        }
    )


def _block_c(inner: int) -> Block:
    row, column = (inner, 1, 7), (inner, 7, 1)
    return Block(
        {
            "branch1x1": ((192, 1, 1),),
            "branch7x7": ((inner, 1, 1), row, (192, 7, 1)),
            "branch7x7dbl": ((inner, 1, 1), column, row, column, (192, 1, 7)),
            "branch_pool": ((192, 1, 1),),
        }
    )


def _block_e(pool: str) -> Block:
    fork = [(384, 1, 3), (384, 3, 1)]
    return Block(
        {
            "branch1x1": ((320, 1, 1),),
            "branch3x3": ((384, 1, 1), fork),
            "branch3x3dbl": ((448, 1, 1), (384, 3, 3), fork),
            "branch_pool": ((192, 1, 1),),
        },
        pool,
    )


# By name: the layer, its stride, whether its input is padded, and whether a maximum over 3x3 positions halves it.
_STEM = {
    "stem_1a_3x3": ((32, 3, 3), 2, False, False),
    "stem_2a_3x3": ((32, 3, 3), 1, False, False),
    "stem_2b_3x3": ((64, 3, 3), 1, True, True),
    "stem_3b_1x1": ((80, 1, 1), 1, False, False),
    "stem_4a_3x3": ((192, 3, 3), 1, False, True),
}
_BLOCKS = {
    **{f"mixed_5{at}": _block_a(pool) for at, pool in zip("bcd", (32, 64, 64))},
    "mixed_6a": Block({"branch3x3": ((384, 3, 3),), "branch3x3dbl": ((64, 1, 1), (96, 3, 3), (96, 3, 3))}, halve=True),
    **{f"mixed_6{at}": _block_c(inner) for at, inner in zip("bcde", (128, 160, 160, 192))},
    "mixed_7a": Block(
        {
            "branch3x3": ((192, 1, 1), (320, 3, 3)),
            "branch7x7x3": ((192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)),
        },
        halve=True,
    ),
    "mixed_7b": _block_e("average"),
    "mixed_7c": _block_e("max"),
}
_WIDTH = 2048
_COMMON = 16  # divides every width


@dataclass(frozen=True)
class InceptionConfig:
    """Sizes of an Inception.

    Attributes:
      narrow: Divides every width: 1 is the published network, 16 a toy with 128 features.
      image_size: Side of the images; the published network was trained with, and FID is defined at, 299.

    Raises:
      InputError: A divisor that leaves a fraction of a channel, or images below 75 pixels a side.
    """

    narrow: int = 1
    image_size: int = 299

    def __post_init__(self) -> None:
        if self.narrow < 1 or _COMMON % self.narrow:
            raise InputError(f"an Inception narrowed by {self.narrow}: give a divisor of {_COMMON}")
        if self.image_size < SMALLEST_SIDE:
            raise InputError(f"an Inception for images of {self.image_size} pixels: give at least {SMALLEST_SIDE}")

    @property
    def features(self) -> int:
        """How many it gives."""
        return _WIDTH // self.narrow


class ConvNorm(nn.Module):
    """A convolution without bias, a batch normalisation with stored statistics, and a ReLU."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padded: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: Any = jax.lax.Precision.HIGHEST

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b p q features"]:
        """Maps features to features."""
        padding = [(size // 2 if self.padded else 0,) * 2 for size in self.kernel]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype, "precision": self.precision}
        x = nn.Conv(self.features, self.kernel, self.stride, padding, use_bias=False, name="conv", **types)(x)
        return nn.relu(FrozenNorm(self.dtype, self.param_dtype, name="norm")(x))


class FrozenNorm(nn.Module):
    """Batch normalisation by statistics that are parameters: a factor and an offset for each channel."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """Maps features to the same shape."""
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        scale, bias, mean, variance = (
            jnp.asarray(self.param(name, init, (x.shape[-1],), self.param_dtype), jnp.float32)
            for name, init in (("scale", ones), ("bias", zeros), ("mean", zeros), ("variance", ones))
        )
        factor = scale * jax.lax.rsqrt(variance + EPSILON)
        return x * factor.astype(self.dtype) + (bias - mean * factor).astype(self.dtype)


class Mixed(nn.Module):
    """A block of branches.

    Attributes:
      block: The branches.
      narrow: Divides their widths.
      types: Fields of every `ConvNorm`.
    """

    block: Block
    narrow: int
    types: dict[str, Any]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b p q o"]:
        """Runs all branches and joins their channels."""
        joined = []
        for name, branch in self.block.branches.items():
            y = _pool(x, self.block.pool) if name == "branch_pool" else x
            for number, layers in enumerate(branch, 1):
                stride = 2 if self.block.halve and number == len(branch) else 1
                place = f"{name}_{number}" if len(branch) > 1 else name
                if isinstance(layers, list):
                    parts = [self._layer(f"{place}{at}", layer, stride)(y) for at, layer in zip("ab", layers)]
                    y = jnp.concatenate(parts, axis=-1)
                else:
                    y = self._layer(place, layers, stride)(y)
            joined.append(y)
        if self.block.halve:
            joined.append(nn.max_pool(x, (3, 3), (2, 2)))
        return jnp.concatenate(joined, axis=-1)

    def _layer(self, name: str, layer: Layer, stride: int) -> ConvNorm:
        width, *kernel = layer
        return ConvNorm(width // self.narrow, tuple(kernel), stride, padded=stride == 1, name=name, **self.types)


class Inception(nn.Module):
    """The network.

    Attributes:
      config: Sizes.
      dtype: Of the computation; features are float32 all the same.
      param_dtype: Of the parameters.
      precision: Of the convolutions. The highest gives the same figures on every device; None is the device's own
        choice, faster on GPUs and TPUs, but then a distance of two sets depends on where it was measured.
    """

    config: InceptionConfig = InceptionConfig()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: Any = jax.lax.Precision.HIGHEST

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b features"]:
        """The pooled features.

        Args:
          images: Values from -1 to 1 (`jaxsem.metrics.fid.inception_input` makes them); any size from 75 pixels on.

        Raises:
          InputError: Images of another kind, or too small.
        """
        check_images(images, SMALLEST_SIDE, "this Inception")
        narrow = self.config.narrow
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype, "precision": self.precision}
        x = images.astype(self.dtype)
        for name, ((width, *kernel), stride, padded, pool) in _STEM.items():
            x = ConvNorm(width // narrow, tuple(kernel), stride, padded, name=name, **types)(x)
            if pool:
                x = nn.max_pool(x, (3, 3), (2, 2))
        for name, block in _BLOCKS.items():
            x = Mixed(block, narrow, types, name=name)(x)
        return x.mean(axis=(1, 2), dtype=jnp.float32)


def _pool(x: jax.Array, kind: str) -> jax.Array:
    """The average or the maximum of 3x3 positions, those outside left out."""
    if kind == "max":
        return nn.max_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)))
    return nn.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)), count_include_pad=False)


def param_shapes(module: Inception) -> dict[str, Any]:
    """Shapes and types of the parameters, without memory or arithmetic."""
    images = jax.ShapeDtypeStruct((1, SMALLEST_SIDE, SMALLEST_SIDE, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), images)["params"]
