"""CLIP: an image tower and a text tower whose features of matching images and texts point the same way.

```
images [b, h, w, 3] ─ embed ─▶ tokens [b, 1 + n, width] ─ run_layers ─▶ tokens ─ pool ─▶ [b, width] ─ projection ─┐
                                                                                        cosine · scale ◀──┤
texts [b, n] ───────── embed ─▶ tokens [b, n, width] ──── run_layers ─▶ tokens ─ pool ─▶ [b, width] ─ projection ─┘
```

The image tower is a ViT whose first token is the class token; the tokens are normalised before the first layer. The text tower
is causal; its feature is that of the end-of-text token.

Everything is pure: `Clip(config).apply({"params": params}, images, method="encode_image")`. A tower works alone as well, on its
own part of the parameters: `VisionTower(config.vision).apply({"params": params["vision"]}, tokens, 2, method="run_layers")`
runs all layers but the first two.

Images enter normalised (`jaxsem.backbones.clip_inputs`); features leave as they are, in float32 and not of unit length.

Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021), and the implementations in
OpenAI's CLIP, open_clip and transformers, with whose weights this one agrees.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsem.backbones.clip_config import ClipConfig, TextConfig, VisionConfig
from jaxsem.errors import InputError
from jaxsem.nn.ops import unit
from jaxsem.nn.transformer import Block, LayerNorm, gelu, scan_layers

__all__ = [
    "Clip",
    "ClipConfig",
    "TextConfig",
    "TextTower",
    "VisionConfig",
    "VisionTower",
    "param_shapes",
    "resize_clip",
    "resize_positions",
    "unit",
]

# -- towers -----------------------------------------------------------------------------------------------------------


class Tower(nn.Module):
    """What the two towers share.

    Attributes:
      config: Of the tower.
      dtype: Of the computation.
      param_dtype: Of the parameters.
      remat: Whether to recompute each layer in the backward pass: less memory, more time.
    """

    config: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    def _blocks(self, causal: bool) -> Block:
        c = self.config
        return Block(c.heads, c.hidden, c.activation, causal, c.epsilon, c.layers, self.dtype, self.param_dtype)

    def _norm(self) -> LayerNorm:
        return LayerNorm(self.config.epsilon, dtype=self.dtype, param_dtype=self.param_dtype)

    def _param(self, name: str, std: float, *shape: int) -> jax.Array:
        # Loaded parameters are NumPy arrays, which would compute on the host outside of `jax.jit`.
        return jnp.asarray(self.param(name, nn.initializers.normal(std), shape, self.param_dtype))

    def run_layers(
        self, tokens: Float[Array, "b n width"], first: int = 0, last: int | None = None
    ) -> Float[Array, "b n width"]:
        """Runs the layers [first:last] on tokens that come from `embed`, from an earlier layer, or from elsewhere.

        Args:
          tokens: What layer `first` takes.
          first: The first layer, counted as in a Python slice.
          last: One past the last layer, counted as in a Python slice: -1 leaves out the last one.
        """
        return self._scan(tokens, first=first, last=last)[0]

    def hidden_states(self, inputs: jax.Array) -> Float[Array, "states b n width"]:
        """The tokens before the first layer and after every one, layers + 1 in all: the `hidden_states` of transformers."""
        tokens = self.embed(inputs)
        _, states = self._scan(tokens, collect=True)
        return jnp.concatenate([tokens[None], states])

    def _scan(self, tokens: jax.Array, **span: Any) -> tuple[jax.Array, jax.Array | None]:
        if tokens.ndim != 3 or tokens.shape[-1] != self.config.width:
            raise InputError(f"tokens are [batch, n, {self.config.width}], not {list(tokens.shape)}")
        tokens = tokens.astype(self.dtype)
        return scan_layers(self.blocks, tokens, layers=self.config.layers, remat=self.remat, **span)


class VisionTower(Tower):
    """The image tower; see `Tower` for its fields and `run_layers`."""

    config: VisionConfig

    def setup(self) -> None:
        """Declares the parameters, with the standard deviations of OpenAI's code where it sets them."""
        c = self.config
        std = c.width**-0.5
        channels, side = (3, *c.stem)[-1], c.patch >> len(c.stem)
        self.stem = [self._stem(width) for width in c.stem]
        self.patch_kernel = self._param("patch_kernel", (channels * side**2) ** -0.5, side, side, channels, c.width)
        self.class_embedding = self._param("class_embedding", std, c.width)
        self.positions = self._param("positions", std, c.tokens, c.width)
        self.pre_norm, self.post_norm = self._norm(), self._norm()
        self.blocks = self._blocks(causal=False)

    def embed(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n width"]:
        """The tokens that the first layer takes, the class token first and then the patches by rows.

        Args:
          images: Of the config's size, normalised; for another size see `resize_positions`.

        Raises:
          InputError: Images of another shape, or integers.
        """
        c, (height, width) = self.config, self.config.height_width
        if images.shape[1:] != (height, width, 3) or not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(
                f"this CLIP takes normalised images of shape [batch, {height}, {width}, 3], floats, not {images.dtype} of shape "
                f"{list(images.shape)}: see clip_inputs.preprocess, and resize_clip for another size"
            )
        x = images
        for layer in self.stem:
            x = gelu(layer(x))
        (rows, columns), p, channels = c.grid, len(self.patch_kernel), x.shape[-1]
        # A convolution whose steps are as long as its kernel is one matrix product over patches.
        patches = (
            x.reshape(-1, rows, p, columns, p, channels).swapaxes(2, 3).reshape(-1, rows * columns, p * p * channels)
        )
        x = patches.astype(self.dtype) @ self.patch_kernel.reshape(-1, c.width).astype(self.dtype)
        first = jnp.broadcast_to(self.class_embedding.astype(self.dtype), (len(x), 1, c.width))
        return self.pre_norm(jnp.concatenate([first, x], axis=1) + self.positions.astype(self.dtype))

    def _stem(self, channels: int) -> nn.Conv:
        return nn.Conv(channels, (3, 3), 2, ((1, 1), (1, 1)), dtype=self.dtype, param_dtype=self.param_dtype)

    def pool(self, tokens: Float[Array, "b n width"]) -> Float[Array, "b width"]:
        """The class token of the last layer's tokens, normalised."""
        return self.post_norm(tokens[:, 0])

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b width"]:
        """The image's feature before the projection."""
        return self.pool(self.run_layers(self.embed(images)))


class TextTower(Tower):
    """The text tower; see `Tower` for its fields and `run_layers`."""

    config: TextConfig

    def setup(self) -> None:
        """Declares the parameters, with the standard deviations of OpenAI's code."""
        c = self.config
        self.token_embedding = self._param("token_embedding", 0.02, c.vocabulary, c.width)
        self.positions = self._param("positions", 0.01, c.context, c.width)
        self.blocks = self._blocks(causal=True)
        self.final_norm = self._norm()

    def embed(self, texts: Int[Array, "b n"]) -> Float[Array, "b n width"]:
        """The tokens that the first layer takes.

        Args:
          texts: Token ids, at most the config's context; ids outside the vocabulary give NaN.

        Raises:
          InputError: Other than [batch, n] integers, or more tokens than the context.
        """
        c = self.config
        if texts.ndim != 2 or not jnp.issubdtype(texts.dtype, jnp.integer):
            raise InputError(f"texts are [batch, n] token ids, not {texts.dtype} of shape {list(texts.shape)}")
        if texts.shape[1] > c.context:
            raise InputError(f"a text of {texts.shape[1]} tokens does not fit the context of {c.context}: cut it")
        # A negative id would count from the end of the table.
        ids = jnp.where(texts < 0, c.vocabulary, texts)
        rows = jnp.take(self.token_embedding, ids, axis=0, mode="fill", fill_value=jnp.nan)
        return rows.astype(self.dtype) + self.positions[: texts.shape[1]].astype(self.dtype)

    def token_states(self, texts: Int[Array, "b n"]) -> Float[Array, "b n width"]:
        """All tokens of the last layer, normalised: the `last_hidden_state` of transformers, and what latent diffusion sees."""
        return self.final_norm(self.run_layers(self.embed(texts)))

    def pool(self, tokens: Float[Array, "b n width"], texts: Int[Array, "b n"]) -> Float[Array, "b width"]:
        """The token at the end of each text, normalised; without an `end_of_text` in a text, its first token."""
        end = self.config.end_of_text
        place = jnp.argmax(texts if end is None else texts == end, axis=1)
        return self.final_norm(jnp.take_along_axis(tokens, place[:, None, None], axis=1)[:, 0])

    def __call__(self, texts: Int[Array, "b n"]) -> Float[Array, "b width"]:
        """The text's feature before the projection."""
        return self.pool(self.run_layers(self.embed(texts)), texts)


# -- the model --------------------------------------------------------------------------------------------------------


class Clip(nn.Module):
    """Both towers, or the one that the config has.

    Attributes:
      config: Sizes of the towers.
      dtype: Of the computation; features are float32 all the same.
      param_dtype: Of the parameters.
      remat: Whether to recompute each layer in the backward pass: less memory, more time.
    """

    config: ClipConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Declares the towers, their projections and, for two towers, the logarithm of the scale (1 / 0.07 at first)."""
        c, types = self.config, (self.dtype, self.param_dtype, self.remat)
        if c.vision:
            self.vision = VisionTower(c.vision, *types)
            self.image_projection = self._projection(c.vision.width)
        if c.text:
            self.text = TextTower(c.text, *types)
            self.text_projection = self._projection(c.text.width)
        if c.vision and c.text:
            self.logit_scale = self.param("logit_scale", nn.initializers.constant(-math.log(0.07)), (), jnp.float32)

    def _projection(self, width: int) -> nn.Dense | None:
        """Projects in float32: it costs next to nothing and is what features are compared by."""
        if self.config.projection is None:
            return None
        init = nn.initializers.normal(width**-0.5)
        return nn.Dense(self.config.projection, False, jnp.float32, self.param_dtype, kernel_init=init)

    def __call__(
        self, images: Float[Array, "b h w 3"] | None = None, texts: Int[Array, "t n"] | None = None
    ) -> dict[str, jax.Array]:
        """What a contrastive loss needs.

        Returns:
          `image` [b, projection] and `text` [t, projection], features of unit length, and `scale` (), with which their
          products are multiplied; what has no input or no tower is left out.
        """
        found = {}
        if images is not None:
            found["image"] = unit(self.encode_image(images))
        if texts is not None:
            found["text"] = unit(self.encode_text(texts))
        if len(found) == 2:
            found["scale"] = jnp.exp(self.logit_scale)
        return found

    def encode_image(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b projection"]:
        """The features of normalised images, not of unit length."""
        return self.image_feature(self.image_tokens(images))

    def encode_text(self, texts: Int[Array, "b n"]) -> Float[Array, "b projection"]:
        """The features of tokenised texts, not of unit length.

        Raises:
          InputError: This CLIP has no text tower, or the tokens do not fit it.
        """
        self._needs("text")
        return _project(self.text_projection, self.text(texts))

    def image_tokens(self, images: Float[Array, "b h w 3"], last: int | None = None) -> Float[Array, "b n width"]:
        """The tokens after the layers [:last]: all of them by default, -1 for the penultimate; not normalised."""
        self._needs("vision")
        return self.vision.run_layers(self.vision.embed(images), 0, last)

    def image_feature(self, tokens: Float[Array, "b n width"]) -> Float[Array, "b projection"]:
        """The feature from the last layer's tokens.

        Raises:
          InputError: This CLIP has no image tower.
        """
        self._needs("vision")
        return _project(self.image_projection, self.vision.pool(tokens))

    def _needs(self, tower: str) -> None:
        if getattr(self.config, tower) is None:
            raise InputError(f"this CLIP has no {'image' if tower == 'vision' else tower} tower: load one with both")


def _project(projection: nn.Dense | None, x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if projection is None else projection(x)


def param_shapes(module: Clip) -> dict[str, Any]:
    """Shapes and types of the parameters, without memory or arithmetic."""
    vision, text = module.config.vision, module.config.text
    images = vision and jax.ShapeDtypeStruct((1, *vision.height_width, 3), jnp.float32)
    texts = text and jax.ShapeDtypeStruct((1, text.context), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), images, texts)["params"]


# -- other image sizes ------------------------------------------------------------------------------------------------


def resize_clip(
    config: ClipConfig, params: dict[str, Any], image_size: int | tuple[int, int]
) -> tuple[ClipConfig, dict[str, Any]]:
    """The same CLIP for images of another size: its position embeddings are interpolated, all else is shared.

    Args:
      config: A CLIP with an image tower.
      params: Its parameters.
      image_size: Side of the new images in pixels, or (height, width); multiples of the patch.

    Raises:
      InputError: No image tower, or a size that patches do not fill.
    """
    if config.vision is None:
        raise InputError("this CLIP has no image tower whose image size could change")
    vision = dataclasses.replace(config.vision, image_size=image_size)
    positions = resize_positions(params["vision"]["positions"], config.vision.grid, vision.grid)
    params = {**params, "vision": {**params["vision"], "positions": positions}}
    return dataclasses.replace(config, vision=vision), params


def resize_positions(
    positions: Float[Array, "n width"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Array, "m width"]:
    """Interpolates position embeddings of patches to another grid; that of the class token stays.

    Bicubic as PyTorch's `interpolate(mode="bicubic", align_corners=False)`, which transformers' `interpolate_pos_encoding`
    uses: cubic convolution with a = -0.75, edges repeated, no smoothing when the grid shrinks. (Keys, Cubic Convolution
    Interpolation for Digital Image Processing, 1981; he, and `jax.image.resize`, take a = -0.5.)

    Args:
      positions: The class token's, then those of the patches by rows.
      grid: Rows and columns of patches now.
      new_grid: Rows and columns wanted.
    """
    if grid == new_grid:
        return positions
    patches = positions[1:].reshape(*grid, -1)
    rows, columns = (_bicubic_matrix(old, new) for old, new in zip(grid, new_grid))
    patches = jnp.einsum("pr,qc,rcw->pqw", rows, columns, patches.astype(jnp.float32), precision="highest")
    patches = patches.reshape(math.prod(new_grid), -1).astype(positions.dtype)
    return jnp.concatenate([positions[:1], patches])


def _bicubic_matrix(old: int, new: int) -> np.ndarray:
    """The matrix [new, old] that resamples a line."""
    place = (np.arange(new) + 0.5) * old / new - 0.5
    base = np.floor(place).astype(int)
    matrix, a = np.zeros((new, old)), -0.75
    for tap in range(-1, 3):
        d = np.abs(place - (base + tap))
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * (d**3 - 5 * d**2 + 8 * d - 4)
        np.add.at(matrix, (np.arange(new), np.clip(base + tap, 0, old - 1)), np.where(d <= 1, near, far))
    return matrix.astype(np.float32)
