"""SAM's prompt encoder: points and corners of boxes become tokens, masks an image that is added to the embedding.

Source: Kirillov et al., Segment Anything (2023), appendix A; Tancik et al., Fourier Features Let Networks Learn High Frequency
Functions (2020); the implementations of Meta and transformers.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsem.backbones.sam_config import SamConfig
from jaxsem.errors import InputError
from jaxsem.nn.transformer import LayerNorm, gelu

NOT_A_POINT = -1  # Meta's padding, with an embedding of its own
ZERO_POINT = -10  # transformers' padding
NORM_EPSILON = 1e-6  # of all normalisations outside of the two transformers
_KINDS = 4  # labels from 0 on: outside, inside, upper left corner, lower right corner
_CORNERS = (2, 3)


class PromptEncoder(nn.Module):
    """Points and corners of boxes as tokens, masks as an image of them.

    A place is encoded by sines and cosines of random frequencies, drawn once and not trained; what it is (inside, outside, a
    corner) by a vector that is added.

    Attributes:
      config: Sizes.
      dtype: Of the computation.
      param_dtype: Of the parameters.
    """

    config: SamConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declares the parameters."""
        channels, normal = self.config.channels, nn.initializers.normal(1.0)
        # In bfloat16 a point would move by pixels.
        self.frequencies = self.param("frequencies", normal, (2, channels // 2), jnp.float32)
        self.kinds = self.param("kinds", normal, (_KINDS, channels), self.param_dtype)
        self.not_a_point = self.param("not_a_point", normal, (channels,), self.param_dtype)
        self.no_mask = self.param("no_mask", normal, (channels,), self.param_dtype)
        self.masks = MaskEmbedding(self.config.mask_channels, channels, self.dtype, self.param_dtype)

    def __call__(
        self,
        batch: int,
        points: Float[Array, "b p n 2"] | None = None,
        labels: Int[Array, "b p n"] | None = None,
        boxes: Float[Array, "b p 4"] | None = None,
        masks: Float[Array, "b m h w"] | None = None,
    ) -> tuple[Float[Array, "b p t channels"], Float[Array, "#b #p #g #g channels"]]:
        """Tokens of the prompts, and what is added to the image's embedding; for the arguments see `Sam.predict_masks`.

        Args:
          batch: Number of images.
          points: Of the prompts.
          labels: Of the points.
          boxes: Of the prompts.
          masks: Of the prompts.

        Raises:
          InputError: No prompt, or shapes that do not fit.
        """
        prompts = _check_prompts(batch, self.config.mask_size, points, labels, boxes, masks)
        channels, parts = self.config.channels, []
        if points is not None:
            labels = jnp.ones(points.shape[:3], jnp.int32) if labels is None else labels
            parts.append(self._embed(points, labels))
            if boxes is None:  # the reference ends every list of points so, unless a box follows
                end = jnp.asarray(self.not_a_point, self.dtype)
                parts.append(jnp.broadcast_to(end, (batch, prompts, 1, channels)))
        if boxes is not None:
            parts.append(self._embed(boxes.reshape(batch, prompts, 2, 2), jnp.array(_CORNERS)))
        tokens = jnp.concatenate(parts, axis=2) if parts else jnp.zeros((batch, prompts, 0, channels), self.dtype)
        if self.is_initializing() and masks is None:  # parameters are made for all kinds of prompts, whichever is given
            self.masks(jnp.zeros((1, 1, self.config.mask_size, self.config.mask_size), self.dtype))
        if masks is not None:
            return tokens, self.masks(masks)
        return tokens, jnp.asarray(self.no_mask, self.dtype).reshape(1, 1, 1, 1, channels)

    def image_positions(self) -> Float[Array, "g g channels"]:
        """The encoding of the centre of every patch."""
        grid = self.config.encoder.grid
        line = (jnp.arange(grid, dtype=jnp.float32) + 0.5) / grid
        x, y = jnp.meshgrid(line, line)
        return self._encode(jnp.stack([x, y], axis=-1)).astype(self.dtype)

    def _embed(self, points: jax.Array, labels: jax.Array) -> jax.Array:
        labels = jnp.asarray(labels)[..., None]
        # The centre of the pixel, as a part of the padded input.
        places = self._encode((points.astype(jnp.float32) + 0.5) / self.config.encoder.image_size)
        # A negative index would count from the end of the table.
        rows = jnp.where(labels[..., 0] < 0, _KINDS, labels[..., 0])
        kinds = jnp.take(jnp.asarray(self.kinds, jnp.float32), rows, axis=0, mode="fill", fill_value=jnp.nan)
        x = jnp.where(labels == NOT_A_POINT, jnp.asarray(self.not_a_point, jnp.float32), places + kinds)
        return jnp.where(labels == ZERO_POINT, 0.0, x).astype(self.dtype)

    def _encode(self, places: jax.Array) -> jax.Array:
        """Encodes (x, y), each from 0 to 1; a sum of two products, which no device may round as a matrix product."""
        frequencies = jax.lax.stop_gradient(jnp.asarray(self.frequencies))
        x, y = (2 * places[..., i : i + 1] - 1 for i in (0, 1))
        angles = 2 * math.pi * (x * frequencies[0] + y * frequencies[1])
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class MaskEmbedding(nn.Module):
    """Three convolutions, of 2x2, 2x2 and 1x1, that bring a mask to the size of the image's embedding.

    Attributes:
      hidden: Channels after the second one; a quarter of them after the first.
      features: Channels in the end.
      dtype: Of the computation.
      param_dtype: Of the parameters.
    """

    hidden: int
    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, masks: Float[Array, "*n h w"]) -> Float[Array, "*n h/4 w/4 features"]:
        """Embeds logits of masks."""
        types, x = {"dtype": self.dtype, "param_dtype": self.param_dtype}, masks[..., None]
        for i, features in enumerate((self.hidden // 4, self.hidden), 1):
            x = Halve(features, name=f"conv{i}", **types)(x)
            x = gelu(LayerNorm(NORM_EPSILON, name=f"norm{i}", **types)(x))
        return nn.Dense(self.features, name="conv3", **types)(x)


class Conv2x2(nn.Module):
    """A convolution of 2x2 whose windows do not overlap: a matrix product, with axes put in place."""

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def _params(self, width: int) -> tuple[jax.Array, jax.Array]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (2, 2, width, self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        return jnp.asarray(kernel, self.dtype), jnp.asarray(bias, self.dtype)


class Halve(Conv2x2):
    """`torch.nn.Conv2d` of kernel and stride 2."""

    @nn.compact
    def __call__(self, x: Float[Array, "*n h w i"]) -> Float[Array, "*n h/2 w/2 o"]:
        """Convolves."""
        kernel, bias = self._params(x.shape[-1])
        *lead, height, width, channels = x.shape
        x = x.astype(self.dtype).reshape(*lead, height // 2, 2, width // 2, 2, channels)
        return jnp.einsum("...hrwsi,rsio->...hwo", x, kernel) + bias


def _check_prompts(batch: int, side: int, points: Any, labels: Any, boxes: Any, masks: Any) -> int:
    """Refuses prompts that do not fit each other or the images; gives their number."""
    ends = {"points": ("n", 2), "boxes": (4,), "masks": (side, side)}
    given = {name: array for name, array in zip(ends, (points, boxes, masks)) if array is not None}
    if not given:
        raise InputError("there is no prompt: give points, boxes or masks")
    for name, array in given.items():
        wanted = (batch, "prompts", *ends[name])
        if array.ndim != len(wanted) or any(type(w) is int and w != n for w, n in zip(wanted, array.shape)):
            words = ", ".join(map(str, wanted))
            raise InputError(f"{name} for a batch of {batch} are of shape [{words}], not {list(array.shape)}")
    if labels is not None:
        if points is None:
            raise InputError("there are labels without points: give the points that they belong to")
        if labels.shape != points.shape[:3] or not jnp.issubdtype(labels.dtype, jnp.integer):
            wanted = list(points.shape[:3])
            raise InputError(f"labels are integers of shape {wanted}, not {labels.dtype} of shape {list(labels.shape)}")
    counts = {name: array.shape[1] for name, array in given.items()}
    if len(counts) > 1 and counts.get("masks") == 1:  # one for all prompts
        del counts["masks"]
    if len(set(counts.values())) > 1:
        numbers = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise InputError(f"the prompts differ in number: {numbers}; give as many of each")
    return next(iter(counts.values()))
