"""The adaptive format: a table for every symbol."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsem.entropy import adaptive
from jaxsem.entropy.adaptive import AdaptiveDecoder, encode_adaptive
from jaxsem.errors import FormatError, InputError

SEEDS = st.integers(0, 2**32 - 1)


def random_tables(shape, k, seed, skew=1.0, absent=0):
    """Tables int32 [*shape, k], the last `absent` entries of which are 0."""
    weights = np.random.default_rng(seed).gamma(1 / skew, size=(*shape, k)) + 1e-9
    weights[..., k - absent :] = 0
    free = 65536 - (k - absent)
    found = np.floor(weights / weights.sum(-1, keepdims=True) * free).astype(np.int32)
    found[..., : k - absent] += 1
    found[..., 0] += 65536 - found.sum(-1, dtype=np.int32)
    return found


def draw(tables, seed):
    """Symbols [lanes, length] as likely as the tables [length, lanes, k] say."""
    slots = np.random.default_rng(seed).integers(0, 65536, tables.shape[:2])
    return (tables.cumsum(-1) <= slots[..., None]).sum(-1).T


def decode(data, tables):
    decoder = AdaptiveDecoder(data)
    found = [decoder.pull(table) for table in tables]
    decoder.finish()
    return np.stack(found, 1) if found else np.zeros((len(data), 0), int)


def test_golden_bytes():
    rows = [[50000, 15000, 500, 36], [1, 65533, 1, 1], [16384] * 4, [30000, 20000, 10000, 5536]]
    tables = np.array(rows * 6, np.int32)[:, None]
    data = encode_adaptive(np.arange(24)[None] * 5 // 3 % 4, tables)
    assert [stream.hex() for stream in data] == ["43a58ad100b264b724d71e00ad2f"]
    assert decode(data, tables).tolist() == [(np.arange(24) * 5 // 3 % 4).tolist()]


def test_the_specification_is_enough_to_decode():
    """A decoder written from the module's docstring alone."""
    tables = random_tables((14, 1), 3, seed=0)[:, 0].tolist()
    symbols = draw(np.array(tables)[:, None], seed=1)
    rest, x, found = list(encode_adaptive(symbols, np.array(tables)[:, None])[0]), 0, []

    def refill(x):
        while x < 2**23 and rest:
            x = 256 * x + rest.pop(0)
        return x

    x = refill(x)
    for f in tables:
        if x < 2**16:
            # Unequal fractions differ by 2^-32 or more, so that floats order them.
            order = sorted(((2 * y + 1) / f[t], t, y) for t in range(3) for y in range(f[t]))
            _, symbol, x = order[x]
        else:
            starts = [sum(f[:t]) for t in range(3)]
            symbol = max(t for t in range(3) if starts[t] <= x % 2**16)
            x = f[symbol] * (x // 2**16) + x % 2**16 - starts[symbol]
        found.append(symbol)
        x = refill(x)
    assert found == symbols[0].tolist()
    assert (x, rest) == (0, [])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9), st.integers(0, 40), st.integers(1, 20), st.sampled_from([0.1, 1.0, 8.0]), st.booleans(), SEEDS
)
def test_round_trip(lanes, length, k, skew, padded, seed):
    tables = random_tables((length, lanes), k, seed, skew, absent=k // 2 if padded else 0)
    # Likely and unlikely symbols alike.
    symbols = np.random.default_rng(seed).integers(0, k - (k // 2 if padded else 0), (lanes, length))
    assert (decode(encode_adaptive(symbols, tables), tables) == symbols).all()


@pytest.mark.parametrize("k", [1, 2, 5, 200])
def test_small_states_are_shared_out_exactly(k):
    """Every state below 2^16 belongs to one symbol and one smaller state, in the order of frequency."""
    table = random_tables((1,), k, seed=k, skew=4.0)
    symbols = np.repeat(np.arange(k), table[0])
    x = np.concatenate([np.arange(f) for f in table[0]])
    some = np.random.default_rng(0).permutation(65536)[:4096]
    if k < 9:
        assert (np.sort(adaptive._spread(x, symbols, np.repeat(table, 65536, 0))) == np.arange(65536)).all()
    ranks = adaptive._spread(x[some], symbols[some], np.repeat(table, len(some), 0))
    found = adaptive._gather(ranks, np.repeat(table, len(some), 0))
    assert (found[0] == symbols[some]).all()
    assert (found[1] == x[some]).all()


@pytest.mark.parametrize(("k", "skew"), [(4, 0.4), (8, 2.0), (16, 2.0)])
def test_streams_of_200_symbols_cost_at_most_three_tenths_of_a_byte(k, skew):
    tables = random_tables((200, 800), k, seed=0, skew=skew)
    symbols = draw(tables, seed=1)
    own = np.take_along_axis(tables, symbols.T[..., None], 2)
    ideal = (16 - np.log2(own)).sum() / 8 / 800
    over = np.mean([len(stream) for stream in encode_adaptive(symbols, tables)]) - ideal
    assert 0 < over < 0.3
    assert over / ideal < 0.006


def test_the_likeliest_symbols_cost_nothing():
    tables = random_tables((5, 2), 4, seed=0)
    assert encode_adaptive(tables.argmax(2).T, tables) == [b"", b""]
    assert (decode([b"", b""], tables) == tables.argmax(2).T).all()


def test_lanes_do_not_mix():
    tables = random_tables((30, 7), 6, seed=0, skew=3.0)
    symbols = draw(tables, seed=1)
    together = encode_adaptive(symbols, tables)
    assert together == [encode_adaptive(symbols[i : i + 1], tables[:, i : i + 1])[0] for i in range(7)]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=12), SEEDS)
def test_garbage_is_refused_or_is_a_stream(data, seed):
    tables = random_tables((12, 1), 5, seed, skew=2.0)
    try:
        symbols = decode([data], tables)
    except FormatError:
        return
    assert encode_adaptive(symbols, tables) == [data]


def test_a_byte_too_many_is_refused_by_the_name_of_its_lane():
    tables = np.full((40, 2, 4), 16384, np.int32)
    data = encode_adaptive(np.full((2, 40), 3), tables)
    with pytest.raises(FormatError, match="lane 1 is damaged: it does not end"):
        decode([data[0], data[1] + b"\0"], tables)
    with pytest.raises(FormatError, match="lane 0 is damaged: it begins with a zero"):
        decode([b"\0" + data[0], data[1]], tables)


@pytest.mark.parametrize(
    ("symbols", "tables", "message"),
    [
        ([[0, 0]], [[[65536]]], "need tables"),
        ([[0]], [[[65535]]], "add up to 65536"),
        ([[0]], [[[65537, -1]]], "add up to 65536"),
        ([[1]], [[[65536]]], "have 1 entries"),
        ([[1]], [[[65536, 0]]], "frequency 0"),
    ],
)
def test_bad_input_is_refused(symbols, tables, message):
    with pytest.raises(InputError, match=message):
        encode_adaptive(np.array(symbols), np.array(tables, np.int32))
