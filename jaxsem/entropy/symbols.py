"""Symbols and table indices as the coders want them, checked once at the door."""

import numpy as np

from jaxsem.entropy.tables import Tables
from jaxsem.errors import InputError


def as_symbols(symbols: np.ndarray) -> np.ndarray:
    """Contiguous int32 of the same shape.

    Raises:
        InputError: if they are no integers of 32 bits.
    """
    symbols = np.asarray(symbols)
    if symbols.dtype == np.int32:
        return np.ascontiguousarray(symbols)
    if symbols.dtype.kind not in "iu" and symbols.size:
        raise InputError(f"Symbols must be integers, not {symbols.dtype}.")
    if symbols.size and not -(1 << 31) <= int(symbols.min()) <= int(symbols.max()) < 1 << 31:
        raise InputError(f"Symbols must fit 32 bits; these run from {symbols.min()} to {symbols.max()}.")
    return np.ascontiguousarray(symbols, np.int32)


def as_indices(indices: np.ndarray, tables: Tables) -> np.ndarray:
    """Contiguous int32 of the same shape.

    Raises:
        InputError: if they are no integers, or one names no table.
    """
    indices = np.asarray(indices)
    if indices.dtype.kind not in "iu" and indices.size:
        raise InputError(f"Table indices must be integers, not {indices.dtype}.")
    if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < len(tables):
        raise InputError(f"Table indices run from {indices.min()} to {indices.max()}; there are {len(tables)} tables.")
    return np.ascontiguousarray(indices, np.int32)


def find_positions(symbols: np.ndarray, indices: np.ndarray, tables: Tables) -> tuple[np.ndarray, np.ndarray]:
    """Where the symbols stand in their tables.

    Args:
        symbols: int32 of any shape.
        indices: int32, same shape.
        tables: the tables.

    Returns:
        The positions (int32, same shape; see `CodingArrays`), with the position of the escape symbol for values outside
        their table, and the flat places of those.

    Raises:
        InputError: if a value lies outside a table without an escape symbol.
    """
    coding = tables.coding
    positions = symbols - coding.shifts.take(indices)
    # The difference may wrap around; as an unsigned number it is then too large for any table, as it should be.
    numbers = (symbols - coding.offsets.take(indices)).view(np.uint32)
    escaped = np.flatnonzero(numbers >= coding.limits.take(indices))
    if len(escaped):
        values, where = symbols.ravel()[escaped], indices.ravel()[escaped]
        closed = np.flatnonzero(~tables.escapes[where])
        if len(closed):
            value, index = values[closed[0]], where[closed[0]]
            low, high = tables.offsets[index], tables.offsets[index] + tables.sizes[index] - 1
            raise InputError(f"The value {value} is outside table {index} ({low} to {high}), which has no escape.")
        positions.ravel()[escaped] = coding.escapes[where]
    return positions, escaped
