"""The transform-neck: from a codec's latent straight to tokens inside the visual encoder of a multimodal model.

    y_hat [b, h, w, m] ── linear ── class token ── positions ── norm ── block ─▶ tokens [b, 1 + h w, width]
    tokens ── layers k.. of CLIP's image tower, unchanged ─▶ what the language model takes

The patch embedding and the first k layers of the tower are bypassed, and no image is decoded. With ELIC's 320 channels and
CLIP ViT-L/14 the neck has 13,191,168 parameters.

Source: Kao et al., Bridging Compressed Image Latents and Multimodal Large Language Models (ICLR 2025; papers/2), section 3.3 and
the released code, which has the norm before the block that the text does not count.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsem.backbones.clip import Clip, resize_positions
from jaxsem.backbones.clip_config import VisionConfig
from jaxsem.backbones.convnext import ConvNext, ConvNextConfig
from jaxsem.errors import InputError
from jaxsem.nn.transformer import Block, LayerNorm

BYPASSED = 2  # layers of the paper's main experiments
_STRETCH = 2.0  # how much longer or shorter than trained a side of the latent may be


@dataclass(frozen=True)
class NeckConfig:
    """Sizes of a neck.

    Attributes:
      latent: Channels of the codec's latent y.
      vision: The image tower that it feeds; widths, heads, activation and epsilon are its own.
      grid: Rows and columns of the latent that it was trained on; by default the tower's patches.
      bypassed: Layers of the tower that are not run, from the first on.
      blocks: Blocks of the neck; the paper has one. A small tower's few layers each do more, and more is to be made up for.

    Raises:
      InputError: A size below 1, or more layers bypassed than there are.
    """

    latent: int
    vision: VisionConfig
    grid: tuple[int, int] | None = None
    bypassed: int = BYPASSED
    blocks: int = 1

    def __post_init__(self) -> None:
        if self.grid is None:
            object.__setattr__(self, "grid", self.vision.grid)
        if min(self.latent, self.blocks) < 1 or len(self.grid) != 2 or min(self.grid) < 1:
            raise InputError(
                f"a neck of {self.blocks} blocks for {self.latent} channels on a grid of {self.grid}: every size is at least 1"
            )
        if not 0 <= self.bypassed <= self.vision.layers:
            raise InputError(
                f"bypassed={self.bypassed} layers of a tower of {self.vision.layers}: give 0 to {self.vision.layers}"
            )


@dataclass(frozen=True)
class NeckCodecConfig:
    """Sizes of an image codec and its neck.

    Attributes:
      system: Family of the codec, see `jaxsem.codecs`.
      codec: Its config.
      neck: The neck's.
      scenario: "d1", "d2" or "d3".
    """

    system: str
    codec: Any
    neck: NeckConfig
    scenario: str = "d1"

    @property
    def lambdas(self) -> tuple[float, ...]:
        """Those of the codec."""
        return self.codec.lambdas


class TransformNeck(nn.Module):
    """The neck; see the module's docstring.

    Attributes:
      config: Sizes.
      dtype: Of the computation.
      param_dtype: Of the parameters.
    """

    config: NeckConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declares the parameters; class token and positions with the released code's variance, 1 / width."""
        c, v = self.config, self.config.vision
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.normal(v.width**-0.5)
        self.projection = nn.Dense(v.width, **types)
        self.class_embedding = self.param("class_embedding", init, (v.width,), self.param_dtype)
        self.positions = self.param("positions", init, (1 + math.prod(c.grid), v.width), self.param_dtype)
        self.pre_norm = LayerNorm(v.epsilon, **types)
        self.block = Block(v.heads, v.hidden, v.activation, epsilon=v.epsilon, **types)
        self.more = [Block(v.heads, v.hidden, v.activation, epsilon=v.epsilon, **types) for _ in range(c.blocks - 1)]

    def __call__(self, y_hat: Float[Array, "b h w m"]) -> Float[Array, "b n width"]:
        """The tokens that layer `bypassed` of the tower takes, the class token first.

        Raises:
          InputError: A latent of another codec, or a grid far from the trained one.
        """
        c = self.config
        check_latent(c, y_hat.shape[1:])
        grid = y_hat.shape[1:3]
        x = self.projection(y_hat.astype(self.dtype)).reshape(len(y_hat), -1, c.vision.width)
        first = jnp.broadcast_to(jnp.asarray(self.class_embedding, self.dtype), (len(x), 1, c.vision.width))
        positions = resize_positions(jnp.asarray(self.positions), c.grid, grid).astype(self.dtype)
        x = self.block(self.pre_norm(jnp.concatenate([first, x], axis=1) + positions))
        for block in self.more:
            x = block(x)
        return x


# -- a neck into a convolutional encoder ------------------------------------------------------------------------------


@dataclass(frozen=True)
class MapNeckConfig:
    """Sizes of a neck into a ConvNeXt.

    Attributes:
      latent: Channels of the codec's latent y.
      encoder: The encoder that it feeds.
      grid: Rows and columns of the latent that it was trained on.
      stage: The stage that it enters, behind the halving at its start; stages before it are not run. The third of a ConvNeXt has a
        codec's stride, 16.
      head_width: Channels of an attention head; those of the stage are a multiple.

    Raises:
      InputError: A size below 1, no such stage, or a head that does not divide the stage's channels.
    """

    latent: int
    encoder: ConvNextConfig
    grid: tuple[int, int] = (16, 16)
    stage: int = 2
    head_width: int = 64

    def __post_init__(self) -> None:
        if self.latent < 1 or len(self.grid) != 2 or min(self.grid) < 1:
            raise InputError(f"a neck for {self.latent} channels on a grid of {self.grid}: every size is at least 1")
        if not 0 <= self.stage < len(self.encoder.widths):
            raise InputError(f"stage={self.stage} of an encoder of {len(self.encoder.widths)} stages")
        if self.head_width < 1 or self.width % self.head_width:
            raise InputError(
                f"heads of {self.head_width} channels do not divide the {self.width} of stage {self.stage}"
            )

    @property
    def width(self) -> int:
        """Channels of the stage."""
        return self.encoder.widths[self.stage]


class MapNeck(nn.Module):
    """The neck into a ConvNeXt: as `TransformNeck`, without a class token, and its tokens are a map again.

    How the paper's experiment with a ConvNeXt encoder (section 4.6, Osprey) connects is not published; this is the same neck at the
    stage that has the latent's stride.

    Attributes:
      config: Sizes.
      dtype: Of the computation.
      param_dtype: Of the parameters.
    """

    config: MapNeckConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, y_hat: Float[Array, "b h w m"]) -> Float[Array, "b h w width"]:
        """What the blocks of the stage take: `ConvNext.run_stages(x, stage, block=0)`.

        Raises:
          InputError: A latent of another codec, or a grid far from the trained one.
        """
        c, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        check_latent(c, y_hat.shape[1:])
        init = nn.initializers.normal(c.width**-0.5)
        positions = self.param("positions", init, (math.prod(c.grid), c.width), self.param_dtype)
        # `resize_positions` leaves the first row, a class token's, as it is.
        padded = jnp.concatenate([jnp.zeros((1, c.width), self.param_dtype), jnp.asarray(positions)])
        positions = resize_positions(padded, c.grid, y_hat.shape[1:3])[1:].astype(self.dtype)
        x = nn.Dense(c.width, name="projection", **types)(y_hat.astype(self.dtype)).reshape(len(y_hat), -1, c.width)
        x = LayerNorm(name="pre_norm", **types)(x + positions)
        block = Block(c.width // c.head_width, 4 * c.width, c.encoder.activation, name="block", **types)
        return block(x).reshape(*y_hat.shape[:3], c.width)


def map_features(
    neck: MapNeck, neck_params: Any, encoder: ConvNext, params: Any, y_hat: jax.Array
) -> Float[Array, "b h w width"]:
    """The last stage's map of a ConvNeXt from a codec's latent [b, h, w, m]."""
    x = neck.apply({"params": neck_params}, y_hat)
    return encoder.apply({"params": params}, x, neck.config.stage, block=0, method="run_stages")


# -- shared ---------------------------------------------------------------------------------------------------------------


def check_latent(config: NeckConfig | MapNeckConfig, shape: tuple[int, int, int]) -> None:
    """Refuses a latent [h, w, m] that the neck cannot take, before any work.

    Raises:
      InputError: Another number of channels, or a side more than twice or less than half of the trained one.
    """
    height, width, channels = shape
    if channels != config.latent:
        raise InputError(
            f"this neck was trained for a codec with {config.latent} channels, and this latent has {channels}: load the neck "
            "that belongs to the codec"
        )
    rows, columns = config.grid
    stretch = max(height / rows, rows / height, width / columns, columns / width)
    if stretch > _STRETCH:
        raise InputError(
            f"the image is {16 * height}x{16 * width} pixels, too far from the {16 * rows}x{16 * columns} that this neck was "
            "trained for: resize it before it is compressed"
        )


def param_shapes(module: TransformNeck | MapNeck) -> dict[str, Any]:
    """Shapes and types of the parameters, without memory or arithmetic."""
    y_hat = jax.ShapeDtypeStruct((1, *module.config.grid, module.config.latent), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), y_hat)["params"]


# -- the tower behind the neck ------------------------------------------------------------------------------------------


def keep_layers(params: dict[str, Any], bypassed: int) -> dict[str, Any]:
    """The parameters of an image tower without its first layers and what comes before them.

    What stays runs as a tower of `rest_of` layers: bypassed layers take no memory on the device.

    Args:
      params: Of `Clip`; its text tower stays.
      bypassed: Layers to leave out.
    """
    vision = dict(params["vision"])
    vision["blocks"] = jax.tree.map(lambda p: p[bypassed:], vision["blocks"])
    return {**params, "vision": vision}


def rest_of(vision: VisionConfig, bypassed: int) -> VisionConfig:
    """The config of the layers that `keep_layers` keeps.

    Raises:
      InputError: Nothing is kept.
    """
    if bypassed >= vision.layers:
        raise InputError(f"{bypassed} of {vision.layers} layers bypassed leave no tower to run")
    return dataclasses.replace(vision, layers=vision.layers - bypassed)


def image_tokens(clip: Clip, params: Any, images: jax.Array, last: int | None = None) -> jax.Array:
    """The tower's tokens [b, n, width] from normalised images [b, h, w, 3], after the layers [:last]."""
    return clip.apply({"params": params}, images, last, method="image_tokens")


def neck_tokens(
    neck: TransformNeck, neck_params: Any, clip: Clip, params: Any, y_hat: jax.Array, last: int | None = None
) -> jax.Array:
    """The tower's tokens [b, n, width] from a codec's latent [b, h, w, m], after the layers [:last]."""
    tokens = neck.apply({"params": neck_params}, y_hat)

    def rest(model: Clip, tokens: jax.Array) -> jax.Array:
        return model.vision.run_layers(tokens, neck.config.bypassed, last)

    return clip.apply({"params": params}, tokens, method=rest)


def check_tower(config: NeckConfig, vision: VisionConfig) -> None:
    """Refuses a neck for another image tower than a model has.

    Raises:
      InputError: Names what differs.
    """
    mine, theirs = (dataclasses.asdict(each) for each in (config.vision, vision))
    differing = sorted(name for name in mine if mine[name] != theirs[name])
    if differing:
        shown = ", ".join(f"{name} {mine[name]!r} (the model has {theirs[name]!r})" for name in differing)
        raise InputError(f"this neck feeds another image tower than the model's: {shown}")
