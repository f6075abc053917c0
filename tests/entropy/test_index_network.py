"""The integer network: exact tables, the same for encoder and decoder, and nothing that overflows."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_networks import random_network, random_rows

from jaxsem.entropy.index_network import IndexNetwork, powers_of_two
from jaxsem.errors import FormatError, InputError


def tables_step_by_step(network, rows):
    state, found = network.start(len(rows)), []
    for i in range(rows.shape[1]):
        found.append(network.step_frequencies(state, i))
        state = network.advance(state, i, rows[:, i])
    return np.stack(found)


def tables_in_plain_python(network, row):
    """The docstring's definition with Python's integers, which never overflow."""
    a, bases = network.hidden_bias.tolist(), np.cumsum([0, *network.sizes.tolist()]).tolist()
    shift, logit_shift = network.shifts.tolist()
    rounded = lambda x, bits: (x + (1 << bits >> 1)) >> bits  # noqa: E731
    for i, index in enumerate(row):
        h = [max(-127, min(127, rounded(x, shift))) for x in a]
        places = range(bases[i], bases[i + 1])
        logits = [
            int(network.output_bias[p]) + sum(v * x for v, x in zip(network.output_weights[p].tolist(), h))
            for p in places
        ]
        depths = [min(rounded(max(logits) - x, logit_shift), len(network.powers) - 1) for x in logits]
        powers = [int(network.powers[depth]) for depth in depths]
        scale = ((65536 - len(powers)) << 30) // sum(powers)
        table = [1 + (power * scale >> 30) for power in powers]
        table[powers.index(max(powers))] += 65536 - sum(table)
        yield table
        a = [x + int(w) for x, w in zip(a, network.hidden_weights[bases[i] + index])]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_encoder_and_decoder_find_the_same_tables(sizes, hidden, seed):
    network, rows = random_network(sizes, hidden, seed), random_rows(sizes, 6, seed)
    tables = network.frequencies(rows)
    assert (tables == tables_step_by_step(network, rows)).all()
    assert (tables.sum(2) == 65536).all()
    for i, size in enumerate(sizes):
        assert tables[i, :, :size].min() >= 1
        assert (tables[i, :, size:] == 0).all()


def test_tables_are_the_definition():
    network = random_network()
    rows = random_rows(network.sizes, 20)
    tables = network.frequencies(rows)
    for lane, row in enumerate(rows.tolist()):
        for i, table in enumerate(tables_in_plain_python(network, row)):
            assert tables[i, lane, : len(table)].tolist() == table


@pytest.mark.parametrize("sign", [1, -1])
def test_tables_are_the_definition_at_the_limits(sign):
    """The largest weights everywhere, so that every sum is as large as the checks let it be."""
    rows, hidden = 3 * 30, 1024
    network = IndexNetwork(
        sizes=np.full(30, 3, np.uint16),
        hidden_weights=np.full((rows, hidden), sign * 32767, np.int16),
        hidden_bias=np.full(hidden, sign * ((1 << 30) - 1), np.int32),
        output_weights=np.full((rows, hidden), sign * 127, np.int8) * np.array([[1], [-1], [1]] * 30, np.int8),
        output_bias=np.tile(np.array([1 << 24, -(1 << 24), (1 << 24) - 3], np.int32), 30),
        powers=np.full(1 << 14, 65535, np.uint16),
        shifts=np.array([0, 0], np.uint8),
    )
    tables = network.frequencies(np.zeros((1, 30), int))
    for i, table in enumerate(tables_in_plain_python(network, [0] * 30)):
        assert tables[i, 0].tolist() == table


def test_tables_do_not_depend_on_the_batch():
    network = random_network(hidden=64)
    rows = random_rows(network.sizes, 50)
    tables = network.frequencies(rows)
    assert all((network.frequencies(rows[i : i + 1])[:, 0] == tables[:, i]).all() for i in range(50))


def test_tables_depend_on_what_came_before_and_on_nothing_later():
    network = random_network()
    rows = random_rows(network.sizes, 1)
    other = rows.copy()
    other[0, 3] = 1 - other[0, 3]
    tables, changed = network.frequencies(rows), network.frequencies(other)
    assert (tables[:4] == changed[:4]).all()
    assert (tables[4:] != changed[4:]).any(2).all()


def test_powers_fall_from_one_to_the_smallest():
    powers = powers_of_two()
    assert (powers[0], powers[64], powers[-1]) == (65535, 32768, 1)
    assert (np.diff(powers.astype(int)) <= 0).all()


def test_arrays_there_and_back():
    network = random_network()
    rows = random_rows(network.sizes, 5)
    again = IndexNetwork.from_arrays(network.to_arrays())
    assert (again.frequencies(rows) == network.frequencies(rows)).all()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_weights", np.int16(-32768), "hidden_weights reach -32768"),
        ("output_weights", np.int8(-128), "output_weights reach -128"),
        ("hidden_bias", np.int32(1 << 30), "hidden_bias reaches 1073741824, so that sums could overflow"),
        ("hidden_bias", np.int32(-(1 << 31)), "hidden_bias reaches 2147483648"),
        ("output_bias", np.int32((1 << 24) + 1), "output_bias reaches 16777217"),
        ("shifts", np.uint8(25), "shifts"),
        ("sizes", np.uint16(0), "codebook sizes of 0"),
        ("sizes", np.uint16(4097), "codebook sizes of 2 to 4097 are outside 1 to 4096, what its tables can hold"),
        ("sizes", np.uint16(9), "hidden_weights has shape"),
        ("powers", np.uint16(0), "falling numbers"),
    ],
)
def test_numbers_that_could_overflow_are_refused(name, value, message):
    arrays = random_network().to_arrays()
    arrays[name].flat[0] = value
    with pytest.raises(InputError, match=message):
        IndexNetwork(**arrays)
    with pytest.raises(FormatError, match=message):
        IndexNetwork.from_arrays(arrays)


@pytest.mark.parametrize("name", list(random_network().to_arrays()))
def test_arrays_of_another_type_or_shape_are_refused(name):
    arrays = random_network().to_arrays()
    with pytest.raises(FormatError, match="has the arrays"):
        IndexNetwork.from_arrays({key: value for key, value in arrays.items() if key != name})
    with pytest.raises(FormatError, match=name):
        IndexNetwork.from_arrays({**arrays, name: arrays[name].astype(np.float32)})
    with pytest.raises(FormatError):
        IndexNetwork.from_arrays({**arrays, name: arrays[name][None]})
    with pytest.raises(FormatError):
        IndexNetwork.from_arrays({**arrays, name: arrays[name][:0]})


def test_a_file_that_would_fill_the_memory_is_refused():
    sizes = np.ones(4096, np.uint16)
    sizes[0] = 4096
    arrays = replace(random_network()).to_arrays()
    with pytest.raises(FormatError, match="exceed"):
        IndexNetwork.from_arrays({**arrays, "sizes": sizes})
