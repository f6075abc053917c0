"""The short-stream format, and NumPy coders that work on many streams at once, one *lane* each.

A few hundred symbols fill some seventy bytes; there, a coder's own overhead decides. The short format spends about
0.3 bytes over the ideal where the long one (`jaxsem.entropy.rans`) spends about 4.

Specification of the short format, version 1
--------------------------------------------
A stream codes a known number of symbols with known tables of p bits (8 unless stated; tables and escapes as in
`jaxsem.entropy.rans`). The state x has the lower bound L = 2^16. There is no header and no fixed start:

* *Seed.* Walking from the last symbol towards the first, a symbol belongs to the seed if its table has no escape
  symbol and the sizes (numbers of entries) of the tables of the symbols behind it, multiplied, are still below 256;
  the first symbol for which this fails ends the seed. A symbol of the seed is its rank: its place among the entries
  of its table sorted by falling frequency, equal frequencies in entry order, counted from 0.
* *Writing.* Begin with x = 0. For the symbols of the seed, last to first: x = x * size + rank. Then, from last to
  first, the sequence [other symbols in order; lengths of the escaped values; their digits], the latter two as in the
  long format, with the same step as there: while x >= f[k] * 2^(24-p), move out the low byte of x; x = (x div f[k]) *
  2^p + (x mod f[k]) + start[k]. The stream is the final x in as few bytes as hold it (none if x = 0), most
  significant first, then the bytes moved out, the last one first.
* *Reading.* Begin with x = 0; whenever x < 2^16 and bytes are left, x = 256 x + the next byte: at the beginning and
  after every symbol. Decode the sequence above; the number of escape symbols tells how many lengths follow. Then undo
  the seed, first to last: rank = x mod size, x = x div size. In the end x is 0 and no byte is left, and the first
  byte was not 0; anything else is an error.

The seed makes the first steps cheap: a plain coder would start from a state that already weighs 16 bits, or lose the
place within the first symbol's interval. Ranks keep the numbers, hence the bytes, small for likely symbols.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxsem.entropy import escapes, rans, reference
from jaxsem.entropy.symbols import as_indices, as_symbols, find_positions
from jaxsem.entropy.tables import ESCAPED, Tables
from jaxsem.errors import FormatError, InputError


@dataclass(frozen=True)
class StreamFormat:
    """What tells the two formats apart.

    Attributes:
        bound_bits: logarithm of the lower bound of the state.
        seeded: whether the state starts at 0, seeded by the last symbols, and is written in as few bytes as hold it
            (short), or it starts at the bound and is written in full (long).
    """

    bound_bits: int
    seeded: bool


SHORT = StreamFormat(reference.SHORT_BOUND_BITS, True)
LONG = StreamFormat(rans.BOUND_BITS, False)
BLOCK = 16  # steps prepared together: few enough to stay in the processor's cache


def encode_lanes(symbols: np.ndarray, indices: np.ndarray, tables: Tables, stream: StreamFormat = SHORT) -> list[bytes]:
    """Code many equally long symbol sequences into one stream each.

    Args:
        symbols: integers [lanes, length], each within 32 bits.
        indices: table of each symbol, [length] or [lanes, length].
        tables: of 8 bits for the short format, as a rule.
        stream: ``SHORT``, or ``LONG`` for the bytes that `jaxsem.entropy.Encoder` gives for one slice a stream.

    Raises:
        InputError: if shapes or types do not fit, an index names no table, or a value lies outside a closed table.
    """
    symbols, coding = as_symbols(symbols), tables.coding
    if symbols.ndim != 2:
        raise InputError(f"Lanes need symbols of shape [lanes, length], not {symbols.shape}.")
    indices = _lane_indices(indices, tables, *symbols.shape)
    positions, escaped = find_positions(symbols, indices, tables)
    digits = np.empty((0, len(symbols)), np.int32)
    if len(escaped):
        values, where = symbols.flat[escaped], indices.flat[escaped]
        digits = _digit_positions(values, where, escaped // symbols.shape[1], len(symbols), tables)
    state = np.full(len(symbols), 0 if stream.seeded else 1 << stream.bound_bits, np.uint32)
    if stream.seeded:
        seeds, rank, idle = _seed_mask(indices, tables), _ranks(tables), coding.bases[coding.idle_table]
        for i in range(symbols.shape[1] - 1, -1, -1):
            if not seeds[:, i].any():
                break
            folded = state * tables.sizes[indices[:, i]].astype(np.uint32) + rank[positions[:, i]]
            state = np.where(seeds[:, i], folded, state).astype(np.uint32)
        positions = np.where(seeds, idle, positions)
    positions = np.concatenate([positions.T, digits])
    entries = tables.coding.entries
    return encode_entries(state, len(positions), lambda block: entries.take(positions[block]), tables.precision, stream)


def decode_lanes(
    data: Sequence[bytes], indices: np.ndarray, tables: Tables, length: int | None = None, stream: StreamFormat = SHORT
) -> np.ndarray:
    """The inverse of `encode_lanes`.

    Args:
        data: one stream per lane.
        indices: table of each symbol, [length] or [lanes, length].
        tables: the very tables the streams were written with.
        length: symbols of each lane; may be given to confirm the shape of `indices`.
        stream: the format.

    Returns:
        int32 [lanes, length].

    Raises:
        FormatError: if a stream is damaged; the message names the first such lane.
        InputError: if the indices do not fit.
    """
    length = np.shape(indices)[-1] if length is None and np.ndim(indices) else length
    indices = _lane_indices(indices, tables, len(data), length)
    coding = tables.coding
    reader = _TableReader(data, tables, stream)
    seeds = _seed_mask(indices, tables) if stream.seeded else np.zeros(indices.shape, bool)
    positions = np.ascontiguousarray(reader.pull(np.where(seeds, coding.idle_table, indices).T).T)
    symbols = coding.values.take(positions)
    lanes, columns = np.nonzero(symbols == ESCAPED)
    if len(lanes):
        where = indices[lanes, columns]
        lengths = reader.pull_digits(np.bincount(lanes, minlength=len(data)))
        escapes.check_lengths(lengths)
        digits = reader.pull_digits(np.bincount(lanes, weights=lengths, minlength=len(data)).astype(np.int64))
        symbols[lanes, columns] = escapes.from_digits(lengths, digits, coding.offsets[where], coding.limits[where])
    state = reader.state
    if stream.seeded:
        by_rank = _by_rank(tables)
        for i in np.flatnonzero(seeds.any(0)):
            sizes = tables.sizes[indices[:, i]]
            entry = by_rank[coding.bases[indices[:, i]] + state % sizes]
            symbols[:, i] = np.where(seeds[:, i], entry + coding.offsets[indices[:, i]], symbols[:, i])
            state = np.where(seeds[:, i], state // sizes, state)
    reader.finish(state)
    return symbols


class LaneReader:
    """States and cursors of all lanes; a cursor moves over the joined bytes of all streams, up to its lane's end.

    Attributes:
        state: int64 [lanes].
    """

    def __init__(self, data: Sequence[bytes], stream: StreamFormat):
        sizes = np.array([len(lane) for lane in data], np.int64)
        self.bytes = np.frombuffer(b"".join(data) + b"\0", np.uint8)
        self.ends = np.cumsum(sizes)
        self.cursor = self.ends - sizes
        self.stream = stream
        self.state = np.zeros(len(data), np.int64)
        if stream.seeded:
            wrong = (sizes > 0) & (self.bytes[np.minimum(self.cursor, len(self.bytes) - 1)] == 0)
            self._refuse(wrong, "begins with a zero byte")
            self.refill(-(-stream.bound_bits // 8) + 1)
        else:
            self._refuse(sizes < rans.STATE_BYTES, "is shorter than four bytes")
            for _ in range(rans.STATE_BYTES):
                self.state = self.state << 8 | self.bytes[self.cursor]
                self.cursor += 1
            self._refuse((self.state < rans.START) | (self.state >= rans.START << 8), "starts with no valid state")

    def refill(self, rounds: int) -> None:
        """Take up to so many bytes into every state below the bound, as far as its lane has them."""
        bound = 1 << self.stream.bound_bits
        for _ in range(rounds):
            hungry = self.state < bound
            hungry &= self.cursor < self.ends
            longer = self.state << 8
            longer |= self.bytes.take(self.cursor)
            self.state = np.where(hungry, longer, self.state)
            self.cursor += hungry
        if not self.stream.seeded:
            self._refuse(self.state < bound, "ends early")

    def finish(self, state: np.ndarray) -> None:
        """Refuse lanes with bytes left or a state that is not back at its start."""
        start = 0 if self.stream.seeded else rans.START
        self._refuse((state != start) | (self.cursor != self.ends), "does not end where its last symbol does")

    def _refuse(self, wrong: np.ndarray, what: str) -> None:
        if wrong.any():
            raise FormatError(f"The coded stream of lane {np.argmax(wrong)} is damaged: it {what}.")


class _TableReader(LaneReader):
    """A reader of symbols with static tables."""

    def __init__(self, data: Sequence[bytes], tables: Tables, stream: StreamFormat):
        super().__init__(data, stream)
        self.tables = tables

    def pull(self, indices: np.ndarray) -> np.ndarray:
        """Positions [steps, lanes] of one symbol per lane and step, for table indices [steps, lanes]."""
        coding, precision = self.tables.coding, self.tables.precision
        mask, shift = (1 << precision) - 1, precision - coding.lookup_bits
        starts, frequencies = coding.starts.astype(np.int64), (coding.entries & np.uint32(0xFFFF)).astype(np.int64) + 1
        positions = np.empty(indices.shape, np.int32)
        for i in range(len(indices)):
            slot = self.state & mask
            cell = indices[i].astype(np.int64)
            cell <<= coding.lookup_bits
            cell += slot >> shift if shift else slot
            position = coding.lookup.take(cell)
            while shift and (late := starts.take(position + 1) <= slot).any():
                position += late
            self.state >>= precision
            self.state *= frequencies.take(position)
            slot -= starts.take(position)
            self.state += slot
            positions[i] = position
            self.refill(-(-precision // 8))
        return positions

    def pull_digits(self, counts: np.ndarray) -> np.ndarray:
        """`counts[lane]` digits of each lane, lane after lane, as one array."""
        coding = self.tables.coding
        wanted = np.arange(counts.max(initial=0))[:, None] < counts
        found = self.pull(np.where(wanted, coding.digit_table, coding.idle_table))
        return (found - coding.bases[coding.digit_table]).T[wanted.T]


def encode_entries(
    state: np.ndarray, steps: int, entries: Callable[[slice], np.ndarray], precision: int, stream: StreamFormat
) -> list[bytes]:
    """Code entries from last to first into one stream a lane.

    Args:
        state: uint32 [lanes], where each lane begins.
        steps: how many entries a lane codes.
        entries: gives those of a slice of the steps, uint32 [in the slice, lanes], ``start << 16 | frequency - 1``.
        precision: bits of the frequencies.
        stream: the format.
    """
    lanes, rounds, bound_bits = len(state), -(-precision // 8), stream.bound_bits
    moved, full = np.empty((steps, rounds, lanes), np.uint8), np.empty((steps, rounds, lanes), bool)
    for begin in range((steps - 1) // BLOCK * BLOCK, -1, -BLOCK):
        block = entries(slice(begin, begin + BLOCK))
        starts, frequencies = block >> np.uint32(16), (block & np.uint32(0xFFFF)) + np.uint32(1)
        limits = frequencies << np.uint32(bound_bits - precision + 8)
        # (x div f) 2^p + x mod f + start = x + start + (x div f) (2^p - f)
        gains = np.uint32(1 << precision) - frequencies
        for i in range(len(block) - 1, -1, -1):
            for j in range(rounds - 1, -1, -1):
                moved[begin + i, j] = state
                over = np.greater_equal(state, limits[i], out=full[begin + i, j])
                state = np.where(over, state >> np.uint32(8), state)
            quotient = state // frequencies[i]
            quotient *= gains[i]
            state += quotient
            state += starts[i]
    full = full.reshape(steps * rounds, lanes)
    ends = np.cumsum(full.sum(0)).tolist()
    joined = moved.reshape(steps * rounds, lanes).T[full.T].tobytes()
    heads = [x.to_bytes(-(-x.bit_length() // 8) if stream.seeded else rans.STATE_BYTES) for x in state.tolist()]
    return [head + joined[begin:end] for head, begin, end in zip(heads, [0, *ends], ends)]


def _lane_indices(indices: np.ndarray, tables: Tables, lanes: int, length: int | None) -> np.ndarray:
    indices = as_indices(indices, tables)
    if indices.shape not in ((length,), (lanes, length)):
        raise InputError(f"{lanes} lanes of {length} symbols need as many table indices each, not {indices.shape}.")
    return np.broadcast_to(indices, (lanes, length))


def _seed_mask(indices: np.ndarray, tables: Tables) -> np.ndarray:
    """Which symbols seed their lane's state: bool [lanes, length]."""
    mask = np.zeros(indices.shape, bool)
    product, active = np.ones(len(indices), np.int64), np.ones(len(indices), bool)
    for i in range(indices.shape[1] - 1, -1, -1):
        active &= (product < reference.SEED_PRODUCT) & ~tables.escapes[indices[:, i]]
        if not active.any():
            break
        mask[:, i] = active
        product *= np.where(active, tables.sizes[indices[:, i]], 1)
    return mask


def _by_rank(tables: Tables) -> np.ndarray:
    """Per position, the entry number that has this rank in its table."""
    orders = [np.append(np.argsort(-tables.row(t), kind="stable"), 0) for t in range(len(tables))]
    return np.concatenate([*orders, np.zeros(19, np.int64)]).astype(np.int32)


def _ranks(tables: Tables) -> np.ndarray:
    """Per position, the rank of its entry in its table."""
    rows = [np.append(reference.ranks(tables, t), 0) for t in range(len(tables))]
    return np.concatenate([*rows, np.zeros(19, np.int64)]).astype(np.uint32)


def _digit_positions(
    values: np.ndarray, tables_of: np.ndarray, lane_of: np.ndarray, lanes: int, tables: Tables
) -> np.ndarray:
    """Positions [steps, lanes] of the lengths, then the digits; lanes with fewer are idle at the end of either part."""
    coding = tables.coding
    lengths, digits = escapes.to_digits(values, coding.offsets[tables_of], coding.limits[tables_of])
    parts = []
    for content, lane in ((lengths, lane_of), (digits, np.repeat(lane_of, lengths))):
        counts = np.bincount(lane, minlength=lanes)
        part = np.full((counts.max(initial=0), lanes), coding.bases[coding.idle_table], np.int32)
        part[np.arange(len(lane)) - (np.cumsum(counts) - counts)[lane], lane] = (
            coding.bases[coding.digit_table] + content
        )
        parts.append(part)
    return np.concatenate(parts)
