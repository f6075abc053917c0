"""The coder as compiled scalar loops on the host CPU: the integers of `jaxsem.entropy.reference`, so the same bytes.

XLA turns a loop with scalar state into machine code of a few dozen instructions a symbol. It stays fast only while
the loop is plainly scalar: no `vmap`, no unrolling (both were ten times slower). The number of symbols is an argument
and the buffers come in two sizes, so that a process compiles two programs per direction at most for tables of about one
size; longer inputs go through in several calls.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import SingleDeviceSharding

from jaxsem.entropy.tables import Tables

BUCKETS = (1 << 11, 1 << 14)  # larger buffers would be mapped afresh by each call, which costs more than the calls


@lru_cache(maxsize=1)
def host_device() -> jax.Device | None:
    """The CPU device of this process, or None where JAX was started without a CPU back-end."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def encode(
    state: int, positions: np.ndarray, entries: np.ndarray, precision: int, bound_bits: int
) -> tuple[int, list[bytes]]:
    """Code symbols from the last to the first.

    Args:
        state: the coder's state.
        positions: int32 [n], the entry of each symbol.
        entries: uint32, all entries: ``start << 16 | frequency - 1``.
        precision: bits of the tables.
        bound_bits: logarithm of the lower bound of the state, at most 23.

    Returns:
        The new state, and pieces of the stream in reading order.
    """
    pieces = []
    for end in range(len(positions), 0, -BUCKETS[-1]):
        part = positions[max(0, end - BUCKETS[-1]) : end]
        bucket = _bucket(len(part))
        head = np.array([state, len(part)], np.uint32)
        tail, buffer = _call(_encoder(bucket, precision, bound_bits), _padded(entries.take(part), bucket), head)
        state, count = int(tail[0]), int(tail[1])
        pieces.append(buffer[:count][::-1].tobytes())
    return state, pieces[::-1]


def decode(
    state: int, data: np.ndarray, cursor: int, tables: Tables, indices: np.ndarray, bound_bits: int
) -> tuple[int, int, np.ndarray]:
    """Decode one symbol for each table index.

    Behind the end of the data, zeros are read: the caller compares the cursor with the length.

    Args:
        state: the coder's state, at least the lower bound.
        data: uint8 [bytes].
        cursor: how many bytes were used before.
        tables: the tables.
        indices: int32 [n], each within the tables (service tables included).
        bound_bits: logarithm of the lower bound of the state.

    Returns:
        The new state, the new cursor, and the positions int32 [n] of the symbols.
    """
    look_ups, bits = _device_tables(tables)
    sizes = tuple(len(array) for array in look_ups)
    positions = np.empty(len(indices), np.int32)
    for begin in range(0, len(indices), BUCKETS[-1]):
        part = indices[begin : begin + BUCKETS[-1]]
        bucket = _bucket(len(part))
        window = _padded(data[cursor : cursor + 2 * bucket], 2 * bucket + 2)  # no symbol takes more than two bytes
        head = np.array([state, len(part)], np.uint32)
        program = _decoder(bucket, sizes, tables.precision, bits, bound_bits)
        tail, found = _call(program, window, _padded(part, bucket), head, *look_ups)
        state, cursor = int(tail[0]), cursor + int(tail[1])
        positions[begin : begin + len(part)] = found[: len(part)]
    return state, cursor, positions


def _bucket(length: int) -> int:
    return next(bucket for bucket in BUCKETS if length <= bucket)


def _padded(array: np.ndarray, length: int) -> np.ndarray:
    if len(array) == length:
        return array
    result = np.zeros(length, array.dtype)
    result[: len(array)] = array
    return result


def _call(program, *arguments) -> list[np.ndarray]:
    """Run on host arrays. Nothing leaves the host, so a user's transfer guard, meant for accelerators, is lifted."""
    if jax.config.jax_transfer_guard_host_to_device or jax.config.jax_transfer_guard_device_to_host:
        with jax.transfer_guard("allow"):
            return [np.asarray(result) for result in program(*arguments)]
    return [np.asarray(result) for result in program(*arguments)]


def _compile(function, *shapes):
    """Compile for the host device, in a thread of its own: the caller's mesh and other contexts do not reach there."""
    sharding = SingleDeviceSharding(host_device())
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: jax.jit(function).lower(*arguments).compile()).result()


@lru_cache(maxsize=32)
def _device_tables(tables: Tables) -> tuple[list[jax.Array], int]:
    """Look-up arrays on the host device, padded to powers of two so that programs serve tables of many sizes."""
    coding = tables.coding
    arrays = coding.lookup, coding.entries[coding.lookup], coding.entries
    sharding = SingleDeviceSharding(host_device())
    padded = [_padded(array, 1 << (len(array) - 1).bit_length()) for array in arrays]
    return [jax.device_put(array, sharding) for array in padded], coding.lookup_bits


@lru_cache(maxsize=64)
def _encoder(bucket: int, precision: int, bound_bits: int):
    limit_shift = np.uint32(bound_bits - precision + 8)

    def step(i, carry):
        state, count, buffer, entries, length = carry
        entry = _at(entries, length - 1 - i)
        start, frequency = entry >> np.uint32(16), (entry & np.uint32(0xFFFF)) + np.uint32(1)
        limit = frequency << limit_shift
        for _ in range(2):
            # The byte is always written; what decides is whether the next one goes behind or over it.
            buffer = lax.dynamic_update_slice(buffer, state.astype(jnp.uint8)[None], (count,))
            full = state >= limit
            state = jnp.where(full, state >> np.uint32(8), state)
            count = count + full.astype(jnp.int32)
        quotient = state // frequency
        state = (quotient << np.uint32(precision)) + (state - quotient * frequency) + start
        return state, count, buffer, entries, length

    def run(entries, head):
        length = head[1].astype(jnp.int32)
        carry = head[0], jnp.int32(0), jnp.zeros(2 * bucket + 2, jnp.uint8), entries, length
        state, count, buffer, *_ = lax.fori_loop(jnp.int32(0), length, step, carry)
        return jnp.stack([state, count.astype(jnp.uint32)]), buffer

    return _compile(run, ((bucket,), np.uint32), ((2,), np.uint32))


@lru_cache(maxsize=64)
def _decoder(bucket: int, sizes: tuple[int, int, int], precision: int, lookup_bits: int, bound_bits: int):
    def run(window, indices, head, *look_ups):
        def fetch(cursor):
            return _at(window, cursor), _at(window, cursor + 1)

        def step(i, carry):
            state, cursor, found = carry
            table = _at(indices, i)
            state, cursor, position = read_symbol(
                state, cursor, fetch, table, *look_ups, precision, lookup_bits, bound_bits
            )
            return state, cursor, found.at[i].set(position, mode="promise_in_bounds")

        carry = head[0], jnp.int32(0), jnp.zeros(bucket, jnp.int32)
        state, cursor, found = lax.fori_loop(jnp.int32(0), head[1].astype(jnp.int32), step, carry)
        return jnp.stack([state, cursor.astype(jnp.uint32)]), found

    shapes = [((2 * bucket + 2,), np.uint8), ((bucket,), np.int32), ((2,), np.uint32)]
    look_ups = [((size,), dtype) for size, dtype in zip(sizes, (np.int32, np.uint32, np.uint32))]
    return _compile(run, *shapes, *look_ups)


def read_symbol(
    state: jax.Array,
    cursor: jax.Array,
    fetch: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    table: jax.Array,
    lookup: jax.Array,
    lookup_entries: jax.Array,
    entries: jax.Array,
    precision: int,
    lookup_bits: int,
    bound_bits: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One traced step of the decoder.

    Args:
        state: uint32 (), the coder's state.
        cursor: int32 (), how many bytes were used.
        fetch: gives the two bytes from a cursor on, uint8.
        table: int32 (), the table of the symbol.
        lookup: int32, the first entry of each cell.
        lookup_entries: uint32, the entries there.
        entries: uint32, all entries: ``start << 16 | frequency - 1``.
        precision: bits of the tables.
        lookup_bits: bits of a slot that choose a cell.
        bound_bits: logarithm of the lower bound of the state.

    Returns:
        The state, the cursor, and the position int32 () of the symbol.
    """
    bound, low_bound = np.uint32(1 << bound_bits), np.uint32(1 << (bound_bits - 8))
    low_half, one, byte, half = np.uint32(0xFFFF), np.uint32(1), np.uint32(8), np.uint32(16)
    slot = state & np.uint32((1 << precision) - 1)
    cell = (table << np.int32(lookup_bits)) + (slot >> np.uint32(precision - lookup_bits)).astype(jnp.int32)
    # Mostly the first entry of the cell is the one. It has a table of its own, so that the state, on which
    # everything waits, needs one load and not two.
    position, entry = lax.while_loop(
        lambda here: slot - (here[1] >> half) > (here[1] & low_half),
        lambda here: (here[0] + np.int32(1), _at(entries, here[0] + np.int32(1))),
        (_at(lookup, cell), _at(lookup_entries, cell)),
    )
    state = ((entry & low_half) + one) * (state >> np.uint32(precision)) + slot - (entry >> half)
    # Both bytes are fetched before it is known how many are needed, for the same reason.
    high, low = fetch(cursor)
    pair = (high.astype(jnp.uint32) << byte) | low.astype(jnp.uint32)
    first, second = state < bound, state < low_bound
    longer = jnp.where(second, (state << half) | pair, (state << byte) | (pair >> byte))
    cursor = cursor + first.astype(jnp.int32) + second.astype(jnp.int32)
    return jnp.where(first, longer, state), cursor, position


def _at(array, index):
    """One element; the index is known to be inside, which spares the loop a comparison."""
    return array.at[index].get(mode="promise_in_bounds")
