"""SAM: masks of whatever points, boxes or rough masks ask for, in an image that is embedded once.

```
pixels [b, s, s, 3] ─ encode_image ─▶ embeddings [b, s/16, s/16, 256] ─┐
                                                                       ├─ predict_masks ─▶ logits [b, p, 3, s/4, s/4]
p prompts: points and labels, boxes, masks ────────────────────────────┘                   IoU [b, p, 3]
```

Everything is pure and can be compiled, for any number of prompts in one program:

    sam = Sam(SAM_H)
    embeddings = sam.apply({"params": params}, pixels, method="encode_image")
    logits, iou = sam.apply({"params": params}, embeddings, points, labels, method="predict_masks")

Pixels enter, points and boxes are scaled, and masks are brought to the image's own size by `jaxsem.backbones.sam_inputs`.

All but four layers of the image encoder attend inside windows of 14 x 14 tokens, those four to the whole image. The two kinds
differ in the size of their tables of relative positions, so one scan over all layers cannot run them. In every published
size they make four equal groups, window layers and a global one at the end, so there is a scan over groups and in it a
scan over window layers: two blocks are compiled however many there are (the largest encoder as fast as the smallest, in
2 s on one CPU core), and no device chooses between the two kinds while it runs.

Source: Kirillov et al., Segment Anything (2023), and the implementations of Meta and transformers, with whose weights this one
agrees. Windows: Li et al., Exploring Plain Vision Transformer Backbones for Object Detection (2022). Relative
positions: Li et al., MViTv2 (2022).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsem.backbones.sam_config import CONFIGS, SAM_B, SAM_H, SAM_L, DecoderConfig, EncoderConfig, SamConfig
from jaxsem.backbones.sam_decoder import MaskDecoder
from jaxsem.backbones.sam_prompts import NORM_EPSILON, PromptEncoder
from jaxsem.errors import InputError
from jaxsem.nn.transformer import LayerNorm, Mlp, scan_layers

__all__ = [
    "CONFIGS",
    "SAM_B",
    "SAM_H",
    "SAM_L",
    "DecoderConfig",
    "EncoderConfig",
    "ImageEncoder",
    "Sam",
    "SamConfig",
    "best_masks",
    "param_shapes",
]

# -- the model --------------------------------------------------------------------------------------------------------


class Sam(nn.Module):
    """Image encoder, prompt encoder and mask decoder.

    Attributes:
      config: Sizes.
      dtype: Of the computation; masks and IoUs are float32 all the same.
      param_dtype: Of the parameters.
      remat: Whether to recompute each layer of the image encoder in the backward pass: less memory, more time.
    """

    config: SamConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Declares the three parts."""
        types = self.dtype, self.param_dtype
        self.encoder = ImageEncoder(self.config.encoder, self.config.channels, *types, self.remat)
        self.prompts = PromptEncoder(self.config, *types)
        self.decoder = MaskDecoder(self.config, *types)

    def __call__(
        self, pixels: Float[Array, "b s s 3"], *prompts: Any, **named_prompts: Any
    ) -> tuple[Float[Array, "b p k h w"], Float[Array, "b p k"]]:
        """Masks for prompts in images that are not embedded yet: for the prompts see `predict_masks`."""
        return self.predict_masks(self.encode_image(pixels), *prompts, **named_prompts)

    def encode_image(self, pixels: Float[Array, "b s s 3"]) -> Float[Array, "b g g channels"]:
        """What all prompts in an image share.

        Args:
          pixels: Of `sam_inputs.preprocess`: of the config's size, normalised, zeros at the lower or right end.

        Raises:
          InputError: Pixels of another shape, or integers.
        """
        return self.encoder(pixels)

    def predict_masks(
        self,
        embeddings: Float[Array, "b g g channels"],
        points: Float[Array, "b p n 2"] | None = None,
        labels: Int[Array, "b p n"] | None = None,
        boxes: Float[Array, "b p 4"] | None = None,
        masks: Float[Array, "b m h w"] | None = None,
        multimask: bool = True,
    ) -> tuple[Float[Array, "b p k h w"], Float[Array, "b p k"]]:
        """Masks for p prompts in each image; a prompt is some points, a box, a mask, or any of them together.

        Args:
          embeddings: Of `encode_image`.
          points: (x, y) in pixels of the padded input: see `sam_inputs.scale_prompts`.
          labels: 1 for a point inside, 0 outside; 2 and 3 for the corners of a box, upper left and lower right; -1 for a point
            that is none, as Meta pads; -10 for one that transformers pads with, a zero token that others still attend to; any other
            gives NaN. None is 1 everywhere.
          boxes: (left, top, right, bottom), in the same pixels.
          masks: Logits of an earlier call, positive inside; one for each prompt, or one (m = 1) for all of them.
          multimask: Whether to give the masks for an ambiguous prompt (three of them: whole, part, subpart), or the one for a
            prompt that is not, such as several points.

        Returns:
          Logits of the masks, a quarter of the input's size, positive inside, and the IoU that the model expects of each.

        Raises:
          InputError: No prompt, or shapes that do not fit.
        """
        self._check_embeddings(embeddings)
        sparse, dense = self.prompts(len(embeddings), points, labels, boxes, masks)
        return self.decoder(embeddings, self.prompts.image_positions(), sparse, dense, multimask)

    def _check_embeddings(self, embeddings: jax.Array) -> None:
        wanted = self.config.encoder.grid, self.config.encoder.grid, self.config.channels
        if embeddings.shape[1:] != wanted:
            raise InputError(
                f"embeddings are [batch, {wanted[0]}, {wanted[1]}, {wanted[2]}], not {list(embeddings.shape)}"
            )


def best_masks(
    logits: Float[Array, "*n k h w"], iou: Float[Array, "*n k"]
) -> tuple[Float[Array, "*n h w"], Float[Array, " *n"]]:
    """Of each prompt's k masks the one of which the model expects most, and what it expects."""
    best = jnp.argmax(iou, axis=-1, keepdims=True)
    mask = jnp.take_along_axis(logits, best[..., None, None], axis=-3)
    return mask[..., 0, :, :], jnp.take_along_axis(iou, best, axis=-1)[..., 0]


def param_shapes(module: Sam) -> dict[str, Any]:
    """Shapes and types of the parameters, without memory or arithmetic."""
    size = module.config.encoder.image_size
    pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    point = jax.ShapeDtypeStruct((1, 1, 1, 2), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), pixels, point)["params"]


# -- the image encoder ------------------------------------------------------------------------------------------------


class ImageEncoder(nn.Module):
    """A ViT, and a neck of two convolutions that makes its tokens the embedding of the image.

    Attributes:
      config: Sizes.
      channels: Of the embedding.
      dtype: Of the computation.
      param_dtype: Of the parameters.
      remat: Whether to recompute each layer in the backward pass.
    """

    config: EncoderConfig
    channels: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Declares the parameters."""
        c, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.patch_embedding = nn.Dense(c.width, **types)
        self.positions = self.param(
            "positions", nn.initializers.normal(0.02), (c.grid, c.grid, c.width), self.param_dtype
        )
        self.groups = Group(c, self.dtype, self.param_dtype, self.remat)
        self.neck1 = nn.Dense(self.channels, use_bias=False, **types)
        self.neck_norm1 = LayerNorm(NORM_EPSILON, **types)
        self.neck2 = nn.Conv(self.channels, (3, 3), padding=1, use_bias=False, **types)
        self.neck_norm2 = LayerNorm(NORM_EPSILON, **types)

    def __call__(self, pixels: Float[Array, "b s s 3"]) -> Float[Array, "b g g channels"]:
        """The embedding of normalised pixels; see `Sam.encode_image`."""
        x, _ = scan_layers(self.groups, self.embed(pixels), layers=self.config.groups)
        return self.neck_norm2(self.neck2(self.neck_norm1(self.neck1(x))))

    def embed(self, pixels: Float[Array, "b s s 3"]) -> Float[Array, "b g g width"]:
        """The tokens that the first layer takes."""
        c = self.config
        if pixels.shape[1:] != (c.image_size, c.image_size, 3) or not jnp.issubdtype(pixels.dtype, jnp.floating):
            raise InputError(
                f"this SAM takes normalised pixels of shape [batch, {c.image_size}, {c.image_size}, 3], floats, not "
                f"{pixels.dtype} of shape {list(pixels.shape)}: see sam_inputs.preprocess"
            )
        # A convolution whose steps are as long as its kernel is one matrix product over patches.
        patches = pixels.reshape(-1, c.grid, c.patch, c.grid, c.patch, 3).swapaxes(2, 3)
        x = self.patch_embedding(patches.reshape(-1, c.grid, c.grid, 3 * c.patch**2))
        return x + jnp.asarray(self.positions, self.dtype)


class Group(nn.Module):
    """Window layers, and a global one after them."""

    config: EncoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Declares the two kinds of layer."""
        c, types = self.config, (self.dtype, self.param_dtype)
        self.window_layers = EncoderBlock(c, c.window, *types)
        whole = nn.remat(EncoderBlock, prevent_cse=False) if self.remat else EncoderBlock
        self.global_layer = whole(c, None, *types)

    def __call__(self, x: Float[Array, "b g g width"]) -> Float[Array, "b g g width"]:
        """Runs the group."""
        x, _ = scan_layers(self.window_layers, x, layers=self.config.global_every - 1, remat=self.remat)
        return self.global_layer(x)


class EncoderBlock(nn.Module):
    """x + attention(norm1(x)), in windows or in the whole image, then x + mlp(norm2(x)).

    Attributes:
      config: Sizes.
      window: Side of the windows; None is the whole image.
      dtype: Of the computation.
      param_dtype: Of the parameters.
    """

    config: EncoderConfig
    window: int | None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b g g width"]) -> Float[Array, "b g g width"]:
        """Runs the layer."""
        c, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attend = RelativeAttention(c.heads, name="attention", **types)
        y = LayerNorm(c.epsilon, name="norm1", **types)(x)
        if self.window is None:
            x = x + attend(y)
        else:
            x = x + _join_windows(attend(_split_windows(y, self.window)), *x.shape[:3])
        return x + Mlp(c.hidden, name="mlp", **types)(LayerNorm(c.epsilon, name="norm2", **types)(x))


class RelativeAttention(nn.Module):
    """Self-attention over a square of tokens; a query also weighs how many rows and columns away a key lies.

    To the logit of query q and key k adds q · rows[dy] + q · columns[dx], with q before its scaling, and a vector of the
    tables for every distance. The softmax is computed in float32.

    Attributes:
      heads: Number of heads; divides the width of the tokens.
      dtype: Of the computation.
      param_dtype: Of the parameters.
    """

    heads: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b g g width"]) -> Float[Array, "b g g width"]:
        """Maps tokens to tokens of the same shape."""
        batch, side, _, width = x.shape
        types, depth = {"dtype": self.dtype, "param_dtype": self.param_dtype}, width // self.heads
        qkv = nn.Dense(3 * width, name="qkv", **types)(x).reshape(batch, side**2, 3, self.heads, depth)
        query, key, value = (qkv[:, :, part] for part in range(3))
        rows, columns = (
            self.param(name, nn.initializers.zeros, (2 * side - 1, depth), self.param_dtype)
            for name in ("rows", "columns")
        )
        bias = _relative_logits(query, jnp.asarray(rows, self.dtype), jnp.asarray(columns, self.dtype), side)
        y = jax.nn.dot_product_attention(query, key, value, bias=bias)
        return nn.Dense(width, name="out", **types)(y.reshape(x.shape))


def _relative_logits(query: jax.Array, rows: jax.Array, columns: jax.Array, side: int) -> jax.Array:
    """What the distance of a key adds to its logits, [b, heads, side², side²], in float32.

    The outer sum is left to the compiler, which makes it part of the softmax.
    """
    batch, tokens, heads, _ = query.shape
    query = query.reshape(batch, side, side, heads, -1)
    distance = np.arange(side)[:, None] - np.arange(side) + side - 1  # of query and key, from 0 on
    by_row = jnp.einsum("bhwnd,hkd->bnhwk", query, rows[distance], preferred_element_type=jnp.float32)
    by_column = jnp.einsum("bhwnd,wkd->bnhwk", query, columns[distance], preferred_element_type=jnp.float32)
    return (by_row[..., :, None] + by_column[..., None, :]).reshape(batch, heads, tokens, tokens)


def _split_windows(x: jax.Array, window: int) -> jax.Array:
    """[b, h, w, c] to [b * windows, window, window, c], with zeros at the lower and right end where windows stick out.

    The zeros are attended to, as in the reference, with which the weights were trained.
    """
    batch, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, -height % window), (0, -width % window), (0, 0)))
    x = x.reshape(batch, x.shape[1] // window, window, x.shape[2] // window, window, channels)
    return x.swapaxes(2, 3).reshape(-1, window, window, channels)


def _join_windows(x: jax.Array, batch: int, height: int, width: int) -> jax.Array:
    """The inverse of `_split_windows`: [b * windows, window, window, c] to [b, h, w, c]."""
    window, channels = x.shape[1], x.shape[3]
    rows, columns = -(-height // window), -(-width // window)
    x = x.reshape(batch, rows, columns, window, window, channels).swapaxes(2, 3)
    return x.reshape(batch, rows * window, columns * window, channels)[:, :height, :width]
