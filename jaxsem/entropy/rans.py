"""The long-stream format: a rANS coder with a 32-bit state, for one stream of thousands to millions of symbols.

Specification, version 1
------------------------
**Tables.** Symbols are coded with tables of p bits (16 unless stated): entry k of a table has a frequency f[k] >= 1,
all of them together 2^p, and start[k] = f[0] + ... + f[k-1]. Ordinary entry k stands for the value offset + k. A
table may have a last entry that is its escape symbol. Which table a symbol uses, the decoder knows before it reads
the symbol.

**Stream.** A sequence of bytes; reading it gives the symbols in order.

    state x = the first four bytes, most significant first;   2^23 <= x < 2^31
    to read one symbol with a table:
        slot = x mod 2^p;  k = the entry with start[k] <= slot < start[k] + f[k]
        x = f[k] * (x div 2^p) + slot - start[k]
        while x < 2^23:  x = 256 x + the next byte           (at most two bytes a symbol for p = 16)

After the last symbol x is 2^23 exactly and no byte is left; anything else is an error. A writer runs this backwards:
from x = 2^23, for the symbols from last to first: while x >= f[k] * 2^(31-p), move the low byte of x out and divide x
by 256; then x = (x div f[k]) * 2^p + (x mod f[k]) + start[k]. The stream is the final x in four bytes, then the bytes
moved out, the last one first.

**Slices and escapes.** Symbols come in slices (one `push`, one `pull`). A value outside its table is written as the
table's escape symbol. When a slice has m > 0 escape symbols, it is followed by the escaped values, in their order:
first their m lengths, then all their digits, as `jaxsem.entropy.escapes` defines them. Each length and digit is one
symbol of a table of 16 equal frequencies, 2^(p-4). In an inline slice each escape symbol is followed at once by its own
length and digits, so that a reader who needs the value for what comes next has it (`jaxsem.entropy.traced`).

The cost is 4 bytes over the ideal of the tables, and less than 0.01 % on top. The bytes do not depend on the
back-end: "python" (`jaxsem.entropy.reference`), "compiled" (`jaxsem.entropy.compiled`), or NumPy over many streams at
once (`jaxsem.entropy.lanes`, with ``LONG``). The golden tests pin them; any change is a new version of the format.
"""

import numpy as np

from jaxsem.entropy import compiled, escapes, reference
from jaxsem.entropy.symbols import as_indices, as_symbols, find_positions
from jaxsem.entropy.tables import ESCAPED, Tables
from jaxsem.errors import FormatError, InputError

BOUND_BITS = 23
START = 1 << BOUND_BITS
STATE_BYTES = 4
SEAL_BITS = 16
BACKENDS = ("auto", "python", "compiled")
# Below these sizes starting a compiled program costs more than the plain loop (measured on two cores).
AUTO_ENCODE, AUTO_DECODE = 256, 128


class Encoder:
    """Collects slices and codes them into one stream.

    >>> import numpy as np
    >>> from jaxsem.entropy import Decoder, Encoder, gaussian_tables
    >>> tables, indices = gaussian_tables(), np.array([20, 20, 31])
    >>> encoder = Encoder(tables)
    >>> encoder.push(np.array([0, -1, 2]), indices)
    >>> data = encoder.finish()
    >>> decoder = Decoder(data, tables)
    >>> decoder.pull(indices).tolist(), decoder.finish()
    ([0, -1, 2], None)

    Args:
        tables: what the indices refer to.
        backend: "python", "compiled", or "auto" for the faster one; the bytes are the same.
    """

    def __init__(self, tables: Tables, backend: str = "auto"):
        self._tables = tables
        self._backend = _check_backend(backend)
        self._positions: list[np.ndarray] = []

    def push(self, symbols: np.ndarray, indices: np.ndarray, inline: bool = False) -> None:
        """Append one slice.

        Args:
            symbols: integers of any shape, each within 32 bits.
            indices: table of each symbol, same shape.
            inline: whether an escaped value follows its escape symbol, and not the slice.

        Raises:
            InputError: if shapes or types do not fit, an index names no table, or a value lies outside a closed table.
        """
        coding = self._tables.coding
        symbols, indices = as_symbols(symbols), as_indices(indices, self._tables)
        if symbols.shape != indices.shape:
            raise InputError(f"Symbols and table indices must have one shape, not {symbols.shape} and {indices.shape}.")
        symbols, indices = symbols.ravel(), indices.ravel()
        positions, escaped = find_positions(symbols, indices, self._tables)
        if not len(escaped):
            self._positions.append(positions)
            return
        tables = indices[escaped]
        lengths, digits = escapes.to_digits(symbols[escaped], coding.offsets[tables], coding.limits[tables])
        base = coding.bases[coding.digit_table]
        if inline:
            starts = np.cumsum(lengths) - lengths
            parts = [np.append(n, digits[k : k + n]) + base for k, n in zip(starts, lengths)]
            places = np.repeat(escaped + 1, lengths + 1)
            self._positions.append(np.insert(positions, places, np.concatenate(parts)))
        else:
            self._positions += [positions, np.concatenate([lengths, digits]) + base]

    def finish(self, seal: int = 0) -> bytes:
        """The stream of all slices pushed so far; at least 4 bytes.

        Args:
            seal: 0 to 65,535; `Decoder.finish` must be given the same.

        Raises:
            InputError: if the seal is out of range.
        """
        if not 0 <= seal < 1 << SEAL_BITS:
            raise InputError(f"A seal is a number of {SEAL_BITS} bits, not {seal}.")
        entries, precision = self._tables.coding.entries, self._tables.precision
        positions = np.concatenate([np.zeros(0, np.int32), *self._positions])
        if _use_compiled(self._backend, len(positions), AUTO_ENCODE):
            state, pieces = compiled.encode(START + seal, positions, entries, precision, BOUND_BITS)
        else:
            out = bytearray()
            state = reference.encode_steps(START + seal, entries[positions[::-1]].tolist(), precision, BOUND_BITS, out)
            pieces = [bytes(reversed(out))]
        return b"".join([state.to_bytes(STATE_BYTES), *pieces])


class Decoder:
    """Reads slices back from a stream, in the order in which they were pushed.

    Args:
        data: the stream.
        tables: the very tables it was written with.
        backend: "python", "compiled", or "auto".

    Raises:
        FormatError: if the data cannot be a stream. Damage may also show in `pull`, and at the latest in `finish`.
    """

    def __init__(self, data: bytes, tables: Tables, backend: str = "auto"):
        self._data = bytes(data)
        self._bytes = np.frombuffer(self._data, np.uint8)
        self._tables = tables
        self._backend = _check_backend(backend)
        self._state = int.from_bytes(self._data[:STATE_BYTES])
        self._cursor = STATE_BYTES
        if len(self._data) < STATE_BYTES or not START <= self._state < START << 8:
            raise FormatError(f"These {len(self._data)} bytes are no coded stream: the first four hold no valid state.")

    def pull(self, indices: np.ndarray) -> np.ndarray:
        """The next slice.

        Args:
            indices: table of each symbol, any shape, as they were at `Encoder.push`.

        Returns:
            int32 of the same shape.

        Raises:
            FormatError: if the stream ends early or holds what no encoder writes.
            InputError: if an index names no table.
        """
        coding = self._tables.coding
        indices = as_indices(indices, self._tables)
        shape, indices = indices.shape, indices.ravel()
        values = coding.values.take(self._positions(indices))
        escaped = np.flatnonzero(values == ESCAPED)
        if len(escaped):
            tables = indices[escaped]
            values[escaped] = self._escaped(coding.offsets[tables], coding.limits[tables])
        return values.reshape(shape)

    def rest(self) -> tuple[int, np.ndarray]:
        """The state and the bytes that are left, uint8, for a program that reads on by itself; see `jaxsem.entropy.traced`."""
        return self._state, self._bytes[self._cursor :]

    def advance(self, state: int, used: int) -> None:
        """Goes on where such a program stopped.

        Args:
            state: the state then.
            used: how many bytes it used.

        Raises:
            FormatError: if it asked for more bytes than there are.
        """
        self._state, self._cursor = state, self._cursor + used
        self._check_length()

    def finish(self, seal: int = 0) -> None:
        """Confirm that the stream was read to its very end.

        Args:
            seal: what `Encoder.finish` was given.

        Raises:
            FormatError: if bytes are left or the state is not back at its start: data, tables, indices or seal are not
                those of the encoder.
        """
        if self._cursor != len(self._data) or self._state != START + seal:
            left = len(self._data) - self._cursor
            raise FormatError(
                f"The coded stream is damaged, or was read with other tables than it was written with: {left} bytes are "
                f"left and its state is {self._state}, not {START + seal}."
            )

    def _positions(self, indices: np.ndarray) -> np.ndarray:
        data = (self._tables, indices, BOUND_BITS)
        if _use_compiled(self._backend, len(indices), AUTO_DECODE):
            self._state, self._cursor, positions = compiled.decode(self._state, self._bytes, self._cursor, *data)
        else:
            data = (self._tables, indices.tolist(), BOUND_BITS)
            self._state, self._cursor, positions = reference.decode_steps(self._state, self._data, self._cursor, *data)
        self._check_length()
        return np.asarray(positions, np.int32)

    def _check_length(self) -> None:
        if self._cursor > len(self._data) or self._state < START:
            raise FormatError(f"The coded stream ends early: more than its {len(self._data)} bytes are needed.")

    def _escaped(self, offsets: np.ndarray, limits: np.ndarray) -> np.ndarray:
        coding = self._tables.coding

        def digits(count: int) -> np.ndarray:
            indices = np.full(count, coding.digit_table, np.int32)
            return self._positions(indices) - coding.bases[coding.digit_table]

        lengths = digits(len(offsets))
        escapes.check_lengths(lengths)
        return escapes.from_digits(lengths, digits(int(lengths.sum())), offsets, limits)


def _check_backend(backend: str) -> str:
    if backend not in BACKENDS:
        raise InputError(f"The back-end is one of {', '.join(BACKENDS)}, not {backend!r}.")
    if backend == "compiled" and compiled.host_device() is None:
        raise InputError(
            "The compiled back-end needs JAX's CPU platform; allow it in JAX_PLATFORMS or use backend='auto'."
        )
    return backend


def _use_compiled(backend: str, length: int, threshold: int) -> bool:
    return backend == "compiled" or (backend == "auto" and length >= threshold and compiled.host_device() is not None)
