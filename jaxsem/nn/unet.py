"""U-Net: an image to an image of the same size, seen at several scales.

```
images ─ down_0 ───────────────────────────────────── join ─ merge_0 ─ out ─▶ images
            └ pool ─ down_1 ─────────── join ─ merge_1 ─ up_0 ┘
                        └ pool ─ down_2 ─ up_1 ┘
```

Every `down` and `merge` is two 3x3 convolutions without bias, each with batch normalisation and ReLU; `up` is a 2x2 transposed
convolution of stride 2. The running statistics are flax's collection `batch_stats`:

    net = Unet(UnetConfig())
    variables = net.init(key, images)                                            # "params" and "batch_stats"
    images = net.apply(variables, images)                                        # with the running statistics
    images, changed = net.apply(variables, images, train=True, mutable=["batch_stats"])

It is the post-processing network that the transform-neck is compared with (Bridging Compressed Image Latents and Multimodal Large
Language Models, table 3): its published size, 31.04 M parameters, is that of the default config, 31,037,763. Whether that
network adds its output to its input is not published; both can be chosen.

Source: Ronneberger et al., U-Net (2015), in its later common form: convolutions that keep the size, batch normalisation.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsem.errors import InputError
from jaxsem.nn.conv import kernel_init


@dataclass(frozen=True)
class UnetConfig:
    """Sizes of a U-Net; the defaults are the classic ones.

    Attributes:
      widths: Channels at each scale, from the image's own down; each scale halves height and width.
      outputs: Channels of the output.
      residual: Whether the output is added to the input. Fresh parameters then give the input itself.

    Raises:
      InputError: No scale, or a number of channels below 1.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    outputs: int = 3
    residual: bool = False

    def __post_init__(self) -> None:
        if min((*self.widths, self.outputs)) < 1 or not self.widths:
            raise InputError(
                f"a U-Net of widths {list(self.widths)} and {self.outputs} outputs: give one scale or more, with at least 1 "
                f"channel each"
            )

    @property
    def stride(self) -> int:
        """Pixels to a position of the coarsest scale: images are padded to a multiple of it inside."""
        return 2 ** (len(self.widths) - 1)


class Unet(nn.Module):
    """The network.

    Attributes:
      config: Sizes.
      dtype: Of the computation; the output is float32 all the same.
      param_dtype: Of the parameters.
      axis_name: Of the devices that share a batch under `jax.pmap`, so that they normalise alike; under `jax.jit` a
        sharded batch is one batch, and None is right.
    """

    config: UnetConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"], train: bool = False) -> Float[Array, "b h w outputs"]:
        """Maps images to images.

        Sides that the coarsest scale does not divide are padded by repeating the edge, and cropped in the end.

        Args:
          images: Floats of any range and size.
          train: Whether to normalise by the batch's own statistics and to move the running ones (`mutable=["batch_stats"]`)
            a tenth of the way towards them. The variance they keep is that of the batch, not PyTorch's n / (n - 1) of it.

        Raises:
          InputError: Not [b, h, w, c] floats, an image without pixels, or, with `residual`, c other than the outputs.
        """
        c = self.config
        _check(images, c)
        height, width = images.shape[1:3]
        x = jnp.pad(images, ((0, 0), (0, -height % c.stride), (0, -width % c.stride), (0, 0)), mode="edge")
        x, skips = x.astype(self.dtype), []
        for i, features in enumerate(c.widths):
            if i:
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = self._convs(f"down_{i}", features)(x, train)
            skips.append(x)
        for i, features in reversed(list(enumerate(c.widths[:-1]))):
            x = Double(features, self.dtype, self.param_dtype, name=f"up_{i}")(x)
            x = self._convs(f"merge_{i}", features)(jnp.concatenate([skips[i], x], axis=-1), train)
        init = nn.initializers.zeros if c.residual else kernel_init
        out = nn.Dense(c.outputs, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=init, name="out")
        y = out(x)[:, :height, :width].astype(jnp.float32)
        return images.astype(jnp.float32) + y if c.residual else y

    def _convs(self, name: str, features: int) -> "ConvPair":
        return ConvPair(features, self.dtype, self.param_dtype, self.axis_name, name=name)


class ConvPair(nn.Module):
    """Twice: a 3x3 convolution without bias, batch normalisation, ReLU."""

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"], train: bool) -> Float[Array, "b h w features"]:
        """Convolves."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for i in (1, 2):
            conv = nn.Conv(
                self.features, (3, 3), padding=1, use_bias=False, kernel_init=kernel_init, name=f"conv{i}", **types
            )
            norm = nn.BatchNorm(
                not train, momentum=0.9, axis_name=self.axis_name, use_fast_variance=False, name=f"norm{i}", **types
            )
            x = nn.relu(norm(conv(x)))
        return x


class Double(nn.Module):
    """`torch.nn.ConvTranspose2d` of kernel and stride 2: its windows do not overlap, so it is one matrix product."""

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h*2 w*2 features"]:
        """Convolves."""
        b, height, width, channels = x.shape
        # Every output sees one of the four taps only: its fan-in is the channels, not four times as many.
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=(0, 1))
        kernel = self.param("kernel", init, (2, 2, channels, self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        kernel, bias = jnp.asarray(kernel, self.dtype), jnp.asarray(bias, self.dtype)
        y = jnp.einsum("bhwi,rsio->bhrwso", x.astype(self.dtype), kernel) + bias
        return y.reshape(b, 2 * height, 2 * width, self.features)


def _check(images: jax.Array, config: UnetConfig) -> None:
    if images.ndim != 4 or 0 in images.shape or not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(
            f"a U-Net takes images [batch, height, width, channels] of floats, not {images.dtype} of shape {list(images.shape)}"
        )
    if config.residual and images.shape[-1] != config.outputs:
        raise InputError(
            f"a residual U-Net of {config.outputs} outputs cannot add them to an image of {images.shape[-1]} channels: make "
            f"them equal, or set residual=False"
        )
