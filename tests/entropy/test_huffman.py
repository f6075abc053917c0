"""Canonical Huffman codes: optimal lengths, golden bytes, round trips, refusal of damage."""

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsem.entropy import HuffmanCode, code_lengths
from jaxsem.errors import FormatError, InputError

SEEDS = st.integers(0, 2**32 - 1)
CODE = HuffmanCode.from_counts(np.array([40, 25, 12, 9, 6, 4, 3, 1, 0]))


def huffman_cost(counts):
    """Bits of the unlimited optimal code, by the textbook's merging of the two rarest."""
    heap, cost = sorted(c for c in counts if c), 0
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        cost += pair
        heapq.heappush(heap, pair)
    return cost


def test_golden_code():
    assert CODE.lengths.tolist() == [1, 2, 4, 4, 4, 5, 6, 6, 0]
    assert CODE.codes().tolist() == [0b0, 0b10, 0b1100, 0b1101, 0b1110, 0b11110, 0b111110, 0b111111, 0]
    assert CODE.to_bytes().hex() == "00091244456600"
    assert CODE.encode(np.arange(20) * 3 % 8).hex() == "6fd77f9e6fd77f9e6fd0"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=60).filter(lambda c: sum(map(bool, c)) > 1))
def test_lengths_are_optimal(counts):
    lengths = code_lengths(np.array(counts))
    assert (np.array(counts) * lengths).sum() == huffman_cost(counts)
    assert ((lengths > 0) == (np.array(counts) > 0)).all()


def test_lengths_are_limited():
    fibonacci = [1, 1]
    while len(fibonacci) < 30:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    for limit in (5, 8, 15):
        lengths = code_lengths(np.array(fibonacci), limit).astype(int)
        assert lengths.max() == limit
        assert (0.5**lengths).sum() == 1


def test_equal_counts_give_equal_lengths_where_they_fit():
    assert code_lengths(np.full(8, 7)).tolist() == [3] * 8
    assert code_lengths(np.full(5, 7)).tolist() == [3, 3, 2, 2, 2]


def test_a_lone_symbol_takes_one_bit():
    code = HuffmanCode.from_counts(np.array([0, 9, 0]))
    assert code.encode(np.array([1] * 9)) == b"\0\0"
    assert code.decode(b"\0\0", 9).tolist() == [1] * 9
    with pytest.raises(FormatError, match="no code begins at bit 3"):
        code.decode(b"\x10", 8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(any), st.integers(0, 300), SEEDS)
def test_round_trip(counts, length, seed):
    code = HuffmanCode.from_counts(np.array(counts))
    symbols = np.random.default_rng(seed).choice(np.flatnonzero(counts), length)
    assert code.decode(code.encode(symbols), length).tolist() == symbols.tolist()
    assert HuffmanCode.from_bytes(code.to_bytes()).lengths.tolist() == code.lengths.tolist()


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=20), st.integers(0, 100))
def test_garbage_is_refused_or_is_a_stream(data, count):
    try:
        symbols = CODE.decode(data, count)
    except FormatError:
        return
    assert CODE.encode(symbols) == data


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=12))
def test_garbage_lengths_are_refused_or_a_code(data):
    try:
        code = HuffmanCode.from_bytes(data)
    except FormatError:
        return
    assert code.to_bytes() == data


def test_truncation_is_refused():
    data = CODE.encode(np.arange(50) % 8)
    for end in range(len(data)):
        with pytest.raises(FormatError):
            CODE.decode(data[:end], 50)
    for end in range(7):
        with pytest.raises(FormatError):
            HuffmanCode.from_bytes(CODE.to_bytes()[:end])


def test_huge_claims_are_refused_at_once():
    with pytest.raises(FormatError, match="cannot hold"):
        CODE.decode(b"\0", 10**12)


@pytest.mark.parametrize("symbols", [[8], [9], [-1], [0.5]])
def test_symbols_without_a_code_are_refused(symbols):
    with pytest.raises(InputError):
        CODE.encode(np.array(symbols))


@pytest.mark.parametrize("lengths", [[1, 1, 1], [2, 2], [0], [16, 1], [2], [[1, 1]], [0.5, 0.5]])
def test_incomplete_codes_are_refused(lengths):
    with pytest.raises(InputError):
        HuffmanCode(np.array(lengths))


@pytest.mark.parametrize(
    ("counts", "limit"), [([0, 0], 15), ([1, 1, 1], 1), ([-1, 2], 15), ([1.5, 2], 15), ([1, 1], 20), ([1, 1], 0)]
)
def test_bad_counts_are_refused(counts, limit):
    with pytest.raises(InputError):
        code_lengths(np.array(counts), limit)
