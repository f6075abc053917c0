"""The long-stream decoder inside a compiled program of someone else: for symbols whose tables depend on those before them.

A serial context model needs every symbol before it can tell the table of the next. So that nothing goes back and forth
between host and program, the program reads the stream itself: `read` is a traced function with scalar state, which may
stand in loops and under `jax.vmap` (one stream an image). It reads what `Encoder.push(..., inline=True)` wrote.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsem.entropy import compiled
from jaxsem.entropy.rans import BOUND_BITS
from jaxsem.entropy.tables import ESCAPED, Tables

MAX_DIGITS = 7  # of an escaped value here: it stays within int32


class Stream(NamedTuple):
    """Where a decoder stands.

    Attributes:
        data: uint8 [n], the bytes that were left at the start, and zeros behind them.
        state: uint32 (), the coder's state.
        cursor: int32 (), how many bytes were used.
        sound: bool (), False once something was read that no encoder writes.
    """

    data: jax.Array
    state: jax.Array
    cursor: jax.Array
    sound: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["lookup", "lookup_entries", "entries", "values", "offsets", "limits", "digits"],
    meta_fields=["precision", "lookup_bits"],
)
@dataclass(frozen=True)
class LookUps:
    """What `read` needs of `Tables`, as arrays of the device; see `CodingArrays` and `compiled.read_symbol`."""

    lookup: jax.Array
    lookup_entries: jax.Array
    entries: jax.Array
    values: jax.Array
    offsets: jax.Array
    limits: jax.Array
    digits: jax.Array  # int32 [2]: the table of digits, and the position of its first entry
    precision: int
    lookup_bits: int


@lru_cache(maxsize=8)
def look_ups(tables: Tables) -> LookUps:
    """The look-up arrays of tables on the default device."""
    coding = tables.coding
    digits = np.array([coding.digit_table, coding.bases[coding.digit_table]], np.int32)
    arrays = coding.lookup, coding.entries[coding.lookup], coding.entries, coding.values, coding.offsets
    limits = coding.limits.astype(np.int32)
    return LookUps(*jax.device_put((*arrays, limits, digits)), tables.precision, coding.lookup_bits)


def start(state: int, data: np.ndarray, room: int) -> Stream:
    """A stream on the host, ready to be given to a program.

    Args:
        state: the coder's state, from `Decoder.rest`.
        data: the bytes that are left, uint8; what is more than `room` no program looks at.
        room: bytes of the buffer: its length is the program's, whatever the stream's.
    """
    buffer = np.zeros(room, np.uint8)
    buffer[: len(data)] = data[:room]
    return Stream(buffer, np.uint32(state), np.int32(0), np.bool_(True))


def read(stream: Stream, tables: LookUps, indices: jax.Array, count: jax.Array) -> tuple[Stream, jax.Array]:
    """Reads symbols, each with its escaped value if it has one.

    Args:
        stream: where to read.
        tables: the look-up arrays.
        indices: int32 [n], the table of each symbol.
        count: int32 (), how many of them to read, from the first on.

    Returns:
        The stream behind them, and their values int32 [n]; 0 where nothing was to be read.
    """
    last = len(stream.data) - 1

    def fetch(cursor):
        # A damaged stream may ask for more than there is; the caller compares the cursor with the length.
        return stream.data[jnp.minimum(cursor, last)], stream.data[jnp.minimum(cursor + 1, last)]

    def symbol(state, cursor, table):
        arrays = tables.lookup, tables.lookup_entries, tables.entries
        return compiled.read_symbol(
            state, cursor, fetch, table, *arrays, tables.precision, tables.lookup_bits, BOUND_BITS
        )

    def escaped(state, cursor, sound, table):
        def digit(j, carry):
            state, cursor, raw, _ = carry
            state, cursor, position = symbol(state, cursor, tables.digits[0])
            latest = position - tables.digits[1]
            return state, cursor, raw | (latest << (4 * j)), latest

        state, cursor, position = symbol(state, cursor, tables.digits[0])
        length = position - tables.digits[1]
        used = jnp.minimum(length, MAX_DIGITS)
        state, cursor, raw, latest = lax.fori_loop(0, used, digit, (state, cursor, jnp.int32(0), jnp.int32(1)))
        offset = tables.offsets[table]
        value = jnp.where(raw & 1, offset - (raw + 1) // 2, offset + tables.limits[table] + raw // 2)
        return state, cursor, sound & (length <= MAX_DIGITS) & (latest != 0), value

    # The loop over plain symbols is kept free of branches, which makes it ten times as fast; it stops behind an escape symbol.
    def plain(carry):
        i, state, cursor, positions, _ = carry
        state, cursor, position = symbol(state, cursor, indices[i])
        return i + 1, state, cursor, positions.at[i].set(position), tables.values[position] == ESCAPED

    def stretch(carry):
        i, stream, positions, outside = carry
        begin = i, stream.state, stream.cursor, positions, jnp.bool_(False)
        i, state, cursor, positions, stopped = lax.while_loop(lambda at: (at[0] < count) & ~at[-1], plain, begin)
        table = indices[i - 1]
        arguments = state, cursor, stream.sound, table
        state, cursor, sound, value = lax.cond(
            stopped, escaped, lambda state, cursor, sound, _: (state, cursor, sound, jnp.int32(0)), *arguments
        )
        outside = outside.at[jnp.where(stopped, i - 1, len(indices))].set(value, mode="drop")
        return i, Stream(stream.data, state, cursor, sound), positions, outside

    blank = jnp.zeros(indices.shape, jnp.int32)
    first = jnp.int32(0), stream, blank, blank
    _, stream, positions, outside = lax.while_loop(lambda at: at[0] < count, stretch, first)
    values = tables.values[positions]
    values = jnp.where(values == ESCAPED, outside, values)
    return stream, jnp.where(jnp.arange(len(indices)) < count, values, 0)
