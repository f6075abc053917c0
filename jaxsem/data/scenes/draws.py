"""Random numbers by key: the same numbers for the same key on every machine and NumPy version."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Draws:
    """A stream of random numbers that is a function of two keys.

    It reads the raw bits of NumPy's Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), whose
    two key words each choose a stream of their own. NumPy keeps raw bits fixed between versions, unlike those of the
    distributions on top of them.

    Args:
        stream: First key, below 2^64.
        index: Second key, below 2^64.
    """

    def __init__(self, stream: int, index: int):
        self._bits = np.random.Philox(key=np.array([stream, index], np.uint64))
        self._ready: list[float] = []

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        if not self._ready:
            self._ready = ((self._bits.random_raw(64) >> np.uint64(11)) * 2.0**-53).tolist()
        return low + (high - low) * self._ready.pop()

    def integer(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self.uniform() * (high - low + 1))

    def pick(self, choices: Sequence[T]) -> T:
        """One of the choices."""
        return choices[int(self.uniform() * len(choices))]

    def raw_bytes(self, count: int) -> np.ndarray:
        """Random bytes, uint8 [count]."""
        return self._bits.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count]
