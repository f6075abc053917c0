"""What LLaVA takes of an image: one square, or, since 1.6, a small one and the tiles of a large one. All on the host.

A size of several is chosen for the image, which is resized into it and laid upon black. Its tiles and the whole image as one
square go through the tower. The tokens of the tiles are then laid out as the rows of one large picture, those of the
black bars are left out, and after each row comes a learned "newline":

    square ──▶ 576 tokens ───────────────────────────────────────────────────────────▶ 576 embeddings
    tiles  ──▶ rows x columns of 24x24 tokens ── without the bars ── newline a row ──▶ as many as the size tells

Source: Liu et al., Improved Baselines with Visual Instruction Tuning (2024), for the square; Liu et al., LLaVA-NeXT (blog,
2024); and transformers' LlavaImageProcessorPil, LlavaNextImageProcessorPil and `pack_image_features`, with which this agrees.
"""

import math

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from jaxsem.backbones.clip_inputs import MEAN, square_crop
from jaxsem.backbones.llava_config import LlavaConfig
from jaxsem.errors import InputError

FITS = ("pad", "crop")
NEWLINE = -1  # its place in `tile_order`

_BARS = tuple(int(channel * 255) for channel in MEAN.astype(float))  # CLIP's mean colour
# Beyond this ratio of the sides, the image is resized before it is padded: a line of pixels would else grow to gigabytes.
_WIDEST = 32

Size = tuple[int, int]


# -- squares ----------------------------------------------------------------------------------------------------------


def check_fit(fit: str) -> None:
    """Refuses a way to make squares that is not in `FITS`.

    Raises:
      InputError: It is not.
    """
    if fit not in FITS:
        raise InputError(f"images are not made square by {fit!r}; there are {', '.join(FITS)}")


def square(pixels: UInt8[np.ndarray, "h w 3"], side: int, fit: str = "pad") -> UInt8[np.ndarray, "side side 3"]:
    """An image as LLaVA-1.5 takes it, not yet normalised.

    Args:
      pixels: The image.
      side: Wanted.
      fit: "pad" adds bars of CLIP's mean colour, as the authors train and evaluate; "crop" takes the centre, as transformers
        does unless the processor says `do_pad`.

    Raises:
      InputError: Another way.
    """
    check_fit(fit)
    if fit == "crop":
        return square_crop(pixels, side)
    height, width = pixels.shape[:2]
    long = max(height, width)
    if long > _WIDEST * min(height, width):
        new = max(1, round(side * height / long)), max(1, round(side * width / long))
        return _laid_upon(_resized(pixels, new), (side, side), _BARS)
    return _resized(_laid_upon(pixels, (long, long), _BARS), (side, side))


# -- tiles ------------------------------------------------------------------------------------------------------------


def best_pinpoint(size: Size, pinpoints: tuple[Size, ...]) -> Size:
    """The size (height, width) that keeps most pixels of an image; among equal ones the one that wastes fewest, or the first.

    Raises:
      InputError: The image is so narrow that nothing of it is left in any.
    """
    height, width = size

    def kept(point: Size) -> int:
        scale = min(point[1] / width, point[0] / height)
        return min(int(width * scale) * int(height * scale), height * width)

    best = max(pinpoints, key=lambda point: (kept(point), -math.prod(point)))
    if not kept(best):
        raise InputError(f"an image of {width}x{height} pixels is too narrow for LLaVA-1.6: cut it")
    return best


def tiles(pixels: UInt8[np.ndarray, "h w 3"], config: LlavaConfig) -> UInt8[np.ndarray, "t side side 3"]:
    """The squares that LLaVA-1.6 sees of an image, not yet normalised: the whole image, then the tiles by rows.

    Raises:
      InputError: The image is too narrow.
    """
    side, size = config.side, pixels.shape[:2]
    height, width = best_pinpoint(size, config.grid_pinpoints)
    across, down = width / size[1], height / size[0]
    if across < down:
        new = min(math.ceil(size[0] * across), height), width
    else:
        new = height, min(math.ceil(size[1] * down), width)
    large = _laid_upon(_resized(pixels, new), (height, width), (0, 0, 0))
    parts = large.reshape(height // side, side, width // side, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    return np.concatenate([_resized(pixels, (side, side))[None], parts])


def tile_order(size: Size, config: LlavaConfig) -> Int[np.ndarray, " m"]:
    """How the tokens of an image's squares are laid out for the language model.

    Args:
      size: Height and width of the image.
      config: Of LLaVA-1.6.

    Returns:
      int32, for each visual token its place among those of `tiles`, all squares one after the other, or `NEWLINE`.

    Raises:
      InputError: The image is too narrow.
    """
    n, (rows, columns), side = config.square_tokens, config.vision.grid, config.side
    down, across = (length // side for length in best_pinpoint(size, config.grid_pinpoints))
    places = n + np.arange(down * across * n, dtype=np.int32).reshape(down, across, rows, columns)
    places = _without_bars(places.swapaxes(1, 2).reshape(down * rows, across * columns), size)
    lines = np.pad(places, ((0, 0), (0, 1)), constant_values=NEWLINE)
    return np.concatenate([np.arange(n, dtype=np.int32), lines.ravel()])


def _without_bars(places: np.ndarray, size: Size) -> np.ndarray:
    """The rows or columns that show the image; as in transformers, a last one that is more bar than image may stay."""
    (height, width), (rows, columns) = size, places.shape
    if width / height > columns / rows:
        bar = (rows - int(round(height * (columns / width), 7))) // 2
        return places[bar : rows - bar]
    bar = (columns - int(round(width * (rows / height), 7))) // 2
    return places[:, bar : columns - bar]


def _resized(pixels: np.ndarray, size: Size) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))


def _laid_upon(pixels: np.ndarray, size: Size, colour: tuple[int, int, int]) -> np.ndarray:
    """The image in the middle of a larger one; of an odd margin, the larger part is below or to the right."""
    canvas = np.empty((*size, 3), np.uint8)
    canvas[:] = colour
    height, width = pixels.shape[:2]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    canvas[top : top + height, left : left + width] = pixels
    return canvas
