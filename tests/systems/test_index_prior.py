"""The learned prior of indices: what it learns, that it freezes without loss, and that it codes."""

import jax
import numpy as np
import pytest

from jaxsem.entropy.indices import PriorRans, StaticRans
from jaxsem.errors import InputError
from jaxsem.systems import index_prior
from jaxsem.systems.index_prior import IndexPrior, fit_prior, freeze_prior, prior_bits, prior_logits

SIZES = (4,) * 15 + (3, 7, 2, 6, 5)
QUICK = {"hidden": 16, "steps": 300, "batch": 64, "learning_rate": 1e-2}


def correlated_rows(count, seed, sizes=SIZES):
    """Rows that a few hidden causes explain: each index cuts a noisy mixture of four normal numbers into `size` parts."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(4, len(sizes)))
    values = rng.normal(size=(count, 4)) @ mixing / 2 + 0.4 * rng.normal(size=(count, len(sizes)))
    return np.clip(np.floor((values / 3 + 0.5) * sizes), 0, np.array(sizes) - 1).astype(np.int32)


TRAIN, TEST = correlated_rows(4000, 0), correlated_rows(500, 1)


@pytest.fixture(scope="module")
def prior():
    return fit_prior(TRAIN, SIZES, **QUICK)


@pytest.fixture(scope="module")
def coder(prior):
    return PriorRans(freeze_prior(prior))


def test_the_prior_needs_a_fifth_less_than_static_tables(coder):
    static = StaticRans.from_indices(TRAIN, SIZES)
    sizes = {kind.name: np.mean([len(stream) for stream in kind.encode(TEST)]) for kind in (static, coder)}
    assert sizes["prior"] < 0.8 * sizes["rans"]


def test_it_decodes_what_it_codes(coder):
    assert (coder.decode(coder.encode(TEST)) == TEST).all()


def test_freezing_costs_less_than_half_a_percent(prior, coder):
    trained, frozen = prior_bits(prior, TEST).mean(), coder.ideal_bits(TEST).mean()
    assert abs(frozen / trained - 1) < 0.005


def test_bytes_are_a_quarter_above_the_ideal(coder):
    over = np.mean([len(stream) for stream in coder.encode(TEST)]) - coder.ideal_bits(TEST).mean() / 8
    assert 0 < over < 0.35


def test_the_bits_are_those_of_the_logits(prior):
    """Recomputed position by position, with the sum of the embeddings taken one by one."""
    params = {name: np.asarray(value, np.float64) for name, value in prior.params.items()}
    found = []
    for row in TEST[:20]:
        a, bits = params["hidden_bias"], 0.0
        for i, index in enumerate(row):
            logits = np.clip(a, -1, 1) @ params["output_weights"][i] + params["output_bias"][i]
            logits = logits[: SIZES[i]]
            bits += np.log2(np.exp(logits).sum()) - logits[index] * np.log2(np.e)
            a = a + params["hidden_weights"][i, index]
        found.append(bits)
    assert prior_bits(prior, TEST[:20]) == pytest.approx(np.array(found), rel=1e-4)


def test_logits_depend_on_the_indices_before_only(prior):
    other = TEST[:1].copy()
    other[0, 5] = 3 - other[0, 5]
    logits, changed = (np.asarray(jax.jit(prior_logits)(prior.params, rows)) for rows in (TEST[:1], other))
    assert (logits[:6] == changed[:6]).all()
    assert (logits[6:] != changed[6:]).any((1, 2)).all()


def test_the_parameters_that_did_best_are_kept(prior):
    assert prior.held_out_bits == prior.curve.min() < 0.9 * prior.curve[0]
    assert len(prior.curve) == 21


def test_with_nothing_to_learn_it_is_about_as_good_as_static_tables():
    """40 rows of independent indices: it may learn them by heart, but does not keep that."""
    rows = np.random.default_rng(0).integers(0, 4, (540, 20))
    prior = fit_prior(rows[:40], (4,) * 20, **{**QUICK, "weight_decay": 0.0, "dropout": 0.0})
    static = StaticRans.from_indices(rows[:40], (4,) * 20)
    assert prior.curve[-1] > prior.held_out_bits * 1.1
    assert prior_bits(prior, rows[40:]).mean() < 1.05 * static.ideal_bits(rows[40:]).mean()


def test_before_training_it_is_the_static_tables():
    """One step of a rate that changes nothing."""
    prior = fit_prior(TRAIN, SIZES, **{**QUICK, "steps": 1, "learning_rate": 1e-12})
    static = StaticRans.from_indices(TRAIN, SIZES, precision=16)
    assert prior_bits(prior, TEST).mean() == pytest.approx(static.ideal_bits(TEST).mean(), rel=5e-3)


def test_the_same_seed_gives_the_same_integers(prior, coder):
    assert PriorRans(freeze_prior(fit_prior(TRAIN, SIZES, **QUICK))).digest() == coder.digest()
    assert PriorRans(freeze_prior(fit_prior(TRAIN, SIZES, **QUICK, seed=1))).digest() != coder.digest()


def test_other_numbers_compile_nothing_again(prior):
    compiled = index_prior._train._cache_size()
    fit_prior(TRAIN, SIZES, **{**QUICK, "steps": 7, "learning_rate": 1e-3}, weight_decay=1.0, dropout=0.4, seed=3)
    assert index_prior._train._cache_size() == compiled


def test_one_position_is_a_table():
    rows = np.random.default_rng(0).integers(0, 2, (50, 1))
    coder = PriorRans(freeze_prior(fit_prior(rows, (2,), **{**QUICK, "hidden": 2, "steps": 20})))
    assert (coder.decode(coder.encode(rows)) == rows).all()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_weights", 300.0, "hidden weights of a prior reach 300"),
        ("output_weights", 300.0, "output weights of a prior reach 433"),
        ("output_bias", np.nan, "not finite"),
        ("hidden_bias", np.inf, "not finite"),
        ("hidden_bias", 1e6, "sums could overflow"),
    ],
)
def test_parameters_that_do_not_fit_integers_are_refused(prior, name, value, message):
    params = {**prior.params, name: prior.params[name].at[(0,) * prior.params[name].ndim].set(value)}
    with pytest.raises(InputError, match=message):
        freeze_prior(IndexPrior(prior.sizes, params, 0.0, np.zeros(1)))


@pytest.mark.parametrize(
    "options",
    [
        {"hidden": 0},
        {"hidden": 1025},
        {"steps": 0},
        {"batch": 0},
        {"learning_rate": 0.0},
        {"weight_decay": -1.0},
        {"dropout": 1.0},
        {"held_out": 0.0},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        fit_prior(TRAIN, SIZES, **options)


def test_rows_that_do_not_fit_are_refused(prior):
    with pytest.raises(InputError, match="index 6 at"):
        fit_prior(TRAIN, (4,) * 20)
    with pytest.raises(InputError, match="too few"):
        fit_prior(TRAIN[:1], SIZES)
    with pytest.raises(InputError, match="shape"):
        prior_bits(prior, TEST[:, :-1])


def test_a_rate_at_which_training_diverges_is_named():
    with pytest.raises(InputError, match=r"diverged at a learning rate of 1e\+30"):
        fit_prior(TRAIN, SIZES, **{**QUICK, "learning_rate": 1e30})
