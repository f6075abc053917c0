"""Coders of index rows: round trips, golden bytes, real bytes against the ideal, refusal of damage."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_networks import random_network, random_rows

from jaxsem.entropy import HuffmanCode, decode_short, encode_short, tables_from_counts
from jaxsem.entropy.adaptive import encode_adaptive
from jaxsem.entropy.index_coder import IndexCoder, count_indices
from jaxsem.entropy.indices import CODERS, FixedLength, HuffmanIndices, PriorRans, StaticRans
from jaxsem.errors import FormatError, InputError

SIZES = (4, 3, 7, 2, 5, 4, 4, 6, 256, 1)
TRAIN = random_rows(SIZES, 300, seed=1)
ROWS = random_rows(SIZES, 40, seed=2)


def every_coder(sizes=SIZES, train=TRAIN) -> dict[str, IndexCoder]:
    return {
        "fixed": FixedLength(np.array(sizes)),
        "huffman": HuffmanIndices.from_indices(train, sizes),
        "huffman, per position": HuffmanIndices.from_indices(train, sizes, per_position=True),
        "rans": StaticRans.from_indices(train, sizes, per_position=False),
        "rans, per position": StaticRans.from_indices(train, sizes),
        "prior": PriorRans(random_network(sizes)),
    }


NAMES = list(every_coder())


@pytest.fixture(scope="module")
def coders():
    return every_coder()


# -- what all of them do ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.sampled_from([1, 2, 9]),
    st.sampled_from(["even", "small", "constant"]),
    st.integers(0, 2**32 - 1),
)
def test_round_trip(sizes, count, kind, seed):
    rows = random_rows(sizes, count, seed)
    if kind == "even":
        rows = np.random.default_rng(seed).integers(0, sizes, (count, len(sizes)))
    elif kind == "constant":
        rows = np.tile(rows[:1], (count, 1))
    for coder in every_coder(sizes, random_rows(sizes, 20, seed + 1)).values():
        streams = coder.encode(rows)
        found = coder.decode(streams)
        assert found.dtype == np.int32
        assert (found == rows).all()
        assert (coder.sizes == sizes).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_are_no_streams(coders, name):
    assert coders[name].encode(ROWS[:0]) == []
    assert coders[name].decode([]).shape == (0, len(SIZES))
    assert coders[name].ideal_bits(ROWS[:0]).shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_has_the_same_bytes_in_any_batch(coders, name, monkeypatch):
    coder = coders[name]
    streams, bits = coder.encode(ROWS), coder.ideal_bits(ROWS)
    assert [coder.encode(ROWS[i : i + 1])[0] for i in range(len(ROWS))] == streams
    assert coder.encode(ROWS[:7]) + coder.encode(ROWS[7:]) == streams
    monkeypatch.setattr("jaxsem.entropy.indices._CHUNK", 3 * len(SIZES) * 256)
    assert coder.encode(ROWS) == streams
    assert (coder.ideal_bits(ROWS) == bits).all()
    assert (coder.decode([streams[3], streams[1]]) == ROWS[[3, 1]]).all()


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("fixed", "011e91"),
        ("huffman", "6370"),
        ("huffman, per position", "6370"),
        ("rans", "3947"),
        ("rans, per position", "39bb"),
        ("prior", "0152b5d6"),
    ],
)
def test_golden_bytes(name, golden):
    sizes = (4, 3, 7, 2, 5, 4, 4, 6)
    train = np.stack([np.minimum(np.arange(60) ** 2 % 13, size - 1) for size in sizes], 1)
    assert every_coder(sizes, train)[name].encode(np.array([[3, 1, 6, 0, 4, 0, 2, 5]]))[0].hex() == golden


@pytest.mark.parametrize("name", NAMES)
def test_arrays_there_and_back(coders, name):
    coder = coders[name]
    again = type(coder).from_arrays(coder.to_arrays())
    assert again.encode(ROWS) == coder.encode(ROWS)
    assert again.digest() == coder.digest()
    assert len(coder.digest()) == 32
    assert next(kind for kind in CODERS if kind.name == coder.name) is type(coder)


def test_coders_that_differ_have_other_digests(coders):
    digests = {coder.digest() for coder in every_coder(train=TRAIN[:200]).values()}
    digests |= {coder.digest() for coder in coders.values()}
    assert len(digests) == 2 * len(NAMES) - 2  # the fixed length and the prior here know nothing of the rows


@pytest.mark.parametrize("name", NAMES)
def test_damaged_arrays_are_refused(coders, name):
    """Another type, shape, set of arrays, or number: refused, or a coder whose indices are within its sizes."""
    coder, rng = coders[name], np.random.default_rng(0)
    arrays = coder.to_arrays()
    for key, value in arrays.items():
        for bad in (value.astype(np.float64), value.astype(np.int64), value[..., None]):
            with pytest.raises(FormatError):
                type(coder).from_arrays({**arrays, key: bad})
        with pytest.raises(FormatError, match="arrays"):
            type(coder).from_arrays({k: v for k, v in arrays.items() if k != key})
        for attempt in range(10):
            bad, limits = value.copy(), np.iinfo(value.dtype)
            bad.flat[rng.integers(bad.size)] = rng.integers(limits.min, limits.max, endpoint=True)
            bad = bad if attempt else value[:-1]
            try:
                found = type(coder).from_arrays({**arrays, key: bad})
                rows = found.decode([rng.bytes(9)])
            except FormatError:
                continue
            assert (rows < found.sizes).all()
    with pytest.raises(FormatError, match="arrays"):
        type(coder).from_arrays({**arrays, "surplus": np.zeros(1)})


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_garbage_is_refused_or_is_a_stream(coders, name, data):
    stream = data.draw(st.binary(max_size=9))
    try:
        found = coders[name].decode([stream])
    except FormatError:
        return
    assert ((found >= 0) & (found < SIZES)).all()
    assert coders[name].encode(found) == [stream]


@pytest.mark.parametrize("name", NAMES)
def test_cut_and_extended_streams_are_refused_by_number_or_are_streams(coders, name):
    coder = coders[name]
    good, messages = coder.encode(ROWS), []
    for row in range(len(ROWS)):
        for bad in (good[row] + b"\0", good[row] + b"\x5a", good[row][:-1], good[row][1:]):
            try:
                found = coder.decode([good[0], bad])
            except FormatError as error:
                messages.append(str(error))
                continue
            assert coder.encode(found)[1] == bad
    assert len(messages) >= len(ROWS)
    assert all(re.search("(row|lane) 1 (is|are) damaged", message) for message in messages)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.full((1, len(SIZES)), 4), "4 at"),
        (np.full((1, len(SIZES)), -1), "-1 at"),
        (ROWS[:, :-1], "shape"),
        (ROWS[0], "shape"),
        (ROWS.astype(float), "float64"),
        (ROWS + (1 << 40), "1099511627"),
    ],
)
def test_rows_that_do_not_fit_are_refused(coders, name, bad, message):
    with pytest.raises(InputError, match=message):
        coders[name].encode(bad)
    with pytest.raises(InputError, match=message):
        coders[name].ideal_bits(bad)


@pytest.mark.parametrize("sizes", [[], [0, 2], [4097], [[2]], [2.5], [2] * 4097])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(InputError, match="izes"):
        FixedLength(np.array(sizes))
    with pytest.raises(InputError, match="izes"):
        HuffmanIndices.from_indices(np.zeros((1, len(sizes)), int), sizes)


# -- fixed length -------------------------------------------------------------------------------------------------------


def test_fixed_length_is_one_number_in_mixed_radix():
    assert FixedLength(np.array([4, 3, 7])).encode(np.array([[3, 2, 6], [0, 0, 1], [1, 2, 3]])) == [
        b"\x53",
        b"\x01",
        b"\x26",
    ]


@pytest.mark.parametrize("sizes", [(4,) * 200, (3,) * 320, (256,) * 50, (6, 5, 100) * 33, (1, 1), (4096,) * 70])
def test_fixed_length_takes_no_more_bits_than_there_are(sizes):
    coder = FixedLength(np.array(sizes))
    assert coder.bits == math.ceil(sum(map(math.log2, sizes)) - 1e-9)
    largest = np.array(sizes)[None] - 1
    assert [len(stream) for stream in coder.encode(largest)] == [(coder.bits + 7) // 8]
    assert (coder.decode(coder.encode(largest)) == largest).all()
    assert coder.ideal_bits(largest)[0] == pytest.approx(sum(map(math.log2, sizes)))


def test_fixed_length_refuses_a_number_too_large_and_padding_that_is_set():
    coder = FixedLength(np.array([3, 3]))
    assert coder.decode([b"\x08"]).tolist() == [[2, 2]]
    for bad in (b"\x09", b"\x18", b"", b"\0\0"):
        with pytest.raises(FormatError, match="row 1 are damaged"):
            coder.decode([b"\x08", bad])


# -- Huffman ------------------------------------------------------------------------------------------------------------


def test_one_huffman_code_is_that_of_the_huffman_module():
    sizes = (8,) * 30
    coder = HuffmanIndices.from_indices(random_rows(sizes, 100), sizes)
    rows = random_rows(sizes, 20, seed=5)
    assert coder.encode(rows) == [HuffmanCode(coder.codes[0].lengths).encode(row) for row in rows]


def test_four_codewords_in_even_use_have_codes_of_two_bits_as_the_released_table():
    sizes = (4,) * 200
    coder = HuffmanIndices.from_indices(np.arange(400).reshape(2, 200) % 4, sizes)
    assert coder.codes[0].lengths.tolist() == [2, 2, 2, 2]
    assert len(coder.encode(np.zeros((1, 200), int))[0]) == 50


def test_equal_sizes_share_a_code_and_others_do_not():
    train = np.array([[0, 0, 3, 1], [1, 0, 2, 1]])
    counts, table = count_indices(train, (2, 5, 5, 2), per_position=False)
    assert [row.tolist() for row in counts] == [[1, 3], [2, 0, 1, 1, 0]]
    assert table.tolist() == [0, 1, 1, 0]
    counts, table = count_indices(train, (2, 5, 5, 2), per_position=True)
    assert [len(row) for row in counts] == [2, 5, 5, 2]
    assert table.tolist() == [0, 1, 2, 3]


def test_huffman_refuses_set_padding():
    coder = HuffmanIndices.from_indices(np.zeros((1, 3), int), (4, 4, 4))
    (stream,) = coder.encode(np.zeros((1, 3), int))
    with pytest.raises(FormatError, match="row 0 is damaged"):
        coder.decode([bytes([stream[0] | 1])])


def test_an_index_without_a_code_is_refused():
    coder = HuffmanIndices((HuffmanCode(np.array([1, 1, 0])),), np.zeros(2, np.uint16))
    with pytest.raises(InputError, match=r"index 2 at \(0, 1\) has no Huffman code"):
        coder.encode(np.array([[0, 2]]))


# -- rANS ---------------------------------------------------------------------------------------------------------------


def test_static_rans_is_the_short_format():
    sizes = (8,) * 30
    train, rows = random_rows(sizes, 100), random_rows(sizes, 20, seed=5)
    coder = StaticRans.from_indices(train, sizes, per_position=False)
    tables = tables_from_counts([np.bincount(train.ravel(), minlength=8) + 0.5])
    assert coder.encode(rows) == [encode_short(row, np.zeros(30, int), tables) for row in rows]
    assert (decode_short(coder.encode(rows)[3], np.zeros(30, int), tables) == rows[3]).all()


@pytest.mark.parametrize(("size", "bits"), [(2, 8), (16, 8), (17, 9), (64, 10), (256, 12), (4096, 12)])
def test_larger_codebooks_have_finer_tables(size, bits):
    coder = StaticRans.from_indices(np.zeros((1, 2), int), (size, 2))
    assert coder.tables.precision == bits


def test_a_codebook_that_the_table_cannot_hold_is_refused():
    with pytest.raises(InputError, match="size of 300 is one that a table of 8 bits cannot hold"):
        StaticRans.from_indices(np.zeros((1, 2), int), (300, 2), precision=8)


def test_tables_of_another_kind_are_refused():
    with pytest.raises(InputError, match="no escape"):
        StaticRans(tables_from_counts([[1, 2]], escape=True), np.zeros(3, np.uint16))
    with pytest.raises(InputError, match="begin at 0"):
        StaticRans(tables_from_counts([[1, 2]], offsets=1), np.zeros(3, np.uint16))
    with pytest.raises(InputError, match="name tables 0 to 1, but there are 1"):
        StaticRans(tables_from_counts([[1, 2]]), np.array([0, 1]))


@pytest.mark.parametrize("size", [4, 8, 64])
def test_real_bytes_are_close_to_the_ideal_and_ordered(size):
    """200 indices, small ones more often: Huffman above one table, one table above the ideal by half a byte at most."""
    sizes = (size,) * 200
    train, rows = random_rows(sizes, 500), random_rows(sizes, 200, seed=5)
    means = {}
    for name, coder in every_coder(sizes, train).items():
        if name != "prior":  # random here
            means[name] = 8 * np.mean([len(stream) for stream in coder.encode(rows)])
            assert 0 <= means[name] - coder.ideal_bits(rows).mean() < 4.5
    assert means["fixed"] >= means["huffman"] > means["rans"]


# -- the prior ----------------------------------------------------------------------------------------------------------


def test_the_prior_codes_with_the_tables_of_its_network():
    network = random_network()
    rows = random_rows(network.sizes, 30)
    coder, tables = PriorRans(network), network.frequencies(rows)
    assert coder.encode(rows) == encode_adaptive(rows, tables)
    own = np.take_along_axis(tables, rows.T[..., None], 2)[..., 0]
    assert coder.ideal_bits(rows) == pytest.approx(-np.log2(own / 65536).sum(0))
