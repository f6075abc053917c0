"""Coders of index rows: what a quantiser of features made of an image, as a few dozen bytes.

A row is n indices, index i in ``range(sizes[i])``. n and the sizes are known to both sides, so a stream is the indices
alone, and the container keeps its length. There are four coders with one contract:

    FixedLength     all indices equally likely: ceil(log2 of the product of all sizes) bits
    HuffmanIndices  a canonical Huffman code (PQVAE-shared, section 3.4), for all positions or one each
    StaticRans      frequencies instead of whole bits, in the short format of `jaxsem.entropy.lanes`
    PriorRans       frequencies from the indices before, by a small integer network, in the adaptive format

A damaged stream is an error wherever the format can tell, and never gives an index out of range. `fixed`: every number
that is too large; `huffman`: what is left over or missing, set padding bits; `rans` and `prior`: what does not end in
the state the encoder began with.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from jaxsem.entropy.adaptive import PRECISION, AdaptiveDecoder, encode_adaptive
from jaxsem.entropy.huffman import HuffmanCode
from jaxsem.entropy.index_coder import IndexCoder, build, check_rows, check_sizes, check_table, count_indices, take
from jaxsem.entropy.index_network import IndexNetwork
from jaxsem.entropy.lanes import decode_lanes, encode_lanes
from jaxsem.entropy.tables import Tables, tables_from_counts
from jaxsem.errors import FormatError, InputError

MAX_CODE = 12  # bits of a Huffman code, enough for the largest size
_WORD = 1 << 62  # digits are folded into words below this
_CHUNK = 1 << 21  # numbers held at once for the tables of a batch


@dataclass(frozen=True, eq=False)
class FixedLength(IndexCoder):
    """Every row in the same number of bytes: the indices as one number in mixed radix.

    Specification: N = (... (x_0 sizes[1] + x_1) sizes[2] + ...) + x_{n-1}, most significant byte first, in as many
    bytes as the largest such number needs. Bits that no N sets, at the top, are 0.

    Attributes:
        sizes: int64 [n].

    Raises:
        InputError: if a size or their number is out of range.
    """

    name: ClassVar[str] = "fixed"
    sizes: np.ndarray

    def __post_init__(self):
        object.__setattr__(self, "sizes", check_sizes(self.sizes))

    @property
    def bits(self) -> int:
        """Bits of a row, rounded up once for all its indices."""
        return (math.prod(self.sizes.tolist()) - 1).bit_length()

    def encode(self, indices: np.ndarray) -> list[bytes]:
        """See `IndexCoder`."""
        indices = check_rows(indices, self.sizes)
        words = np.zeros((len(indices), len(self._words)), np.int64)
        for column, (begin, end, _) in enumerate(self._words):
            for i in range(begin, end):
                words[:, column] = words[:, column] * self.sizes[i] + indices[:, i]
        size, radices = (self.bits + 7) // 8, [radix for *_, radix in self._words]
        streams = []
        for row in words.tolist():
            number = 0
            for word, radix in zip(row, radices):
                number = number * radix + word
            streams.append(number.to_bytes(size))
        return streams

    def decode(self, data: Sequence[bytes]) -> np.ndarray:
        """See `IndexCoder`."""
        size, limit = (self.bits + 7) // 8, math.prod(self.sizes.tolist())
        words = np.empty((len(data), len(self._words)), np.int64)
        for i, stream in enumerate(data):
            number = int.from_bytes(stream)
            if len(stream) != size or number >= limit:
                raise FormatError(
                    f"The indices of row {i} are damaged: {len(stream)} bytes like these are not {self.bits} bits of "
                    f"{len(self.sizes)} indices."
                )
            for column in range(len(self._words) - 1, -1, -1):
                number, words[i, column] = divmod(number, self._words[column][2])
        found = np.empty((len(data), len(self.sizes)), np.int32)
        for column, (begin, end, _) in enumerate(self._words):
            rest = words[:, column]
            for i in range(end - 1, begin - 1, -1):
                rest, found[:, i] = np.divmod(rest, self.sizes[i])
        return found

    def ideal_bits(self, indices: np.ndarray) -> np.ndarray:
        """See `IndexCoder`: log2 of the product of the sizes, for every row."""
        return np.full(len(check_rows(indices, self.sizes)), np.log2(self.sizes).sum())

    def to_arrays(self) -> dict[str, np.ndarray]:
        """See `IndexCoder`."""
        return {"sizes": self.sizes.astype(np.uint16)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "FixedLength":
        """See `IndexCoder`."""
        (sizes,) = take(arrays, cls, sizes="uint16")
        return build(cls, sizes)

    @cached_property
    def _words(self) -> list[tuple[int, int, int]]:
        """Runs of positions whose digits fit a machine word together: begin, end, product of the sizes."""
        runs, begin, product = [], 0, 1
        for i, size in enumerate(self.sizes.tolist()):
            if product * size > _WORD:
                runs.append((begin, i, product))
                begin, product = i, 1
            product *= size
        return [*runs, (begin, len(self.sizes), product)]


@dataclass(frozen=True, eq=False)
class HuffmanIndices(IndexCoder):
    """A canonical Huffman code for each position, or one that positions share; see `jaxsem.entropy.huffman`.

    A row's stream is the codes of its indices, packed from the most significant bit, the last byte filled with zeros.

    Attributes:
        codes: the codes, of lengths up to 12 bits.
        table: uint16 [n], number of the code of each position.

    Raises:
        InputError: if a position names no code, or a code is too long.
    """

    name: ClassVar[str] = "huffman"
    codes: tuple[HuffmanCode, ...]
    table: np.ndarray

    def __post_init__(self):
        object.__setattr__(self, "table", check_table(self.table, len(self.codes)))
        check_sizes(np.array([len(code.lengths) for code in self.codes]))
        longest = max(int(code.lengths.max()) for code in self.codes)
        if longest > MAX_CODE:
            raise InputError(f"Codes of {longest} bits are too long for indices; at most {MAX_CODE} are allowed.")

    @classmethod
    def from_indices(cls, indices: np.ndarray, sizes: Sequence[int], per_position: bool = False) -> "HuffmanIndices":
        """The best code for the indices [m, n] of training features; what they never use still gets a code.

        Args:
            indices: integers [m, n].
            sizes: [n].
            per_position: one code for each position instead of one for all of the same size (the paper).
        """
        counts, table = count_indices(indices, sizes, per_position)
        # Counts are scaled so that the 1 of a codeword that never occurs weighs little beside those that do.
        codes = [HuffmanCode.from_counts(np.maximum(row * 16, 1), MAX_CODE) for row in counts]
        return cls(tuple(codes), table)

    @property
    def sizes(self) -> np.ndarray:
        """int64 [n]."""
        return np.array([len(code.lengths) for code in self.codes])[self.table]

    def encode(self, indices: np.ndarray) -> list[bytes]:
        """See `IndexCoder`."""
        places = self._places(indices)
        lengths = self._lengths[places].astype(np.int64)
        ends = lengths.cumsum(1)
        sizes = (ends[:, -1] + 7) // 8
        stops = sizes.cumsum()
        firsts = ends - lengths + 8 * (stops - sizes)[:, None]
        codes, bits = self._codes[places], np.zeros(8 * int(stops[-1]) if len(stops) else 0, np.uint8)
        for j in range(int(lengths.max(initial=0))):
            there = lengths > j
            bits[firsts[there] + j] = codes[there] >> (lengths[there] - 1 - j) & 1
        packed = np.packbits(bits).tobytes()
        return [packed[begin:end] for begin, end in zip([0, *stops.tolist()], stops.tolist())]

    def decode(self, data: Sequence[bytes]) -> np.ndarray:
        """See `IndexCoder`."""
        table, bases, depths = self._lookup
        sizes = np.array([len(stream) for stream in data], np.int64)
        ends = 8 * sizes.cumsum()
        cursor = ends - 8 * sizes
        joined = np.frombuffer(b"".join(data) + bytes(3), np.uint8).astype(np.int32)
        windows = joined[:-2] << 16 | joined[1:-1] << 8 | joined[2:]
        found, wrong = np.empty((len(data), len(self.table)), np.int32), np.zeros(len(data), bool)
        for i, number in enumerate(self.table):
            # A lane that runs over its end reads some other lane's bits until that shows below.
            window = windows.take(np.minimum(cursor >> 3, len(windows) - 1))
            code = (window >> (24 - depths[number] - (cursor & 7))) & ((1 << depths[number]) - 1)
            entry = table.take(bases[number] + code)
            found[:, i] = entry >> 4
            cursor += entry & 15
            wrong |= entry & 15 == 0
        padding = joined[np.minimum(cursor >> 3, len(joined) - 1)] & (0xFF >> (cursor & 7))
        wrong |= (cursor + 7) // 8 * 8 != ends
        wrong |= (cursor & 7 > 0) & (padding > 0)
        if wrong.any():
            raise FormatError(
                f"The Huffman stream of row {np.argmax(wrong)} is damaged: it is not the codes of "
                f"{len(self.table)} indices and zeros up to a whole byte."
            )
        return found

    def ideal_bits(self, indices: np.ndarray) -> np.ndarray:
        """See `IndexCoder`: whole bits, the lengths of the codes."""
        return self._lengths[self._places(indices)].sum(1, dtype=np.float64)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """See `IndexCoder`."""
        sizes = np.array([len(code.lengths) for code in self.codes], np.uint16)
        return {"sizes": sizes, "lengths": self._lengths.copy(), "table": self.table.copy()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "HuffmanIndices":
        """See `IndexCoder`."""
        sizes, lengths, table = take(arrays, cls, sizes="uint16", lengths="uint8", table="uint16")
        if sizes.sum(dtype=np.int64) != len(lengths) or not len(sizes):
            raise FormatError(f"{len(lengths)} code lengths are stored for codes of {sizes.sum(dtype=np.int64)}.")
        try:
            codes = tuple(HuffmanCode(part) for part in np.split(lengths, sizes.astype(np.int64).cumsum()[:-1]))
        except InputError as error:
            raise FormatError(f"The stored Huffman codes are damaged. {error}") from None
        return build(cls, codes, table)

    def _places(self, indices: np.ndarray) -> np.ndarray:
        """Where each index stands in `_lengths` and `_codes`: int64 [b, n]."""
        indices = check_rows(indices, self.sizes)
        sizes = np.array([len(code.lengths) for code in self.codes])
        places = (sizes.cumsum() - sizes)[self.table] + indices
        missing = np.argwhere(self._lengths[places] == 0)
        if missing.size:
            row, column = missing[0]
            raise InputError(f"The index {indices[row, column]} at {(int(row), int(column))} has no Huffman code.")
        return places

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.concatenate([code.lengths for code in self.codes])

    @cached_property
    def _codes(self) -> np.ndarray:
        return np.concatenate([code.codes() for code in self.codes])

    @cached_property
    def _lookup(self) -> tuple[np.ndarray, list[int], list[int]]:
        """For every code and the next bits of a stream, ``symbol << 4 | length``; where each begins, and its bits."""
        parts, depths = [], []
        for code in self.codes:
            depth, used = int(code.lengths.max()), np.flatnonzero(code.lengths)
            part = np.zeros(1 << depth, np.uint16)
            begins = code.codes()[used] << (depth - code.lengths[used].astype(np.int64))
            order = np.argsort(begins)
            spans = 1 << (depth - code.lengths[used].astype(np.int64))[order]
            part[: spans.sum()] = np.repeat(used[order] << 4 | code.lengths[used][order], spans)
            parts.append(part)
            depths.append(depth)
        bases = np.cumsum([0, *(len(part) for part in parts[:-1])])
        return np.concatenate(parts), bases.tolist(), depths


@dataclass(frozen=True, eq=False)
class StaticRans(IndexCoder):
    """A table of frequencies for each position, or one that positions share, in the short format of rANS.

    Attributes:
        tables: closed tables that begin at 0.
        table: uint16 [n], number of the table of each position.

    Raises:
        InputError: if a position names no table, or tables are of another kind.
    """

    name: ClassVar[str] = "rans"
    tables: Tables
    table: np.ndarray

    def __post_init__(self):
        object.__setattr__(self, "table", check_table(self.table, len(self.tables)))
        check_sizes(self.tables.sizes)
        if self.tables.escapes.any() or self.tables.offsets.any():
            raise InputError("Tables of indices begin at 0 and have no escape symbol.")

    @classmethod
    def from_indices(
        cls, indices: np.ndarray, sizes: Sequence[int], per_position: bool = True, precision: int | None = None
    ) -> "StaticRans":
        """Tables from how often each index is seen, half an occurrence added to each.

        Args:
            indices: integers [m, n].
            sizes: [n].
            per_position: a table for each position instead of one for all of the same size.
            precision: bits of the tables; None takes 8 up to 16 codewords, and 4 more than a codeword has beyond, up
                to 12.

        Raises:
            InputError: if there are more codewords than a table of that precision has counts.
        """
        counts, table = count_indices(indices, sizes, per_position)
        largest = max(len(row) for row in counts)
        if precision is None:
            precision = min(max(8, 4 + (largest - 1).bit_length()), 12)
        if largest > 1 << precision:
            raise InputError(
                f"A codebook size of {largest} is one that a table of {precision} bits cannot hold: take a precision "
                f"of {(largest - 1).bit_length()} bits or more."
            )
        return cls(tables_from_counts([row + 0.5 for row in counts], precision), table)

    @property
    def sizes(self) -> np.ndarray:
        """int64 [n]."""
        return self.tables.sizes[self.table].astype(np.int64)

    def encode(self, indices: np.ndarray) -> list[bytes]:
        """See `IndexCoder`."""
        return encode_lanes(check_rows(indices, self.sizes), self.table, self.tables)

    def decode(self, data: Sequence[bytes]) -> np.ndarray:
        """See `IndexCoder`."""
        return decode_lanes(data, self.table, self.tables)

    def ideal_bits(self, indices: np.ndarray) -> np.ndarray:
        """See `IndexCoder`."""
        bases = self.tables.sizes.cumsum() - self.tables.sizes
        places = bases[self.table] + check_rows(indices, self.sizes)
        return (self.tables.precision - np.log2(self.tables.frequencies))[places].sum(1)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """See `IndexCoder`."""
        return {**self.tables.arrays(), "table": self.table.copy()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "StaticRans":
        """See `IndexCoder`."""
        (table,) = take({name: arrays[name] for name in arrays if name == "table"}, cls, table="uint16")
        tables = Tables.from_arrays({name: arrays[name] for name in arrays if name != "table"})
        return build(cls, tables, table)


@dataclass(frozen=True, eq=False)
class PriorRans(IndexCoder):
    """Every index with the table that a learned prior gives it after those before, in the adaptive format of rANS.

    Attributes:
        network: the prior, in integers; `jaxsem.systems.index_prior` trains it.
    """

    name: ClassVar[str] = "prior"
    network: IndexNetwork

    @property
    def sizes(self) -> np.ndarray:
        """int64 [n]."""
        return self.network.sizes.astype(np.int64)

    def encode(self, indices: np.ndarray) -> list[bytes]:
        """See `IndexCoder`."""
        parts = self._chunks(check_rows(indices, self.sizes))
        return [stream for part in parts for stream in encode_adaptive(part, self.network.frequencies(part))]

    def decode(self, data: Sequence[bytes]) -> np.ndarray:
        """See `IndexCoder`."""
        decoder, network = AdaptiveDecoder(data), self.network
        found, state = np.empty((len(data), len(network.sizes)), np.int32), network.start(len(data))
        for i in range(len(network.sizes)):
            found[:, i] = decoder.pull(network.step_frequencies(state, i))
            state = network.advance(state, i, found[:, i])
        decoder.finish()
        return found

    def ideal_bits(self, indices: np.ndarray) -> np.ndarray:
        """See `IndexCoder`."""
        bits = [np.zeros(0)]
        for part in self._chunks(check_rows(indices, self.sizes)):
            own = np.take_along_axis(self.network.frequencies(part), part.T[..., None], 2)[..., 0]
            bits.append((PRECISION - np.log2(own)).sum(0))
        return np.concatenate(bits)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """See `IndexCoder`."""
        return self.network.to_arrays()

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "PriorRans":
        """See `IndexCoder`."""
        return cls(IndexNetwork.from_arrays(arrays))

    def _chunks(self, indices: np.ndarray) -> list[np.ndarray]:
        """Parts of the rows whose tables fit the memory that they may take together."""
        width = max(int(self.network.sizes.max()), len(self.network.hidden_bias))
        rows = max(1, _CHUNK // (len(self.network.sizes) * width))
        return [indices[begin : begin + rows] for begin in range(0, len(indices), rows)]


CODERS: tuple[type[IndexCoder], ...] = (FixedLength, HuffmanIndices, StaticRans, PriorRans)
"""All kinds of coders; ``next(kind for kind in CODERS if kind.name == name)`` reads what a file names."""
