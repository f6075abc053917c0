"""Values outside their table, as digits. Both stream formats write them the same way.

A table with first value ``o`` and ``n`` ordinary symbols covers o to o + n - 1. A value v outside becomes a number
raw = 2 (v - o - n) for v >= o + n, and raw = 2 (o - v) - 1 for v < o: 0, 1, 2, ... counted outwards on both sides in
turn. `raw` is written as its hexadecimal digits without leading zeros, the least significant first (raw = 0 has no
digits); their number is 0 to 9 and is itself written as one digit. All digits are coded as equally likely.
"""

import numpy as np

from jaxsem.errors import FormatError

MAX_DIGITS = 9
_SHIFTS = np.arange(MAX_DIGITS, dtype=np.uint64) * 4


def to_digits(values: np.ndarray, offsets: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Digits of escaped values: (lengths int32 [n], digits int32 [sum of lengths]), value by value."""
    distance = values.astype(np.int64) - offsets
    raw = np.where(distance < 0, -2 * distance - 1, 2 * (distance - limits.astype(np.int64))).astype(np.uint64)
    shifted = raw[:, None] >> _SHIFTS
    lengths = (shifted != 0).sum(1).astype(np.int32)
    return lengths, (shifted & np.uint64(15))[np.arange(MAX_DIGITS) < lengths[:, None]].astype(np.int32)


def from_digits(lengths: np.ndarray, digits: np.ndarray, offsets: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """The inverse of `to_digits`: int32 [n].

    Raises:
        FormatError: if a length exceeds 9, a number has leading zeros, or a value does not fit 32 bits.
    """
    check_lengths(lengths)
    used = np.arange(MAX_DIGITS) < lengths[:, None]
    grid = np.zeros(used.shape, np.int64)
    grid[used] = digits
    leading = grid[np.arange(len(lengths)), np.maximum(lengths - 1, 0)]
    raw = (grid << _SHIFTS.astype(np.int64)).sum(1)
    values = np.where(raw & 1, offsets - (raw + 1) // 2, offsets + limits.astype(np.int64) + raw // 2)
    if ((leading == 0) & (lengths > 0)).any() or (values != values.astype(np.int32)).any():
        raise FormatError("The coded stream is damaged: it holds an escaped value that no encoder writes.")
    return values.astype(np.int32)


def check_lengths(lengths: np.ndarray) -> None:
    """Refuse numbers of digits that no encoder writes, before anything is read or allocated by them."""
    if lengths.size and lengths.max() > MAX_DIGITS:
        raise FormatError(
            f"The coded stream is damaged: an escaped value claims {lengths.max()} digits of at most {MAX_DIGITS}."
        )
