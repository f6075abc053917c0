"""The factorised prior: quantiles by bisection and tables against the definition, point by point."""

import math
from itertools import pairwise

import numpy as np
import pytest

from jaxsem.entropy import (
    cumulative_logits,
    factorised_tables,
    quantiles_by_bisection,
    quantise_counts,
    quantise_pmf,
)
from jaxsem.errors import InputError

WIDTHS = (1, 3, 3, 3, 3, 1)


def make_prior(channels=5, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    matrices, biases, factors = [], [], []
    for i, (fan_in, fan_out) in enumerate(pairwise(WIDTHS)):
        start = math.log(math.expm1(1 / 10**0.2 / fan_out))
        matrices.append(start + spread * rng.normal(size=(channels, fan_out, fan_in)) * 0.3)
        biases.append(rng.uniform(-0.5, 0.5, (channels, fan_out, 1)))
        if i < 4:
            factors.append(0.3 * rng.normal(size=(channels, fan_out, 1)))
    return matrices, biases, factors


def logit(prior, channel, z):
    """The same network for one number, written out."""
    u = [z]
    for i, (matrix, bias) in enumerate(zip(prior[0], prior[1])):
        softplus = [[math.log1p(math.exp(h)) for h in row] for row in matrix[channel]]
        u = [sum(h * x for h, x in zip(row, u)) + b[0] for row, b in zip(softplus, bias[channel])]
        if i < 4:
            u = [x + math.tanh(a[0]) * math.tanh(x) for x, a in zip(u, prior[2][i][channel])]
    return u[0]


def test_logits_equal_the_formula():
    prior = make_prior()
    z = np.random.default_rng(1).normal(0, 5, (5, 7))
    expected = [[logit(prior, c, v) for v in row] for c, row in enumerate(z.tolist())]
    np.testing.assert_allclose(cumulative_logits(*prior, z), expected, rtol=1e-12)


def test_bisection_finds_the_quantiles():
    prior = make_prior()
    quantiles = quantiles_by_bisection(*prior)
    target = math.log(2 / 1e-9 - 1)
    np.testing.assert_allclose(cumulative_logits(*prior, quantiles), np.tile([-target, 0, target], (5, 1)), atol=1e-9)


def test_tables_follow_the_density():
    prior = make_prior()
    quantiles = quantiles_by_bisection(*prior)
    tables = factorised_tables(*prior, quantise=quantise_counts)
    for c in range(5):
        median, row, offset = quantiles[c, 1], tables.row(c), int(tables.offsets[c])
        assert offset == -math.ceil(median - quantiles[c, 0])
        assert len(row) == math.ceil(quantiles[c, 2] - median) - offset + 2
        sigmoid = [1 / (1 + math.exp(-logit(prior, c, median + offset + k - 0.5))) for k in range(len(row))]
        # Each of the hundreds of rare symbols must have one count of 65536, which the others give in proportion.
        np.testing.assert_allclose(row[:-1] / 65536, np.diff(sigmoid), rtol=0.015, atol=1 / 65536)


def test_tables_use_the_quantiser_asked_for():
    rows = []
    tables = factorised_tables(*make_prior(), quantise=lambda pmf, bits: rows.append(pmf) or quantise_pmf(pmf, bits))
    assert tables.digest() == factorised_tables(*make_prior()).digest()
    assert [len(pmf) for pmf in rows] == tables.sizes.tolist()
    assert all(abs(pmf.sum() - 1) < 1e-9 for pmf in rows)


def test_quantiles_of_compressai_layout_are_accepted():
    prior = make_prior()
    quantiles = quantiles_by_bisection(*prior)
    assert factorised_tables(*prior, quantiles[:, None, :]).digest() == factorised_tables(*prior).digest()


def test_small_quantiles_leave_the_tails_to_the_escape():
    prior = make_prior()
    quantiles = quantiles_by_bisection(*prior)
    narrow = quantiles[:, 1:2] + [-1.0, 0.0, 1.0]
    tables = factorised_tables(*prior, narrow)
    assert tables.sizes.tolist() == [4] * 5
    assert (tables.frequencies.reshape(5, 4)[:, 3] > 1000).all()


def test_a_flat_density_is_refused():
    matrices, biases, factors = make_prior(channels=2)
    matrices[0][1] = -60
    with pytest.raises(InputError, match="Channel 1"):
        factorised_tables(matrices, biases, factors)


def test_too_wide_quantiles_are_refused():
    with pytest.raises(InputError, match="span"):
        factorised_tables(*make_prior(1), np.array([[-1e9, 0, 1e9]]))


def test_misshapen_layers_are_refused():
    matrices, biases, factors = make_prior()
    with pytest.raises(InputError, match="Layer 1"):
        factorised_tables([matrices[0], matrices[0], *matrices[2:]], biases, factors)
    with pytest.raises(InputError, match="one factor fewer"):
        factorised_tables(matrices, biases, factors[:-1])
