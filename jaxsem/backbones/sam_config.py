"""Sizes of SAM: frozen records, and those of the published models."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from jaxsem.errors import InputError
from jaxsem.nn.attention import check_heads

MASK_STRIDE = 4  # pixels of the input to a pixel of a mask


@dataclass(frozen=True)
class EncoderConfig:
    """The image encoder: a ViT most of whose layers attend inside windows.

    Attributes:
      width: Channels of a token.
      layers: Transformer layers.
      heads: Attention heads.
      hidden: Width inside the MLPs.
      global_every: Every so many layers, counted from the first, the last one attends to the whole image.
      window: Side of a window in tokens.
      patch: Side of a patch in pixels.
      image_size: Side of the images in pixels.
      epsilon: Of the layer normalisations in the transformer.

    Raises:
      InputError: A size that cannot be, heads that do not divide the width, patches that do not fill the image, or layers
        that do not make whole groups.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    global_every: int
    window: int = 14
    patch: int = 16
    image_size: int = 1024
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        _check_counts(self, "image encoder")
        check_heads(self.width, self.heads)
        if self.patch % MASK_STRIDE:
            raise InputError(f"patches of {self.patch}: masks need a multiple of {MASK_STRIDE}")
        if self.image_size % self.patch:
            raise InputError(
                f"patches of {self.patch} do not fill an image of {self.image_size}: choose a multiple of it"
            )
        if self.global_every < 2 or self.layers % self.global_every:
            raise InputError(
                f"{self.layers} layers with a global one every {self.global_every} are no whole groups of window layers and a "
                f"global one: choose a divisor of the layers from 2 on"
            )

    @property
    def grid(self) -> int:
        """Rows of patches, and columns."""
        return self.image_size // self.patch

    @property
    def groups(self) -> int:
        """Groups of window layers with a global one at the end."""
        return self.layers // self.global_every

    @property
    def global_layers(self) -> tuple[int, ...]:
        """The layers that attend to the whole image."""
        return tuple(range(self.global_every - 1, self.layers, self.global_every))


@dataclass(frozen=True)
class DecoderConfig:
    """The mask decoder: a transformer in which prompts and image attend to each other.

    Attributes:
      layers: Two-way layers.
      heads: Attention heads.
      hidden: Width inside the MLPs.
      reduction: How many times narrower attention between prompts and image is than the tokens.
      masks: Masks for one ambiguous prompt; there is one more for prompts that are not.
      iou_layers: Linear layers of the head that predicts each mask's IoU.
      iou_hidden: Width between them.
      epsilon: Of the layer normalisations in the two-way layers: 1e-5 in Meta's code, which trained the published weights,
        and 1e-6 in transformers'.

    Raises:
      InputError: A size that cannot be.
    """

    layers: int = 2
    heads: int = 8
    hidden: int = 2048
    reduction: int = 2
    masks: int = 3
    iou_layers: int = 3
    iou_hidden: int = 256
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        _check_counts(self, "mask decoder")
        if self.iou_layers < 2:
            raise InputError("the IoU head has one layer: it takes at least 2")


@dataclass(frozen=True)
class SamConfig:
    """All of SAM.

    Attributes:
      encoder: The image encoder.
      decoder: The mask decoder.
      channels: Of an image embedding, a prompt and the decoder's tokens.
      mask_channels: Between the layers that embed a mask.

    Raises:
      InputError: Channels that cannot be divided as the decoder, or the embedding of masks, divides them.
    """

    encoder: EncoderConfig
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    channels: int = 256
    mask_channels: int = 16

    def __post_init__(self) -> None:
        _check_counts(self, "SAM")
        if self.channels % 8:  # sine and cosine halves, and an upscaling to an eighth
            raise InputError(f"{self.channels} channels: choose a multiple of 8")
        if self.mask_channels % 4:
            raise InputError(
                f"{self.mask_channels} channels between the layers that embed a mask: choose a multiple of 4"
            )
        if self.channels % self.decoder.reduction:
            raise InputError(f"{self.channels} channels cannot be made {self.decoder.reduction} times narrower")
        check_heads(self.channels, self.decoder.heads)
        check_heads(self.channels // self.decoder.reduction, self.decoder.heads)

    @property
    def mask_size(self) -> int:
        """Side of the masks that come out, and of those that go in."""
        return MASK_STRIDE * self.encoder.grid


def _check_counts(config: Any, kind: str) -> None:
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if entry.type is int and not (isinstance(value, int) and value >= 1):
            raise InputError(f"the {kind} has {entry.name}={value!r}; it takes an integer of at least 1")
        if entry.type is float and not 0 < value < 1:
            raise InputError(f"the {kind} has {entry.name}={value!r}; it takes a small positive number")


def _published(width: int, layers: int, heads: int) -> SamConfig:
    """A quarter of the layers is a group; MLPs are four times as wide."""
    return SamConfig(EncoderConfig(width, layers, heads, hidden=4 * width, global_every=layers // 4))


SAM_B = _published(768, 12, 12)
SAM_L = _published(1024, 24, 16)
SAM_H = _published(1280, 32, 16)

# By the names in Meta's code and in its files: sam_vit_b_01ec64, sam_vit_l_0b3195, sam_vit_h_4b8939.
CONFIGS = {"vit_b": SAM_B, "vit_l": SAM_L, "vit_h": SAM_H}
