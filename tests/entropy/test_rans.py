"""The long-stream format: golden bytes, round trips on all back-ends, size, and refusal of damage."""

import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsem.entropy import (
    LONG,
    Decoder,
    Encoder,
    Tables,
    compiled,
    encode_lanes,
    gaussian_tables,
    rans,
    scale_table,
    tables_from_counts,
)
from jaxsem.errors import FormatError, InputError

BACKENDS = ("python", "compiled")
GAUSSIAN = gaussian_tables()
MIXED = Tables.concat(
    tables_from_counts([[7, 0, 3], [1], [1] * 500], precision=16, offsets=[-1, 5, -250]),
    tables_from_counts([[9, 1], np.arange(40)], precision=16, offsets=-3, escape=True),
)
GOLDEN = (
    "2b10fffffffefffefffe19fb000419ffffffff8fc5ff50fb41000000fb1ffefffef9810100010000fffefffdfffbc26cf508010000fff4"
    "ff72004245040002fffcffc3e07bd9d9954d642562c128fbd581904ed642aa3a3b8589091a1ffffff1f11affffd079d9f139a70d6f2dbc"
    "648555181a6653142b5f6d888e3b23c3450baf8131cb85a51bd4460f70c8f785c607fc682f14b0a45bb96f2f290264272c1be625674ac5"
    "8128fb159c90e194be83b2d7f7bffff0f000"
)


def encode(slices, tables, backend):
    encoder = Encoder(tables, backend)
    for symbols, indices in slices:
        encoder.push(symbols, indices)
    return encoder.finish()


def decode(data, slices, tables, backend):
    decoder = Decoder(data, tables, backend)
    symbols = [decoder.pull(indices) for _, indices in slices]
    decoder.finish()
    return symbols


def gaussian_slice(count, seed=0, mean=12):
    rng = np.random.default_rng(seed)
    indices = np.clip(rng.normal(mean, 10, count), 0, 63).astype(np.int32)
    return np.round(rng.normal(size=count) * scale_table()[indices]).astype(np.int32), indices


def ideal_bits(symbols, indices, tables):
    """What the tables themselves ask for, in bits; no escapes."""
    return sum(16 - np.log2(tables.row(t)[v - tables.offsets[t]]) for v, t in zip(symbols, indices))


def golden_slices():
    indices = np.arange(64).repeat(3)
    symbols = (np.arange(192) * 7919 % 11 - 5) * (1 + indices // 8) // 3
    symbols[7], symbols[100] = 2**31 - 1, -(2**31)
    return [(symbols[:100], indices[:100]), (symbols[100:], indices[100:])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_bytes(backend):
    assert encode(golden_slices(), GAUSSIAN, backend).hex() == GOLDEN


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_bytes_decode(backend):
    for found, (symbols, _) in zip(decode(bytes.fromhex(GOLDEN), golden_slices(), GAUSSIAN, backend), golden_slices()):
        assert (found == symbols).all()


def test_specification_is_enough_to_decode():
    """A decoder written from the module docstring alone, without escapes."""
    symbols, indices = gaussian_slice(300)
    data = encode([(symbols, indices)], GAUSSIAN, "auto")
    x, rest, found = int.from_bytes(data[:4], "big"), list(data[4:]), []
    for table in indices:
        slot, start, k = x % 65536, 0, 0
        row = GAUSSIAN.row(table).tolist()
        while start + row[k] <= slot:
            start, k = start + row[k], k + 1
        x = row[k] * (x // 65536) + slot - start
        while x < 2**23:
            x = 256 * x + rest.pop(0)
        found.append(GAUSSIAN.offsets[table] + k)
    assert found == symbols.tolist()
    assert (x, rest) == (2**23, [])


int32 = st.integers(-(2**31), 2**31 - 1)
symbol = st.tuples(st.one_of(st.just(3), st.just(4)), st.one_of(st.integers(-5, 45), int32)) | st.one_of(
    st.tuples(st.just(0), st.integers(-1, 1)), st.just((1, 5)), st.tuples(st.just(2), st.integers(-250, 249))
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(symbol, max_size=40), max_size=4))
def test_round_trip_with_escapes_and_slices(drawn):
    slices = [(np.array([v for _, v in part], np.int64), np.array([t for t, _ in part], np.int64)) for part in drawn]
    data = encode(slices, MIXED, "python")
    assert encode(slices, MIXED, "compiled") == data
    for backend in BACKENDS:
        for found, (symbols, _) in zip(decode(data, slices, MIXED, backend), slices):
            assert found.tolist() == symbols.tolist()


@settings(max_examples=20, deadline=None)
@given(st.integers(4, 16), st.integers(0, 2**32 - 1))
def test_every_precision(precision, seed):
    rng = np.random.default_rng(seed)
    tables = tables_from_counts(
        [rng.integers(0, 50, rng.integers(1, 15)) for _ in range(3)], precision, -2, escape=True
    )
    part = (rng.integers(-5, 20, 200), rng.integers(0, 3, 200))
    data = encode([part], tables, "python")
    assert encode([part], tables, "compiled") == data
    assert all((decode(data, [part], tables, backend)[0] == part[0]).all() for backend in BACKENDS)


@pytest.mark.parametrize("count", [2049, 20_000, (1 << 17) + 5])
def test_sizes_around_the_buckets(count):
    symbols, indices = gaussian_slice(count)
    data = encode([(symbols, indices)], GAUSSIAN, "compiled")
    assert (decode(data, [(symbols, indices)], GAUSSIAN, "compiled")[0] == symbols).all()
    assert encode_lanes(symbols[None], indices, GAUSSIAN, LONG)[0] == data


def test_widest_tables():
    rng = np.random.default_rng(3)
    indices = np.full(5000, 63)
    symbols = rng.integers(-1565, 1566, 5000)
    data = encode([(symbols, indices)], GAUSSIAN, "compiled")
    assert data == encode([(symbols, indices)], GAUSSIAN, "python")
    assert (decode(data, [(symbols, indices)], GAUSSIAN, "compiled")[0] == symbols).all()


def test_back_ends_can_alternate():
    slices = [gaussian_slice(n, n) for n in (5, 700, 3, 2000)]
    decoder = Decoder(encode(slices, GAUSSIAN, "auto"), GAUSSIAN, "auto")
    assert all((decoder.pull(indices) == symbols).all() for symbols, indices in slices)
    decoder.finish()


def test_size_is_four_bytes_over_the_ideal():
    symbols, indices = gaussian_slice(20_000)
    ideal = ideal_bits(symbols, indices, GAUSSIAN) / 8
    size = len(encode([(symbols, indices)], GAUSSIAN, "auto"))
    assert ideal <= size <= ideal * 1.0001 + 4


def test_nothing_is_four_bytes():
    data = encode([], GAUSSIAN, "auto")
    assert data == encode([(np.zeros(0, int), np.zeros(0, int))], GAUSSIAN, "compiled") == b"\x00\x80\x00\x00"
    decoder = Decoder(data, GAUSSIAN)
    assert decoder.pull(np.zeros((0, 3), int)).shape == (0, 3)
    decoder.finish()


def test_shape_is_kept():
    symbols, indices = (a.reshape(3, 5, 8) for a in gaussian_slice(120))
    assert (
        decode(encode([(symbols, indices)], GAUSSIAN, "auto"), [(symbols, indices)], GAUSSIAN, "auto")[0] == symbols
    ).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_truncation_is_refused(backend):
    slices = [gaussian_slice(150)]
    data = encode(slices, GAUSSIAN, backend)
    for end in range(len(data)):
        with pytest.raises(FormatError):
            decode(data[:end], slices, GAUSSIAN, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_added_bytes_are_refused(backend):
    slices = [gaussian_slice(150)]
    with pytest.raises(FormatError, match="1 bytes are left"):
        decode(encode(slices, GAUSSIAN, backend) + b"\0", slices, GAUSSIAN, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flipped_bits_are_refused_or_change_symbols(backend):
    """A flip that only swaps symbols of equal frequency leaves a valid stream: the packet's checksum is for those."""
    slices = golden_slices()
    data = bytearray.fromhex(GOLDEN)
    refused = 0
    for bit in range(0, 8 * len(data), 3):
        data[bit // 8] ^= 1 << bit % 8
        try:
            found = decode(bytes(data), slices, GAUSSIAN, backend)
            assert any((a != b).any() for a, (b, _) in zip(found, slices))
        except FormatError:
            refused += 1
        data[bit // 8] ^= 1 << bit % 8
    assert refused > 0.9 * len(range(0, 8 * len(data), 3))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(BACKENDS), st.integers(0, 300))
def test_garbage_ends_in_an_error(data, backend, count):
    """With 300 symbols of tables with escapes, whatever is read ends in a FormatError or a clean finish, never else."""
    indices = np.arange(count) % len(MIXED)
    try:
        decoder = Decoder(data, MIXED, backend)
        found = decoder.pull(indices)
        decoder.finish()
    except FormatError:
        return
    assert encode([(found, indices)], MIXED, "python") == data


def test_garbage_meets_the_same_fate_on_both_back_ends():
    rng = np.random.default_rng(5)
    for _ in range(100):
        data = b"\x01" + rng.bytes(150)
        results = []
        for backend in BACKENDS:
            try:
                results.append(Decoder(data, MIXED, backend).pull(np.arange(60) % 5).tolist())
            except FormatError as error:
                results.append(str(error))
        assert results[0] == results[1]


def test_wrong_tables_are_refused():
    slices = [gaussian_slice(500)]
    data = encode(slices, GAUSSIAN, "auto")
    with pytest.raises(FormatError):
        decode(data, [(None, slices[0][1][::-1])], GAUSSIAN, "auto")


def test_value_outside_a_closed_table_is_refused():
    with pytest.raises(InputError, match=r"value 2 is outside table 0 \(-1 to 1\)"):
        Encoder(MIXED).push(np.array([0, 2]), np.array([0, 0]))


@pytest.mark.parametrize(
    ("symbols", "indices", "message"),
    [
        ([1.0], [0], "integers"),
        ([2**31], [0], "32 bits"),
        ([1], [0.0], "indices must be integers"),
        ([1], [64], "from 64 to 64; there are 64"),
        ([1], [-1], "from -1"),
        ([1, 2], [0], "one shape"),
    ],
)
def test_wrong_input_is_refused(symbols, indices, message):
    with pytest.raises(InputError, match=message):
        Encoder(GAUSSIAN).push(np.array(symbols), np.array(indices))


def test_unknown_backend_is_refused():
    with pytest.raises(InputError, match="'gpu'"):
        Encoder(GAUSSIAN, "gpu")


def test_without_a_cpu_platform_auto_falls_back(monkeypatch):
    slices = [gaussian_slice(2000)]
    expected = encode(slices, GAUSSIAN, "compiled")
    monkeypatch.setattr(compiled, "host_device", lambda: None)
    monkeypatch.setattr(compiled, "encode", None)
    monkeypatch.setattr(compiled, "decode", None)
    assert encode(slices, GAUSSIAN, "auto") == expected
    assert (decode(expected, slices, GAUSSIAN, "auto")[0] == slices[0][0]).all()
    with pytest.raises(InputError, match="JAX_PLATFORMS"):
        Encoder(GAUSSIAN, "compiled")


def test_compiled_works_under_any_jax_context():
    slices = [gaussian_slice(600)]
    expected = encode(slices, GAUSSIAN, "python")
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    for context in (jax.transfer_guard("disallow"), jax.enable_x64(True), jax.set_mesh(mesh), jax.debug_nans(True)):
        compiled._encoder.cache_clear()
        compiled._decoder.cache_clear()
        compiled._device_tables.cache_clear()
        with context:
            assert encode(slices, GAUSSIAN, "compiled") == expected
            assert (decode(expected, slices, GAUSSIAN, "compiled")[0] == slices[0][0]).all()


def test_threads_share_the_programs():
    parts = [gaussian_slice(3000, seed) for seed in range(8)]
    results = [None] * 8

    def work(i):
        data = encode([parts[i]], GAUSSIAN, "compiled")
        results[i] = (decode(data, [parts[i]], GAUSSIAN, "compiled")[0] == parts[i][0]).all()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results)


def test_programs_are_few():
    compiled._encoder.cache_clear()
    for count in (300, 1000, 2000, 3000, 9000, 16_000):
        encode([gaussian_slice(count)], GAUSSIAN, "compiled")
    assert compiled._encoder.cache_info().misses == 2


def test_bound_is_part_of_the_format():
    assert (rans.BOUND_BITS, rans.STATE_BYTES) == (23, 4)


@pytest.mark.parametrize("backend", ["python", "compiled"])
def test_a_seal_costs_no_byte_and_must_match(backend):
    tables = gaussian_tables()
    symbols, indices = np.arange(-20, 20), np.full(40, 40)
    streams = []
    for seal in (0, 0xABCD):
        encoder = Encoder(tables, backend)
        encoder.push(symbols, indices)
        streams.append(encoder.finish(seal))
    assert len(streams[0]) == len(streams[1])
    decoder = Decoder(streams[1], tables, backend)
    assert (decoder.pull(indices) == symbols).all()
    with pytest.raises(FormatError, match="damaged"):
        decoder.finish(0xABCC)
    decoder.finish(0xABCD)
    with pytest.raises(InputError, match="16 bits"):
        Encoder(tables).finish(1 << 16)
