"""SAM's mask decoder, which runs once for every prompt.

An axis of prompts, p, follows that of images. What does not depend on the prompt has it with length 1: as long as no
masks are given, the first layer projects the image's tokens once for all prompts.

Source: Kirillov et al., Segment Anything (2023), appendix A, and the implementations of Meta and transformers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsem.backbones.sam_config import SamConfig
from jaxsem.backbones.sam_prompts import NORM_EPSILON, Conv2x2
from jaxsem.nn.transformer import LayerNorm, gelu

_FINAL_EPSILON = 1e-5  # of the transformer's last normalisation, in both implementations


class MaskDecoder(nn.Module):
    """Masks and their expected IoUs from the image's embedding and the prompts' tokens.

    Tokens for the IoU and for each mask go through the transformer beside those of the prompt. From its own token each mask
    then gets the vector with which the image, made four times as large, is multiplied pixel by pixel.

    Attributes:
      config: Sizes.
      dtype: Of the computation.
      param_dtype: Of the parameters.
    """

    config: SamConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        embeddings: Float[Array, "b g g channels"],
        positions: Float[Array, "g g channels"],
        tokens: Float[Array, "b p t channels"],
        dense: Float[Array, "#b #p #g #g channels"],
        multimask: bool = True,
    ) -> tuple[Float[Array, "b p k h w"], Float[Array, "b p k"]]:
        """Decodes; see `Sam.predict_masks`.

        Args:
          embeddings: Of the image encoder.
          positions: Of the prompt encoder, for the image.
          tokens: Of the prompt encoder.
          dense: Of the prompt encoder.
          multimask: Whether to leave out the first mask, or all others.
        """
        c, d = self.config, self.config.decoder
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, prompts = tokens.shape[:2]
        grid, normal = c.encoder.grid, nn.initializers.normal(1.0)
        iou_token = self.param("iou_token", normal, (c.channels,), self.param_dtype)
        mask_tokens = self.param("mask_tokens", normal, (d.masks + 1, c.channels), self.param_dtype)
        own = jnp.concatenate([jnp.asarray(iou_token)[None], jnp.asarray(mask_tokens)]).astype(self.dtype)
        own = jnp.broadcast_to(own, (batch, prompts, *own.shape))
        image = embeddings.astype(self.dtype)[:, None] + dense
        tokens, image = TwoWayTransformer(c, name="transformer", **types)(
            jnp.concatenate([own, tokens], axis=2),
            image.reshape(batch, -1, grid**2, c.channels),
            positions.reshape(grid**2, c.channels),
        )
        iou = Perceptron(d.iou_layers, d.iou_hidden, d.masks + 1, name="iou_head", **types)(tokens[:, :, 0])
        each = nn.vmap(Perceptron, in_axes=2, out_axes=2, variable_axes={"params": 0}, split_rngs={"params": True})
        vectors = each(3, c.channels, c.channels // 8, name="mask_heads", **types)(tokens[:, :, 1 : d.masks + 2])
        image = self._upscale(image.reshape(batch * prompts, grid, grid, c.channels))
        image = image.reshape(batch, prompts, *image.shape[1:])
        kept = slice(1, None) if multimask else slice(1)
        masks = jnp.einsum("bpkc,bphwc->bpkhw", vectors[:, :, kept], image, preferred_element_type=jnp.float32)
        return masks, iou[..., kept].astype(jnp.float32)

    def _upscale(self, x: jax.Array) -> jax.Array:
        types, channels = {"dtype": self.dtype, "param_dtype": self.param_dtype}, self.config.channels
        x = Double(channels // 4, name="upscale1", **types)(x)
        x = gelu(LayerNorm(NORM_EPSILON, name="upscale_norm", **types)(x))
        return gelu(Double(channels // 8, name="upscale2", **types)(x))


class TwoWayTransformer(nn.Module):
    """Tokens and image attend to each other, some layers long; then the tokens to the image once more."""

    config: SamConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b p t channels"],
        image: Float[Array, "b i n channels"],
        positions: Float[Array, "n channels"],
    ) -> tuple[Float[Array, "b p t channels"], Float[Array, "b p n channels"]]:
        """Gives both as they are in the end; the tokens as they come stand for their positions in every layer."""
        d, types = self.config.decoder, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = tokens
        # Two layers, of which the first is another: no stack to scan.
        for i in range(d.layers):
            x, image = TwoWayLayer(self.config, i == 0, name=f"layers_{i}", **types)(x, image, tokens, positions)
        attend = CrossAttention(d.heads, self.config.channels // d.reduction, name="final", **types)
        x = x + attend(x + tokens, image + positions, image)
        return LayerNorm(_FINAL_EPSILON, name="final_norm", **types)(x), image


class TwoWayLayer(nn.Module):
    """Tokens to tokens, tokens to image, an MLP of the tokens, image to tokens; each added and normalised.

    Attributes:
      config: Sizes.
      first: Whether what comes in are the positions themselves: they are then neither added nor kept by the first attention.
      dtype: Of the computation.
      param_dtype: Of the parameters.
    """

    config: SamConfig
    first: bool
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, image: jax.Array, token_positions: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Maps tokens [b, p, t, c] and image [b, 1 or p, n, c] to those of the next layer, [b, p, ...] both."""
        d, channels = self.config.decoder, self.config.channels
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        narrow = channels // d.reduction

        def norm(i: int) -> LayerNorm:
            return LayerNorm(d.epsilon, name=f"norm{i}", **types)

        attend = CrossAttention(d.heads, channels, name="self_attention", **types)
        if self.first:
            x = attend(x, x, x)
        else:
            x = x + attend(x + token_positions, x + token_positions, x)
        x = norm(1)(x)
        attend = CrossAttention(d.heads, narrow, name="token_to_image", **types)
        x = norm(2)(x + attend(x + token_positions, image + positions, image))
        x = norm(3)(x + Perceptron(2, d.hidden, channels, name="mlp", **types)(x))
        attend = CrossAttention(d.heads, narrow, name="image_to_token", **types)
        return x, norm(4)(image + attend(image + positions, x + token_positions, x))


class CrossAttention(nn.Module):
    """Attention with separate projections `query`, `key`, `value` and `out`, all with biases, over an axis of prompts.

    Attributes:
      heads: Number of heads; divides the width.
      width: Channels of the queries, keys and values.
      dtype: Of the computation.
      param_dtype: Of the parameters.
    """

    heads: int
    width: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, query: Float[Array, "b q t c"], key: Float[Array, "b k s c"], value: Float[Array, "b k s c"]
    ) -> Float[Array, "b p t c"]:
        """Attends from every query to the keys of its prompt; q and k are p or, for what all prompts share, 1."""
        features = query.shape[-1]
        query, key, value = (
            self._dense(name, self.width)(x) for name, x in (("query", query), ("key", key), ("value", value))
        )
        batch, shared = len(query), key.shape[1] == 1
        prompts = max(query.shape[1], key.shape[1])
        query = jnp.broadcast_to(query, (batch, prompts, *query.shape[2:]))
        shape = query.shape
        # Queries do not see each other: those of all prompts are one list before shared keys.
        lists = batch if shared else batch * prompts
        heads = [x.reshape(lists, -1, self.heads, self.width // self.heads) for x in (query, key, value)]
        return self._dense("out", features)(jax.nn.dot_product_attention(*heads).reshape(shape))

    def _dense(self, name: str, features: int) -> nn.Dense:
        return nn.Dense(features, dtype=self.dtype, param_dtype=self.param_dtype, name=name)


class Perceptron(nn.Module):
    """Linear layers `fc0`, `fc1`, ... with ReLU between.

    Attributes:
      layers: Number of them.
      hidden: Width between them.
      features: Width in the end.
      dtype: Of the computation.
      param_dtype: Of the parameters.
    """

    layers: int
    hidden: int
    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., width] to [..., features]."""
        for i in range(self.layers):
            features = self.features if i == self.layers - 1 else self.hidden
            x = nn.Dense(features, dtype=self.dtype, param_dtype=self.param_dtype, name=f"fc{i}")(
                nn.relu(x) if i else x
            )
        return x


class Double(Conv2x2):
    """`torch.nn.ConvTranspose2d` of kernel and stride 2."""

    @nn.compact
    def __call__(self, x: Float[Array, "*n h w i"]) -> Float[Array, "*n h*2 w*2 o"]:
        """Convolves."""
        kernel, bias = self._params(x.shape[-1])
        *lead, height, width, _ = x.shape
        y = jnp.einsum("...hwi,rsio->...hrwso", x.astype(self.dtype), kernel) + bias
        return y.reshape(*lead, 2 * height, 2 * width, self.features)
