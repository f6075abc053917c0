"""Integer tables: the published check vectors, totals, storage, and refusal of damaged files."""

import importlib.util
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsem.entropy import (
    Tables,
    gaussian_tables,
    quantise_counts,
    quantise_pmf,
    scale_index,
    scale_table,
    scale_thresholds,
    tables_from_counts,
)
from jaxsem.errors import FormatError, InputError

# Cumulative rows of CompressAI 1.2.8 for the default 64 scales, 16 bits, escape symbol last.
CHECK_ROWS = {
    0: [0, 1, 65534, 65535, 65536],
    5: [0, 1, 458, 65075, 65534, 65535, 65536],
    10: [0, 1, 2, 6036, 59499, 65533, 65534, 65535, 65536],
    18: [0, 1, 2, 3, 13, 426, 4473, 20305, 45223, 61055, 65102, 65515, 65532, 65533, 65534, 65535, 65536],
}


@pytest.mark.parametrize("index", CHECK_ROWS)
def test_gaussian_rows_equal_the_published_ones(index):
    tables = gaussian_tables()
    assert [0, *np.cumsum(tables.row(index)).tolist()] == CHECK_ROWS[index]
    assert tables.offsets[index] == -(len(CHECK_ROWS[index]) - 3) // 2


def test_gaussian_tables_are_pinned():
    tables = gaussian_tables()
    assert (len(tables), tables.sizes.max(), tables.offsets.min()) == (64, 3132, -1565)
    # erfc may differ in its last bit between C libraries; what is shipped are the integers, and they must not drift.
    assert tables.digest().hex() == "3bf5c4e4f75ed7f6aaa8ac4c8cc224069c9ff3d766429b92c7370c5eeef74095"


def test_scale_table_is_log_uniform():
    scales = scale_table()
    assert scales.dtype == np.float32
    assert scales.shape == (64,)
    np.testing.assert_allclose(scales[[0, 5, 10, 18, 63]], [0.11, 0.20352, 0.37654, 1.00774, 256], rtol=1e-5)


def test_nearest_index_is_the_nearest_in_the_log_domain():
    sigma = np.exp(np.random.default_rng(0).uniform(np.log(0.05), np.log(400), 1000)).astype(np.float32)
    distance = np.abs(np.log(sigma[:, None].astype(float)) - np.log(scale_table().astype(float)))
    assert (scale_index(sigma) == distance.argmin(1)).all()


def test_above_index_is_the_smallest_table_not_below():
    sigma = np.concatenate([scale_table(), scale_table() * 1.01, [1e-9, 1e9]]).astype(np.float32)
    expected = [next((i for i, s in enumerate(scale_table()) if value <= s), 63) for value in sigma]
    assert scale_index(sigma, "above").tolist() == expected


def test_thresholds_give_the_index_by_counting():
    sigma = np.random.default_rng(1).lognormal(1, 2, (3, 50)).astype(np.float32)
    for rule in ("nearest", "above"):
        counted = (sigma[..., None] > scale_thresholds(rule=rule)).sum(-1)
        assert (scale_index(sigma, rule) == counted).all()


def test_unknown_scale_rule_is_refused():
    with pytest.raises(InputError, match="'below'"):
        scale_index(np.ones(1), "below")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=200).filter(lambda p: sum(p) > 0.1), st.sampled_from([8, 12, 16]))
def test_quantised_pmf_is_a_valid_row(pmf, precision):
    row = quantise_pmf(np.array(pmf) / sum(pmf), precision)
    assert row.sum() == 1 << precision
    assert row.min() >= 1


def test_quantised_pmf_equals_compressai():
    path = Path(sysconfig.get_path("platlib"), "compressai", "_CXX" + sysconfig.get_config_var("EXT_SUFFIX"))
    if not path.exists():
        pytest.skip("CompressAI is not installed")
    spec = importlib.util.spec_from_file_location("compressai._CXX", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rng = np.random.default_rng(2)
    for size in (2, 5, 40, 700):
        pmf = rng.dirichlet(np.full(size, 0.2)).astype(np.float32)
        expected = module.pmf_to_quantized_cdf(pmf.tolist(), 16)
        assert [0, *np.cumsum(quantise_pmf(pmf)).tolist()] == expected


@pytest.mark.parametrize("pmf", [[np.nan, 1], [-0.1, 1.1], [0, 0], [], [[0.5, 0.5]]])
def test_bad_probabilities_are_refused(pmf):
    with pytest.raises(InputError):
        quantise_pmf(np.array(pmf))


@pytest.mark.parametrize("counts", [[50, 3, 0, 7], [9, 1, 1, 1], [0, 0, 1, 0], [5, 6, 7, 8], [100, 90, 1, 0]])
def test_quantised_counts_are_optimal(counts):
    row = quantise_counts(np.array(counts), 4)
    choices = [(a, b, c, 16 - a - b - c) for a in range(1, 14) for b in range(1, 14) for c in range(1, 15 - a - b + 1)]
    best = min(-(counts * np.log2(choice)).sum() for choice in choices if choice[3] >= 1)
    assert row.sum() == 16
    assert -(counts * np.log2(row)).sum() == pytest.approx(best)


def test_counts_of_nothing_split_evenly():
    assert quantise_counts(np.zeros(4), 8).tolist() == [64] * 4


def test_tables_from_counts_may_have_an_escape():
    tables = tables_from_counts([[3, 5], [1, 1, 1]], escape=True, offsets=[-1, 0])
    assert tables.sizes.tolist() == [3, 4]
    assert tables.escapes.all()
    assert tables.offsets.tolist() == [-1, 0]


def test_arrays_round_trip_and_are_small():
    tables = Tables.concat(gaussian_tables(), tables_from_counts([[1]], precision=16, offsets=-4))
    arrays = tables.arrays()
    again = Tables.from_arrays(arrays)
    assert again.digest() == tables.digest()
    assert (again.frequencies == tables.frequencies).all()
    assert sum(array.nbytes for array in arrays.values()) < 60_000


def test_concat_keeps_order_and_precision():
    a, b = tables_from_counts([[1, 1], [1, 3]]), tables_from_counts([[9, 1, 1]])
    joined = Tables.concat(a, b)
    assert [row.tolist() for row in map(joined.row, range(3))] == [*map(list, (a.row(0), a.row(1), b.row(0)))]
    with pytest.raises(InputError, match=r"\[8, 16\]"):
        Tables.concat(a, gaussian_tables())


def test_digest_sees_every_part():
    base = tables_from_counts([[5, 3, 2], [1, 4]])
    others = [
        tables_from_counts([[5, 2, 3], [1, 4]]),
        tables_from_counts([[5, 3, 2], [1, 4]], offsets=1),
        tables_from_counts([[5, 3], [2, 1, 4]]),
        Tables(base.frequencies, base.sizes, base.offsets, [True, False], 8),
    ]
    assert len({tables.digest() for tables in [base, *others]}) == 5


def _damage(name, value):
    def apply(arrays):
        arrays[name] = value(arrays[name])

    return apply


@pytest.mark.parametrize(
    "damage",
    [
        lambda arrays: arrays.pop("offsets"),
        lambda arrays: arrays.update(more=np.zeros(1)),
        _damage("frequencies", lambda a: a[:-1]),
        _damage("frequencies", lambda a: a.astype(np.int64)),
        _damage("frequencies", lambda a: np.full_like(a, 65535)),
        _damage("frequencies", lambda a: a[None]),
        _damage("sizes", lambda a: -a),
        _damage("sizes", lambda a: np.full_like(a, 2**31 - 1)),
        _damage("sizes", lambda a: a[::-1].copy()),
        _damage("offsets", lambda a: np.full_like(a, 2**31 - 1)),
        _damage("escapes", lambda a: a + 1),
        _damage("escapes", lambda a: a[:0]),
        _damage("precision", lambda a: a * 0),
        _damage("precision", lambda a: a + 200),
        _damage("precision", lambda a: a[:0]),
        lambda arrays: arrays.update({n: arrays[n][:0] for n in ("frequencies", "sizes", "offsets", "escapes")}),
    ],
)
def test_damaged_arrays_are_refused(damage):
    arrays = tables_from_counts([[5, 3, 2], [1, 4]], escape=True).arrays()
    damage(arrays)
    with pytest.raises(FormatError):
        Tables.from_arrays(arrays)


def test_tables_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        gaussian_tables().frequencies[0] = 3


def test_every_slot_is_found_by_the_lookup():
    tables = Tables.concat(gaussian_tables(), tables_from_counts([np.arange(300)], precision=16))
    coding = tables.coding
    cells = coding.lookup.reshape(len(tables) + 2, -1)
    slots = np.arange(cells.shape[1]) << (16 - coding.lookup_bits)
    assert (coding.starts[cells] <= slots).all()
    assert (coding.starts[cells + 1] > slots).all()
