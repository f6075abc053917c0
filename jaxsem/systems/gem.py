"""GEM: where in an image a phrase is, from a CLIP that was only trained to say whether it is there.

    model = load_clip_model("openai/clip-vit-base-patch16")
    heat = heat_maps(model, images, ["traffic sign", "lighthouse"])      # float32 [images, 2, 448, 448], each 0 to 1

CLIP's own patch tokens say little about their place: its last layers gather everything in the class token. GEM runs a second
stream beside the last blocks, in which tokens gather from tokens that are like themselves:

```
        ┌─ x ── block ── x ── block ── x          the original stream, unchanged
tokens ─┤       │ q, k, v     │ q, k, v
        └─ g ── + ────── g ── + ────── g ── norm ── projection ── unit ── cosine with the text's feature
```

In a block with q, k, v [n, d] of one head of the original stream, normalised by rows before each product, and
τ = (mean length of the tokens after the first layer normalisation) / sqrt(d):

    `iterations` times, for p each of q, k, v:  p <- softmax(τ p pᵀ) p
    o_p = softmax(τ p pᵀ) v,  and  g <- g + out((o_q + o_k + o_v) / 3)

No MLP is applied to g. The class token takes part and is left out of the map.

Everything works on CLIPs of any size, with a convolutional stem or without. The published settings cover the last 6 blocks of
towers of 12 or more; for a small tower choose the depth, `GemConfig(depth=3)` for the last 2, or see `MINI`.

Source: Bousselham et al., Grounding Everything: emerging localization properties in vision-language transformers
(arXiv:2312.00878, 2023), and its released code for what the paper leaves open.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from jaxsem.backbones.clip import Clip
from jaxsem.backbones.clip_inputs import normalize
from jaxsem.data.images import pixels_from
from jaxsem.errors import InputError
from jaxsem.nn.ops import unit
from jaxsem.nn.transformer import Block, LayerNorm
from jaxsem.systems.clip_model import ClipModel, default_batch, filled, prepare_ahead

__all__ = ["MINI", "GemConfig", "gem_tokens", "heat_maps", "min_max", "similarity_maps"]


@dataclass(frozen=True)
class GemConfig:
    """How GEM looks at an image.

    Attributes:
      depth: One more than the blocks that the second stream runs through, counted from the last, as the released code counts; at
        least 2. It is never cut to fit: a tower with fewer than depth - 1 layers is refused.
      iterations: How often the tokens are pulled together before they gather values; 0 or more.
      temperature: τ above, for all images; None takes each image's own.
      template: The prompt, with `{}` for the phrase; None takes the prompts of the CLIP, averaged.
      image_size: What images are resized to for the tower: a side in pixels or (height, width), multiples of the patch; None is
        the size that the CLIP was trained at.

    Raises:
      InputError: A number out of range, or a template without a place for the phrase.
    """

    depth: int = 7
    iterations: int = 1
    temperature: float | None = None
    template: str | None = "a photo of a {}."
    image_size: int | tuple[int, int] | None = 448

    def __post_init__(self) -> None:
        for name, least in (("depth", 2), ("iterations", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"GEM has {name}={value!r}; it takes an integer of at least {least}")
        known = self.temperature is not None
        if known and not (isinstance(self.temperature, int | float) and 0 < self.temperature < math.inf):
            raise InputError(
                f"GEM's temperature is a number above 0, or None for each image's own, not {self.temperature!r}"
            )
        if self.template is not None and (not isinstance(self.template, str) or "{}" not in self.template):
            raise InputError(f"the prompt {self.template!r} has no place for the phrase: write {{}} there")
        if self.image_size is not None:
            sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2
            if len(sides) != 2 or any(
                isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides
            ):
                raise InputError(
                    f"images are resized to a side or (height, width) in pixels, not to {self.image_size!r}"
                )


DEFAULT = GemConfig()
_ARTICLE = re.compile(r"^(a|an|the)\s+", re.IGNORECASE)

MINI = GemConfig(depth=5, temperature=10.0, template=None, image_size=256)
"""For the CLIP of pqvae-mini, through all of its 4 layers. Of 334 objects in 128 test scenes, named by colour and shape, the map is
highest on the object for 37 % (by chance 4 %), and what exceeds half of its range overlaps it with an IoU of 0.31; with each
image's own temperature these are 27 % and 0.17."""


# -- maps of images ---------------------------------------------------------------------------------------------------


def heat_maps(
    model: ClipModel,
    images: Iterable[Any],
    phrases: Sequence[str],
    config: GemConfig = DEFAULT,
    size: tuple[int, int] | None = None,
) -> Float[np.ndarray, "images phrases h w"]:
    """Where in each image each phrase is: `min_max` of the `similarity_maps`, whose arguments it takes.

    A map always runs from 0 to 1, also of a phrase that is nowhere in the image: `jaxsem.systems.weight_map.find_region` tells
    from the similarities.
    """
    return min_max(similarity_maps(model, images, phrases, config, size))


def similarity_maps(
    model: ClipModel,
    images: Iterable[Any],
    phrases: Sequence[str],
    config: GemConfig = DEFAULT,
    size: tuple[int, int] | None = None,
) -> Float[np.ndarray, "images phrases h w"]:
    """The cosine of each place's GEM feature and each phrase's feature, bilinear between the centres of patches.

    Args:
      model: A CLIP with both towers.
      images: Whatever `jaxsem.data.images.pixels_from` takes, of any sizes; each is resized to the tower's input without keeping
        its aspect (bicubic), as in the released code.
      phrases: "lighthouse", "the small red star": what takes the place in the template, where an article stands already and theirs
        is left out.
      config: Settings.
      size: Height and width of the maps; None is the tower's input. An image's own size lays the map over the image.

    Returns:
      float32, -1 to 1.

    Raises:
      InputError: No image, no phrase or an empty one, or a depth, image size or map size that does not fit.
    """
    vision = model.module.config.vision
    if vision is None or model.module.config.text is None:
        raise InputError(f"{model.name} lacks a tower, and heat maps need images and texts: load a CLIP with both")
    height, width = _height_width(config.image_size) or vision.height_width
    _check_fit(model.module, config, height, width)
    size = (height, width) if size is None else tuple(size)
    if len(size) != 2 or min(size) < 1:
        raise InputError(f"a map has a height and a width of at least 1, not {size}")
    images = list(images)
    if not images:
        raise InputError("there is no image to look at: give at least one")
    # One text for several is refused below, where it would be for classes.
    bare = phrases if isinstance(phrases, str) else [_ARTICLE.sub("", phrase.strip()) for phrase in phrases]
    texts = model.class_features(bare, None if config.template is None else (config.template,))

    def prepare(image: Any) -> np.ndarray:
        resized = Image.fromarray(np.ascontiguousarray(pixels_from(image)))
        return np.asarray(resized.resize((width, height), Image.Resampling.BICUBIC))

    batch = min(default_batch(), 1 << (len(images) - 1).bit_length())
    parts = []
    for rows in prepare_ahead(prepare, images, batch):
        crops = normalize(filled(np.stack(rows), batch).astype(np.float32) / 255.0)
        found = _compare(gem_tokens(model.module, model.params, crops, config), texts, size)
        parts.append(np.asarray(found)[: len(rows)])
    return np.concatenate(parts)


def min_max(maps: Float[np.ndarray, "*b h w"]) -> Float[np.ndarray, "*b h w"]:
    """Each map [h, w] less its smallest value and divided by its range, 0 to 1; a constant map becomes 0."""
    maps = np.asarray(maps, np.float32)
    low, high = (pick(axis=(-2, -1), keepdims=True) for pick in (maps.min, maps.max))
    return (maps - low) / np.where(high > low, high - low, np.float32(1))


@partial(jax.jit, static_argnames="size")
def _compare(tokens: jax.Array, texts: jax.Array, size: tuple[int, int]) -> jax.Array:
    maps = jnp.einsum("bpqc,tc->btpq", tokens, texts, precision="highest")
    return jax.image.resize(maps, (*maps.shape[:2], *size), "bilinear", antialias=False)


# -- tokens -----------------------------------------------------------------------------------------------------------


def gem_tokens(
    module: Clip, params: Any, images: Float[Array, "b h w 3"], config: GemConfig = DEFAULT
) -> Float[Array, "b rows columns projection"]:
    """GEM's features of the patches, in the space of CLIP's texts; compiled, and differentiable.

    Args:
      module: A CLIP with an image tower.
      params: Its parameters.
      images: Normalised, of any size that patches fill. Where it is not the tower's own, the position embeddings are
        interpolated as in the released code: cubic convolution with a = -0.5, smoothed when the grid shrinks. (`resize_clip`
        takes a = -0.75 without smoothing, as transformers does.)
      config: Settings; its template and image size do not matter here. Another temperature compiles nothing new.

    Returns:
      float32, of unit length.

    Raises:
      InputError: No image tower, fewer layers than the depth asks for, or images that are none or that patches do not fill.
    """
    if np.ndim(images) != 4:
        raise InputError(
            f"GEM takes normalised images [batch, height, width, 3], not of shape {list(np.shape(images))}"
        )
    _check_fit(module, config, *images.shape[1:3])
    return _gem_tokens(module, params, images, config.depth, config.iterations, config.temperature)


@partial(jax.jit, static_argnames=("module", "depth", "iterations"))
def _gem_tokens(
    module: Clip, params: Any, images: jax.Array, depth: int, iterations: int, temperature: jax.Array | float | None
) -> jax.Array:
    module, params = _resized(module, params, images.shape[1:3])
    vision, types = module.config.vision, {"dtype": module.dtype, "param_dtype": module.param_dtype}
    first = vision.layers - (depth - 1)
    tokens = module.apply({"params": params}, images, first, method="image_tokens")
    block = Block(vision.heads, vision.hidden, vision.activation, epsilon=vision.epsilon, depth=vision.layers, **types)
    norm, dense = LayerNorm(vision.epsilon, **types), nn.Dense(vision.width, **types)

    def step(streams: tuple[jax.Array, jax.Array], layer: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, g = streams
        y, attention = norm.apply({"params": layer["norm1"]}, x), layer["attention"]
        q, k, v = (
            dense.apply({"params": attention[name]}, y).reshape(*y.shape[:2], vision.heads, -1)
            for name in ("query", "key", "value")
        )
        tau = _mean_length(y) * q.shape[-1] ** -0.5 if temperature is None else jnp.asarray(temperature, jnp.float32)
        gathered = sum(_gather(p, v, tau, iterations) for p in (q, k, v)) / 3
        g = g + dense.apply({"params": attention["out"]}, gathered.reshape(y.shape))
        return (block.apply({"params": layer}, x), g), None

    # The blocks of the span are a slice of the stack; the scan compiles one of them.
    span = jax.tree.map(lambda p: p[first:], params["vision"]["blocks"])
    (_, g), _ = jax.lax.scan(step, (tokens, tokens), span)
    # `image_feature` normalises and projects the first token of each row; here every patch is a row.
    patches = g[:, 1:].reshape(-1, 1, vision.width)
    features = unit(module.apply({"params": params}, patches, method="image_feature"))
    return features.reshape(len(images), *vision.grid, -1)


def _gather(p: jax.Array, v: jax.Array, tau: jax.Array, iterations: int) -> jax.Array:
    """What tokens [b, n, heads, d] gather from those like them; τ is [b, 1, 1, 1] or ()."""

    def attend(p: jax.Array, values: jax.Array) -> jax.Array:
        p = unit(p.astype(jnp.float32))
        query, key = (tau * p).astype(v.dtype), p.astype(v.dtype)
        return jax.nn.dot_product_attention(query, key, key if values is None else values, scale=1.0)

    for _ in range(iterations):
        p = attend(p, None)
    return attend(p, v)


def _mean_length(y: jax.Array) -> jax.Array:
    """The mean length of the tokens [b, n, width] of each image: [b, 1, 1, 1]."""
    lengths = jnp.linalg.norm(y.astype(jnp.float32), axis=-1)
    return lengths.mean(axis=-1)[:, None, None, None]


def _resized(module: Clip, params: Any, size: tuple[int, int]) -> tuple[Clip, Any]:
    """The CLIP for images of another size; see `gem_tokens` for why not `resize_clip`."""
    old = module.config.vision
    new = dataclasses.replace(old, image_size=size)
    if new.grid == old.grid:
        return module, params
    positions = jnp.asarray(params["vision"]["positions"])
    patches = positions[1:].reshape(*old.grid, -1).astype(jnp.float32)
    patches = jax.image.resize(patches, (*new.grid, old.width), "cubic", antialias=True)
    positions = jnp.concatenate([positions[:1], patches.reshape(-1, old.width).astype(positions.dtype)])
    params = {**params, "vision": {**params["vision"], "positions": positions}}
    return module.clone(config=dataclasses.replace(module.config, vision=new)), params


# -- checks -----------------------------------------------------------------------------------------------------------


def _check_fit(module: Clip, config: GemConfig, height: int, width: int) -> None:
    vision = module.config.vision
    if vision is None:
        raise InputError("this CLIP has no image tower to run GEM in: load one with it")
    if config.depth - 1 > vision.layers:
        raise InputError(
            f"GEM of depth {config.depth} runs through the last {config.depth - 1} blocks and this image tower has "
            f"{vision.layers}: choose GemConfig(depth={vision.layers + 1}) or less"
        )
    dataclasses.replace(vision, image_size=(height, width))  # refuses what patches do not fill


def _height_width(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else size
