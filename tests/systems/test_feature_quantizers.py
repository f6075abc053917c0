"""Quantisers of features without a network: PQ, OPQ and learned SQ, and the tool that compares them."""

import importlib
import json
import re
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from jaxsem.errors import InputError
from jaxsem.systems.feature_quantizers import (
    ProductQuantizer,
    RotatedProductQuantizer,
    ScalarQuantizer,
    _lloyd,
    fixed_bits,
    kmeans,
    nearest,
)

WIDTH = 16
FITS = {
    "pq": partial(ProductQuantizer.fit, subspaces=4, codewords=8),
    "opq": partial(RotatedProductQuantizer.fit, subspaces=4, codewords=8, iterations=5),
    "sq": partial(ScalarQuantizer.fit, bits=2),
    "sq-dim": partial(ScalarQuantizer.fit, bits=2, per_dimension=True),
}
SIZES = {"pq": (8,) * 4, "opq": (8,) * 4, "sq": (4,) * WIDTH, "sq-dim": (4,) * WIDTH}


def unit_features(count, width=WIDTH, seed=0):
    """Features of length 1 whose dimensions go together, as those of CLIP do."""
    mixing = np.random.default_rng(99).normal(size=(width, width)) * np.geomspace(1, 0.05, width)[:, None]
    points = np.random.default_rng(seed).normal(size=(count, width)) @ mixing
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def error(quantizer, features):
    return float(((quantizer.features(quantizer.indices(features)) - features) ** 2).sum(axis=1).mean())


@pytest.fixture(params=FITS)
def name(request):
    return request.param


def test_round_trip_shapes_types_and_ranges(name):
    quantizer = FITS[name](unit_features(200))
    features = unit_features(7, seed=1).astype(np.float16)
    indices = quantizer.indices(features)
    decoded = quantizer.features(indices)
    assert quantizer.table_sizes == SIZES[name]
    assert quantizer.bits == sum(int(np.log2(size)) for size in SIZES[name])
    assert (indices.dtype, indices.shape) == (np.int32, (7, len(SIZES[name])))
    assert (decoded.dtype, decoded.shape) == (np.float32, (7, WIDTH))
    assert indices.min() >= 0
    assert (indices.max(axis=0) < SIZES[name]).all()


def test_a_decoded_feature_is_nearer_than_chance(name):
    quantizer, features = FITS[name](unit_features(400)), unit_features(100, seed=1)
    assert error(quantizer, features) < 0.6 * error_of_mean(features)


def error_of_mean(features):
    return float(((features - features.mean(axis=0)) ** 2).sum(axis=1).mean())


def test_no_features_give_no_indices(name):
    quantizer = FITS[name](unit_features(200))
    indices = quantizer.indices(np.zeros((0, WIDTH), np.float32))
    assert quantizer.features(indices).shape == (0, WIDTH)


def test_same_seed_same_quantiser(name):
    features = unit_features(200)
    first, second = (FITS[name](features, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.features(first.indices(features)), second.features(second.indices(features)))


def test_another_seed_starts_elsewhere():
    features = unit_features(200)
    assert not np.array_equal(FITS["pq"](features, seed=0).codebooks, FITS["pq"](features, seed=1).codebooks)


@pytest.mark.parametrize("kind", [ProductQuantizer, RotatedProductQuantizer])
def test_more_codewords_lose_less(kind):
    features = unit_features(600)
    errors = [error(kind.fit(features, subspaces=4, codewords=size), features) for size in (2, 4, 16, 64)]
    assert all(later < 0.9 * earlier for earlier, later in pairwise(errors)), errors


@pytest.mark.parametrize("per_dimension", [False, True])
def test_more_levels_lose_less(per_dimension):
    features = unit_features(600)
    errors = [error(ScalarQuantizer.fit(features, bits=b, per_dimension=per_dimension), features) for b in (1, 2, 3, 4)]
    assert all(later < 0.6 * earlier for earlier, later in pairwise(errors)), errors


def test_rotation_helps_on_dimensions_that_go_together():
    train, test = unit_features(1000), unit_features(300, seed=1)
    plain = ProductQuantizer.fit(train, subspaces=4, codewords=16)
    rotated = RotatedProductQuantizer.fit(train, subspaces=4, codewords=16)
    assert error(rotated, train) < 0.9 * error(plain, train)
    assert error(rotated, test) < 0.9 * error(plain, test)


def test_every_round_of_opq_lowers_the_error():
    features = unit_features(400)
    errors = [
        error(RotatedProductQuantizer.fit(features, subspaces=4, codewords=8, iterations=n), features) for n in range(5)
    ]
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(errors)), errors
    assert errors[0] == pytest.approx(error(FITS["pq"](features), features), rel=1e-5)


def test_the_rotation_is_orthogonal():
    rotation = FITS["opq"](unit_features(200)).rotation
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(WIDTH), atol=1e-6)


def test_pq_recovers_data_that_are_codewords():
    rng = np.random.default_rng(0)
    codewords = rng.normal(size=(4, 8, 4)).astype(np.float32)
    labels = np.concatenate([np.arange(8)[:, None].repeat(4, axis=1), rng.integers(0, 8, (300, 4))])
    features = codewords[np.arange(4), labels].reshape(-1, 16)
    quantizer = ProductQuantizer.fit(features, subspaces=4, codewords=8)
    np.testing.assert_allclose(quantizer.features(quantizer.indices(features)), features, atol=1e-6)


@pytest.mark.parametrize("per_dimension", [False, True])
def test_sq_recovers_data_that_are_levels(per_dimension):
    # Rare levels too, which quantiles of the values alone would miss.
    levels = np.array([-0.4, -0.1, 0.0, 0.45], np.float32)
    features = levels[np.random.default_rng(0).choice(4, (500, 8), p=[0.02, 0.48, 0.48, 0.02])]
    quantizer = ScalarQuantizer.fit(features, bits=2, per_dimension=per_dimension)
    np.testing.assert_allclose(quantizer.features(quantizer.indices(features)), features, atol=1e-7)


def test_sq_finds_the_levels_of_lloyd_and_max():
    # Max (1960), table I: the optimum for a standard normal with 4 levels is 0.4528 and 1.510. The data are quantiles
    # of the normal and not draws, whose few-per-mille asymmetry moves the levels by several times as much.
    quantiles = [NormalDist(0, 0.05).inv_cdf((i + 0.5) / 20_000) for i in range(20_000)]
    levels = ScalarQuantizer.fit(np.array(quantiles).reshape(-1, 4), bits=2).levels[0] / 0.05
    np.testing.assert_allclose(levels, [-1.510, -0.4528, 0.4528, 1.510], atol=0.001)


def test_sq_levels_stay_within_the_limit():
    features = np.random.default_rng(0).normal(size=(500, 4))
    assert np.abs(ScalarQuantizer.fit(features, bits=3).levels).max() == 0.5
    assert np.abs(ScalarQuantizer.fit(features, bits=3, limit=10).levels).max() > 1


def test_kmeans_uses_every_codeword():
    # 3 far groups of which two are tiny, and 2 codewords more than groups.
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(c, 0.1, (n, 2)) for c, n in ((0, 400), (50, 3), (-50, 3))]).astype(np.float32)
    labels, errors = nearest(points, kmeans(points, 5, rng))
    assert len(np.unique(labels)) == 5
    assert errors.max() < 1


def test_kmeans_moves_an_unused_codeword_to_the_worst_served_point():
    points = np.array([[0.0], [0.2], [9.0]], np.float32)
    moved = _lloyd(points, np.array([[1.0], [1000.0]], np.float32))
    np.testing.assert_allclose(moved, [[9.2 / 3], [9.0]], rtol=1e-6)


def test_kmeans_takes_fewer_distinct_points_than_codewords():
    points = np.repeat(np.array([[0.0], [1.0]], np.float32), 4, axis=0)
    assert nearest(points, kmeans(points, 4, np.random.default_rng(0)))[1].max() == 0


def test_fixed_length_rounds_up():
    assert fixed_bits([4, 5, 8, 2]) == 2 + 3 + 3 + 1


def test_features_of_another_width(name):
    with pytest.raises(InputError, match=r"features are \[images, 16\] for this model, not of shape \(2, 15\)"):
        FITS[name](unit_features(200)).indices(np.zeros((2, 15)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite(name, value):
    features = unit_features(200)
    quantizer = FITS[name](features)
    features[5, 3] = value
    for use in (FITS[name], quantizer.indices):
        with pytest.raises(InputError, match="1 of 200 features hold NaN or infinity, the first is number 5"):
            use(features)


@pytest.mark.parametrize("features", [np.zeros(16), np.zeros((2, 3, 16)), np.zeros((3, 0)), np.full((20, 16), "a")])
def test_features_that_are_no_matrix(name, features):
    with pytest.raises(
        InputError, match=r"not of shape \(16,\)|not of shape \(2, 3, 16\)|not of shape \(3, 0\)|real numbers, not <U1"
    ):
        FITS[name](features)


@pytest.mark.parametrize("kind", [ProductQuantizer, RotatedProductQuantizer])
@pytest.mark.parametrize("subspaces", [5, 0, 32])
def test_a_width_that_does_not_divide(kind, subspaces):
    with pytest.raises(InputError, match=f"width of 16 .* {subspaces} "):
        kind.fit(unit_features(50), subspaces=subspaces, codewords=4)


def test_fewer_features_than_codewords():
    few = unit_features(7)
    for name in ("pq", "opq"):
        with pytest.raises(InputError, match=r"7 training features .* 8 codewords"):
            FITS[name](few)
    with pytest.raises(InputError, match=r"7 training features .* 8 codewords"):
        ScalarQuantizer.fit(few, bits=3, per_dimension=True)


def test_a_codebook_of_one_codeword():
    with pytest.raises(InputError, match="at least 2 codewords, not 1"):
        ProductQuantizer.fit(unit_features(50), subspaces=4, codewords=1)


@pytest.mark.parametrize("option", [{"bits": 0}, {"bits": 9}, {"bits": 2, "limit": 0.0}])
def test_scalar_options_out_of_range(option):
    with pytest.raises(InputError, match=r"not (0|9|0\.0)$"):
        ScalarQuantizer.fit(unit_features(50), **option)


def test_indices_outside_their_table(name):
    quantizer = FITS[name](unit_features(200))
    indices = quantizer.indices(unit_features(3))
    for bad in (-1, SIZES[name][1]):
        indices[2, 1] = bad
        with pytest.raises(InputError, match=rf"index {bad} at \(2, 1\) .* {SIZES[name][1]}"):
            quantizer.features(indices)
    with pytest.raises(InputError, match="indices are integers of shape"):
        quantizer.features(indices[:, 1:])
    with pytest.raises(InputError, match="indices are integers of shape"):
        quantizer.features(indices.astype(np.float32))


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "tools"))
    yield importlib.import_module("bench_features")
    sys.modules.pop("bench_features", None)


def test_the_tool_writes_what_it_prints(tool, tmp_path, capsys):
    np.save(tmp_path / "f.npy", unit_features(340))
    arguments = ["--features", tmp_path / "f.npy", "--train", 300, "--rates", 1, 2, "--json", tmp_path / "r.json"]
    assert tool.main([str(a) for a in arguments]) == 0
    record = json.loads((tmp_path / "r.json").read_text())
    rows = {(row["name"], row["rate"]): row for row in record["rows"]}
    printed = capsys.readouterr().out
    assert (record["train"], record["test"], record["width"]) == (300, 40, 16)
    assert {("SQ, shared levels", 1.0), ("PQ, 16 codewords", 2.0), ("OPQ, 256 codewords", 1.0)} <= set(rows)
    for row in rows.values():
        assert f"{row['cosine']:.4f}" in printed
        assert 0.5 < row["cosine"] <= 1
        assert 0 < row["itself"] <= 1
        assert 0 < row["neighbours"] <= 1
        assert row["bits"] == row["rate"] * 16
    assert rows["PQ, 16 codewords", 2.0]["cosine"] > rows["PQ, 16 codewords", 1.0]["cosine"]


def test_features_kept_as_they_are_find_themselves(tool):
    """A quantiser that loses nothing has every score at 1."""
    train, test = unit_features(50), unit_features(20, seed=1)

    class Lossless:
        table_sizes, bits = (20,), 5

        def indices(self, features):
            return np.zeros((len(features), 1), np.int32)

        def features(self, indices):
            return test

    row = tool.measure("lossless", lambda features, seed: Lossless(), train, test, 0)
    assert row.cosine == pytest.approx(1, abs=1e-6)
    assert (row.itself, row.neighbours) == (1, 1)


@pytest.mark.parametrize(
    ("array", "train", "message"),
    [
        (np.zeros((30, 16)), 20, "row 0 of .* all zeros"),
        (np.ones((30, 16)), 30, "--train must be 10 to 29 of 30 features, not 30"),
        (np.full((30, 16), np.nan), 20, "NaN or infinity"),
    ],
)
def test_the_tool_refuses_bad_features(tool, tmp_path, capsys, array, train, message):
    np.save(tmp_path / "f.npy", array)
    assert tool.main(["--features", str(tmp_path / "f.npy"), "--train", str(train)]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err), captured.err


def test_the_tool_refuses_a_file_that_is_no_array(tool, tmp_path, capsys):
    (tmp_path / "f.npy").write_text("hello")
    assert tool.main(["--features", str(tmp_path / "f.npy")]) == 2
    assert "is not a .npy file of features" in capsys.readouterr().err
