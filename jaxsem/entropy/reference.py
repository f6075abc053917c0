"""The coder in plain Python, one symbol at a time: to read, to test against, and for very short inputs.

`encode_steps` and `decode_steps` are the range variant of asymmetric numeral systems (Duda, "Asymmetric numeral
systems", arXiv:1311.2540, 2013). The state x is an integer that contains all symbols coded so far, the latest on top.
A symbol with cumulative frequency `start` and frequency `f` of 2^p turns it into

    x' = (x div f) 2^p + (x mod f) + start,        and back:
    x = f (x' div 2^p) + slot - start, where slot = x' mod 2^p tells the symbol: start <= slot < start + f.

So what is coded last is decoded first: encoders walk backwards. To keep x below 256 L, the encoder first moves low
bytes out while x >= (L / 2^p) 256 f; the decoder afterwards takes bytes in while x < L. L is the lower bound of the
format.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence

import numpy as np

from jaxsem.entropy import escapes as escape_digits
from jaxsem.entropy.symbols import as_indices, as_symbols, find_positions
from jaxsem.entropy.tables import ESCAPED, Tables
from jaxsem.errors import FormatError, InputError

SHORT_BOUND_BITS = 16
SEED_PRODUCT = 1 << 8


def encode_steps(state: int, entries: Iterable[int], precision: int, bound_bits: int, out: bytearray) -> int:
    """Code entries (``start << 16 | frequency - 1``) in the order given.

    Returns:
        The new state; the bytes moved out are appended to `out`.
    """
    limit_shift = bound_bits - precision + 8
    for entry in entries:
        start, frequency = entry >> 16, (entry & 0xFFFF) + 1
        while state >= frequency << limit_shift:
            out.append(state & 0xFF)
            state >>= 8
        quotient, remainder = divmod(state, frequency)
        state = (quotient << precision) + remainder + start
    return state


def decode_steps(
    state: int, data: bytes, cursor: int, tables: Tables, indices: Sequence[int], bound_bits: int
) -> tuple[int, int, list[int]]:
    """Decode one symbol for each table index.

    Bytes are taken while there are any: whether running out of them is an error, the caller knows.

    Returns:
        The state, the cursor behind the last byte used, and the positions of the symbols (see `CodingArrays`).
    """
    coding, precision = tables.coding, tables.precision
    starts, bases = coding.starts, coding.bases
    rows: dict[int, tuple[int, list[int]]] = {}
    mask, bound, positions = (1 << precision) - 1, 1 << bound_bits, []
    for index in indices:
        if index not in rows:
            base = int(bases[index])
            end = int(bases[index + 1]) if index + 1 < len(bases) else len(starts)
            rows[index] = base, starts[base:end].tolist()
        base, row = rows[index]
        slot = state & mask
        number = bisect_right(row, slot) - 1
        state = (row[number + 1] - row[number]) * (state >> precision) + slot - row[number]
        while state < bound and cursor < len(data):
            state = state << 8 | data[cursor]
            cursor += 1
        positions.append(base + number)
    return state, cursor, positions


def ranks(tables: Tables, table: int) -> list[int]:
    """Rank of each symbol of a table by falling frequency, equal frequencies in symbol order."""
    row = tables.row(table)
    result = np.empty(len(row), np.int64)
    result[np.argsort(-row, kind="stable")] = np.arange(len(row))
    return result.tolist()


def seed_length(tables: Tables, indices: Sequence[int]) -> int:
    """How many symbols at the end of a short stream seed its state (see `jaxsem.entropy.lanes`)."""
    product, length = 1, 0
    for index in reversed(indices):
        if product >= SEED_PRODUCT or tables.escapes[index]:
            break
        product *= int(tables.sizes[index])
        length += 1
    return length


def encode_short(symbols: np.ndarray, indices: np.ndarray, tables: Tables) -> bytes:
    """One short stream, as `jaxsem.entropy.lanes` specifies it; its vectorised coder gives the same bytes.

    Args:
        symbols: integers [length].
        indices: table of each symbol, [length].
        tables: of 8 bits, as a rule.
    """
    coding, symbols, indices = tables.coding, as_symbols(symbols).ravel(), as_indices(indices, tables).ravel()
    if symbols.shape != indices.shape:
        raise InputError(f"{len(symbols)} symbols need as many table indices, not {len(indices)}.")
    positions, escaped = find_positions(symbols, indices, tables)
    digits = np.concatenate(escape_digits.to_digits(symbols[escaped], *_ranges(indices[escaped], tables)))
    body = len(indices) - seed_length(tables, indices.tolist())
    state = 0
    for index, position in zip(reversed(indices[body:].tolist()), reversed(positions[body:].tolist())):
        state = state * int(tables.sizes[index]) + ranks(tables, index)[position - int(coding.bases[index])]
    order = np.concatenate([positions[:body], coding.bases[coding.digit_table] + digits])[::-1]
    out = bytearray()
    state = encode_steps(state, coding.entries[order].tolist(), tables.precision, SHORT_BOUND_BITS, out)
    while state:
        out.append(state & 0xFF)
        state >>= 8
    return bytes(reversed(out))


def decode_short(data: bytes, indices: np.ndarray, tables: Tables) -> np.ndarray:
    """The inverse of `encode_short`: int32 [length].

    Raises:
        FormatError: if the bytes are no such stream.
    """
    coding, indices = tables.coding, as_indices(indices, tables).ravel()
    if data[:1] == b"\0":
        raise FormatError("The coded stream is damaged: it begins with a zero byte.")
    body = len(indices) - seed_length(tables, indices.tolist())
    state = int.from_bytes(data[:3])
    cursor = min(3, len(data))
    steps = (tables, indices[:body].tolist(), SHORT_BOUND_BITS)
    state, cursor, positions = decode_steps(state, data, cursor, *steps)
    symbols = np.zeros(len(indices), np.int32)
    positions = np.array(positions, np.int32)
    symbols[:body] = coding.values[positions]
    escaped = np.flatnonzero(symbols[:body] == ESCAPED)

    def take_digits(count: int) -> np.ndarray:
        nonlocal state, cursor
        steps = (tables, [coding.digit_table] * count, SHORT_BOUND_BITS)
        state, cursor, found = decode_steps(state, data, cursor, *steps)
        return np.array(found, np.int32) - coding.bases[coding.digit_table]

    lengths = take_digits(len(escaped))
    escape_digits.check_lengths(lengths)
    digits = take_digits(int(lengths.sum()))
    symbols[escaped] = escape_digits.from_digits(lengths, digits, *_ranges(indices[escaped], tables))
    for i in range(body, len(indices)):
        index = int(indices[i])
        state, rank = divmod(state, int(tables.sizes[index]))
        symbols[i] = ranks(tables, index).index(rank) + int(tables.offsets[index])
    if state or cursor != len(data):
        raise FormatError(
            f"The coded stream is damaged: {len(data) - cursor} bytes and a state of {state} are left over."
        )
    return symbols


def _ranges(indices: np.ndarray, tables: Tables) -> tuple[np.ndarray, np.ndarray]:
    return tables.coding.offsets[indices], tables.coding.limits[indices]
