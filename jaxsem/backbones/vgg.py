"""VGG16 without its classifier: the features that LPIPS and DISTS compare.

```
images [b, h, w, 3] ─ block ─▶ [b, h, w, 64] ─ pool, block ─▶ [b, h/2, w/2, 128] ─ ... ─▶ [b, h/16, w/16, 512]
```

A block is a run of 3x3 convolutions with ReLUs; what its last one gives is a tap: relu1_2, relu2_2, relu3_3, relu4_3,
relu5_3. The pool after the last block belongs to the classifier and is left out.

Sources: Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition (ICLR 2015),
configuration D, with whose weights in torchvision this one agrees; the L2 pool is that of Ding et al., Image Quality
Assessment: Unifying Structure and Texture Similarity (TPAMI 2020).
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsem.backbones._images import check_images
from jaxsem.errors import InputError

_HANNING = (0.25, 0.5, 0.25)  # the inner values of a Hann window of five, made to sum to one
_SMALLEST_SQUARE = 1e-12  # under the root of an L2 pool, as DISTS has it


@dataclass(frozen=True)
class VggConfig:
    """Sizes of a VGG.

    Attributes:
      widths: Channels of each block, and so of its tap.
      depths: Convolutions in each block.
      pool: Between the blocks: "max" of 2x2 positions, or "l2", the root of squares under a Hann window of 3x3.

    Raises:
      InputError: No block, a size below 1, as many widths as not depths, or an unknown pool.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    depths: tuple[int, ...] = (2, 2, 3, 3, 3)
    pool: str = "max"

    def __post_init__(self) -> None:
        if not self.widths or len(self.widths) != len(self.depths):
            raise InputError(
                f"a VGG of widths {list(self.widths)} and depths {list(self.depths)}: give one of each for every block"
            )
        if min(*self.widths, *self.depths) < 1:
            raise InputError(f"a VGG with a size of {min(*self.widths, *self.depths)}: every size is at least 1")
        if self.pool not in ("max", "l2"):
            raise InputError(f"there is no pool {self.pool!r} between the blocks of a VGG; there are 'max' and 'l2'")

    @property
    def smallest(self) -> int:
        """The fewest pixels a side: a maximum drops an odd last row or column, the L2 pool keeps it."""
        return 1 if self.pool == "l2" else 1 << (len(self.widths) - 1)


class Vgg(nn.Module):
    """The feature stack.

    Attributes:
      config: Sizes.
      dtype: Of the computation, and of the taps.
      param_dtype: Of the parameters.
      precision: Of the convolutions. The highest gives the same figures on every device; None is the device's own
        choice, which is faster on GPUs and TPUs and good enough for a loss.
    """

    config: VggConfig = VggConfig()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: Any = jax.lax.Precision.HIGHEST

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> tuple[jax.Array, ...]:
        """The taps [b, rows, columns, width], one for each block.

        Args:
          images: Normalised as the weights want it.

        Raises:
          InputError: Images of another kind, or with a side below `config.smallest`.
        """
        c = self.config
        check_images(images, c.smallest, "this VGG")
        x, taps = images.astype(self.dtype), []
        for block, (width, depth) in enumerate(zip(c.widths, c.depths), 1):
            if block > 1:
                x = _l2_pool(x) if c.pool == "l2" else nn.max_pool(x, (2, 2), (2, 2))
            for i in range(1, depth + 1):
                x = nn.relu(
                    nn.Conv(
                        width,
                        (3, 3),
                        padding=1,
                        dtype=self.dtype,
                        param_dtype=self.param_dtype,
                        precision=self.precision,
                        name=f"conv{block}_{i}",
                    )(x)
                )
            taps.append(x)
        return tuple(taps)


def _l2_pool(x: jax.Array) -> jax.Array:
    """The root of the squares under a Hann window at every other position, with zeros around."""
    x = jnp.pad(jnp.square(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    # Shifted copies instead of a convolution in each channel: XLA fuses them.
    for axis in (1, 2):
        length = x.shape[axis]
        x = sum(
            weight * jax.lax.slice_in_dim(x, start, length - 2 + start, 2, axis)
            for start, weight in enumerate(_HANNING)
        )
    return jnp.sqrt(x + _SMALLEST_SQUARE)


def param_shapes(module: Vgg) -> dict[str, Any]:
    """Shapes and types of the parameters, without memory or arithmetic."""
    side = module.config.smallest
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), images)["params"]
