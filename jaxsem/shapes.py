"""Shape buckets and tiles: images of any size on a few compiled shapes and in bounded memory.

An image is padded to its bucket by repeating its edge. Padding costs arithmetic but no bits: the slice driver codes
only the symbols that lie inside the true size. Sides longer than a window are cut into overlapping windows for the
transforms; the overlap is wider than their receptive field, so the result is the one of the whole image.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

STRIDE = 64  # pixels a hyper-latent cell
WINDOW = 1408  # pixels of a window's side: 1024 that are kept and the margins
MARGIN = 192  # more than the receptive field of ELIC's transforms reaches to one side


def bucket_side(side: int) -> int:
    """The padded length of a side of `side` >= 1 pixels: the next multiple of 64, 128, 256 or 512, at most 1/4 wasted above 256.

    Part of the format: encoder and decoder compute their tables on the padded shape.
    """
    for limit, granule in ((512, STRIDE), (1024, 128), (2048, 256)):
        if side <= limit:
            return -(-side // granule) * granule
    return -(-side // 512) * 512


def bucket(height: int, width: int) -> tuple[int, int]:
    """The padded height and width of an image."""
    return bucket_side(height), bucket_side(width)


def latent_grid(height: int, width: int) -> tuple[int, int]:
    """Height and width of the hyper-latent of an image's bucket."""
    return bucket_side(height) // STRIDE, bucket_side(width) // STRIDE


def pad(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "p q 3"]:
    """An image padded to its bucket by repeating the last row and column."""
    height, width = image.shape[:2]
    to_height, to_width = bucket(height, width)
    return np.pad(image, ((0, to_height - height), (0, to_width - width), (0, 0)), mode="edge")


@dataclass(frozen=True)
class Span:
    """One window along a side: it reads [start, stop) and is kept on [low, high)."""

    start: int
    stop: int
    low: int
    high: int


def spans(length: int, window: int = WINDOW, margin: int = MARGIN) -> tuple[Span, ...]:
    """Windows of one size that cover a side, the last one pushed back inside.

    Args:
      length: Length of the side, in any unit that window and margin share.
      window: Length of a window; a shorter side is one window of its own length.
      margin: What a window's inner ends lose.

    Returns:
      The windows in order; their kept parts meet without gap or overlap.
    """
    if length <= window:
        return (Span(0, length, 0, length),)
    step = window - 2 * margin
    starts = [*range(0, length - window, step), length - window]
    edges = [0, *(start + margin for start in starts[1:]), length]
    return tuple(Span(s, s + window, low, high) for s, low, high in zip(starts, edges, edges[1:], strict=False))
