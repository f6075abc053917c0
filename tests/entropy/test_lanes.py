"""The short-stream format and the NumPy coders over many lanes."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsem.entropy import (
    LONG,
    SHORT,
    Decoder,
    Encoder,
    Tables,
    decode_lanes,
    decode_short,
    encode_lanes,
    encode_short,
    gaussian_tables,
    tables_from_counts,
)
from jaxsem.errors import FormatError, InputError

CLOSED = tables_from_counts([[40, 25, 12, 9, 6, 4, 3, 1], [5, 1, 1]])
OPEN = tables_from_counts([[40, 25, 12, 9]], escape=True, offsets=-1)
MIXED = Tables.concat(CLOSED, OPEN, tables_from_counts([[1], [1, 1]]))


def closed_case():
    indices = np.arange(40) % 2
    return np.where(indices, np.arange(40) // 2 % 3, np.arange(40) * np.arange(40) % 8)[None], indices


def mixed_case(lanes, length, seed):
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, len(MIXED), (lanes, length))
    symbols = rng.integers(0, 1 << 30, (lanes, length)) % MIXED.sizes[indices] + MIXED.offsets[indices]
    far = (indices == 2) & (rng.random((lanes, length)) < 0.3)
    return np.where(far, rng.integers(-(2**31), 2**31, (lanes, length)), symbols), indices


def test_golden_bytes_of_closed_tables():
    symbols, indices = closed_case()
    assert encode_lanes(symbols, indices, CLOSED)[0].hex() == "2b4c1abf01e9a6f409e4b6e0"


def test_golden_bytes_with_escapes():
    symbols = np.array([[0, -1, 2, 0, 0, 300, -70000, 1, 0, 0]])
    assert encode_lanes(symbols, np.zeros(10, int), OPEN)[0].hex() == "025c9a3effffda525dd0"


def test_specification_is_enough_to_decode():
    """A decoder written from the module docstring alone, for closed tables."""
    symbols, indices = closed_case()
    rest, x, found = list(encode_lanes(symbols, indices, CLOSED)[0]), 0, []

    def refill(x):
        while x < 2**16 and rest:
            x = 256 * x + rest.pop(0)
        return x

    x, seed, product = refill(0), 0, 1
    while product < 256:
        seed += 1
        product *= len(CLOSED.row(indices[-seed]))
    for i, table in enumerate(indices):
        row = CLOSED.row(table).tolist()
        if i < len(indices) - seed:
            slot, start, k = x % 256, 0, 0
            while start + row[k] <= slot:
                start, k = start + row[k], k + 1
            x = refill(row[k] * (x // 256) + slot - start)
        else:
            k = sorted(range(len(row)), key=lambda k: (-row[k], k))[x % len(row)]
            x //= len(row)
        found.append(k)
    assert found == symbols[0].tolist()
    assert (x, rest) == (0, [])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_short_round_trip_equals_the_reference(lanes, length, seed):
    symbols, indices = mixed_case(lanes, length, seed)
    data = encode_lanes(symbols, indices, MIXED)
    assert data == [encode_short(s, i, MIXED) for s, i in zip(symbols, indices)]
    assert (decode_lanes(data, indices, MIXED, length) == symbols).all()
    assert all((decode_short(d, i, MIXED) == s).all() for d, s, i in zip(data, symbols, indices))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_long_lanes_equal_the_encoder(lanes, length, seed):
    symbols, indices = mixed_case(lanes, length, seed)
    data = encode_lanes(symbols, indices, MIXED, LONG)
    for lane in range(lanes):
        encoder = Encoder(MIXED, "python")
        encoder.push(symbols[lane], indices[lane])
        assert encoder.finish() == data[lane]
        assert (Decoder(data[lane], MIXED, "python").pull(indices[lane]) == symbols[lane]).all()
    assert (decode_lanes(data, indices, MIXED, stream=LONG) == symbols).all()


@pytest.mark.parametrize("stream", [SHORT, LONG])
def test_wide_tables_of_sixteen_bits(stream):
    rng = np.random.default_rng(0)
    tables = Tables.concat(gaussian_tables(), tables_from_counts([np.arange(3000)], precision=16))
    indices = rng.integers(40, 65, (5, 60))
    symbols = np.where(indices == 64, rng.integers(0, 3000, (5, 60)), rng.integers(-2000, 2000, (5, 60)))
    data = encode_lanes(symbols, indices, tables, stream)
    assert (decode_lanes(data, indices, tables, stream=stream) == symbols).all()
    if stream is SHORT:
        assert data[2] == encode_short(symbols[2], indices[2], tables)


@pytest.mark.parametrize("precision", [4, 5, 8, 11, 16])
def test_every_precision(precision):
    rng = np.random.default_rng(precision)
    tables = tables_from_counts([rng.integers(0, 9, 16), rng.integers(0, 9, 3)], precision)
    indices = rng.integers(0, 2, (20, 50))
    symbols = rng.integers(0, 16, (20, 50)) % tables.sizes[indices]
    data = encode_lanes(symbols, indices, tables)
    assert data == [encode_short(s, i, tables) for s, i in zip(symbols, indices)]
    assert (decode_lanes(data, indices, tables) == symbols).all()


def test_tiny_streams_cost_at_most_six_per_mille():
    """200 symbols of 8 at 2.7 bits: the real bytes against the entropy of the source."""
    p = np.exp(1.1 * np.random.default_rng(0).normal(size=8))
    p /= p.sum()
    tables = tables_from_counts([p * 1e6])
    symbols = np.random.default_rng(1).choice(8, (500, 200), p=p)
    data = encode_lanes(symbols, np.zeros(200, int), tables)
    ideal = -np.log2(p)[symbols].sum() / 8
    assert 1.0 < sum(map(len, data)) / ideal < 1.006


def test_likely_symbols_cost_nothing():
    assert encode_lanes(np.zeros((2, 3), int), np.zeros(3, int), CLOSED) == [b"", b""]
    assert (decode_lanes([b"", b""], np.zeros(3, int), CLOSED) == 0).all()


def test_every_truncation_of_a_long_stream_is_refused():
    symbols, indices = closed_case()
    data = encode_lanes(symbols, indices, CLOSED, LONG)[0]
    for end in range(len(data)):
        with pytest.raises(FormatError, match="lane 1"):
            decode_lanes([data, data[:end]], indices, CLOSED, stream=LONG)


def test_every_truncation_of_a_short_stream_is_refused_or_changes_symbols():
    """Hardly a bit of a short stream is redundant, so a cut one may be another valid stream."""
    symbols, indices = closed_case()
    data = encode_lanes(symbols, indices, CLOSED)[0]
    for end in range(len(data)):
        with contextlib.suppress(FormatError):
            assert (decode_lanes([data[:end]], indices, CLOSED) != symbols).any()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=3), st.integers(0, 60), st.sampled_from([SHORT, LONG]))
def test_garbage_is_refused_or_is_a_stream(data, length, stream):
    indices = np.arange(length) % len(MIXED)
    try:
        symbols = decode_lanes(data, indices, MIXED, stream=stream)
    except FormatError:
        return
    assert encode_lanes(symbols, indices, MIXED, stream) == data


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 60))
def test_reference_and_lanes_refuse_the_same(data, length):
    indices = np.arange(length) % len(MIXED)
    results = []
    for decoder in (lambda: decode_short(data, indices, MIXED), lambda: decode_lanes([data], indices, MIXED)[0]):
        try:
            results.append(decoder().tolist())
        except FormatError:
            results.append(None)
    assert results[0] == results[1]


def test_flipped_bits_never_give_the_same_symbols():
    symbols, indices = closed_case()
    data = bytearray(encode_lanes(symbols, indices, CLOSED)[0])
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(FormatError):
            assert (decode_lanes([bytes(data)], indices, CLOSED) != symbols).any()
        data[bit // 8] ^= 1 << bit % 8


def test_no_lanes():
    assert encode_lanes(np.zeros((0, 5), int), np.zeros(5, int), CLOSED) == []
    assert decode_lanes([], np.zeros(5, int), CLOSED).shape == (0, 5)


def test_value_outside_a_closed_table_is_refused():
    with pytest.raises(InputError, match="value 8 is outside table 0"):
        encode_lanes(np.array([[8]]), np.zeros(1, int), CLOSED)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="2 lanes of 3 symbols"):
        encode_lanes(np.zeros((2, 3), int), np.zeros(4, int), CLOSED)
    with pytest.raises(InputError, match="1 lanes of 3 symbols"):
        decode_lanes([b""], np.zeros(4, int), CLOSED, 3)
    with pytest.raises(InputError, match="as many table indices"):
        encode_short(np.zeros(3, int), np.zeros(4, int), CLOSED)
