"""AlexNet without its classifier: the features that LPIPS-Alex compares.

```
images [b, h, w, 3] ─ conv 11x11, by 4 ─▶ tap ─ pool ─ conv 5x5 ─▶ tap ─ pool ─ conv ─▶ tap ─ conv ─▶ tap ─ conv ─▶ tap
                                          64                      192           384         256         256 channels
```

Every tap is after its ReLU. The pool after the last convolution belongs to the classifier and is left out.

Source: Krizhevsky, One weird trick for parallelizing convolutional neural networks (2014), in the single-tower form
whose weights torchvision publishes and with which this one agrees.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsem.backbones._images import check_images
from jaxsem.errors import InputError

SMALLEST_SIDE = 31
"""The second pool needs three positions, and so seven after the first convolution."""

# Kernel, stride, padding; whether a pool comes before.
_LAYERS = ((11, 4, 2, False), (5, 1, 2, True), (3, 1, 1, True), (3, 1, 1, False), (3, 1, 1, False))


@dataclass(frozen=True)
class AlexNetConfig:
    """Sizes of an AlexNet.

    Attributes:
      widths: Channels of the five convolutions, and so of their taps.

    Raises:
      InputError: Other than five widths of at least 1.
    """

    widths: tuple[int, ...] = (64, 192, 384, 256, 256)

    def __post_init__(self) -> None:
        if len(self.widths) != len(_LAYERS) or min(self.widths) < 1:
            raise InputError(f"an AlexNet of widths {list(self.widths)}: give five, each at least 1")


class AlexNet(nn.Module):
    """The feature stack; see `jaxsem.backbones.vgg.Vgg` for its fields."""

    config: AlexNetConfig = AlexNetConfig()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: Any = jax.lax.Precision.HIGHEST

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> tuple[jax.Array, ...]:
        """The five taps [b, rows, columns, width].

        Args:
          images: Normalised as the weights want it.

        Raises:
          InputError: Images of another kind, or with a side below 31.
        """
        check_images(images, SMALLEST_SIDE, "this AlexNet")
        x, taps = images.astype(self.dtype), []
        for i, (width, (kernel, stride, padding, pool)) in enumerate(zip(self.config.widths, _LAYERS), 1):
            if pool:
                x = nn.max_pool(x, (3, 3), (2, 2))
            x = nn.relu(
                nn.Conv(
                    width,
                    (kernel, kernel),
                    stride,
                    padding,
                    dtype=self.dtype,
                    param_dtype=self.param_dtype,
                    precision=self.precision,
                    name=f"conv{i}",
                )(x)
            )
            taps.append(x)
        return tuple(taps)


def param_shapes(module: AlexNet) -> dict[str, Any]:
    """Shapes and types of the parameters, without memory or arithmetic."""
    images = jax.ShapeDtypeStruct((1, SMALLEST_SIDE, SMALLEST_SIDE, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), images)["params"]
