"""CLIP scores: how well captions describe images, as the cosine of their CLIP features, on either of two scales.

    clip_score(model, images, captions).mean                # 100 cos: about 30 for good captions and ViT-B or ViT-L
    clip_score(model, images, captions, CLIPSCORE).mean     # 2.5 max(cos, 0): about 0.75

Figures depend on the CLIP: name it beside them.

Sources: Hessel et al., CLIPScore: A Reference-free Evaluation Metric for Image Captioning (EMNLP 2021), with ViT-B/32;
the scale of 100 is that of torchmetrics, with ViT-L/14 by default.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxsem.errors import InputError
from jaxsem.nn.ops import unit


@dataclass(frozen=True)
class Convention:
    """What becomes of a cosine.

    Attributes:
      scale: Its factor.
      clip_each: Whether each negative score counts as 0; if not, only a negative mean does.
      prefix: Written before each caption.
    """

    scale: float
    clip_each: bool
    prefix: str = ""


PERCENT = Convention(100.0, clip_each=False)
"""100 cos, the captions as they are."""

CLIPSCORE = Convention(2.5, clip_each=True, prefix="A photo depicts ")
"""2.5 max(cos, 0), each caption after "A photo depicts"."""


class Encoder(Protocol):
    """What is needed of a CLIP; `jaxsem.systems.clip_model.ClipModel` has it."""

    def encode_images(self, images: Iterable[Any]) -> Float[np.ndarray, "b width"]:
        """Features of images."""

    def encode_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "b width"]:
        """Features of texts."""


@dataclass(frozen=True, eq=False)
class ClipScore:
    """Scores of images and their captions.

    Attributes:
      mean: That of the set.
      scores: float32, one for each pair.
    """

    mean: float
    scores: np.ndarray


def clip_score(
    model: Encoder, images: Iterable[Any], captions: Sequence[str], convention: Convention = PERCENT
) -> ClipScore:
    """Scores images against one caption each.

    Args:
        model: a CLIP with both towers.
        images: whatever the model encodes, uint8 arrays above all.
        captions: as many texts, in the same order; one that is longer than the model's context is refused, not cut.
        convention: `PERCENT` or `CLIPSCORE`.

    Returns:
        The mean and the score of each pair.

    Raises:
        InputError: no caption, one text in place of a list, not as many captions as images, what the model cannot
            encode, or features that are not finite.
    """
    if isinstance(captions, str):
        raise InputError(f"Captions are a list of texts, one for each image, but this is the one text {captions!r}.")
    if len(captions) == 0:
        raise InputError("There is no caption to score: give one for each image.")
    # Texts first: a caption that is too long is found before the images have taken their time.
    texts = model.encode_texts([convention.prefix + caption for caption in captions])
    found = model.encode_images(images)
    if len(found) != len(captions):
        raise InputError(f"{len(found)} images cannot be scored with {len(captions)} captions: give one for each.")
    scores = np.asarray(pair_scores(found, texts, convention))
    if not np.isfinite(scores).all():
        bad = np.flatnonzero(~np.isfinite(scores))
        raise InputError(
            f"The features of {len(bad)} of {len(scores)} pairs are not finite, the first of them number "
            f"{bad[0] + 1}: look at that pair and at the weights."
        )
    return ClipScore(max(float(scores.mean(dtype=np.float64)), 0.0), scores)


def pair_scores(
    image_features: Float[jax.Array, "b width"],
    text_features: Float[jax.Array, "b width"],
    convention: Convention = PERCENT,
) -> Float[jax.Array, " b"]:
    """The scores of pairs of features, of any length: pure and differentiable.

    Raises:
        InputError: features of different shapes, or not [b, width].
    """
    shapes = np.shape(image_features), np.shape(text_features)
    if shapes[0] != shapes[1] or len(shapes[0]) != 2:
        raise InputError(
            f"Features of images and texts are both [pairs, width], but these have {list(shapes[0])} and "
            f"{list(shapes[1])}."
        )
    images, texts = (unit(jnp.asarray(features, jnp.float32)) for features in (image_features, text_features))
    cosines = (images * texts).sum(axis=-1)  # 0 for a zero vector, NaN for one with NaN
    return convention.scale * (jnp.maximum(cosines, 0.0) if convention.clip_each else cosines)
