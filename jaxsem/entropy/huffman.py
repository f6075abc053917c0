"""Canonical Huffman codes: whole bits per symbol, decoded without a coder state.

Specification: symbols 0 to n - 1 have code lengths of 1 to 15 bits, or 0 if they never occur. Codes are assigned in
order of length, then symbol: the first is all zeros, each next one is the previous plus one, extended with zeros to its
own length. A stream is the codes of its symbols, each from its most significant bit, packed into bytes from the most
significant bit, the last byte filled with zeros. The lengths are stored as n in two bytes (most significant first),
then half a byte per symbol, the first in the high half, the last half byte zero where n is odd.

References:
    Huffman, "A method for the construction of minimum-redundancy codes", Proc. IRE, 1952.
    Larmore and Hirschberg, "A fast algorithm for optimal length-limited Huffman codes", J. ACM, 1990 (package-merge).
"""

from dataclasses import dataclass

import numpy as np

from jaxsem.errors import FormatError, InputError

MAX_LENGTH = 15
MAX_SYMBOLS = 1 << 14


def code_lengths(counts: np.ndarray, max_length: int = MAX_LENGTH) -> np.ndarray:
    """The code lengths that need the fewest bits for these counts.

    Args:
        counts: non-negative integers [n], how often each symbol occurs.
        max_length: longest code allowed, at most 15.

    Returns:
        uint8 [n]; 0 for symbols that do not occur, 1 for a symbol that is alone. Of two symbols with equal counts the
        earlier one gets a code at least as long, on any machine.

    Raises:
        InputError: if nothing occurs, or there are more symbols than codes.
    """
    counts = np.asarray(counts)
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or not 1 <= len(counts) <= MAX_SYMBOLS or counts.min() < 0:
        raise InputError(
            f"A Huffman code needs 1 to {MAX_SYMBOLS} non-negative integer counts, not {counts.dtype} {counts.shape}."
        )
    used = np.flatnonzero(counts)
    if not 1 <= len(used) <= 1 << max_length <= 1 << MAX_LENGTH:
        raise InputError(
            f"{len(used)} symbols that occur do not fit codes of 1 to {max_length} bits (at most {MAX_LENGTH})."
        )
    lengths = np.zeros(len(counts), np.uint8)
    if len(used) == 1:
        lengths[used] = 1
        return lengths
    # Package-merge: in each round pair the cheapest packages and offer the pairs beside the single symbols. Of the
    # last list, the cheapest 2 n - 2 packages are taken; a symbol's length is the number of them it is in.
    singles = sorted((int(counts[symbol]), (int(symbol),)) for symbol in used)
    packages = singles
    for _ in range(max_length - 1):
        pairs = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(packages[::2], packages[1::2])]
        packages = sorted(singles + pairs, key=lambda package: package[0])
    for _, members in packages[: 2 * len(used) - 2]:
        np.add.at(lengths, list(members), 1)
    return lengths


@dataclass(frozen=True, eq=False)
class HuffmanCode:
    """A canonical code, fixed by its lengths.

    Attributes:
        lengths: uint8 [n], bits of each symbol's code, 0 for symbols without one.

    Raises:
        InputError: if no complete code has these lengths (a single symbol of length 1 is allowed).
    """

    lengths: np.ndarray

    def __post_init__(self):
        lengths = np.asarray(self.lengths)
        ok = lengths.ndim == 1 and lengths.dtype.kind in "iu" and 1 <= len(lengths) <= MAX_SYMBOLS
        if not ok or lengths.min() < 0 or lengths.max() > MAX_LENGTH:
            raise InputError(
                f"Code lengths are up to {MAX_SYMBOLS} of 0 to {MAX_LENGTH}; got {lengths.dtype} {lengths.shape}."
            )
        used = lengths[lengths > 0].astype(np.int64)
        filled = int((1 << (MAX_LENGTH - used)).sum())
        if filled != 1 << MAX_LENGTH and used.tolist() != [1]:
            raise InputError(
                f"These code lengths fill {filled / (1 << MAX_LENGTH):.4f} of the code space instead of all of it."
            )
        object.__setattr__(self, "lengths", lengths.astype(np.uint8))

    @staticmethod
    def from_counts(counts: np.ndarray, max_length: int = MAX_LENGTH) -> "HuffmanCode":
        """The best code for these counts, see `code_lengths`."""
        return HuffmanCode(code_lengths(counts, max_length))

    def codes(self) -> np.ndarray:
        """The code of each symbol as a number: int64 [n], of which the lowest `lengths` bits count."""
        codes = np.zeros(len(self.lengths), np.int64)
        code = previous = 0
        for symbol in self._order().tolist():
            length = int(self.lengths[symbol])
            code <<= length - previous
            codes[symbol] = code
            code, previous = code + 1, length
        return codes

    def encode(self, symbols: np.ndarray) -> bytes:
        """Pack symbols (integers of any shape, in order) into bytes.

        Raises:
            InputError: if a symbol has no code.
        """
        symbols = np.asarray(symbols).ravel()
        if symbols.size and symbols.dtype.kind not in "iu":
            raise InputError(f"Symbols must be integers, not {symbols.dtype}.")
        symbols = symbols.astype(np.int64)
        known = (symbols >= 0) & (symbols < len(self.lengths))
        known &= self.lengths[np.where(known, symbols, 0)] > 0
        if not known.all():
            raise InputError(
                f"The symbol {symbols[np.argmin(known)]} has no code; there are {len(self.lengths)} symbols."
            )
        lengths, codes = self.lengths[symbols].astype(np.int64), self.codes()[symbols]
        bits = (codes[:, None] >> (lengths[:, None] - 1 - np.arange(MAX_LENGTH)).clip(0)) & 1
        return np.packbits(bits[np.arange(MAX_LENGTH) < lengths[:, None]].astype(np.uint8)).tobytes()

    def decode(self, data: bytes, count: int) -> np.ndarray:
        """The inverse of `encode` for a known number of symbols: int32 [count].

        Raises:
            FormatError: if the bytes end early, hold a code that does not exist, or are not used up.
        """
        if not 0 <= count <= 8 * len(data):
            raise FormatError(f"The Huffman stream of {len(data)} bytes cannot hold {count} symbols.")
        depth = int(self.lengths.max())
        table = np.full(1 << depth, -1, np.int32)
        ordered = self._order()
        spans = 1 << (depth - self.lengths[ordered].astype(np.int64))
        table[: spans.sum()] = np.repeat(ordered, spans)
        padded = np.frombuffer(data + b"\0\0\0", np.uint8).astype(np.int32)
        windows = padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]
        # The symbol that a code starting at each bit would be: then decoding is hopping from bit to bit.
        starts = table[(windows[:, None] >> (24 - depth - np.arange(8))) & ((1 << depth) - 1)].ravel().tolist()
        lengths, total = self.lengths.tolist(), 8 * len(data)
        symbols, bit = [], 0
        for _ in range(count):
            symbol = starts[bit] if bit < total else -1
            if symbol < 0:
                raise FormatError(f"The Huffman stream is damaged: no code begins at bit {bit} of {total}.")
            symbols.append(symbol)
            bit += lengths[symbol]
        if (bit + 7) // 8 != len(data) or (bit % 8 and data[-1] << (bit % 8) & 0xFF):
            raise FormatError(
                f"The Huffman stream is damaged: {bit} bits were used of {total}, and the rest is no padding."
            )
        return np.array(symbols, np.int32)

    def to_bytes(self) -> bytes:
        """The lengths, for a file: 2 bytes and half a byte per symbol."""
        halves = np.append(self.lengths, np.zeros(len(self.lengths) % 2, np.uint8))
        return len(self.lengths).to_bytes(2) + (halves[::2] << 4 | halves[1::2]).tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> "HuffmanCode":
        """The inverse of `to_bytes`.

        Raises:
            FormatError: if the bytes are not exactly such a list of lengths.
        """
        count = int.from_bytes(data[:2])
        halves = np.frombuffer(data[2:], np.uint8)
        lengths = np.stack([halves >> 4, halves & 15], 1).ravel()
        if len(data) < 2 or len(halves) != (count + 1) // 2 or lengths[count:].any():
            raise FormatError(f"A Huffman code of {count} symbols does not take {len(data)} bytes like these.")
        try:
            return HuffmanCode(lengths[:count])
        except InputError as error:
            raise FormatError(f"The stored Huffman code is damaged. {error}") from None

    def _order(self) -> np.ndarray:
        """Symbols that have a code, by length, then number."""
        order = np.argsort(self.lengths, kind="stable")
        return order[self.lengths[order] > 0]
