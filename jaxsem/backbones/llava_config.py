"""Sizes of LLaVA: a frozen record, and those of the published models."""

import dataclasses
import math
from dataclasses import dataclass

from jaxsem.backbones.clip_config import VIT_L14_336, VisionConfig
from jaxsem.backbones.llama import LLAMA_7B, LLAMA_13B, MISTRAL_7B_V02, LlamaConfig
from jaxsem.errors import InputError
from jaxsem.nn.transformer import check_activation


@dataclass(frozen=True)
class LlavaConfig:
    """An image tower, a language model, and what joins them.

    Attributes:
      vision: The image tower.
      text: The language model.
      image_token: The id in whose place an image's embeddings come; it may lie outside the vocabulary.
      feature_layer: Whose tokens are taken: 0 are those before the first layer, -1 those after the last.
      keep_class: Whether the class token is taken too (`vision_feature_select_strategy` "full", not "default").
      activation: Between the projector's layers, a name in `jaxsem.nn.transformer.ACTIVATIONS`.
      projector_bias: Whether the projector has biases.
      grid_pinpoints: LLaVA-1.6: sizes (height, width) to which an image is resized and then cut into squares of the tower's size;
        empty for LLaVA-1.5, which sees one square.

    Raises:
      InputError: A value of another type, a layer that the tower has not, or sizes that squares do not fill.
    """

    vision: VisionConfig
    text: LlamaConfig
    image_token: int = 32000
    feature_layer: int = -2
    keep_class: bool = False
    activation: str = "gelu"
    projector_bias: bool = True
    grid_pinpoints: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.vision, VisionConfig) or not isinstance(self.text, LlamaConfig):
            raise InputError(
                f"LLaVA is made of a VisionConfig and a LlamaConfig, not of {self.vision!r:.80} and {self.text!r:.80}"
            )
        if type(self.image_token) is not int or self.image_token < 0:
            raise InputError(f"LLaVA has image_token={self.image_token!r}; it takes an id of at least 0")
        states = self.vision.layers + 1
        if type(self.feature_layer) is not int or not -states <= self.feature_layer < states:
            raise InputError(
                f"LLaVA takes the tokens of feature_layer={self.feature_layer!r}, and a tower of {self.vision.layers} layers has "
                f"those from {-states} to {states - 1}"
            )
        if type(self.keep_class) is not bool or type(self.projector_bias) is not bool:
            raise InputError(
                f"LLaVA has keep_class={self.keep_class!r} and projector_bias={self.projector_bias!r}; they are bools"
            )
        check_activation(str(self.activation))
        self._check_pinpoints()

    def _check_pinpoints(self) -> None:
        if not self.grid_pinpoints:
            return
        height, width = self.vision.height_width
        if height != width or self.keep_class:
            raise InputError(
                f"tiles are squares of patches alone, and this LLaVA has grid_pinpoints with images of {height}x{width} and "
                f"keep_class={self.keep_class}: leave the pinpoints out"
            )
        for point in self.grid_pinpoints:
            sides = point if type(point) is tuple and len(point) == 2 else (0,)
            if any(type(side) is not int or side < 1 or side % height for side in sides):
                raise InputError(
                    f"squares of {height} do not fill {point!r}: pinpoints are (height, width), multiples of it"
                )

    @property
    def depth(self) -> int:
        """Layers of the tower that run."""
        return self.feature_layer + (self.vision.layers + 1 if self.feature_layer < 0 else 0)

    @property
    def side(self) -> int:
        """Side of the square images that the tower takes.

        Raises:
          InputError: They are no squares.
        """
        height, width = self.vision.height_width
        if height != width:
            raise InputError(f"this LLaVA takes images of {height}x{width}, not squares: prepare them yourself")
        return height

    @property
    def square_tokens(self) -> int:
        """Visual tokens of one image of the tower's size."""
        return math.prod(self.vision.grid) + self.keep_class


_VISION = VIT_L14_336.vision
_VOCABULARY = 32064  # Llama's 32000, "<image>", "<pad>", and up to a multiple of 64
_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def _published(text: LlamaConfig, pinpoints: tuple[tuple[int, int], ...] = ()) -> LlavaConfig:
    return LlavaConfig(_VISION, dataclasses.replace(text, vocabulary=_VOCABULARY), grid_pinpoints=pinpoints)


LLAVA_15_7B = _published(LLAMA_7B)
LLAVA_15_13B = _published(LLAMA_13B)
LLAVA_16_VICUNA_7B = _published(LLAMA_7B, _PINPOINTS)
LLAVA_16_VICUNA_13B = _published(LLAMA_13B, _PINPOINTS)
LLAVA_16_MISTRAL_7B = _published(MISTRAL_7B_V02, _PINPOINTS)

# By the names of the models that llava-hf publishes.
CONFIGS = {
    "llava-1.5-7b": LLAVA_15_7B,
    "llava-1.5-13b": LLAVA_15_13B,
    "llava-v1.6-vicuna-7b": LLAVA_16_VICUNA_7B,
    "llava-v1.6-vicuna-13b": LLAVA_16_VICUNA_13B,
    "llava-v1.6-mistral-7b": LLAVA_16_MISTRAL_7B,
}
