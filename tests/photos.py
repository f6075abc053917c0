"""Small photos for tests of the command line, all of one shape bucket, so that one set of programs is compiled."""

from pathlib import Path

import numpy as np
from PIL import Image


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A uint8 [height, width, 3] image of smooth noise, which compresses to some hundred bytes."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def write_photo(path: Path, height: int = 40, width: int = 50, seed: int = 0) -> Path:
    """Writes such an image, its folders included, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(height, width, seed)).save(path)
    return path
