"""What SAM takes and what becomes of its masks: sizes and places of the image, of the padded input, and of masks.

An image is scaled so that its longer side is that of the input, and has zeros below it or on its right. Prompts are
scaled as the image is; a mask comes out for the padded input, a quarter of its size.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from jaxsem.data.images import pixels_from
from jaxsem.errors import InputError

# ImageNet's.
MEAN = np.float32([0.485, 0.456, 0.406])
STD = np.float32([0.229, 0.224, 0.225])

Size = tuple[int, int]


@dataclass(frozen=True)
class Inputs:
    """A batch as SAM takes it.

    Attributes:
      pixels: float32 [b, size, size, 3], normalised, zeros below or on the right of the image.
      original: Height and width of each image as it was given.
      resized: Height and width of each image in `pixels`.
    """

    pixels: Float[np.ndarray, "b size size 3"]
    original: tuple[Size, ...]
    resized: tuple[Size, ...]


def preprocess(images: Iterable[Any], size: int = 1024) -> Inputs:
    """Images as SAM takes them: longer side to `size` (bilinear, smoothed), normalised, padded with zeros.

    The same as transformers' `SamImageProcessorPil` and Meta's `ResizeLongestSide`; other than there, the shorter side of a very
    long image keeps one pixel.

    Args:
      images: Whatever `jaxsem.data.images.pixels_from` takes, uint8 arrays [h, w, 3] above all, of any sizes.
      size: Side in pixels that the model wants.

    Raises:
      InputError: No image, or something that is none.
    """
    images = [pixels_from(image) for image in images]
    if not images:
        raise InputError("there is no image to preprocess: give at least one")
    original = tuple((image.shape[0], image.shape[1]) for image in images)
    resized = tuple(resized_size(height_width, size) for height_width in original)
    pixels = np.zeros((len(images), size, size, 3), np.float32)
    for out, image, (height, width) in zip(pixels, images, resized):
        scaled = Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BILINEAR)
        out[:height, :width] = (np.asarray(scaled, np.float32) * np.float32(1 / 255) - MEAN) / STD
    return Inputs(pixels, original, resized)


def resized_size(original: Size, size: int = 1024) -> Size:
    """Height and width that an image has in the padded input: the longer side is `size`."""
    height, width = original
    scale = size / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def scale_prompts(places: Any, original: Size, size: int = 1024) -> Float[np.ndarray, "*n xy"]:
    """Points or boxes in pixels of an image, as places in the padded input.

    Args:
      places: [..., 2] points (x, y), or [..., 4] boxes (left, top, right, bottom).
      original: Height and width of the image.
      size: Side of the padded input.

    Raises:
      InputError: The last axis is neither 2 nor 4.
    """
    places = np.asarray(places, np.float64)
    if places.ndim == 0 or places.shape[-1] not in (2, 4):
        raise InputError(f"places are [..., 2] points or [..., 4] boxes, not of shape {list(places.shape)}")
    (height, width), (new_height, new_width) = original, resized_size(original, size)
    scale = [new_width / width, new_height / height] * (places.shape[-1] // 2)
    return (places * scale).astype(np.float32)


def postprocess_masks(
    logits: Float[Array, "*n h w"], original: Size, size: int = 1024
) -> Float[Array, "*n height width"]:
    """Masks at the size of the image: made as large as the padded input, cropped, and resized, bilinear both times.

    The logits of transformers' `post_process_masks` and Meta's `postprocess_masks`; a mask is where they are above 0. The two
    steps are linear in rows and in columns, so both together are one matrix on each side, and the large masks between
    them are never made.

    Args:
      logits: Of `Sam.predict_masks`, for one image.
      original: Height and width of the image, of `Inputs`.
      size: Side of the padded input.

    Raises:
      InputError: Logits that are no masks, or a size below 1.
    """
    if logits.ndim < 2 or min(original) < 1:
        raise InputError(
            f"logits of shape {list(logits.shape)} for an image of {original[0]}x{original[1]}: give [..., h, w], and its size"
        )
    lines = zip(logits.shape[-2:], resized_size(original, size), original)
    rows, columns = (mask_matrix(low, size, resized, full) for low, resized, full in lines)
    return resample(logits, rows, columns)


@jax.jit
def resample(
    logits: Float[Array, "*n h w"], rows: Float[Array, "p h"], columns: Float[Array, "q w"]
) -> Float[Array, "*n p q"]:
    """Gives rows · logits · columnsᵀ in float32.

    With matrices of `mask_matrix` that have zeros below, up to some larger size, one program serves images of many sizes.
    """
    logits = logits.astype(jnp.float32)
    return jnp.einsum("ph,...hw,qw->...pq", rows, logits, columns, precision="highest")


def mask_matrix(low: int, size: int, resized: int, original: int) -> Float[np.ndarray, "original low"]:
    """The matrix that brings a line of a mask to that of the image: low to size, the first `resized` of it, to original."""
    return (_bilinear(resized, original) @ _bilinear(low, size)[:resized]).astype(np.float32)


def _bilinear(old: int, new: int) -> np.ndarray:
    """The matrix [new, old] of PyTorch's `interpolate(mode="bilinear", align_corners=False)`: it does not smooth."""
    place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    base = np.floor(place).astype(int)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new), base), 1 - (place - base))
    np.add.at(matrix, (np.arange(new), np.minimum(base + 1, old - 1)), place - base)
    return matrix
