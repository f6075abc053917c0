"""Sizes of CLIP: frozen records, and those of the published models."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from jaxsem.errors import InputError
from jaxsem.nn.attention import check_heads
from jaxsem.nn.transformer import check_activation


@dataclass(frozen=True)
class VisionConfig:
    """The image tower.

    Attributes:
      width: Channels of a token.
      layers: Transformer layers.
      heads: Attention heads.
      hidden: Width inside the MLPs.
      patch: Side of a patch in pixels.
      image_size: Side of the images in pixels, or (height, width).
      activation: "quick_gelu" (OpenAI's weights) or "gelu".
      epsilon: Of the layer normalisations.
      stem: Channels of 3x3 convolutions of stride 2 before the patches, each with a GELU; none in the published models. A small
        tower learns shapes several times faster with them (Xiao et al., Early convolutions help transformers see better, 2021).

    Raises:
      InputError: A size below 1, heads that do not divide the width, patches that do not fill the image, a stem that shrinks
        more than a patch, or an unknown activation.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    patch: int
    image_size: int | tuple[int, int] = 224
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    stem: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_tower(self, "image")
        if self.patch % 2 ** len(self.stem) or min(self.stem, default=1) < 1:
            raise InputError(
                f"a stem of {list(self.stem)} channels halves the image {len(self.stem)} times, which patches of {self.patch} "
                "do not allow: give at least 1 channel each, and patches that are a multiple"
            )
        if any(side < 1 or side % self.patch for side in self.height_width):
            height, width = self.height_width
            raise InputError(
                f"patches of {self.patch} do not fill an image of {height}x{width}: choose multiples of it"
            )

    @property
    def height_width(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.height_width
        return height // self.patch, width // self.patch

    @property
    def tokens(self) -> int:
        """Tokens of an image: one for each patch, and the class token before them."""
        return 1 + math.prod(self.grid)


@dataclass(frozen=True)
class TextConfig:
    """The text tower.

    Attributes:
      width: Channels of a token.
      layers: Transformer layers.
      heads: Attention heads.
      hidden: Width inside the MLPs.
      vocabulary: Number of token ids.
      context: Most tokens of a text, start and end included.
      activation: "quick_gelu" (OpenAI's weights) or "gelu".
      epsilon: Of the layer normalisations.
      end_of_text: The id whose first place gives the text's feature, as in transformers; None takes the place of the largest id
        of the text, as OpenAI's and open_clip's code does, and transformers where its config says `eos_token_id: 2`. With CLIP's
        own vocabulary, whose last id is the end of text, both are the same.

    Raises:
      InputError: A size below 1, heads that do not divide the width, an unknown activation, or an end outside the vocabulary.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    vocabulary: int = 49408
    context: int = 77
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    end_of_text: int | None = None

    def __post_init__(self) -> None:
        _check_tower(self, "text")
        if self.end_of_text is not None and not 0 <= self.end_of_text < self.vocabulary:
            raise InputError(
                f"the end of text, {self.end_of_text}, lies outside the vocabulary of {self.vocabulary} ids"
            )


@dataclass(frozen=True)
class ClipConfig:
    """Both towers, or one.

    Attributes:
      vision: The image tower, if there is one.
      text: The text tower, if there is one.
      projection: Width of the features; None takes the towers' own without projecting them, for a tower alone.

    Raises:
      InputError: No tower, or two without a projection.
    """

    vision: VisionConfig | None
    text: TextConfig | None
    projection: int | None

    def __post_init__(self) -> None:
        if self.vision is None and self.text is None:
            raise InputError("a CLIP without an image tower and without a text tower: give at least one of them")
        if self.projection is None and self.vision and self.text:
            raise InputError("a CLIP of two towers needs a projection, the width of the features they share")
        if self.projection is not None and self.projection < 1:
            raise InputError(f"features of width {self.projection}: the projection is at least 1")


def _check_tower(config: Any, kind: str) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is int and not (isinstance(value, int) and value >= 1):
            raise InputError(f"the {kind} tower has {field.name}={value!r}; it takes an integer of at least 1")
    check_heads(config.width, config.heads)
    check_activation(config.activation)


def _published(patch: int, image_size: int, vision: tuple[int, ...], text: tuple[int, ...], act: str) -> ClipConfig:
    """From (width, layers, heads) of the towers; MLPs are four times as wide, features as wide as the text."""
    return ClipConfig(
        VisionConfig(*vision, hidden=4 * vision[0], patch=patch, image_size=image_size, activation=act),
        TextConfig(*text, hidden=4 * text[0], activation=act),
        text[0],
    )


VIT_B32 = _published(32, 224, (768, 12, 12), (512, 12, 8), "quick_gelu")
VIT_B16 = _published(16, 224, (768, 12, 12), (512, 12, 8), "quick_gelu")
VIT_L14 = _published(14, 224, (1024, 24, 16), (768, 12, 12), "quick_gelu")
VIT_L14_336 = _published(14, 336, (1024, 24, 16), (768, 12, 12), "quick_gelu")
VIT_H14 = _published(14, 224, (1280, 32, 16), (1024, 24, 16), "gelu")

# By the names of OpenAI's models; the last is open_clip's ViT-H-14. Its own trainings of the smaller ones use "gelu".
CONFIGS = {
    "ViT-B/32": VIT_B32,
    "ViT-B/16": VIT_B16,
    "ViT-L/14": VIT_L14,
    "ViT-L/14@336px": VIT_L14_336,
    "ViT-H/14": VIT_H14,
}
