"""Weight maps to train a spatially variable rate with: of every kind that users may ask for.

Source: Song, Choi and Han, Variable-rate deep image compression through spatially-adaptive feature transform (ICCV 2021), in the
shares of their released code: a fifth uniform, a fifth with a level for each object, a fifth ramps, two fifths sums of Gaussians.
"""

import numpy as np
from jaxtyping import Float, UInt8

from jaxsem.errors import InputError

_SHARES = (0.2, 0.2, 0.2, 0.4)  # uniform, objects, ramp, Gaussians
_MOST_GAUSSIANS = 20
_VARIANCE = (0.015, 0.046)  # as shares of the squared side: 1,000 to 3,000 of 256^2 pixels
_PEAK = (0.5, 1.0)


def training_map(
    rng: np.random.Generator, rows: int, columns: int, labels: UInt8[np.ndarray, "h w"] | None = None
) -> Float[np.ndarray, "rows columns"]:
    """Draws a weight map, float32 in [0, 1].

    Args:
      rng: What draws.
      rows: Of the map.
      columns: Of the map.
      labels: Which object each pixel shows, 0 for none, of sides that are multiples of the map's; without it the share of maps by
        object goes to uniform ones.

    Raises:
      InputError: Labels of another size.
    """
    kind = rng.choice(len(_SHARES), p=_SHARES)
    if kind == 1 and labels is not None:
        return _by_object(rng, rows, columns, labels)
    if kind == 2:
        return _ramp(rng, rows, columns)
    if kind == 3:
        return _gaussians(rng, rows, columns)
    # Of the uniform ones a few ask for nothing at all.
    return np.full((rows, columns), 0.0 if rng.random() < 0.01 else rng.random(), np.float32)


def _by_object(rng: np.random.Generator, rows: int, columns: int, labels: np.ndarray) -> np.ndarray:
    if labels.shape[0] % rows or labels.shape[1] % columns:
        raise InputError(
            f"labels of {list(labels.shape)} cannot be pooled to a map of {rows}x{columns}: give multiples"
        )
    levels = rng.random(256)[labels]
    cells = levels.reshape(rows, labels.shape[0] // rows, columns, labels.shape[1] // columns)
    return cells.mean(axis=(1, 3)).astype(np.float32)


def _ramp(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    low, high = rng.random(2)
    if rng.random() < 0.5:
        return np.broadcast_to(np.linspace(low, high, rows)[:, None], (rows, columns)).astype(np.float32)
    return np.broadcast_to(np.linspace(low, high, columns), (rows, columns)).astype(np.float32)


def _gaussians(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    y, x = (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns
    total = np.zeros((rows, columns))
    for _ in range(rng.integers(1, _MOST_GAUSSIANS + 1)):
        down, across = rng.random(2)
        tall, wide = rng.uniform(*_VARIANCE, 2)
        total += np.outer(np.exp(-((y - down) ** 2) / (2 * tall)), np.exp(-((x - across) ** 2) / (2 * wide)))
    return (total / total.max() * rng.uniform(*_PEAK)).astype(np.float32)
